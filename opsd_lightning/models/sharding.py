"""Gathering and resharding of weights that FSDP2 shards."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from peft import PeftModel
from torch import nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

from opsd_lightning.models.policy import base_of


def fsdp_modules(model: nn.Module | None) -> list[FSDPModule]:
    """Return the modules of a model that FSDP2 shards, or an empty list without a model."""
    return [] if model is None else [module for module in model.modules() if isinstance(module, FSDPModule)]


@contextmanager
def unsharded(model: PeftModel) -> Iterator[None]:
    """Hold all weights unsharded on every device inside the context, so that forward passes need no other rank.

    Every rank must enter the context. Without FSDP2 the context has no effect.
    """
    root = base_of(model)
    modules = fsdp_modules(root)
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
def reshard_on_exit(model: nn.Module) -> Iterator[None]:
    """Reshard the weights that forward passes without a backward pass leave gathered.

    Every rank must enter the context and make the same number of passes.
    """
    try:
        yield
    finally:
        for module in fsdp_modules(model):
            module.reshard()


def full_tensor(value: Any) -> Any:
    """Gather a sharded tensor on the CPU, and return any other value as it is. Every rank must call."""
    return value.full_tensor().cpu() if isinstance(value, DTensor) else value
