"""The launch files, as two nodes of one process each: own environments, own interpreters, one machine."""

from __future__ import annotations

import os
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from helpers.files import write_jsonl
from helpers.paths import ROOT
from helpers.processes import free_port


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


def nodes(command: list[str], environments: list[dict[str, str]]) -> None:
    common = os.environ | {"OMP_NUM_THREADS": "1", "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    started = [
        subprocess.Popen(command, cwd=ROOT, env=common | own, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)
        for own in environments
    ]
    try:
        outputs = [process.communicate(timeout=240)[0] for process in started]
    finally:
        for process in started:
            process.kill()
    assert [process.returncode for process in started] == [0] * len(started), "\n".join(o[-3000:] for o in outputs)


@pytest.fixture
def rows(tmp_path: Path) -> Path:
    return write_jsonl(
        tmp_path / "rows.jsonl", [{"problem": f"{n}+1?", "solution": rf"\boxed{{{n + 1}}}"} for n in range(10)]
    )


def test_torchrun_on_two_nodes(folders: dict[str, str], tmp_path: Path, rows: Path) -> None:
    port = str(free_port())
    nodes(
        ["bash", "configs/launch/torchrun.sh", *arguments(folders["llama"], tmp_path, rows), "--trainer.strategy=fsdp2"],
        [{"NNODES": "2", "NODE_RANK": str(rank), "GPUS": "1", "MASTER_PORT": port} for rank in range(2)],
    )
    checkpoint = torch.load(next((tmp_path / "run").rglob("*.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 2
    assert (tmp_path / "run" / "adapter" / "adapter_model.safetensors").exists()


def test_slurm_on_two_nodes(folders: dict[str, str], tmp_path: Path, rows: Path) -> None:
    """As srun sets its tasks' environment; the batch file's own command line, without srun."""
    line = (ROOT / "configs" / "launch" / "slurm.sbatch").read_text().splitlines()[-1].removeprefix("srun ")
    port = str(free_port())
    slurm = {
        "SLURM_NTASKS": "2", "SLURM_NTASKS_PER_NODE": "1", "SLURM_JOB_NUM_NODES": "2", "SLURM_NNODES": "2",
        "SLURM_JOB_NAME": "opsd", "SLURM_JOB_ID": "7", "SLURM_NODELIST": "127.0.0.1", "SLURM_LOCALID": "0",
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port,
    }  # fmt: skip
    command = ["bash", "-c", line.replace("opsd fit", f"{shlex.quote(sys.executable)} cli.py fit"), "slurm"]
    nodes(
        [*command, *arguments(folders["llama"], tmp_path, rows), "--trainer.strategy=ddp"],
        [slurm | {"SLURM_PROCID": str(rank), "SLURM_NODEID": str(rank)} for rank in range(2)],
    )
    checkpoint = torch.load(next((tmp_path / "run").rglob("*.ckpt")), weights_only=True)
    assert checkpoint["global_step"] == 2
