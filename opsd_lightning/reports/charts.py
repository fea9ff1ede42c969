"""Charts of a run's report and their data."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

from opsd_lightning.runs.reader import Point, Run

_OTHER = "Other metrics"
_MAX_POINTS = 1200  # points of a curve; longer curves show means of neighboring points

# Each chart has a title, a unit, a flag for percent, and series of a metric's name and a label. Names with a leading "+"
# are left out of reports of several runs.
_CHARTS: tuple[tuple[str, str, bool, tuple[tuple[str, str], ...]], ...] = (
    ("Loss", "", False, (("train/loss", "loss"),)),
    ("Reward", "mean over the completions of a step", False, (("train/reward", "reward"),)),
    (
        "Divergence",
        "nats per token, before any clip",
        False,
        (("train/forward_kl", "forward KL"), ("train/reverse_kl", "reverse KL")),
    ),
    (
        "Validation demonstrations",
        "nats per token",
        False,
        (("val/nll", "negative log-likelihood"), ("val/divergence", "divergence of student and teacher")),
    ),
    ("Divergence of the first token", "nats, forward KL", False, (("train/first_token_forward_kl", "forward KL"),)),
    ("Entropy", "nats per token", False, (("train/student_entropy", "student"), ("train/teacher_entropy", "teacher"))),
    (
        "Completion length",
        "tokens",
        False,
        (
            ("train/completion_tokens", "training, mean"),
            ("val/completion_tokens", "validation, mean"),
            ("+train/completion_tokens_min", "shortest"),
            ("+train/completion_tokens_max", "longest"),
        ),
    ),
    (
        "Truncated completions",
        "",
        True,
        (("train/truncated_fraction", "training"), ("val/truncated_fraction", "validation")),
    ),
    ("Gradient norm", "before clipping", False, (("train/grad_norm", "norm"),)),
    ("Adapter norm", "", False, (("train/adapter_norm", "norm"),)),
    ("Clipped tokens", "", True, (("train/clipped_fraction", "clipped"),)),
    (
        "Time of a step",
        "seconds",
        False,
        (("time/rollout_seconds", "rollouts"), ("time/scoring_seconds", "scoring and update")),
    ),
)
_SHOWN_ELSEWHERE = {"train/tokens_generated", "train/eos_rate", "val/questions", "epoch"}


def curves_of(run: Run, name: str) -> dict[str, Any]:
    """Return a run's metrics as columns, for the page's script."""
    found: dict[str, Any] = {"name": name}
    for kind, points in (("train", run.train), ("val", run.validations)):
        points = _thinned(points)
        names = dict.fromkeys(name for point in points for name in point.values)
        found[kind] = {
            "step": [point.step for point in points],
            "tokens": [point.tokens for point in points],
            "seconds": [point.seconds for point in points],
            "values": {name: [_number(point.values.get(name)) for point in points] for name in names},
        }
    if run.accuracy:  # names without the number of completions, which can differ between runs
        values, k = found["val"]["values"], run.accuracy.rpartition("@")[2]
        for role in ("", "teacher_"):
            for metric in ("avg", "pass", "maj"):
                for error in ("", "_se"):
                    logged = values.get(f"val/{role}{metric}@{k}{error}")
                    if logged and (metric == "avg" or k != "1"):
                        values[f"{role}{metric}{error}"] = logged
        found["k"] = int(k)
    return found


def _thinned(points: list[Point]) -> list[Point]:
    """Average neighboring points, so that at most `_MAX_POINTS` are left."""
    size = math.ceil(len(points) / _MAX_POINTS)
    if size <= 1:
        return points
    found = []
    for start in range(0, len(points), size):
        part = points[start : start + size]
        names = dict.fromkeys(name for point in part for name in point.values)
        lists = {name: [point.values[name] for point in part if name in point.values] for name in names}
        found.append(part[-1]._replace(values={name: sum(values) / len(values) for name, values in lists.items()}))
    return found


def charts_of(runs: Sequence[Run]) -> list[dict[str, Any]]:
    """Return the charts that at least one run has data for, in the order of the page."""
    logged = dict.fromkeys(name for run in runs for point in (*run.train, *run.validations) for name in point.values)
    charts: list[dict[str, Any]] = []

    def add(section: str, title: str, unit: str, percent: bool, series: Sequence[tuple[str, str]], **more: Any) -> None:
        charts.append(
            {"section": section, "title": title, "unit": unit, "percent": percent}
            | {"series": [{"name": name, "label": label} for name, label in series]}
            | more
        )

    several = len(runs) > 1
    if any(run.accuracy for run in runs):
        ks = {run.accuracy.rpartition("@")[2] for run in runs if run.accuracy}
        k = ks.pop() if len(ks) == 1 else "k"
        roles = [("avg", "student")]
        if any("/teacher_avg@" in name for name in logged):
            roles.append(("teacher_avg", "teacher (reads the solution)"))
        add("Accuracy", f"Validation accuracy, avg@{k}", "band: ± one standard error", True, roles, main=True)
        if k != "1":
            add("Accuracy", f"pass@{k}: at least one of {k} completions is correct", "", True, [("pass", f"pass@{k}")])
            add("Accuracy", f"maj@{k}: the majority answer is correct", "", True, [("maj", f"maj@{k}")])
    used: set[str] = set(_SHOWN_ELSEWHERE)
    for title, unit, percent, series in _CHARTS:
        used |= {name.removeprefix("+") for name, _ in series}
        kept = [(name.removeprefix("+"), label) for name, label in series if not (several and name.startswith("+"))]
        kept = [(name, label) for name, label in kept if name in logged]
        if kept:
            add("Training", title, unit, percent, kept)
    for name in logged:
        if name in used or "@" in name or (name.startswith("skills/") and all(run.skills for run in runs)):
            continue
        section = "Health" if name.startswith("health/") else _OTHER
        percent = name.endswith(("_fraction", "_rate", "_share"))
        add(section, name.removeprefix("health/").replace("_", " "), "", percent, [(name, name)])
    order = ("Accuracy", "Training", "Health", _OTHER)
    return sorted(charts, key=lambda chart: order.index(chart["section"]))


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")
