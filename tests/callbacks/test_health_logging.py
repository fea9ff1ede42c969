"""Tests that `Health` logs each value once, at its step or at the next logged step."""

from __future__ import annotations

import csv
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger, Logger

from opsd_lightning.callbacks.health import Health
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Sampling


class Counts(Logger):
    name = version = "counts"

    def __init__(self) -> None:
        super().__init__()
        self.seen: Counter[tuple[str, int]] = Counter()

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.seen.update((name, int(step or 0)) for name in metrics if name.startswith("health/"))

    def log_hyperparams(self, *args: Any, **kwargs: Any) -> None:
        pass


@pytest.mark.parametrize(("every", "log_every", "at"), [(3, 1, [0, 2, 5]), (3, 2, [1, 3, 5])])
def test_values_are_logged_once(every: int, log_every: int, at: list[int], folders: dict[str, str], tmp_path: Path) -> None:
    policy = Policy(model=folders["llama"], dtype="float32", lora=LoRA(r=2, alpha=4, dropout=0.0))
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=4), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    data = OPSDDataModule(
        policy, train=WordProblems(size=16, seed=1), prompts=Prompts("{question}", "{question} {context}"), batch_size=2,
        max_new_tokens=4,
    )  # fmt: skip
    counts, log = Counts(), CSVLogger(tmp_path)
    Trainer(
        accelerator="cpu", callbacks=[Health(every_n_steps=every)], max_steps=7, logger=[counts, log], default_root_dir=tmp_path,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=False, log_every_n_steps=log_every,
    ).fit(module, data)  # fmt: skip
    assert set(counts.seen.values()) == {1}
    assert sorted(step for name, step in counts.seen if name == "health/distinct_3") == at
    with (Path(log.log_dir) / "metrics.csv").open() as file:
        rows = [row for row in csv.DictReader(file) if row["health/distinct_3"]]
    assert [int(row["step"]) for row in rows] == at
