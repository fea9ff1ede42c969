"""Schedule of callbacks: every n optimizer steps, and when new values were logged."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from lightning.pytorch import Trainer
from torch import Tensor

from opsd_lightning.methods.base import PolicyModule


def is_due(trainer: Trainer, module: PolicyModule, every_n_steps: int) -> bool:
    """Return True if the updates of the current batch reach or pass a multiple of ``every_n_steps`` optimizer steps.

    Call it before the batch's first update. It is True for the first batch of a run. The result depends on the step only and
    is therefore the same on all ranks.
    """
    before, after = trainer.global_step, trainer.global_step + module.updates_per_batch
    after = min(after, trainer.max_steps) if trainer.max_steps >= 0 else after
    return before == 0 or after // every_n_steps > before // every_n_steps


def newly_logged(metrics: Mapping[str, Any], seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return the scalars that were logged since the previous call.

    Lightning keeps the latest value of each metric, so values of earlier steps are among ``callback_metrics``. It returns
    views of the value's tensor, and logs a new value as another tensor.

    Args:
        metrics: The trainer's ``callback_metrics``.
        seen: Tensors of the previous call, which this call updates. Holding them keeps their memory from being reused.
    """
    new = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, Tensor) and value.numel() == 1 and not _is_view(value, seen.get(name))
    }
    seen |= new
    return new


def _is_view(value: Tensor, other: Tensor | None) -> bool:
    return other is not None and value.dtype == other.dtype and value.is_set_to(other)
