"""Atomic writes and safe removal of checkpoints: a checkpoint's name always refers to a complete checkpoint."""

from __future__ import annotations

import ctypes
import os
import sys
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from hashlib import sha256
from pathlib import Path
from typing import Any
from zipfile import BadZipFile, ZipFile

import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO, CheckpointIO, TorchCheckpointIO
from lightning.pytorch.strategies import ParallelStrategy, Strategy
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opsd_lightning.checkpoints.file import (
    check_finite,
    check_written,
    load_file,
    local_path,
    unloadable_state_error,
)
from opsd_lightning.checkpoints.shards import is_shard_file, is_shards, read_state
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import fsync_path, is_remote

# File in which Lightning returns the weights of spawned processes. It contains only weights.
_SPAWN_FILE = ".temp.ckpt"
_NAME_LIMIT = 200  # bytes. File systems allow 255, and the temporary name adds a few
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class AtomicCheckpointIO(TorchCheckpointIO):
    """Checkpoint plugin that writes atomically, and loads local files without running code from them.

    A checkpoint is written under a temporary name, flushed to disk and renamed, so that the earlier checkpoint stays until
    the new one is complete. A checkpoint that could not be loaded again is rejected, and the earlier one stays. Remote
    targets, such as ``s3://``, are written as Lightning does.

    `PolicyModule` installs this plugin in its trainer, unless the user gives a ``CheckpointIO``.
    """

    def save_checkpoint(self, checkpoint: dict[str, Any], path: Any, storage_options: Any | None = None) -> None:
        if storage_options is not None or is_remote(path):
            super().save_checkpoint(checkpoint, path, storage_options)
            return
        target = Path(path)
        with replace_checkpoint(target) as temporary, open(temporary, "xb") as file:
            try:
                torch.save(checkpoint, file)
            except Exception as error:
                if type(error).__name__ != "PicklingError" and not isinstance(error, (AttributeError, TypeError)):
                    raise
                raise unloadable_state_error(checkpoint, str(error)[:200]) from error
            file.flush()
            if target.name != _SPAWN_FILE:
                check_written(temporary, checkpoint)
            os.fsync(file.fileno())

    def load_checkpoint(self, path: Any, map_location: Any = None, weights_only: bool | None = None) -> dict[str, Any]:
        check_weights_only(weights_only)
        if isinstance(path, (str, Path)):
            recover(Path(path))
        return load_file(path, lightning=Path(str(path)).name != _SPAWN_FILE)

    def remove_checkpoint(self, path: Any) -> None:
        if is_remote(path):
            super().remove_checkpoint(path)
        else:
            remove_checkpoint(Path(path))


def check_weights_only(weights_only: bool | None) -> None:
    """Check that ``weights_only`` is not False, which would run code from a checkpoint.

    Raises:
        ConfigError: ``weights_only`` is False.
    """
    if weights_only is False:
        raise ConfigError(
            "with False, loading a checkpoint can run arbitrary code",
            "weights_only",
            "Leave it out and allow classes that you trust with torch.serialization.add_safe_globals",
        )


def install(trainer: Trainer) -> None:
    """Make a trainer write and load its checkpoints with `AtomicCheckpointIO`, for any strategy.

    Raises:
        ConfigError: The trainer has an `AsyncCheckpointIO`, with which Lightning removes the earlier checkpoint before the
            new one is written.
    """
    strategy = trainer.strategy
    found: Any = getattr(strategy, "_checkpoint_io", None)
    part = found
    while part is not None:
        if isinstance(part, AsyncCheckpointIO):
            raise ConfigError(
                "AsyncCheckpointIO writes after Lightning has removed the earlier checkpoint, so an interruption loses both",
                "trainer.plugins",
                "Remove AsyncCheckpointIO",
            )
        part = getattr(part, "checkpoint_io", None)
    if found is None or type(found) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif hasattr(found, "checkpoint_io"):
        found.checkpoint_io = AtomicCheckpointIO()  # only has an effect if the wrapper has no plugin yet
    elif isinstance(found, CheckpointIO) and type(found).load_checkpoint is TorchCheckpointIO.load_checkpoint:
        found.load_checkpoint = AtomicCheckpointIO().load_checkpoint  # type: ignore[method-assign]
    if isinstance(strategy, ParallelStrategy) and not hasattr(strategy, "_saves_on_all"):
        strategy._saves_on_all = True  # type: ignore[attr-defined]
        strategy.save_checkpoint = _raise_on_all_ranks(strategy)  # type: ignore[method-assign]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
            callback._link_checkpoint = link_checkpoint  # type: ignore[method-assign]


def _raise_on_all_ranks(strategy: Strategy) -> Callable[..., None]:
    """Wrap a strategy's ``save_checkpoint`` to raise on all ranks if it fails on rank 0, or else the others would hang."""
    save, reference = type(strategy).save_checkpoint, weakref.ref(strategy)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        owner = reference()
        assert owner is not None
        error: Exception | None = None
        try:
            save(owner, checkpoint, filepath, storage_options)
        except Exception as caught:
            error = caught
        problem = owner.broadcast(None if error is None else str(error))
        if error is not None:
            raise error
        if problem is not None:
            raise ConfigError(
                f"rank 0 could not write a checkpoint ({problem})", "trainer.callbacks", "See rank 0's message"
            )

    return save_checkpoint


@contextmanager
def replace_checkpoint(target: Path, folder: bool = False) -> Iterator[Path]:
    """Yield a temporary path for a new checkpoint, which replaces the target at the end of the block.

    Args:
        target: Path of the checkpoint. A symbolic link is replaced itself. Missing parent folders are created.
        folder: If True, create an empty folder at the temporary path.

    Raises:
        ConfigError: The checkpoint cannot be written. The earlier one stays, and the new one is removed.
    """
    temporary = temporary_name(target)
    with wrap_write_errors(target):
        try:
            target.parent.mkdir(parents=True, exist_ok=True)
            _remove_leftovers(target)
            if folder:
                temporary.mkdir()
            yield temporary
            rename_into_place(temporary, target)
        except BaseException:
            with suppress(OSError):
                _remove_parts(temporary)
            raise


@contextmanager
def wrap_write_errors(target: Path) -> Iterator[None]:
    """Convert system errors inside the block to a `ConfigError` that names the checkpoint.

    Raises:
        ConfigError: The checkpoint cannot be written.
    """
    try:
        yield
    except ConfigError:
        raise
    except Exception as error:
        if (cause := _system_error(error)) is None:
            raise
        kept = ". The earlier one is intact" if os.path.lexists(target) else ""
        raise ConfigError(
            f"cannot write the checkpoint {target} ({cause.strerror or cause}){kept}",
            "trainer.default_root_dir",
            "Free disk space or choose a writable folder (also the dirpath of ModelCheckpoint), and resume with ckpt_path",
        ) from error


def temporary_name(target: Path) -> Path:
    """Return the temporary path, next to a checkpoint, under which it is written."""
    return target.with_name(f".{_shortened(target.name)}.partial")


def rename_into_place(temporary: Path, target: Path) -> None:
    """Rename a complete checkpoint to its final name, and remove the one that it replaces."""
    if target.is_dir() and not target.is_symlink() and not is_checkpoint(target):
        raise ConfigError(
            f"{target} is a folder and not a checkpoint",
            "trainer.callbacks",
            "Choose another filename for ModelCheckpoint or move the folder away",
        )
    if os.path.lexists(target) and (target.is_dir() or temporary.is_dir()):
        if not _exchange(temporary, target):  # a single rename cannot replace a folder
            aside = _old_name(target)
            os.rename(target, aside)  # `recover` restores it if the process ends here
            os.rename(temporary, target)
            os.rename(aside, temporary)
        fsync_path(target.parent)
        _remove_parts(temporary)
    else:
        os.replace(temporary, target)
        fsync_path(target.parent)


def recover(path: Path) -> None:
    """Rename a checkpoint back if a process was stopped while it replaced the checkpoint."""
    if not os.path.lexists(path) and is_checkpoint(_old_name(path)):
        with suppress(OSError):  # another rank has renamed it, or the folder is read-only
            os.rename(_old_name(path), path)


def is_checkpoint(path: Path) -> bool:
    """Return True if a path is a checkpoint file or folder, even with incomplete tensors."""
    if path.is_dir():
        return is_shards(path)
    try:
        with ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, BadZipFile, ValueError, NotImplementedError):
        return False


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint: the file, the shards of a folder, or only the link if it is a symbolic link.

    Links to it in the same folder (``save_last: link``) are first redirected to the newest other checkpoint.
    """
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        if not is_checkpoint(path):
            rank_zero_warn(f"{path} is not a checkpoint and is not removed")
            return
        _relink(path)
        _remove_parts(path)


def link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
    """Link ``last.ckpt`` to a checkpoint. Lightning's version first removes any file or folder of that name."""
    if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
        link = Path(linkpath)
        with replace_checkpoint(link) as temporary:
            os.symlink(os.path.relpath(filepath, link.parent), temporary)
    trainer.strategy.barrier()


def _relink(path: Path) -> None:
    """Redirect the links to a checkpoint, which will be removed, to the newest other checkpoint in its folder."""
    with os.scandir(path.parent) as entries:
        links = [Path(entry.path) for entry in entries if entry.is_symlink()]
    links = [link for link in links if os.path.realpath(link) == os.path.realpath(path)]
    if not links:
        return
    others = [other for other in path.parent.glob("*.ckpt") if other != path and not other.is_symlink()]
    newest = max((other for other in others if is_checkpoint(other)), key=lambda other: other.stat().st_mtime, default=None)
    for link in links if newest is not None else []:
        assert newest is not None
        with replace_checkpoint(link) as temporary:
            os.symlink(newest.name, temporary)


def _remove_parts(path: Path) -> None:
    """Remove a checkpoint file, or the shards in a folder and then the folder if it is empty."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for part in path.iterdir():
        if is_shard_file(part.name) and not part.is_dir():
            part.unlink()
    try:
        path.rmdir()
    except OSError:
        rank_zero_warn(f"{path} contains files that are not part of a checkpoint, and is kept")


def _remove_leftovers(target: Path) -> None:
    """Remove the leftovers of interrupted writes to the same name."""
    recover(target)
    for left in (temporary_name(target), _old_name(target)):
        if os.path.lexists(left):
            _remove_parts(left)
        if os.path.lexists(left):
            raise FileExistsError(17, f"{left} is in the way")


def _old_name(target: Path) -> Path:
    return target.with_name(f".{_shortened(target.name)}.old")


def _shortened(name: str) -> str:
    return name if len(os.fsencode(name)) <= _NAME_LIMIT else sha256(os.fsencode(name)).hexdigest()


def _system_error(error: BaseException) -> OSError | None:
    """Return the `OSError` that caused an error of torch, or None."""
    seen: set[int] = set()
    part: BaseException | None = error
    while part is not None and id(part) not in seen and isinstance(part, Exception):
        if isinstance(part, OSError):
            return part
        seen.add(id(part))
        failures = getattr(part, "failures", None) or {}
        part = next((failure[0] for failure in failures.values()), None) or part.__cause__ or part.__context__
    return None


def _exchange(one: Path, other: Path) -> bool:
    """Exchange two names atomically. Return False if the system does not support it."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (os.fsencode(one), os.fsencode(other))
    return rename is not None and rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def read_adapters(path: str | Path) -> dict[str, Tensor]:
    """Read the adapter weights of a checkpoint file or sharded folder, by their names in the module."""
    path = local_path(path)
    if not path.is_dir():
        return load_file(path)["state_dict"]
    found = read_state(path, "state_dict.")
    check_finite(found, path)
    return found
