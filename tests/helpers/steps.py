"""Optimizer steps on one batch of fixed prompts."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import CSVLogger

from helpers.models import PROMPTS, TEACHER_PROMPTS
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import is_adapter_key
from opsd_lightning.types import Example, PromptBatch

BATCH = PromptBatch(PROMPTS, TEACHER_PROMPTS, [Example("q", "t", "1")] * 3, [True] * 3)


class Repeat:
    """A loader of the same batch. Lightning would take a bare list for several loaders."""

    def __init__(self, batch: PromptBatch, times: int) -> None:
        self.batch, self.times = batch, times

    def __len__(self) -> int:
        return self.times

    def __iter__(self) -> Iterator[PromptBatch]:
        return iter([self.batch] * self.times)


def fit(module: OPSDModule, steps: int, folder: Path, batch: PromptBatch = BATCH, **trainer: Any) -> Trainer:
    """Make optimizer steps of the module, each on the same questions."""
    run = Trainer(
        accelerator="cpu", max_steps=steps, logger=CSVLogger(folder), enable_checkpointing=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, log_every_n_steps=1, **trainer,
    )  # fmt: skip
    run.fit(module, train_dataloaders=Repeat(batch, steps))
    return run


def one_step(folder: Path) -> Trainer:
    """Return a trainer for one step that writes no files."""
    return Trainer(
        accelerator="cpu", max_steps=1, logger=False, enable_checkpointing=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False,
    )  # fmt: skip


def adapter(module: OPSDModule) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in module.model.named_parameters() if is_adapter_key(n)}
