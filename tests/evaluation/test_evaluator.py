"""Ranks with unlike numbers of evaluation batches, which another data module may give: none waits for another's batch."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.distributed import ddp, parts, trainer
from helpers.processes import on_ranks
from opsd_lightning.models.policy import Policy
from opsd_lightning.runs.signals import Stopped

pytestmark = pytest.mark.integration


class Some:
    """The first batches of a loader.

    Args:
        loader: The larger loader.
        count: Number of batches.
        signals: One of them brings a SIGTERM.
    """

    def __init__(self, loader: Any, count: int, signals: bool) -> None:
        self.batches, self.signals = list(loader)[:count], signals

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        for number, batch in enumerate(self.batches):
            if self.signals and number == 0:
                os.kill(os.getpid(), signal.SIGTERM)
            yield batch


@pytest.mark.parametrize("signals", [False, True])
def test_no_rank_waits_for_a_batch_of_another(signals: bool, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Nor where one is asked to stop: they leave together at the end."""
    policy = make_policy()

    def work(rank: int) -> int:
        module, data = parts(policy, 2)
        run = trainer(tmp_path, devices=2, limit_val_batches=1.0, strategy=ddp())
        loader = data.val_dataloader
        data.eval_batch_size = 1
        data.val_dataloader = lambda: Some(loader(), 1 + rank, signals and rank == 1)  # type: ignore[assignment, method-assign]
        try:
            run.validate(module, data, verbose=False)
        except Stopped as stopped:
            torch.distributed.destroy_process_group()
            return stopped.number
        return 0

    assert on_ranks(work, tmp_path) == [signal.SIGTERM * signals] * 2
