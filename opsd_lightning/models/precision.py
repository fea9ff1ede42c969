"""Checks of the trainer's precision and of the base weights' dtype."""

from __future__ import annotations

from typing import Any

import torch

from opsd_lightning.models.policy import ModelSettings, Policy
from opsd_lightning.types import ConfigError


def precision_problem(name: str | int | None) -> ConfigError | None:
    """Return an error if a value of ``trainer.precision`` is not supported, else None."""
    name = {"16": "16-mixed", "bf16": "bf16-mixed"}.get(str(name), str(name))
    reasons = {
        "16-mixed": "scales the loss, but a training step clips and logs unscaled gradients",
        "16-true": "computes in float16, in which gradients underflow",
        "bf16-true": "trains weights in bfloat16, in which updates of small learning rates are lost to rounding",
    }
    reason = "computes in float8" if name.startswith("transformer-engine") else reasons.get(name)
    if reason is None:
        return None
    fix = "Set it to bf16-mixed, or to 32-true if bfloat16 is slow. The dtype of the base weights is model.policy.dtype"
    return ConfigError(f"{name} {reason}", "trainer.precision", fix)


def check_dtypes(policy: Policy, precision: str, model: torch.nn.Module | None = None) -> None:
    """Refuse float16 computations in the backward pass: gradients underflow in float16 because the loss is not scaled.

    Args:
        policy: The settings of the model.
        precision: The trainer's precision.
        model: The loaded model. Defaults to None: the settings and the checkpoint's configuration are checked instead.

    Raises:
        ConfigError: Gradients would be computed in float16.
    """
    quantization: Any = policy.quantization
    if getattr(quantization, "load_in_4bit", False) and quantization.bnb_4bit_compute_dtype == torch.float16:
        raise ConfigError(
            "4-bit layers would compute in float16, in which gradients underflow",
            f"{policy.setting}.quantization.bnb_4bit_compute_dtype",
            "Set it to bfloat16 or float32",
        )
    if model is not None:
        half = any(parameter.dtype == torch.float16 for parameter in model.parameters())
    else:
        half = stored_dtype(policy) == torch.float16
    if not half:
        return
    if policy.trains_all:
        raise ConfigError(
            "full fine-tuning would train float16 weights, which overflow and lose small updates to rounding",
            f"{policy.setting}.dtype",
            "Set it to float32",
        )
    if precision == "32-true":
        raise ConfigError(
            f"the base weights are float16{' in the checkpoint' if policy.dtype == 'auto' else ''}, in which gradients "
            "underflow under trainer.precision 32-true",
            f"{policy.setting}.dtype",
            "Set it to float32 or bfloat16, or trainer.precision to bf16-mixed",
        )


def stored_dtype(policy: ModelSettings) -> torch.dtype | None:
    """Return the dtype of the base weights from the settings or the checkpoint, or None if neither names it."""
    if policy.dtype != "auto":
        found: Any = policy.dtype
    else:
        config = policy.load_config()
        found = getattr(config, "dtype", None) or getattr(config.get_text_config(), "dtype", None)
    return getattr(torch, found, None) if isinstance(found, str) else found
