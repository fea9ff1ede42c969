"""How the policy computes for the time of a rollout: the adapter merged, products of few rows on packed weights.

Both leave every weight as it was, bit by bit, and change results by float32 rounding alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from opsd_lightning.models.policy import base_of

# Products of at most so many rows are decoding's, and are taken to the packed weights; smaller layers gain nothing.
_THIN_ROWS, _WORTH_PACKING = 64, 2**16


@contextmanager
def merged_adapter(model: PeftModel) -> Iterator[None]:
    """The active adapter merged into the base weights inside, where that is exact; the very same weights after.

    Exact are float32 linear layers that nothing else uses, neither quantized nor sharded. Otherwise nothing happens.
    """
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    head = base_of(model).get_output_embeddings()
    bases = [layer.get_base_layer() for layer in layers]
    if not layers or not all(
        not layer.disable_adapters
        and layer is not head
        and isinstance(base, (nn.Linear, Conv1D))
        and type(base.weight.data) is torch.Tensor
        and base.weight.dtype == torch.float32
        and not any(getattr(layer, "lora_bias", {}).values())  # peft would merge it into the base's own bias
        for layer, base in zip(layers, bases, strict=True)
    ):
        yield
        return
    # peft's safe merge puts a new tensor in the place of the old one, which `unmerge` would only restore up to rounding.
    saved = [base.weight.data for base in bases]
    try:
        model.merge_adapter(safe_merge=True)
        yield
    finally:
        for layer, base, weight in zip(layers, bases, saved, strict=True):
            base.weight.data = weight
            layer.merged_adapters.clear()  # type: ignore[operator, union-attr]


@contextmanager
def packed_linears(model: nn.Module) -> Iterator[None]:
    """On a CPU: products of few rows with float32 linear layers by oneDNN, on copies of the weights packed for it.

    Decoding is bound by them, and up to half again as fast this way (benchmarks/attempts.py). For inference alone: weights
    that change inside are not seen. Takes a copy of the weights for the time. Layers on other devices, quantized or sharded
    ones are left as they are.
    """
    layers = [
        layer
        for layer in model.modules()
        if type(layer) is nn.Linear
        and torch.backends.mkldnn.is_available()
        and type(layer.weight.data) is torch.Tensor
        and layer.weight.device.type == "cpu"
        and layer.weight.dtype == torch.float32
        and layer.weight.numel() >= _WORTH_PACKING
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
    if x.numel() > _THIN_ROWS * x.shape[-1] or x.dtype != torch.float32 or torch.is_autocast_enabled("cpu"):
        return functional.linear(x, layer.weight, layer.bias)
    return torch.ops.mkldnn._linear_pointwise(x, packed, layer.bias, "none", [], "")
