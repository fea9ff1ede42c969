"""Tensor parallelism: the linear layers of every decoder layer, and their LoRA factors, split over a group of devices.

For y = W x + s B A x, with x whole on every device of the group:

- colwise: W and B are split by rows, and each device computes its part of y; A is whole.
- rowwise: x arrives in parts, W and A are split by columns to fit, and the sums W x and A x are taken over the group; B is
  whole, and so is y.

Which layer is split how is the model's own plan (transformers' ``base_model_tp_plan``). Embeddings, norms and the head stay
whole. Gradients come out right on every device: whole factors get the same, whole gradient on each.
"""

from __future__ import annotations

import re
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.lora import LoraLayer
from peft.tuners.lora.layer import Linear as LoraLinear
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, distribute_module
from torch.distributed.tensor.parallel import ColwiseParallel, RowwiseParallel, parallelize_module
from torch.nn import functional

from opsd_lightning.models.policy import base_of, is_adapter_key
from opsd_lightning.types import UserError

_SETTING = "trainer.strategy.tensor_parallel_size"

Plan = dict[nn.Module, str]  # decoder layers' linear layers, with an adapter or without, to colwise or rowwise


def plan_of(model: PeftModel, size: int) -> Plan:
    """Which linear layers are split, and how.

    Raises:
        UserError: The model, its adapter or its quantization does not go with a group of this size.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    name = type(base).__name__
    if getattr(base.config, "quantization_config", None) is not None:
        raise UserError(
            f"{_SETTING} is {size}, which does not go with model.policy.quantization: quantized weights cannot be split. "
            "Leave out one of them"
        )
    for heads in ("num_attention_heads", "num_key_value_heads"):
        if (count := getattr(config, heads, None)) is not None and count % size:
            raise UserError(f"{_SETTING} is {size}, which does not divide the {count} {heads} of {name}")
    if getattr(config, "attention_dropout", 0.0):
        raise UserError(f"{_SETTING} is {size}, but {name} has attention dropout, which would drop the same in every part")
    styles: dict[str, str] = getattr(config, "base_model_tp_plan", None) or {}
    plan: Plan = {}
    parts = [*base.base_model.named_modules(), *base.base_model.named_parameters()]  # an entry may name either
    for path, part in parts:
        style = styles.get(re.sub(r"\.\d+(?=\.|$)", ".*", path))
        linear = part.get_base_layer() if isinstance(part, LoraLayer) else part
        if style is None or (style.startswith("replicated") and not isinstance(linear, nn.Linear)):
            continue  # norms of single heads, which are frozen
        if style not in ("colwise", "rowwise") or type(linear) is not nn.Linear:
            raise UserError(
                f"{_SETTING} is {size}, but the plan of {name} splits {path} as {style!r}, which is not supported: leave "
                f"{_SETTING} out"
            )
        features = linear.out_features if style == "colwise" else linear.in_features
        if features % size:
            raise UserError(f"{_SETTING} is {size}, which does not divide the {features} features of {path}")
        plan[part] = style
    if not plan:
        raise UserError(f"{_SETTING} is {size}, but {name} has no plan for it (base_model_tp_plan): leave {_SETTING} out")
    _check_adapters(model)
    return plan


def _check_adapters(model: PeftModel) -> None:
    for path, module in model.named_modules():
        if isinstance(module, LoraLayer) and (type(module) is not LoraLinear or module.lora_variant):
            raise UserError(f"{_SETTING} needs plain LoRA on linear layers, which {path} has not: see model.policy.lora")
    for name, _ in model.named_parameters():
        if is_adapter_key(name) and {"lora_A", "lora_B"}.isdisjoint(name.split(".")):
            raise UserError(f"{_SETTING} needs plain LoRA, and the adapter has {name}: see model.policy.lora.options")


def split(root: nn.Module, plan: Plan, mesh: DeviceMesh) -> None:
    """Split what the plan names below a module, and put all other LoRA factors there on every device, in place.

    Whole factors become tensors of the mesh as well: optimizers and norms take all trainable parameters in one call, which
    works on one mesh only.
    """
    for module in root.modules():
        style = plan.get(module)
        linear = module.get_base_layer() if isinstance(module, LoraLinear) else module
        if isinstance(getattr(linear, "weight", None), DTensor):
            continue  # in a layer that was split before
        if isinstance(module, LoraLinear):
            _split_adapted(module, style, mesh)
        elif style is not None:
            _split_linear(module, style, mesh)


def _split_adapted(layer: LoraLinear, style: str | None, mesh: DeviceMesh) -> None:
    if style is not None:
        _split_linear(layer.base_layer, style, mesh)
    for factors, split_as in ((layer.lora_A, "rowwise"), (layer.lora_B, "colwise")):
        for factor in factors.values():
            if style == split_as:
                _split_linear(factor, style, mesh)
            else:
                distribute_module(factor, mesh, input_fn=_replicated, output_fn=_local)  # type: ignore[arg-type]
    if style == "rowwise":
        for name, dropout in layer.lora_dropout.items():
            if isinstance(dropout, nn.Dropout):
                layer.lora_dropout[name] = _PartOfDropout(dropout.p, mesh)


def _split_linear(linear: nn.Module, style: str, mesh: DeviceMesh) -> None:
    # Every rank holds the whole weights already: each takes its part, and nothing is sent.
    parallelize_module(linear, mesh, ColwiseParallel() if style == "colwise" else RowwiseParallel(), src_data_rank=None)


def _replicated(module: nn.Module, inputs: Any, mesh: DeviceMesh) -> DTensor:
    return DTensor.from_local(inputs[0], mesh, [Replicate()], run_check=False)


def _local(module: nn.Module, output: Any, mesh: DeviceMesh) -> Tensor:
    return output.to_local()


class _PartOfDropout(nn.Module):
    """Dropout of an input that is split over a group: this rank's part of what one device would drop of the whole.

    Args:
        p: Probability of dropping an element.
        mesh: The group, whose random states are the same.
    """

    def __init__(self, p: float, mesh: DeviceMesh) -> None:
        super().__init__()
        self.p, self.size, self.rank = p, mesh.size(), mesh.get_local_rank()

    def forward(self, x: Tensor) -> Tensor:
        if not self.training or not self.p:
            return x
        ones = torch.ones(*x.shape[:-1], x.shape[-1] * self.size, dtype=x.dtype, device=x.device)
        return x * functional.dropout(ones, self.p).chunk(self.size, dim=-1)[self.rank]
