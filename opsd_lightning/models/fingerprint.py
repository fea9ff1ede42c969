"""Fingerprints of models and settings: plain values and digests that are equal if two runs compute the same results."""

from __future__ import annotations

import hashlib
import inspect
import json
from collections.abc import Collection, Iterable, Iterator, Mapping
from enum import Enum
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig, PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from safetensors import safe_open
from torch import Tensor
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME
from transformers.utils.hub import cached_file

from opsd_lightning.models.policy import STUDENT, ModelSettings, base_of, is_adapter_key
from opsd_lightning.models.rope import frequencies_in_use

_ROWS, _COLUMNS = 64, 256  # sampled evenly from a large tensor

# Fields of the model's configuration without effect on the logits.
_CONFIG_IGNORED = {
    *("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "architectures", "quantization_config"),
    *("pad_token_id", "bos_token_id", "output_attentions", "output_hidden_states", "return_dict", "id2label", "label2id"),
    *("_attn_implementation", "_attn_implementation_internal", "problem_type", "initializer_range"),
}
# Fields of the adapter's configuration that only affect its initialization, name its origin, or resolve `target_modules`.
_ADAPTER_IGNORED = {
    *("base_model_name_or_path", "revision", "inference_mode", "task_type", "peft_version", "auto_mapping"),
    *("init_lora_weights", "runtime_config", "loftq_config", "eva_config", "corda_config", "lora_ga_config"),
}


def plain(value: Any, without: Collection[str] = ()) -> Any:
    """Convert nested settings to plain values that JSON and a safe checkpoint can hold.

    Sets become sorted lists. Other objects become the result of their ``to_dict``, or the name of their class.

    Args:
        value: Any nested settings.
        without: Keys to omit, at every depth.
    """
    if value is None or isinstance(value, bool):
        return value
    if isinstance(value, Enum):
        return plain(value.value)
    for kind in (int, float, str):  # converts subclasses, such as restricted numbers
        if isinstance(value, kind):
            return kind(value)
    if isinstance(value, Mapping):
        return {str(name): plain(part, without) for name, part in value.items() if name not in without}
    if isinstance(value, (set, frozenset)):
        return sorted(map(str, value))
    if isinstance(value, (list, tuple)):
        return [plain(part, without) for part in value]
    if isinstance(value, Tensor):
        return value.detach().tolist() if value.numel() <= 16 else f"tensor {list(value.shape)}"
    if isinstance(value, (torch.dtype, torch.device, Path)):
        return str(value)
    if callable(to_dict := getattr(value, "to_dict", None)) and not isinstance(value, type):
        return plain(to_dict(), without)
    return f"{type(value).__module__}.{type(value).__qualname__}"


def described(part: Any, without: Collection[str] = (), depth: int = 4) -> Any:
    """Describe an object by its class and by those arguments of its constructor that it stores as attributes.

    Other attributes are omitted. Values that `plain` can convert are returned as plain values.

    Args:
        part: An object of a class of this package or of a user.
        without: Arguments to omit, at every depth.
        depth: Levels of nested objects to describe. Deeper objects are represented by `plain`.
    """
    found = plain(part)
    name = f"{type(part).__module__}.{type(part).__qualname__}"
    if found != name or not depth or isinstance(part, str) or inspect.isroutine(part) or inspect.isclass(part):
        return found
    values = {}
    for kind in type(part).__mro__[:-1]:  # includes the arguments of parent classes
        for argument in _arguments(kind):
            for attribute in (argument, f"_{argument}"):
                if argument not in without and argument not in values and hasattr(part, attribute):
                    values[argument] = described(getattr(part, attribute), without, depth - 1)
    return {"class": _public_name(type(part))} | values


def _arguments(kind: type) -> list[str]:
    try:
        parameters = list(inspect.signature(kind.__init__).parameters.values())[1:]  # type: ignore[misc]
    except ValueError:  # a class written in C
        return []
    return [each.name for each in parameters if each.kind not in (each.VAR_POSITIONAL, each.VAR_KEYWORD)]


def _public_name(kind: type) -> str:
    """Return the name of a class, or of its first public parent if the class is a private one of this package."""
    own = __name__.partition(".")[0]
    public = (
        each.__name__
        for each in kind.__mro__
        if not (each.__name__.startswith("_") and each.__module__.partition(".")[0] == own)
    )
    return next(public)


def digest(parts: Iterable[str | bytes | memoryview], size: int = 16) -> str:
    """Return a BLAKE2b digest of ``size`` bytes, in hexadecimal digits, of texts and bytes in their order."""
    found = hashlib.blake2b(digest_size=size)
    for part in parts:
        found.update(part.encode() if isinstance(part, str) else part)
    return found.hexdigest()


def adapter_settings(config: PeftConfig) -> dict[str, Any]:
    """Return the settings of an adapter as plain values, without those of its initialization and origin."""
    return plain(config.to_dict(), _ADAPTER_IGNORED)


def adapter_record(model: Any) -> dict[str, Any] | None:
    """Return the settings and the adapted modules of the student's adapter, or None in full fine-tuning."""
    if not isinstance(model, PeftModel):
        return None
    modules = [
        name.removeprefix("base_model.model.")
        for name, module in model.named_modules()
        if isinstance(module, BaseTunerLayer) and any(STUDENT in key.split(".") for key, _ in module.named_parameters())  # type: ignore[attr-defined]
    ]
    found = adapter_settings(model.peft_config[STUDENT])
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern", "target_modules"):
        found.pop(name, None)
    return found | {"target_modules": sorted(modules)}


def base_record(policy: ModelSettings, model: Any) -> dict[str, Any]:
    """Return a record of the base model: class, configuration, dtype, quantization and a digest of the weights.

    If loading rounds the weights (4 or 8 bits, float16), the digest is computed from the checkpoint's files. It is then the
    same for every dtype, device and strategy.

    Args:
        policy: The settings that the model was built with.
        model: The newly built policy, before it is sharded.
    """
    base = base_of(model)
    rounded = policy.quantization is not None or base.dtype == torch.float16
    weights = (_file_samples(policy) if rounded else None) or _parameter_samples(base)
    return {
        "model": str(policy.model),
        "class": type(base).__name__,
        "config": plain(json.loads(base.config.to_json_string(use_diff=False)), _CONFIG_IGNORED),
        "dtype": str(base.dtype).removeprefix("torch."),
        "quantization": plain(getattr(base.config, "quantization_config", None)),
        "rope": frequencies_in_use(base),
        "weights": digest((part for name in sorted(weights) for part in (name, weights[name])), 8),
    }


def _parameter_samples(base: Any) -> dict[str, bytes]:
    """Sample the parameters of the base model, by their names in the checkpoint."""
    found = {}
    for name, value in base.named_parameters():
        # Wrappers of adapters add a part to the name.
        parts = [part for part in name.split(".") if part not in ("base_layer", "original_module", "token_adapter")]
        if not is_adapter_key(name):
            found[".".join(parts)] = _sample(value.detach())
    return found


def _file_samples(policy: ModelSettings) -> dict[str, bytes]:
    """Sample the tensors in the checkpoint's safetensors files. Return an empty dictionary if it has no such files."""

    def find(name: str) -> str | None:
        return cached_file(
            str(Path(policy.model).expanduser()),
            name,
            revision=policy.revision or "main",
            _raise_exceptions_for_missing_entries=False,
            _raise_exceptions_for_connection_errors=False,
        )

    files = [find(SAFE_WEIGHTS_NAME)]
    if (index := find(SAFE_WEIGHTS_INDEX_NAME)) is not None:
        names = json.loads(Path(index).read_text(encoding="utf-8"))["weight_map"].values()
        files = [find(name) for name in sorted(set(names))]
    return dict(_samples_of_files(files))


def _samples_of_files(files: Iterable[str | None]) -> Iterator[tuple[str, bytes]]:
    for path in files:
        if path is not None:
            with safe_open(path, framework="pt") as file:
                for name in file.keys():  # noqa: SIM118 (not a mapping)
                    yield name, _sample(file.get_tensor(name))


def _sample(value: Tensor) -> bytes:
    """Return the shape and (some) values of a tensor as bytes. Floats are rounded to bfloat16, whatever their dtype."""
    rows = value.reshape(value.shape[0] if value.dim() else 1, -1)
    if rows.numel() > _ROWS * _COLUMNS:
        count = min(_ROWS, len(rows)) if rows.shape[1] > 1 else min(_ROWS * _COLUMNS, len(rows))
        places = torch.arange(count, device=rows.device) * (len(rows) - 1) // max(count - 1, 1)
        rows = rows[places, :: max(1, rows.shape[1] // _COLUMNS) | 1]
    if rows.is_floating_point():
        rows = rows.to(torch.bfloat16)
    return f"{tuple(value.shape)}".encode() + rows.contiguous().cpu().reshape(-1).view(torch.uint8).numpy().tobytes()
