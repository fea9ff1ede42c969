"""Check and load checkpoint files. Only local files are loaded, and no code from them is run."""

from __future__ import annotations

import io
import os
import stat
import warnings
from argparse import ArgumentError
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any
from zipfile import ZIP_STORED, BadZipFile, ZipFile, is_zipfile

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from packaging.version import InvalidVersion, Version
from torch import Tensor

from opsd_lightning.checkpoints.settings import check_settings, walk_settings
from opsd_lightning.checkpoints.values import plain_values
from opsd_lightning.models.policy import STUDENT, TEACHER, Policy
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.files import SCHEME, is_remote

# The two settings that add a second adapter to a checkpoint.
SECOND_ADAPTER = "model.teacher or model.policy.adapter"
_ENTRIES = ("pytorch-lightning_version", "state_dict")
_FIX = "Give a checkpoint that ModelCheckpoint wrote"
#: Entries of a checkpoint that Lightning and this package read, and their types if they are present.
_TYPES: dict[str, tuple[type, ...]] = {
    "state_dict": (Mapping,),
    "pytorch-lightning_version": (str,),
    "epoch": (int,),
    "global_step": (int,),
    "loops": (Mapping,),
    "callbacks": (Mapping,),
    "optimizer_states": (list,),
    "lr_schedulers": (list,),
    "hyper_parameters": (Mapping,),
    "datamodule_hyper_parameters": (Mapping,),
    "hparams_name": (str,),
    "opsd_made_with": (Mapping,),
    "opsd_tokens_generated": (int,),
}
#: Optimizer state of torch that has the shape of its parameter.
_MOMENTS = {"exp_avg", "exp_avg_sq", "exp_inf", "max_exp_avg_sq", "momentum_buffer", "square_avg", "grad_avg", "sum"}
#: Counters of Lightning's loops.
_COUNTS = {"ready", "started", "processed", "completed", "total_ready", "total_completed"}


def local_path(path: Any, setting: str = "ckpt_path") -> Path:
    """Return the path of an existing local file or folder.

    Args:
        path: The path as the user gave it.
        setting: Setting that holds the path, for errors.

    Raises:
        ConfigError: The value is not a path, is a URL, does not exist, or is neither a file nor a folder.
    """
    if not isinstance(path, (str, os.PathLike)) or not isinstance(os.fspath(path), str):
        raise ConfigError(f"expected the path of a checkpoint, got a {type(path).__name__}", setting, "Give a path")
    if is_remote(path):
        scheme = os.fspath(path).partition(":")[0]
        raise ConfigError(
            f"a {scheme} address was given, but checkpoints are loaded from local files only",
            setting,
            "Download the file, compare its checksum with a trusted one, and give its path",
        )
    try:
        mode = os.stat(path).st_mode
    except FileNotFoundError:
        raise ConfigError(f"{path} does not exist", setting, _FIX) from None
    except (OSError, ValueError) as error:  # a loop of links, a null byte
        raise ConfigError(f"{path!r} cannot be read ({getattr(error, 'strerror', None) or error})", setting, _FIX) from None
    if not (stat.S_ISREG(mode) or stat.S_ISDIR(mode)):
        raise ConfigError(f"{path} is neither a file nor a folder", setting, _FIX)
    return Path(path)


def check_file(path: str | Path) -> None:
    """Check that a file is a complete Lightning checkpoint. The tensor data are not read.

    Args:
        path: The path as the user gave it.

    Raises:
        ConfigError: The file is remote, not a checkpoint or truncated, or contains objects other than tensors and plain
            values.
    """
    _check_contents(_read(path, mmap=True), path)


def check_written(path: Path, checkpoint: Mapping[str, Any]) -> None:
    """Check that a new checkpoint can be loaded again. The tensor data are not read.

    Args:
        path: File of the checkpoint.
        checkpoint: The checkpoint that was written.

    Raises:
        ConfigError: The checkpoint contains objects that cannot be loaded safely. The error names their callback.
    """
    if (kind := _load_failure(path)) is not None:
        raise unloadable_state_error(checkpoint, kind)


def unloadable_state_error(checkpoint: Mapping[str, Any], kind: str) -> ConfigError:
    """Return the error for state that cannot be loaded again, with the name of the callback that it belongs to.

    Args:
        checkpoint: The checkpoint.
        kind: Class that cannot be loaded, or the message of the error.
    """
    parts = {f"the state of the callback {name}": state for name, state in checkpoint.get("callbacks", {}).items()}
    parts |= {f"its {name}": value for name, value in checkpoint.items() if name not in ("callbacks", "state_dict")}
    where = next((name for name, value in parts.items() if not _is_loadable(value)), "it")
    return ConfigError(
        f"the checkpoint could not be loaded again: {where} contains objects other than tensors and plain values ({kind}). "
        "Earlier checkpoints are intact",
        "trainer.callbacks",
        "Save plain values, or allow classes that you trust with torch.serialization.add_safe_globals",
    )


def _is_loadable(value: Any) -> bool:
    file = io.BytesIO()
    try:
        torch.save(value, file)
    except Exception:  # a class may raise any error while it is saved
        return False
    file.seek(0)
    return _load_failure(file) is None


def _load_failure(file: Path | IO[bytes]) -> str | None:
    """Return the class or error at which a safe load fails, or None."""
    try:
        with warnings.catch_warnings(), plain_values() as finished:
            warnings.simplefilter("ignore")
            finished(torch.load(file, map_location="cpu", weights_only=True, mmap=isinstance(file, Path)))
    except (OSError, MemoryError, RuntimeError) as error:  # not caused by the contents of the file
        return "it is nested too deeply" if isinstance(error, RecursionError) else None
    except Exception as error:  # each part of the format raises its own errors
        return _refused_class(error) or f"{type(error).__name__}: {error}"[:200]
    return None


def load_file(path: str | Path, lightning: bool = True, weights: dict[str, Tensor] | None = None) -> dict[str, Any]:
    """Load a checkpoint file onto the CPU without running code from it.

    Args:
        path: The path as the user gave it.
        lightning: If True, check that the entries of a Lightning checkpoint are present and valid.
        weights: The ``state_dict`` of a file without one. Defaults to the file's own.

    Raises:
        ConfigError: See `check_file`. Also raised if weights are not finite.
    """
    found = _read(path)
    if weights is not None and isinstance(found, dict):
        found["state_dict"] = weights
    if lightning:
        _check_contents(found, path)
        check_finite(found["state_dict"], path)
        found.pop("opsd_compared", None)  # only this process may set this mark
    elif not isinstance(found, dict):
        raise ConfigError(f"{path} is not a checkpoint: it contains a {type(found).__name__}", "ckpt_path", _FIX)
    return found


@contextmanager
def open_checked(path: Any, kind: type, keys: Sequence[str], given: Mapping[str, Any]) -> Iterator[IO[bytes]]:
    """Check a checkpoint and its settings, and open the file. The block builds a module or data module from it.

    Args:
        path: The path as the user gave it.
        kind: Class of the module or data module.
        keys: Entries of the checkpoint that contain settings.
        given: Settings that the caller overrides.

    Raises:
        ConfigError: See `check_file` and `check_settings`. Also raised if the block fails to build the object.
    """
    found = _read(path, mmap=True)
    _check_contents(found, path)
    for key in keys:
        check_settings(found.get(key, {}), given, kind)
    del found
    with open(path, "rb") as file:
        try:
            with plain_values():
                yield file
        except (UserError, MisconfigurationException, torch.OutOfMemoryError):
            raise
        except (ArgumentError, ArithmeticError, AssertionError, AttributeError, ImportError, LookupError, RuntimeError,
                TypeError, ValueError) as error:  # fmt: skip
            words = " ".join(str(error).split())[:200]
            problem = f"cannot build {kind.__name__} from the settings in {path} ({type(error).__name__}: {words})"
            fix = "Give a checkpoint of a command-line run or give the parts as arguments"
            raise ConfigError(problem, "checkpoint_path", fix) from error


@contextmanager
def wrap_restore_errors(path: Any) -> Iterator[None]:
    """Convert errors while a checkpoint is restored inside the block to a `ConfigError` that names the checkpoint.

    Raises:
        ConfigError: The checkpoint cannot be restored.
    """
    try:
        yield
    except (UserError, MisconfigurationException, torch.OutOfMemoryError):
        raise
    except (ArithmeticError, AssertionError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        words = " ".join(str(error).split())[:200]
        problem = f"{path or 'the checkpoint'} cannot be restored ({type(error).__name__}: {words})"
        raise ConfigError(problem, "ckpt_path", "Give a checkpoint that a run of this configuration wrote") from error


def check_finite(weights: Mapping[str, Tensor], path: str | Path) -> None:
    """Check that all weights are finite.

    Raises:
        ConfigError: A weight is not finite. The error names the first one.
    """
    for name, value in weights.items():
        if value.is_floating_point() and not bool(torch.isfinite(value.to(torch.float32)).all()):
            raise ConfigError(f"{path} contains weights that are not finite, such as {name}", "ckpt_path", _FIX)


def check_callbacks(checkpoint: Mapping[str, Any]) -> None:
    """Check that the file names in the state of `ModelCheckpoint` stay in their folder: Lightning removes these files.

    Remote names are removed from the state, so that Lightning neither loads nor removes remote files.

    Args:
        checkpoint: The loaded checkpoint. Modified in place.

    Raises:
        ConfigError: A name contains ``..`` below a folder or is not a file name.
    """
    for state in checkpoint.get("callbacks", {}).values():
        if not isinstance(state, dict) or "best_model_path" not in state:
            continue
        best = state.get("best_k_models", {})
        keys = [key for key in ("best_model_path", "kth_best_model_path", "last_model_path") if key in state]
        for name in [*(state[key] for key in keys), *(best if isinstance(best, Mapping) else [best])]:
            parts = Path(name).parts if isinstance(name, str) else ("", "..")
            leaves = ".." in [part for place, part in enumerate(parts) if set(parts[:place]) - {".."}]
            if leaves or "\0" in name:
                problem = f"the checkpoint names {name!r} as an earlier checkpoint of its run"
                raise ConfigError(problem, "ckpt_path", "Do not use this file")
        state |= {key: "" for key in keys if SCHEME.match(state[key])}
        if best:
            state["best_k_models"] = {name: score for name, score in best.items() if not SCHEME.match(name)}


def check_no_hparams(path: Any) -> None:
    """Check that no settings file is given with a checkpoint: its YAML could call any function.

    Raises:
        ConfigError: A path is given.
    """
    if path is not None:
        raise ConfigError("settings are not read from a separate file", "hparams_file", "Give the settings as arguments")


def _read(path: Any, mmap: bool = False) -> Any:
    found = local_path(path)
    if found.is_dir():
        raise ConfigError(f"{path} is a folder, not a checkpoint file", "ckpt_path", _FIX)
    _check_archive(found)
    try:
        with warnings.catch_warnings(), plain_values() as finished:
            warnings.simplefilter("ignore")  # about other serialization protocols, which are rejected below
            return finished(torch.load(found, map_location="cpu", weights_only=True, mmap=mmap))
    except Exception as error:  # each part of the format raises its own errors
        if (kind := _refused_class(error)) is not None:
            problem = f"{path} contains objects other than tensors and plain values ({kind}) and is not loaded"
            fix = (
                "Remove them from the state that callbacks and modules save, or allow classes that you trust with "
                "torch.serialization.add_safe_globals"
            )
            raise ConfigError(problem, "ckpt_path", fix) from error
        problem = f"{path} is not a checkpoint or is truncated ({type(error).__name__})"
        raise ConfigError(problem, "ckpt_path", _FIX) from error


def _check_archive(path: Path) -> None:
    """Check that a file is an uncompressed archive, so that loading it needs no more memory than its size."""
    try:
        whole = is_zipfile(path)
        size, records = path.stat().st_size, []
        if whole:
            with ZipFile(path) as archive:
                records = archive.infolist()
    except (OSError, BadZipFile, ValueError, NotImplementedError) as error:
        raise ConfigError(f"{path} is not a checkpoint or is truncated ({error})", "ckpt_path", _FIX) from error
    if not whole:
        raise ConfigError(f"{path} is not a checkpoint or is truncated", "ckpt_path", _FIX)
    if any(record.compress_type != ZIP_STORED for record in records) or sum(record.file_size for record in records) > size:
        raise ConfigError(f"{path} is compressed, which torch checkpoints are not", "ckpt_path", _FIX)
    if size > os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE"):
        raise ConfigError(f"{path} is larger than this machine's memory", "ckpt_path", "Load it on a larger machine")


def _check_contents(found: Any, path: Any) -> None:
    """Check the types of all entries that Lightning and this package read."""

    def refuse(problem: str) -> ConfigError:
        return ConfigError(f"{path} is not a Lightning checkpoint: {problem}", "ckpt_path", _FIX)

    missing = [name for name in _ENTRIES if not isinstance(found, Mapping) or name not in found]
    if missing:
        raise refuse(f"it has no {' and no '.join(missing)} entry")
    for name, kinds in _TYPES.items():
        if name in found and (not isinstance(found[name], kinds) or isinstance(found[name], bool)):
            raise refuse(f"its {name} is a {type(found[name]).__name__}")
    if any(found.get(name, 0) < 0 for name in ("epoch", "global_step", "opsd_tokens_generated")):
        raise refuse("a counter is negative")
    try:
        old = Version(found["pytorch-lightning_version"]) < Version("2.0")
    except InvalidVersion:
        raise refuse("it has no valid Lightning version") from None
    if old:
        raise refuse(f"it was written by Lightning {found['pytorch-lightning_version']}, and 2.0 or later is supported")
    for name, value in found["state_dict"].items():
        if not isinstance(name, str) or not _is_plain(value):
            raise refuse(f"{name!r} in its state_dict is not a plain tensor")
    for name, value in walk_settings(found.get("loops", {})):
        if name in _COUNTS and not (type(value) is int and 0 <= value < 2**62):
            raise refuse(f"a counter of its loops is {value!r}")
    for state in found.get("optimizer_states", []):
        _check_optimizer(state, refuse)
    if any(not isinstance(state, Mapping) for state in found.get("lr_schedulers", [])):
        raise refuse("the state of a learning-rate scheduler is not a mapping")


def _check_optimizer(state: Any, refuse: Any) -> None:
    if not isinstance(state, Mapping) or not isinstance(state.get("state"), Mapping):
        raise refuse("the state of its optimizer is not a mapping")
    groups = state.get("param_groups")
    if not isinstance(groups, list) or any(
        not isinstance(g, Mapping) or not isinstance(g.get("params"), list) for g in groups
    ):
        raise refuse("its optimizer has no parameter groups")
    for values in state["state"].values():
        if not isinstance(values, Mapping):
            raise refuse("the optimizer state of a parameter is not a mapping")
        if any(isinstance(value, Tensor) and not _is_plain(value) for value in values.values()):
            raise refuse("its optimizer contains tensors that are larger than their storage")
        # SGD without momentum saves None.
        moments = [
            value for name, value in values.items() if name in _MOMENTS and not (name == "momentum_buffer" and value is None)
        ]
        if not all(isinstance(value, Tensor) for value in moments) or len({value.shape for value in moments}) > 1:
            raise refuse("moments of one parameter differ in shape")


def _is_plain(value: Any) -> bool:
    """Return True for a dense tensor whose storage holds every element."""
    if not isinstance(value, Tensor) or value.layout != torch.strided or value.is_quantized or value.device.type == "meta":
        return False
    return value.numel() * value.element_size() <= value.untyped_storage().nbytes()


def mismatched_weights(saved: Mapping[str, Any], current: Mapping[str, Any], policy: Policy) -> dict[str, str]:
    """Compare the names and shapes of the weights of a checkpoint and a run.

    Args:
        saved: Weights of the checkpoint.
        current: Weights of the run.
        policy: Policy of the run.

    Returns:
        An example of a mismatch for each setting that causes one. Empty if the weights can be loaded.
    """
    found: dict[str, str] = {}
    for key in [*saved, *(key for key in current if key not in saved)]:
        if key not in saved or key not in current:
            where = "not in the checkpoint" if key not in saved else "not in this run"
            found.setdefault(_setting_of(key, saved, current, policy), f"{key} is {where}")
        elif saved[key].shape != current[key].shape:
            shapes = f"{list(saved[key].shape)} -> {list(current[key].shape)}"
            found.setdefault(_setting_of_shape(key, saved[key].shape, current[key].shape, policy), f"{key} {shapes}")
    return found


def _setting_of(key: str, saved: Mapping[str, Any], current: Mapping[str, Any], policy: Policy) -> str:
    parts = key.split(".")
    if TEACHER in parts and _has_adapter(TEACHER, saved) != _has_adapter(TEACHER, current):
        return SECOND_ADAPTER
    if _has_adapter(STUDENT, saved) != _has_adapter(STUDENT, current):
        return "model.policy.lora"
    if policy.adapter is not None:
        return "model.policy.adapter"
    if "modules_to_save" in parts:
        return "model.policy.lora.options.modules_to_save"
    return "model.policy.model" if {STUDENT, TEACHER}.isdisjoint(parts) else "model.policy.lora.target_modules"


def _setting_of_shape(key: str, saved: torch.Size, current: torch.Size, policy: Policy) -> str:
    rank = {"lora_A": 0, "lora_embedding_A": 0, "lora_B": 1, "lora_embedding_B": 1}
    place = next((rank[part] for part in key.split(".") if part in rank), None)
    if place is None or len(saved) != len(current) or saved[place] == current[place]:
        return "model.policy.model"
    return "model.policy.lora.r" if policy.adapter is None else "model.policy.adapter"


def _has_adapter(adapter: str, weights: Mapping[str, Any]) -> bool:
    return any(adapter in key.split(".") for key in weights)


def _refused_class(error: Exception) -> str | None:
    """Return the name of the class that a safe load rejected, or None if it failed for another reason."""
    words = str(error).partition("Unsupported global: GLOBAL ")[2].split()
    other = "Weights only load failed" in str(error)
    return words[0] if words else type(error).__name__ if other else None
