"""Results of the runs: means with 95 % intervals as Markdown tables.

Each run (a base and a seed) is one observation, and intervals are Student's t intervals over runs. They ignore that runs of
one base are more similar than runs of different bases, which the table by base shows. Intervals of ratios are computed from
logarithms, over pairs of runs with the same base and seed.
"""

from __future__ import annotations

import math
import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import cache
from typing import Any, NamedTuple

Run = Mapping[str, Any]  # return value of run.execute
Runs = Mapping[str, Sequence[Run]]  # by method or by the row of an ablation

TARGETS = (0.5, 0.6, 0.7, 0.8, 0.9, 0.95)
EASY = {"1_operations": "one operation", "2_operations": "two operations"}


class Estimate(NamedTuple):
    """Mean over ``runs`` and half-width of its 95 % interval, which is NaN for a single run."""

    mean: float
    half: float
    runs: int

    def percent(self) -> str:
        if not self.runs:
            return "-"
        return f"{100 * self.mean:.1f}" + ("" if math.isnan(self.half) else f" ± {100 * self.half:.1f}")

    def number(self) -> str:
        if not self.runs:
            return "-"
        return f"{self.mean:,.0f}" + ("" if math.isnan(self.half) or not self.half else f" ± {self.half:,.0f}")


@cache
def t_quantile(freedom: int, probability: float = 0.975) -> float:
    """Return a quantile of Student's t distribution to about six digits, by Simpson's rule and bisection.

    Args:
        freedom: Degrees of freedom, at least 1.
        probability: Above 0.5 and below 1.
    """
    log_constant = math.lgamma((freedom + 1) / 2) - math.lgamma(freedom / 2) - 0.5 * math.log(freedom * math.pi)

    def density(x: float) -> float:
        return math.exp(log_constant - (freedom + 1) / 2 * math.log1p(x * x / freedom))

    def mass(upper: float, pieces: int = 400) -> float:
        width = upper / pieces
        inner = sum((4 if i % 2 else 2) * density(i * width) for i in range(1, pieces))
        return 0.5 + width / 3 * (density(0.0) + inner + density(upper))

    low, high = 0.0, 1.0
    while mass(high) < probability:
        high *= 2
    for _ in range(40):
        middle = (low + high) / 2
        low, high = (middle, high) if mass(middle) < probability else (low, middle)
    return (low + high) / 2


def estimate(values: Iterable[float]) -> Estimate:
    """Return the mean and 95 % interval of independent values."""
    found = list(values)
    if not found:
        return Estimate(math.nan, math.nan, 0)
    if len(found) == 1:
        return Estimate(found[0], math.nan, 1)
    half = t_quantile(len(found) - 1) * statistics.stdev(found) / math.sqrt(len(found))
    return Estimate(statistics.fmean(found), half, len(found))


def ratio(numerators: Sequence[float], denominators: Sequence[float]) -> tuple[float, float, float]:
    """Return the geometric mean of the ratios of pairs, and its 95 % interval, which is NaN for a single pair."""
    logs = estimate(math.log(a / b) for a, b in zip(numerators, denominators, strict=True))
    return math.exp(logs.mean), math.exp(logs.mean - logs.half), math.exp(logs.mean + logs.half)


def reached(curve: Sequence[Mapping[str, Any]], accuracy: float, axis: str = "tokens") -> float | None:
    """Return the place where a curve first reaches an accuracy, by linear interpolation, or None."""
    before: Mapping[str, Any] | None = None
    for row in curve:
        if row["accuracy"] >= accuracy:
            if before is None:
                return float(row[axis])
            share = (accuracy - before["accuracy"]) / (row["accuracy"] - before["accuracy"])
            return float(before[axis] + share * (row[axis] - before[axis]))
        before = row
    return None


def at(curve: Sequence[Mapping[str, Any]], place: float, axis: str = "tokens") -> float | None:
    """Return the accuracy of a curve at a place, by linear interpolation, or None beyond its end."""
    before = curve[0]
    for row in curve:
        if row[axis] >= place:
            width = row[axis] - before[axis]
            share = (place - before[axis]) / width if width else 1.0
            return float(before["accuracy"] + share * (row["accuracy"] - before["accuracy"]))
        before = row
    return None


def band(runs: Sequence[Run], axis: str, points: int = 60) -> tuple[list[float], list[Estimate]]:
    """Return the mean accuracy along an axis, up to the end of the shortest run."""
    curves = [run["curve"] for run in runs]
    end = min(curve[-1][axis] for curve in curves)
    places = [end * i / points for i in range(points + 1)]
    return places, [estimate(v for c in curves if (v := at(c, place, axis)) is not None) for place in places]


def markdown(headings: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    lines = [list(headings), ["---", *["---:"] * (len(headings) - 1)], *map(list, rows)]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) + "\n"


def _mean(runs: Sequence[Run], value: Callable[[Run], float]) -> Estimate:
    return estimate(value(run) for run in runs)


def _last(name: str) -> Callable[[Run], float]:
    return lambda run: run["curve"][-1][name]


def outcome_table(runs: Runs) -> str:
    """Return the table of test accuracy before and after training, and the cost, by method."""
    rows = []
    for name, found in runs.items():
        rows.append(
            [
                name,
                str(len(found)),
                _mean(found, lambda r: r["before"]["test"]).percent(),
                _mean(found, lambda r: r["after"]["test"]).percent(),
                *(_mean(found, _last(axis)).number() for axis in ("tokens", "step", "references", "seconds")),
                str(sum("failed" in run for run in found)),
            ]
        )
    headings = ["", "runs", "before, %", "after, %", "tokens generated", "steps", "references", "training, s", "failed"]
    return markdown(headings, rows)


def retention_table(runs: Runs) -> str:
    """Return the table of test accuracy on easier questions and with the privileged prompt, by method."""
    rows = []
    for name, found in runs.items():
        row = [name]
        for kind in [*EASY, "privileged"]:
            row += [_mean(found, lambda r, k=kind, w=when: r[w][k]).percent() for when in ("before", "after")]  # type: ignore[misc]
        rows.append(row)
    names = [*EASY.values(), "with the reference"]
    return markdown(["", *(f"{name}, {when}, %" for name in names for when in ("before", "after"))], rows)


def equal_table(runs: Runs, axis: str, places: Sequence[float]) -> str:
    """Return the table of validation accuracy at equal places on an axis that all runs of a method reach."""
    rows = []
    for place in places:
        row = [f"{place:,.0f}"]
        for found in runs.values():
            values = [at(run["curve"], place, axis) for run in found]
            row.append("-" if None in values else estimate(v for v in values if v is not None).percent())
        rows.append(row)
    return markdown([axis, *(f"{name}, %" for name in runs)], rows)


def pairs(a: Sequence[Run], b: Sequence[Run]) -> list[tuple[Run, Run]]:
    """Return pairs of runs of two methods with the same base and seed."""
    by_key = {(run["settings"]["base"], run["settings"]["seed"]): run for run in b}
    keyed = [((run["settings"]["base"], run["settings"]["seed"]), run) for run in a]
    return [(run, by_key[key]) for key, run in keyed if key in by_key]


def token_table(runs: Runs, slow: str = "grpo", fast: str = "opsd", axis: str = "tokens") -> str:
    """Return the table of tokens until an accuracy is first reached, and the ratio over pairs that both reach it."""
    rows = []
    for target in TARGETS:
        row = [f"{100 * target:.0f}"]
        for name in (fast, slow):
            found = [v for run in runs[name] if (v := reached(run["curve"], target, axis)) is not None]
            row.append(f"{estimate(found).number()} ({len(found)} of {len(runs[name])})")
        both = [
            (x, y)
            for one, other in pairs(runs[slow], runs[fast])
            if (x := reached(one["curve"], target, axis)) and (y := reached(other["curve"], target, axis))
        ]
        if both:
            middle, low, high = ratio([x for x, _ in both], [y for _, y in both])
            interval = "" if math.isnan(low) else f" ({low:.1f} to {high:.1f})"
            row.append(f"{middle:.1f}{interval}, {len(both)} pairs")
        else:
            row.append("-")
        rows.append(row)
    return markdown(["accuracy, %", f"{fast}, {axis}", f"{slow}, {axis}", f"{slow} / {fast}"], rows)


def base_table(runs: Runs) -> str:
    """Return the table of test accuracy after training, by base."""
    bases = sorted({run["settings"]["base"] for found in runs.values() for run in found})
    rows = []
    for base in bases:
        own = {name: [run for run in found if run["settings"]["base"] == base] for name, found in runs.items()}
        before = estimate(
            {run["settings"]["seed"]: run["before"]["test"] for found in own.values() for run in found}.values()
        )
        rows.append(
            [base, before.percent(), *(_mean(found, lambda r: r["after"]["test"]).percent() for found in own.values())]
        )
    return markdown(["base", "before, %", *(f"{name}, %" for name in runs)], rows)


def ablation_table(rows: Runs) -> str:
    """Return a table of one-factor changes, with differences between runs of the same base and seed."""
    lines = []
    unchanged = next((found for found in rows.values() if found[0]["settings"]["method"]["name"] == "unchanged"), [])
    for name, found in rows.items():
        differences = [ours["after"]["test"] - theirs["after"]["test"] for ours, theirs in pairs(found, unchanged)]
        change = "" if found is unchanged or len(differences) < 2 else _signed(estimate(differences))
        best = _mean(found, lambda r: max(row["accuracy"] for row in r["curve"]))
        after = [_mean(found, lambda r, k=kind: r["after"][k]).percent() for kind in ["test", *EASY, "privileged"]]  # type: ignore[misc]
        after.insert(1, change)
        lines.append([name, str(len(found)), *after, best.percent(), _mean(found, _last("tokens")).number()])
    headings = ["", "runs", "test, %", "change, points", *(f"{name}, %" for name in EASY.values()), "with the reference, %"]
    return markdown([*headings, "best validation, %", "tokens generated"], lines)


def _signed(change: Estimate) -> str:
    return f"{100 * change.mean:+.1f} ± {100 * change.half:.1f}"


def document(runs: Runs, tables: Mapping[str, Runs], pictures: Sequence[str] = ()) -> str:
    """Return the report in Markdown.

    Args:
        runs: Runs of the main comparison by method.
        tables: Runs of the ablations by table and row.
        pictures: Paths of the figures, relative to the report.
    """
    parts = ["# What the test bed found\n"]
    if runs:
        parts.append("Means over bases and seeds ± the half-width of a 95 % interval (Student's t over runs).\n")
        parts += ["## Test accuracy\n", outcome_table(runs), "### By base\n", base_table(runs)]
        parts += ["## Kept skills\n", retention_table(runs)]
        places = {axis: _places(runs, axis) for axis in ("tokens", "references")}
        titles = {"tokens": "generated tokens", "references": "references read"}
        for axis, title in titles.items():
            moving = {name: found for name, found in runs.items() if all(run["curve"][-1][axis] for run in found)}
            if moving:
                parts += [f"## Validation accuracy at equal {title}\n", equal_table(moving, axis, places[axis])]
        if {"grpo", "opsd"} <= set(runs):
            parts += ["## Generated tokens for the same validation accuracy\n", token_table(runs)]
    parts += [f"![]({picture})\n" for picture in pictures]
    for title, rows in tables.items():
        parts += [f"## Ablation: {title}\n", ablation_table(rows)]
    return "\n".join(parts)


def _places(runs: Runs, axis: str) -> list[float]:
    """Return places on an axis: the farthest that all runs of a method reach and its halves, to two digits."""
    end = max(min(run["curve"][-1][axis] for run in found) for found in runs.values())
    places = [end / 2**i for i in range(5, -1, -1)]
    return [float(f"{place:.2g}") if place < end else math.floor(place) for place in places if place > 0]
