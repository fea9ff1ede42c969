"""Sharded weights, gathered and released."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import (
    FSDPModule,
)
from torch.distributed.tensor import DTensor

from opsd_lightning.models.policy import base_of


def _sharded_modules(model: nn.Module | None) -> list[FSDPModule]:
    return [] if model is None else [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def gathered(model: PeftModel) -> Iterator[None]:
    """Inside, all sharded weights are whole on every device, and passes need no other rank. Every rank must enter."""
    root = base_of(model)
    modules = _sharded_modules(root)
    for module in modules:
        module.set_reshard_after_forward(False, recurse=False)
        module.unshard()
    try:
        yield
    finally:
        for module in modules:
            module.set_reshard_after_forward(module is not root, recurse=False)
            module.reshard()


@contextmanager
def without_backward(model: nn.Module) -> Iterator[None]:
    """For forward passes that no backward pass follows: what they left gathered is let go. Every rank must enter, and make
    as many passes."""
    try:
        yield
    finally:
        for module in _sharded_modules(model):
            module.reshard()


def whole(value: Any) -> Any:
    """A sharded tensor as a plain one on the CPU (every rank must ask); anything else as it is."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
