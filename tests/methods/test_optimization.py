"""Optimizers and schedules that cannot work are refused before training."""

from __future__ import annotations

from functools import partial
from typing import Any

import pytest
import torch
from torch import nn
from torch.optim import lr_scheduler

from opsd_lightning.methods.optimization import make_optimizer, make_scheduler
from opsd_lightning.types import ConfigError


def parameters() -> list[nn.Parameter]:
    return [nn.Parameter(torch.ones(2, 3)), nn.Parameter(torch.ones(3))]


@pytest.mark.parametrize(
    "make",
    [
        partial(torch.optim.AdamW, lr=-1e-3),
        partial(torch.optim.AdamW, lr=1e-3, weight_decay=-0.1),
        partial(torch.optim.Adam, lr=1e-3, betas=(0.9, 1.5)),
        partial(torch.optim.SGD, lr=1e-3, nesterov=True),
        torch.optim.LBFGS,
        torch.optim.SparseAdam,
    ],
)
def test_unusable_optimizers_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_optimizer(make, parameters())
    assert caught.value.setting.startswith("model.optimizer")


@pytest.mark.parametrize(
    "make", [torch.optim.AdamW, partial(torch.optim.SGD, lr=1.0), torch.optim.Adafactor, torch.optim.Rprop]
)
def test_optimizer_gets_the_parameters(make: Any) -> None:
    ours = parameters()
    optimizer = make_optimizer(make, ours)
    assert [p for group in optimizer.param_groups for p in group["params"]] == ours
    assert not optimizer.state and all(bool((p == 1).all()) and p.grad is None for p in ours)


@pytest.mark.parametrize(
    "make",
    [
        partial(lr_scheduler.CosineAnnealingLR, T_max=0),
        partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=-1),
        partial(lr_scheduler.LinearLR, start_factor=0.0),
        lr_scheduler.ReduceLROnPlateau,
        partial(lr_scheduler.OneCycleLR, max_lr=1.0, total_steps=5),
    ],
)
def test_unusable_schedules_are_refused(make: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        make_scheduler(make, torch.optim.AdamW(parameters()), max_steps=10)
    assert caught.value.setting == "model.lr_scheduler"


def test_schedule_starts_at_its_first_step() -> None:
    optimizer = torch.optim.AdamW(parameters(), lr=1.0)
    scheduler = make_scheduler(partial(lr_scheduler.LinearLR, start_factor=0.5, total_iters=2), optimizer, 10)
    assert scheduler.last_epoch == 0 and optimizer.param_groups[0]["lr"] == 0.5
