"""Tests of QLoRA with bitsandbytes on the CPU: NF4 with double quantization, and 8-bit optimizers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import bitsandbytes
import pytest
import torch
from bitsandbytes.functional import dequantize_4bit
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from peft import PeftModel
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from helpers.models import PROMPTS
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.export import merge_adapter
from opsd_lightning.models.policy import Policy, base_of
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher, Teacher
from opsd_lightning.types import Sampling, UserError

pytestmark = pytest.mark.integration


NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)
GREEDY = Sampling(max_new_tokens=8, temperature=0)


def parts(policy: Policy, **settings: Any) -> tuple[OPSDModule, OPSDDataModule]:
    torch.manual_seed(0)
    settings = {"sampling": Sampling(max_new_tokens=8), "optimizer": lambda p: torch.optim.AdamW(p, lr=0.02)} | settings
    prompts = Prompts("{question}", "{question} {context}")
    data = OPSDDataModule(policy, train=WordProblems(size=16, seed=1), prompts=prompts, batch_size=2, max_new_tokens=8)
    return OPSDModule(policy, **settings), data


def trainer(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, logger=False, enable_progress_bar=False,
        enable_model_summary=False, **({"max_steps": 4} | settings),
    )  # fmt: skip


def bases(module: OPSDModule) -> dict[str, torch.Tensor]:
    return {name: p.detach().clone() for name, p in module.model.named_parameters() if not p.requires_grad}


@pytest.mark.usefixtures("plain_four_bits")
@pytest.mark.parametrize("teacher", [FixedTeacher, lambda: EMATeacher(0.8)], ids=["fixed", "ema"])
def test_quantized_policy_trains_exports_and_resumes(
    teacher: Callable[[], Teacher], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Roll out, train, checkpoint, resume bit for bit, export, load with plain peft, merge."""
    policy = make_policy(quantization=NF4)
    straight = parts(policy, teacher=teacher())
    trainer(tmp_path / "straight", AdapterExport()).fit(*straight)

    keep = ModelCheckpoint(tmp_path / "saved", filename="two", every_n_train_steps=2)
    trainer(tmp_path / "first", keep, max_steps=2).fit(*parts(policy, teacher=teacher()))
    resumed = parts(policy, teacher=teacher())
    trainer(tmp_path / "resumed").fit(*resumed, ckpt_path=tmp_path / "saved" / "two.ckpt", weights_only=True)
    weights, expected = resumed[0].state_dict(), straight[0].state_dict()
    assert weights.keys() == expected.keys() and all(torch.equal(weights[name], expected[name]) for name in weights)
    assert all(value.dtype == torch.float32 for value in weights.values())

    # Quantized alike, plain peft computes the same; the frozen 4-bit weights are those that were loaded.
    ours = straight[0].model
    fresh = AutoModelForCausalLM.from_pretrained(
        policy.model, quantization_config=NF4, device_map={"": "cpu"}, dtype=torch.float32
    )
    theirs = PeftModel.from_pretrained(fresh, str(tmp_path / "straight" / "adapter"))
    ours.eval(), theirs.eval()
    base_of(theirs).generation_config = base_of(ours).generation_config
    ids = torch.tensor([PROMPTS[0]])
    with torch.no_grad():
        assert torch.equal(base_of(ours)(input_ids=ids).logits, theirs(input_ids=ids).logits)
    engine = TransformersEngine()
    assert engine.generate(ours, PROMPTS, GREEDY, 0) == engine.generate(theirs, PROMPTS, GREEDY, 0)

    # Merged into what training saw: the dequantized weights, as an ordinary model.
    folder = merge_adapter(policy, tmp_path / "straight" / "adapter", tmp_path / "merged", dequantize=True)
    merged = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert not hasattr(merged.config, "quantization_config")
    with torch.no_grad():
        torch.testing.assert_close(merged(input_ids=ids).logits, base_of(ours)(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    # ... which the unquantized weights, the default, are close to and not the same as.
    plain = AutoModelForCausalLM.from_pretrained(
        merge_adapter(policy, tmp_path / "straight" / "adapter", tmp_path / "plain"), dtype=torch.float32
    )
    name = "model.layers.0.self_attn.q_proj.weight"
    difference = (plain.state_dict()[name] - merged.state_dict()[name]).abs()
    assert 0 < difference.mean() < 0.1


def test_dequantize_needs_a_4_bit_base(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="4-bit"):
        merge_adapter(make_policy(), tmp_path, tmp_path / "merged", dequantize=True)


@pytest.mark.parametrize("repacks", [False, True], ids=["", "CPU with AVX512-BF16"])
def test_the_base_stays_as_it_was_quantized(
    repacks: bool, make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also where bitsandbytes would repack it in the first rollout, for good, after which no gradient passes any more."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: repacks)
    policy = make_policy(quantization=NF4)
    untouched = OPSDModule(policy)
    untouched.configure_model()
    module, data = parts(policy)
    trainer(tmp_path).fit(module, data)
    before, after = bases(untouched), bases(module)
    assert before.keys() == after.keys() and all(torch.equal(before[name], after[name]) for name in before)
    layer = base_of(module.model).model.layers[0].self_attn.q_proj.base_layer
    assert layer.weight.quant_state.nested  # double quantization
    original = AutoModelForCausalLM.from_pretrained(policy.model).model.layers[0].self_attn.q_proj.weight
    error = (dequantize_4bit(layer.weight.data, layer.weight.quant_state) - original).abs().max()
    assert 0 < error < original.abs().max() / 4


@pytest.mark.filterwarnings("ignore:Paged optimizers are not supported on CPU:UserWarning:bitsandbytes")
@pytest.mark.parametrize("name", ["AdamW8bit", "PagedAdamW8bit"])
def test_8_bit_optimizers_train_and_resume(name: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """They train the adapter, with states in 8 bits, and go on after a resume."""
    policy = make_policy(quantization=NF4)
    make = lambda p: getattr(bitsandbytes.optim, name)(p, lr=0.02, min_8bit_size=16)  # noqa: E731
    keep = ModelCheckpoint(tmp_path, filename="two", every_n_train_steps=2)
    straight = parts(policy, optimizer=make)
    trainer(tmp_path, keep).fit(*straight)
    states = list(straight[0].optimizers().state.values())  # type: ignore[union-attr]
    assert states and all(state["state1"].dtype == torch.uint8 for state in states)
    resumed = parts(policy, optimizer=make)
    trainer(tmp_path).fit(*resumed, ckpt_path=tmp_path / "two.ckpt", weights_only=True)
    weights, expected = resumed[0].state_dict(), straight[0].state_dict()
    assert all(torch.equal(weights[key], expected[key]) for key in weights)
