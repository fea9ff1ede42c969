"""What an examination of data and settings finds, and the few numbers that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

#: ``error``: training would fail or learn the wrong thing. ``warning``: it may be meant so. ``note``: good to know.
Level = Literal["error", "warning", "note"]

_BINS = 12


class Finding(NamedTuple):
    """One thing that stands in the way of a run, or is good to know before it.

    Args:
        level: ``error`` needs a fix, ``warning`` may be meant so, ``note`` is good to know.
        part: What was looked at: ``data``, ``lengths``, ``template``, ``thinking``, ``divergence``, ``memory``, ``time`` or
            ``settings``.
        text: What was found, with its numbers.
        setting: The setting that it hangs on, or nothing.
        fix: What to do about it, or nothing.
    """

    level: Level
    part: str
    text: str
    setting: str = ""
    fix: str = ""


@dataclass
class Diagnosis:
    """What `diagnose` found.

    Args:
        findings: In the order in which they were found.
        facts: By part, the numbers that were measured or computed; plain values, as JSON takes them.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        self.findings.extend(findings)

    def of(self, level: Level) -> list[Finding]:
        """All findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def healthy(self) -> bool:
        """Whether nothing needs a fix."""
        return not self.of("error")


def at_share(values: Sequence[int], share: float) -> int:
    """Return the smallest value that at least this share of the values does not exceed; 0 without values."""
    return int(np.quantile(values, share, method="inverted_cdf")) if values else 0


def histogram(values: Sequence[int], limit: int | None = None) -> dict[str, Any]:
    """Summarize lengths: count, mean, extremes, quantiles, and a histogram with bins of equal width.

    Args:
        values: Lengths in tokens.
        limit: Values above it are counted as ``over``.

    Returns:
        Values that JSON can hold. ``bins`` is a list of ``[from, below, count]``.
    """
    if not values:
        return {"count": 0, "bins": []}
    low, high = min(values), max(values)
    width = -(-(high - low + 1) // _BINS)
    counts = np.bincount((np.asarray(values) - low) // width).tolist()
    return {
        "count": len(values),
        "mean": sum(values) / len(values),
        "shortest": low,
        "median": at_share(values, 0.5),
        "99 %": at_share(values, 0.99),
        "longest": high,
        "limit": limit,
        "over": 0 if limit is None else sum(value > limit for value in values),
        "bins": [[low + i * width, low + (i + 1) * width, count] for i, count in enumerate(counts)],
    }


def percent(count: float, total: float) -> str:
    """A share in words, such as ``3.2 %``; never 0 % of something that is there."""
    share = 100 * count / max(total, 1)
    return "less than 0.1 %" if 0 < share < 0.1 else f"{share:.{0 if share >= 10 or share == 0 else 1}f} %"
