"""Scoring without padding and without repeating prompts: the same states as row by row, for less work."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from itertools import combinations

import pytest
import torch
from hypothesis import given, settings, strategies as st
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import Qwen3NextConfig, Qwen3NextForCausalLM

from helpers.models import ARCHITECTURES, COMPLETIONS, EOS, PROMPTS, TEACHER_PROMPTS
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.models import scoring
from opsd_lightning.models.packing import join, micro_batches, repeated
from opsd_lightning.models.policy import LoRA
from opsd_lightning.models.scoring import Scorer, SingleRank, check_head, score, split_rows
from opsd_lightning.teachers import FixedTeacher
from opsd_lightning.types import UserError

# Three questions: two with rollouts of very different lengths, one alone.
SHARED_PROMPTS = [TEACHER_PROMPTS[0]] * 4 + [TEACHER_PROMPTS[1]] * 3 + [TEACHER_PROMPTS[2]]
SHARED_COMPLETIONS = [[20, 21, EOS], [22], [], list(range(20, 40)), [EOS], [23, 24], list(range(30, 70)), [25, 26, 27]]


def row_by_row(model: PeftModel, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    """Logits at the completion tokens from one unpadded call of the model for each row."""
    rows = []
    for prompt, completion in zip(prompts, completions, strict=True):
        logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
        rows.append(logits[len(prompt) - 1 : len(prompt) + len(completion) - 1])
    return torch.cat(rows)


def tokens_seen(model: PeftModel, counts: list[int]) -> torch.utils.hooks.RemovableHandle:
    """Count the tokens of every pass through the model."""
    return model.get_base_model().get_input_embeddings().register_forward_hook(lambda m, x, y: counts.append(x[0].numel()))


@torch.no_grad()
@pytest.mark.parametrize("budget", [1, 60, 100_000])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_shared_prompts_give_the_same_logits(architecture: str, budget: int, built: Callable[..., PeftModel]) -> None:
    model = built(architecture).eval()
    states = Scorer(model, budget).score(SHARED_PROMPTS, SHARED_COMPLETIONS)
    expected = row_by_row(model, SHARED_PROMPTS, SHARED_COMPLETIONS)
    torch.testing.assert_close(states.head(states.hidden), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_a_repeated_prompt_runs_once(built: Callable[..., PeftModel]) -> None:
    model, counts = built().eval(), []
    prompt, n, length = list(range(20, 70)), 8, 11
    with tokens_seen(model, counts):
        Scorer(model, 100_000).score([prompt] * n, [[20] * length] * n)
    assert counts == [len(prompt), n * (length - 1)]


@torch.no_grad()
def test_a_cache_that_is_no_keys_and_values_is_not_shared() -> None:
    """Linear attention keeps a state instead: its prompts run with every completion."""
    torch.manual_seed(0)
    config = Qwen3NextConfig(
        vocab_size=107, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, head_dim=8, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    model = get_peft_model(Qwen3NextForCausalLM(config).eval(), LoraConfig(r=4, target_modules=["q_proj"])).eval()
    counts: list[int] = []
    with tokens_seen(model, counts):  # type: ignore[arg-type]
        states = Scorer(model, 1000).score([PROMPTS[0]] * 2, [[20, 21, 22], [23, 24, 25]])  # type: ignore[arg-type]
    assert counts == [2 * (len(PROMPTS[0]) + 2)]
    expected = row_by_row(model, [PROMPTS[0]] * 2, [[20, 21, 22], [23, 24, 25]])  # type: ignore[arg-type]
    torch.testing.assert_close(states.head(states.hidden), expected, atol=1e-5, rtol=1e-5)


@torch.no_grad()
def test_ranks_agree_on_the_number_of_passes(built: Callable[..., PeftModel]) -> None:
    model, counts, asked = built().eval(), [], []

    class MorePasses(SingleRank):
        """Another rank makes three passes more."""

        def max(self, values: Sequence[float]) -> list[float]:
            asked.extend(values)
            return [value + 3 for value in values]

    with tokens_seen(model, counts):
        states = Scorer(model, 60, MorePasses()).score(SHARED_PROMPTS, SHARED_COMPLETIONS)
    assert len(counts) == asked[0] + 3
    expected = row_by_row(model, SHARED_PROMPTS, SHARED_COMPLETIONS)
    torch.testing.assert_close(states.head(states.hidden), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("architecture", ["llama", "qwen3"])
def test_packed_rows_score_like_single_rows(
    architecture: str, built: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Rows in one, as flash attention takes them. Here attention finds the rows by their positions, which restart."""
    model = built(architecture).eval()
    expected = row_by_row(model, PROMPTS, COMPLETIONS)
    counts: list[int] = []
    monkeypatch.setattr(scoring, "packs_rows", lambda model: True)
    with tokens_seen(model, counts):
        states, targets = score(model, PROMPTS, COMPLETIONS)
    torch.testing.assert_close(states.head(states.hidden), expected, atol=1e-5, rtol=1e-5)
    assert targets.tolist() == [token for completion in COMPLETIONS for token in completion]
    fed = [len(prompt) + max(len(c) - 1, 0) for prompt, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    assert counts == [sum(fed)], "packed rows have no padding"
    assert join(PROMPTS, COMPLETIONS, torch.device("cpu"), packed=True).row_lengths == fed
    lengths = scoring._row_lengths(fed, torch.device("cpu"))
    assert lengths["cu_seq_lens_q"].tolist() == [0, fed[0], fed[0] + fed[1], sum(fed)]
    assert lengths["max_length_q"] == max(fed) and lengths["cu_seq_lens_q"].dtype == torch.int32


@settings(max_examples=200, deadline=None, derandomize=True)
@given(
    lengths=st.lists(st.integers(1, 40), max_size=8),
    budget=st.integers(1, 150),
    pass_tokens=st.integers(0, 60),
    packed=st.booleans(),
)
def test_micro_batches_are_the_cheapest(lengths: list[int], budget: int, pass_tokens: int, packed: bool) -> None:
    """Against every way to cut the sorted rows; and that all rows are there once, within the budget."""

    def size(part: list[int]) -> int:
        return sum(part) if packed else len(part) * max(part)

    batches = micro_batches(lengths, budget, pass_tokens, packed)
    assert sorted(i for batch in batches for i in batch) == list(range(len(lengths)))
    parts = [[lengths[i] for i in batch] for batch in batches]
    assert all(size(part) <= budget or len(part) == 1 for part in parts)
    ranked = sorted(lengths, reverse=True)
    cheapest = math.inf if ranked else 0
    for count in range(len(ranked)):
        for cuts in combinations(range(1, len(ranked)), count):
            trial = [ranked[a:b] for a, b in zip([0, *cuts], [*cuts, len(ranked)], strict=True)]
            if all(size(part) <= budget or len(part) == 1 for part in trial):
                cheapest = min(cheapest, sum(size(part) + pass_tokens for part in trial))
    assert sum(size(part) + pass_tokens for part in parts) == cheapest


def test_ragged_rows_run_without_padding(built: Callable[..., PeftModel]) -> None:
    """32 lengths, log-uniform from 16 to 256: less than a tenth of what is scored is padding."""
    lengths = [round(16 * 16 ** (i / 31)) for i in range(32)]
    batches = split_rows(built(), lengths, token_budget=8192)
    padded = sum(len(batch) * max(lengths[i] for i in batch) for batch in batches)
    assert padded < 1.1 * sum(lengths)
    assert len(batches) < 12


def test_repeated_prompts_are_found() -> None:
    assert repeated([[1, 2], [3], [1, 2], [4], [3], [1, 2]]) == [[0, 2, 5], [1, 4]]
    assert repeated([[1], [2]]) == []


def test_all_rows_are_scored_without_dropout_or_checkpointing(built: Callable[..., PeftModel]) -> None:
    model = built(lora=LoRA(r=4, alpha=8, dropout=0.5), gradient_checkpointing=True)
    assert model.training
    states = Scorer(model, 1000).score(SHARED_PROMPTS, SHARED_COMPLETIONS)
    assert model.training
    with torch.no_grad():
        expected = row_by_row(model.eval(), SHARED_PROMPTS, SHARED_COMPLETIONS)
        torch.testing.assert_close(states.head(states.hidden), expected, atol=1e-5, rtol=1e-5)


def test_an_adapter_on_the_head_alone_gets_its_gradient(built: Callable[..., PeftModel]) -> None:
    model = built(lora=LoRA(r=4, alpha=8, dropout=0.0, target_modules=["lm_head"]))
    teacher = FixedTeacher().score(Scorer(model), TEACHER_PROMPTS, COMPLETIONS)
    states, targets = score(model, PROMPTS, COMPLETIONS)
    weights = torch.full((len(targets),), 1 / len(targets))
    loss, _ = DivergenceObjective()(states, teacher, targets, weights)
    loss.backward()
    plain = DivergenceObjective().per_token(
        states.head(states.hidden).log_softmax(-1), teacher.head(teacher.hidden).log_softmax(-1).detach(), targets
    )[0]
    trained = [p for p in model.parameters() if p.requires_grad]
    for parameter, expected in zip(trained, torch.autograd.grad(plain.mean(), trained), strict=True):
        torch.testing.assert_close(parameter.grad, expected, atol=1e-6, rtol=1e-4)
        assert expected.any()


def test_logits_that_are_not_finite_are_refused(built: Callable[..., PeftModel]) -> None:
    model = built()
    model.get_base_model().lm_head.weight.data[3] = -math.inf
    with pytest.raises(UserError, match=r"^model\.policy\.model: "):
        check_head(model)
