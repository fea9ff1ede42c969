"""Export of the trained adapter: as a peft folder, or merged into the base model. Folders are replaced atomically."""

from __future__ import annotations

import copy
import dataclasses
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from peft.tuners.lora import LoraLayer
from peft.tuners.tuners_utils import BaseTunerLayer
from peft.utils.other import EMBEDDING_LAYER_NAMES, TrainableTokensWrapper
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import GenerationConfig

from opsd_lightning.models.dequantized import dequantized
from opsd_lightning.models.policy import STUDENT, LoRA, Policy, base_of
from opsd_lightning.models.sharding import full_tensor
from opsd_lightning.models.verification import check_adapter, check_model, logits_of, probe_tokens
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.folders import Protected, check_replaceable, replace_folder

#: Kinds of exported folders (see `opsd_lightning.utils.folders`). In full fine-tuning the first holds the whole model.
ADAPTER, MERGED = "adapter", "merged model"


def write_adapter(
    model: PeftModel,
    folder: str | Path,
    state_dict: dict[str, Tensor] | None = None,
    tokenizer: Any = None,
    setting: str = "folder",
    kept: Sequence[Protected] = (),
    card: str | None = None,
    base_model: str | None = None,
    revision: str | None = None,
) -> Path:
    """Write the student's adapter as a peft folder, or the whole model in full fine-tuning. The write is atomic.

    Args:
        model: The policy.
        folder: Folder to write, for ``PeftModel.from_pretrained`` (or the model's own ``from_pretrained``). An existing
            folder is replaced if it is empty or contains only an earlier export.
        state_dict: Weights to write, by their names in ``model``. Defaults to the current weights.
        tokenizer: Tokenizer to write into the folder as well. Defaults to none.
        setting: Name of the setting that the folder comes from, for errors.
        kept: Files and folders that must not be overwritten, with a description of each (see `folders.check_replaceable`).
        card: Contents of the folder's ``README.md``. Defaults to peft's own.
        base_model: Hub id of the base model in the adapter's settings. Defaults to the name that the model was loaded by.
        revision: Branch, tag or commit of the base model in the adapter's settings. Defaults to none.

    Raises:
        ConfigError: The folder must not be replaced, or its contents, when read back, differ from the policy. An earlier
            export then stays.
    """
    folder = Path(folder)
    adapter: Any = {}
    if isinstance(model, PeftModel):
        adapter = {"selected_adapters": [STUDENT], "save_embedding_layers": _saves_embeddings(model)}
    with replace_folder(folder, setting, ADAPTER, [*kept, *_sources(model)]) as temporary:
        model.save_pretrained(str(temporary), state_dict=state_dict, safe_serialization=True, **adapter)
        if isinstance(model, PeftModel):
            check_adapter(model, temporary, state_dict)
            _name_base_model(temporary, base_model, revision)
        else:
            tokens = probe_tokens(model)
            fix = "Use the checkpoint, which is not affected"
            expected, written = logits_of(model, tokens, state_dict), state_dict or model.state_dict()
            check_model(temporary, expected, tokens, model, f"export to {folder}", fix, written)
        if tokenizer is not None:
            tokenizer.save_pretrained(str(temporary))
        _write_card(temporary, card)
    return folder


def _saves_embeddings(model: PeftModel) -> bool | Literal["auto"]:
    """Return peft's ``save_embedding_layers``: ``auto`` for adapted embeddings.

    For others, peft would ask the hub at every export whether the vocabulary was resized, which a policy never does.
    """
    config: Any = model.peft_config[STUDENT]
    layers = {name.rpartition(".")[2] for name, part in base_of(model).named_modules() if isinstance(part, BaseTunerLayer)}
    return "auto" if layers & set(EMBEDDING_LAYER_NAMES) and config.trainable_token_indices is None else False


def _name_base_model(folder: Path, base_model: str | None, revision: str | None) -> None:
    """Write the base model's hub id and revision into the settings of an adapter's folder, where they are given."""
    path = folder / "adapter_config.json"
    given = {"base_model_name_or_path": base_model, "revision": revision}
    settings = json.loads(path.read_text(encoding="utf-8")) | {
        name: value for name, value in given.items() if value is not None
    }
    path.write_text(json.dumps(settings, indent=2, sort_keys=True), encoding="utf-8")


def _write_card(folder: Path, card: str | None) -> None:
    if card is not None:
        (folder / "README.md").write_text(card, encoding="utf-8")


def _sources(model: Any) -> list[Protected]:
    """Return the local folder or file that a model was loaded from, with a description."""
    name = getattr(base_of(model).config, "_name_or_path", "")
    return [("the base model", name)] if name and Path(name).exists() else []


def inputs_of(policy: Policy) -> list[Protected]:
    """Return the local folders and files that a policy is loaded from, with a description of each."""
    found = [("the base model", policy.model), ("the adapter that the policy starts from", policy.adapter)]
    return [(words, path) for words, path in found if path and Path(path).exists()]


def adapter_weights(model: PeftModel, adapter: str = STUDENT) -> dict[str, Tensor]:
    """Return the current weights of an adapter on the CPU, unsharded, by their names in a peft folder.

    Args:
        model: The policy. If it is sharded, every rank must call.
        adapter: Name of the adapter.
    """
    own = {name: full_tensor(value) for name, value in model.state_dict().items() if adapter in name.split(".")}
    # Adapters do not contain embeddings. By default peft asks the hub at every call whether the vocabulary was resized.
    weights = get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter, save_embedding_layers=False)
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def write_weights(config: PeftConfig, weights: dict[str, Tensor], folder: str | Path) -> Path:
    """Write the result of `adapter_weights` and its configuration as a peft folder. The write is atomic."""
    config = copy.copy(config)
    config.inference_mode = True
    with replace_folder(folder, "model.rollouts.init_args.adapter_folder", "served adapter", durable=False) as temporary:
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
    return Path(folder)


def merge_adapter(
    policy: Policy | str,
    adapter: str | Path,
    folder: str | Path,
    dequantize: bool = False,
    setting: str = "folder",
    kept: Sequence[Protected] = (),
    card: str | None = None,
) -> Path:
    """Write the base model with an adapter merged into its weights, as a model folder with a tokenizer.

    Args:
        policy: The policy that the adapter was trained with, or its base model: a Hugging Face id, a folder or a ``.gguf``
            file.
        adapter: Peft folder or Hugging Face id of the adapter.
        folder: Folder for the merged model. An existing folder is replaced if it is empty or contains only an earlier merged
            model.
        dequantize: If True, merge into base weights that are rounded to 4 bits, as in the training of a 4-bit policy,
            instead of the original ones. The merged model then gives the same results as in training.
        setting: Name of the setting that the folder comes from, for errors.
        kept: Files and folders that must not be overwritten, with a description of each (see `folders.check_replaceable`).
        card: Contents of the folder's ``README.md``. Defaults to none.

    Raises:
        ConfigError: ``dequantize`` is set for a policy that is not quantized to 4 bits, the folder must not be replaced, the
            base model has no parameters to merge the adapter into, or the merged model, when read back, gives other logits
            than the policy. An earlier export then stays.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    policy = dataclasses.replace(policy, adapter=str(adapter), lora=LoRA())
    kept = [
        *kept,
        *inputs_of(dataclasses.replace(policy, adapter=None)),
        *([("the adapter", adapter)] * Path(adapter).exists()),
    ]
    check_replaceable(folder, setting, MERGED, kept)
    if dequantize and (policy.quantization is None or not policy.quantization.load_in_4bit):
        raise ConfigError(
            "the policy has no 4-bit quantization to merge with", "dequantize", "Give the policy that was trained in 4 bits"
        )
    # The forward passes below run on the device where the weights are loaded, possibly without the GPU's attention kernels.
    policy = dataclasses.replace(policy, attn_implementation=None)
    generation = _generation_config(policy)
    model = dataclasses.replace(policy, quantization=None).build()
    tokens = probe_tokens(model)
    expected = _round_to_four_bits(model, policy, tokens) if dequantize else logits_of(model, tokens)
    tied = _untie(model)
    _add_biases(model)
    merged = model.merge_and_unload()
    del model
    if tied:
        _tie_again(merged)
    if generation is not None:
        merged.generation_config = generation
    with replace_folder(folder, setting, MERGED, kept) as temporary:
        merged.save_pretrained(temporary, safe_serialization=True)
        policy.load_tokenizer().save_pretrained(temporary)
        _write_card(temporary, card)
        like = merged.to("meta")  # free the weights before they are read back
        check_model(temporary, expected, tokens, like, f"merge into {folder}", "Load the adapter on its base model instead")
    return Path(folder)


@torch.no_grad()
def _round_to_four_bits(model: PeftModel, policy: Policy, tokens: Tensor) -> Tensor:
    """Round the base weights to their 4-bit values, and return the quantized policy's logits for some tokens."""
    from bitsandbytes.nn.modules import Linear4bit

    layers = dict(model.named_modules())
    quantized = policy.build()
    for name, module in quantized.named_modules():
        if isinstance(module, Linear4bit):
            layers[name].weight.copy_(dequantized(module))  # type: ignore[union-attr, operator]
    return logits_of(quantized, tokens)


def _untie(model: PeftModel) -> bool:
    """Give a tied head its own copy of the embeddings' weight, since merging an adapter into one would change both.

    Returns:
        True if the head was tied.
    """
    base = base_of(model)
    head, embeddings = (_innermost(layer) for layer in (base.get_output_embeddings(), base.get_input_embeddings()))
    tied = head is not None and head.weight is embeddings.weight
    if tied:
        head.weight = nn.Parameter(head.weight.detach().clone(), requires_grad=False)
    for layer in list(model.modules()):  # merging a LoRA layer would drop the trained tokens below it
        if isinstance(layer, LoraLayer) and isinstance(layer.base_layer, TrainableTokensWrapper):
            layer.base_layer = layer.base_layer.unload_and_optionally_merge_module(True, False, None)
    return tied


def _tie_again(merged: Any) -> None:
    """Tie the head to the embeddings again if the merged weights are equal, and set ``tie_word_embeddings`` accordingly."""
    head, embeddings = merged.get_output_embeddings(), merged.get_input_embeddings()
    same = torch.equal(head.weight, embeddings.weight)
    if same:
        head.weight = embeddings.weight
    for config in {id(config): config for config in (merged.config, merged.config.get_text_config())}.values():
        config.tie_word_embeddings = same


def _innermost(layer: Any) -> Any:
    """Return the base model's layer inside the wrappers of adapters."""
    while layer is not None and (inner := getattr(layer, "base_layer", None) or getattr(layer, "original_module", None)):
        layer = inner
    return layer


#: Fields of transformers' configurations that add biases to linear layers.
_BIAS_SETTINGS = ("attention_bias", "mlp_bias")


def _add_biases(model: PeftModel) -> None:
    """Add zero biases to the base layers whose adapters train a bias (``lora_bias``), to merge the biases into.

    Raises:
        ConfigError: The model's class has no bias for such a layer.
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
            f"the adapter trains biases, and {type(base).__name__} has no bias at {missing[0]}",
            "model.policy.lora.options.lora_bias",
            "Load the adapter on its base model instead of merging it, or train without lora_bias",
        )
    base.config = config
    for name, parameter in possible.items():  # the class expects all biases, also those without a trained one
        path, _, leaf = name.rpartition(".")
        layer = _innermost(base.get_submodule(path)) if leaf == "bias" else None
        if layer is not None and layer.bias is None:
            layer.bias = nn.Parameter(torch.zeros(parameter.shape, dtype=layer.weight.dtype), requires_grad=False)


def _generation_config(policy: Policy) -> GenerationConfig | None:
    """Load the generation configuration of the checkpoint, which `Policy.build` replaces."""
    if policy.model.endswith(".gguf"):
        return None
    try:
        return GenerationConfig.from_pretrained(policy.model, revision=policy.revision or "main")
    except OSError:
        return None
