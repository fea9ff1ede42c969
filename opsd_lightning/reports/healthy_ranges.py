"""Healthy ranges of metrics, which the charts of a report show: those of `CollapseGuard`'s rules, and some of `Health`."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from typing import Any, NamedTuple

from opsd_lightning.runs.reader import Run, short_class


class HealthyRange(NamedTuple):
    """Range that a metric of a healthy run stays in.

    Args:
        metric: Name of the metric.
        low: Lower bound. None for no bound.
        high: Upper bound. None for no bound.
        relative: If True, the bounds are multiples of the metric's mean at the start of the run.
        smallest_start: Smallest mean at the start for which a relative range applies.
        window: Number of first values that are averaged. Defaults to the guard's.
        from_start: If False, an absolute range does not apply to a run that starts above it.
    """

    metric: str
    low: float | None = None
    high: float | None = None
    relative: bool = False
    smallest_start: float = 0.0
    window: int | None = None
    from_start: bool = False


#: The default rules of `CollapseGuard`.
GUARDED = (
    HealthyRange("train/completion_tokens", 0.5, 2.0, relative=True),
    HealthyRange("train/truncated_fraction", high=0.5),
    HealthyRange("train/student_entropy", 0.25, 3.0, relative=True),
    HealthyRange("train/forward_kl", high=3.0, relative=True),
    HealthyRange("health/leak_fraction", high=0.05, window=3, from_start=True),
    HealthyRange("health/hedges_per_1k_tokens", 0.25, relative=True, smallest_start=5.0, window=3),
)
# What docs/seeing.md says of other metrics of `Health`.
_OTHERS = (
    HealthyRange("health/length_drift", 0.5, 2.0, from_start=True),
    HealthyRange("health/forward_kl_style_over_math", high=6.0, from_start=True),
)
_WINDOW, _SHORTEST_WINDOW = 10, 3


def healthy_ranges(run: Run) -> dict[str, tuple[float | None, float | None]]:
    """Return the lower and the upper bound of each metric of a run that has a healthy range."""
    guard = _guard(run.config)
    rules = [*_OTHERS, *(GUARDED if guard.get("rules") is None else _own_rules(guard["rules"]))]
    usual = guard.get("window")
    if not isinstance(usual, int) or usual < 1:
        usual = max(min(_WINDOW, len(run.train) // 4), _SHORTEST_WINDOW)
    found: dict[str, tuple[float | None, float | None]] = {}
    for rule in rules:
        values = [point.values[rule.metric] for point in run.train if rule.metric in point.values]
        first = [value for value in values[: rule.window or usual] if math.isfinite(value)]
        if not first:
            continue
        start = sum(first) / len(first)
        scale = start if rule.relative else 1.0
        if rule.relative and (start <= 0 or start < rule.smallest_start):
            continue
        if not rule.relative and not rule.from_start and rule.high is not None and start > rule.high:
            continue
        low, high = (None if bound is None else bound * scale for bound in (rule.low or None, rule.high))
        found[rule.metric] = (low, high)
    return found


def _guard(config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the settings of the run's `CollapseGuard`, or an empty mapping."""
    trainer = config.get("trainer")
    callbacks = trainer.get("callbacks") if isinstance(trainer, Mapping) else None
    for callback in callbacks if isinstance(callbacks, list) else []:
        if isinstance(callback, Mapping) and short_class(str(callback.get("class_path"))) == "CollapseGuard":
            found = callback.get("init_args")
            return dict(found) if isinstance(found, Mapping) else {}
    return {}


def _own_rules(rules: Any) -> Iterator[HealthyRange]:
    """Yield the ranges of the rules that a run was given. Rules of other classes have none."""
    for rule in rules if isinstance(rules, list) else []:
        settings = rule.get("init_args") if isinstance(rule, Mapping) else None
        if not isinstance(settings, Mapping) or not isinstance(settings.get("metric"), str):
            continue
        kind, metric, window = short_class(str(rule.get("class_path"))), settings["metric"], settings.get("window")
        numbers = {k: v for k, v in settings.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
        window = window if isinstance(window, int) and window > 0 else None
        if kind == "Drift":
            low, high = numbers.get("lowest"), numbers.get("highest")
            yield HealthyRange(metric, low, high, True, numbers.get("smallest_start", 0.0), window)
        elif kind == "Ceiling" and "limit" in numbers:
            yield HealthyRange(metric, None, numbers["limit"], window=window, from_start=bool(settings.get("from_start")))
