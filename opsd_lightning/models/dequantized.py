"""Base weights of a 4-bit policy as ordinary weights, for samplers that do not read bitsandbytes' format.

bitsandbytes computes with the values of the 4-bit weights, rounded to the data type of the computation. A sampler that loads
these values has the policy's base weights. A sampler that loads the original checkpoint has another model.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor

from opsd_lightning.models.policy import base_of, is_adapter_key


@torch.no_grad()
def dequantized_weights(model: PeftModel, dtype: torch.dtype) -> dict[str, Tensor]:
    """Return the weights of the base model on the CPU, without adapters, with 4-bit weights dequantized.

    Args:
        model: The policy.
        dtype: Data type of the returned weights.

    Returns:
        Weights by their names in the base model without adapters. Tied weights occur once.
    """
    from bitsandbytes.nn.modules import Linear4bit

    base = base_of(model)
    layers = {f"{name}.weight": module for name, module in base.named_modules() if isinstance(module, Linear4bit)}
    persistent = base.state_dict().keys()
    tensors = [*base.named_parameters(), *((name, buffer) for name, buffer in base.named_buffers() if name in persistent)]
    found = {}
    for name, tensor in tensors:
        if not is_adapter_key(name):
            value = dequantized(layers[name]) if name in layers else tensor.detach()
            found[name.replace(".base_layer.", ".")] = value.to("cpu", dtype).contiguous()
    return found


def dequantized(layer: Any) -> Tensor:
    """Return the values of a ``Linear4bit`` layer's weight. Shape [output features, input features]."""
    from bitsandbytes.functional import dequantize_4bit

    return dequantize_4bit(layer.weight.data, layer.weight.quant_state)


def write_dequantized(model: PeftModel, folder: str | Path, dtype: torch.dtype) -> Path:
    """Write the base model with dequantized weights as a model folder, without a tokenizer.

    Args:
        model: The policy.
        folder: Folder to write.
        dtype: Data type of the written weights.
    """
    base = base_of(model)
    config = copy.deepcopy(base.config)
    del config.quantization_config
    config.dtype = dtype
    with torch.device("meta"):
        plain = type(base)(config)
    plain.save_pretrained(str(folder), state_dict=dequantized_weights(model, dtype), safe_serialization=True)
    return Path(folder)
