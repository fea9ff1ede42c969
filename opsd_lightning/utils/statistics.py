"""Means and 95 % confidence intervals."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from statistics import fmean, stdev

#: Half-width of a 95 % normal interval in standard errors.
Z = 1.96


def mean_and_interval(values: list[float]) -> tuple[float, float]:
    """Return the mean and the half-width of its 95 % normal interval."""
    deviation = stdev(values) if len(values) > 1 else 0.0
    return fmean(values), Z * deviation / math.sqrt(len(values))


def wilson(outcomes: list[bool]) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion, which is also valid near 0 and 1."""
    return wilson_interval(sum(outcomes) / len(outcomes), len(outcomes))


def wilson_interval(share: float, n: float) -> tuple[float, float]:
    """Return Wilson's 95 % interval of a proportion.

    Args:
        share: The observed proportion.
        n: Effective number of independent outcomes.
    """
    center, half = share + Z**2 / (2 * n), Z * math.sqrt(share * (1 - share) / n + Z**2 / (4 * n * n))
    return max(0.0, (center - half) / (1 + Z**2 / n)), min(1.0, (center + half) / (1 + Z**2 / n))


def ratio_and_error(totals: Sequence[float], weights: Sequence[float]) -> tuple[float, float]:
    """Return sum(totals) / sum(weights) and its standard error over independent items.

    With weights of 1 these are the mean and its standard error. Otherwise the error is that of a ratio of two means
    (linearized), as for a mean over tokens whose independent items are completions.

    Args:
        totals: Total of each item.
        weights: Weight of each item, such as its number of tokens. Their sum is above 0.
    """
    count, size = len(totals), sum(weights)
    ratio = sum(totals) / size
    squares = sum((total - ratio * weight) ** 2 for total, weight in zip(totals, weights, strict=True))
    return ratio, math.sqrt(count / max(count - 1, 1) * squares) / size


def sums_by_group(values: Sequence[float], groups: Sequence[Hashable]) -> list[float]:
    """Return the sum of the values of each group, in the order in which the groups begin."""
    sums: dict[Hashable, float] = {}
    for value, group in zip(values, groups, strict=True):
        sums[group] = sums.get(group, 0.0) + value
    return list(sums.values())


def paired_change(
    before: Sequence[float], after: Sequence[float], groups: Sequence[Hashable] | None = None
) -> tuple[float, float]:
    """Return the mean change of paired scores from 0 to 1, and the half-width of its 95 % interval.

    The interval is computed as if half an item more had gained a point and half an item more had lost one, each of weight
    one half in both directions, so that it does not vanish if no score changes. For right and wrong answers it is the
    interval of A. Agresti and Y. Min, "Simple improved confidence intervals for comparing matched proportions", 2005, around
    the observed change.

    Args:
        before: Scores before.
        after: Scores after, in the same order.
        groups: Group of each item. Items of different groups are independent, and the interval is that of a sample of
            groups, with two more groups of mean size instead of two more items. Defaults to independent items.
    """
    changes = [late - early for early, late in zip(before, after, strict=True)]
    names = range(len(changes)) if groups is None else groups
    totals, sizes = sums_by_group(changes, names), sums_by_group([1.0] * len(changes), names)
    mean_size = len(changes) / len(sizes)
    size = len(changes) + 2 * mean_size
    ratio = sum(totals) / size
    squares = sum((total - ratio * own) ** 2 for total, own in zip(totals, sizes, strict=True))
    return fmean(changes), Z * math.sqrt(squares + mean_size**2 * (1 + 2 * ratio**2)) / size
