"""Faster computation during a rollout: merged adapters, and packed weights for small matrix products on CPUs.

Both restore every weight bit by bit and change results only by float32 rounding.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from opsd_lightning.models.policy import base_of, device_of

# Largest number of rows for packed weights (decoding has few rows), and smallest number of weights worth packing.
_MAX_ROWS, _MIN_WEIGHTS = 64, 2**16


@contextmanager
def merged_adapter(model: PeftModel) -> Iterator[None]:
    """Merge the active adapter into the base weights inside the context, and restore the same weights on exit.

    The adapter is merged only if that is exact: all adapted layers are linear layers in float32, not quantized, not sharded,
    and not the head, and compute in float32. Under autocast the sum would be rounded, and small updates lost. Otherwise the
    context has no effect.
    """
    layers = _mergeable(model)
    bases = [layer.get_base_layer() for layer in layers]
    if not layers:
        yield
        return
    # peft's safe merge replaces the weight tensors. Its `unmerge` would restore them only up to rounding.
    saved = [base.weight.data for base in bases]
    try:
        model.merge_adapter(safe_merge=True)
        yield
    finally:
        for layer, base, weight in zip(layers, bases, saved, strict=True):
            base.weight.data = weight
            layer.merged_adapters.clear()


def merged_bytes(model: PeftModel) -> int:
    """Return the bytes of the weights that `merged_adapter` makes."""
    return sum(layer.get_base_layer().weight.nbytes for layer in _mergeable(model))


def _mergeable(model: PeftModel) -> list[Any]:
    """Return the adapted layers if all of them can be merged exactly, else an empty list."""
    layers: list[Any] = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    head, rounded = base_of(model).get_output_embeddings(), torch.is_autocast_enabled(device_of(model).type)
    exact = not rounded and all(
        not layer.disable_adapters
        and layer is not head
        and isinstance(base := layer.get_base_layer(), (nn.Linear, Conv1D))
        and type(base.weight.data) is torch.Tensor
        and base.weight.dtype == torch.float32
        and not any(getattr(layer, "lora_bias", {}).values())  # peft would merge it into the base layer's bias in place
        for layer in layers
    )
    return layers if exact else []


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """Compute products of few rows with oneDNN on packed copies of the weights, inside the context, on a CPU.

    Decoding is up to 1.5 times as fast (benchmarks/attempts.py). The context is for inference only: changes of the weights
    inside have no effect. It needs memory for a copy of the weights. Only float32 linear layers on a CPU that are neither
    quantized nor sharded are packed.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and torch.backends.mkldnn.is_available()
        and type(layer.weight.data) is torch.Tensor
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= _MIN_WEIGHTS
        and "forward" not in vars(layer)
    ]
    for layer in layers:
        packed = torch.ops.mkldnn._reorder_linear_weight(layer.weight.detach(), 16)
        layer.forward = partial(_packed_forward, layer, packed)  # type: ignore[method-assign]
    try:
        yield
    finally:
        for layer in layers:
            del layer.forward  # type: ignore[method-assign]


def _packed_forward(layer: nn.Linear, packed: Tensor, x: Tensor) -> Tensor:
    if x.numel() > _MAX_ROWS * x.shape[-1] or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")
