"""Checks before a run starts: output folders can be written, loggers can be opened, checkpoint names exist."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opsd_lightning.runs.reader import RECORD_FOLDER
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.disk_errors import keep_earlier_metrics
from opsd_lightning.utils.files import is_remote
from opsd_lightning.utils.folders import Protected


def check_folders(trainer: Trainer) -> None:
    """Check that the root folder and the folders of loggers and checkpoints can be written.

    Raises:
        ConfigError: A folder cannot be created or written.
    """
    folders: list[tuple[str, Any]] = [("trainer.default_root_dir", trainer.default_root_dir)]
    folders += [("trainer.logger", logger.save_dir) for logger in trainer.loggers]
    callbacks: list[Any] = trainer.checkpoint_callbacks
    folders += [("trainer.callbacks", callback.dirpath) for callback in callbacks if isinstance(callback, ModelCheckpoint)]
    for setting, folder in folders:
        if folder is None or is_remote(folder):
            continue
        try:
            Path(folder).mkdir(parents=True, exist_ok=True)
            with tempfile.TemporaryFile(dir=folder):
                pass
        except OSError as error:
            problem = f"cannot write to {folder} ({error.strerror})"
            raise ConfigError(problem, setting, "Choose a folder that can be written") from error


def output_paths(trainer: Trainer) -> list[Protected]:
    """Return the local folders and files that a fit writes, each with a description."""
    root = Path(trainer.default_root_dir)
    found: list[tuple[str, Any]] = [
        ("the run's own folder (trainer.default_root_dir)", root),
        ("the run's record", root / RECORD_FOLDER),
        ("the folder of evaluations", root / "results"),
        ("the folder of checkpoints", root / "checkpoints"),
    ]
    found += [("the folder of checkpoints", getattr(c, "dirpath", None)) for c in trainer.checkpoint_callbacks]
    found += [("a logger's folder", logger.log_dir or logger.save_dir) for logger in trainer.loggers]
    pages = [getattr(callback, "path", None) for callback in trainer.callbacks]  # type: ignore[attr-defined]
    found += [("a page or table of the run", root / path) for path in pages if isinstance(path, str)]
    return [(words, path) for words, path in found if path is not None and not is_remote(path)]


def open_loggers(trainer: Trainer) -> None:
    """Open all loggers, as Lightning does at the start of a run.

    Raises:
        ConfigError: A logger cannot start, for example because its service needs a login.
    """
    if trainer.is_global_zero:
        keep_earlier_metrics(trainer.loggers)
    for logger in trainer.loggers:
        try:
            _ = logger.experiment  # type: ignore[attr-defined]
        except Exception as error:  # each library raises its own types
            name, reason = type(logger).__name__, " ".join(str(error).split()) or type(error).__name__
            raise ConfigError(
                f"{name} cannot start ({reason})",
                "trainer.logger",
                "Log in to its service or choose another logger, such as CSVLogger",
            ) from error


def check_checkpoint_alias(trainer: Trainer, ckpt_path: str | None) -> None:
    """Check that ``best``, ``last`` or ``hpc`` names a checkpoint. Lightning would evaluate the untrained weights instead.

    Raises:
        ConfigError: There is no such checkpoint. ``best`` and ``hpc`` need a ``fit`` in the same process.
    """
    if ckpt_path not in ("best", "last", "hpc"):
        return
    callbacks: list[Any] = trainer.checkpoint_callbacks
    folders = [Path(c.dirpath) for c in callbacks if isinstance(c, ModelCheckpoint) and c.dirpath is not None]
    if ckpt_path == "last" and any(any(folder.glob(f"{ModelCheckpoint.CHECKPOINT_NAME_LAST}*")) for folder in folders):
        return
    raise ConfigError(f"there is no checkpoint for {ckpt_path!r}", "ckpt_path", "Give the path of a checkpoint")
