"""Phases of a training step, by which a device's work is counted."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, Protocol
from unittest import mock

from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.scoring import Scorer


class CountingDevice(Protocol):
    """A device that counts its work by phase, such as `strict_device.StrictDevice`."""

    def phase(self, name: str) -> contextlib.AbstractContextManager[Any]: ...


@dataclass
class StepCounts:
    """Passes of the training steps inside `step_phases`.

    Args:
        steps: Number of training steps.
        micro_batches: Number of micro-batches of all updates.
    """

    steps: int = 0
    micro_batches: int = 0


#: Methods of `PolicyModule` and the phase of the work in each. Inner phases take precedence over outer ones.
PHASES = {
    "training_step": "step, rest",
    "sample": "rollout",
    "begin_step": "comparison with the sampler",
    "_backward": "micro-batches",
    "_clip": "optimizer",
    "_step_optimizer": "optimizer",
    "_watch": "metrics",
    "finish_step": "metrics",
    "validation_step": "validation",
    "test_step": "validation",
}


@contextlib.contextmanager
def step_phases(device: CountingDevice, module: PolicyModule) -> Iterator[StepCounts]:
    """Count the work of a method's steps by phase inside the context.

    Args:
        device: The device that counts.
        module: The method.
    """
    counts = StepCounts()

    def within(function: Callable[..., Any], phase: str) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            counts.steps += phase == PHASES["training_step"]
            with device.phase(phase):
                return function(*args, **kwargs)

        return call

    def micro_batches(scorer: Scorer, lengths: Any) -> list[list[int]]:
        plan = plain(scorer, lengths)
        counts.micro_batches += len(plan)
        return plan

    plain = Scorer.micro_batches
    with contextlib.ExitStack() as stack:
        for name, phase in PHASES.items():
            if name in vars(module):
                continue  # replaced by the caller
            stack.enter_context(mock.patch.object(module, name, within(getattr(module, name), phase)))
        for teacher in module.teachers:
            stack.enter_context(mock.patch.object(teacher, "score", within(teacher.score, "teacher")))
        stack.enter_context(mock.patch.object(Scorer, "micro_batches", micro_batches))
        yield counts
