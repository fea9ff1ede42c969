"""Ranks that hold different data."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
import torch.distributed as dist
from lightning.pytorch import Trainer
from lightning.pytorch.strategies import ParallelStrategy, Strategy

from opsd_lightning.distributed.fsdp2 import FSDP2Strategy


class Replicas:
    """Sums and maxima over the ranks that hold different data. Every rank must call them.

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

    def _reduce(self, values: Sequence[float], operation: str) -> list[float]:
        if self._trainer.world_size == 1:
            return [float(value) for value in values]
        strategy: Any = self._trainer.strategy
        tensor = torch.tensor(values, dtype=torch.float64, device=strategy.root_device)
        return strategy.reduce(tensor, replicas(strategy), operation).tolist()


def replica(trainer: Trainer | None) -> tuple[int, int]:
    """This rank's place among those that hold different data, and their number."""
    if trainer is None:
        return 0, 1
    size = trainer.strategy.tensor_parallel_size if isinstance(trainer.strategy, FSDP2Strategy) else 1
    return trainer.global_rank // size, trainer.world_size // size


def replicas(strategy: Strategy) -> dist.ProcessGroup | None:
    """The ranks that hold different data, this one among them, for sums over all data; None for all ranks."""
    if isinstance(strategy, FSDP2Strategy) and strategy.tensor_parallel_size > 1:
        return strategy.device_mesh["data_parallel"].get_group()
    return None


def unsynchronized(strategy: Strategy) -> AbstractContextManager[None]:
    """Inside, backward passes add to this rank's own gradients; the next one outside sums them all over the ranks."""
    return strategy.block_backward_sync() if isinstance(strategy, ParallelStrategy) else nullcontext()
