"""avg@k, pass@k and maj@k against counts by hand and a bootstrap of their standard errors."""

from __future__ import annotations

import random

import pytest
import torch

from opsd_lightning.metrics import AccuracyAtK


def test_by_hand() -> None:
    metric = AccuracyAtK()
    metric.update(["1", "1", "2", None], [True, True, False, False])  # avg 1/2, pass 1, majority right
    metric.update(["3", "4", "4", "5"], [True, False, False, False])  # 1/4, 1, wrong
    metric.update(["6", "7", None, None], [True, False, False, False])  # 1/4, 1, tie: 1/2
    metric.update([None, None, None, None], [False] * 4)  # 0, 0, 0
    values = {name: float(value) for name, value in metric.compute().items()}
    assert values["avg"] == pytest.approx((0.5 + 0.25 + 0.25 + 0) / 4)
    assert values["pass"] == pytest.approx(3 / 4)
    assert values["maj"] == pytest.approx((1 + 0 + 0.5 + 0) / 4)
    assert values["avg_se"] == pytest.approx(float(torch.tensor([0.5, 0.25, 0.25, 0]).std() / 2))


def test_standard_error_agrees_with_a_bootstrap() -> None:
    draw = random.Random(0)
    questions = [[draw.random() < skill for _ in range(4)] for skill in [draw.random() for _ in range(150)]]
    metric = AccuracyAtK()
    for correct in questions:
        metric.update(["right" if c else f"wrong {n}" for n, c in enumerate(correct)], correct)
    reported = metric.compute()
    resampled = []
    for _ in range(400):
        sample = draw.choices(questions, k=len(questions))
        resampled.append([sum(sum(c) for c in sample) / 600, sum(any(c) for c in sample) / 150])
    spread = torch.tensor(resampled).std(0)
    assert float(reported["avg_se"]) == pytest.approx(float(spread[0]), rel=0.15)
    assert float(reported["pass_se"]) == pytest.approx(float(spread[1]), rel=0.15)


def test_one_question_and_reset() -> None:
    metric = AccuracyAtK()
    metric.update(["1"], [True])
    assert float(metric.compute()["avg"]) == 1 and float(metric.compute()["avg_se"]) == 0
    metric.reset()
    metric.update(["1"], [False])
    metric.update(["1"], [False])
    assert float(metric.compute()["avg"]) == 0
