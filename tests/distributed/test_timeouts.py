"""Tests that the timeouts of the presets reach the process groups of a run."""

from __future__ import annotations

from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer

from helpers.paths import ROOT
from helpers.processes import on_ranks
from opsd_lightning.cli.command import main
from opsd_lightning.distributed.fsdp2 import FSDP2Strategy

pytestmark = pytest.mark.integration

TORCH_DEFAULT = dist.distributed_c10d.default_pg_timeout


def timeout_of(group: dist.ProcessGroup | None) -> timedelta:
    group = group or dist.group.WORLD
    assert group is not None
    timeout: timedelta = group._get_backend(torch.device("cpu")).options._timeout
    return timeout


@pytest.mark.parametrize("preset", ["ddp", "fsdp2"])
def test_presets_set_the_timeout_of_the_process_group(preset: str, base: list[str], tmp_path: Path) -> None:
    arguments = [
        "fit", *base, f"--config={ROOT / 'configs' / 'presets' / preset}.yaml", "--data.batch_size=1",
        "--trainer.devices=2", "--trainer.max_steps=1", "--trainer.limit_val_batches=0", "--trainer.logger=false",
    ]  # fmt: skip

    def work(rank: int) -> list[timedelta]:
        strategy = main(arguments).trainer.strategy
        groups = [strategy.device_mesh.get_group("data_parallel")] if preset == "fsdp2" else []
        return [timeout_of(group) for group in [None, *groups]]

    for found in on_ranks(work, tmp_path):
        assert set(found) == {timedelta(hours=12)} and timedelta(hours=12) > TORCH_DEFAULT


def test_a_process_group_of_the_mesh_has_the_timeout_of_fsdp2(tmp_path: Path) -> None:
    """torch makes one with its own default if the world's backend is not the device's."""

    def work(rank: int) -> tuple[bool, timedelta]:
        strategy = FSDP2Strategy(process_group_backend="gloo", timeout_seconds=77)
        trainer = Trainer(accelerator="cpu", devices=2, strategy=strategy, logger=False, enable_checkpointing=False)
        strategy._lightning_module = LightningModule()
        torch.cuda.is_available = lambda: True  # in this child process
        trainer.strategy.setup_environment()
        group = strategy.device_mesh.get_group("data_parallel")
        return group == dist.group.WORLD, timeout_of(group)

    assert on_ranks(work, tmp_path) == [(False, timedelta(seconds=77))] * 2
