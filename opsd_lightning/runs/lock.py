"""File locks that prevent two runs from writing to the same folder. The system releases them when the process ends.

A fit locks its own folder if it writes there, and the folders of its checkpoints and loggers. An evaluation locks the
folders of its results and loggers. If the version folder of a logger is in use, an evaluation logs to the next free
version. A fit does the same if Lightning chose the version, and fails if the user did. The first rank holds the locks.

A lock file contains the host, process, time and command of its run, for information only. It is removed when the run ends.
A lock file of a killed run remains, but is not locked.

An ``flock`` lock belongs to the open file, which forked children (data loader workers, the math-verify process) share. They
close it at once, so that a child that outlives a killed run holds no lock.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shlex
import socket
import stat
import sys
import time
import weakref
from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, ModelCheckpoint
from lightning.pytorch.cli import SaveConfigCallback
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger
from lightning.pytorch.strategies.launchers import _MultiProcessingLauncher
from lightning.pytorch.trainer.states import TrainerStatus
from lightning.pytorch.utilities import rank_zero_warn

from opsd_lightning.distributed.collectives import run_on_all_ranks
from opsd_lightning.runs.record import timestamp
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import is_remote
from opsd_lightning.utils.redaction import redact_arguments

#: Seconds to wait for another run to end: a killed process needs time to free its memory.
WAIT_SECONDS = 5.0
#: Seconds to wait after a SLURM requeue, when the previous start may still be ending.
REQUEUE_WAIT_SECONDS = 60.0
#: File name of the lock of a run's own folder.
LOCK_NAME = ".opsd-fit.lock"

# Errors of file systems without locks, and of those that cannot be written, on which a run fails later.
_NO_LOCKS = {
    *(errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT),
}


@dataclass
class _Held:
    descriptor: int
    owner: weakref.ref[Trainer]


_held: dict[Path, _Held] = {}
_automatic: weakref.WeakSet[Any] = weakref.WeakSet()  # loggers whose version Lightning chose
_START = b'{"host": '


def _close_in_child() -> None:
    for held in _held.values():
        os.close(held.descriptor)  # unlocking would release the parent's lock
    _held.clear()


os.register_at_fork(after_in_child=_close_in_child)


def lock_fit(trainer: Trainer) -> None:
    """Lock the folders of a fit. Call it on the first rank only. Repeated calls for a trainer have no effect.

    Raises:
        ConfigError: Another run uses one of the folders.
    """
    try:
        for path, folder, setting in _locks_of_fit(trainer):
            lock_file(path, folder, setting, trainer)
        lock_loggers(trainer, change_versions=False)
    except BaseException:
        release(trainer)
        raise


def lock_loggers(trainer: Trainer, change_versions: bool = True) -> None:
    """Lock the folders of the loggers. A logger whose version is in use moves to the next free version.

    Args:
        trainer: Owner of the loggers.
        change_versions: If False, only versions that Lightning chose may change.

    Raises:
        ConfigError: Another run uses a version that must not change.
    """
    owners = {held.owner() for held in _held.values()} - {trainer, None}
    others = [owner for owner in owners if owner is not None and owner.state.status == TrainerStatus.RUNNING]
    for logger in trainer.loggers:
        if not isinstance(logger, (CSVLogger, TensorBoardLogger)):  # other loggers create a new run on a server
            continue
        if any(logger in other.loggers for other in others):
            continue  # shared with another running trainer of this process
        new = logger._version is None
        if new:
            _automatic.add(logger)
        while not is_remote(logger.log_dir):
            place = Path(logger.log_dir).resolve()
            lock, may_change = _lock_beside(place), change_versions or logger in _automatic
            try:
                lock_file(lock, place, "trainer.logger", trainer, wait=not may_change)
            except ConfigError as error:
                if not may_change:
                    raise
                reason = error.problem
            else:
                if not (new and place.is_dir() and any(place.iterdir())):
                    _remove_stale_locks(place.parent)
                    break
                release(trainer, lock)
                reason = f"{place} belongs to another run"
            following: int = logger._get_next_version()
            logger._version = max(following, logger.version + 1) if isinstance(logger.version, int) else following
            logger._experiment = None
            rank_zero_warn(f"{reason}. {type(logger).__name__} logs to {logger.log_dir} instead")


def _remove_stale_locks(folder: Path) -> None:
    """Remove the lock files that killed runs left in the folder of a logger."""
    for path in folder.glob(".*.lock"):
        if path.resolve() in _held or path.is_symlink():
            continue
        with suppress(OSError):
            descriptor = _open(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if {"host", "pid", "command"} <= _read_holder(descriptor).keys():
                    path.unlink()
            finally:
                os.close(descriptor)


def lock_file(path: Path, folder: Path, setting: str, trainer: Trainer, wait: bool = True) -> None:
    """Lock a folder by its lock file.

    Args:
        path: The lock file, created if missing.
        folder: The folder, for errors.
        setting: Setting that names the folder, for errors.
        trainer: Owner of the lock.
        wait: If True, wait some seconds for another run to end.

    Raises:
        ConfigError: Another run holds the lock, or the file is not a lock file.
    """
    path = path.parent.resolve() / path.name
    if (known := _held.get(path)) is not None:
        other = known.owner()
        if other is not None and other is not trainer and other.state.status == TrainerStatus.RUNNING:
            raise ConfigError(f"another trainer of this process uses {folder}", setting, "Choose another folder")
        known.owner = weakref.ref(trainer)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, folder, setting, wait)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _not_a_lock(path, setting) from error
        if error.errno not in _NO_LOCKS:
            raise
        rank_zero_warn(f"{folder} cannot be locked ({error.strerror}). Make sure that no other run writes there")
        return
    _held[path] = _Held(descriptor, weakref.ref(trainer))


def release(trainer: Trainer, only: Path | None = None) -> None:
    """Release all locks of a trainer, or the lock of a single file."""
    for path, held in list(_held.items()):
        if held.owner() in (trainer, None) and (only is None or path == only.parent.resolve() / only.name):
            del _held[path]
            with suppress(OSError):
                if _is_current(held.descriptor, path):
                    path.unlink()  # remove the file before the lock is released
            os.close(held.descriptor)


def _locks_of_fit(trainer: Trainer) -> Iterator[tuple[Path, Path, str]]:
    """Yield the lock file, the folder and the setting of each lock of a fit."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    root = Path(trainer.default_root_dir)
    folders: list[Any] = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    places = [Path(folder).resolve() for folder in folders if folder is not None and not is_remote(folder)]
    if not is_remote(root) and (root.resolve() in places or _writes_to_root(trainer)):
        yield root / LOCK_NAME, root, "trainer.default_root_dir"
    for place in places:
        if place != root.resolve():
            yield _lock_beside(place), place, "trainer.callbacks.dirpath"


def _writes_to_root(trainer: Trainer) -> bool:
    """Return True if a fit writes directly to ``default_root_dir``, apart from its loggers and checkpoints."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if getattr(callback, "writes_to_root", False):
            return True
        if isinstance(callback, Checkpoint) and not isinstance(callback, ModelCheckpoint):
            return True
        # These callbacks write to the logger's folder, or to default_root_dir without a logger.
        no_dirpath = isinstance(callback, ModelCheckpoint) and callback.dirpath is None
        if (no_dirpath or isinstance(callback, SaveConfigCallback)) and not trainer.loggers:
            return True
    return isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)


def _lock_beside(place: Path) -> Path:
    """Return the lock file next to a folder. A file inside it would make Lightning warn about a non-empty folder."""
    return place.with_name(f".{place.name}.lock")


def _lock(path: Path, folder: Path, setting: str, wait: bool) -> int:
    """Open and lock a file, and return its descriptor."""
    end: float | None = None
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read_holder(descriptor)
            os.close(descriptor)
            if not isinstance(error, BlockingIOError) and error.errno != errno.EACCES:
                raise
            end = end or time.monotonic() + (_wait_seconds(holder) if wait else 0.0)
            if time.monotonic() >= end:
                raise _in_use(holder, folder, setting) from None
            time.sleep(0.1)
            continue
        if not _is_current(descriptor, path):
            os.close(descriptor)
            continue
        if not _is_lock(descriptor):
            os.close(descriptor)
            raise _not_a_lock(path, setting)
        _write_holder(descriptor)
        return descriptor


def _is_lock(descriptor: int) -> bool:
    """Return True if a file is empty or begins like a lock file. A full disk may have truncated it."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    try:
        start = os.pread(descriptor, len(_START), 0)
    except OSError:
        return False
    return _START.startswith(start)


def _not_a_lock(path: Path, setting: str) -> ConfigError:
    return ConfigError(f"{path} has the name of a run's lock file but is not one", setting, "Move it away")


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)  # the file of another user


def _is_current(descriptor: int, path: Path) -> bool:
    """Return False if the holder of a lock has removed its file in the meantime."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _write_holder(descriptor: int) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": timestamp(),
        "command": shlex.join(redact_arguments(sys.argv)),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError:
        pass  # a full disk or the file of another user: the lock works without the information


def _read_holder(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 100_000, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _wait_seconds(holder: dict[str, Any]) -> float:
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    if requeued and holder.get("slurm_job") in (os.environ.get("SLURM_JOB_ID"), None):
        return REQUEUE_WAIT_SECONDS
    return WAIT_SECONDS


def _in_use(holder: dict[str, Any], folder: Path, setting: str) -> ConfigError:
    words = "another run uses it"
    if holder.get("pid") is not None:
        words += f", process {holder['pid']!s:.20} on {holder.get('host')!s:.100} since {holder.get('time')!s:.40}"
        words += f" ({holder.get('command')!s:.300})"
    words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return ConfigError(f"{folder} is in use: {words}", setting, "Choose another folder or end that run first")


def launches_processes(trainer: Trainer) -> bool:
    """Return True if this process forks or spawns the ranks. The first of them then holds the locks."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def is_first_rank(trainer: Trainer) -> bool:
    """Return True on the first rank, even before the strategy is set up."""
    strategy: Any = trainer.strategy
    if launches_processes(trainer):
        return bool(strategy.local_rank == 0 and strategy.node_rank == 0)
    return trainer.is_global_zero


def ranks_started_externally(trainer: Trainer) -> bool:
    """Return True if an external launcher started several ranks, which must then fail together."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.world_size > 1 and environment is not None and environment.creates_processes_externally


class RunLock(Callback):
    """Callback that locks the folders of a fit, and fails on all ranks if another run uses them. `attach` puts it first.

    It moves `RunUnlock` to the end after Lightning has sorted the callbacks: a `ModelCheckpoint` may save when the run
    fails.
    """

    def __init__(self) -> None:
        self.refusal: ConfigError | None = None

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
        callbacks.sort(key=lambda callback: isinstance(callback, RunUnlock))
        if stage == "fit":
            run_on_all_ranks(lambda: self._hold(trainer))

    def _hold(self, trainer: Trainer) -> None:
        refusal, self.refusal = self.refusal, None
        if refusal is not None:
            raise refusal
        if trainer.is_global_zero:
            lock_fit(trainer)


class RunUnlock(Callback):
    """Callback that releases the locks of a run after all other callbacks (see `RunLock`)."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        release(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        release(trainer)


def attach(trainer: Trainer) -> None:
    """Lock the folders of a fit, or the loggers of an evaluation, and add the callbacks that release the locks.

    Call it before the run reads or writes anything.

    Raises:
        ConfigError: Another run uses a folder and there is a single rank. With several ranks, `RunLock` raises the error.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    lock = next((callback for callback in callbacks if isinstance(callback, RunLock)), None)
    if lock is None:
        lock = RunLock()
        callbacks.insert(0, lock)
        callbacks.append(RunUnlock())
    if not is_first_rank(trainer):
        return
    if trainer.state.fn != "fit":
        if trainer.state.fn is not None:  # an evaluation
            lock_loggers(trainer)
        return
    try:
        lock_fit(trainer)
    except ConfigError as error:
        if trainer.world_size == 1:
            raise
        lock.refusal = error
        trainer.loggers = []  # Lightning opens the loggers, which write, before it calls any callback
