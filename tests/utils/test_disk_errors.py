"""A disk that is full for pages, tables, logs and the record: training goes on, and ``run.json`` tells the truth."""

from __future__ import annotations

import csv
import json
import os
import resource
import traceback
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.health import Health
from opsd_lightning.callbacks.rollouts import RolloutTable
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.page import write_report
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.token_report import TokenReport
from opsd_lightning.runs.reader import read_run
from opsd_lightning.types import Sampling, UserError

pytestmark = pytest.mark.integration


class Fills(Callback):
    """Nothing fits on the disk between two steps: no file grows above a size."""

    def __init__(self, first: int, until: int, size: int) -> None:
        self.first, self.until, self.size = first, until, size

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.first:
            resource.setrlimit(resource.RLIMIT_FSIZE, (self.size, resource.RLIM_INFINITY))
        if trainer.global_step == self.until:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))


def fit(model: str, root: Path, *callbacks: Callback) -> None:
    policy = Policy(model=model, dtype="float32", lora=LoRA(r=2, alpha=4, dropout=0.0))
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=4), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    data = OPSDDataModule(
        policy, train=WordProblems(size=32, seed=1), val=WordProblems(size=2, seed=2), batch_size=2, max_new_tokens=4,
        prompts=Prompts("{question}", "{question} {context}"),
    )  # fmt: skip
    Trainer(
        accelerator="cpu", callbacks=list(callbacks), max_steps=8, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=1, val_check_interval=2,
        check_val_every_n_epoch=None, num_sanity_val_steps=0, logger=[CSVLogger(root), TensorBoardLogger(root)],
    ).fit(module, data)  # fmt: skip


def in_child(work: Any, told: Path) -> None:
    child = os.fork()
    if not child:
        status = 1
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                work()
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            told.write_text(json.dumps([str(warning.message) for warning in caught]))
            status = 0
        except BaseException:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
            traceback.print_exc()
        finally:
            os._exit(status)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


@pytest.mark.parametrize("until", [6, 100], ids=["for a while", "to the end"])
def test_training_survives_a_full_disk(until: int, folders: dict[str, str], tmp_path: Path) -> None:
    root, size = tmp_path / "run", 6000
    callbacks = [
        Fills(2, until, size), RunReport(), TokenReport(every_n_steps=1, pictures=True), RolloutTable(every_n_steps=1),
        Health(every_n_steps=1),
    ]  # fmt: skip
    in_child(lambda: fit(folders["llama"], root, *callbacks), tmp_path / "told")
    told = [text for text in json.loads((tmp_path / "told").read_text()) if "could not be written" in text]
    assert told and len({text.split(" could not")[0] for text in told}) == len(told), "one warning each"
    info = json.loads((root / "record" / "run.json").read_text())
    assert info["status"] == "finished" and info["ended"]
    run = read_run(root)
    found = [point.step for point in run.train]
    with (root / "lightning_logs" / "version_0" / "metrics.csv").open(newline="") as file:
        logged = [int(row["step"]) for row in csv.DictReader(file) if row["train/loss"]]
    if until < 8:
        assert found == list(range(1, 9)) and logged == list(range(8))
        assert not {"metrics.jsonl", "report.html", "tokens.html"} & set(info["unwritten"])
        assert str(root / "rollouts.csv") not in info["unwritten"]
    else:
        lost = 8 + 4 - len(found) - len(run.validations)
        assert lost and info["unwritten"]["metrics.jsonl"] == f"{lost} lines"
        assert {"report.html", "tokens.html"} <= set(info["unwritten"])
        assert found == list(range(1, len(found) + 1)) and logged == list(range(len(logged)))
    page = write_report([root], tmp_path / "later.html").read_text(encoding="utf-8")
    assert "finished" in page


def test_an_export_to_a_full_disk_is_an_error_and_the_old_one_stays(folders: dict[str, str], tmp_path: Path) -> None:
    root = tmp_path / "run"
    fit(folders["llama"], root, AdapterExport())
    before = {path.name: path.read_bytes() for path in (root / "adapter").iterdir()}

    def work() -> None:
        with pytest.raises(UserError):
            fit(folders["llama"], root, RunReport(), AdapterExport(), Fills(7, 100, 4000))

    in_child(work, tmp_path / "told")
    assert {path.name: path.read_bytes() for path in (root / "adapter").iterdir()} == before
    assert not [path.name for path in root.iterdir() if "adapter" in path.name and path.name != "adapter"]
    assert json.loads((root / "record" / "run.json").read_text())["status"] == "failed"


def test_recovered_page_is_not_reported_as_unwritten(folders: dict[str, str], tmp_path: Path) -> None:
    class Blocks(Callback):
        def on_train_start(self, *args: Any) -> None:
            (tmp_path / "report.html").mkdir()

        def on_train_end(self, *args: Any) -> None:
            (tmp_path / "report.html").rmdir()

    with pytest.warns(UserWarning, match=r"report\.html"):
        fit(folders["llama"], tmp_path, Blocks(), RunReport())
    assert (tmp_path / "report.html").is_file()
    assert json.loads((tmp_path / "record" / "run.json").read_text())["unwritten"] == {}
