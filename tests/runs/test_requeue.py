"""SLURM starts a job again: it saves, asks for it, and the same command in the same folder goes on by itself."""

from __future__ import annotations

import json
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from lightning.pytorch import LightningModule, Trainer

from helpers.processes import Child
from helpers.whole_runs import configure, fit
from opsd_lightning.cli.command import main
from opsd_lightning.runs.requeue import retire_checkpoints, save_for_requeue

pytestmark = pytest.mark.integration


SLURM = {
    "SLURM_NTASKS": "1", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "1", "SLURM_NNODES": "1", "SLURM_PROCID": "0",
    "SLURM_LOCALID": "0", "SLURM_NODEID": "0", "SLURM_JOB_NAME": "opsd", "SLURM_NODELIST": "127.0.0.1", "SLURM_JOB_ID": "7",
}  # fmt: skip


@pytest.fixture
def slurm(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A ``scontrol`` that notes what it is asked; returns its notes."""
    command = tmp_path / "bin" / "scontrol"
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\necho "$@" >> {tmp_path}/asked\n')
    command.chmod(0o755)
    monkeypatch.setenv("PATH", f"{command.parent}:/usr/bin:/bin")
    return tmp_path / "asked"


def wait_for(child: Child, condition: Callable[[], bool]) -> None:
    while not condition():
        assert not child.ended(0.02), child.said()


def test_same_command_resumes_after_a_requeue(slurm: Path, roomy: str, tmp_path: Path) -> None:
    folder = tmp_path / "run"
    arguments = configure(folder, roomy, every=100)  # no checkpoints but the requeue's
    child = fit(folder, arguments, SLURM)
    wait_for(child, lambda: (folder / "rollouts.csv").exists())
    child.send(signal.SIGUSR1)
    assert child.end(60) == 128 + signal.SIGUSR1, child.said()
    assert slurm.read_text() == "requeue 7\n"
    saved = folder / "hpc_ckpt_1.ckpt"
    step = torch.load(saved, weights_only=True)["global_step"]
    assert 1 <= step < 6
    # Not what an evaluation without a checkpoint is of.
    evaluation = Child(lambda: main(["test", *arguments]), folder / "test.log", SLURM)
    assert evaluation.end(60) == 2
    again = fit(folder, arguments, SLURM)
    assert again.end(300) == 0, again.said()
    record = json.loads((folder / "record" / "run.json").read_text())
    assert [start["step"] for start in record["starts"]] == [0, step]
    assert record["status"] == "finished" and (folder / "adapter").is_dir()
    # It is over: the next run in this folder begins anew.
    assert not list(folder.glob("hpc_ckpt_*")) and list(folder.glob("requeue-of-job-7-1.ckpt"))


def test_checkpoints_of_other_jobs_are_not_resumed(slurm: Path, roomy: str, tmp_path: Path) -> None:
    """Nor is a checkpoint of this job that is older than its last."""
    folder = tmp_path / "run"
    arguments = [*configure(folder, roomy), "--trainer.max_steps=2"]
    stale = {"opsd_slurm_job": "6", "global_step": 5}
    torch.save(stale, folder / "hpc_ckpt_3.ckpt")
    first = fit(folder, arguments, SLURM)
    assert first.end(300) == 0, first.said()
    assert torch.load(folder / "requeue-of-job-6-3.ckpt", weights_only=True) == stale
    last = torch.load(folder / "steps" / "last.ckpt", weights_only=True)
    assert last["global_step"] == 2
    again = fit(folder, [*arguments, "--trainer.max_steps=3"], SLURM | {"SLURM_RESTART_COUNT": "1"})
    assert again.end(300) == 0, again.said()
    starts = json.loads((folder / "record" / "run.json").read_text())["starts"]
    assert [start["step"] for start in starts] == [0, 2]
    assert torch.load(folder / "steps" / "last.ckpt", weights_only=True)["global_step"] == 3


def test_files_of_the_user_are_kept(slurm: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SLURM_JOB_ID", "7")
    root = tmp_path / "run"
    mine, aside = root / "hpc_ckpt_1.ckpt" / "notes.txt", root / "requeue-of-job-7-2.ckpt"
    mine.parent.mkdir(parents=True)
    mine.write_text("mine")
    aside.write_text("mine")
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=root)
    trainer.strategy.connect(LightningModule())
    monkeypatch.setattr(trainer, "save_checkpoint", lambda path: torch.save({"opsd_slurm_job": "7"}, path))
    with pytest.warns(UserWarning, match="hpc_ckpt_1"):
        assert save_for_requeue(trainer) == str(root / "hpc_ckpt_2.ckpt")
    assert mine.read_text() == "mine"
    retire_checkpoints(root)
    assert aside.read_text() == "mine" and (root / "requeue-of-job-7-2-1.ckpt").is_file()
