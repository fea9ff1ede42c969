"""Records of a training step, for callbacks (`StepRecord`, `StepOutput`) and for the method itself (`Step`)."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple, TypedDict

import torch
from lightning.pytorch import Callback, Trainer
from torch import Tensor

from opsd_lightning.losses.objectives import Term
from opsd_lightning.types import PromptBatch, Rollouts

if TYPE_CHECKING:
    from opsd_lightning.methods.base import PolicyModule


@dataclass(frozen=True)
class StepRecord:
    """The contents of a training step, after the backward pass of its first update and before the weights change.

    Args:
        batch: The questions.
        student_prompts: Token ids that the student reads before each completion.
        rollouts: The completions.
        terms: Terms of the loss, the method's own first.
        loss: Value of the loss over all ranks.
        measured: Measurements of the first term by name, for each completion a tensor of shape [C] on the CPU. See
            `Objective.__call__` for the names.
    """

    batch: PromptBatch
    student_prompts: list[list[int]]
    rollouts: Rollouts
    terms: list[Term]
    loss: float
    measured: dict[str, list[Tensor]]


class StepCallback(Callback):
    """A Lightning callback that also receives the `StepRecord` of each training step.

    Example::

        class LargestDivergence(StepCallback):
            def on_step_scored(self, trainer, pl_module, record):
                if "forward_kl" in record.measured:
                    pl_module.log("largest_kl", torch.cat(record.measured["forward_kl"]).max())
    """

    def on_step_scored(self, trainer: Trainer, pl_module: PolicyModule, record: StepRecord) -> None:
        """Called once a batch on every rank, after the first backward pass and before the optimizer step.

        Args:
            trainer: The trainer.
            pl_module: The method.
            record: Contents of the step.
        """


class StepOutput(TypedDict):
    """The ``outputs`` of ``training_step`` that Lightning passes to ``on_train_batch_end``.

    Args:
        loss: Loss of the first update, a scalar.
        rollouts: The completions.
        measured: As in `StepRecord`.
    """

    loss: Tensor
    rollouts: Rollouts
    measured: dict[str, list[Tensor]]


class Pass(NamedTuple):
    """Results of the scoring pass of a micro-batch, on the device.

    Args:
        rows: Indices of its completions in the step, with T tokens in total.
        loss: The micro-batch's share of the loss, a scalar.
        measured: Measurements of the first term by name. Shape [T] each.
    """

    rows: Sequence[int]
    loss: Tensor
    measured: Mapping[str, Tensor]


def read_passes(passes: Sequence[Pass], sizes: Sequence[int]) -> tuple[float, dict[str, list[Tensor]]]:
    """Copy the results of all passes to the CPU, in one transfer.

    Args:
        passes: The passes of a step, at least one.
        sizes: Number of tokens of each completion of the step.

    Returns:
        The sum of the losses, and the measurements by name, for each completion a tensor of shape [C] on the CPU.
    """
    columns = [(found.rows, name, values) for found in passes for name, values in found.measured.items()]
    losses = torch.stack([found.loss for found in passes])
    total, *parts = (
        torch.cat([losses, *(values for _, _, values in columns)])
        .cpu()
        .split([len(passes), *(len(values) for _, _, values in columns)])
    )
    measured: dict[str, list[Tensor]] = {}
    for (rows, name, _), values in zip(columns, parts, strict=True):
        store = measured.setdefault(name, [torch.zeros(0, dtype=torch.float32)] * len(sizes))
        for row, value in zip(rows, values.split([sizes[row] for row in rows]), strict=True):
            store[row] = value
    return sum(total.tolist()), measured


class PhaseClock:
    """Seconds of the phases of a step. Each phase ends with numbers read from the device, so no kernel is left running."""

    def __init__(self) -> None:
        self.seconds = {"rollout": 0.0, "scoring": 0.0}
        self._since = time.perf_counter()

    def restart(self) -> None:
        """Leave out the time since the last phase ended."""
        self._since = time.perf_counter()

    def end(self, phase: str) -> None:
        """Add the time since the last phase ended to a phase."""
        now = time.perf_counter()
        self.seconds[phase] += now - self._since
        self._since = now


@dataclass
class Step:
    """A training step while it runs. See `PolicyModule.begin_step`.

    Args:
        batch: The questions.
        rollouts: The completions.
        student_prompts: Token ids that the student reads before each completion.
        correction: Weight of each token against the difference between sampler and student, for each completion a tensor
            of shape [C]. None if rollouts are not weighted.
        record: Contents of the first update, once it is scored.
    """

    batch: PromptBatch
    rollouts: Rollouts
    student_prompts: list[list[int]]
    correction: list[Tensor] | None
    record: StepRecord | None = None
