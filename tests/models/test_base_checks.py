"""Tests of checks on base models: complete checkpoints, fitting tokenizers, and layers that can have adapters."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors.torch import load_file, save_file
from transformers import (
    BartConfig,
    BartForConditionalGeneration,
    FalconConfig,
    FalconForCausalLM,
    Gemma3Config,
    Gemma3ForConditionalGeneration,
    Llama4ForCausalLM,
    Llama4TextConfig,
    MixtralConfig,
    MixtralForCausalLM,
    PhimoeConfig,
    PhimoeForCausalLM,
    PreTrainedModel,
    Qwen3MoeConfig,
    Qwen3MoeForCausalLM,
)

from helpers.models import EOS, SPECIAL, make_model, make_tokenizer
from opsd_lightning.doctor.memory import kept_bytes_per_token, skeleton
from opsd_lightning.models.policy import LoRA, OtherModel, Policy, base_of
from opsd_lightning.rollouts.self_checks import check_policy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import ModelTeacher
from opsd_lightning.types import ConfigError, UserError

SIZES: dict[str, Any] = {
    "vocab_size": 107, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
Edit = Callable[[dict[str, torch.Tensor]], dict[str, torch.Tensor]]


def saved(model: PreTrainedModel, folder: Path) -> Path:
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = EOS  # type: ignore[union-attr]
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return folder


def edited(folder: Path, edit: Edit) -> Path:
    """A checkpoint of the tiny Llama with other tensors in its file."""
    saved(make_model("llama"), folder)
    save_file(edit(load_file(folder / "model.safetensors")), folder / "model.safetensors", {"format": "pt"})
    return folder


def without(*names: str) -> Edit:
    return lambda tensors: {name: value for name, value in tensors.items() if name not in names}


BROKEN: dict[str, tuple[Edit, str]] = {
    "no head": (without("lm_head.weight"), "lm_head.weight"),
    "no embeddings": (without("model.embed_tokens.weight"), "model.embed_tokens.weight"),
    "a lost layer norm": (without("model.layers.1.input_layernorm.weight"), "model.layers.1.input_layernorm.weight"),
    "biases that the layers do not have": (
        lambda tensors: tensors | {"model.layers.0.self_attn.q_proj.bias": torch.ones(64)},
        "model.layers.0.self_attn.q_proj.bias",
    ),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_checkpoint_that_is_not_whole_is_refused(fault: str, tmp_path: Path) -> None:
    edit, tensor = BROKEN[fault]
    folder = edited(tmp_path / "model", edit)
    with pytest.raises(ConfigError) as refused:
        Policy(str(folder), dtype="float32").build()
    assert refused.value.setting == "model.policy.model" and tensor in refused.value.problem


def test_a_teacher_without_a_head_is_refused(tmp_path: Path) -> None:
    folder = edited(tmp_path / "model", without("lm_head.weight"))
    teacher = ModelTeacher(str(folder))
    assert isinstance(teacher.recipe, OtherModel)
    with pytest.raises(ConfigError) as refused:
        teacher.recipe.build()
    assert refused.value.setting == "model.teacher.model"


def test_a_shard_that_is_not_there_is_refused(tmp_path: Path) -> None:
    saved(make_model("llama"), tmp_path)
    (tmp_path / "model.safetensors").unlink()
    make_model("llama").save_pretrained(tmp_path, max_shard_size="50KB")
    next(tmp_path.glob("model-00002*")).unlink()
    with pytest.raises(UserError):
        Policy(str(tmp_path), dtype="float32").build()


def test_other_tensors_are_left_out_with_a_warning(tmp_path: Path) -> None:
    """A value head or another task's, which the policy has no place for."""
    folder = edited(tmp_path / "model", lambda tensors: tensors | {"value_head.weight": torch.ones(1, 64)})
    with pytest.warns(UserWarning, match=r"value_head\.weight"):
        Policy(str(folder), dtype="float32").build()


def test_tied_heads_are_no_missing_tensors(folders: dict[str, str]) -> None:
    names = load_file(Path(folders["qwen3"]) / "model.safetensors")
    assert "lm_head.weight" not in names
    Policy(folders["qwen3"], dtype="float32").build()


def test_a_tokenizer_that_is_larger_than_the_model(tmp_path: Path) -> None:
    saved(make_model("llama"), tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": [*SPECIAL[2:], "<|tool|>"]})
    tokenizer.save_pretrained(tmp_path)
    with pytest.raises(ConfigError) as refused:
        Policy(str(tmp_path)).build()
    assert refused.value.setting == "model.policy.model" and "<|tool|>" in refused.value.problem


def test_an_encoder_decoder(tmp_path: Path) -> None:
    config = BartConfig(
        vocab_size=107, d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=2, decoder_attention_heads=2,
        encoder_ffn_dim=32, decoder_ffn_dim=32, eos_token_id=EOS, pad_token_id=EOS, bos_token_id=EOS, forced_eos_token_id=None,
    )  # fmt: skip
    saved(BartForConditionalGeneration(config), tmp_path)
    with pytest.raises(ConfigError) as refused:
        Policy(str(tmp_path)).load_config()
    assert refused.value.setting == "model.policy.model"


# -- adapters --------------------------------------------------------------------------------------------------------------


def adapted(model: PeftModel) -> set[str]:
    """The kinds of layers that have an adapter."""
    return {re.sub(r"\d+", "N", n) for n, module in model.named_modules() if isinstance(module, BaseTunerLayer)}


def llama4() -> PreTrainedModel:
    more = {"head_dim": 16, "num_local_experts": 2, "num_experts_per_tok": 1, "intermediate_size_mlp": 64}
    return Llama4ForCausalLM(Llama4TextConfig(**GROUPED, **more, attention_chunk_size=8))


def test_a_router_that_gives_two_things_has_no_adapter(tmp_path: Path) -> None:
    folder = str(saved(llama4(), tmp_path))
    model = Policy(folder, lora=LoRA(r=2, alpha=2, dropout=0.0), dtype="float32").build()
    layers = adapted(model)
    assert layers and not any("router" in name for name in layers)
    check_policy(model, TransformersEngine())
    for options in ({"exclude_modules": ["k_proj"]}, {"exclude_modules": r".*\.k_proj"}):
        fewer = adapted(Policy(folder, lora=LoRA(r=2, alpha=2, dropout=0.0, options=options), dtype="float32").build())
        assert fewer == {name for name in layers if not name.endswith("k_proj")}
    with pytest.raises(ConfigError) as refused:
        Policy(folder, lora=LoRA(r=2, alpha=2, dropout=0.0, target_modules=["router"]), dtype="float32").build()
    assert refused.value.setting == "model.policy.lora.target_modules"


def test_linear_layers_with_a_class_of_their_own_keep_their_adapter(tmp_path: Path) -> None:
    """Falcon's are linear layers under another name."""
    saved(FalconForCausalLM(FalconConfig(**SIZES)), tmp_path)
    model = Policy(str(tmp_path), lora=LoRA(r=2, alpha=2, dropout=0.0), dtype="float32").build()
    assert any(name.endswith("query_key_value") for name in adapted(model))


EXPERTS: dict[str, Callable[[], PreTrainedModel]] = {
    "mixtral": lambda: MixtralForCausalLM(MixtralConfig(**GROUPED, num_local_experts=4)),
    "qwen3": lambda: Qwen3MoeForCausalLM(
        Qwen3MoeConfig(**GROUPED, head_dim=16, num_experts=4, num_experts_per_tok=2, moe_intermediate_size=32)
    ),
    "phi": lambda: PhimoeForCausalLM(PhimoeConfig(**GROUPED, num_local_experts=4)),
}


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", EXPERTS)
def test_mixtures_of_experts(name: str, tmp_path: Path) -> None:
    """With dropout they work, or the message says to leave it out; without it they work, and the doctor estimates them."""
    folder = str(saved(EXPERTS[name](), tmp_path))
    with_dropout = Policy(folder, lora=LoRA(r=2, alpha=2), dtype="float32")
    if name == "phi":  # peft leaves its experts out
        check_policy(with_dropout.build(), TransformersEngine())
    else:
        with pytest.raises(ConfigError) as refused:
            with_dropout.build()
        assert refused.value.setting == "model.policy.lora.dropout"
    recipe = Policy(folder, lora=LoRA(r=2, alpha=2, dropout=0.0), dtype="float32")
    check_policy(recipe.build(), TransformersEngine(), every_adapter=True)
    assert kept_bytes_per_token(skeleton(recipe)) > 0


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.rollouts.self_checks")
def test_a_vision_tower_has_no_adapter(tmp_path: Path) -> None:
    """It never sees text: its adapter would have no gradient, for which ddp waits."""
    config = Gemma3Config(
        text_config=GROUPED | {"head_dim": 16, "sliding_window": 8},
        vision_config={"hidden_size": 32, "intermediate_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2,
                       "image_size": 16, "patch_size": 8},
        mm_tokens_per_image=1, image_token_index=5, boi_token_index=5, eoi_token_index=5,
    )  # fmt: skip
    folder = str(saved(Gemma3ForConditionalGeneration(config), tmp_path))
    model = Policy(folder, lora=LoRA(r=2, alpha=2, dropout=0.0), dtype="float32").build()
    layers = adapted(model)
    assert layers and all("language_model" in name for name in layers)
    assert any("vision" in name for name, _ in base_of(model).named_modules())
    check_policy(model, TransformersEngine(), every_adapter=True)
    everywhere = LoRA(r=2, alpha=2, dropout=0.0, target_modules=["q_proj"])
    model = Policy(folder, lora=everywhere, dtype="float32").build()
    with pytest.raises(ConfigError) as refused:
        check_policy(model, TransformersEngine(), every_adapter=True)
    assert refused.value.setting == "trainer.strategy" and "exclude_modules" in refused.value.fix
    check_policy(model, TransformersEngine())  # on one device nothing waits


def test_config_json_of_another_depth_is_refused(tmp_path: Path) -> None:
    saved(make_model("llama"), tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 3}))
    with pytest.raises(ConfigError) as refused:
        Policy(str(tmp_path)).build()
    assert "model.layers.2." in refused.value.problem


def test_a_checkpoint_with_more_layers_than_its_configuration(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"num_hidden_layers": 1}))
    with pytest.raises(ConfigError) as caught:
        Policy(str(tmp_path), lora=LoRA(r=2, alpha=2), dtype="float32").build()
    assert caught.value.setting == "model.policy.model" and "layers.1" in caught.value.problem


def test_a_tensor_of_another_shape_is_named(tmp_path: Path) -> None:
    model = make_model("llama")
    model.save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    config = json.loads((tmp_path / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config | {"intermediate_size": 32}))
    with pytest.raises(ConfigError) as caught:
        Policy(str(tmp_path), lora=LoRA(r=2, alpha=2), dtype="float32").build()
    assert caught.value.setting == "model.policy.model" and "mlp" in caught.value.problem


def test_a_generation_config_that_cannot_be_read(tmp_path: Path) -> None:
    make_model("llama").save_pretrained(tmp_path)
    make_tokenizer().save_pretrained(tmp_path)
    (tmp_path / "generation_config.json").write_text("{")
    with pytest.raises(ConfigError) as caught:
        Policy(str(tmp_path), lora=LoRA(r=2, alpha=2), dtype="float32").build()
    assert "generation_config.json" in caught.value.problem
