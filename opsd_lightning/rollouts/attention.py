"""Attention of rollouts on a GPU: PyTorch's, with one additive mask for all layers of a token.

Rollouts are padded on the left. transformers' flash attention then removes the padding in every layer, and waits for the
device each time. Its ``sdpa`` waits once a token to see if there is padding, and every layer converts the boolean mask.
"""

from __future__ import annotations

import inspect
import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import lru_cache
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import AttentionInterface, AttentionMaskInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import sdpa_mask

from opsd_lightning.models.policy import base_of
from opsd_lightning.models.scoring import uses_flash_attention

_NAME = "sdpa_additive"
# PyTorch's memory-efficient kernel copies a mask whose rows are not multiples of this, in every layer.
_ALIGNMENT = 16


def additive_mask(*args: Any, dtype: torch.dtype = torch.float32, **kwargs: Any) -> Tensor:
    """Return transformers' boolean mask as 0 and a very small number, without reading values on the host.

    The small number is finite in ``dtype`` and in bfloat16, to which autocast rounds the mask. -inf would make a row of
    padding, which sees nothing else, NaN in kernels without a special case for it.

    Takes the arguments of the functions in transformers' ``AttentionMaskInterface``.
    """
    kwargs |= {"allow_is_causal_skip": False, "allow_is_bidirectional_skip": False}
    allowed = sdpa_mask(*args, **kwargs)
    assert allowed is not None
    width = allowed.shape[-1]
    allowed = functional.pad(allowed, (0, -width % _ALIGNMENT))
    zero = torch.zeros((), dtype=dtype, device=allowed.device)
    return torch.where(allowed, zero, max(torch.finfo(dtype).min, torch.finfo(torch.bfloat16).min))[..., :width]


AttentionInterface.register(_NAME, sdpa_attention_forward)
AttentionMaskInterface.register(_NAME, additive_mask)


@contextmanager
def rollout_attention(model: PeftModel) -> Iterator[None]:
    """Use PyTorch's attention inside the context where the model has it or flash attention, and restore the setting on exit.

    A model stays as it is if its attention needs more than PyTorch's offers, such as a soft cap or attention sinks.
    """
    base = base_of(model)
    name = _implementation(base)
    if name is None:
        yield
        return
    configs = {id(config): config for module in base.modules() if (config := getattr(module, "config", None)) is not None}
    before = {key: getattr(config, "_attn_implementation_internal", None) for key, config in configs.items()}
    try:
        for key, config in configs.items():
            if before[key] is not None:
                config._attn_implementation_internal = name
        yield
    finally:
        for key, config in configs.items():
            if before[key] is not None:
                config._attn_implementation_internal = before[key]


def _implementation(base: Any) -> str | None:
    """Return the name of the attention for rollouts, or None to keep the model's own."""
    config = base.config.get_text_config()
    flash = uses_flash_attention(base)
    if not flash and config._attn_implementation != "sdpa":
        return None
    own = type(base).__module__.startswith("transformers.")  # other code may choose its attention when it is built
    capped = getattr(config, "attn_logit_softcapping", None) is not None
    if not own or not base._supports_sdpa or capped:
        return None
    if _reads_the_name(type(base).__module__):
        return "sdpa" if flash else None
    return _NAME


@lru_cache
def _reads_the_name(module: str) -> bool:
    """Return True if an architecture computes something else for attention of another name than ``sdpa``."""
    source = inspect.getsource(sys.modules[module])
    return re.search(r"_attn_implementation\s*(==|!=|in\b|not in\b)", source) is not None
