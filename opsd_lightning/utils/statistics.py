"""Means and confidence intervals."""

from __future__ import annotations

import math


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Mean and half-width of its 95 % normal interval."""
    mean = sum(values) / len(values)
    variance = sum((value - mean) ** 2 for value in values) / max(len(values) - 1, 1)
    return mean, 1.96 * math.sqrt(variance / len(values))


def wilson(outcomes: list[bool]) -> tuple[float, float]:
    """Wilson's 95 % interval of a proportion: sensible also near 0 and 1."""
    return wilson_interval(sum(outcomes) / len(outcomes), len(outcomes))


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Wilson's 95 % interval of a share that is known as well as from ``n`` independent outcomes."""
    z = 1.96
    center, half = share + z * z / (2 * n), z * math.sqrt(share * (1 - share) / n + z * z / (4 * n * n))
    return max(0.0, (center - half) / (1 + z * z / n)), min(1.0, (center + half) / (1 + z * z / n))
