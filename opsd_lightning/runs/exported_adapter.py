"""Load the settings of an exported adapter: its base model, and the settings of the run that trained it."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

from peft import PeftConfig

from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.runs.reader import RECORD_FOLDER, RecordedSettings, flatten, settings_of_run_around
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.terminal import say

_Part = TypeVar("_Part")
_MODEL = "model.policy.model"
_BASE_MODEL = re.compile(r"trainer\.callbacks\.AdapterExport\d*\.base_model")
#: Settings of a run's policy that its exported adapter is loaded with.
_POLICY_SETTINGS = ("dtype", "chat_template", "pad_token", "max_length")


class ExportedAdapter(NamedTuple):
    """An exported adapter.

    Args:
        policy: The base model with the adapter.
        prompts: Templates of both prompts, as the run used them in training.
        settings: Settings of the run. Empty if the adapter is not in the folder of its run, and the prompts are then the
            default ones.
    """

    policy: Policy
    prompts: Prompts
    settings: RecordedSettings


class BaseModel(NamedTuple):
    """The base model of an adapter.

    Args:
        model: Hugging Face id, folder or ``.gguf`` file.
        revision: Branch, tag or commit of a Hugging Face id. None for the default one.
    """

    model: str
    revision: str | None = None


def load_exported(adapter: str, model: str | None, setting: str, **given: Any) -> ExportedAdapter:
    """Read the settings of an exported adapter, and print the name of its base model. No weights are loaded.

    If the adapter is in the folder of its run, the settings come from the run's record.

    Args:
        adapter: Peft folder or Hugging Face id.
        model: Base model. Defaults to `base_model_of`.
        setting: Name of the option that holds the adapter, for errors.
        given: Settings of the policy that replace those of the run, such as ``dtype``. Values of None are ignored.

    Raises:
        ConfigError: The adapter cannot be read, or names no base model, or the settings of its run cannot be used.
    """
    settings = settings_of_run_around(adapter) if Path(adapter).is_dir() else RecordedSettings({}, None)
    base = BaseModel(model) if model else base_model_of(adapter, settings, setting)
    say(f"Base model: {base.model}{f', revision {base.revision}' if base.revision else ''}", error=True)
    recorded = settings.part("model", "policy")
    known = {name: recorded[name] for name in _POLICY_SETTINGS if recorded.get(name)}
    if "chat_template" in known:
        known["chat_template"] = str(_started_in(settings) / str(known["chat_template"]))
    known |= {name: value for name, value in given.items() if value is not None}
    known |= {"model": base.model, "revision": base.revision, "adapter": adapter}
    policy = built(Policy, known, adapter, setting)
    prompts = built(Prompts, settings.part("data", "prompts"), adapter, setting).of_split("train")
    return ExportedAdapter(policy, prompts, settings)


def base_model_of(adapter: str, settings: RecordedSettings, setting: str) -> BaseModel:
    """Return the base model of an adapter.

    It is the local folder or file that the run loaded, if that still exists. ``adapter_config.json`` may name the hub id of
    the same model instead (``base_model`` of `AdapterExport`). In all other cases it is the model that
    ``adapter_config.json`` names.

    A relative path of the run's settings refers to the folder in which the run was started. If that folder does not exist,
    it refers to the current folder.

    Args:
        adapter: Peft folder or Hugging Face id.
        settings: Settings of the run whose folder contains the adapter.
        setting: Name of the option that holds the adapter, for errors.

    Raises:
        ConfigError: The adapter cannot be read, or names no base model.
    """
    try:
        config = PeftConfig.from_pretrained(adapter)
    except Exception as error:  # the hub and JSON raise different errors
        reason = " ".join(str(error).split())[:200] or type(error).__name__
        fix = "Give the folder of an exported adapter"
        raise ConfigError(f"cannot read {adapter} as an adapter ({reason})", setting, fix) from None
    name, revision = config.base_model_name_or_path, config.revision
    if (local := _local_model(settings, name)) is not None:
        return BaseModel(str(local))
    if not isinstance(name, str) or not name:
        raise ConfigError(f"{adapter} names no base model", "--model", "Give its Hugging Face id or folder")
    return BaseModel(name, revision if isinstance(revision, str) else None)


def _local_model(settings: RecordedSettings, name: Any) -> Path | None:
    """Return the folder or file that a run loaded its model from, or None.

    Args:
        settings: Settings of the run.
        name: Base model that ``adapter_config.json`` names. Another run may have written an adapter into the folder of this
            one, and None is returned if the name is neither that of the run's model nor the ``base_model`` of its export.
    """
    flat = flatten(settings.config)
    if not isinstance(model := flat.get(_MODEL), str):
        return None
    path = Path(model).expanduser()
    # peft names the folder of a .gguf file.
    names = [model, str(path), str(path.parent), *(value for key, value in flat.items() if _BASE_MODEL.fullmatch(key))]
    # A run that was started from Python records the names of its callbacks only.
    if name and name not in names and "trainer.callbacks" not in flat:
        return None
    path = _started_in(settings) / path
    return path if _is_model(path) else None


def _started_in(settings: RecordedSettings) -> Path:
    folder = Path(settings.folder or "")
    return folder if folder.is_dir() else Path()


def _is_model(path: Path) -> bool:
    if path.is_file():
        return path.suffix == ".gguf"
    return (path / "config.json").is_file() and not (path / "adapter_config.json").is_file()


def built(kind: type[_Part], settings: Mapping[str, Any], path: str | Path, setting: str) -> _Part:
    """Build a part of a run from its recorded settings. Settings without a value are left out.

    Args:
        kind: Class of the part.
        settings: Its arguments.
        path: The file or folder whose run recorded them.
        setting: Name of the option that holds the path, for errors.

    Raises:
        ConfigError: The class does not accept the settings.
    """
    try:
        return kind(**{name: value for name, value in settings.items() if value is not None})
    except (TypeError, ValueError) as error:
        problem = f"the run of {path} has unusable settings of {kind.__name__} ({error})"
        fix = f"Correct config.yaml in the run's folder {RECORD_FOLDER!r}, or copy {path} out of the run's folder"
        raise ConfigError(problem, setting, f"{fix} to use the default settings") from None
