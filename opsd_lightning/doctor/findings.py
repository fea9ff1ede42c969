"""Findings of the doctor, and the statistics that it shows."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, NamedTuple

import numpy as np

#: ``error``: training would fail or learn the wrong thing. ``warning``: possibly a mistake. ``note``: information.
Level = Literal["error", "warning", "note"]

_BINS = 12


class Finding(NamedTuple):
    """A problem of a run, or a fact to know before it.

    Args:
        level: ``error`` needs a fix, ``warning`` is possibly a mistake, ``note`` is information.
        part: Part of the run: ``data``, ``lengths``, ``template``, ``thinking``, ``divergence``, ``memory``, ``time`` or
            ``settings``.
        text: The problem, with its numbers.
        setting: The setting that decides it. Empty if there is none.
        fix: Advice, as an imperative clause. Empty if there is none.
    """

    level: Level
    part: str
    text: str
    setting: str = ""
    fix: str = ""


@dataclass
class Diagnosis:
    """Result of `diagnose`.

    Args:
        findings: Findings in the order of the checks.
        facts: Measured and computed numbers by part, as values that JSON can hold.
    """

    findings: list[Finding] = field(default_factory=list)
    facts: dict[str, Any] = field(default_factory=dict)

    def add(self, findings: Iterable[Finding]) -> None:
        self.findings.extend(findings)

    def of(self, level: Level) -> list[Finding]:
        """Return all findings of a level."""
        return [finding for finding in self.findings if finding.level == level]

    @property
    def healthy(self) -> bool:
        """True if no finding is an error."""
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
    """Format a share, such as ``3.2 %``. A share above zero is never written as 0 %."""
    share = 100 * count / max(total, 1)
    return "less than 0.1 %" if 0 < share < 0.1 else f"{share:.{0 if share >= 10 or share == 0 else 1}f} %"
