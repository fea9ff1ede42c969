"""An export computes what the policy does, or is refused, and an earlier one stays."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM

import opsd_lightning.models.export
from helpers.models import PROMPTS, perturb
from opsd_lightning.models.export import merge_adapter, write_adapter
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.types import ConfigError

pytestmark = [  # peft warns of adapters that it cannot merge exactly, of which these are some
    pytest.mark.filterwarnings(f"ignore:{message}:UserWarning:peft")
    for message in (
        "`lora_bias=True` was passed",
        "Model (has|with) `tie_word_embeddings=True`",
        "Input and output embeddings are no longer tied",
        "Setting `save_embedding_layers` to `True`",
        "Adapter 'default'. .*invalid shape",
    )
]


IDS = torch.tensor([[7, 106, *PROMPTS[0]]])
Make = Callable[..., Policy]


def trained(policy: Policy, scale: float = 0.2) -> PeftModel:
    torch.manual_seed(0)
    model = policy.build()
    perturb(model, scale)
    return model.eval()


def logits(model: Any) -> torch.Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=IDS).logits.float()


def lora(targets: Any, **options: Any) -> LoRA:
    return LoRA(r=4, alpha=8, dropout=0.0, target_modules=targets, options=options)


# qwen3 and gpt2 tie their embeddings, llama does not.
MERGED = {
    "head, tied": ("qwen3", lora(["v_proj", "lm_head"])),
    "both, tied": ("qwen3", lora(["embed_tokens", "lm_head"], use_rslora=True)),
    "both together, tied": ("qwen3", lora(["embed_tokens"], ensure_weight_tying=True)),
    "head with DoRA, tied": ("qwen3", lora(["lm_head"], use_dora=True)),
    "tokens, tied": ("qwen3", lora(["o_proj"], trainable_token_indices=[7, 50])),
    "tokens below a head, tied": ("qwen3", lora(["lm_head"], trainable_token_indices={"embed_tokens": [106]})),
    "biases": ("llama", lora(["k_proj", "up_proj"], lora_bias=True)),
    "ranks and scales": ("llama", lora("all-linear", rank_pattern={"k_proj": 2}, alpha_pattern={"up_proj": 3})),
    "Conv1D": ("gpt2", lora(["c_attn", "c_fc"], lora_bias=True)),
    "Conv1D, embeddings": ("gpt2", lora(["c_proj", "wte", "wpe"], use_dora=False)),
}


@pytest.mark.parametrize("case", MERGED)
def test_exports_compute_what_the_policy_does(case: str, make_policy: Make, tmp_path: Path) -> None:
    architecture, settings = MERGED[case]
    policy = make_policy(architecture, lora=settings)
    model = trained(policy)
    expected = logits(model)
    folder = write_adapter(model, tmp_path / "adapter")
    assert torch.equal(logits(model), expected), "the export changed the policy"
    torch.testing.assert_close(logits(make_policy(architecture, adapter=str(folder)).build()), expected)
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(policy, folder, tmp_path / "merged"), dtype=torch.float32)
    torch.testing.assert_close(logits(merged), expected, atol=1e-3, rtol=1e-3)


def test_embeddings_stay_tied_where_the_adapter_leaves_both_alone(make_policy: Make, tmp_path: Path) -> None:
    policy = make_policy("qwen3", lora=lora(["q_proj"]))
    folder = merge_adapter(policy, write_adapter(trained(policy), tmp_path / "adapter"), tmp_path / "merged")
    assert json.loads((folder / "config.json").read_text())["tie_word_embeddings"] is True
    assert "lm_head.weight" not in load_file(folder / "model.safetensors")


def test_merging_in_bfloat16_is_only_rounding(folders: dict[str, str], tmp_path: Path) -> None:
    for architecture in ("qwen3", "gpt2"):
        policy = Policy(folders[architecture], lora=lora("all-linear"), dtype="bfloat16")
        folder = write_adapter(trained(policy), tmp_path / architecture)
        merged = merge_adapter(policy, folder, tmp_path / f"{architecture}-merged")
        assert load_file(merged / "model.safetensors").popitem()[1].dtype == torch.bfloat16


def test_biases_without_a_place_are_refused(make_policy: Make, tmp_path: Path) -> None:
    policy = make_policy("qwen3", lora=lora(["q_proj", "down_proj"], lora_bias=True))
    folder = write_adapter(trained(policy), tmp_path / "adapter")
    with pytest.raises(ConfigError) as refused:
        merge_adapter(policy, folder, tmp_path / "merged")
    assert refused.value.setting == "model.policy.lora.options.lora_bias"
    assert not (tmp_path / "merged").exists()


def rescaled(folder: Path) -> None:
    """Another scale in the settings."""
    path = folder / "adapter_config.json"
    settings = json.loads(path.read_text())
    path.write_text(json.dumps(settings | {"lora_alpha": 9}))


def nudged(folder: Path) -> None:
    """One number of one weight."""
    weights = load_file(folder / "adapter_model.safetensors")
    next(iter(weights.values()))[0, 0] += 0.01
    save_file(weights, folder / "adapter_model.safetensors")


def of_another_layer(folder: Path) -> None:
    """Two layers' weights in each other's place."""
    weights = load_file(folder / "adapter_model.safetensors")
    one, other = (f"base_model.model.model.layers.{n}.self_attn.q_proj.lora_B.weight" for n in (0, 1))
    weights[one], weights[other] = weights[other], weights[one]
    save_file(weights, folder / "adapter_model.safetensors")


def half_empty(folder: Path) -> None:
    """A weight less."""
    weights = load_file(folder / "adapter_model.safetensors")
    weights.popitem()
    save_file(weights, folder / "adapter_model.safetensors")


@pytest.mark.parametrize("spoil", [rescaled, nudged, of_another_layer, half_empty], ids=lambda spoil: spoil.__name__)
@pytest.mark.parametrize("given", [False, True], ids=["present weights", "weights of a checkpoint"])
def test_a_spoilt_adapter_is_refused_and_the_old_one_stays(
    spoil: Callable[[Path], None], given: bool, make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = trained(make_policy(lora=lora(["q_proj"])))
    write_adapter(model, tmp_path / "adapter")
    before = {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()}
    weights = {name: value.clone() for name, value in model.state_dict().items() if "default" in name} if given else None
    perturb(model)
    save = PeftModel.save_pretrained

    def spoilt(self: PeftModel, folder: str, **settings: Any) -> None:
        save(self, folder, **settings)
        spoil(Path(folder))

    monkeypatch.setattr(PeftModel, "save_pretrained", spoilt)
    with pytest.raises(ConfigError):
        write_adapter(model, tmp_path / "adapter", weights)
    assert {path.name: path.read_bytes() for path in (tmp_path / "adapter").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_adapter_is_compared_with_the_weights_that_were_asked_for(make_policy: Make, tmp_path: Path) -> None:
    """Those of a checkpoint, not the policy's present ones."""
    model = trained(make_policy(lora=lora(["q_proj"])))
    weights = {name: value.clone() for name, value in model.state_dict().items() if "default" in name}
    expected = logits(model)
    perturb(model, 0.5)
    folder = write_adapter(model, tmp_path / "adapter", weights)
    torch.testing.assert_close(logits(make_policy(adapter=str(folder)).build()), expected)


def test_a_merge_into_another_model_is_refused_and_the_old_one_stays(
    make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As if tied embeddings stayed tied, as peft leaves them."""
    policy = make_policy("qwen3", lora=lora(["lm_head"]))
    folder = write_adapter(trained(policy), tmp_path / "adapter")
    merge_adapter(policy, folder, tmp_path / "merged")
    before = {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()}
    monkeypatch.setattr(opsd_lightning.models.export, "_untie", lambda model: False)
    with pytest.raises(ConfigError):
        merge_adapter(policy, folder, tmp_path / "merged")
    assert {path.name: path.read_bytes() for path in (tmp_path / "merged").iterdir()} == before


def test_a_whole_model_is_compared_too(make_policy: Make, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model: Any = make_policy("qwen3", lora=None).build()
    weights = {name: value.clone() for name, value in model.state_dict().items()}
    expected = logits(model)
    perturb(model)
    folder = write_adapter(model, tmp_path / "model", weights)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
    save = type(model).save_pretrained
    monkeypatch.setattr(type(model), "save_pretrained", lambda self, folder, **more: save(self, folder))  # present weights
    with pytest.raises(ConfigError):
        write_adapter(model, tmp_path / "model", weights)
    torch.testing.assert_close(logits(AutoModelForCausalLM.from_pretrained(folder)), expected)
