"""Checks that an export on disk, when read back, equals the policy."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import LoraConfig, PeftModel, get_peft_model, set_peft_model_state_dict
from peft.utils import load_peft_weights
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import AutoModelForCausalLM, PreTrainedModel

from opsd_lightning.models.fingerprint import adapter_settings
from opsd_lightning.models.policy import STUDENT, base_of, evaluating
from opsd_lightning.types import ConfigError

#: Largest accepted difference of logits: the root mean square of the difference, divided by that of the logits. Differences
#: come from rounding of the merged weights and of the activations.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_TOKENS = 32


def probe_tokens(model: Any) -> Tensor:
    """Return token ids spread over the vocabulary, and the tokens that the adapter trains. Shape [1, L]."""
    base = base_of(model)
    vocabulary = int(base.get_input_embeddings().weight.shape[0])
    trained: Any = getattr(getattr(model, "peft_config", {}).get(STUDENT), "trainable_token_indices", None) or []
    chosen = [token for part in trained.values() for token in part] if isinstance(trained, Mapping) else list(trained)
    spread = [place * (vocabulary - 1) // (_TOKENS - 1) for place in range(_TOKENS)]
    return torch.tensor([[*spread, *chosen[:_TOKENS]]])


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Compute the logits of one row of tokens without dropout.

    Args:
        model: A policy or a plain causal language model.
        tokens: Token ids. Shape [1, L].
        weights: Weights to use instead of the model's own, by their names in the model. Defaults to none.

    Returns:
        Logits in float32 on the CPU. Shape [L, V].
    """
    device = base_of(model).get_input_embeddings().weight.device
    inputs = {"input_ids": tokens.to(device), "use_cache": False}
    with evaluating(model):
        if weights is None:
            return model(**inputs).logits[0].float().cpu()
        own = dict(model.named_parameters(remove_duplicate=False))
        given = {name: value.to(own[name]) for name, value in weights.items() if name in own}
        return functional_call(model, given, kwargs=inputs, tie_weights=False).logits[0].float().cpu()


def check_logits(expected: Tensor, found: Tensor, dtype: torch.dtype, setting: str, fix: str) -> None:
    """Compare the logits of the policy with those of its export.

    Raises:
        ConfigError: The difference is larger than the tolerance for ``dtype``.
    """
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if expected.shape != found.shape:
        raise ConfigError(
            f"the logits of the export have shape {tuple(found.shape)}, those of the policy {tuple(expected.shape)}",
            setting,
            fix,
        )
    gap = expected - found
    relative = float(gap.square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12))
    if not relative <= tolerance:
        raise ConfigError(
            f"the logits of the export differ from the policy's by up to {float(gap.abs().max()):.3g} (relative difference "
            f"{relative:.2g}, where rounding to {dtype} gives at most {tolerance:g})",
            setting,
            fix,
        )


def check_adapter(model: PeftModel, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Load an adapter's folder and compare its settings, its weights and, without sharding, its logits with the policy.

    Args:
        model: The policy.
        folder: The peft folder.
        state_dict: The weights that were written, by their names in ``model``. Defaults to the current weights.

    Raises:
        ConfigError: The folder contains another adapter.
    """
    setting, fix = f"export to {folder.parent}", "Use the checkpoint, which is not affected, and report the LoRA options"
    config = LoraConfig.from_pretrained(str(folder))
    theirs, ours = adapter_settings(config), adapter_settings(model.peft_config[STUDENT])
    if differ := [name for name in ours if theirs.get(name) != ours[name]]:
        differences = ", ".join(f"{name} {ours[name]} -> {theirs.get(name)}" for name in differ)
        raise ConfigError(f"the adapter's settings on disk are not the policy's ({differences})", setting, fix)
    read = _read_back(model, config, folder)
    written = model.state_dict() if state_dict is None else state_dict
    wrong = [name for name, value in read.items() if name not in written or not _equal(value, written[name])]
    lost = [name for name in written if STUDENT in name.split(".") and name not in read]
    if wrong or lost:
        name = (wrong + lost)[0]
        raise ConfigError(f"{len(wrong + lost)} adapter weights on disk are not the policy's, such as {name}", setting, fix)
    if not any(isinstance(parameter, DTensor) for parameter in model.parameters()):
        tokens = probe_tokens(model)
        expected = logits_of(model, tokens, {name: written[name] for name in read})
        check_logits(expected, logits_of(model, tokens, read), torch.float32, setting, fix)


def check_model(
    folder: Path,
    expected: Tensor,
    tokens: Tensor,
    like: PreTrainedModel,
    setting: str,
    fix: str,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Load a model folder and compare its logits with the policy's.

    Args:
        folder: Folder of a model without adapters.
        expected: Logits of the policy. Shape [L, V].
        tokens: Token ids. Shape [1, L].
        like: A model of the same class and dtype.
        setting: Name of the export, for errors.
        fix: Remedy, for errors.
        weights: Weights that must be bit-identical in the folder, by their names in the model. Defaults to none.

    Raises:
        ConfigError: The folder contains another model.
    """
    remote = type(like).__module__.startswith("transformers_modules.")  # the policy was allowed to run this code
    loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=like.dtype, trust_remote_code=remote)
    own = loaded.state_dict()
    if wrong := [name for name, value in (weights or {}).items() if name not in own or not _equal(own[name], value)]:
        raise ConfigError(f"{len(wrong)} weights on disk are not the policy's, such as {wrong[0]}", setting, fix)
    # Weights that were compared bit by bit leave only differences between devices.
    dtype = like.dtype if weights is None else torch.bfloat16
    check_logits(expected, logits_of(loaded, tokens), dtype, setting, fix)


def _read_back(model: PeftModel, config: LoraConfig, folder: Path) -> dict[str, Tensor]:
    """Return a folder's weights by their names in the policy, loaded by peft into a copy of the policy without memory."""
    base = base_of(model)
    with warnings.catch_warnings(), torch.device("meta"):
        warnings.simplefilter("ignore")
        skeleton = get_peft_model(type(base)(copy.deepcopy(base.config)), config)
    made: dict[int, nn.Parameter] = {}
    names = [n for n, _ in skeleton.named_parameters(remove_duplicate=False) if STUDENT in n.split(".")]
    for name in names:
        path, _, leaf = name.rpartition(".")
        owner = skeleton.get_submodule(path)
        old = owner._parameters[leaf]
        assert old is not None
        if id(old) not in made:  # keep parameters shared that two modules share
            made[id(old)] = nn.Parameter(torch.full(old.shape, torch.nan, dtype=old.dtype, device="cpu"), False)
        owner._parameters[leaf] = made[id(old)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(skeleton, load_peft_weights(str(folder), device="cpu"))
    found = dict(skeleton.named_parameters(remove_duplicate=False))
    return {name: found[name].detach() for name in names}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.detach().to(one.device, one.dtype))
