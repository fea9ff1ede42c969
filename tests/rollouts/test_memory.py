"""Tests of rollouts within a device's memory: the rows that fit, and what happens when memory runs out."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from peft import PeftModel
from transformers import Qwen3Config

from helpers.messages import mentions
from helpers.models import EOS, PROMPTS
from helpers.strict_device import Card, strict_device, unavailable
from opsd_lightning.models.cache_size import cache_bytes
from opsd_lightning.models.policy import LoRA, Policy, base_of
from opsd_lightning.rollouts import transformers_engine
from opsd_lightning.rollouts.capacity import free_bytes, row_bytes, rows_that_fit
from opsd_lightning.rollouts.decoding import Decoder
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Rollouts, Sampling

imitated = pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
SAMPLING = Sampling(max_new_tokens=60, n=6)
#: Qwen3-1.7B.
LARGE = Qwen3Config(
    vocab_size=151936, hidden_size=2048, intermediate_size=6144, num_hidden_layers=28, num_attention_heads=16,
    num_key_value_heads=8, head_dim=128,
)  # fmt: skip


@contextmanager
def out_of_memory_above(model: PeftModel, rows: int) -> Iterator[list[int]]:
    """Raise in passes of more rows. Yield the rows of each pass."""
    passes: list[int] = []

    def check(module: Any, args: Any, output: Any) -> None:
        passes.append(len(args[0]))
        if len(args[0]) > rows:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 1.00 GiB")

    handle = base_of(model).get_input_embeddings().register_forward_hook(check)
    try:
        yield passes
    finally:
        handle.remove()


@pytest.mark.parametrize("architecture", ["llama", "mistral"])
@pytest.mark.parametrize("rows", [1, 2, 7])
@pytest.mark.filterwarnings("ignore:memory ran out:UserWarning")
def test_rows_are_halved_until_they_fit(rows: int, architecture: str, built: Callable[..., PeftModel]) -> None:
    """... and the samples stay the same."""
    model = built(architecture)
    expected = TransformersEngine(max_rows=100).generate(model, PROMPTS, SAMPLING, 0)
    engine = TransformersEngine(max_rows=100)
    with out_of_memory_above(model, rows) as passes:
        found = engine.generate(model, PROMPTS[:1] if rows == 1 else PROMPTS, SAMPLING, 0)
    assert found.completions == expected.completions[: len(found.completions)]
    assert found.terminated == expected.terminated[: len(found.completions)]
    assert max(passes) > rows


def test_the_rows_keep_the_tokens_that_they_have(built: Callable[..., PeftModel]) -> None:
    """Memory runs out in the middle, after some rows have ended: nothing is sampled twice."""
    model, sizes = built(), []
    expected = TransformersEngine(max_rows=100, logprob_tolerance=1.0).generate(model, PROMPTS, SAMPLING, 0)
    lengths = sorted(map(len, expected.completions))
    failed = False

    def check(module: Any, args: Any, output: Any) -> None:
        nonlocal failed
        sizes.append(args[0].shape)
        if not failed and len(sizes) > lengths[len(lengths) // 4] + 2:
            failed = True
            raise torch.OutOfMemoryError

    handle = base_of(model).get_input_embeddings().register_forward_hook(check)
    with pytest.warns(UserWarning, match="max_rows"):
        found = TransformersEngine(max_rows=100, logprob_tolerance=1.0).generate(model, PROMPTS, SAMPLING, 0)
    handle.remove()
    assert failed and found.completions == expected.completions and found.terminated == expected.terminated
    assert found.logprobs is not None and expected.logprobs is not None
    for row, other in zip(found.logprobs, expected.logprobs, strict=True):
        torch.testing.assert_close(torch.tensor(row), torch.tensor(other), atol=1e-3, rtol=1e-3)
    again = [shape for shape in sizes if shape[1] > max(map(len, PROMPTS)) + 2]
    assert again, "the running rows are computed again with the tokens that they have"


def test_one_warning_for_all_rollouts_and_a_limit_by_tokens(built: Callable[..., PeftModel]) -> None:
    model, engine = built(), TransformersEngine(max_rows=16)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for seed in range(3):
            with out_of_memory_above(model, 4) as passes:
                engine.generate(model, PROMPTS, SAMPLING, seed)
            assert (max(passes) > 4) == (seed == 0), "later rollouts start with the rows that fitted"
    found = [str(warning.message) for warning in caught if "memory ran out" in str(warning.message)]
    assert len(found) == 1
    assert mentions(found[0], "model.rollouts.init_args.max_rows")
    assert engine.max_rows == 16, "a setting of the configuration, which stays"


def test_a_static_cache_halves_its_rows_too(built: Callable[..., PeftModel]) -> None:
    model, engine = built(), TransformersEngine(max_rows=100, static_cache=True)
    expected = engine.generate(model, PROMPTS, SAMPLING, 0)
    with out_of_memory_above(model, 5), pytest.warns(UserWarning, match="max_rows"):
        assert engine.generate(model, PROMPTS, SAMPLING, 0) == expected


@pytest.mark.parametrize("static", [True, False])
def test_a_single_row_that_does_not_fit_is_refused(static: bool, built: Callable[..., PeftModel]) -> None:
    model = built()
    with out_of_memory_above(model, 0), pytest.raises(ConfigError) as refused:
        TransformersEngine(max_rows=4, static_cache=static).generate(model, PROMPTS, SAMPLING, 0)
    assert refused.value.setting == "model.sampling.max_new_tokens"
    assert isinstance(refused.value.__cause__, torch.OutOfMemoryError)
    # All weights and modes are as before.
    assert TransformersEngine(max_rows=4).generate(model, PROMPTS, SAMPLING, 0).tokens > 0 and model.training


def test_other_errors_are_not_caught(built: Callable[..., PeftModel]) -> None:
    model = built()

    def fail(*args: Any) -> None:
        raise RuntimeError("planted")

    base_of(model).get_input_embeddings().register_forward_hook(fail)
    with pytest.raises(RuntimeError, match="planted"):
        TransformersEngine(max_rows=4).generate(model, PROMPTS, SAMPLING, 0)


def test_a_row_of_the_benchmarks_fits_into_a_card() -> None:
    """96 completions of 38,912 tokens need 402 GiB, of which a card of 24 GiB holds a few at one time."""
    assert 96 * cache_bytes(LARGE, 300 + 38_912, 2) > 400 * 2**30
    each = row_bytes(LARGE, 300, 38_912, 2)
    assert cache_bytes(LARGE, 300 + 38_912, 2) < each < 1.15 * cache_bytes(LARGE, 300 + 38_912, 2)
    assert 2 <= rows_that_fit(20 * 2**30, each) <= 4
    assert rows_that_fit(2**20, each) == 1, "a row is tried, whatever the estimate says"


def test_sliding_windows_are_counted_as_such(built: Callable[..., PeftModel]) -> None:
    config = base_of(built("mistral")).config
    assert row_bytes(config, 10, 10_000, 4) == row_bytes(config, 10, 20_000, 4)
    assert row_bytes(base_of(built("llama")).config, 10, 20_000, 4) > row_bytes(
        base_of(built("llama")).config, 10, 10_000, 4
    )


def test_free_memory_counts_what_the_allocator_holds_unused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "mem_get_info", lambda device: (1000, 5000))
    monkeypatch.setattr(torch.cuda, "memory_reserved", lambda device: 700)
    monkeypatch.setattr(torch.cuda, "memory_allocated", lambda device: 400)
    assert free_bytes(torch.device("cuda", 0)) == 1300


# -- on the imitated device ------------------------------------------------------------------------------------------------


def on_card(
    total: int, folder: str, sampling: Sampling, prompts: Sequence[Sequence[int]], engine: TransformersEngine, **policy: Any
) -> tuple[Rollouts, SimpleNamespace]:
    """Sample on a card that has ``total`` bytes beside the policy. Return the rollouts, with the most rows of a pass.

    In float32, in which dividing rows changes no sample.
    """
    card = Card()
    with strict_device(card) as device:
        torch.manual_seed(0)
        recipe = Policy(folder, **({"lora": LoRA(r=4, alpha=8, dropout=0.0), "dtype": "float32"} | policy))
        model = recipe.build(torch.device("cuda", 0)).to("cuda:0")
        base_of(model).generation_config.eos_token_id = [107]  # no token
        card.total_memory = device.allocated + total
        device.peak, sizes = 0, []
        base_of(model).get_input_embeddings().register_forward_hook(lambda module, args, out: sizes.append(len(args[0])))
        found = engine.generate(model, prompts, sampling, 0)
        return found, SimpleNamespace(rows=max(sizes), peak=device.peak, total=card.total_memory)


@imitated
def test_rows_on_cuda_default_to_those_that_fit(folders: dict[str, str]) -> None:
    sampling, prompts = Sampling(max_new_tokens=24, n=4), [[20 + i, 21, 22] for i in range(4)]
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)  # memory never runs out
        many, roomy = on_card(2**30, folders["qwen3"], sampling, prompts, TransformersEngine())
        few, tight = on_card(300_000, folders["qwen3"], sampling, prompts, TransformersEngine())
    assert roomy.rows == 16 and 1 < tight.rows < 12
    assert tight.peak <= tight.total
    assert few == many


@imitated
def test_an_estimate_that_is_too_low_backs_off(folders: dict[str, str]) -> None:
    sampling, prompts = Sampling(max_new_tokens=24, n=4), [[20 + i, 21, 22] for i in range(4)]
    many, _ = on_card(2**30, folders["qwen3"], sampling, prompts, TransformersEngine())
    with pytest.warns(UserWarning, match="max_rows"):
        few, tight = on_card(200_000, folders["qwen3"], sampling, prompts, TransformersEngine(max_rows=16))
    assert few == many and tight.peak <= tight.total


@imitated
def test_a_copy_for_which_memory_is_in_pieces_is_left_out(folders: dict[str, str], monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*args: Any) -> None:
        raise torch.OutOfMemoryError

    with strict_device():
        model = Policy(folders["qwen3"], lora=LoRA(r=4, alpha=8), dtype="float32").build().to("cuda:0")
        with torch.autocast("cuda", dtype=torch.bfloat16):
            expected = TransformersEngine(rollout_copy=False).generate(model, PROMPTS, Sampling(max_new_tokens=4), 0)
            monkeypatch.setattr(transformers_engine, "rollout_copy", fail)
            assert TransformersEngine().generate(model, PROMPTS, Sampling(max_new_tokens=4), 0) == expected


@imitated
def test_a_decoder_without_back_off_raises(folders: dict[str, str], built: Callable[..., PeftModel]) -> None:
    """Ranks that gather weights for every layer must make the same passes."""
    model = built()
    with out_of_memory_above(model, 2), pytest.raises(torch.OutOfMemoryError), torch.no_grad():
        Decoder(model, PROMPTS, Sampling(max_new_tokens=4), 3).in_batches(False, False, True)
    assert EOS < 10
