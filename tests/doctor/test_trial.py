"""Extrapolation from trial steps. That they change nothing: see `test_diagnosis`."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import pytest
import torch

from opsd_lightning.doctor import trial
from opsd_lightning.doctor.memory import Step, memory, memory_findings, skeleton
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.models.policy import Policy


def made_step(rows: int, completion: int) -> trial.TrialStep:
    """A step whose times are linear in rows and tokens: 2 s a prompt, 3 s + 1 s a row each decoding step, 0.1 s a token."""
    tokens = rows * (5 + completion)
    return trial.TrialStep(rows, 5, completion, tokens, rows * 2 + completion * (3 + rows), 0.1 * tokens, 0)


def test_times_of_linear_steps_are_extrapolated_exactly() -> None:
    steps = [made_step(2, 4), made_step(2, 16), made_step(6, 16)]
    speed = trial.speed_of(steps, steps, rows_at_once=100)
    for rows, completion in [(2, 10), (4, 10), (6, 100), (20, 1000)]:
        assert speed.rollout_seconds(rows, 100, completion) == pytest.approx(made_step(rows, completion).rollout_seconds)
    assert speed.scoring == pytest.approx(0.1)
    assert speed.rollout_seconds(40, 4, 10) == pytest.approx(10 * made_step(4, 10).rollout_seconds), "ten times four rows"


def test_times_without_a_larger_step_are_an_upper_bound() -> None:
    steps = [made_step(2, 4), made_step(2, 16)]
    speed = trial.speed_of(steps, steps, rows_at_once=100)
    assert speed.rollout_seconds(2, 100, 50) == pytest.approx(made_step(2, 50).rollout_seconds)
    assert speed.rollout_seconds(8, 100, 50) >= made_step(8, 50).rollout_seconds


def test_completions_that_end_at_once_have_times() -> None:
    steps = [made_step(2, 1), made_step(2, 1)]
    speed = trial.speed_of(steps, steps, rows_at_once=2)
    assert speed.decoding[2] > 0 and speed.prefill >= 0
    assert trial.speed_of(steps, steps, rows_at_once=0).decoding == {}


def test_measured_memory_is_extrapolated_by_the_difference_of_estimates(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    estimate = partial(memory, skeleton(policy), policy, DivergenceObjective(), torch.optim.AdamW)
    step = Step(rows=8, prompt=20, completion=12, rows_at_once=4, token_budget=70)
    tried = trial.TrialStep(2, 20, 4, 48, 1.0, 1.0, peak_bytes=10**6)
    found = trial.measured_memory(estimate, step, tried)
    state, small = estimate(step)["optimizer state"], estimate(step.shortened(2, 4))["total"]
    assert found["extrapolated_bytes"] - 10**6 - state == estimate(step)["total"] - small > 0
    same = trial.measured_memory(estimate, step, tried._replace(rows=8, completion=12))
    assert same["extrapolated_bytes"] == 10**6 + state
    (finding,) = memory_findings(estimate(step), 10**6, "a small device", found)
    assert finding.level == "error" and "2 completions of 4 tokens" in finding.text
