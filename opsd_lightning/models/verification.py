"""Comparison of an export on disk with the policy that it was written from."""

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

#: Root mean square of the logits' difference over that of the logits themselves: merging rounds every weight once, and a
#: pass rounds every activation.
TOLERANCE = {torch.float32: 1e-4, torch.float16: 1e-2, torch.bfloat16: 1e-1}
_TOKENS = 32


def probe_tokens(model: Any) -> Tensor:
    """One row of token ids, spread over the vocabulary, with the tokens that the adapter trains. Shape [1, L]."""
    base = base_of(model)
    vocabulary = int(base.get_input_embeddings().weight.shape[0])
    trained: Any = getattr(getattr(model, "peft_config", {}).get(STUDENT), "trainable_token_indices", None) or []
    chosen = [token for part in trained.values() for token in part] if isinstance(trained, Mapping) else list(trained)
    spread = [place * (vocabulary - 1) // (_TOKENS - 1) for place in range(_TOKENS)]
    return torch.tensor([[*spread, *chosen[:_TOKENS]]])


@torch.no_grad()
def logits_of(model: Any, tokens: Tensor, weights: Mapping[str, Tensor] | None = None) -> Tensor:
    """Logits of `probe_tokens` without dropout, in float32 on the CPU. Shape [L, V].

    Args:
        model: A policy or a plain causal language model.
        tokens: Shape [1, L].
        weights: Values in place of the model's own, by their names in it.
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
    """Compare logits of the policy with those of its export.

    Raises:
        ConfigError: They differ by more than rounding to ``dtype`` explains.
    """
    tolerance = TOLERANCE.get(dtype, TOLERANCE[torch.bfloat16])
    if expected.shape != found.shape:
        raise ConfigError(
            f"the export gives logits of shape {tuple(found.shape)}, the policy {tuple(expected.shape)}", setting, fix
        )
    gap = expected - found
    relative = float(gap.square().mean().sqrt() / expected.square().mean().sqrt().clamp(min=1e-12))
    if not relative <= tolerance:
        raise ConfigError(
            f"the export is another model: its logits differ from the policy's by up to {float(gap.abs().max()):.3g} "
            f"({relative:.2g} of their size; rounding to {dtype} explains {tolerance:g})",
            setting,
            fix,
        )


def check_adapter(model: PeftModel, folder: Path, state_dict: Mapping[str, Tensor] | None = None) -> None:
    """Read an adapter's folder back as peft does, and compare it with the policy: settings, every weight, and logits where
    the policy is not sharded.

    Args:
        model: The policy.
        folder: The peft folder.
        state_dict: The weights that were written, by their names in ``model``. Defaults to its present ones.

    Raises:
        ConfigError: The folder holds another adapter.
    """
    setting, fix = f"export to {folder.parent}", "Keep the checkpoint, which is not affected, and report the LoRA options"
    config = LoraConfig.from_pretrained(str(folder))
    theirs, ours = adapter_settings(config), adapter_settings(model.peft_config[STUDENT])
    if differ := [name for name in ours if theirs.get(name) != ours[name]]:
        told = ", ".join(f"{name} {ours[name]} -> {theirs.get(name)}" for name in differ)
        raise ConfigError(f"the adapter's settings on disk are not the policy's ({told})", setting, fix)
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
    """Load a model's folder and compare its logits with the policy's.

    Args:
        folder: A plain model's folder.
        expected: Logits of the policy. Shape [L, V].
        tokens: Shape [1, L].
        like: A model of the dtype to load, whose code the folder may need.
        setting: Names the export in a message.
        fix: Remedy for a message.
        weights: Values that the folder must hold to the last bit, by their names in the model. Defaults to none.

    Raises:
        ConfigError: It is another model.
    """
    remote = type(like).__module__.startswith("transformers_modules.")  # code that the policy was allowed to run
    loaded = AutoModelForCausalLM.from_pretrained(str(folder), dtype=like.dtype, trust_remote_code=remote)
    own = loaded.state_dict()
    if wrong := [name for name, value in (weights or {}).items() if name not in own or not _equal(own[name], value)]:
        raise ConfigError(f"{len(wrong)} weights on disk are not the policy's, such as {wrong[0]}", setting, fix)
    # Devices round differently, where weights that are the same leave no doubt.
    dtype = like.dtype if weights is None else torch.bfloat16
    check_logits(expected, logits_of(loaded, tokens), dtype, setting, fix)


def _read_back(model: PeftModel, config: LoraConfig, folder: Path) -> dict[str, Tensor]:
    """A folder's weights by their names in the policy, placed by peft into a copy of it whose base has no memory."""
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
        if id(old) not in made:  # a parameter that two modules share stays shared
            made[id(old)] = nn.Parameter(torch.full(old.shape, torch.nan, dtype=old.dtype, device="cpu"), False)
        owner._parameters[leaf] = made[id(old)]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        set_peft_model_state_dict(skeleton, load_peft_weights(str(folder), device="cpu"))
    found = dict(skeleton.named_parameters(remove_duplicate=False))
    return {name: found[name].detach() for name in names}


def _equal(one: Tensor, other: Tensor) -> bool:
    return one.shape == other.shape and torch.equal(one, other.detach().to(one.device, one.dtype))
