"""Checks that the trainer's strategy and precision support a training step."""

from __future__ import annotations

from lightning.pytorch.accelerators import AcceleratorRegistry
from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, Strategy, StrategyRegistry

from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.models.precision import precision_problem
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.near_names import near_names, question

_SETTING = "trainer.strategy"


def check_accelerator_name(name: str) -> None:
    """Refuse an accelerator name that is not registered.

    Raises:
        ConfigError: The name is not registered. The error names the most similar ones.
    """
    known = ["auto", "gpu", *AcceleratorRegistry.available_accelerators()]
    if name not in known:
        fix = question(near_names(name, known)) or "Choose auto, gpu or cpu"
        raise ConfigError(f"there is no accelerator {name}", "trainer.accelerator", fix)


def check_strategy_name(name: str) -> None:
    """Refuse a strategy name that is not registered.

    Raises:
        ConfigError: The name is not registered. The error names the most similar supported strategies.
    """
    registered = StrategyRegistry.available_strategies()
    if name not in ("auto", *registered):
        supported = ["auto", *(other for other in registered if strategy_problem(other) is None)]
        fix = question(near_names(name, supported)) or "Use ddp or fsdp2"
        raise ConfigError(f"there is no strategy {name}", _SETTING, fix)


def strategy_problem(strategy: str) -> ConfigError | None:
    """Return an error if a strategy is not supported, else None.

    Args:
        strategy: Registered name or class name.
    """
    name = strategy.rpartition(".")[2].lower()
    if name.startswith(("fsdp2", "ddp", "single", "auto")):
        return None
    if name.startswith("fsdp"):
        return ConfigError(
            f"{strategy} (FSDP1) frees the head and the embeddings after the first backward pass of a step, and the later "
            "passes would compute without them",
            _SETTING,
            "Use fsdp2",
        )
    if name.startswith("deepspeed"):
        return ConfigError(
            f"under {strategy}, Lightning ends the optimizer step after every backward pass, and a step makes several of "
            "them (model.token_budget)",
            _SETTING,
            "Use fsdp2, which shards parameters, gradients and optimizer state as well",
        )
    if name.startswith("modelparallel"):
        return ConfigError(f"{strategy} does not shard the model itself", _SETTING, "Use fsdp2")
    return None


def check_strategy(strategy: Strategy) -> None:
    """Refuse a strategy under which a training step would be wrong.

    Raises:
        ConfigError: The strategy is not supported.
    """
    if isinstance(strategy, FSDP2Strategy):
        return
    name = "FSDPStrategy" if isinstance(strategy, FSDPStrategy) else type(strategy).__name__
    if (problem := strategy_problem(name)) is not None:
        raise problem


def check_precision(plugin: Precision) -> None:
    """Refuse a precision under which a training step would be wrong.

    Raises:
        ConfigError: The precision is not supported.
    """
    if isinstance(plugin, BitsandbytesPrecision):
        raise ConfigError(
            "BitsandbytesPrecision would quantize the adapter too",
            "trainer.plugins",
            "Set model.policy.quantization instead",
        )
    name = "16-mixed" if getattr(plugin, "scaler", None) is not None else str(getattr(plugin, "precision", ""))
    if (problem := precision_problem(name)) is not None:
        raise problem
