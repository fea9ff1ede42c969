"""The trained adapter on disk: as a peft folder, or merged into a full model. Written whole or not at all."""

from __future__ import annotations

import copy
import dataclasses
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from bitsandbytes.functional import dequantize_4bit
from bitsandbytes.nn.modules import Linear4bit
from peft import PeftConfig, PeftModel, get_peft_model_state_dict
from safetensors.torch import save_file
from torch import Tensor
from transformers import GenerationConfig

from opsd_lightning.policy import STUDENT, LoRA, Policy
from opsd_lightning.strategies import whole
from opsd_lightning.types import UserError


def write_adapter(model: PeftModel, folder: str | Path, state_dict: dict[str, Tensor] | None = None) -> Path:
    """Write the student's adapter as a peft folder, whole or not at all; in full fine-tuning the whole model.

    Args:
        model: The policy.
        folder: Where ``PeftModel.from_pretrained`` (the model's own ``from_pretrained``) shall find it. Replaced if it
            exists.
        state_dict: The policy's adapter weights to write, by their names in ``model``; its present ones unless given.
    """
    folder = Path(folder)
    adapter: Any = {"selected_adapters": [STUDENT]} if isinstance(model, PeftModel) else {}
    with _replacing(folder) as temporary:
        model.save_pretrained(str(temporary), state_dict=state_dict, safe_serialization=True, **adapter)
    return folder


def adapter_weights(model: PeftModel, adapter: str = STUDENT) -> dict[str, Tensor]:
    """An adapter's present weights, whole and on the CPU, by their names in a peft folder.

    Args:
        model: The policy. Where it is sharded, every rank must ask.
        adapter: Which of its adapters.
    """
    own = {name: whole(value) for name, value in model.state_dict().items() if adapter in name.split(".")}
    # Embeddings are no part of it; peft would else ask the hub, at every call, whether their size is the base model's.
    weights = get_peft_model_state_dict(model, state_dict=own, adapter_name=adapter, save_embedding_layers=False)
    return {name: value.detach().cpu().contiguous() for name, value in weights.items()}


def write_weights(config: PeftConfig, weights: dict[str, Tensor], folder: str | Path) -> Path:
    """Write `adapter_weights` and their configuration as a peft folder, whole or not at all."""
    config = copy.copy(config)
    config.inference_mode = True
    with _replacing(Path(folder)) as temporary:
        save_file(weights, temporary / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(str(temporary))
    return Path(folder)


def merge_adapter(policy: Policy | str, adapter: str | Path, folder: str | Path, dequantize: bool = False) -> Path:
    """Write the base model with an adapter merged into its weights, as an ordinary model folder with its tokenizer.

    Args:
        policy: The policy that the adapter was trained with, or its base model: a Hugging Face id, a folder or a ``.gguf``
            file.
        adapter: The adapter's peft folder or Hugging Face id.
        folder: Where the merged model goes. Replaced if it exists.
        dequantize: Merge a policy that was trained in 4 bits into the weights it was trained on, rounded to 4 bits and
            back, rather than into the original ones: it then computes what it computed in training.

    Raises:
        UserError: ``dequantize`` of a policy that is not quantized to 4 bits.
    """
    policy = Policy(policy) if isinstance(policy, str) else policy
    policy = dataclasses.replace(policy, adapter=str(adapter), lora=LoRA())
    if dequantize and (policy.quantization is None or not policy.quantization.load_in_4bit):
        raise UserError("merge_adapter: dequantize needs the policy that was trained with 4-bit quantization")
    generation = _generation_config(policy)
    model = dataclasses.replace(policy, quantization=None).build()
    if dequantize:
        _round_to_four_bits(model, policy)
    merged = model.merge_and_unload()
    if generation is not None:
        merged.generation_config = generation
    with _replacing(Path(folder)) as temporary:
        merged.save_pretrained(temporary, safe_serialization=True)
        policy.load_tokenizer().save_pretrained(temporary)
    return Path(folder)


@torch.no_grad()
def _round_to_four_bits(model: PeftModel, policy: Policy) -> None:
    """Put what 4 bits leave of the base weights in their place."""
    layers = dict(model.named_modules())
    for name, module in policy.build().named_modules():
        if isinstance(module, Linear4bit):
            rounded = dequantize_4bit(module.weight.data, module.weight.quant_state)  # type: ignore[attr-defined]
            layers[name].weight.copy_(rounded)  # type: ignore[union-attr, operator]


def _generation_config(policy: Policy) -> GenerationConfig | None:
    """The checkpoint's own, which `Policy.build` puts aside."""
    if policy.model.endswith(".gguf"):
        return None
    try:
        return GenerationConfig.from_pretrained(policy.model, revision=policy.revision or "main")
    except OSError:
        return None


@contextmanager
def _replacing(folder: Path) -> Iterator[Path]:
    """A temporary sibling of a folder, renamed to it at the end: readers never see a half-written one."""
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        temporary.rename(folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)
