"""Settings of an adapter that was trained elsewhere, bounded before peft works on them."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

from peft import LoraConfig
from torch import Tensor, nn

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.limited_process import exceeded_limit

_SETTING = "model.policy.adapter"
_SECONDS = 10.0  # a pattern takes microseconds on a module's name
_MEMORY = 2**30
#: Starts that leave the base model's weights alone. A trained adapter overwrites all of them.
_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def check_adapter_config(config: LoraConfig, weights: Mapping[str, Tensor], base: nn.Module) -> None:
    """Refuse settings of an adapter that would take long or much memory; have peft start it without computing.

    Args:
        config: The adapter's. Its start is set to peft's own.
        weights: The adapter's.
        base: The base model that it is put on.

    Raises:
        ConfigError: Ranks are beyond the weights', layers are repeated without end, the start computes on the base model, or
            a pattern takes too long on the names of the model's modules.
    """

    def refuse(problem: str, fix: str = "Do not use it, or correct its adapter_config.json") -> ConfigError:
        return ConfigError(f"the adapter's {problem}", _SETTING, fix)

    if not any(config.init_lora_weights is start or config.init_lora_weights == start for start in _STARTS):
        raise refuse(
            f"init_lora_weights is {str(config.init_lora_weights)[:80]!r}, a start that changes the base model's weights",
            "Convert it to a plain LoRA adapter (peft's path_initial_model_for_weight_conversion)",
        )
    config.init_lora_weights = True
    most = max([1024, *(size for name, value in weights.items() if "lora_" in name for size in value.shape)])
    patterns = config.rank_pattern or {}
    for rank in (config.r, *(patterns.values() if isinstance(patterns, Mapping) else [patterns])):
        if not (type(rank) is int and 0 < rank <= most):
            raise refuse(f"rank is {str(rank)[:80]}, and its weights are of {most} at most")
    layers = config.layer_replication or []
    has = max((len(part) for part in base.modules() if isinstance(part, nn.ModuleList)), default=0)
    for part in layers:
        if len(part) != 2 or not all(type(end) is int for end in part) or not 0 <= part[0] < part[1] <= has:
            raise refuse(f"layer_replication names layers {str(part)[:80]}, of {has}")
    if sum(end - start for start, end in layers) > max(len(weights), has):
        raise refuse("layer_replication repeats more layers than it has weights for")
    names = [name for name, _ in base.named_modules()]
    if ran_out := exceeded_limit(lambda: _match(config, names), _SECONDS, _MEMORY):
        raise refuse(f"patterns of modules' names run out of {ran_out} on this model")


def _match(config: LoraConfig, names: Iterable[str]) -> None:
    found = [re.compile(pattern) for pattern in _patterns(config)]
    for name in names:
        for pattern in found:
            pattern.fullmatch(name)
            pattern.match(name)


def _patterns(config: LoraConfig) -> Iterator[str]:
    """Every pattern as peft makes it of the settings."""
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
