"""Means and 95 % confidence intervals."""

from __future__ import annotations

import math
from statistics import fmean, stdev

_Z = 1.96


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % normal interval."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return fmean(values), _Z * deviation / math.sqrt(len(values))


def wilson(outcomes: list[bool]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, which is also valid near 0 and 1."""
    return wilson_interval(sum(outcomes) / len(outcomes), len(outcomes))


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion.

    Args:
        share: The observed proportion.
        n: Effective number of independent outcomes.
    """
    center, half = share + _Z**2 / (2 * n), _Z * math.sqrt(share * (1 - share) / n + _Z**2 / (4 * n * n))
    return max(0.0, (center - half) / (1 + _Z**2 / n)), min(1.0, (center + half) / (1 + _Z**2 / n))
