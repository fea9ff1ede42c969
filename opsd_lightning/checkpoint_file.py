"""A checkpoint's file and its weights, checked before they are loaded."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any
from zipfile import is_zipfile

import torch

from opsd_lightning.policy import STUDENT, TEACHER, Policy
from opsd_lightning.types import ConfigError

_ENTRIES = ("pytorch-lightning_version", "state_dict")


def check_file(path: str | Path, plain: bool = True) -> None:
    """Check that a file is a whole checkpoint of Lightning's. The tensors themselves are not read.

    Args:
        path: An existing file.
        plain: Refuse objects other than tensors and plain values, as Lightning does by default.

    Raises:
        ConfigError: It is not a checkpoint, was cut off, or holds other objects.
    """
    fix = "Give a checkpoint that ModelCheckpoint wrote"
    if not is_zipfile(path):
        raise ConfigError(f"{path} is not a checkpoint, or was cut off", "ckpt_path", fix)
    try:
        found = torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # each part of the format fails in its own way
        if (kind := _refused_class(error)) is not None:
            if not plain:
                return
            problem = f"{path} holds objects other than tensors and plain values, and is not loaded ({kind})"
            fix = "Leave them out of the state that callbacks and modules save"
            raise ConfigError(problem, "ckpt_path", fix) from error
        problem = f"{path} is not a checkpoint, or was cut off ({type(error).__name__})"
        raise ConfigError(problem, "ckpt_path", fix) from error
    missing = [name for name in _ENTRIES if not isinstance(found, Mapping) or name not in found]
    if missing:
        raise ConfigError(f"{path} is not a Lightning checkpoint: it has no {' and no '.join(missing)}", "ckpt_path", fix)
    if not isinstance(found["state_dict"], Mapping):
        raise ConfigError(f"{path} is not a Lightning checkpoint: its state_dict is no mapping", "ckpt_path", fix)


def unfit_weights(theirs: Mapping[str, Any], ours: Mapping[str, Any], policy: Policy) -> dict[str, str]:
    """Compare the names and shapes of a checkpoint's weights with a run's.

    Args:
        theirs: The checkpoint's weights.
        ours: The run's.
        policy: The run's policy.

    Returns:
        Each setting for which the weights cannot be loaded, with an example; nothing where they can be.
    """
    found: dict[str, str] = {}
    for key in [*theirs, *(key for key in ours if key not in theirs)]:
        if key not in theirs or key not in ours:
            where = "not in the checkpoint" if key not in theirs else "not in this run"
            found.setdefault(_setting_of(key, theirs, ours, policy), f"{key} is {where}")
        elif theirs[key].shape != ours[key].shape:
            shapes = f"{list(theirs[key].shape)} -> {list(ours[key].shape)}"
            found.setdefault(_setting_of_shape(key, theirs[key].shape, ours[key].shape, policy), f"{key} {shapes}")
    return found


def _setting_of(key: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], policy: Policy) -> str:
    parts = key.split(".")
    if TEACHER in parts and _has(TEACHER, theirs) != _has(TEACHER, ours):
        return "model.teacher or model.policy.adapter"  # both keep a second adapter
    if _has(STUDENT, theirs) != _has(STUDENT, ours):
        return "model.policy.lora"
    if policy.adapter is not None:
        return "model.policy.adapter"
    if "modules_to_save" in parts:
        return "model.policy.lora.options.modules_to_save"
    return "model.policy.model" if {STUDENT, TEACHER}.isdisjoint(parts) else "model.policy.lora.target_modules"


def _setting_of_shape(key: str, theirs: torch.Size, ours: torch.Size, policy: Policy) -> str:
    rank = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}
    place = next((rank[part] for part in key.split(".") if part in rank), None)
    if place is None or len(theirs) != len(ours) or theirs[place] == ours[place]:
        return "model.policy.model"
    return "model.policy.lora.r" if policy.adapter is None else "model.policy.adapter"


def _has(adapter: str, weights: Mapping[str, Any]) -> bool:
    return any(adapter in key.split(".") for key in weights)


def _refused_class(error: Exception) -> str | None:
    """Return the name of the class that a safe load refused, or None where it failed for another reason."""
    words = str(error).partition("Unsupported global: GLOBAL ")[2].split()
    other = "Weights only load failed" in str(error)
    return words[0] if words else type(error).__name__ if other else None
