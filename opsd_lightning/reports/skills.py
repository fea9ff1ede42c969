"""Panel of skills that a run does not train: values before and after, and a small curve of each set."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any

from opsd_lightning.runs.reader import Run

WIDTH, HEIGHT = 220, 56
_EDGE = 6  # free space around a curve
_LEAST = 0.1  # smallest range of the vertical axis of a score


def skill_rows(run: Run) -> list[dict[str, Any]]:
    """Return the values that the template shows of each set, the graded sets first.

    The value of a last measurement that is not finite is None.

    Args:
        run: A run with `Run.skills`.
    """
    sets: dict[str, list[dict[str, Any]]] = {}
    for entry in sorted(run.skills, key=lambda entry: entry["step"]):
        sets.setdefault(entry["set"], []).append(entry)
    rows = []
    for name, entries in sets.items():
        last = entries[-1]
        change = last["change"]
        base = last["base"] if last["base"] is None or math.isfinite(last["base"]) else None
        verdict = ""
        if change is not None and not (_is_finite(last) and all(map(math.isfinite, change))):
            change = None
        if change is not None and abs(change[0]) > change[1]:
            verdict = "good" if change[0] > 0 else "bad"
        rows.append(
            {
                "name": name,
                "graded": last["graded"],
                "items": last["items"],
                "base": base,
                "value": last["value"] if _is_finite(last) else None,
                "interval": last["interval"],
                "step": last["step"],
                "change": change,
                "verdict": verdict,
                "curve": _curve([entry for entry in entries if _is_finite(entry)], base, last["step"]),
            }
        )
    return sorted(rows, key=lambda row: not row["graded"])


def _is_finite(entry: Mapping[str, Any]) -> bool:
    return all(map(math.isfinite, (entry["value"], *entry["interval"])))


def _curve(entries: Sequence[Mapping[str, Any]], base: float | None, last: int) -> dict[str, Any]:
    """Return the places of a curve with its intervals, and of the base model's line, in a drawing of `WIDTH` x `HEIGHT`.

    Args:
        entries: The measurements with finite values.
        base: Value of the base model.
        last: Step at the right end.
    """
    graded = all(entry["graded"] for entry in entries)
    ends = [end for entry in entries for end in entry["interval"]]
    known = [*ends, *([] if base is None else [base])] or [0.0]
    low, high = (min(known), max(known)) if graded else (0.0, max(known))
    if (missing := (_LEAST if graded else 1e-9) - (high - low)) > 0:
        low, high = low - missing / 2, high + missing / 2

    def across(step: float) -> float:
        return round(_EDGE + (WIDTH - 2 * _EDGE) * step / (last or 1), 1)

    def down(value: float) -> float:
        return round(HEIGHT - _EDGE - (HEIGHT - 2 * _EDGE) * (value - low) / (high - low), 1)

    points = [
        {
            "x": across(entry["step"]),
            "y": down(entry["value"]),
            "low": down(entry["interval"][0]),
            "high": down(entry["interval"][1]),
            "step": entry["step"],
            "value": entry["value"],
        }
        for entry in entries
    ]
    return {
        "points": points,
        "line": " ".join(f"{point['x']},{point['y']}" for point in points),
        "base": None if base is None else down(base),
        "width": WIDTH,
        "height": HEIGHT,
    }
