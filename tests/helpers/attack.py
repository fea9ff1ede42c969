"""The number of tries of an attack, and their random numbers."""

from __future__ import annotations

import os
import random


class Attack:
    """Number of tries of an attack of ``tests/attacks``, and their random numbers.

    `make test` tries a sample of each, always the same. `make attack` tries all, in rounds that differ, and adds up what was
    tried (``attacks/hour.py``).
    """

    def __init__(self, test: str) -> None:
        #: The round of `make attack`, from 1; 0 in `make test`.
        self.round = int(os.environ.get("OPSD_ATTACK_ROUND", "0"))
        self.random = random.Random(f"{test} {self.round}")
        self.counts: dict[str, int] = {}

    def tries(self, sample: int, whole: int) -> int:
        """Return the number of tries: ``sample`` times in `make test`, ``whole`` times in a round of `make attack`."""
        return whole if self.round else sample

    def tried(self, attack: str, count: int = 1) -> None:
        """Count tries of an attack, named as in the table of docs/reliability.md."""
        self.counts[attack] = self.counts.get(attack, 0) + count
