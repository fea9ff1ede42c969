"""Charts of a run's report and their data."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opsd_lightning.reports.healthy_ranges import healthy_ranges
from opsd_lightning.runs.reader import Point, Run

_OTHER = "Other metrics"
_MAX_POINTS = 1200  # points of a curve; longer curves show means of neighboring points


class Spec(NamedTuple):
    """A chart.

    Args:
        title: Title.
        unit: Unit, and what is measured. An empty text for none.
        percent: If True, values are shares, shown in percent.
        series: Name and label of each metric. Names with a leading "+" are left out of reports of several runs.
        section: Section of the page.
    """

    title: str
    unit: str
    percent: bool
    series: tuple[tuple[str, str], ...]
    section: str = "Training"


def _one(title: str, unit: str, percent: bool, name: str, section: str = "Training") -> Spec:
    return Spec(title, unit, percent, ((name, title),), section)


def _by(prefix: str, labels: Mapping[str, str]) -> tuple[tuple[str, str], ...]:
    return tuple((f"{prefix}{name}", label) for name, label in labels.items())


_CLASSES = {"math": "math", "style": "style", "word": "words", "mark": "marks", "special": "special tokens"}
_CHARTS: tuple[Spec, ...] = (
    _one("Loss", "", False, "train/loss"),
    _one("Reward", "mean over the completions of a step", False, "train/reward"),
    Spec(
        "Divergence",
        "nats per token, before any clip",
        False,
        (("train/forward_kl", "forward KL"), ("train/reverse_kl", "reverse KL")),
    ),
    Spec(
        "Validation demonstrations",
        "nats per token",
        False,
        (("val/nll", "negative log-likelihood"), ("val/divergence", "divergence of student and teacher")),
    ),
    _one("Divergence of the first token", "nats, forward KL", False, "train/first_token_forward_kl"),
    Spec("Entropy", "nats per token", False, (("train/student_entropy", "student"), ("train/teacher_entropy", "teacher"))),
    Spec(
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
    Spec(
        "Truncated completions",
        "",
        True,
        (("train/truncated_fraction", "training"), ("val/truncated_fraction", "validation")),
    ),
    _one("Gradient norm", "before clipping", False, "train/grad_norm"),
    _one("Norm of the trained weights", "", False, "train/adapter_norm"),
    _one("Clipped tokens", "", True, "train/clipped_fraction"),
    _one("What the clip removes", "nats per token", False, "train/clipped_mass"),
    _one("Completions without a context", "", True, "train/context_missing_fraction"),
    _one("Completions that are learned from", "", True, "train/selected_fraction"),
    _one("Questions whose completions all got the same reward", "", True, "train/groups_without_signal"),
    Spec(
        "Gradings without a verdict",
        "completions of a step or a validation",
        False,
        (
            ("train/grading_timeouts", "timeouts, training"),
            ("train/grading_failures", "failures, training"),
            ("val/grading_timeouts", "timeouts, validation"),
            ("val/grading_failures", "failures, validation"),
            ("val/teacher_grading_timeouts", "timeouts, teacher"),
            ("val/teacher_grading_failures", "failures, teacher"),
        ),
    ),
    Spec(
        "Difference of sampler and student",
        "nats, of the log-probabilities of tokens",
        False,
        (("train/rollout_logprob_difference", "mean"), ("train/rollout_logprob_difference_max", "largest")),
    ),
    Spec(
        "Importance ratios",
        "student over sampler",
        False,
        (("train/importance_ratio", "mean"), ("train/importance_ratio_max", "largest")),
    ),
    _one("Importance ratios above the limit", "", True, "train/importance_ratio_clipped"),
    Spec(
        "Ratios after further updates",
        "probability of a token now over that at sampling",
        False,
        (("train/update_ratio", "mean"), ("train/update_ratio_max", "largest")),
    ),
    _one("Ratios after further updates above the limit", "", True, "train/update_ratio_clipped"),
    Spec(
        "Teacher's answers in validation",
        "tokens",
        False,
        (("val/teacher_completion_tokens", "mean length"),),
    ),
    _one("Truncated answers of the teacher", "", True, "val/teacher_truncated_fraction"),
    Spec(
        "Divergence of the first tokens",
        "forward KL, nats per token",
        False,
        _by("health/forward_kl_first_", {"1": "first token", "4": "first 4", "16": "first 16"}),
        "Health",
    ),
    Spec(
        "Divergence by quarter of the completion",
        "forward KL, nats per token",
        False,
        _by("health/forward_kl_quarter_", {"1": "first", "2": "second", "3": "third", "4": "fourth"}),
        "Health",
    ),
    Spec("Divergence by class of token", "forward KL, nats per token", False, _by("health/forward_kl_", _CLASSES), "Health"),
    Spec(
        "Share of the divergence by class of token",
        "",
        True,
        tuple((f"health/forward_kl_{name}_share", label) for name, label in _CLASSES.items()),
        "Health",
    ),
    _one("Divergence of style tokens over that of math", "ratio", False, "health/forward_kl_style_over_math", "Health"),
    Spec(
        "Teacher's log-probability minus the student's",
        "nats per token",
        False,
        (("health/teacher_gap_correct", "correct completions"), ("health/teacher_gap_wrong", "wrong completions")),
        "Health",
    ),
    _one("Correct completions in training", "", True, "health/accuracy", "Health"),
    _one("Hedging words", "per 1,000 tokens", False, "health/hedges_per_1k_tokens", "Health"),
    _one("Completions that speak of the solution", "", True, "health/leak_fraction", "Health"),
    _one("Overlap with the trace", "share of 4-grams", True, "health/trace_overlap", "Health"),
    _one("Distinct trigrams", "completions of one question", True, "health/distinct_3", "Health"),
    _one("Completion length over that at the start", "ratio", False, "health/length_drift", "Health"),
    _one("Length of completions that ended", "tokens", False, "health/terminated_tokens", "Health"),
    Spec(
        "Time of a step",
        "seconds",
        False,
        (("time/rollout_seconds", "rollouts"), ("time/scoring_seconds", "scoring and update")),
        "Speed",
    ),
    Spec(
        "Speed",
        "completion tokens per second",
        False,
        (("time/rollout_tokens_per_second", "rollouts"), ("time/scoring_tokens_per_second", "scoring and update")),
        "Speed",
    ),
)
_SHOWN_ELSEWHERE = {"train/tokens_generated", "train/eos_rate", "val/questions", "epoch"}
_PHASES = {"train": "training", "val": "validation", "test": "test", "time": "time", "health": "health"}


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


def charts_of(runs: Sequence[Run]) -> tuple[list[dict[str, Any]], list[dict[str, Any]]]:
    """Return the charts of a report, and the metrics that have no curve.

    A chart has at least one metric with different values. Metrics with one finite value in all runs, such as those that were
    measured once, are returned as rows with a ``title`` and the ``values`` of the runs.
    """
    values = {
        name: _values(runs, name)
        for name in dict.fromkeys(n for run in runs for p in (*run.train, *run.validations) for n in p.values)
    }
    logged, several = list(values), len(runs) > 1
    ranges = healthy_ranges(runs[0]) if not several else {}
    charts: list[dict[str, Any]] = []
    constant: list[dict[str, Any]] = []

    def add(section: str, spec: Spec, **more: Any) -> None:
        names = [name for name, _ in spec.series]
        if any(len({value for each in values.get(name, ()) for value in each}) > 1 for name in names):
            series = [(name, label) for name, label in spec.series if any(values.get(name, ()))]
            found: dict[str, Any] = {"section": section, "title": spec.title, "unit": spec.unit, "percent": spec.percent}
            found["series"] = [{"name": name, "label": label} for name, label in series]
            healthy = [(name, ranges[name]) for name in names if name in ranges]
            if healthy:
                name, (low, high) = healthy[0]
                found["healthy"] = {
                    "low": _number(low),
                    "high": _number(high),
                    "of": dict(series).get(name) if len(series) > 1 else None,
                }
            charts.append(found | more)
            return
        shown = [(name, label) for name, label in spec.series if any(values.get(name, ()))]
        for name, label in shown:
            row: dict[str, Any] = {"title": spec.title if len(shown) == 1 else f"{spec.title}: {label}", "unit": spec.unit}
            row |= {"percent": spec.percent, "name": name, "values": [each[0] if each else None for each in values[name]]}
            constant.append(row)

    if any(run.accuracy for run in runs):
        ks = {run.accuracy.rpartition("@")[2] for run in runs if run.accuracy}
        k = ks.pop() if len(ks) == 1 else "k"
        for role in ("", "teacher_"):  # names without the number of completions, as in `curves_of`
            for metric in ("avg", "pass", "maj"):
                values[f"{role}{metric}"] = [
                    _values([run], f"val/{role}{metric}@{run.accuracy.rpartition('@')[2]}")[0] if run.accuracy else []
                    for run in runs
                ]
        roles = [("avg", "student")]
        if any(values["teacher_avg"]):
            roles.append(("teacher_avg", "teacher (reads the solution)"))
        unit = "band: ± one standard error"
        main = Spec(f"Validation accuracy, avg@{k}", unit, True, tuple(roles))
        if any(len(each) > 1 for each in values["avg"]):  # also a curve that stays at one value
            series = [{"name": name, "label": label} for name, label in roles]
            charts.append(
                {"section": "Accuracy", "title": main.title, "unit": unit, "percent": True, "series": series, "main": True}
            )
        if k != "1":
            add("Accuracy", _one(f"pass@{k}: at least one of {k} completions is correct", "", True, "pass"))
            add("Accuracy", _one(f"maj@{k}: the majority answer is correct", "", True, "maj"))
    used: set[str] = set(_SHOWN_ELSEWHERE)
    for spec in _CHARTS:
        used |= {name.removeprefix("+") for name, _ in spec.series}
        kept = [(name.removeprefix("+"), label) for name, label in spec.series if not (several and name.startswith("+"))]
        add(spec.section, spec._replace(series=tuple(kept)))
    for name in logged:
        if name in used or "@" in name or (name.startswith("skills/") and all(run.skills for run in runs)):
            continue
        percent = name.endswith(("_fraction", "_rate", "_share"))
        add("Health" if name.startswith("health/") else _OTHER, Spec(_title(name), "", percent, ((name, name),)), name=name)
    order = ("Accuracy", "Training", "Health", "Speed", _OTHER)
    return sorted(charts, key=lambda chart: order.index(chart["section"])), constant


def _values(runs: Sequence[Run], name: str) -> list[list[float]]:
    """Return the finite values of a metric in each run."""
    return [
        [point.values[name] for point in (*run.train, *run.validations) if math.isfinite(point.values.get(name, math.nan))]
        for run in runs
    ]


def _title(name: str) -> str:
    """Return a title for a metric that has none of its own: ``train/my_metric`` becomes ``My metric (training)``."""
    if name.startswith("lr-"):
        return f"Learning rate ({name.removeprefix('lr-')})"
    phase, _, rest = name.partition("/")
    words, ending = (rest, f" ({_PHASES[phase]})") if phase in _PHASES and rest else (name, "")
    words = " ".join(words.replace("_", " ").replace("/", ": ").split())
    return f"{words[:1].upper()}{words[1:]}{ending}"


def _number(value: float | None) -> float | None:
    return None if value is None or not math.isfinite(value) else float(f"{value:.7g}")
