"""Turn failed writes of pages, tables and logs into warnings, so that training continues.

Each file that cannot be written causes one warning. It is written again at its next regular time, and `RunReport` lists the
failure in ``run.json``. Checkpoints and exports do not use this module: their failures end the run.
"""

from __future__ import annotations

import csv
import errno
import functools
import io
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from weakref import WeakKeyDictionary

from lightning.pytorch.loggers import CSVLogger, Logger

from opsd_lightning.utils.files import append, atomic_write, is_remote
from opsd_lightning.utils.folders import free_name

#: ``errno`` values of a full disk, an exceeded quota and a file that is too large.
DISK_FULL = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG}
_METHODS = ("log_metrics", "log_hyperparams", "save", "finalize")
_problems: WeakKeyDictionary[Any, dict[str, str]] = WeakKeyDictionary()
_warned: WeakKeyDictionary[Any, set[str]] = WeakKeyDictionary()


def reset(owners: Iterable[Any]) -> None:
    """Clear the recorded failures of owners (trainers, loggers) at the start of a run."""
    for owner in owners:
        _problems.pop(owner, None)
        _warned.pop(owner, None)


def record_failure(owner: Any, name: str, error: Exception) -> None:
    """Record a failed write for `write_failures`, and warn about the first one of each name in a run."""
    reason = " ".join(str(error).split()) or type(error).__name__
    _problems.setdefault(owner, {})[name] = reason[:300]
    if name not in _warned.setdefault(owner, set()):
        _warned[owner].add(name)
        warnings.warn(f"{name} could not be written ({reason}). Training continues and will try again later", stacklevel=3)


def record_success(owner: Any, name: str) -> None:
    """Clear the recorded failure of a name."""
    _problems.get(owner, {}).pop(name, None)


@contextmanager
def warn_on_write_error(owner: Any, name: str) -> Iterator[None]:
    """Turn an `OSError` inside the block into a warning (see `record_failure`).

    Args:
        owner: The trainer or logger that writes.
        name: Name of the page, table or log that the block writes. Success clears an earlier failure of this name.
    """
    try:
        yield
    except Exception as error:
        cause: BaseException | None = error  # TensorBoard's writer wraps the OSError
        while cause is not None and not isinstance(cause, OSError):
            cause = cause.__cause__ or cause.__context__
        if not isinstance(cause, OSError):
            raise
        record_failure(owner, name, cause)
    else:
        record_success(owner, name)


def write_failures(owners: Iterable[Any]) -> dict[str, str]:
    """Return the current failures of some owners, as the reason for each name."""
    return {name: reason for owner in owners for name, reason in _problems.get(owner, {}).items()}


def guard_loggers(loggers: Iterable[Logger]) -> None:
    """Turn write errors of loggers into warnings, and keep the existing metrics of a `CSVLogger` that is opened again."""
    loggers = list(loggers)
    keep_earlier_metrics(loggers)
    for logger in loggers:
        if "save" in vars(logger):  # already guarded
            continue
        for name in _METHODS:
            if (method := getattr(logger, name, None)) is not None:
                setattr(logger, name, _guarded(logger, method))


def _guarded(logger: Logger, method: Callable[..., Any]) -> Callable[..., Any]:
    name = f"the log of {type(logger).__name__}"

    @functools.wraps(method)
    def guarded(*arguments: Any, **settings: Any) -> Any:
        if isinstance(logger, CSVLogger):
            experiment = getattr(logger, "_experiment", None)
            if experiment is not None and not is_remote(logger.save_dir):
                experiment.save = functools.partial(_save, experiment)
        with warn_on_write_error(logger, name):
            return method(*arguments, **settings)

    return guarded


def keep_earlier_metrics(loggers: Iterable[Logger]) -> None:
    """Rename an existing ``metrics.csv``, which Lightning deletes when it opens the same `CSVLogger` version again."""
    for logger in loggers:
        if isinstance(logger, CSVLogger) and not is_remote(logger.save_dir) and logger._experiment is None:
            path = Path(logger.log_dir) / "metrics.csv"
            if path.is_file():
                path.rename(free_name(path))


def _save(experiment: Any) -> None:
    """Replace `ExperimentWriter.save` by an atomic version: Lightning's loses earlier rows if it fails midway.

    Existing columns of the file are kept, including those of another writer.
    """
    if not experiment.metrics:
        return
    path, keys = Path(experiment.metrics_file_path), list(experiment.metrics_keys)
    experiment._record_new_keys()
    try:
        rows, header = experiment.metrics, list[str]()
        if path.is_file():
            with path.open(newline="", encoding="utf-8") as file:
                reader = csv.DictReader(file)
                header = list(reader.fieldnames or ())
                experiment.metrics_keys[:] = sorted({*experiment.metrics_keys, *header})
                if header != experiment.metrics_keys:
                    rows = [*reader, *rows]
        fresh = header != experiment.metrics_keys
        buffer = io.StringIO(newline="")
        writer = csv.DictWriter(buffer, experiment.metrics_keys, extrasaction="ignore")  # a damaged row may be too long
        if fresh:
            writer.writeheader()
        writer.writerows(rows)
        (atomic_write if fresh else append)(path, buffer.getvalue().encode())
    except OSError:
        experiment.metrics_keys[:] = keys
        raise
    experiment.metrics = []
