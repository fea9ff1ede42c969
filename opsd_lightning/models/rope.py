"""Rotary embeddings whose frequencies depend on a row's length, computed for one length that holds for a whole run.

transformers chooses the frequencies of ``longrope`` and ``dynamic`` RoPE from the longest row of a batch, at every pass. A
row's scores then depend on its neighbours, and a rollout changes its frequencies at the limit while cached keys keep the
old ones. Here they are chosen once, when the model is built: those for the longest row that the policy takes, as vLLM does
for its ``max_model_len``.
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

#: Name that a rotary embedding's ``rope_type`` takes here: transformers leaves its frequencies alone.
_CONSTANT = "constant"


def row_limit(config: PretrainedConfig, max_length: int | None, setting: str) -> int | None:
    """Return the length limit of a row (prompt and completion) in tokens, or None where the model has none.

    Args:
        config: The model's configuration.
        max_length: The user's limit. Defaults to the model's ``max_position_embeddings``, and for RoPE that depends on the
            length to the length from which it does.
        setting: Name of ``max_length`` in messages.

    Raises:
        ConfigError: The limit is beyond the model's positions.
    """
    text = config.get_text_config()
    positions: int | None = getattr(text, "max_position_embeddings", None)
    constant = constant_length(config)
    if max_length is None:
        return positions if constant is None else constant if positions is None else min(constant, positions)
    extends = any("dynamic" in str(each.get("rope_type")) for each in _rope_parameters(text))
    if positions is not None and max_length > positions and not extends:
        raise ConfigError(
            f"{max_length} tokens are more than the model's {positions} positions", setting, f"Set it to {positions} or less"
        )
    return max_length


def constant_length(config: PretrainedConfig) -> int | None:
    """Return the length up to which RoPE has its original frequencies, or None where they never change."""
    text: Any = config.get_text_config()
    found = []
    for parameters in _rope_parameters(text):
        if parameters.get("rope_type") == "longrope":
            found.append(int(parameters["original_max_position_embeddings"]))
        elif "dynamic" in str(parameters.get("rope_type")):
            found.append(int(text.max_position_embeddings))
    return min(found, default=None)


def fix_frequencies(base: nn.Module, limit: int | None) -> None:
    """Compute the frequencies of a model's rotary embeddings for rows of up to ``limit`` tokens, and keep them.

    Without effect on RoPE that does not depend on the length.
    """
    base.row_limit = limit  # type: ignore[assignment]
    if limit is None:
        return
    for module in base.modules():
        kinds = getattr(module, "rope_type", None)
        if isinstance(kinds, str) and _depends(kinds):
            _fix(module, kinds, limit)
            module.rope_type = _CONSTANT  # type: ignore[assignment]
        elif isinstance(kinds, dict) and any(map(_depends, kinds.values())):
            for layer_type, kind in kinds.items():
                if _depends(kind):
                    _fix(module, kind, limit, layer_type)
            module.rope_type = {  # type: ignore[assignment]
                layer_type: _CONSTANT if _depends(kind) else kind for layer_type, kind in kinds.items()
            }
    own = getattr(type(base), "prepare_inputs_for_generation", None)
    if hasattr(base.config, "original_max_position_embeddings") and own is not None:
        # Phi-3 and its kin throw the cache away where the frequencies would change.
        base.prepare_inputs_for_generation = MethodType(  # type: ignore[assignment]
            GenerationMixin.prepare_inputs_for_generation, base
        )


def frequencies_in_use(base: Any) -> str | int | None:
    """Return what tells the fixed frequencies of a model from those of another ``max_length``: ``long`` or ``short``, or the
    length itself for ``dynamic``. None where they do not depend on the length.

    Args:
        base: The causal language model below the adapter, as `fix_frequencies` left it.
    """
    limit, constant = getattr(base, "row_limit", None), constant_length(base.config)
    if limit is None or constant is None:
        return None
    if any("dynamic" in str(each.get("rope_type")) for each in _rope_parameters(base.config.get_text_config())):
        return max(int(limit), constant)
    return "long" if limit > constant else "short"


def sampler_length(base: Any, max_model_len: int | None, setting: str) -> int | None:
    """Return the context length for a sampler that chooses the frequencies from it, as vLLM does.

    Args:
        base: The causal language model below the adapter.
        max_model_len: The sampler's context length as it was set; None for the default.
        setting: Name of ``max_model_len`` in messages.

    Raises:
        ConfigError: The sampler would compute with other frequencies.
    """
    limit, constant = getattr(base, "row_limit", None), constant_length(base.config)
    if limit is None or constant is None:
        return max_model_len
    if max_model_len is not None and (max_model_len > constant) != (limit > constant):
        raise ConfigError(
            f"with a context of {max_model_len} tokens vLLM takes the RoPE frequencies of "
            f"{'long' if max_model_len > constant else 'short'} rows, and the trainer, with model.policy.max_length "
            f"{limit}, those of {'long' if limit > constant else 'short'} ones (the limit is {constant})",
            setting,
            f"Set it to {limit}, or model.policy.max_length to {max_model_len}",
        )
    return limit if max_model_len is None else max_model_len


def _rope_parameters(config: Any) -> Iterator[dict[str, Any]]:
    """Each set of RoPE parameters: one for a model, or one for each type of layer."""
    found = getattr(config, "rope_parameters", None) or {}
    nested = [value for value in found.values() if isinstance(value, dict)]
    yield from nested if nested and "rope_type" not in found else [found]


def _depends(kind: str) -> bool:
    return kind == "longrope" or "dynamic" in kind


def _fix(module: Any, kind: str, limit: int, layer_type: str | None = None) -> None:
    prefix, keys = ("", {}) if layer_type is None else (f"{layer_type}_", {"layer_type": layer_type})
    old = getattr(module, f"{prefix}inv_freq")
    found, scale = ROPE_INIT_FUNCTIONS[kind](module.config, old.device, seq_len=limit, **keys)
    old.copy_(found)
    setattr(module, f"{prefix}attention_scaling", scale)
    parameters = module.config.rope_parameters
    if layer_type is None and "long_mscale" in parameters and hasattr(module, "rope_init_fn"):
        # PhiMoE takes frequencies and scale anew at each pass, and the scale by the batch's longest row.
        name = "long_mscale" if limit > parameters["original_max_position_embeddings"] else "short_mscale"
        module.config = copy.deepcopy(module.config)
        module.config.rope_parameters |= dict.fromkeys(("long_mscale", "short_mscale"), parameters[name])
        module.rope_init_fn = partial(module.rope_init_fn, seq_len=limit)
