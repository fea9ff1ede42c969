"""Tests of avg@k, pass@k and maj@k against hand counts, and of their standard errors against simulations."""

from __future__ import annotations

import itertools
import random

import pytest
import torch

from helpers.messages import mentions
from opsd_lightning.evaluation.accuracy import AccuracyAtK

Question = tuple[list[int | None], list[bool]]


def computed(questions: list[Question]) -> dict[str, float]:
    metric = AccuracyAtK(len(questions[0][0]))
    for votes, correct in questions:
        metric.update(votes, correct)
    return {name: float(value) for name, value in metric.compute().items()}


def test_single_right_or_wrong_outcomes_have_wilsons_interval() -> None:
    metric = AccuracyAtK(1)
    for right in (True, True, True, False):
        metric.update([0], [right])
    metric.compute()
    assert set(metric.intervals) == {"avg@1", "pass@1", "maj@1"}
    assert metric.intervals["avg@1"] == pytest.approx((0.3006, 0.9544), abs=1e-4)  # Wilson (1927), z = 1.96
    metric.update([0], [True], [0.4])  # a partial score is no outcome
    metric.compute()
    assert set(metric.intervals) == {"pass@1", "maj@1"}
    assert metric.intervals["pass@1"] == pytest.approx((0.3755, 0.9638), abs=1e-4)
    several = AccuracyAtK(2)
    several.update([0, 0], [True, True])
    several.compute()
    assert several.intervals == {}


def test_metrics_equal_hand_counts() -> None:
    values = computed(
        [
            ([0, 0, 1, None], [True, True, False, False]),  # avg 1/2, pass 1, majority right
            ([0, 1, 1, 2], [True, False, False, False]),  # 1/4, 1, wrong
            ([0, 1, None, None], [True, False, False, False]),  # 1/4, 1, tie: 1/2
            ([None] * 4, [False] * 4),  # 0, 0, 0
        ]
    )
    assert values["avg@4"] == values["pass@1"] == pytest.approx((0.5 + 0.25 + 0.25 + 0) / 4)
    assert values["pass@4"] == pytest.approx(3 / 4)
    assert values["pass@2"] == pytest.approx((5 / 6 + 1 / 2 + 1 / 2 + 0) / 4)  # pairs that hold a correct one
    assert values["maj@4"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert values["avg@4_se"] == pytest.approx(float(torch.tensor([0.5, 0.25, 0.25, 0]).std() / 2))
    # Unbiased variances within questions: 1/3, 1/4, 1/4, 0.
    assert values["avg@4_se_samples"] == pytest.approx(((1 / 3 + 1 / 4 + 1 / 4) / 4) ** 0.5 / 4)
    assert values["pass@1_se_samples"] == pytest.approx(values["avg@4_se_samples"])
    assert set(values) == {
        f"{name}{error}" for name in ("avg@4", "pass@1", "pass@2", "pass@4", "maj@4") for error in ("", "_se", "_se_samples")
    }


def test_avg_is_the_mean_of_partial_scores() -> None:
    """The other metrics count right completions. Without scores they are 1 and 0."""
    metric = AccuracyAtK(2)
    metric.update([0, 1], [True, False], [1.0, 0.5])
    metric.update([0, None], [False, False], [0.25, 0.0])
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values["avg@2"] == pytest.approx((0.75 + 0.125) / 2)
    assert values["pass@2"] == 0.5 and values["maj@2"] == pytest.approx(0.25)
    assert values["avg@2_se"] == pytest.approx(float(torch.tensor([0.75, 0.125]).std()) / 2**0.5)
    variances = [torch.tensor(scores).var().item() / 2 for scores in ([1.0, 0.5], [0.25, 0.0])]
    assert values["avg@2_se_samples"] == pytest.approx(sum(variances) ** 0.5 / 2)


def test_sample_errors_equal_the_enumerated_bootstrap() -> None:
    """All 4^4 resamples of one question."""
    votes, correct = [0, 0, 1, 2], [True, True, False, False]
    scores: dict[str, list[float]] = {"pass@2": [], "pass@4": [], "maj@4": []}
    for draw in itertools.product(range(4), repeat=4):
        values = computed([([votes[i] for i in draw], [correct[i] for i in draw])])
        for name in scores:
            scores[name].append(values[name])
    found = computed([(votes, correct)])
    for name, drawn in scores.items():
        exact = float(torch.tensor(drawn).var(correction=0) * 4 / 3) ** 0.5
        assert found[f"{name}_se_samples"] == pytest.approx(exact, rel=0.05 if name == "maj@4" else 1e-5)


def drawn(skills: list[float], k: int, draw: random.Random) -> list[Question]:
    questions: list[Question] = []
    for skill in skills:
        correct = [draw.random() < skill for _ in range(k)]
        questions.append(([0 if c else draw.choice([None, 1, 1, 2, 3]) for c in correct], correct))
    return questions


@pytest.mark.integration
def test_sample_errors_agree_with_repeated_sampling() -> None:
    """The same questions sampled 200 times: each reported error, on average, near the spread of what it belongs to."""
    draw = random.Random(0)
    skills = [0.1 + 0.8 * draw.random() for _ in range(40)]
    runs = [computed(drawn(skills, 12, draw)) for _ in range(200)]
    for name, tolerance in {"avg@12": 0.12, "pass@2": 0.12, "pass@4": 0.15, "maj@12": 0.2}.items():
        spread = float(torch.tensor([run[name] for run in runs]).std())
        reported = float(torch.tensor([run[f"{name}_se_samples"] for run in runs]).mean())
        assert reported == pytest.approx(spread, rel=tolerance), name
    assert all(run["avg@12_se_samples"] < run["avg@12_se"] for run in runs)


@pytest.mark.integration
def test_question_errors_agree_with_a_bootstrap() -> None:
    draw = random.Random(0)
    questions = drawn([draw.random() for _ in range(150)], 4, draw)
    reported = computed(questions)
    resampled = [computed(draw.choices(questions, k=len(questions))) for _ in range(80)]
    for name in ("avg@4", "pass@2", "pass@4", "maj@4"):
        spread = float(torch.tensor([values[name] for values in resampled]).std())
        assert reported[f"{name}_se"] == pytest.approx(spread, rel=0.2), name


def test_metric_handles_one_completion_and_resets() -> None:
    metric = AccuracyAtK(1)
    metric.update([0], [True])
    metric.update([], [])  # a rank without a question
    values = metric.compute()
    assert float(values["avg@1"]) == 1 and float(values["avg@1_se"]) == 0
    assert not [name for name in values if name.endswith("_se_samples")]  # one completion tells nothing of others
    metric.reset()
    metric.update([1], [False])
    metric.update([None], [False])
    assert float(metric.compute()["avg@1"]) == 0
    with pytest.raises(ValueError, match=mentions(2)):
        metric.update([1, 2], [False, False])
