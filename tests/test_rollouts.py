"""The rollout engine: what it samples, where it stops, and that it leaves the policy as it was."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

from conftest import EOS, PROMPTS, SECOND_EOS
from opsd_lightning.policy import LoRA, eos_ids, evaluating
from opsd_lightning.rollouts import Sampling, TransformersEngine, seed_for
from opsd_lightning.scoring import score
from opsd_lightning.tokens import cut_at_eos

ENGINE = TransformersEngine()


def test_all_eos_ids_stop_and_belong_to_the_completion(built: Callable[..., PeftModel]) -> None:
    model = built()
    assert eos_ids(model) == {EOS, SECOND_EOS}
    rollouts = ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=300, n=8), seed=0)
    seen = set()
    for completion, terminated in zip(rollouts.completions, rollouts.terminated, strict=True):
        ends = [n for n, token in enumerate(completion) if token in (EOS, SECOND_EOS)]
        assert ends == ([len(completion) - 1] if terminated else [])
        assert terminated or len(completion) == 300
        seen.update(completion[-1:] if terminated else [])
    assert seen == {EOS, SECOND_EOS}


def test_cut_at_eos() -> None:
    assert cut_at_eos([1, 2, 3, 4], frozenset({3, 9})) == ([1, 2, 3], True)
    assert cut_at_eos([3, 3], frozenset({3})) == ([3], True)
    assert cut_at_eos([1, 2], frozenset({3})) == ([1, 2], False)
    assert cut_at_eos([], frozenset({3})) == ([], False)


def test_rows_of_a_prompt_are_neighbours(built: Callable[..., PeftModel]) -> None:
    model = built()
    rollouts = ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=5, temperature=0, n=3), seed=0)
    single = ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=5, temperature=0), seed=0)
    assert rollouts.completions == [row for row in single.completions for _ in range(3)]
    assert rollouts.n == 3


def test_seeds(built: Callable[..., PeftModel]) -> None:
    model, sampling = built(), Sampling(max_new_tokens=10)
    first = ENGINE.generate(model, PROMPTS, sampling, seed_for(0, "rollout", 1, 0))
    torch.rand(7)
    assert ENGINE.generate(model, PROMPTS, sampling, seed_for(0, "rollout", 1, 0)) == first
    for other in [(1, "rollout", 1, 0), (0, "rollout", 2, 0), (0, "rollout", 1, 1)]:
        assert ENGINE.generate(model, PROMPTS, sampling, seed_for(*other)) != first


def test_sampling_does_not_touch_the_callers_random_numbers(built: Callable[..., PeftModel]) -> None:
    model = built()
    state = torch.get_rng_state()
    ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=3), seed=5)
    assert torch.equal(state, torch.get_rng_state())


@pytest.mark.parametrize(
    "sampling",
    [
        Sampling(max_new_tokens=1, n=4000),
        Sampling(max_new_tokens=1, n=4000, temperature=0.5),
        Sampling(max_new_tokens=1, n=4000, top_k=3),
        Sampling(max_new_tokens=1, n=4000, top_p=0.6),
        Sampling(max_new_tokens=1, n=4000, min_p=0.3),
    ],
    ids=["plain", "temperature", "top_k", "top_p", "min_p"],
)
def test_samples_follow_the_distribution(sampling: Sampling, built: Callable[..., PeftModel]) -> None:
    """Frequencies of the first token against the filtered softmax: also shows that none of the checkpoint's own
    sampling defaults (top_k 1 and a repetition penalty here) is in force."""
    model = built()
    prompt = PROMPTS[0]
    with torch.no_grad(), evaluating(model):
        states, _ = score(model, [prompt], [[0]])
        expected = (states.head(states.hidden)[0] / sampling.temperature).softmax(-1)
    ranked, order = expected.sort(descending=True)
    keep = torch.ones_like(ranked, dtype=torch.bool)
    if sampling.top_k:
        keep[sampling.top_k :] = False
    if sampling.top_p < 1:
        keep &= ranked.cumsum(0) - ranked < sampling.top_p
    keep &= ranked >= sampling.min_p * ranked[0]
    expected[order[~keep]] = 0
    expected /= expected.sum()
    rollouts = ENGINE.generate(model, [prompt], sampling, seed=1)
    counts = torch.bincount(torch.tensor([c[0] for c in rollouts.completions]), minlength=len(expected))
    assert (counts[expected == 0] == 0).all()
    error = (expected * (1 - expected) / sampling.n).sqrt().clamp(min=1e-3)
    assert float(((counts / sampling.n - expected).abs() / error).max()) < 5


def test_the_policy_is_left_as_it_was(built: Callable[..., PeftModel]) -> None:
    """Training mode, gradient checkpointing, dropout and the cache: a rollout needs them off, training needs them back."""
    lora = LoRA(r=4, alpha=8, dropout=0.5)
    model = built(lora=lora, gradient_checkpointing=True)
    frozen = next(module for name, module in model.named_modules() if name.endswith("layers.0.mlp"))
    frozen.eval()
    modes = {name: module.training for name, module in model.named_modules()}
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    sampling = Sampling(max_new_tokens=12, temperature=0)
    training = ENGINE.generate(model, PROMPTS, sampling, seed=0)
    assert modes == {name: module.training for name, module in model.named_modules()}
    assert flags == {name: p.requires_grad for name, p in model.named_parameters()}
    assert any(modes.values()) and not all(modes.values())
    assert model.get_base_model().is_gradient_checkpointing
    model.eval()
    assert ENGINE.generate(model, PROMPTS, sampling, seed=0) == training
    assert all(p.grad is None for p in model.parameters())


def test_an_immediate_end_is_a_completion_of_one_token(built: Callable[..., PeftModel]) -> None:
    model = built()
    model.get_base_model().generation_config.eos_token_id = list(range(100))
    rollouts = ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=4), seed=0)
    assert [len(c) for c in rollouts.completions] == [1, 1, 1] and all(rollouts.terminated)
