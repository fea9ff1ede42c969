"""SLURM jobs that are started again: the checkpoint for the next start, and which checkpoint a start goes on from.

Lightning's names and places are kept: ``hpc_ckpt_N.ckpt`` in the trainer's ``default_root_dir``. Lightning itself saves in
the midst of a step, and resumes whatever lies there, also that of another job or of an earlier part of the run.
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
from opsd_lightning.utils.folders import free_name
from opsd_lightning.types import ConfigError

_JOB_KEY = "opsd_slurm_job"
_NAME = re.compile(r"hpc_ckpt_(\d+)\.ckpt")


def slurm_job() -> str | None:
    """The job's name for ``scontrol``, which stays when it is started again; None outside SLURM."""
    array, task = os.environ.get("SLURM_ARRAY_JOB_ID"), os.environ.get("SLURM_ARRAY_TASK_ID")
    found = f"{array}_{task}" if array and task else os.environ.get("SLURM_JOB_ID", "")
    return found if re.fullmatch(r"[0-9_]+", found) else None


def record_job(checkpoint: dict[str, Any]) -> None:
    """Note in a checkpoint which job has written it."""
    if (name := slurm_job()) is not None:
        checkpoint[_JOB_KEY] = name


def save_for_requeue(trainer: Trainer) -> str:
    """Save the checkpoint that the job's next start resumes, and return its path. Every rank must call."""
    root = Path(trainer.default_root_dir)
    old = _requeue_checkpoints(root)
    path = Path(trainer.strategy.broadcast(str(root / f"hpc_ckpt_{max(old, default=0) + 1}.ckpt")))
    temporary = path.with_name(".requeue.ckpt")  # Lightning takes anything with hpc_ckpt_ in its name for a whole checkpoint
    trainer.save_checkpoint(temporary)
    if trainer.is_global_zero:
        os.replace(temporary, path)
        for other in old.values():
            remove_checkpoint(other)
    trainer.strategy.barrier()
    return str(path)


def requeue_job(path: str) -> bool:
    """Ask SLURM to start the job again; return whether it will."""
    name = slurm_job()
    command = ["scontrol", "requeue", str(name)]
    try:
        if name is None:
            raise OSError("SLURM_JOB_ID is not set")
        status = subprocess.run(command, timeout=60, check=False).returncode
        problem = f"it ended with status {status}" if status else None
    except (OSError, subprocess.SubprocessError) as error:
        problem = str(error)
    if problem is None:
        _print(f"SLURM starts job {name} again; it goes on from {path}")
    else:
        _print(f"SLURM did not take `{' '.join(command)}` ({problem}). Submit the job again with --ckpt_path {path}")
    return problem is None


def checkpoint_to_resume(trainer: Trainer) -> str | None:
    """Return the newest checkpoint of this job, where SLURM has started it again; None elsewhere.

    That of another job is put aside, so that Lightning does not take it.
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
    """Refuse an evaluation without a checkpoint where Lightning would take that of a requeue by itself.

    Raises:
        ConfigError: One lies in ``trainer.default_root_dir``, and this is a SLURM job.
    """
    saved = _requeue_checkpoints(Path(trainer.default_root_dir))
    if saved and SLURMEnvironment.detect():
        raise ConfigError(
            f"{saved[max(saved)]} is there, and in a SLURM job Lightning would evaluate it where no checkpoint is named",
            "ckpt_path",
            "Name the checkpoint, or set another trainer.default_root_dir",
        )


def retire_checkpoints(root: Path, name: str | None = None) -> None:
    """Rename checkpoints of a requeue that nothing should go on from by itself any more."""
    for number, path in _requeue_checkpoints(root).items():
        aside = root / f"requeue-of-job-{name or slurm_job()}-{number}.ckpt"
        aside = free_name(aside) if os.path.lexists(aside) else aside
        try:
            os.replace(path, aside)
        except FileNotFoundError:
            continue  # another rank was faster
        _print(f"{path} is not resumed by itself any more, and is now {aside}")


def retire_after_fit(trainer: Trainer) -> None:
    """Put the checkpoints of a requeue aside at the end of a fit."""
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
            f"{path} cannot be read ({type(error).__name__}), and SLURM started this job to go on from it",
            "ckpt_path",
            "Remove the file, or name another checkpoint",
        ) from error
    found = checkpoint.get(_JOB_KEY)
    return found if isinstance(found, str) else None
