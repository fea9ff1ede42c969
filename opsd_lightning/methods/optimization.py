"""The optimizer and its learning-rate schedule: made from settings, and refused where no training step can use them."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterable
from typing import Any

import torch
from lightning.pytorch.utilities import rank_zero_warn
from torch import nn
from torch.optim import Optimizer

from opsd_lightning.types import ConfigError

MakeOptimizer = Callable[[Iterable[Any]], Optimizer]


def make_optimizer(make: MakeOptimizer, parameters: list[nn.Parameter]) -> Optimizer:
    """Make an optimizer of the trainable parameters.

    One step on a copy of a small part of them shows whether a plain ``step()`` on dense gradients is enough for it.

    Args:
        make: Makes the optimizer of parameters.
        parameters: The trainable parameters.

    Raises:
        ConfigError: Its settings are out of range, or it needs more than a plain ``step()``.
    """
    try:
        optimizer = make(parameters)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the optimizer refuses its settings ({error})", "model.optimizer", "Correct them") from error
    name = type(optimizer).__name__
    if not any(float(group.get("lr", 1.0)) for group in optimizer.param_groups):
        rank_zero_warn("model.optimizer.init_args.lr: the learning rate is 0, so that nothing trains. Set it above 0")
    if all(parameter.device.type == "cpu" for parameter in parameters):
        probe = nn.Parameter(torch.zeros(2, 2))
        probe.grad = torch.zeros_like(probe)
        try:
            make([probe]).step()
        except (TypeError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{name} cannot make a plain step on dense gradients ({error})",
                "model.optimizer",
                "Choose another, such as torch.optim.AdamW",
            ) from error
    return optimizer


def make_scheduler(make: Callable[[Optimizer], Any], optimizer: Optimizer, max_steps: int) -> Any:
    """Make a learning-rate schedule that is stepped once after every optimizer step.

    Args:
        make: Makes the schedule of an optimizer.
        optimizer: The optimizer.
        max_steps: Optimizer steps of the run, or -1 for no limit.

    Raises:
        ConfigError: Its settings are out of range, it needs a metric, or it ends before the run does.
    """
    try:
        scheduler = make(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError(
                "ReduceLROnPlateau needs a metric, and a step has none", "model.lr_scheduler", "Choose another"
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # a schedule's step before the optimizer's
            make(torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=1.0, momentum=0.9)).step()
    except ConfigError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"the schedule refuses its settings ({error})", "model.lr_scheduler", "Correct them") from error
    last = getattr(scheduler, "total_steps", None)
    if last is not None and not 0 <= max_steps <= last:
        raise ConfigError(
            f"the schedule ends after total_steps = {last}, before trainer.max_steps = "
            f"{max_steps if max_steps >= 0 else 'unlimited'}",
            "model.lr_scheduler",
            "Make them equal",
        )
    return scheduler
