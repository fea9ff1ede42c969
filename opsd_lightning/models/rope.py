"""Constant frequencies for rotary embeddings (RoPE) that depend on the row length.

transformers chooses the frequencies of ``longrope`` and ``dynamic`` RoPE in every pass from the longest row of the batch.
The scores of a row then depend on the other rows, and a rollout that crosses the limit mixes new frequencies with cached
keys of the old ones. This module chooses the frequencies once, when the model is built, for the longest row that the policy
accepts. vLLM does the same for its ``max_model_len``.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from functools import partial
from types import MethodType
from typing import Any

from torch import nn
from transformers import GenerationMixin, PretrainedConfig
from transformers.modeling_rope_utils import ROPE_INIT_FUNCTIONS

from opsd_lightning.types import ConfigError

#: A ``rope_type`` for which transformers does not update the frequencies.
_CONSTANT = "constant"


def row_limit(config: PretrainedConfig, max_length: int | None, setting: str) -> int | None:
    """Return the length limit of a row (prompt and completion) in tokens, or None if the model has no limit.

    Args:
        config: The model's configuration.
        max_length: The user's limit. Defaults to the model's ``max_position_embeddings``, or to the result of
            `constant_length` if that is smaller.
        setting: Name of the setting ``max_length``, for errors.

    Raises:
        ConfigError: The limit is larger than the number of the model's positions.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    constant = constant_length(config)
    if max_length is None:
        return positions if constant is None else constant if positions is None else min(constant, positions)
    extends = any("dynamic" in str(each.get("rope_type")) for each in _rope_parameters(text))
    if positions is not None and max_length > positions and not extends:
        raise ConfigError(
            f"{max_length} tokens exceed the model's {positions} positions", setting, f"Set it to {positions} or less"
        )
    return max_length


def constant_length(config: PretrainedConfig) -> int | None:
    """Return the row length up to which RoPE keeps its original frequencies, or None if they never change."""
    text: Any = config.get_text_config()
    found = []
    for parameters in _rope_parameters(text):
        if parameters.get("rope_type") == "longrope":
            found.append(int(parameters["original_max_position_embeddings"]))
        elif "dynamic" in str(parameters.get("rope_type")):
            found.append(int(text.max_position_embeddings))
    return min(found, default=None)


def fix_frequencies(base: nn.Module, limit: int | None) -> None:
    """Fix the frequencies of a model's rotary embeddings to those for rows of ``limit`` tokens, in place.

    RoPE that does not depend on the length is not changed.
    """
    base.row_limit = limit  # type: ignore[assignment]
    if limit is None:
        return
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _depends_on_length(kinds):
            _fix(module, kinds, limit)
            module.rope_type = _CONSTANT  # type: ignore[assignment]
        elif isinstance(kinds, dict) and any(map(_depends_on_length, kinds.values())):
            for layer_type, kind in kinds.items():
                if _depends_on_length(kind):
                    _fix(module, kind, limit, layer_type)
            module.rope_type = {  # type: ignore[assignment]
                layer_type: _CONSTANT if _depends_on_length(kind) else kind for layer_type, kind in kinds.items()
            }
    own = getattr(type(base), "prepare_inputs_for_generation", None)
    if hasattr(base.config, "original_max_position_embeddings") and own is not None:
        # Phi-3 and similar models discard the cache where transformers would change the frequencies.
        base.prepare_inputs_for_generation = MethodType(  # type: ignore[assignment]
            GenerationMixin.prepare_inputs_for_generation, base
        )


def frequencies_in_use(base: Any) -> str | int | None:
    """Return an identifier of a model's fixed frequencies.

    Args:
        base: The base model after `fix_frequencies`.

    Returns:
        ``long`` or ``short`` for ``longrope``, the length for ``dynamic`` RoPE, and None if the frequencies do not depend on
        the length.
    """
    limit, constant = getattr(base, "row_limit", None), constant_length(base.config)
    if limit is None or constant is None:
        return None
    if any("dynamic" in str(each.get("rope_type")) for each in _rope_parameters(base.config.get_text_config())):
        return max(int(limit), constant)
    return "long" if limit > constant else "short"


def sampler_length(base: Any, max_model_len: int | None, setting: str) -> int | None:
    """Return the context length for a sampler that derives the RoPE frequencies from it, such as vLLM.

    Args:
        base: The base model after `fix_frequencies`.
        max_model_len: Context length of the sampler, or None for its default.
        setting: Name of the setting ``max_model_len``, for errors.

    Raises:
        ConfigError: The sampler would use other frequencies than the base model.
    """
    limit, constant = getattr(base, "row_limit", None), constant_length(base.config)
    if limit is None or constant is None:
        return max_model_len
    if max_model_len is not None and (max_model_len > constant) != (limit > constant):
        raise ConfigError(
            f"with a context of {max_model_len} tokens vLLM uses the RoPE frequencies for "
            f"{'long' if max_model_len > constant else 'short'} rows, and with model.policy.max_length {limit} the trainer "
            f"uses those for {'long' if limit > constant else 'short'} rows (the limit is {constant} tokens)",
            setting,
            f"Set it to {limit}, or model.policy.max_length to {max_model_len}",
        )
    return limit if max_model_len is None else max_model_len


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Yield the RoPE parameters of a model, or of each of its layer types."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    yield from nested if nested and "rope_type" not in found else [found]


def _depends_on_length(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _fix(module: Any, kind: str, limit: int, layer_type: str | None = None) -> None:
    prefix, keys = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    old = getattr(module, f"{prefix}inv_freq")
    found, scale = ROPE_INIT_FUNCTIONS[kind](module.config, old.device, seq_len=limit, **keys)
    old.copy_(found)
    setattr(module, f"{prefix}attention_scaling", scale)
    parameters = module.config.rope_parameters
    if layer_type is None and "long_mscale" in parameters and hasattr(module, "rope_init_fn"):
        # PhiMoE recomputes the frequencies and the scale in each pass, the scale from the longest row of the batch.
        name = "long_mscale" if limit > parameters["original_max_position_embeddings"] else "short_mscale"
        module.config = copy.deepcopy(module.config)
        module.config.rope_parameters |= dict.fromkeys(("long_mscale", "short_mscale"), parameters[name])
        module.rope_init_fn = partial(module.rope_init_fn, seq_len=limit)
