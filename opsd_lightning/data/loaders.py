"""Loaders that batch tokenized prompts, seeded and resumable."""

from __future__ import annotations

import random
from collections.abc import Iterator

from opsd_lightning.types import PromptBatch


def _pick(rows: PromptBatch, indices: list[int], counted: list[bool]) -> PromptBatch:
    return PromptBatch(
        [rows.student[i] for i in indices],
        [rows.teacher[i] for i in indices],
        [rows.examples[i] for i in indices],
        counted,
        traces=[rows.traces[i] for i in indices] if rows.traces else [],
    )


class TrainLoader:
    """Loader of training batches, which resumes within an epoch.

    The seed and the number of the epoch alone determine the order. Lightning saves and restores the loader's state with
    ``state_dict`` and ``load_state_dict``. A last, smaller batch is dropped: all optimizer steps have the same number of
    questions.

    Args:
        rows: All training questions.
        batch_size: Questions of a batch on each rank.
        seed: Seed for the order.
        rank: Index of this rank among the ranks with different data.
        world: Number of these ranks.
        limit: The trainer's ``limit_train_batches``: batches of an epoch (int), or a share of all (float). The trainer also
            sets it from ``overfit_batches``. An epoch of this loader ends there. Defaults to 1.0, all.
        shuffle: If True, shuffle each epoch differently, otherwise keep the order of the data. Defaults to True.
    """

    def __init__(
        self,
        rows: PromptBatch,
        batch_size: int,
        seed: int,
        rank: int,
        world: int,
        limit: float = 1.0,
        shuffle: bool = True,
    ) -> None:
        self.rows, self.batch_size, self.seed, self.rank, self.world = rows, batch_size, seed, rank, world
        self.shuffle = shuffle
        self.epoch = 0
        self.done = 0  # batches of this epoch that were yielded
        # Lightning rounds in the same way, and asks for no more batches.
        self._end = min(limit, len(self)) if isinstance(limit, int) else int(limit * len(self))

    def __len__(self) -> int:
        return len(self.rows.examples) // (self.batch_size * self.world)

    def __iter__(self) -> Iterator[PromptBatch]:
        if self.done >= self._end:  # restored at the exact end of an epoch
            self.epoch, self.done = self.epoch + 1, 0
        order = self._order(self.epoch)
        while self.done < self._end:
            part = self._part(order, self.done)
            self.done += 1
            yield _pick(self.rows, part, [True] * len(part))._replace(upcoming=self._upcoming(order))
        self.epoch, self.done = self.epoch + 1, 0

    def _upcoming(self, order: list[int]) -> list[list[int]]:
        """Return the student's prompts of the next batch."""
        place = self.done
        if place >= self._end:
            order, place = self._order(self.epoch + 1), 0
        return [self.rows.student[i] for i in self._part(order, place)]

    def _order(self, epoch: int) -> list[int]:
        order = list(range(len(self.rows.examples)))
        if self.shuffle:
            random.Random(f"{self.seed} {epoch}").shuffle(order)
        return order

    def _part(self, order: list[int], place: int) -> list[int]:
        start = place * self.batch_size * self.world
        return order[start + self.rank : start + self.batch_size * self.world : self.world]

    def state_dict(self) -> dict[str, int]:
        return {"epoch": self.epoch, "done": self.done}

    def load_state_dict(self, state: dict[str, int]) -> None:
        self.epoch, self.done = state["epoch"], state["done"]


class EvalLoader:
    """Loader of evaluation batches: every question once, split evenly over the ranks.

    The last ranks are filled up with repeated questions, which do not count in the metrics.
    """

    def __init__(self, rows: PromptBatch, batch_size: int, rank: int, world: int) -> None:
        self.rows, self.batch_size = rows, batch_size
        total = len(rows.examples)
        share = -(-total // world)
        self.indices = [min(rank + n * world, total - 1) for n in range(share)]
        self.counted = [rank + n * world < total for n in range(share)]

    def __len__(self) -> int:
        return -(-len(self.indices) // self.batch_size)

    def __iter__(self) -> Iterator[PromptBatch]:
        for start in range(0, len(self.indices), self.batch_size):
            part = slice(start, start + self.batch_size)
            batch = _pick(self.rows, self.indices[part], self.counted[part])
            yield batch._replace(indices=self.indices[part])
