"""Checks of a base model before any forward pass: folder, configuration, tensors, vocabulary, and layers to adapt."""

from __future__ import annotations

import json
import re
import warnings
from collections.abc import Iterator, Mapping
from pathlib import Path, PurePath
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers import PretrainedConfig, PreTrainedModel, PreTrainedTokenizerBase

from opsd_lightning.types import ConfigError

#: Largest accepted sizes in a configuration. Real models are far below; a model of such a size would exhaust the memory.
_LIMITS = {"num_hidden_layers": 2**11, "hidden_size": 2**18, "intermediate_size": 2**20, "vocab_size": 2**24}
_LIMITS |= {"num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14, "num_local_experts": 2**14}

#: Layer classes of bitsandbytes, and the classes of their quantized weights.
_QUANTIZED = {"Linear4bit": "Params4bit", "Linear8bitLt": "Int8Params"}


def check_folder(folder: Path, setting: str) -> None:
    """Refuse a model folder that would load files from elsewhere.

    Args:
        folder: A local folder.
        setting: Name of the setting that names the model, for errors.

    Raises:
        ConfigError: The folder is an adapter's, or its weight index names files outside the folder.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} is the folder of an adapter",
            setting,
            "Give the adapter's base model here, and the folder as model.policy.adapter",
        )
    for index in folder.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            problem = f"{index} is not a valid weight index ({type(error).__name__})"
            raise ConfigError(problem, setting, "Correct the file, or download the model again") from error
        for name in files:
            if not isinstance(name, str) or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise ConfigError(f"{index} names {name!r}, outside the folder", setting, "Do not use this model")


def check_config(config: PretrainedConfig, setting: str) -> None:
    """Refuse the configuration of an encoder-decoder model, or of a model of an absurd size.

    Raises:
        ConfigError: The model is an encoder-decoder, or a size in its configuration is out of range.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{config.model_type} is an encoder-decoder",
            setting,
            "Choose a decoder-only causal language model",
        )
    for part in (config, config.get_text_config()):
        for name, limit in _LIMITS.items():
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, list) and not (isinstance(value, int) and 0 <= value <= limit):
                raise ConfigError(f"{name} in its config.json is {value!r}", setting, f"Choose a model with at most {limit}")


def check_tensors(base: PreTrainedModel, info: Mapping[str, Any], setting: str) -> None:
    """Refuse a checkpoint whose tensors do not match the model: transformers would initialize or drop them silently.

    Args:
        base: The loaded model.
        info: Loading information of ``from_pretrained``.
        setting: Name of the setting that names the model, for errors.

    Raises:
        ConfigError: Tensors are missing, have another shape, or belong to layers that have no such tensor.
    """
    name = type(base).__name__
    for module in base.modules():
        kind = _QUANTIZED.get(type(module).__name__)
        if kind is not None and type(module.weight).__name__ != kind:
            raise ConfigError(
                "its config.json has a quantization_config of bitsandbytes, but its weights are not quantized",
                setting,
                "Remove quantization_config from config.json, and set model.policy.quantization if wanted",
            )
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        raise ConfigError(
            f"the checkpoint lacks {len(absent)} tensors of {name} or has them in another shape, such as {absent[0]}",
            setting,
            "Choose a complete checkpoint of a causal language model, including the head",
        )
    modules = dict(base.named_modules())
    extra = sorted(info["unexpected_keys"])
    other = [key for key in extra if key.rpartition(".")[2] in ("weight", "bias") and key.rpartition(".")[0] in modules]
    kinds = {_without_numbers(name) for name, _ in base.named_parameters()}
    deeper = [key for key in extra if _without_numbers(key) in kinds]
    if deeper:
        raise ConfigError(
            f"the checkpoint has more layers than the configuration of {name}, such as {deeper[0]}",
            setting,
            "Correct num_hidden_layers in the model's config.json",
        )
    if other:
        raise ConfigError(
            f"the checkpoint has {len(other)} tensors that layers of {name} do not have, such as {other[0]}",
            setting,
            "Correct the model's config.json, or choose another checkpoint",
        )
    if extra:
        text = f"{len(extra)} tensors of the checkpoint are not part of {name} and are ignored, such as {extra[0]}"
        warnings.warn(f"{setting}: {text}", stacklevel=2)


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_vocabulary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """Refuse a tokenizer with token ids that the model has no embeddings for.

    Raises:
        ConfigError: The largest token id is out of the range of the embeddings.
    """
    embeddings: Any = base.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    added: Any = tokenizer.added_tokens_decoder.get(largest)
    named = token in tokenizer.all_special_tokens or token in str(tokenizer.chat_template)
    # Converters to GGUF add one control token without an embedding, which no text contains.
    if largest >= rows and (named or largest > rows or added is None or not added.special):
        raise ConfigError(
            f"the tokenizer has token ids up to {largest} ({token!r}), and the model has {rows} embeddings",
            setting,
            "Use the tokenizer that the model was released with, or resize the model's embeddings (resize_token_embeddings) "
            "and save it",
        )


def excluded_modules(base: PreTrainedModel) -> str | None:
    """Return a regular expression for the modules that ``all-linear`` must exclude, or None.

    Excluded are subclasses of linear layers with another output, such as routers of experts, and modules that do not run on
    text, such as a vision tower. Adapters of the latter would get no gradient, which ddp does not allow.
    """
    names = [*(name for name, module in base.named_modules() if is_modified_linear(module)), *_non_text_modules(base)]
    # The modules of all layers have the same names except for the layer index, so they share one pattern.
    patterns = [r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")) for name in names]
    return "|".join(rf"{pattern}(\..*)?" for pattern in dict.fromkeys(patterns)) or None


@torch.no_grad()
def is_modified_linear(module: nn.Module) -> bool:
    """Return True if a module is a model's own subclass of ``nn.Linear`` and its output is not the linear product."""
    own = type(module).__module__.startswith(("transformers.models.", "transformers_modules."))
    if not own or not isinstance(module, nn.Linear) or type(module).forward is nn.Linear.forward:
        return False
    rows = torch.linspace(-1, 1, 2 * module.in_features, dtype=module.weight.dtype, device=module.weight.device)
    try:
        found, expected = module(rows.view(2, -1)), functional.linear(rows.view(2, -1), module.weight, module.bias)
    except (RuntimeError, TypeError, ValueError):
        return True
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return True
    return not found.is_meta and not torch.allclose(found, expected, rtol=1e-2, atol=1e-2)


def check_adapted(model: nn.Module, setting: str) -> None:
    """Refuse an adapter on a layer whose output differs from that of ``nn.Linear`` (see `is_modified_linear`).

    Raises:
        ConfigError: An adapter is on a subclass of ``nn.Linear`` with another output.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and is_modified_linear(found := module.get_base_layer()):
            raise ConfigError(
                f"{name} is a {type(found).__name__}, whose output is not that of a plain linear layer",
                f"{setting}.lora.target_modules",
                "Remove it from the list, or use all-linear",
            )


def _non_text_modules(base: PreTrainedModel) -> Iterator[str]:
    """Yield the names of modules outside the text decoder, except for the head."""
    if base.config.get_text_config() is base.config:
        return
    decoder = base.get_decoder()
    path = next((name for name, module in base.named_modules() if module is decoder), "")
    parts, parent, head = path.split(".") if path else [], "", base.get_output_embeddings()
    for part in parts:
        outer = base.get_submodule(parent)
        for name, module in outer.named_children():
            if name != part and module is not head:
                yield f"{parent}.{name}".removeprefix(".")
        parent = f"{parent}.{part}".removeprefix(".")
