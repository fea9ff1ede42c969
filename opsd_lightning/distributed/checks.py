"""Strategies and precisions that a training step supports."""

from __future__ import annotations

import difflib

from lightning.pytorch.plugins.precision import BitsandbytesPrecision, Precision
from lightning.pytorch.strategies import FSDPStrategy, Strategy, StrategyRegistry

from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.models.precision import precision_problem
from opsd_lightning.types import ConfigError, UserError


def check_name(strategy: str) -> None:
    """Refuse a name that no strategy has.

    Raises:
        ConfigError: With the nearest names that are supported.
    """
    names = StrategyRegistry.available_strategies()
    if strategy not in ("auto", *names):
        supported = ["auto", *(name for name in names if refusal(name) is None)]
        near = difflib.get_close_matches(strategy, supported, n=3) or ["ddp", "fsdp2"]
        raise ConfigError(f"there is no strategy {strategy}", "trainer.strategy", f"Choose {' or '.join(near)}")


def refusal(strategy: str) -> str | None:
    """The reason why a strategy, by its registered name or its class, is not supported; None where it is."""
    name = strategy.rpartition(".")[2].lower()
    if name.startswith(("fsdp2", "ddp", "single", "auto")):
        return None
    if name.startswith("fsdp"):
        return (
            f"trainer.strategy is {strategy} (FSDP1), under which a step would be wrong: it frees the head and embeddings "
            "after the first of a step's backward passes, and the later ones would compute without them. Use fsdp2"
        )
    if name.startswith("deepspeed"):
        return (
            f"trainer.strategy is {strategy}: DeepSpeed takes every backward pass under Lightning for an optimizer "
            "step's last, and a step here makes several (model.token_budget). Use fsdp2, which shards parameters, "
            "gradients and optimizer state as well"
        )
    if name.startswith("modelparallel"):
        return f"trainer.strategy is {strategy}, which leaves the sharding to the module: use fsdp2, which does it"
    return None


def check_strategy(strategy: Strategy) -> None:
    """Refuse what the training step is not right under.

    Raises:
        UserError: With the reason and what to use instead.
    """
    if isinstance(strategy, FSDP2Strategy):
        return
    name = "FSDPStrategy" if isinstance(strategy, FSDPStrategy) else type(strategy).__name__
    if (reason := refusal(name)) is not None:
        raise UserError(reason)


def check_precision(plugin: Precision) -> None:
    """Refuse precisions that a training step is not right in.

    Raises:
        ConfigError: With the precision to take instead.
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
