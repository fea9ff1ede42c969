"""A copy of the policy in one precision, with which rollouts on a GPU launch few kernels for each token.

Decoding on a GPU is bound by kernel launches. Under autocast, a policy in memory for training launches thousands for each
token: casts of weights and activations, unfused norms, and casts of the float32 adapter. The copy computes in bfloat16
without autocast:

- Weights are cast once. Weights that have the precision already are shared, not copied.
- 4-bit layers are dequantized once, to the values that bitsandbytes computes with, or shared as they are to save memory.
- The adapter is cast once and stays apart from the base weights: in bfloat16, a sum would round its update away at small
  learning rates (`tests/rollouts/test_rollout_copy.py`).
- An RMS norm is one kernel.

The copy has the classes of the original model, so that ``generate`` works on it. It is made anew for each rollout, from the
weights and the adapter that are active then, and is never trained.
"""

from __future__ import annotations

import sys
from collections import Counter
from collections.abc import Sequence
from functools import lru_cache
from types import MethodType
from typing import Any, TypeVar

import torch
from peft import PeftModel
from peft.tuners.lora import Linear as LoraLinear
from torch import Tensor, nn
from torch.nn import functional
from transformers.pytorch_utils import Conv1D

from opsd_lightning.models.policy import base_of, is_adapter_key
from opsd_lightning.models.sharding import fsdp_modules

Module = TypeVar("Module", bound=nn.Module)


def can_copy(model: PeftModel) -> bool:
    """Return True if all weights are on one device and not sharded, and no module's ``forward`` has been replaced."""
    base = base_of(model)
    one_device = len({parameter.device for parameter in base.parameters()}) == 1
    return one_device and not fsdp_modules(base) and not any("forward" in vars(module) for module in base.modules())


def copied_bytes(model: PeftModel, dtype: torch.dtype, dequantize: bool) -> int:
    """Return the bytes that `rollout_copy` allocates."""
    base = base_of(model)
    casts = _casts(base, dtype)
    numbers = sum(parameter.numel() for parameter in casts.values())
    if dequantize:
        layers = {id(module): module for module in base.modules() if _is_4bit(module)}
        numbers += sum(layer.weight.quant_state.shape.numel() for layer in layers.values())
    return numbers * dtype.itemsize


@torch.no_grad()
def rollout_copy(model: PeftModel, dtype: torch.dtype = torch.bfloat16, dequantize: bool = True) -> Any:
    """Copy the causal language model inside a policy, with the adapters that are active.

    Args:
        model: The policy.
        dtype: Precision of the copy.
        dequantize: If True, 4-bit layers become ordinary ones. If False, the copy shares them.

    Returns:
        A model of the same class as ``base_of(model)``, without gradients. Compute with it outside of autocast.
    """
    base = base_of(model)
    copier = _Copier(base, dtype, dequantize)
    copied, own = copier.module(base), copier.own()
    del copier  # which would keep weights that are joined below
    _join_products(copied, own)
    return copied


class _Copier:
    """Copies modules recursively. A module or parameter that occurs twice (tied weights) is copied once."""

    def __init__(self, base: Any, dtype: torch.dtype, dequantize: bool) -> None:
        self.dtype, self.dequantize = dtype, dequantize
        self.casts = _casts(base, dtype)
        self.modules: dict[int, nn.Module] = {}
        self.parameters: dict[int, nn.Parameter] = {}
        self.uses: Counter[int] = Counter()  # of the parameters that the copy makes, by identity

    def module(self, module: nn.Module) -> nn.Module:
        if id(module) not in self.modules:
            self.modules[id(module)] = self._copy(module)
        return self.modules[id(module)]

    def parameter(self, parameter: nn.Parameter) -> nn.Parameter:
        if id(parameter) not in self.parameters:
            value = parameter.detach()
            if id(parameter) in self.casts:
                value = value.to(self.dtype)
            self.parameters[id(parameter)] = nn.Parameter(value, requires_grad=False)
        found = self.parameters[id(parameter)]
        if id(parameter) in self.casts:
            self.uses[id(found)] += 1
        return found

    def own(self) -> set[int]:
        """Return the identities of the weights that the copy does not share, and that are not tied."""
        return {key for key, count in self.uses.items() if count == 1}

    def _copy(self, module: nn.Module) -> nn.Module:
        kind: Any = type(module)
        if _is_4bit(module):
            return self._linear(module) if self.dequantize else module
        if _is_8bit(module):
            return module
        if _is_plain_lora(module):
            return self._adapted(module)
        if is_rms_norm(kind):
            return _with_hooks_of(module, RMSNorm(self.parameter(module.weight), module.variance_epsilon))  # type: ignore[arg-type]
        copied = kind.__new__(kind)
        values = dict(vars(module))
        for name, value in values.items():
            if name.endswith("_hooks") and isinstance(value, dict):
                values[name] = value.copy()
            elif isinstance(value, MethodType) and value.__self__ is module:
                values[name] = MethodType(value.__func__, copied)
        values["training"] = False
        values["_parameters"] = {
            name: None if parameter is None else self.parameter(parameter) for name, parameter in module._parameters.items()
        }
        values["_buffers"] = dict(module._buffers)
        values["_modules"] = {name: None if child is None else self.module(child) for name, child in module._modules.items()}
        vars(copied).update(values)
        return copied

    def _linear(self, layer: Any) -> nn.Linear:
        """Return an ordinary linear layer with the dequantized weights of a 4-bit layer."""
        from bitsandbytes.functional import dequantize_4bit  # slow to import, and needed for quantized weights alone

        weight = dequantize_4bit(layer.weight.data, layer.weight.quant_state).to(self.dtype)
        linear = _linear_of(weight, None if layer.bias is None else layer.bias.to(self.dtype))
        self.uses[id(linear.weight)] += 1
        return _with_hooks_of(layer, linear)

    def _adapted(self, layer: Any) -> nn.Module:
        """Return a layer with its active adapters, which are added up and cast once."""
        names = [] if layer.disable_adapters else [name for name in layer.active_adapters if name in layer.lora_A]
        inner = self.module(layer.get_base_layer())
        if isinstance(inner, Conv1D):  # GPT-2's linear layer, whose weight is transposed
            inner = _linear_of(inner.weight.t(), inner.bias)
        if not names:
            return inner if inner is layer.get_base_layer() else _with_hooks_of(layer, inner)
        # The scale goes into B in float32, so that each factor is rounded once.
        down = torch.cat([layer.lora_A[name].weight.float() for name in names])
        up = torch.cat([layer.lora_B[name].weight.float() * layer.scaling[name] for name in names], dim=1)
        biases = [layer.lora_B[n].bias.float() * layer.scaling[n] for n in names if layer.lora_B[n].bias is not None]
        bias = torch.stack(biases).sum(0).to(self.dtype) if biases else None
        return _with_hooks_of(layer, AdaptedLinear(inner, down.to(self.dtype), up.to(self.dtype), bias))


class RMSNorm(nn.Module):
    """Root-mean-square norm in one kernel.

    Args:
        weight: Scale of each feature. Shape [D].
        eps: Number that is added to the mean square.
    """

    def __init__(self, weight: nn.Parameter, eps: float) -> None:
        super().__init__()
        self.weight, self.eps, self.training = weight, eps, False

    def forward(self, hidden_states: Tensor) -> Tensor:
        return functional.rms_norm(hidden_states, self.weight.shape, self.weight, self.eps)


class AdaptedLinear(nn.Module):
    """Linear layer with a low-rank adapter in the same precision: y = W x + B A x.

    Args:
        base: The layer without the adapter.
        down: A. Shape [R, D].
        up: B times the adapter's scale. Shape [E, R].
        bias: Bias of the adapter, times its scale. Shape [E]. Defaults to none.
    """

    def __init__(self, base: nn.Module, down: Tensor, up: Tensor, bias: Tensor | None = None) -> None:
        super().__init__()
        self.base, self.down, self.up, self.bias, self.training = base, down, up, bias, False
        self.product, self.place = Product([self], fused=False), 0

    @property
    def weight(self) -> Tensor:
        """W. Shape [E, D]."""
        return self.base.weight  # type: ignore[return-value]

    def forward(self, x: Tensor) -> Tensor:
        y, low = self.product(x, self.place)
        y = self.base(x) if y is None else y
        y = y if self.bias is None else y + self.bias
        y.view(-1, y.shape[-1]).addmm_(low.flatten(0, -2), self.up.t())
        return y


class Product:
    """One product for the adapted layers that read the same tensor, such as queries, keys and values.

    Args:
        layers: The layers, in the order in which they are called.
        fused: If True, the product has the weights of the layers too, W x and A x in one. They are then views of one tensor.
    """

    def __init__(self, layers: Sequence[AdaptedLinear], fused: bool) -> None:
        down = [layer.down for layer in layers]
        bases: list[Any] = [layer.base for layer in layers] if fused else []
        self.sizes = [len(part) for part in (*(base.weight for base in bases), *down)]
        self.bias: Tensor | None = None
        if fused:
            self.weight = torch.cat([*(base.weight for base in bases), *down])
            biases = [base.weight.new_zeros(len(base.weight)) if base.bias is None else base.bias for base in bases]
            if any(base.bias is not None for base in bases):
                self.bias = torch.cat([*biases, *(part.new_zeros(len(part)) for part in down)])
        else:
            self.weight = down[0] if len(down) == 1 else torch.cat(down)
        views = self.weight.split(self.sizes)
        for base, view in zip(bases, views[: len(bases)], strict=True):
            base.weight = nn.Parameter(view, requires_grad=False)
        for layer, view in zip(layers, views[len(bases) :], strict=True):
            layer.down = view
        self.count, self.fused = len(layers), fused
        self._input: Tensor | None = None
        self._parts: tuple[Tensor, ...] = ()

    def __call__(self, x: Tensor, place: int) -> tuple[Tensor | None, Tensor]:
        """Return W x (None if not fused) and A x of the layer at ``place``. Compute them if ``x`` is another tensor."""
        if self._input is not x:
            self._input, self._parts = x, functional.linear(x, self.weight, self.bias).split(self.sizes, dim=-1)
        base, low = self._parts[place] if self.fused else None, self._parts[place - self.count]
        if place == self.count - 1:
            self._input, self._parts = None, ()
        return base, low


# Layers of one module that transformers' architectures call with the same tensor, in this order. The order does not change
# the results: a product is computed anew for another tensor.
_SAME_INPUT = (("q_proj", "k_proj", "v_proj"), ("gate_proj", "up_proj"))


def _join_products(copied: nn.Module, own: set[int]) -> None:
    """Compute the products of adapted layers together where they read the same tensor.

    Args:
        copied: The copy.
        own: Identities of the weights that belong to the copy alone.
    """
    grouped: set[int] = set()
    for module in copied.modules():
        for names in _SAME_INPUT:
            layers = [getattr(module, name, None) for name in names]
            if all(isinstance(layer, AdaptedLinear) for layer in layers):
                _join(layers, own)  # type: ignore[arg-type]
                grouped |= set(map(id, layers))
    for module in copied.modules():
        if isinstance(module, AdaptedLinear) and id(module) not in grouped:
            _join([module], own)


def _join(layers: list[AdaptedLinear], own: set[int]) -> None:
    if len({layer.down.shape[1] for layer in layers}) > 1:
        return
    fused = all(type(layer.base) is nn.Linear and id(layer.base.weight) in own for layer in layers)
    fused = fused and not any(layer.base._forward_hooks or layer.base._forward_pre_hooks for layer in layers)
    if fused or len(layers) > 1:
        product = Product(layers, fused)
        for place, layer in enumerate(layers):
            layer.product, layer.place = product, place


@lru_cache
def is_rms_norm(kind: Any) -> bool:
    """Return True if a class computes x / sqrt(mean(x^2) + eps) * weight. Some norms of this name compute weight + 1."""
    if not kind.__name__.endswith("RMSNorm") or kind is nn.RMSNorm:
        return False
    try:
        norm = kind(4, eps=0.5).float()
        weight, eps = norm.weight, norm.variance_epsilon
        if [name for name, _ in norm.named_parameters()] != ["weight"] or not isinstance(eps, float):
            return False
        with torch.no_grad():
            weight.copy_(torch.tensor([0.5, -1.0, 2.0, 3.0], dtype=torch.float32))  # type: ignore[operator]
            x = torch.tensor([[1.0, 2.0, -3.0, 0.5], [0.1, 0.0, 0.2, 5.0]], dtype=torch.float32)
            return torch.allclose(norm(x), functional.rms_norm(x, (4,), weight, eps), rtol=1e-5)  # type: ignore[arg-type]
    except (TypeError, AttributeError, RuntimeError):  # another signature
        return False


def _is_4bit(module: Any) -> bool:
    return _is_of(module, "bitsandbytes.nn.modules", "Linear4bit")


def _is_8bit(module: Any) -> bool:
    return _is_of(module, "bitsandbytes.nn.modules", "Linear8bitLt")


def _is_of(module: Any, library: str, name: str) -> bool:
    """Return True for an object of a library's class. If the library is not imported, no such object exists."""
    imported = sys.modules.get(library)
    return imported is not None and isinstance(module, getattr(imported, name))


def _is_plain_lora(module: Any) -> bool:
    """Return True for a LoRA on a linear layer, without variants such as DoRA, which run in peft's own code."""
    quantized = any(_is_of(module, "peft.tuners.lora.bnb", name) for name in ("Linear4bit", "Linear8bitLt"))
    if not (type(module) is LoraLinear or quantized) or module.merged:
        return False
    inner = module.get_base_layer()
    linear = type(inner) is nn.Linear or isinstance(inner, Conv1D) or _is_4bit(inner) or _is_8bit(inner)
    return linear and not any(name in module.lora_variant for name in module.active_adapters)


def _linear_of(weight: Tensor, bias: Tensor | None) -> nn.Linear:
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None, device="meta")
    layer.weight = nn.Parameter(weight.detach(), requires_grad=False)
    if bias is not None:
        layer.bias = nn.Parameter(bias.detach(), requires_grad=False)
    layer.training = False
    return layer


def _with_hooks_of(module: nn.Module, replacement: Module) -> Module:
    """Copy a module's forward hooks to the module that replaces it."""
    for name in ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs"):
        getattr(replacement, name).update(getattr(module, name))
    return replacement


def _casts(base: Any, dtype: torch.dtype) -> dict[int, nn.Parameter]:
    """Return the parameters that the copy has in another precision than the model, by identity."""
    kept = [name for name in (getattr(base, "_keep_in_fp32_modules_strict", None) or [])]
    found = {}
    for name, parameter in base.named_parameters():
        if parameter.dtype not in (torch.float32, torch.float16) or parameter.dtype == dtype:
            continue
        # A checkpoint loaded in this precision keeps some weights in float32 on purpose.
        deliberate = base.dtype == dtype or any(part in name.split(".") for part in kept)
        if is_adapter_key(name) or not deliberate:
            found[id(parameter)] = parameter
    return found
