"""A run's surroundings are checked before it starts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger, Logger

from opsd_lightning.cli.command import main
from opsd_lightning.distributed.checks import check_strategy_name
from opsd_lightning.runs.output_checks import check_checkpoint_alias, check_folders, open_loggers
from opsd_lightning.types import ConfigError

pytestmark = pytest.mark.integration


def trainer(folder: Path, **settings: Any) -> Trainer:
    settings = {"logger": False, "enable_checkpointing": False} | settings
    return Trainer(accelerator="cpu", devices=1, default_root_dir=folder, enable_progress_bar=False, **settings)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    path = tmp_path / "file"
    path.write_text("x")
    return path


def test_unwritable_folder_is_refused(tmp_path: Path, file: Path) -> None:
    below = file / "below"
    runs = {
        "trainer.default_root_dir": trainer(below),
        "trainer.logger": trainer(tmp_path, logger=CSVLogger(below)),
        "trainer.callbacks": trainer(tmp_path, callbacks=[ModelCheckpoint(below)], enable_checkpointing=True),
    }
    for setting, each in runs.items():
        with pytest.raises(ConfigError) as caught:
            check_folders(each)
        assert caught.value.setting == setting and str(below) in caught.value.problem


def test_folders_are_made_and_left_empty(tmp_path: Path) -> None:
    check_folders(trainer(tmp_path / "a" / "b"))
    assert (tmp_path / "a" / "b").is_dir() and not list((tmp_path / "a" / "b").iterdir())


class NotLoggedIn(CSVLogger):
    @property
    def experiment(self) -> Any:
        raise PermissionError("no key")


def test_failing_logger_is_refused(tmp_path: Path) -> None:
    loggers: list[Logger] = [CSVLogger(tmp_path), NotLoggedIn(tmp_path)]
    with pytest.raises(ConfigError) as caught:
        open_loggers(trainer(tmp_path, logger=loggers))
    assert caught.value.setting == "trainer.logger" and "NotLoggedIn" in caught.value.problem


@pytest.mark.parametrize("name", ["best", "last", "hpc"])
def test_missing_checkpoint_is_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        check_checkpoint_alias(trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True), name)
    assert caught.value.setting == "ckpt_path"


def test_last_checkpoint_is_found(tmp_path: Path) -> None:
    (tmp_path / "last.ckpt").touch()
    check_checkpoint_alias(trainer(tmp_path, callbacks=[ModelCheckpoint(tmp_path)], enable_checkpointing=True), "last")


@pytest.mark.parametrize("name", ["fsdp3", "ddpp", "model_parallel"])
def test_unknown_strategy_is_refused(name: str, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        check_strategy_name(name)
    assert caught.value.setting == "trainer.strategy" and "FSDP1" not in str(caught.value)
    with pytest.raises(SystemExit) as stopped:
        main(["fit", "--model.policy.model=x", f"--trainer.strategy={name}"])
    assert stopped.value.code == 2 and "error: trainer.strategy: " in capsys.readouterr().err


def test_config_that_is_not_utf8_is_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "config.yaml").write_bytes("trainer: {default_root_dir: caf\xe9}\n".encode("latin-1"))
    with pytest.raises(SystemExit) as stopped:
        main(["fit", f"--config={tmp_path / 'config.yaml'}"])
    assert stopped.value.code == 2 and "error: config: " in capsys.readouterr().err


@pytest.mark.parametrize(("command", "setting"), [("validate", "data.val"), ("test", "data.test"), ("predict", "data.test")])
def test_stage_without_a_source_is_refused(command: str, setting: str, roomy: str, tmp_path: Path, capsys: Any) -> None:
    with pytest.raises(SystemExit) as stopped:
        main(
            [command, f"--model.policy.model={roomy}", "--trainer.accelerator=cpu", f"--trainer.default_root_dir={tmp_path}"]
        )
    said = capsys.readouterr().err
    assert stopped.value.code == 2 and f"error: {setting}: " in said and f"`{command}`" in said and "TrainerFn" not in said
