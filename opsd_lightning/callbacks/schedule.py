"""When a callback acts: every n optimizer steps, and when a validation logged new values."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from opsd_lightning.methods.base import PolicyModule


def due(trainer: Trainer, module: PolicyModule, every_n_steps: int) -> bool:
    """Before a batch's first update: whether its updates end at a multiple of so many optimizer steps or pass one.

    True for the first batch. By the step alone, so that every rank comes to the same.
    """
    before, after = trainer.global_step, trainer.global_step + module.updates_per_batch
    after = min(after, trainer.max_steps) if trainer.max_steps >= 0 else after
    return before == 0 or after // every_n_steps > before // every_n_steps


def newly_logged(metrics: Mapping[str, Any], seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalars that were logged since the last time: Lightning keeps the values of those that are logged now and then.

    Args:
        metrics: The trainer's ``callback_metrics``.
        seen: What was there the last time; held, so that the memory of a value is not used for another. Brought up to date.
    """
    new = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, Tensor)
        and value.numel() == 1
        and (name not in seen or seen[name].data_ptr() != value.data_ptr())
    }
    seen |= new
    return new
