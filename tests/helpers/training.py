"""Short training runs on one process, as a Python user builds them."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Sampling


def parts(policy: Policy, **settings: Any) -> tuple[OPSDModule, OPSDDataModule]:
    """Return a module and its data, as a Python user builds them."""
    settings = {
        "sampling": Sampling(max_new_tokens=8, n=2),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 6),
        "max_grad_norm": 1.0,
    } | settings
    data = OPSDDataModule(
        policy,
        train=WordProblems(size=8, seed=1),
        val=WordProblems(size=4, seed=2),
        test=WordProblems(size=4, seed=3),
        prompts=Prompts("{question}", "{question} {context}"),
        batch_size=2,
        eval_batch_size=3,
        max_new_tokens=8,
    )
    return OPSDModule(policy, **settings), data


class Recorder(Callback):
    """Callback that records every step's loss, and raises before a step if asked."""

    def __init__(self, crash_before: int | None = None) -> None:
        self.crash_before = crash_before
        self.losses: dict[int, float] = {}

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.crash_before:
            raise RuntimeError("crash")

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.losses[trainer.global_step] = float(outputs["loss"])


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    settings = {"max_steps": 6, "logger": CSVLogger(folder), "num_sanity_val_steps": 0} | settings
    return Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **settings,
    )  # fmt: skip


def adapters(module: OPSDModule) -> dict[str, torch.Tensor]:
    return {key: value.detach().clone() for key, value in module.state_dict().items()}


def metrics(folder: Path) -> list[dict[str, float]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [{k: float(v) for k, v in row.items() if v} for row in csv.DictReader(file)]
