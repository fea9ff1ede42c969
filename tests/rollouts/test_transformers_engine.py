"""Tests of the rollout engine: its samples, its stopping, and that it leaves the policy unchanged."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Callable
from contextlib import nullcontext

import pytest
import torch
from peft import PeftModel

from helpers.engines import check_greedy_rollouts
from helpers.models import EOS, PROMPTS, SECOND_EOS
from opsd_lightning.models.packing import cut_at_eos
from opsd_lightning.models.policy import LoRA, Policy, eos_ids, evaluating
from opsd_lightning.models.scoring import score
from opsd_lightning.rollouts import fast_weights as inference
from opsd_lightning.rollouts.base import LocalEngine, RolloutEngine, seed_for
from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine
from opsd_lightning.rollouts.fast_weights import merged_adapter, packed_linears
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine
from opsd_lightning.rollouts.vllm.engines import VLLMServerEngine
from opsd_lightning.types import Sampling, UserError

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


def test_completions_are_cut_at_eos() -> None:
    assert cut_at_eos([1, 2, 3, 4], frozenset({3, 9})) == ([1, 2, 3], True)
    assert cut_at_eos([3, 3], frozenset({3})) == ([3], True)
    assert cut_at_eos([1, 2], frozenset({3})) == ([1, 2], False)
    assert cut_at_eos([], frozenset({3})) == ([], False)


def test_completions_of_a_prompt_are_adjacent(built: Callable[..., PeftModel]) -> None:
    model = built()
    rollouts = ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=5, temperature=0, n=3), seed=0)
    single = ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=5, temperature=0), seed=0)
    assert rollouts.completions == [row for row in single.completions for _ in range(3)]
    assert rollouts.n == 3


def test_seeds_decide_the_samples(built: Callable[..., PeftModel]) -> None:
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


SMALL_CACHE = {"num_blocks": 32, "max_batch_tokens": 256}  # the default fills half of the machine's free memory
ENGINES = [
    TransformersEngine(),
    TransformersEngine(merge_adapter=False),
    TransformersEngine(max_rows=2),
    TransformersEngine(max_rows=5),
    TransformersEngine(static_cache=True, compile=True),
    ContinuousBatchingEngine(options=SMALL_CACHE),
]


def test_every_engine_is_under_test() -> None:
    found = {*RolloutEngine.__subclasses__(), *LocalEngine.__subclasses__()} - {LocalEngine}
    ours = {cls for cls in found if cls.__module__.startswith("opsd_lightning") and not cls.__name__.startswith("_")}
    assert ours == {type(engine) for engine in ENGINES} | {VLLMServerEngine, VLLMEngine}  # tested in rollouts/vllm


@pytest.mark.parametrize(
    "engine",
    [  # continuous batching takes seconds to start on a CPU
        pytest.param(engine, marks=[pytest.mark.integration] * isinstance(engine, ContinuousBatchingEngine))
        for engine in ENGINES
    ],
    ids=lambda e: f"{type(e).__name__}-{vars(e)}",
)
@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.usefixtures("cpu_alone")
def test_greedy_rollouts_of_ragged_rows_are_those_of_each_row_alone(
    engine: RolloutEngine, architecture: str, built: Callable[..., PeftModel]
) -> None:
    """Rows end at very different steps; leaving, waiting and joining rows change nothing."""
    if architecture == "mistral" and isinstance(engine, ContinuousBatchingEngine):
        pytest.skip("continuous batching's pages are longer than the sliding window here")
    check_greedy_rollouts(engine, built(architecture))


def test_finished_rows_leave_the_batch_and_prompts_run_once(built: Callable[..., PeftModel]) -> None:
    """The tokens that go through the model: plain ``generate`` would feed every row until the last has ended."""
    model, fed = built(), []
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda m, x, y: fed.append(x[0].shape))
    rollouts = ENGINE.generate(model, [PROMPTS[0]], Sampling(max_new_tokens=300, n=16), seed=3)
    lengths = [len(row) for row in rollouts.completions]
    assert fed[0] == (1, len(PROMPTS[0]) - 1), "one prompt, once, but for its last token"
    steps = sum(rows * columns for rows, columns in fed[1:])
    assert sum(lengths) <= steps < 1.35 * sum(lengths)
    assert max(lengths) * 16 > 2 * sum(lengths)


def test_waiting_rows_replace_finished_ones(built: Callable[..., PeftModel]) -> None:
    model, fed = built(), []
    model.get_base_model().get_input_embeddings().register_forward_hook(lambda m, x, y: fed.append(x[0].shape))
    rollouts = TransformersEngine(max_rows=4).generate(model, PROMPTS, Sampling(max_new_tokens=200, n=10), seed=0)
    steps = [rows for rows, columns in fed if columns == 1]
    assert max(steps) == 4
    lengths = [len(row) for row in rollouts.completions]
    assert len(lengths) == 30 and len(steps) < 0.6 * sum(sorted(lengths, reverse=True)[:8])


@pytest.mark.parametrize("engine", [TransformersEngine(max_rows=700), TransformersEngine(merge_adapter=False)])
def test_segments_sample_the_same_distribution(engine: RolloutEngine, built: Callable[..., PeftModel]) -> None:
    """Lengths of 1,500 completions, against plain ``generate``: two-sample Kolmogorov-Smirnov."""
    model = built()
    model.get_base_model().generation_config.eos_token_id = list(range(60, 75))
    lengths = sorted(len(c) for c in engine.generate(model, PROMPTS[:1], Sampling(max_new_tokens=40, n=1500), 1).completions)
    plain = TransformersEngine(static_cache=True)
    other = sorted(len(c) for c in plain.generate(model, PROMPTS[:1], Sampling(max_new_tokens=40, n=1500), 2).completions)
    assert len(set(lengths)) > 20
    distance = max(abs(bisect_right(lengths, x) - bisect_right(other, x)) / 1500 for x in range(41))
    assert distance < 1.95 * (2 / 1500) ** 0.5  # one in a thousand


def test_the_merged_adapter_leaves_the_weights_bit_for_bit(built: Callable[..., PeftModel]) -> None:
    model = built()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    ids = torch.tensor([PROMPTS[0]])
    model.eval()
    with torch.no_grad():
        expected = model(input_ids=ids).logits
        with merged_adapter(model):
            merged = model(input_ids=ids).logits
            changed = [n for n, v in model.state_dict().items() if not torch.equal(v, weights[n])]
        after = model(input_ids=ids).logits
    assert len(changed) == 14, "seven linear layers in each of two blocks"
    torch.testing.assert_close(merged, expected, atol=1e-4, rtol=1e-5)
    assert torch.equal(after, expected)
    assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_adapters_are_not_merged_inexactly(built: Callable[..., PeftModel]) -> None:
    half = built()
    half.get_base_model().to(torch.bfloat16)
    off = built()
    head = built(lora=LoRA(r=4, alpha=8, target_modules=["lm_head"]))
    for model, context in [(half, nullcontext()), (off, off.disable_adapter()), (head, nullcontext())]:
        with context:
            weights = {name: value.clone() for name, value in model.state_dict().items()}
            with merged_adapter(model):
                assert all(torch.equal(value, weights[name]) for name, value in model.state_dict().items())


def test_packed_linears_compute_the_same(built: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(inference, "_MIN_WEIGHTS", 0)
    monkeypatch.setattr(inference, "_MAX_ROWS", 3)
    for architecture in ("llama", "qwen3"):  # qwen3's head is tied
        model = built(architecture).eval()
        for ids in (torch.tensor([[40, 41, 42]]), torch.tensor([[40, 41, 42, 43, 44]])):
            with torch.no_grad():
                expected = model(input_ids=ids).logits
                with packed_linears(model):
                    packed = model(input_ids=ids).logits
                    assert sum("forward" in vars(module) for module in model.modules()) > 10
            torch.testing.assert_close(packed, expected, atol=1e-4, rtol=1e-5)
        assert not any("forward" in vars(module) for module in model.modules())


@pytest.mark.parametrize("merge", [True, False])
def test_rollouts_under_autocast_on_the_cpu(
    merge: bool, built: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(inference, "_MIN_WEIGHTS", 0)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        rollouts = TransformersEngine(merge_adapter=merge).generate(built(), PROMPTS, Sampling(max_new_tokens=4), seed=0)
    assert rollouts.tokens >= 3


def test_an_adapter_with_biases_is_not_merged_into_the_bases(make_policy: Callable[..., Policy]) -> None:
    model = make_policy("gpt2", lora=LoRA(r=2, alpha=4, dropout=0.0, options={"lora_bias": True})).build()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter += 1.0
    before = {name: value.clone() for name, value in model.state_dict().items()}
    ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=3), seed=0)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_compiling_needs_a_static_cache() -> None:
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.compile: "):
        TransformersEngine(compile=True)
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.options: "):
        ContinuousBatchingEngine(options={"no_such_field": 1})
    with pytest.raises(UserError, match=r"^model\.rollouts\.init_args\.options: .*seed"):
        ContinuousBatchingEngine(options={"seed": 1})
    with pytest.raises(ValueError, match="0"):
        TransformersEngine(max_rows=0)


def test_an_immediate_end_is_a_completion_of_one_token(built: Callable[..., PeftModel]) -> None:
    model = built()
    model.get_base_model().generation_config.eos_token_id = list(range(100))
    rollouts = ENGINE.generate(model, PROMPTS, Sampling(max_new_tokens=4), seed=0)
    assert [len(c) for c in rollouts.completions] == [1, 1, 1] and all(rollouts.terminated)
