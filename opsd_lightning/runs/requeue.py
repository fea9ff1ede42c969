"""Requeued SLURM jobs: save the checkpoint for the next start, and choose the checkpoint to resume from.

The names are Lightning's: ``hpc_ckpt_N.ckpt`` in the trainer's ``default_root_dir``. Lightning's own requeue saves in the
middle of a step, and resumes any such file, even that of another job or an outdated one.
"""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from lightning.fabric.plugins.environments.slurm import SLURMEnvironment
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint

from opsd_lightning.checkpoints.io import remove_checkpoint
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.folders import free_name

_JOB_KEY = "opsd_slurm_job"
_NAME = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


def slurm_job() -> str | None:
    """Return the job's name for ``scontrol``, which a requeue does not change, or None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    found = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return found if re.fullmatch(r"[0-9_]+", found) else None


def record_job(checkpoint: dict[str, Any]) -> None:
    """Store the name of the SLURM job in a checkpoint."""
    if (name := slurm_job()) is not None:
        checkpoint[_JOB_KEY] = name


def save_for_requeue(trainer: Trainer) -> str:
    """Save the checkpoint for the job's next start, and return its path. All ranks must call this function."""
    root = Path(trainer.default_root_dir)
    old = _requeue_checkpoints(root)
    path = Path(trainer.strategy.broadcast(str(root / f"hpc_ckpt_{max(old, default=0) + 1}.ckpt")))
    temporary = path.with_name(".requeue.ckpt")  # Lightning would resume any file with hpc_ckpt_ in its name
    trainer.save_checkpoint(temporary)
    if trainer.is_global_zero:
        os.replace(temporary, path)
        for other in old.values():
            remove_checkpoint(other)
    trainer.strategy.barrier()
    return str(path)


def requeue_job(path: str) -> bool:
    """Ask SLURM to requeue the job, and return True if it accepts."""
    name = slurm_job()
    command = ["scontrol", "requeue", str(name)]
    try:
        if name is None:
            raise OSError("SLURM_JOB_ID is not set")
        status = subprocess.run(command, timeout=60, check=False).returncode
        problem = f"exit status {status}" if status else None
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem is None:
        _print(f"SLURM will requeue job {name}, which resumes from {path}")
    else:
        _print(f"`{' '.join(command)}` failed ({problem}). Submit the job again with --ckpt_path {path}")
    return problem is None


def checkpoint_to_resume(trainer: Trainer) -> str | None:
    """Return the newest checkpoint of a requeued job, or None.

    A requeue checkpoint of another job is renamed, so that Lightning does not resume it.
    """
    if not isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment):
        return None
    root, found = Path(trainer.default_root_dir), []
    if saved := _requeue_checkpoints(root):
        newest = saved[max(saved)]
        if (other := _job_of(newest)) in (None, slurm_job()):
            found.append(newest)
        else:
            retire_checkpoints(root, other)
    if found or int(os.environ.get("SLURM_RESTART_COUNT") or 0) > 0:
        callbacks: list[Any] = trainer.checkpoint_callbacks
        for callback in callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.dirpath:
                paths = [Path(path) for path in callback._find_last_checkpoints(trainer)]
                found += [path for path in paths if _job_of(path) == slurm_job()]
    return str(max(found, key=lambda path: path.stat().st_mtime_ns)) if found else None


def check_evaluation(trainer: Trainer) -> None:
    """Check that Lightning would not evaluate a requeue checkpoint when no checkpoint is given.

    Raises:
        ConfigError: This is a SLURM job, and ``trainer.default_root_dir`` contains a requeue checkpoint.
    """
    saved = _requeue_checkpoints(Path(trainer.default_root_dir))
    if saved and SLURMEnvironment.detect():
        raise ConfigError(
            f"{saved[max(saved)]} exists, and in a SLURM job Lightning evaluates it if no checkpoint is given",
            "ckpt_path",
            "Give the checkpoint or set another trainer.default_root_dir",
        )


def retire_checkpoints(root: Path, name: str | None = None) -> None:
    """Rename requeue checkpoints that must not be resumed automatically any more."""
    for number, path in _requeue_checkpoints(root).items():
        aside = root / f"requeue-of-job-{name or slurm_job()}-{number}.ckpt"
        aside = free_name(aside) if os.path.lexists(aside) else aside
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            continue  # another rank has renamed it
        _print(f"{path} will not be resumed automatically. It was renamed to {aside}")


def retire_after_fit(trainer: Trainer) -> None:
    """Rename the requeue checkpoints at the end of a fit."""
    if trainer.is_global_zero and isinstance(trainer._accelerator_connector.cluster_environment, SLURMEnvironment):
        retire_checkpoints(Path(trainer.default_root_dir))


def _print(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def _requeue_checkpoints(root: Path) -> dict[int, Path]:
    names = {path: _NAME.fullmatch(path.name) for path in root.iterdir()} if root.is_dir() else {}
    return {int(name[1]): path for path, name in names.items() if name is not None}


def _job_of(path: Path) -> str | None:
    try:
        checkpoint = torch.load(
            path / "meta.pt" if path.is_dir() else path, map_location="cpu", weights_only=True, mmap=True
        )
    except Exception as error:
        raise ConfigError(
            f"{path}, from which this requeued job would resume, cannot be read ({type(error).__name__})",
            "ckpt_path",
            "Remove the file or give another checkpoint",
        ) from error
    found = checkpoint.get(_JOB_KEY)
    return found if isinstance(found, str) else None
