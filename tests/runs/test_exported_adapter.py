"""Tests of exported adapters: the base model is that of the run or the one that the adapter names."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from helpers.files import write_record
from helpers.messages import mentions
from opsd_lightning.runs.exported_adapter import base_model_of, built, load_exported
from opsd_lightning.runs.reader import settings_of_run_around
from opsd_lightning.types import ConfigError, Sampling, UserError

NAME = "nobody/base"


def adapter(folder: Path, **settings: Any) -> Path:
    folder.mkdir(parents=True)
    found = {"peft_type": "LORA", "base_model_name_or_path": NAME} | settings
    (folder / "adapter_config.json").write_text(json.dumps(found), encoding="utf-8")
    return folder


def model(folder: Path) -> Path:
    folder.mkdir(parents=True)
    (folder / "config.json").write_text("{}", encoding="utf-8")
    return folder


def config(path: str, *, base_model: str | None = NAME) -> dict[str, Any]:
    export = {"class_path": "opsd_lightning.AdapterExport", "init_args": {"base_model": base_model}}
    policy = {"model": path, "dtype": "float32", "max_length": None}
    return {
        "model": {"class_path": "opsd_lightning.OPSDModule", "init_args": {"policy": policy}},
        "trainer": {"callbacks": [export]},
    }


def found(folder: Path) -> tuple[str, str | None]:
    return base_model_of(str(folder), settings_of_run_around(folder), "--adapter")


def test_adapter_without_a_run_names_its_base_model(tmp_path: Path) -> None:
    assert found(adapter(tmp_path / "a" / "adapter")) == (NAME, None)
    assert found(adapter(tmp_path / "b" / "adapter", revision="v2")) == (NAME, "v2")


@pytest.mark.parametrize("name", [None, NAME])
def test_folder_that_the_run_loaded_is_the_base_model(name: str | None, tmp_path: Path) -> None:
    local = model(tmp_path / "models" / "base")
    write_record(tmp_path / "run", config(str(local), base_model=name))
    folder = adapter(tmp_path / "run" / "adapter", base_model_name_or_path=name or str(local), revision="v2")
    assert found(folder) == (str(local), None)
    for file in local.iterdir():
        file.rename(tmp_path / file.name)
    assert found(folder)[0] == (name or str(local))


def test_gguf_file_that_the_run_loaded_is_the_base_model(tmp_path: Path) -> None:
    """Peft names its folder, which cannot be loaded."""
    file = model(tmp_path / "models") / "base.gguf"
    file.touch()
    write_record(tmp_path / "run", config(str(file), base_model=None))
    assert found(adapter(tmp_path / "run" / "adapter", base_model_name_or_path=str(file.parent))) == (str(file), None)


def test_relative_paths_refer_to_the_folder_of_the_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    there, here = (tmp_path / name for name in ("there", "here"))
    for folder in (there, here):
        model(folder / "models" / "base")
    write_record(tmp_path / "run", config("models/base"), folder=str(there))
    folder = adapter(tmp_path / "run" / "adapter")
    monkeypatch.chdir(here)
    assert Path(found(folder)[0]).resolve() == there / "models" / "base"
    there.rename(tmp_path / "gone")
    assert Path(found(folder)[0]).resolve() == here / "models" / "base"


def test_adapter_of_another_run_keeps_the_model_that_it_names(tmp_path: Path) -> None:
    write_record(tmp_path / "run", config(str(model(tmp_path / "base"))))
    folder = adapter(tmp_path / "run" / "downloaded", base_model_name_or_path="nobody/other", revision="v2")
    assert found(folder) == ("nobody/other", "v2")


@pytest.mark.parametrize("file", ["nothing", "adapter_config.json", "model.safetensors"])
def test_recorded_path_without_a_model_is_not_the_base_model(file: str, tmp_path: Path) -> None:
    local = tmp_path / "base"
    local.mkdir()
    (local / file).touch()
    write_record(tmp_path / "run", config(str(local)))
    assert found(adapter(tmp_path / "run" / "adapter")) == (NAME, None)


def test_given_model_has_the_last_word(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its revision is not that of another model."""
    write_record(tmp_path / "run", config(str(model(tmp_path / "base"))))
    folder = str(adapter(tmp_path / "run" / "adapter", revision="v2"))
    exported = load_exported(folder, "nobody/given", "--adapter")
    assert (exported.policy.model, exported.policy.revision) == ("nobody/given", None)
    assert (exported.policy.adapter, exported.policy.dtype) == (folder, "float32")
    assert "nobody/given" in capsys.readouterr().err
    assert load_exported(folder, None, "--adapter", dtype="bfloat16", pad_token=None).policy.dtype == "bfloat16"
    assert str(tmp_path / "base") in capsys.readouterr().err


@pytest.mark.parametrize("settings", [{"base_model_name_or_path": None}, {"base_model_name_or_path": 3}])
def test_adapter_without_a_base_model_is_refused(settings: dict[str, Any], tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=mentions("--model")):
        found(adapter(tmp_path / "adapter", **settings))


def test_unusable_files_are_refused(tmp_path: Path) -> None:
    folder = adapter(tmp_path / "run" / "adapter")
    (folder / "adapter_config.json").write_text("{")
    with pytest.raises(ConfigError) as refused:
        found(folder)
    assert refused.value.setting == "--adapter" and str(folder) in refused.value.problem
    with pytest.raises(ConfigError, match=mentions("CHECKPOINT", "Sampling", "lengthh")):
        built(Sampling, {"lengthh": 3}, folder, "CHECKPOINT")
    (write_record(tmp_path / "run", {}) / "config.yaml").write_text("model: [")
    with pytest.raises(UserError, match=r"config\.yaml"):
        settings_of_run_around(folder)
