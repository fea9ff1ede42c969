"""Communication between ranks: gathered objects, actions that fail on all ranks together, gradient synchronization."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from datetime import timedelta
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from opsd_lightning.types import ConfigError, UserError

T = TypeVar("T")


def get_rank() -> int:
    """Return the global rank of this process, or 0 if no process group is initialized."""
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def rank_and_world_size(trainer: Trainer | None) -> tuple[int, int]:
    """Return the global rank and the number of processes of a trainer, or (0, 1) without a trainer."""
    return (0, 1) if trainer is None else (trainer.global_rank, trainer.world_size)


class TrainerRanks:
    """Sums and maxima over all ranks of a trainer. Every rank must call.

    Args:
        trainer: Trainer of the run.
    """

    def __init__(self, trainer: Trainer) -> None:
        self._trainer = trainer

    def sum(self, values: Sequence[float]) -> list[float]:
        """All-reduce each value to its sum."""
        return self._reduce(values, "sum")

    def max(self, values: Sequence[float]) -> list[float]:
        """All-reduce each value to its maximum."""
        return self._reduce(values, "max")

    @property
    def repeats_passes(self) -> bool:
        """True if this rank may repeat a pass after an error: no strategy synchronizes its backward passes with others."""
        return self._trainer.world_size == 1 and not isinstance(self._trainer.strategy, ParallelStrategy)

    def _reduce(self, values: Sequence[float], operation: str) -> list[float]:
        if self._trainer.world_size == 1:
            return [float(value) for value in values]
        strategy: Any = self._trainer.strategy
        tensor = torch.tensor(values, dtype=torch.float64, device=strategy.root_device)
        return strategy.reduce(tensor, reduce_op=operation).tolist()


def all_gather_object(value: T) -> list[T]:
    """Gather an object from every rank. Every rank must call.

    Returns:
        The objects of all ranks, in the order of the ranks.
    """
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def run_on_all_ranks(action: Callable[[], T]) -> T:
    """Run an action on every rank and raise on all ranks if it fails on one, so that no rank waits for another forever.

    Every rank must call.

    Args:
        action: Function without arguments. It must not communicate between ranks after a step that can fail.

    Returns:
        The result on this rank.

    Raises:
        Exception: The action's own error where it failed.
        UserError: The action failed with a user error on another rank. A `ConfigError` keeps its fields.
        RuntimeError: The action failed with any other error on another rank.
    """
    result, error = None, None
    try:
        result = action()
    except Exception as caught:
        error = caught
    failures = [
        failure for failure in all_gather_object(None if error is None else _copy_for_ranks(error)) if failure is not None
    ]
    if error is not None:
        raise error
    if failures:
        raise failures[0]
    return result  # type: ignore[return-value]


def run_on_rank_zero(action: Callable[[], T], wait: timedelta | None = None) -> T:
    """Run an action on rank zero only and return its result on every rank. Every rank must call.

    Args:
        action: Function without arguments.
        wait: Time for which the other ranks wait, for actions that can take longer than the timeout of the process group.
            They then wait in a gloo group of their own, as in Lightning's ``prepare_data``. Defaults to that timeout.

    Raises:
        Exception: As in `run_on_all_ranks`.
    """
    if wait is None or not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return all_gather_object(run_on_all_ranks(lambda: action() if get_rank() == 0 else None))[0]  # type: ignore[return-value]
    group = dist.new_group(backend="gloo", timeout=wait)
    error: Exception | None = None
    outcome: list[Any] = [None, None]
    try:
        if get_rank() == 0:
            try:
                outcome[0] = action()
            except Exception as caught:
                error, outcome[1] = caught, _copy_for_ranks(caught)
        dist.broadcast_object_list(outcome, src=0, group=group)
        dist.barrier(group)  # gloo would cut off what a rank that leaves first still sends
    finally:
        dist.destroy_process_group(group)
    if (failure := error or outcome[1]) is not None:
        raise failure
    result: T = outcome[0]
    return result


def no_backward_sync(strategy: Strategy) -> AbstractContextManager[None]:
    """Return a context in which backward passes accumulate local gradients, without reducing them over ranks."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()


def _copy_for_ranks(error: Exception) -> Exception:
    """Return a copy of an error that other ranks can raise."""
    if isinstance(error, ConfigError):
        return ConfigError(error.problem, error.setting, error.fix)
    return UserError(str(error)) if isinstance(error, UserError) else RuntimeError(str(error))
