"""Tests of the copy of the policy for rollouts: it computes what the policy computes, in another precision, once cast."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn import Linear4bit
from peft import PeftModel
from torch import Tensor, nn
from torch.nn import functional
from transformers import BitsAndBytesConfig, Gemma2Config, GenerationConfig
from transformers.models.gemma2.modeling_gemma2 import Gemma2RMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm
from transformers.models.qwen3.modeling_qwen3 import Qwen3RMSNorm

from helpers.models import ARCHITECTURES, EOS, PROMPTS, perturb
from opsd_lightning.models.packing import cut_at_eos, pad_left
from opsd_lightning.models.policy import LoRA, Policy, base_of, eos_ids
from opsd_lightning.rollouts.decoding import Decoder
from opsd_lightning.rollouts.draws import RowDraws
from opsd_lightning.rollouts.rollout_copy import (
    AdaptedLinear,
    RMSNorm,
    can_copy,
    copied_bytes,
    is_rms_norm,
    rollout_copy,
)
from opsd_lightning.teachers import EMATeacher, FixedTeacher, GenerativeTeacher
from opsd_lightning.types import Sampling

NF4 = BitsAndBytesConfig(
    load_in_4bit=True,
    bnb_4bit_quant_type="nf4",
    bnb_4bit_use_double_quant=True,
    bnb_4bit_compute_dtype=torch.float32,
)
ATTENTION = ["q_proj", "k_proj", "v_proj"]
ADAPTERS: dict[str, LoRA] = {
    "all linears": LoRA(r=4, alpha=8, dropout=0.3),
    "some linears": LoRA(r=4, alpha=8, target_modules=["q_proj", "v_proj", "down_proj"]),
    "rsLoRA": LoRA(r=3, alpha=8, options={"use_rslora": True}),
    "DoRA": LoRA(r=4, alpha=8, options={"use_dora": True}),
    "ranks by layer": LoRA(r=4, alpha=8, options={"rank_pattern": {"k_proj": 2}, "alpha_pattern": {"up_proj": 3}}),
    "biases": LoRA(r=4, alpha=8, options={"lora_bias": True}),
    "head": LoRA(r=4, alpha=8, target_modules=["q_proj", "lm_head"]),
    "embeddings": LoRA(r=4, alpha=8, target_modules=["q_proj", "embed_tokens"]),
    "saved norm": LoRA(r=4, alpha=8, target_modules=ATTENTION, options={"modules_to_save": ["norm"]}),
    "saved head": LoRA(r=4, alpha=8, target_modules=ATTENTION, options={"modules_to_save": ["lm_head"]}),
}


def logits_of(model: Any) -> Tensor:
    input_ids, mask, position_ids = pad_left(PROMPTS, torch.device("cpu"))
    with torch.no_grad():
        found: Tensor = model(input_ids=input_ids, attention_mask=mask, position_ids=position_ids).logits
    return found[mask.bool()].float()


def check_same(model: PeftModel, copied: Any) -> None:
    """A copy in float32 computes the policy's own logits, up to rounding."""
    model.eval()
    torch.testing.assert_close(logits_of(copied), logits_of(model), atol=2e-4, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_a_copy_computes_the_policys_logits(architecture: str, built: Callable[..., PeftModel]) -> None:
    model = built(architecture)
    copied = rollout_copy(model, torch.float32)
    check_same(model, copied)
    assert type(copied) is type(base_of(model)) and not any(module.training for module in copied.modules())
    assert sum(isinstance(module, AdaptedLinear) for module in copied.modules()) > 4


@pytest.mark.filterwarnings("ignore::UserWarning")
@pytest.mark.parametrize("name", ADAPTERS)
def test_every_kind_of_adapter_is_in_the_copy(name: str, built: Callable[..., PeftModel]) -> None:
    model = built("llama", lora=ADAPTERS[name])
    check_same(model, rollout_copy(model, torch.float32))
    with model.disable_adapter():
        check_same(model, rollout_copy(model, torch.float32))


@pytest.mark.parametrize("name", ["all linears", "DoRA", "saved norm"])
@pytest.mark.parametrize("dequantize", [True, False])
def test_a_copy_of_4_bit_layers(name: str, dequantize: bool, built: Callable[..., PeftModel], plain_four_bits: None) -> None:
    model = built("qwen3", lora=ADAPTERS[name], quantization=NF4)
    copied = rollout_copy(model, torch.float32, dequantize)
    check_same(model, copied)
    assert any(isinstance(module, Linear4bit) for module in copied.modules()) != dequantize


def test_dequantized_weights_are_those_of_bitsandbytes(built: Callable[..., PeftModel], plain_four_bits: None) -> None:
    model = built("llama", quantization=NF4)
    copied = rollout_copy(model)
    layers = dict(base_of(model).named_modules())
    found = {name: module for name, module in copied.named_modules() if isinstance(module, AdaptedLinear)}
    assert len(found) == 14
    for name, module in found.items():
        weight = layers[f"{name}.base_layer"].weight
        expected = dequantize_4bit(weight.data, weight.quant_state)
        assert isinstance(module.base, nn.Linear) and torch.equal(module.base.weight, expected.to(torch.bfloat16))


@pytest.mark.parametrize("make", [EMATeacher, FixedTeacher])
def test_a_copy_has_the_weights_of_the_active_role(
    make: Callable[[], GenerativeTeacher], built: Callable[..., PeftModel]
) -> None:
    model, teacher = built(), make()
    teacher.attach(model)
    perturb(model, seed=5)
    model.eval()
    student = rollout_copy(model, torch.float32)
    with teacher.weights(model):
        copied = rollout_copy(model, torch.float32)
        check_same(model, copied)
    check_same(model, student)
    assert float((logits_of(student) - logits_of(copied)).abs().max()) > 0.01


def test_full_fine_tuning_is_copied_anew_each_time(make_policy: Callable[..., Policy]) -> None:
    model = make_policy("qwen3", lora=None).build()
    check_same(model, rollout_copy(model, torch.float32))
    perturb(model)
    check_same(model, rollout_copy(model, torch.float32))


def test_tied_weights_stay_tied_and_nothing_else_is_copied(make_policy: Callable[..., Policy]) -> None:
    model = make_policy("qwen3").build()
    copied = rollout_copy(model)
    assert copied.get_output_embeddings().weight is copied.get_input_embeddings().weight
    assert all(parameter.dtype == torch.bfloat16 for parameter in copied.parameters())
    assert not any(parameter.requires_grad for parameter in copied.parameters())
    # Frequencies of rotary embeddings would be wrong in bfloat16.
    assert {buffer.dtype for buffer in copied.buffers()} == {torch.float32}
    half = Policy(make_policy("qwen3").model, lora=LoRA(r=2, alpha=2), dtype="bfloat16").build()
    shared = {parameter.data_ptr() for parameter in base_of(half).parameters()}
    assert all(parameter.data_ptr() in shared for parameter in rollout_copy(half).parameters())


def test_layers_that_read_the_same_tensor_share_a_product(built: Callable[..., PeftModel]) -> None:
    """Their weights too, where they are the copy's own. A hook on a base layer still runs, and sees the whole product."""
    model = built("llama")
    layer = rollout_copy(model, torch.float32).model.layers[0]
    q, k, v = (getattr(layer.self_attn, name) for name in ATTENTION)
    assert q.product is k.product is v.product and not q.product.fused  # float32 weights are shared
    assert layer.mlp.gate_proj.product is layer.mlp.up_proj.product is not q.product
    own = rollout_copy(model).model.layers[0]
    assert own.self_attn.q_proj.product.fused and own.mlp.down_proj.product.fused
    x, y = torch.randn(2, 3, 64), torch.randn(2, 3, 64)
    base = dict(base_of(model).named_modules())["model.layers.0.self_attn.k_proj"].eval()
    with torch.no_grad():
        q(x)
        torch.testing.assert_close(k(y), base(y))  # another tensor, out of order
        torch.testing.assert_close(k(x), base(x))
        torch.testing.assert_close(v(x), dict(base_of(model).named_modules())["model.layers.0.self_attn.v_proj"](x))
    seen: list[Tensor] = []
    base.base_layer.register_forward_hook(lambda module, args, output: seen.append(output.clone()))
    input_ids = torch.tensor(PROMPTS[:1])
    with torch.no_grad():
        rollout_copy(model)(input_ids=input_ids)
    assert len(seen) == 1


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_fused_products_compute_the_same(built: Callable[..., PeftModel], plain_four_bits: None) -> None:
    """In bfloat16, where the weights are the copy's own, against separate products: equal up to the order of sums."""
    for name in ("all linears", "some linears", "biases", "ranks by layer"):
        model = built("llama", lora=ADAPTERS[name], quantization=NF4).eval()
        fused, exact = rollout_copy(model), rollout_copy(model, torch.float32)
        assert any(module.product.fused for module in fused.modules() if isinstance(module, AdaptedLinear))
        error = (logits_of(fused) - logits_of(exact)).square().mean().sqrt() / logits_of(exact).std()
        assert float(error) < 0.05


def test_bytes_are_counted_before_a_copy_is_made(make_policy: Callable[..., Policy], plain_four_bits: None) -> None:
    def new_bytes(model: PeftModel, dequantize: bool) -> int:
        old = {parameter.untyped_storage().data_ptr() for parameter in base_of(model).parameters()}
        copied = rollout_copy(model, dequantize=dequantize)
        adapted = [module for module in copied.modules() if isinstance(module, AdaptedLinear)]
        tensors = [*copied.parameters(), *(layer.up for layer in adapted), *(layer.product.weight for layer in adapted)]
        storages = {tensor.untyped_storage().data_ptr(): tensor.untyped_storage().nbytes() for tensor in tensors}
        return sum(size for key, size in storages.items() if key not in old)

    for settings, dequantize in [({}, True), ({"quantization": NF4}, True), ({"quantization": NF4}, False)]:
        model = make_policy("llama", **settings).build()
        assert copied_bytes(model, torch.bfloat16, dequantize) == new_bytes(model, dequantize)


def test_making_a_copy_changes_nothing(built: Callable[..., PeftModel]) -> None:
    model = built("llama", gradient_checkpointing=True)
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modules = {name: (type(module), module.training) for name, module in model.named_modules()}
    before = torch.get_rng_state()
    copied = rollout_copy(model)
    copied.config.use_cache, handle = True, copied.register_forward_hook(lambda *args: None)
    handle.remove()
    assert torch.equal(before, torch.get_rng_state())
    assert modules == {name: (type(module), module.training) for name, module in model.named_modules()}
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
    assert all(p.requires_grad == ("lora_" in name) for name, p in model.named_parameters())


def test_hooks_run_on_a_copy(built: Callable[..., PeftModel]) -> None:
    model, seen = built(), []
    for name, module in model.named_modules():
        if name.endswith(("q_proj", "embed_tokens", "input_layernorm")):
            module.register_forward_hook(lambda module, args, output, name=name: seen.append(name))
    logits_of(rollout_copy(model))
    assert len(seen) == 5
    assert not can_copy(_with_own_forward(model))


def _with_own_forward(model: PeftModel) -> PeftModel:
    layer = next(module for module in model.modules() if isinstance(module, nn.Linear))
    layer.forward = lambda x: functional.linear(x, layer.weight)  # type: ignore[method-assign]
    return model


@pytest.mark.parametrize("architecture", ["llama", "mistral", "qwen3"])
def test_greedy_completions_are_those_of_plain_generate(architecture: str, built: Callable[..., PeftModel]) -> None:
    """The copied bfloat16 model samples row by row, since rows of a batch round differently in bfloat16."""
    copied = rollout_copy(built(architecture))
    config = GenerationConfig(max_new_tokens=12, do_sample=False, eos_token_id=sorted(eos_ids(copied)), pad_token_id=EOS)
    for prompt in PROMPTS:
        found = Decoder(copied, [prompt], Sampling(12, temperature=0), 1).in_segments()[0]
        output = copied.generate(input_ids=torch.tensor([prompt]), generation_config=config)
        assert (found.tokens, found.terminated) == cut_at_eos(output[0, len(prompt) :].tolist(), eos_ids(copied))


def test_rms_norms_are_recognized_by_what_they_compute() -> None:
    assert is_rms_norm(LlamaRMSNorm) and is_rms_norm(Qwen3RMSNorm)
    assert not is_rms_norm(Gemma2RMSNorm) and not is_rms_norm(nn.RMSNorm) and not is_rms_norm(nn.LayerNorm)
    assert Gemma2Config().rms_norm_eps == 1e-6
    norm = LlamaRMSNorm(8, 1e-3)
    norm.weight.data.uniform_(-1, 2)
    x = torch.randn(3, 8)
    torch.testing.assert_close(RMSNorm(norm.weight, norm.variance_epsilon)(x), norm(x))


def test_a_merged_adapter_does_not_survive_bfloat16_at_small_learning_rates() -> None:
    """The reason why the adapter stays apart: at a learning rate of 5e-6, Adam moves each weight of B by 5e-6 a step."""
    torch.manual_seed(0)
    steps, rate, width, rank = 10, 5e-6, 1024, 64
    weight = (torch.randn(width, width) * 0.02).bfloat16()
    down = (torch.rand(rank, width) * 2 - 1) / width**0.5  # peft's initialization of A
    up = torch.randn(width, rank).sign() * rate * steps * 2  # alpha / r = 2
    x = torch.randn(256, width)
    update = x @ (up @ down).t()

    def relative_error(found: Tensor) -> float:
        return float((found - update).norm() / update.norm())

    merged = (weight.float() + up @ down).bfloat16()
    assert relative_error(x @ (merged.float() - weight.float()).t()) > 0.5
    apart = functional.linear(functional.linear(x.bfloat16(), down.bfloat16()), up.bfloat16()).float()
    assert relative_error(apart) < 0.02


def test_samples_of_a_copy_do_not_touch_the_policy(built: Callable[..., PeftModel]) -> None:
    model = built()
    state = {name: value.clone() for name, value in model.state_dict().items()}
    Decoder(rollout_copy(model), PROMPTS, Sampling(6), 3, RowDraws(0, 3, 6)).in_segments()
    assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
