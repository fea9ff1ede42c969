"""The trained adapter on disk: as a peft folder, or merged into a full model. Written whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.utils.other import TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from opsd_lightning.models.policy import STUDENT, LoRA, Policy, base_of
from opsd_lightning.models.sharding import whole
from opsd_lightning.models.verification import check_adapter, check_model, logits_of, probe_tokens
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.folders import Kept, check, replacing

#: What the folders of an adapter (in full fine-tuning, of the model) and of a merged model hold. See `folders`.
ADAPTER, MERGED = "adapter", "merged model"


def write_adapter(
    model: PeftModel,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    tokenizer: Any = None,
    setting: str = "folder",
    kept: Sequence[Kept] = (),
) -> Path:
    """Write the student's adapter as a peft folder, whole or not at all; in full fine-tuning the whole model.

    Args:
        model: The policy.
        folder: Where ``PeftModel.from_pretrained`` (the model's own ``from_pretrained``) shall find it. A folder that
            exists is replaced if it is empty or holds an earlier export and nothing else.
        state_dict: The policy's adapter weights to write, by their names in ``model``. Defaults to its present ones.
        tokenizer: Written into the folder as well. Defaults to none.
        setting: Name of the setting that the folder comes from, for errors.
        kept: Files and folders that the folder may not be or hold, with words for each (see `folders.check`).

    Raises:
        ConfigError: The folder may not be replaced, or, read back, is not the policy. An earlier export stays.
    """
    folder = Path(folder)
    adapter: Any = {"selected_adapters": [STUDENT]} if isinstance(model, PeftModel) else {}
    with replacing(folder, setting, ADAPTER, [*kept, *_sources(model)]) as temporary:
        model.save_pretrained(str(temporary), state_dict=state_dict, safe_serialization=True, **adapter)
        if isinstance(model, PeftModel):
            check_adapter(model, temporary, state_dict)
        else:
            tokens = probe_tokens(model)
            fix = "Keep the checkpoint, which is not affected"
            expected, written = logits_of(model, tokens, state_dict), state_dict or model.state_dict()
            check_model(temporary, expected, tokens, model, f"export to {folder}", fix, written)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
    return folder


def _sources(model: Any) -> list[Kept]:
    """The folders and files that a model was loaded from."""
    name = getattr(base_of(model).config, "_name_or_path", "")
    return [("the base model", name)] if name and Path(name).exists() else []


def inputs_of(policy: Policy) -> list[Kept]:
    """The folders and files that a policy is loaded from, with words for each."""
    found = [("the base model", policy.model), ("the adapter that the policy starts from", policy.adapter)]
    return [(words, path) for words, path in found if path and Path(path).exists()]


def adapter_weights(model: PeftModel, adapter: str = STUDENT) -> dict[str, Tensor]:
    """An adapter's present weights, whole and on the CPU, by their names in a peft folder.

    Args:
        model: The policy. Where it is sharded, every rank must ask.
        adapter: Which of its adapters.
    """
    own = {name: whole(value) for name, value in model.state_dict().items() if adapter in name.split(".")}
    # Embeddings are no part of it; peft would else ask the hub, at every call, whether their size is the base model's.
    weights = get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter, save_embedding_layers=False)
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def write_weights(config: PeftConfig, weights: dict[str, Tensor], folder: str | Path) -> Path:
    """Write `adapter_weights` and their configuration as a peft folder, whole or not at all."""
    config = copy.copy(config)
    config.inference_mode = True
    with replacing(folder, "model.rollouts.init_args.adapter_folder", "served adapter", lasting=False) as temporary:
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
    return Path(folder)


def merge_adapter(
    policy: Policy | str,
    adapter: str | Path,
    folder: str | Path,
    dequantize: bool = False,
    setting: str = "folder",
    kept: Sequence[Kept] = (),
) -> Path:
    """Write the base model with an adapter merged into its weights, as an ordinary model folder with its tokenizer.

    Args:
        policy: The policy that the adapter was trained with, or its base model: a Hugging Face id, a folder or a ``.gguf``
            file.
        adapter: The adapter's peft folder or Hugging Face id.
        folder: Where the merged model goes. A folder that exists is replaced if it is empty or holds an earlier merged
            model and nothing else.
        dequantize: Merge a policy that was trained in 4 bits into the weights it was trained on, rounded to 4 bits and
            back, rather than into the original ones: it then computes what it computed in training.
        setting: Name of the setting that the folder comes from, for errors.
        kept: Files and folders that the folder may not be or hold, with words for each (see `folders.check`).

    Raises:
        UserError: ``dequantize`` of a policy that is not quantized to 4 bits.
        ConfigError: The folder may not be replaced. Or the merged model, read back, does not compute what the policy does,
            or cannot hold the adapter. An earlier export stays.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    policy = dataclasses.replace(policy, adapter=str(adapter), lora=LoRA())
    kept = [
        *kept,
        *inputs_of(dataclasses.replace(policy, adapter=None)),
        *([("the adapter", adapter)] * Path(adapter).exists()),
    ]
    check(folder, setting, MERGED, kept)
    if dequantize and (policy.quantization is None or not policy.quantization.load_in_4bit):
        raise UserError("merge_adapter: dequantize needs the policy that was trained with 4-bit quantization")
    # Attention kernels of a GPU have no part in the merge, and its passes run where the weights are loaded.
    policy = dataclasses.replace(policy, attn_implementation=None)
    generation = _generation_config(policy)
    model = dataclasses.replace(policy, quantization=None).build()
    tokens = probe_tokens(model)
    # The logits of the policy that the merged model stands for.
    expected = _round_to_four_bits(model, policy, tokens) if dequantize else logits_of(model, tokens)
    tied = _untie(model)
    _add_biases(model)
    merged = model.merge_and_unload()
    del model
    if tied:
        _tie_again(merged)
    if generation is not None:
        merged.generation_config = generation
    with replacing(folder, setting, MERGED, kept) as temporary:
        merged.save_pretrained(temporary, safe_serialization=True)
        policy.load_tokenizer().save_pretrained(temporary)
        like = merged.to("meta")  # frees the weights before they are read back
        check_model(temporary, expected, tokens, like, f"merge into {folder}", "Load the adapter on its base model instead")
    return Path(folder)


@torch.no_grad()
def _round_to_four_bits(model: PeftModel, policy: Policy, tokens: Tensor) -> Tensor:
    """Replace the base weights by their values in 4 bits; returns the quantized policy's logits of some tokens."""
    from bitsandbytes.functional import dequantize_4bit
    from bitsandbytes.nn.modules import Linear4bit

    layers = dict(model.named_modules())
    quantized = policy.build()
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            rounded = dequantize_4bit(module.weight.data, module.weight.quant_state)  # type: ignore[attr-defined]
            layers[name].weight.copy_(rounded)  # type: ignore[union-attr, operator]
    return logits_of(quantized, tokens)


def _untie(model: PeftModel) -> bool:
    """Give the head a weight of its own where it shares the embeddings': merging one of them would else change both.

    Returns:
        True if it did.
    """
    base = base_of(model)
    head, embeddings = (_innermost(layer) for layer in (base.get_output_embeddings(), base.get_input_embeddings()))
    tied = head is not None and head.weight is embeddings.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for layer in list(model.modules()):  # peft's merge of an adapter on top forgets the tokens trained below it
        if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, TrainableTokensWrapper):
            layer.base_layer = layer.base_layer.unload_and_optionally_merge_module(True, False, None)
    return tied


def _tie_again(merged: Any) -> None:
    """Share the head's weight with the embeddings if both are still the same, and write down whether they are."""
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    same = torch.equal(head.weight, embeddings.weight)
    if same:
        head.weight = embeddings.weight
    for config in {id(config): config for config in (merged.config, merged.config.get_text_config())}.values():
        config.tie_word_embeddings = same


def _innermost(layer: Any) -> Any:
    """The base model's own layer below an adapter's."""
    while layer is not None and (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)):
        layer = inner
    return layer


#: Settings of transformers' configurations that give linear layers a bias.
_BIAS_SETTINGS = ("attention_bias", "mlp_bias")


def _add_biases(model: PeftModel) -> None:
    """Give layers a bias that the adapter trains one for (``lora_bias``), as far as the model's class knows one.

    Raises:
        ConfigError: A layer's bias has no place in the merged model.
    """
    base = base_of(model)
    trained = {
        name.removeprefix("base_model.model."): layer
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer) and layer.lora_bias.get(STUDENT) and getattr(layer.base_layer, "bias", 0) is None
    }
    if not trained:
        return
    config = copy.deepcopy(base.config)
    for name in _BIAS_SETTINGS:
        if hasattr(config.get_text_config(), name):
            setattr(config.get_text_config(), name, True)
    with torch.device("meta"):
        possible = dict(type(base)(config).named_parameters())
    if missing := [name for name in trained if f"{name}.bias" not in possible]:
        raise ConfigError(
            f"the adapter trains biases, and {type(base).__name__} has none to merge them into at {missing[0]}",
            "model.policy.lora.options.lora_bias",
            "Load the adapter on its base model instead of merging it, or train without lora_bias",
        )
    base.config = config
    for name, parameter in possible.items():  # all biases that the settings bring, also where none is trained
        path, _, leaf = name.rpartition(".")
        layer = _innermost(base.get_submodule(path)) if leaf == "bias" else None
        if layer is not None and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(parameter.shape, dtype=layer.weight.dtype), requires_grad=False)


def _generation_config(policy: Policy) -> GenerationConfig | None:
    """The checkpoint's own, which `Policy.build` puts aside."""
    if policy.model.endswith(".gguf"):
        return None
    try:
        return GenerationConfig.from_pretrained(policy.model, revision=policy.revision or "main")
    except OSError:
        return None
