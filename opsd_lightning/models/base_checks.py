"""Checks of a base model as it was loaded, before any pass: its tensors, its vocabulary, and where an adapter may sit."""

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

#: Largest sizes of a configuration: no model comes near them, and building one would take all memory.
_LIMITS = {"num_hidden_layers": 2**11, "hidden_size": 2**18, "intermediate_size": 2**20, "vocab_size": 2**24}
_LIMITS |= {"num_attention_heads": 2**14, "num_key_value_heads": 2**14, "head_dim": 2**14, "num_local_experts": 2**14}

#: Layers of bitsandbytes, and what their weights are.
_QUANTIZED = {"Linear4bit": "Params4bit", "Linear8bitLt": "Int8Params"}


def check_folder(folder: Path, setting: str) -> None:
    """Refuse a model's folder that leads elsewhere: to another base model, or to weights outside of it.

    Args:
        folder: A local folder.
        setting: Name of the model in messages.

    Raises:
        ConfigError: It is an adapter's, or its index of weights names files that are not below it.
    """
    if (folder / "adapter_config.json").is_file():
        raise ConfigError(
            f"{folder} is an adapter's folder, which names a base model of its own",
            setting,
            "Give that base model, and the folder as model.policy.adapter",
        )
    for index in folder.glob("*.index.json"):
        try:
            files = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
        except (OSError, ValueError, LookupError, TypeError, AttributeError, RecursionError) as error:
            raise ConfigError(f"{index} is no index of weights ({type(error).__name__})", setting, "Correct it") from error
        for name in files:
            if not isinstance(name, str) or PurePath(name).is_absolute() or ".." in PurePath(name).parts:
                raise ConfigError(f"{index} names {name!r}, which is not below the folder", setting, "Do not use it")


def check_config(config: PretrainedConfig, setting: str) -> None:
    """Refuse an encoder-decoder, and sizes that no model has.

    Raises:
        ConfigError: The configuration is of one, or has such a size.
    """
    if getattr(config, "is_encoder_decoder", False):
        raise ConfigError(
            f"{config.model_type} is an encoder-decoder, and completions here continue their prompts",
            setting,
            "Choose a decoder-only causal language model",
        )
    for part in (config, config.get_text_config()):
        for name, limit in _LIMITS.items():
            value = getattr(part, name, None)
            if value is not None and not isinstance(value, list) and not (isinstance(value, int) and 0 <= value <= limit):
                raise ConfigError(f"{name} of its config.json is {value!r}", setting, f"Choose a model with at most {limit}")


def check_tensors(base: PreTrainedModel, info: Mapping[str, Any], setting: str) -> None:
    """Refuse a checkpoint that is not the model's own, whose tensors transformers would make at random or leave out.

    Args:
        base: The model as it was loaded.
        info: ``from_pretrained``'s loading information.
        setting: Name of the model in messages.

    Raises:
        ConfigError: Tensors are missing or of another shape, or belong to layers that have no such tensor.
    """
    name = type(base).__name__
    for module in base.modules():
        kind = _QUANTIZED.get(type(module).__name__)
        if kind is not None and type(module.weight).__name__ != kind:
            raise ConfigError(
                "its config.json asks for quantization by bitsandbytes, and its weights are not quantized",
                setting,
                "Remove quantization_config from config.json, and set quantization where you want it",
            )
    absent = sorted({*info["missing_keys"], *(key for key, *_ in info["mismatched_keys"])})
    if absent:
        raise ConfigError(
            f"the checkpoint lacks {len(absent)} tensors of {name} or has them in another shape, such as {absent[0]}, and "
            "they would be random",
            setting,
            "Choose a complete checkpoint of a causal language model, its head included",
        )
    modules = dict(base.named_modules())
    extra = sorted(info["unexpected_keys"])
    other = [key for key in extra if key.rpartition(".")[2] in ("weight", "bias") and key.rpartition(".")[0] in modules]
    kinds = {_without_numbers(name) for name, _ in base.named_parameters()}
    deeper = [key for key in extra if _without_numbers(key) in kinds]
    if deeper:
        raise ConfigError(
            f"the checkpoint has more layers than {name} by its configuration, such as {deeper[0]}",
            setting,
            "Correct num_hidden_layers in the model's config.json",
        )
    if other:
        raise ConfigError(
            f"the checkpoint has {len(other)} tensors that layers of {name} do not take, such as {other[0]}: it is of "
            "another architecture",
            setting,
            "Correct the model's config.json, or choose another checkpoint",
        )
    if extra:
        text = f"{len(extra)} tensors of the checkpoint are not part of {name} and are left out, such as {extra[0]}"
        warnings.warn(f"{setting}: {text}", stacklevel=2)


def _without_numbers(name: str) -> str:
    return ".".join("*" if part.isdigit() else part for part in name.split("."))


def check_vocabulary(base: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, setting: str) -> None:
    """Refuse a tokenizer whose ids the model has no embedding for.

    Raises:
        ConfigError: Its largest id is beyond the embeddings.
    """
    embeddings: Any = base.get_input_embeddings()
    rows = embeddings.weight.shape[0]
    token, largest = max(tokenizer.get_vocab().items(), key=lambda item: item[1])
    added: Any = tokenizer.added_tokens_decoder.get(largest)
    named = token in tokenizer.all_special_tokens or token in str(tokenizer.chat_template)
    # Converters of GGUF files add a control token that nothing writes.
    if largest >= rows and (named or largest > rows or added is None or not added.special):
        raise ConfigError(
            f"the tokenizer has ids up to {largest} ({token!r}), and the model embeds {rows} tokens, ids 0 to {rows - 1}",
            setting,
            "Give the folder the tokenizer that the model came with, or resize the model's embeddings "
            "(resize_token_embeddings) and save it",
        )


def not_adapted(base: PreTrainedModel) -> str | None:
    """Return a pattern of the modules that ``all-linear`` must leave out, or None.

    These are routers that are linear layers but give more than a product, and what never runs on text, such as a vision
    tower: adapters there have no gradient, which ddp refuses.
    """
    names = [*(name for name, module in base.named_modules() if returns_more(module)), *_beside_the_decoder(base)]
    # One pattern for all layers: they differ in their numbers alone.
    patterns = [r"\.".join(r"\d+" if part.isdigit() else re.escape(part) for part in name.split(".")) for name in names]
    return "|".join(rf"{pattern}(\..*)?" for pattern in dict.fromkeys(patterns)) or None


@torch.no_grad()
def returns_more(module: nn.Module) -> bool:
    """Tell whether a module is one of a model's own linear layers, and gives something else than the product."""
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
    """Refuse an adapter on a router.

    Raises:
        ConfigError: It sits on a linear layer that gives more than a product.
    """
    for name, module in model.named_modules():
        if isinstance(module, BaseTunerLayer) and returns_more(found := module.get_base_layer()):
            raise ConfigError(
                f"{name} is a {type(found).__name__}, which is no plain linear layer and takes no adapter",
                f"{setting}.lora.target_modules",
                "Leave it out, or use all-linear",
            )


def _beside_the_decoder(base: PreTrainedModel) -> Iterator[str]:
    """The modules on the way to the text decoder that are not part of it, but for the head."""
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
