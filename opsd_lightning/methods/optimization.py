"""Creation and checks of the optimizer and its learning-rate schedule."""

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
    """Make the optimizer of the trainable parameters, and check that it can be used in training.

    If the parameters are on the CPU, a second optimizer makes a trial step on a small parameter.

    Args:
        make: Function that makes an optimizer of parameters.
        parameters: The trainable parameters.

    Raises:
        ConfigError: The settings of the optimizer are out of range, or the trial step fails, for example because the
            optimizer needs a closure or sparse gradients.
    """
    try:
        optimizer = make(parameters)
    except (ValueError, TypeError) as error:
        raise ConfigError(f"the optimizer rejects its settings ({error})", "model.optimizer", "Correct them") from error
    name = type(optimizer).__name__
    if not any(float(group.get("lr", 1.0)) for group in optimizer.param_groups):
        rank_zero_warn("model.optimizer.init_args.lr: the learning rate is 0, so nothing is trained. Set it above 0")
    if all(parameter.device.type == "cpu" for parameter in parameters):
        probe = nn.Parameter(torch.zeros(2, 2, dtype=torch.float32))
        probe.grad = torch.zeros_like(probe)
        try:
            make([probe]).step()
        except (TypeError, RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{name} fails in a step with dense gradients and without a closure ({error})",
                "model.optimizer",
                "Choose another optimizer, such as torch.optim.AdamW",
            ) from error
    return optimizer


def make_scheduler(make: Callable[[Optimizer], Any], optimizer: Optimizer, max_steps: int) -> Any:
    """Make a learning-rate schedule that is stepped once after every optimizer step.

    Args:
        make: Function that makes a schedule of an optimizer.
        optimizer: The optimizer.
        max_steps: Number of optimizer steps of the run, or -1 for no limit.

    Raises:
        ConfigError: The settings of the schedule are out of range, it needs a metric, or it ends before the run.
    """
    try:
        scheduler = make(optimizer)
        if isinstance(scheduler, torch.optim.lr_scheduler.ReduceLROnPlateau):
            raise ConfigError(
                "ReduceLROnPlateau needs a metric at every step, and training does not pass one",
                "model.lr_scheduler",
                "Choose another schedule",
            )
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # PyTorch warns, because the schedule is stepped before the optimizer
            make(torch.optim.SGD([nn.Parameter(torch.zeros(1, dtype=torch.float32))], lr=1.0, momentum=0.9)).step()
    except ConfigError:
        raise
    except (ValueError, TypeError, ArithmeticError) as error:
        raise ConfigError(f"the schedule rejects its settings ({error})", "model.lr_scheduler", "Correct them") from error
    total_steps = getattr(scheduler, "total_steps", None)
    if total_steps is not None and not 0 <= max_steps <= total_steps:
        length = f"trainer.max_steps is {max_steps}" if max_steps >= 0 else "trainer.max_steps sets no limit"
        raise ConfigError(
            f"the schedule ends after {total_steps} steps (total_steps), and {length}",
            "model.lr_scheduler",
            "Set total_steps and trainer.max_steps to the same number",
        )
    return scheduler
