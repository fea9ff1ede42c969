"""RoPE that changes with the length: a row's scores and rollouts do not depend on its neighbours, on either side of the limit."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    GenerationConfig,
    LlamaConfig,
    LlamaForCausalLM,
    Phi3Config,
    Phi3ForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
)

from helpers.models import EOS, make_tokenizer, perturb
from opsd_lightning.models.policy import LoRA, Policy, base_of
from opsd_lightning.models.rope import constant_length, sampler_length
from opsd_lightning.models.scoring import Scorer, score
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Sampling

LIMIT = 24  # tokens up to which the frequencies are the original ones
SIZES: dict[str, Any] = {
    "vocab_size": 107, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
LONGROPE: dict[str, Any] = {
    "rope_type": "longrope", "rope_theta": 1e4, "short_factor": [1.0] * 8, "long_factor": [1.0 + i for i in range(8)],
    "original_max_position_embeddings": LIMIT,
}  # fmt: skip


def phi3() -> PreTrainedModel:
    return Phi3ForCausalLM(
        Phi3Config(
            **SIZES,
            max_position_embeddings=256,
            original_max_position_embeddings=LIMIT,
            sliding_window=None,
            rope_parameters=LONGROPE,
        )
    )


def phimoe() -> PreTrainedModel:
    rope = LONGROPE | {"short_mscale": 1.1, "long_mscale": 1.4}
    return PhimoeForCausalLM(PhimoeConfig(**SIZES, max_position_embeddings=256, num_local_experts=2, rope_parameters=rope))


def dynamic() -> PreTrainedModel:
    rope = {"rope_type": "dynamic", "rope_theta": 1e4, "factor": 4.0}
    return LlamaForCausalLM(LlamaConfig(**SIZES, max_position_embeddings=LIMIT, rope_parameters=rope))


MODELS: dict[str, Callable[[], PreTrainedModel]] = {"phi3": phi3, "phimoe": phimoe, "dynamic": dynamic}
# On both sides of the limit, and one that crosses it in its completion.
PROMPTS = [[40 + i for i in range(5)], [30 + i % 50 for i in range(22)], [20 + 3 * i % 70 for i in range(40)]]
COMPLETIONS = [[21, 22, 23], [24, 25, 26, 27, 28], [29, 30]]


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    root = tmp_path_factory.mktemp("rope")
    for name, make in MODELS.items():
        torch.manual_seed(0)
        model = make()
        with torch.no_grad():
            for parameter in model.parameters():
                if parameter.dim() > 1:
                    parameter.normal_(std=0.3 * (32 / parameter.shape[-1]) ** 0.5)
        model.generation_config = GenerationConfig(eos_token_id=EOS, pad_token_id=EOS)
        model.save_pretrained(root / name)
        make_tokenizer().save_pretrained(root / name)
    return {name: str(root / name) for name in MODELS}


def policy(folder: str, max_length: int | None = None) -> Policy:
    lora = LoRA(r=2, alpha=4, dropout=0.0, target_modules=["o_proj"])
    return Policy(folder, lora=lora, dtype="float32", attn_implementation="eager", max_length=max_length)


def plain_model(folder: str) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, attn_implementation="eager", dtype=torch.float32).eval()


def logits(model: PeftModel, prompts: list[list[int]], completions: list[list[int]]) -> torch.Tensor:
    states, _ = score(model, prompts, completions)
    return states.head(states.hidden)


@torch.no_grad()
@pytest.mark.parametrize("max_length", [None, 200], ids=["short", "long"])
@pytest.mark.parametrize("name", MODELS)
def test_rows_do_not_depend_on_their_neighbours(name: str, max_length: int | None, saved: dict[str, str]) -> None:
    model = policy(saved[name], max_length).build().eval()
    perturb(model)
    alone = [logits(model, [p], [c]) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(logits(model, PROMPTS, COMPLETIONS), torch.cat(alone), atol=1e-4, rtol=1e-4)
    twice = Scorer(model, 10_000).score(PROMPTS * 2, COMPLETIONS * 2)
    torch.testing.assert_close(twice.head(twice.hidden), torch.cat(alone * 2), atol=1e-4, rtol=1e-4)
    sampling = Sampling(max_new_tokens=12, temperature=0)
    found = TransformersEngine().generate(model, PROMPTS, sampling, 0).completions
    assert found == TransformersEngine(max_rows=2).generate(model, PROMPTS, sampling, 0).completions
    assert found == [TransformersEngine().generate(model, [p], sampling, 0).completions[0] for p in PROMPTS]
    assert logits(model, PROMPTS, found).argmax(-1).tolist() == [token for row in found for token in row]


@torch.no_grad()
@pytest.mark.parametrize("name", MODELS)
def test_short_rows_equal_transformers(name: str, saved: dict[str, str]) -> None:
    """Up to the limit, where the default stays, the policy is the model that an export will be."""
    recipe = policy(saved[name])
    assert recipe.context_length() == LIMIT and constant_length(recipe.load_config()) == LIMIT
    ours, plain = recipe.build().eval(), plain_model(saved[name])
    ids = torch.tensor([PROMPTS[1]])
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)


@torch.no_grad()
@pytest.mark.parametrize("name", ["phi3", "dynamic"])  # transformers' PhiMoE takes short factors for long rows
def test_full_length_rows_equal_transformers(name: str, saved: dict[str, str]) -> None:
    ours = policy(saved[name], max_length=60).build().eval()
    plain = plain_model(saved[name])
    ids = torch.tensor([[20 + 7 * i % 80 for i in range(60)]])
    torch.testing.assert_close(ours(input_ids=ids).logits, plain(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    short = ids[:, :10]
    assert not torch.allclose(ours(input_ids=short).logits, plain(input_ids=short).logits, atol=1e-2)


@torch.no_grad()
def test_copies_keep_their_frequencies(saved: dict[str, str]) -> None:
    """A deep copy, as the fixed teacher of full fine-tuning, does not share what the generation needs with its original."""
    model = policy(saved["phi3"]).build().eval()
    again = copy.deepcopy(model)
    assert base_of(again).prepare_inputs_for_generation.__self__ is base_of(again)
    assert logits(again, PROMPTS, COMPLETIONS).equal(logits(model, PROMPTS, COMPLETIONS))


def test_length_limits_are_found(saved: dict[str, str]) -> None:
    assert policy(saved["phi3"], 100).context_length() == 100 and policy(saved["phi3"], 10).context_length() == 10
    assert policy(saved["dynamic"], 500).context_length() == 500, "dynamic RoPE extends the model's positions"
    with pytest.raises(ConfigError) as refused:
        policy(saved["phi3"], 257).context_length()
    assert refused.value.setting == "model.policy.max_length" and "256" in refused.value.fix
    assert "model.policy.max_length" in policy(saved["phi3"]).limit_hint()


def test_a_sampler_with_other_frequencies_is_refused(saved: dict[str, str]) -> None:
    """vLLM chooses them from its context length."""
    short, long = base_of(policy(saved["phi3"]).build()), base_of(policy(saved["phi3"], 200).build())
    assert sampler_length(short, None, "x") == LIMIT and sampler_length(long, None, "x") == 200
    assert sampler_length(short, 20, "x") == 20 and sampler_length(long, 256, "x") == 256
    for base, length in ((short, 256), (long, LIMIT)):
        with pytest.raises(ConfigError) as refused:
            sampler_length(base, length, "model.rollouts.init_args.max_model_len")
        assert refused.value.setting == "model.rollouts.init_args.max_model_len"
