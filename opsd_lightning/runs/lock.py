"""One run at a time in a folder: locks of the operating system, which end with the process that holds them.

A fit locks its own folder if it writes there, the folders of its checkpoints and those of its loggers; an evaluation locks
the folder of its results and those of its loggers. A logger's version that is not to be had is no reason to end where the
version was chosen by Lightning, or in an evaluation: it logs to the next free one. The first rank holds the locks. The file
of a lock names the host, the process, the time and the command, to inform only. It is removed when the run ends; after a
kill it stays, and means nothing.

``flock`` belongs to the open file, which children that are forked (data loader workers, math-verify's process) share: they
close it at once, so that a child that outlives a killed run holds nothing.
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

from opsd_lightning.runs.record import now
from opsd_lightning.utils.redaction import redact_arguments
from opsd_lightning.distributed.collectives import run_on_all_ranks
from opsd_lightning.types import ConfigError

#: How long a run waits for one that is ending, in seconds: a killed process may take a while to give its memory back.
WAIT_SECONDS = 5.0
#: As long after a SLURM requeue, whose first start may be ending still.
REQUEUE_WAIT_SECONDS = 60.0
#: The lock of a run's own folder.
NAME = ".opsd-fit.lock"

# File systems without locks, and those that cannot be written, on which a run fails elsewhere.
_NO_LOCKS = {
    *(errno.ENOLCK, errno.ENOTSUP, errno.EOPNOTSUPP, errno.ENOSYS, errno.EINVAL),
    *(errno.EROFS, errno.EACCES, errno.EPERM, errno.ENOSPC, errno.EDQUOT),
}


@dataclass
class _Held:
    descriptor: int
    owner: weakref.ref[Trainer]


_held: dict[Path, _Held] = {}
_automatic: weakref.WeakSet[Any] = weakref.WeakSet()  # loggers whose version Lightning has chosen
_START = b'{"host": '


def _in_child() -> None:
    for held in _held.values():
        os.close(held.descriptor)  # not unlocked: that would unlock the parent's
    _held.clear()


os.register_at_fork(after_in_child=_in_child)


def hold(trainer: Trainer) -> None:
    """Lock the folders of a fit. For the first rank alone. Again for the same trainer, it does nothing.

    Raises:
        ConfigError: Another run writes there.
    """
    try:
        for path, folder, setting in _places(trainer):
            hold_file(path, folder, setting, trainer)
        hold_logs(trainer, moves=False)
    except BaseException:
        release(trainer)
        raise


def hold_logs(trainer: Trainer, moves: bool = True) -> None:
    """Lock the folders of the loggers, and move a logger to its next free version if another run writes to its own.

    Args:
        trainer: Owner of the loggers.
        moves: Also move a logger whose version was given, as for an evaluation. Defaults to true.

    Raises:
        ConfigError: Another run writes to a version that was given, and ``moves`` is false.
    """
    owners = {held.owner() for held in _held.values()} - {trainer, None}
    others = [owner for owner in owners if owner is not None and owner.state.status == TrainerStatus.RUNNING]
    for logger in trainer.loggers:
        if not isinstance(logger, (CSVLogger, TensorBoardLogger)):  # others have runs of their own on a server
            continue
        if any(logger in other.loggers for other in others):
            continue  # shared with a trainer of this process that runs
        new = logger._version is None
        if new:
            _automatic.add(logger)
        while _is_local(logger.log_dir):
            place = Path(logger.log_dir).resolve()
            lock, free = _lock_beside(place), moves or logger in _automatic
            try:
                hold_file(lock, place, "trainer.logger", trainer, waits=not free)
            except ConfigError as error:
                if not free:
                    raise
                reason = error.problem
            else:
                if not (new and place.is_dir() and any(place.iterdir())):
                    _sweep(place.parent)
                    break
                release(trainer, lock)
                reason = f"{place} is of another run"
            following: int = logger._get_next_version()
            logger._version = max(following, logger.version + 1) if isinstance(logger.version, int) else following
            logger._experiment = None
            rank_zero_warn(f"{reason}: {type(logger).__name__} logs to {logger.log_dir} instead")


def _sweep(folder: Path) -> None:
    """Remove the locks of killed runs, which had other versions of a logger's folder."""
    for path in folder.glob(".*.lock"):
        if path.resolve() in _held or path.is_symlink():
            continue
        with suppress(OSError):
            descriptor = _open(path)
            try:
                fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
                if {"host", "pid", "command"} <= _read(descriptor).keys():
                    path.unlink()
            finally:
                os.close(descriptor)


def hold_file(path: Path, folder: Path, setting: str, trainer: Trainer, waits: bool = True) -> None:
    """Lock a file that stands for a folder.

    Args:
        path: The file. It is made.
        folder: Folder that it stands for, for errors.
        setting: Setting of the folder, for errors.
        trainer: Owner of the lock.
        waits: Wait for a run that is ending. Defaults to true.

    Raises:
        ConfigError: Another run holds it, or what has its name is no lock.
    """
    path = path.parent.resolve() / path.name
    if (known := _held.get(path)) is not None:
        other = known.owner()
        if other is not None and other is not trainer and other.state.status == TrainerStatus.RUNNING:
            raise ConfigError(f"another trainer of this process writes to {folder}", setting, "Choose another folder")
        known.owner = weakref.ref(trainer)
        return
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        descriptor = _lock(path, folder, setting, waits)
    except OSError as error:
        if error.errno in (errno.ELOOP, errno.EISDIR, errno.ENXIO):
            raise _foreign(path, setting) from error
        if error.errno not in _NO_LOCKS:
            raise
        rank_zero_warn(f"{folder} cannot be locked ({error.strerror}): make sure that no other run writes there")
        return
    _held[path] = _Held(descriptor, weakref.ref(trainer))


def release(trainer: Trainer, only: Path | None = None) -> None:
    """Unlock all that a trainer holds, or a single file."""
    for path, held in list(_held.items()):
        if held.owner() in (trainer, None) and (only is None or path == only.parent.resolve() / only.name):
            del _held[path]
            with suppress(OSError):
                if _is_at(held.descriptor, path):
                    path.unlink()  # while it is locked
            os.close(held.descriptor)


def _places(trainer: Trainer) -> Iterator[tuple[Path, Path, str]]:
    """The file of each lock of a fit, the folder that it stands for, and the folder's setting."""
    if trainer.fast_dev_run:  # type: ignore[attr-defined]
        return
    root = Path(trainer.default_root_dir)
    folders: list[Any] = [getattr(callback, "dirpath", None) for callback in trainer.checkpoint_callbacks]
    places = [Path(folder).resolve() for folder in folders if folder is not None and _is_local(folder)]
    if _is_local(root) and (root.resolve() in places or _writes_to_root(trainer)):
        yield root / NAME, root, "trainer.default_root_dir"
    for place in places:
        if place != root.resolve():
            yield _lock_beside(place), place, "trainer.callbacks.dirpath"


def _writes_to_root(trainer: Trainer) -> bool:
    """Return whether a fit writes to ``default_root_dir`` itself, beside the folders of its loggers and checkpoints."""
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    for callback in callbacks:
        if getattr(callback, "writes_to_root", False):
            return True
        if isinstance(callback, Checkpoint) and not isinstance(callback, ModelCheckpoint):
            return True
        # Without a logger they have no other place.
        unplaced = isinstance(callback, ModelCheckpoint) and callback.dirpath is None
        beside = unplaced or isinstance(callback, SaveConfigCallback)
        if beside and not trainer.loggers:
            return True
    return isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment)


def _lock_beside(place: Path) -> Path:
    """Return the file of a folder's lock, beside it: Lightning warns of folders that are not empty."""
    return place.with_name(f".{place.name}.lock")


def _is_local(folder: Any) -> bool:
    return "://" not in str(folder) and not str(folder).startswith(("s3:", "gs:"))


def _lock(path: Path, folder: Path, setting: str, waits: bool) -> int:
    end: float | None = None
    while True:
        descriptor = _open(path)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            holder = _read(descriptor)
            os.close(descriptor)
            if not isinstance(error, BlockingIOError) and error.errno != errno.EACCES:
                raise
            end = end or time.monotonic() + (_patience(holder) if waits else 0.0)
            if time.monotonic() >= end:
                raise _refusal(holder, folder, setting) from None
            time.sleep(0.1)
            continue
        if not _is_at(descriptor, path):
            os.close(descriptor)
            continue
        if not _is_lock(descriptor):
            os.close(descriptor)
            raise _foreign(path, setting)
        _inform(descriptor)
        return descriptor


def _is_lock(descriptor: int) -> bool:
    """Return whether a file is empty or begins as `_inform` writes it: a full disk may have cut it off."""
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        return False
    try:
        start = os.pread(descriptor, len(_START), 0)
    except OSError:
        return False
    return _START.startswith(start)


def _foreign(path: Path, setting: str) -> ConfigError:
    return ConfigError(f"{path} is no lock of a run, which would have this name", setting, "Move it away")


def _open(path: Path) -> int:
    flags = os.O_CLOEXEC | os.O_NOFOLLOW
    try:
        return os.open(path, os.O_RDWR | os.O_CREAT | flags, 0o666)
    except PermissionError:
        return os.open(path, os.O_RDONLY | flags)  # another user's


def _is_at(descriptor: int, path: Path) -> bool:
    """Return False for the file of a lock that its holder removed in the meantime."""
    try:
        return os.path.samestat(os.fstat(descriptor), os.stat(path))
    except FileNotFoundError:
        return False


def _inform(descriptor: int) -> None:
    holder = {
        "host": socket.gethostname(),
        "pid": os.getpid(),
        "time": now(),
        "command": shlex.join(redact_arguments(sys.argv)),
        "slurm_job": os.environ.get("SLURM_JOB_ID"),
    }
    try:
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, json.dumps(holder).encode(), 0)
    except OSError:
        pass  # the lock holds without it: a full disk, another user's file


def _read(descriptor: int) -> dict[str, Any]:
    try:
        found = json.loads(os.pread(descriptor, 100_000, 0))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def _patience(holder: dict[str, Any]) -> float:
    requeued = os.environ.get("SLURM_RESTART_COUNT", "0") not in ("", "0")
    if requeued and holder.get("slurm_job") in (os.environ.get("SLURM_JOB_ID"), None):
        return REQUEUE_WAIT_SECONDS
    return WAIT_SECONDS


def _refusal(holder: dict[str, Any], folder: Path, setting: str) -> ConfigError:
    words = "another run writes there"
    if holder.get("pid") is not None:
        words += f", process {holder['pid']!s:.20} on {holder.get('host')!s:.100} since {holder.get('time')!s:.40}"
        words += f" ({holder.get('command')!s:.300})"
    words = "".join(c if c.isprintable() else "\N{REPLACEMENT CHARACTER}" for c in words)
    return ConfigError(f"{folder} is in use: {words}", setting, "Choose another folder, or end that run first")


def launches_processes(trainer: Trainer) -> bool:
    """Return whether ranks are processes that this one forks or spawns, of which the first then holds the locks."""
    return isinstance(trainer.strategy.launcher, _MultiProcessingLauncher)


def is_first(trainer: Trainer) -> bool:
    """Return whether this is the first rank, also before the strategy has set it up."""
    strategy: Any = trainer.strategy
    if launches_processes(trainer):
        return bool(strategy.local_rank == 0 and strategy.node_rank == 0)
    return trainer.is_global_zero


def started_together(trainer: Trainer) -> bool:
    """Return whether several ranks were started from outside, and must learn together that the run is refused."""
    environment = getattr(trainer.strategy, "cluster_environment", None)
    return trainer.world_size > 1 and environment is not None and environment.creates_processes_externally


class RunLock(Callback):
    """Holds the locks of a fit, and refuses one whose folders another run holds. Put first by `attach`.

    Puts `RunUnlock` last, once Lightning has ordered the callbacks: behind a `ModelCheckpoint`, which may save when the run
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
            hold(trainer)


class RunUnlock(Callback):
    """Releases the locks of a run, after all other callbacks (see `RunLock`)."""

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        release(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        release(trainer)


def attach(trainer: Trainer) -> None:
    """Lock a fit, or an evaluation's logs, before anything is read or written, and see to it that the locks are released.

    Raises:
        ConfigError: Another run holds them, and there is one rank. With several ranks all are refused, by `RunLock`.
    """
    callbacks: list[Callback] = trainer.callbacks  # type: ignore[attr-defined]
    lock = next((callback for callback in callbacks if isinstance(callback, RunLock)), None)
    if lock is None:
        lock = RunLock()
        callbacks.insert(0, lock)
        callbacks.append(RunUnlock())
    if not is_first(trainer):
        return
    if trainer.state.fn != "fit":
        if trainer.state.fn is not None:  # an evaluation
            hold_logs(trainer)
        return
    try:
        hold(trainer)
    except ConfigError as error:
        if trainer.world_size == 1:
            raise
        lock.refusal = error
        trainer.loggers = []  # Lightning opens them, which writes, before any callback is asked
