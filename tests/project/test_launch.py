"""Tests of the launch files as two nodes with one process each, on one machine."""

from __future__ import annotations

import os
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch

from helpers.files import write_jsonl
from helpers.paths import ROOT
from helpers.processes import Child, free_port
from opsd_lightning.cli.command import main

pytestmark = pytest.mark.integration


def arguments(folder: str, tmp_path: Path, rows: Path) -> list[str]:
    source = [
        part
        for split in ("train", "val")
        for part in (f"--data.{split}=FileSource", f"--data.{split}.init_args.path={rows}")
    ]
    return [
        f"--model.policy.model={folder}", *source, "--data.train.init_args.split=train[2:]",
        "--data.val.init_args.split=train[:2]", "--data.batch_size=2", "--data.eval_batch_size=2",
        "--model.sampling.max_new_tokens=8", "--model.policy.lora.r=4", f"--trainer.default_root_dir={tmp_path / 'run'}",
        "--trainer.accelerator=cpu", "--trainer.max_steps=2", "--trainer.enable_progress_bar=false",
        "--trainer.logger=false", "--trainer.callbacks+=AdapterExport",
    ]  # fmt: skip


def expand(script: str, variables: dict[str, str], words: list[str]) -> list[str]:
    """Return the words of a script's last command, which bash expands and ``printf`` writes out in the command's place."""
    command = ["bash", "-c", script, "script", *words]
    found = subprocess.run(command, env=os.environ | variables, capture_output=True, check=True, timeout=60).stdout
    return found.decode().split("\0")[:-1]


def run_nodes(
    work: Callable[[list[str]], object], words: list[list[str]], variables: list[dict[str, str]], folder: Path
) -> None:
    """Run one process for each node, forked from this one, and check that all succeed."""
    nodes = [
        Child(partial(work, each), folder / f"node{rank}.log", own)
        for rank, (each, own) in enumerate(zip(words, variables, strict=True))
    ]
    codes = [node.end(240) for node in nodes]
    assert not any(codes), "\n".join(node.said() for node in nodes)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "rows.jsonl", [{"problem": f"{n}+1?", "solution": rf"\boxed{{{n + 1}}}"} for n in range(10)]
    )


def test_torchrun_on_two_nodes(folders: dict[str, str], tmp_path: Path, rows: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The launcher is forked from this process; the command that it starts has an interpreter of its own."""
    from torch.distributed.run import main as torchrun

    script = (ROOT / "configs" / "launch" / "torchrun.sh").read_text().replace("exec torchrun", r"printf '%s\0'")
    words = [*arguments(folders["llama"], tmp_path, rows), "--trainer.strategy=fsdp2"]
    port = str(free_port())
    variables = [{"NNODES": "2", "NODE_RANK": str(rank), "GPUS": "1", "MASTER_PORT": port} for rank in range(2)]
    monkeypatch.setenv("PATH", f"{Path(sys.executable).parent}:{os.environ['PATH']}")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.chdir(ROOT)
    run_nodes(torchrun, [expand(script, each, words) for each in variables], variables, tmp_path)
    checkpoint = torch.load(next((tmp_path / "run").rglob("*.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


@pytest.mark.filterwarnings("ignore:scontrol is not on PATH")
def test_slurm_on_two_nodes(folders: dict[str, str], tmp_path: Path, rows: Path) -> None:
    """The batch file's own command, in the environment that srun gives to its tasks, without srun."""
    line = (ROOT / "configs" / "launch" / "slurm.sbatch").read_text().splitlines()[-1]
    words = [*arguments(folders["llama"], tmp_path, rows), "--trainer.strategy=ddp"]
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2",
        "SLURM_JOB_NAME": "opsd", "SLURM_JOB_ID": "7", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()),
    }  # fmt: skip
    variables = [slurm | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)]
    command, *more = expand(line.replace("srun", r"printf '%s\0'"), slurm, words)
    assert command == "opsd"
    run_nodes(main, [more] * 2, variables, tmp_path)
    checkpoint = torch.load(next((tmp_path / "run").rglob("*.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 2
