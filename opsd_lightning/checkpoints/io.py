"""Checkpoints on disk: under their name there is a whole one at every instant, and only checkpoints are removed."""

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
    is_remote,
    load_file,
    local_path,
    unloadable_state_error,
)
from opsd_lightning.checkpoints.shards import is_shard_file, is_shards, read_state
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import fsync_path

# Lightning brings the weights of spawned processes back in a file of this name, which has no other entries.
_SPAWN_FILE = ".temp.ckpt"
_NAME_LIMIT = 200  # bytes; file systems allow 255, some of which the temporary name needs
_AT_FDCWD, _RENAME_EXCHANGE = -100, 2


class AtomicCheckpointIO(TorchCheckpointIO):
    """Writes a checkpoint beside its target, waits for the disk and renames it; loads local files without running code.

    The file under the target's name is whole at every instant: the earlier checkpoint until the new one is on disk. Every
    `PolicyModule` gives it to its trainer; a ``CheckpointIO`` of a user's own takes its place. What could not be loaded
    again is refused, and the earlier checkpoint stays. Remote targets, such as ``s3://``, are written as Lightning does; a
    `ModelCheckpoint` with a remote folder is refused before training.
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
    """Refuse to load a checkpoint together with the code that it may hold.

    Raises:
        ConfigError: It is false.
    """
    if weights_only is False:
        raise ConfigError(
            "with false a checkpoint could run any code as it is loaded",
            "weights_only",
            "Leave it out, and allow classes that you trust with torch.serialization.add_safe_globals",
        )


def install(trainer: Trainer) -> None:
    """Have a trainer write and load its checkpoints by `AtomicCheckpointIO`, whatever its strategy.

    Raises:
        ConfigError: It has an `AsyncCheckpointIO`, by which Lightning removes the earlier checkpoint before the new one is
            written.
    """
    strategy = trainer.strategy
    found: Any = getattr(strategy, "_checkpoint_io", None)
    part = found
    while part is not None:
        if isinstance(part, AsyncCheckpointIO):
            raise ConfigError(
                "AsyncCheckpointIO writes after Lightning has removed the earlier checkpoint, and a stop would lose both",
                "trainer.plugins",
                "Leave it out",
            )
        part = getattr(part, "checkpoint_io", None)
    if found is None or type(found) is TorchCheckpointIO:
        strategy.checkpoint_io = AtomicCheckpointIO()
    elif hasattr(found, "checkpoint_io"):
        found.checkpoint_io = AtomicCheckpointIO()  # has an effect on a wrapper of nothing alone
    elif isinstance(found, CheckpointIO) and type(found).load_checkpoint is TorchCheckpointIO.load_checkpoint:
        found.load_checkpoint = AtomicCheckpointIO().load_checkpoint  # type: ignore[method-assign]
    if isinstance(strategy, ParallelStrategy) and not hasattr(strategy, "_saves_on_all"):
        strategy._saves_on_all = True  # type: ignore[attr-defined]
        strategy.save_checkpoint = _raise_on_all_ranks(strategy)  # type: ignore[method-assign]
    for callback in trainer.checkpoint_callbacks:
        if isinstance(callback, ModelCheckpoint) and callback.save_last == "link":
            callback._link_checkpoint = link_checkpoint  # type: ignore[method-assign]


def _raise_on_all_ranks(strategy: Strategy) -> Callable[..., None]:
    """A strategy's ``save_checkpoint`` that raises on every rank what it raises on one: the others would wait for ever."""
    save, whose = type(strategy).save_checkpoint, weakref.ref(strategy)

    def save_checkpoint(checkpoint: dict[str, Any], filepath: Any, storage_options: Any | None = None) -> None:
        ours = whose()
        assert ours is not None
        error: Exception | None = None
        try:
            save(ours, checkpoint, filepath, storage_options)
        except Exception as caught:
            error = caught
        told = ours.broadcast(None if error is None else str(error))
        if error is not None:
            raise error
        if told is not None:
            raise ConfigError(f"rank 0 could not write a checkpoint ({told})", "trainer.callbacks", "See rank 0's message")

    return save_checkpoint


@contextmanager
def replace_checkpoint(target: Path, folder: bool = False) -> Iterator[Path]:
    """A name beside a checkpoint's, under which a new one is written, which then takes its place.

    Args:
        target: The checkpoint. Where it is a link, the link is replaced. Folders above it are made.
        folder: Make an empty folder under the name.

    Raises:
        ConfigError: It cannot be written. The earlier checkpoint stays, and nothing of the new one.
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
    """Inside, errors of the system are raised as ones that name the checkpoint, what stays, and the remedy.

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
        stays = "; the earlier one is whole" if os.path.lexists(target) else ""
        raise ConfigError(
            f"cannot write the checkpoint {target} ({cause.strerror or cause}){stays}",
            "trainer.default_root_dir or a ModelCheckpoint's dirpath",
            "Make room or choose a folder that can be written, and go on from the last checkpoint (ckpt_path)",
        ) from error


def temporary_name(target: Path) -> Path:
    """The name beside a checkpoint's under which it is written."""
    return target.with_name(f".{_shortened(target.name)}.partial")


def rename_into_place(temporary: Path, target: Path) -> None:
    """Give a whole checkpoint its name, and remove the one that had it."""
    if target.is_dir() and not target.is_symlink() and not is_checkpoint(target):
        raise ConfigError(
            f"{target} is a folder, and no checkpoint",
            "a ModelCheckpoint's filename",
            "Choose another name, or move it away",
        )
    if os.path.lexists(target) and (target.is_dir() or temporary.is_dir()):
        if not _exchange(temporary, target):  # a folder cannot be replaced by one rename
            aside = _old_name(target)
            os.rename(target, aside)  # found by `recover`, should this be the end
            os.rename(temporary, target)
            os.rename(aside, temporary)
        fsync_path(target.parent)
        _remove_parts(temporary)
    else:
        os.replace(temporary, target)
        fsync_path(target.parent)


def recover(path: Path) -> None:
    """Bring a checkpoint back to its name from the one under which a stopped process had put it aside, if it did."""
    if not os.path.lexists(path) and is_checkpoint(_old_name(path)):
        with suppress(OSError):  # another rank was faster, or the folder is read-only
            os.rename(_old_name(path), path)


def is_checkpoint(path: Path) -> bool:
    """Tell whether a path is a checkpoint's file or folder, whole or cut off within its tensors."""
    if path.is_dir():
        return is_shards(path)
    try:
        with ZipFile(path) as archive:
            return any(name.endswith("/data.pkl") for name in archive.namelist())
    except (OSError, BadZipFile, ValueError, NotImplementedError):
        return False


def remove_checkpoint(path: Path) -> None:
    """Remove a checkpoint, and nothing else: of a folder its shards, of a link the link.

    Links beside it that lead to it are led to the newest other checkpoint first (``save_last: link``).
    """
    if path.is_symlink():
        path.unlink()
    elif path.exists():
        if not is_checkpoint(path):
            rank_zero_warn(f"{path} is no checkpoint, and is not removed")
            return
        _relink(path)
        _remove_parts(path)


def link_checkpoint(trainer: Trainer, filepath: str, linkpath: str) -> None:
    """Point ``last.ckpt`` at a checkpoint, in place of Lightning's own, which removes whatever has that name first."""
    if trainer.is_global_zero and os.path.abspath(filepath) != os.path.abspath(linkpath):
        link = Path(linkpath)
        with replace_checkpoint(link) as temporary:
            os.symlink(os.path.relpath(filepath, link.parent), temporary)
    trainer.strategy.barrier()


def _relink(path: Path) -> None:
    """Lead links to a checkpoint that is about to be removed to the newest other one beside it."""
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
    """Remove a checkpoint's file, or its parts out of a folder; other files in it stay, and then so does the folder."""
    if not path.is_dir() or path.is_symlink():
        path.unlink(missing_ok=True)
        return
    for part in path.iterdir():
        if is_shard_file(part.name) and not part.is_dir():
            part.unlink()
    try:
        path.rmdir()
    except OSError:
        rank_zero_warn(f"{path} holds files that are not a checkpoint's, and is kept")


def _remove_leftovers(target: Path) -> None:
    """Remove what stopped processes left of earlier writes to the same name."""
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
    """The system's error behind one of torch's, if there is one."""
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
    """Exchange two names in one step, where the system can."""
    if not sys.platform.startswith("linux"):
        return False
    rename = getattr(ctypes.CDLL(None, use_errno=True), "renameat2", None)
    names = (os.fsencode(one), os.fsencode(other))
    return rename is not None and rename(_AT_FDCWD, names[0], _AT_FDCWD, names[1], _RENAME_EXCHANGE) == 0


def read_adapters(path: str | Path) -> dict[str, Tensor]:
    """The adapters' weights of a checkpoint, by their names in the module: of one file or a folder of shards."""
    path = local_path(path)
    if not path.is_dir():
        return load_file(path)["state_dict"]
    found = read_state(path, "state_dict.")
    check_finite(found, path)
    return found
