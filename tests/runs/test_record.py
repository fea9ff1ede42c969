"""Records and tables of runs that go on: no row twice, no line lost, and nothing that a spreadsheet executes."""

from __future__ import annotations

import csv
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.rollouts import RolloutTable
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.export import write_adapter
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.token_report import TokenReport
from opsd_lightning.runs.reader import read_complete_lines
from opsd_lightning.types import ConfigError, Sampling
from opsd_lightning.utils.csv_tables import append_rows, check_table, escape_formula, prepare_table, unescape_formula

pytestmark = pytest.mark.integration


class Stops(Callback):
    """Ends a run before a step, as a kill does: without a checkpoint."""

    def __init__(self, step: int) -> None:
        self.step = step

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.step:
            raise RuntimeError("stop")


def fit(
    model: str,
    root: Path,
    stop: int | None,
    checkpoint: Path | None = None,
    every: int = 2,
    *more: Callback,
    **settings: Any,
) -> None:
    policy = Policy(model=model, dtype="float32", lora=LoRA(r=2, alpha=4, dropout=0.0))
    torch.manual_seed(0)
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=4), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    data = OPSDDataModule(
        policy, train=WordProblems(size=32, seed=1), prompts=Prompts("{question}", "{question} {context}"), batch_size=2,
        max_new_tokens=4,
    )  # fmt: skip
    saved = ModelCheckpoint(root / "saved", filename="{step}", every_n_train_steps=every, save_top_k=-1)
    callbacks = [RunReport(), RolloutTable(every_n_steps=1, rows=2), saved, *more, *([Stops(stop)] if stop else [])]
    run = Trainer(
        accelerator="cpu", callbacks=callbacks, max_steps=8, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **{"logger": False} | settings,
    )  # fmt: skip
    if stop:
        with pytest.raises(RuntimeError, match="stop"):
            run.fit(module, data, ckpt_path=checkpoint, weights_only=True)
    else:
        run.fit(module, data, ckpt_path=checkpoint, weights_only=True)


def steps(folder: Path) -> list[int]:
    return [line["step"] for line in read_complete_lines(folder / "metrics.jsonl") if line["kind"] == "train"]


def rows(path: Path) -> list[int]:
    with path.open(newline="", encoding="utf-8") as file:
        header, *found = csv.reader(file)
    assert tuple(header) == RolloutTable.COLUMNS
    return [int(row[0]) for row in found]


def twice(last: int) -> list[int]:
    return [step for step in range(1, last + 1) for _ in range(2)]


def test_resuming_keeps_or_cuts_the_record(folders: dict[str, str], tmp_path: Path) -> None:
    root, model = tmp_path / "run", folders["llama"]
    fit(model, root, stop=5)
    assert steps(root / "record") == [1, 2, 3, 4, 5] and rows(root / "rollouts.csv") == twice(5)
    with (root / "rollouts.csv").open("ab") as file:
        file.write(b'6,"half a')
    fit(model, root, stop=7, checkpoint=root / "saved" / "step=4.ckpt")  # the newest
    assert steps(root / "record") == [1, 2, 3, 4, 5, 6, 7] and rows(root / "rollouts.csv") == twice(7)
    assert not list(root.glob("record-*")) and not list(root.glob("rollouts-*"))
    before = {path.name: path.read_bytes() for path in (root / "record").iterdir() if path.name != ".reserve"}
    table = (root / "rollouts.csv").read_bytes()
    fit(model, root, stop=None, checkpoint=root / "saved" / "step=2.ckpt")
    assert steps(root / "record") == list(range(1, 9)) and rows(root / "rollouts.csv") == twice(8)
    assert {path.name: path.read_bytes() for path in (root / "record-1").iterdir()} == before
    assert (root / "rollouts-1.csv").read_bytes() == table
    assert json.loads((root / "record" / "run.json").read_text())["status"] == "finished"
    assert not [path.name for path in root.rglob("*") if "partial" in path.name or path.name == ".reserve"]


def test_resuming_another_runs_checkpoint_starts_a_record(folders: dict[str, str], tmp_path: Path) -> None:
    """Its steps are not put behind those of the run that the folder holds; going on again from its own checkpoint is."""
    mine, other = tmp_path / "mine", tmp_path / "other"
    fit(folders["llama"], mine, 6)
    fit(folders["llama"], other, 5)
    before = (mine / "rollouts.csv").read_bytes()
    fit(folders["llama"], mine, 7, other / "saved" / "step=4.ckpt")
    assert steps(mine / "record-1") == [1, 2, 3, 4, 5, 6] and steps(mine / "record") == [5, 6, 7]
    assert (mine / "rollouts-1.csv").read_bytes() == before and rows(mine / "rollouts.csv") == twice(7)[8:]
    (newest,) = (path for path in (mine / "saved").glob("step=6*.ckpt") if path.stat().st_mtime == max(
        other.stat().st_mtime for other in (mine / "saved").glob("step=6*.ckpt")))  # fmt: skip
    fit(folders["llama"], mine, None, newest)
    assert steps(mine / "record") == [5, 6, 7, 8] and rows(mine / "rollouts.csv") == twice(8)[8:]
    assert not (mine / "record-2").exists()


def test_a_new_run_in_a_folder_begins_its_own_table(folders: dict[str, str], tmp_path: Path) -> None:
    for _ in range(2):
        fit(folders["llama"], tmp_path / "run", stop=None, every=100)
    assert rows(tmp_path / "run" / "rollouts.csv") == rows(tmp_path / "run" / "rollouts-1.csv") == twice(8)
    assert steps(tmp_path / "run" / "record-1") == list(range(1, 9))


def test_fast_dev_run_writes_nothing(folders: dict[str, str], tmp_path: Path) -> None:
    """A trained export, its record and its table stay as they are."""
    adapter = tmp_path / "adapter"
    write_adapter(Policy(model=folders["llama"], lora=LoRA(r=2)).build(), adapter)
    (tmp_path / "rollouts.csv").write_text(",".join(RolloutTable.COLUMNS) + "\r\n1,q,c,1,False,,\r\n")
    before = {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()}
    fit(folders["llama"], tmp_path, None, None, 2, AdapterExport(), TokenReport(pictures=False), fast_dev_run=True)
    assert {path: path.read_bytes() for path in tmp_path.rglob("*") if path.is_file()} == before


def test_a_logger_of_a_given_version_keeps_what_it_had(folders: dict[str, str], tmp_path: Path) -> None:
    """Lightning deletes the metrics of a version that is opened again."""
    root, model = tmp_path / "run", folders["llama"]

    def log() -> CSVLogger:
        return CSVLogger(root, version="mine", flush_logs_every_n_steps=1)

    fit(model, root, stop=5, logger=log())
    first = (root / "lightning_logs" / "mine" / "metrics.csv").read_bytes()
    fit(model, root, stop=None, checkpoint=root / "saved" / "step=4.ckpt", logger=log())
    assert (root / "lightning_logs" / "mine" / "metrics-1.csv").read_bytes() == first
    assert rows(root / "lightning_logs" / "mine" / "rollouts.csv") == twice(8)


CELLS = [
    "=1+1", "+1", "-1", "@SUM(A1)", "\tx", "\rx", "\n=1", "'=1", "''=1", "'quoted'", "'", "", "plain", " =1", "=", "\uff1dx",
    '=HYPERLINK("http://x","y")', "a\r\nb", 'a"b,c', "\u2028", "=\x00", "1", "-", "x" * 200_000,
]  # fmt: skip


def test_cells_are_no_formulas_and_can_be_read_back(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    for number, value in enumerate(CELLS):
        append_rows(path, ("step", "text", "number"), [[number, value, -0.5]])
    csv.field_size_limit(10**6)
    with path.open(newline="", encoding="utf-8") as file:
        _, *found = csv.reader(file)
    assert [unescape_formula(row[1]) for row in found] == CELLS
    assert not [row[1] for row in found if row[1][:1] in tuple("=+-@\t\r\n\uff1d")]
    assert {row[2] for row in found} == {"-0.5"}, "numbers stay numbers"
    assert [escape_formula(value) for value in (-1, 1.5, True, None)] == [-1, 1.5, True, None]


def test_a_table_that_is_cut_anywhere_goes_on(tmp_path: Path) -> None:
    path, columns = tmp_path / "table.csv", ("step", "text")
    append_rows(path, columns, [[step, '=a\r\n"b",\u00e4'] for step in range(1, 6)])
    content = path.read_bytes()
    for end in range(len(content)):
        path.write_bytes(content[:end])
        check_table(path, columns, "setting")
        prepare_table(path, columns, 3, keep=False)
        append_rows(path, columns, [[4, "new"]])
        with path.open(newline="", encoding="utf-8") as file:
            header, *found = csv.reader(file)
        kept = content[:end].count('ä"\r\n'.encode())
        assert tuple(header) == columns and [int(row[0]) for row in found] == [*range(1, min(kept, 3) + 1), 4], end
        assert len(list(tmp_path.iterdir())) == 1


def test_a_file_that_is_no_such_table_is_refused(tmp_path: Path) -> None:
    for content in ("a,b\r\n", "step\r\n", "\n", "step,text,more\r\n"):
        (tmp_path / "table.csv").write_text(content, newline="")
        with pytest.raises(ConfigError):
            check_table(tmp_path / "table.csv", ("step", "text"), "trainer.callbacks.path")
