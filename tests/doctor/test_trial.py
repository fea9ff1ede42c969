"""Extrapolation from trial steps. That they change nothing: see `test_diagnosis`."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch

from opsd_lightning.doctor import trial
from opsd_lightning.doctor.memory import DeviceMemory, Estimator, Step, memory_findings, skeleton
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.models.policy import Policy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine


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
    device = DeviceMemory("cpu", 10**6, 10**6)
    estimate = Estimator(
        skeleton(policy), policy, DivergenceObjective(), torch.optim.AdamW, TransformersEngine(), device
    ).parts
    step = Step(rows=8, prompt=20, completion=12, rows_at_once=4, token_budget=70)
    tried = trial.TrialStep(2, 20, 4, 48, 1.0, 1.0, peak_bytes=10**6)
    found = trial.measured_memory(estimate, step, tried)
    state, small = estimate(step)["optimizer state"], estimate(step.shortened(2, 4))["total"]
    assert found["extrapolated_bytes"] - 10**6 - state == estimate(step)["total"] - small > 0
    same = trial.measured_memory(estimate, step, tried._replace(rows=8, completion=12))
    assert same["extrapolated_bytes"] == 10**6 + state
    (finding,) = memory_findings(estimate(step), device, "a small device", found)
    assert finding.level == "error" and "2 completions of 4 tokens" in finding.text


def test_rows_cost_no_time_on_a_gpu_until_bandwidth_bounds_them() -> None:
    """A step of 10 ms for kernel launches, and a GPU that reads 1 GB in a second."""
    launches, reading = 0.01, trial.Reading(weights=10**6, cached=1000.0, bandwidth=1e9)
    steps = [
        made_step(2, 4)._replace(rollout_seconds=4 * launches),
        made_step(2, 16)._replace(rollout_seconds=16 * launches),
    ]
    speed = trial.speed_of(steps, steps, 64, reading)
    assert speed.rollout_seconds(2, 64, 100) == pytest.approx(100 * launches) == speed.rollout_seconds(64, 64, 100)
    assert speed.bound(64, 100, 0) == "kernel launches"
    # A hundred rows of 1,000 tokens on average are 100 MB of keys and values.
    long = speed.rollout_seconds(100, 100, 2000)
    assert long == pytest.approx(2000 * (10**6 + 100 * 1000 * 1000.0) / 1e9)
    assert speed.bound(100, 2000, 0) == "memory bandwidth"
    assert speed.rollout_seconds(100, 50, 2000) >= long, "two batches are no faster than one"
    on_a_cpu = trial.speed_of(steps, steps, 64)
    assert on_a_cpu.rollout_seconds(64, 64, 100) == pytest.approx(32 * 100 * launches)
