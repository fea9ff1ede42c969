"""Tests of the charts of a report: titles, metrics without a curve, and healthy ranges."""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

from helpers.training import parts
from opsd_lightning.callbacks.collapse_guard import Ceiling, CollapseGuard, Drift
from opsd_lightning.callbacks.health import Health
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.reports.charts import charts_of
from opsd_lightning.reports.completions import completion_rows
from opsd_lightning.reports.healthy_ranges import GUARDED, HealthyRange, healthy_ranges
from opsd_lightning.runs.reader import Point, Run
from opsd_lightning.types import Sampling

WINDOW = 5


def run_of(values: dict[str, list[float]], guard: dict[str, Any] | None = None, **more: Any) -> Run:
    """A run whose steps have these values."""
    length = max(map(len, values.values()), default=0)
    train = [
        Point(step + 1, None, None, {name: column[step] for name, column in values.items() if step < len(column)})
        for step in range(length)
    ]
    callbacks = [] if guard is None else [{"class_path": "opsd_lightning.CollapseGuard", "init_args": guard}]
    return Run(Path("run"), "run", train=train, config={"trainer": {"callbacks": callbacks}}, **more)


def test_ranges_are_the_default_rules_of_the_guard() -> None:
    def range_of(rule: Any) -> HealthyRange:
        if isinstance(rule, Drift):
            low, high = rule.lowest or None, rule.highest
            return HealthyRange(rule.metric, low, high, True, rule.smallest_start, rule.window)
        assert isinstance(rule, Ceiling)
        return HealthyRange(rule.metric, None, rule.limit, window=rule.window, from_start=rule.from_start)

    assert [range_of(rule) for rule in CollapseGuard().rules] == list(GUARDED)


def test_ranges_are_multiples_of_the_start() -> None:
    values = {"train/completion_tokens": [10.0] * 5 + [30.0] * 35, "train/truncated_fraction": [0.1] * 40}
    run = run_of(values)  # 40 steps: the guard averages the first ten
    assert healthy_ranges(run) == {"train/completion_tokens": (10.0, 40.0), "train/truncated_fraction": (None, 0.5)}
    assert healthy_ranges(run_of(values, {"window": WINDOW}))["train/completion_tokens"] == (5.0, 20.0)
    # Above its limit at the start, too few hedging words, and nothing finite: the guard says nothing of these.
    odd = {
        "train/truncated_fraction": [0.9] * 9,
        "health/hedges_per_1k_tokens": [4.0] * 9,
        "train/forward_kl": [math.nan] * 9,
    }
    assert healthy_ranges(run_of(odd)) == {}


def test_ranges_follow_the_rules_of_the_run() -> None:
    rules = [
        {"class_path": "opsd_lightning.Drift", "init_args": {"metric": "a", "highest": 2.0, "window": 2}},
        {"class_path": "opsd_lightning.callbacks.collapse_guard.Ceiling", "init_args": {"metric": "b", "limit": 7}},
        {"class_path": "mine.Rule", "init_args": {"metric": "c", "limit": 7}},
        {"class_path": "opsd_lightning.Drift"}, None, 3,
    ]  # fmt: skip
    run = run_of({"a": [1, 3, 9], "b": [1.0], "c": [1.0], "train/forward_kl": [1.0]}, {"rules": rules})
    assert healthy_ranges(run) == {"a": (None, 4.0), "b": (None, 7)}
    for broken in ({"rules": 3}, {"window": "x"}, "text"):
        run_of({"a": [1.0]}).config["trainer"]["callbacks"] = [{"class_path": "CollapseGuard", "init_args": broken}]
        assert healthy_ranges(run_of({"a": [1.0]}, broken)) == {}  # type: ignore[arg-type]


def test_only_metrics_that_change_have_a_chart() -> None:
    run = run_of(
        {
            "train/loss": [1.0, 2.0],
            "train/clipped_fraction": [0.0, 0.0],
            "train/forward_kl": [math.nan, math.inf],
            "train/student_entropy": [1.0, 1.0],
            "train/teacher_entropy": [1.0, 2.0],
            "mine/some_metric": [1.0, 3.0],
            "train/another_thing": [4.0],
        }
    )
    charts, constant = charts_of([run])
    assert [chart["title"] for chart in charts] == ["Loss", "Entropy", "Mine: some metric"]
    assert [row["name"] for row in constant] == ["train/clipped_fraction", "train/another_thing"]
    assert constant[0]["values"] == [0.0] and constant[0]["percent"]
    # The same value in each run, but different ones: two lines are a picture.
    other = run_of({"train/clipped_fraction": [0.5, 0.5]})
    charts, constant = charts_of([run, other])
    assert "Clipped tokens" in [chart["title"] for chart in charts]
    assert [row["values"] for row in constant] == [[4.0, None]]


def test_healthy_range_is_part_of_a_chart_of_one_run() -> None:
    run = run_of({"train/student_entropy": [1.0, 2.0], "train/teacher_entropy": [1.0, 2.0]})
    (chart,), _ = charts_of([run])
    assert chart["healthy"] == {"low": 0.375, "high": 4.5, "of": "student"}
    (chart,), _ = charts_of([run, run])
    assert "healthy" not in chart


def test_every_logged_metric_has_a_title_for_people(make_policy: Callable[..., Policy]) -> None:
    settings: dict[str, Any] = {"updates_per_batch": 2, "evaluate_teacher": True, "learn_from": "wrong"}
    opsd = parts(make_policy(), **settings)[0]
    grpo = GRPOModule(make_policy(), sampling=Sampling(max_new_tokens=8, n=2))
    names = opsd.logged_names() | grpo.logged_names() | Health().logged_names(opsd) | {"train/reward", "lr-AdamW"}
    names = {name for name in names if "@" not in name and not name.startswith(("skills/", "test/"))}
    charts, constant = charts_of([run_of({name: [1.0, 2.0] for name in sorted(names)})])
    assert not constant
    for chart in charts:
        assert "name" not in chart or chart["title"].startswith("Learning rate"), chart["name"]
        assert not any("_" in text or "/" in text for text in (chart["title"], *(s["label"] for s in chart["series"])))


def test_long_tables_of_completions_are_cut() -> None:
    def record(text: str) -> dict[str, Any]:
        return {
            "question": "1?",
            "completion": text,
            "correct": None,
            "answer": None,
            "completion_tokens": 1,
            "truncated": 0,
        }

    short = completion_rows(run_of({}, held_out={"before: teacher": [record("x" * 500)]}))
    (row,) = short["rows"]
    assert (row["when"], row["role"], row["completion"]) == ("held out, before", "teacher", "x" * 500)
    assert short["total"] == 1 and short["cut"] is None
    long = completion_rows(run_of({}, held_out={"after: student": [record("x" * 20_000)] * 5000}))
    assert long["total"] == 5000 > len(long["rows"]) and long["cut"] < 20_000
    assert sum(len(row["completion"]) for row in long["rows"]) < 2_000_000
