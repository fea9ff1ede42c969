"""The run's ``config.yaml`` replaces nothing that it is not."""

from __future__ import annotations

from pathlib import Path

from jsonargparse import ArgumentParser
from lightning.pytorch import LightningModule, Trainer

from opsd_lightning.runs.saved_config import SavedConfig


def save(root: Path, stage: str, value: int) -> None:
    parser = ArgumentParser()
    parser.add_argument("--value", type=int)
    trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, default_root_dir=root)
    config = parser.parse_args([f"--value={value}"])
    SavedConfig(parser, config, overwrite=True).setup(trainer, LightningModule(), stage)


def files(root: Path) -> dict[str, str]:
    return {path.name: path.read_text() for path in root.iterdir()}


def test_existing_files_and_configs_of_a_fit_are_kept(tmp_path: Path) -> None:
    (tmp_path / "config.yaml").write_text("mine: 1\n")
    for _ in range(2):
        save(tmp_path, "fit", 1)
        assert files(tmp_path) == {"config.yaml": "value: 1\n", "config-1.yaml": "mine: 1\n"}
    save(tmp_path, "test", 1)
    assert len(files(tmp_path)) == 2
    save(tmp_path, "test", 2)
    save(tmp_path, "fit", 3)
    save(tmp_path, "test", 4)
    assert files(tmp_path) == {
        "config.yaml": "value: 3\n", "config-1.yaml": "mine: 1\n", "config-2.yaml": "value: 1\n",
        "config-test.yaml": "value: 4\n", "config-test-1.yaml": "value: 2\n",
    }  # fmt: skip
