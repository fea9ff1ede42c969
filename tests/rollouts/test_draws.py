"""Tests of sampling whose draws belong to a row, and of log-probabilities of sampled tokens."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import pytest
import torch
from peft import PeftModel

from helpers.models import PROMPTS
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.rollouts.draws import RowDraws, RowSampler
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Sampling

# Dividing rows changes the order of sums. Float64 would hide a wrong draw no better: a flip needs a tie in the sixth digit.
SAMPLING = Sampling(max_new_tokens=40, n=4, temperature=1.2, top_p=0.95)


def test_samples_do_not_depend_on_how_rows_are_divided(built: Callable[..., PeftModel]) -> None:
    model = built()
    found = [TransformersEngine(max_rows=rows).generate(model, PROMPTS, SAMPLING, seed=7) for rows in (1, 2, 5, 100)]
    assert all(rollouts == found[0] for rollouts in found)
    # ... nor on the other rows.
    fewer = TransformersEngine(max_rows=100).generate(model, PROMPTS[:1], SAMPLING, seed=7)
    assert fewer.completions == found[0].completions[:4]
    static = TransformersEngine(max_rows=3, static_cache=True).generate(model, PROMPTS, SAMPLING, seed=7)
    assert static == found[0]


def test_rows_and_seeds_have_their_own_numbers() -> None:
    def numbers(seed: int, rows: int) -> np.ndarray:
        return RowDraws(seed, rows, 1000).of(range(rows), [0] * rows, 1000)

    one = numbers(1, 20)
    assert np.array_equal(one, numbers(1, 20)) and np.array_equal(one[:3], numbers(1, 3))
    assert len(np.unique(np.concatenate([one, numbers(2, 20)]))) > 39_990
    assert one.min() >= 0 and one.max() < 1 and abs(one.mean() - 0.5) < 0.01
    correlations = np.corrcoef(one) - np.eye(20)
    assert abs(correlations).max() < 5 / 1000**0.5


def test_numbers_continue_at_a_rows_position() -> None:
    draws = RowDraws(0, 3, 10)
    whole = draws.of([0, 1, 2], [0, 0, 0], 10)
    part = draws.of([2, 0], [4, 7], 5)
    assert np.array_equal(part[0], whole[2, 4:9])
    assert np.array_equal(part[1], [*whole[0, 7:], 0, 0])  # a row that ends before


def test_frequencies_follow_the_probabilities() -> None:
    """Over all values of the uniform number, each token is drawn in proportion to its probability."""
    logits = torch.tensor([0.3, -1.0, 2.0, -float("inf"), 0.0, 1.0])
    grid = (np.arange(20_000) + 0.5) / 20_000
    sampler = RowSampler(Sampling(temperature=0.7, top_k=4), grid[:, None])
    scores = sampler(torch.zeros(len(grid), 1, dtype=torch.long), logits.expand(len(grid), -1))
    counts = torch.bincount(scores.argmax(-1), minlength=6) / len(grid)
    kept = logits.clone()
    kept[1] = -float("inf")  # the fifth largest
    torch.testing.assert_close(counts, (kept / 0.7).softmax(-1), atol=1e-4, rtol=0.0)


def test_extreme_numbers_draw_possible_tokens() -> None:
    logits = torch.tensor([[-float("inf"), 0.0, -float("inf"), 0.0, -float("inf")]])
    for number, token in [(0.0, 1), (1 - 2.0**-48, 3)]:
        sampler = RowSampler(Sampling(temperature=1.0), np.array([[number]]))
        assert int(sampler(torch.zeros(1, 1, dtype=torch.long), logits).argmax()) == token


def test_more_tokens_than_a_block(built: Callable[..., PeftModel]) -> None:
    model = built()
    model.get_base_model().generation_config.eos_token_id = [107]  # no token
    long = Sampling(max_new_tokens=300, n=1)
    found = TransformersEngine(max_rows=9).generate(model, PROMPTS, long, 1).completions
    assert max(map(len, found)) > 256
    short = TransformersEngine(max_rows=9).generate(model, PROMPTS, Sampling(max_new_tokens=20, n=1), 1).completions
    assert short == [row[:20] for row in found]


@pytest.mark.parametrize("settings", [{}, {"max_rows": 3}, {"static_cache": True}, {"merge_adapter": False}], ids=str)
@pytest.mark.parametrize("temperature", [0.0, 1.3])
def test_log_probabilities_are_those_of_scoring(
    settings: dict[str, object], temperature: float, built: Callable[..., PeftModel]
) -> None:
    model = built()
    engine = TransformersEngine(**settings, logprob_tolerance=0.1)  # type: ignore[arg-type]
    sampling = Sampling(max_new_tokens=30, n=2, temperature=temperature, top_k=5, top_p=0.9)
    rollouts = engine.generate(model, PROMPTS, sampling, 0)
    assert rollouts.logprobs is not None and [*map(len, rollouts.logprobs)] == [*map(len, rollouts.completions)]
    prompts = [prompt for prompt in PROMPTS for _ in range(2)]
    states = Scorer(model).score(prompts, rollouts.completions)
    targets = torch.tensor([token for row in rollouts.completions for token in row])
    expected = states.head(states.hidden).detach().log_softmax(-1).gather(1, targets[:, None])[:, 0]
    found = torch.tensor([value for row in rollouts.logprobs for value in row])
    torch.testing.assert_close(found, expected, atol=1e-3, rtol=1e-4)


def test_log_probabilities_change_no_sample(built: Callable[..., PeftModel]) -> None:
    model = built()
    for settings in ({}, {"max_rows": 2}):
        plain = TransformersEngine(**settings).generate(model, PROMPTS, SAMPLING, 3)
        recorded = TransformersEngine(**settings, max_importance_ratio=2.0).generate(model, PROMPTS, SAMPLING, 3)
        assert plain.logprobs is None and recorded.completions == plain.completions
