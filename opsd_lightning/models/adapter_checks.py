"""Checks of a trained adapter's settings before peft uses them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from peft import LoraConfig
from torch import Tensor, nn

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.limited_process import exceeded_limit

_SETTING = "model.policy.adapter"
_SECONDS = 10.0  # matching one module name normally takes microseconds
_MEMORY = 2**30
#: Values of ``init_lora_weights`` that do not change the base model's weights. Loading a trained adapter replaces the rest.
_INITS = (True, False, None, "gaussian", "orthogonal", "eva")


def check_adapter_config(config: LoraConfig, weights: Mapping[str, Tensor], base: nn.Module) -> None:
    """Refuse adapter settings that would take much time or memory, and disable peft's costly initializations.

    Args:
        config: Settings of the adapter. ``init_lora_weights`` is set to True.
        weights: Weights of the adapter.
        base: The base model that the adapter is for.

    Raises:
        ConfigError: A rank exceeds the sizes of the weights, ``layer_replication`` names more layers than exist,
            ``init_lora_weights`` would change the base model, or matching a pattern with the module names takes too long.
    """

    def error(problem: str, fix: str = "Do not use it, or correct its adapter_config.json") -> ConfigError:
        return ConfigError(f"the adapter's {problem}", _SETTING, fix)

    if not any(config.init_lora_weights is value or config.init_lora_weights == value for value in _INITS):
        raise error(
            f"init_lora_weights is {str(config.init_lora_weights)[:80]!r}, which changes the base model's weights",
            "Convert it to a plain LoRA adapter (peft's path_initial_model_for_weight_conversion)",
        )
    config.init_lora_weights = True
    largest = max([1024, *(size for name, value in weights.items() if "lora_" in name for size in value.shape)])
    patterns = config.rank_pattern or {}
    for rank in (config.r, *(patterns.values() if isinstance(patterns, Mapping) else [patterns])):
        if not (type(rank) is int and 0 < rank <= largest):
            raise error(f"rank is {str(rank)[:80]}, and its weights allow {largest} at most")
    layers = config.layer_replication or []
    depth = max((len(part) for part in base.modules() if isinstance(part, nn.ModuleList)), default=0)
    for part in layers:
        if len(part) != 2 or not all(type(end) is int for end in part) or not 0 <= part[0] < part[1] <= depth:
            raise error(f"layer_replication names layers {str(part)[:80]}, and the model has {depth}")
    if sum(end - start for start, end in layers) > max(len(weights), depth):
        raise error("layer_replication repeats more layers than the adapter has weights for")
    names = [name for name, _ in base.named_modules()]
    if ran_out := exceeded_limit(lambda: _match(config, names), _SECONDS, _MEMORY):
        raise error(f"patterns for module names run out of {ran_out} on this model")


def _match(config: LoraConfig, names: Iterable[str]) -> None:
    patterns = [re.compile(pattern) for pattern in _patterns(config)]
    for name in names:
        for pattern in patterns:
            pattern.fullmatch(name)
            pattern.match(name)


def _patterns(config: LoraConfig) -> Iterator[str]:
    """Yield the regular expressions that peft builds from the settings."""
    for value in (config.target_modules, config.exclude_modules, config.layers_pattern):
        if isinstance(value, str):
            yield value
    for setting in (config.rank_pattern, config.alpha_pattern):
        for key in setting or ():
            yield rf"(.*\.)?({key})$"
    for name in config.modules_to_save or ():
        yield rf"(^|.*\.){name}($|\..*)"
    layers = config.layers_pattern or ()
    for pattern in [layers] if isinstance(layers, str) else layers:
        yield rf".*\.{pattern}\.(\d+)\."
        yield rf"(?:^|.*?\.){pattern}\.(?P<idx>\d+)\."
