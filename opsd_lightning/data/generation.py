"""Draw distinct examples with a seeded random generator."""

from __future__ import annotations

import random
from collections.abc import Callable

from opsd_lightning.types import ConfigError, Example
from opsd_lightning.utils.messages import question_key

_MOST_REPEATS = 1000


def distinct_examples(draw: Callable[[random.Random], Example], size: int, seed: str, remedy: str = "") -> list[Example]:
    """Return the first distinct examples of a random generator.

    Args:
        draw: Makes an example from random numbers. Examples with the same question are the same.
        size: Number of examples.
        seed: Seed of the random numbers.
        remedy: Text for the error about too few distinct questions, such as "raise largest". Empty for none.

    Raises:
        ConfigError: A thousand draws in a row give a known question.
    """
    numbers = random.Random(seed)
    found: dict[object, Example] = {}
    repeats = 0
    while len(found) < size:
        if repeats > _MOST_REPEATS:
            raise ConfigError(f"there are no {size} distinct questions", "size", f"Lower it{remedy and f', or {remedy}'}")
        example = draw(numbers)
        key = question_key(example)
        repeats = repeats + 1 if key in found else 0
        found[key] = example
    return list(found.values())
