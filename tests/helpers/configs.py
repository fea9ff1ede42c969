"""Parsed configurations of the folder `configs/`."""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Any

import pytest
import yaml

from helpers.paths import ROOT
from opsd_lightning.cli.command import main

PARSED: dict[tuple[str, ...], dict[str, Any]] = {}  # parsing takes seconds, and every recipe alone is asked for often


def parsed(args: list[str], monkeypatch: pytest.MonkeyPatch) -> dict[str, Any]:
    """Return the final configuration of a command, whose ``model`` are the method's settings, without building anything."""
    from opsd_lightning.cli import command as room

    if tuple(args) in PARSED:
        return copy.deepcopy(PARSED[tuple(args)])
    monkeypatch.setattr(room.OPSDCLI, "instantiate_classes", lambda self: None)
    monkeypatch.setattr(room.OPSDCLI, "_run_subcommand", lambda self, name: None)
    cli = main(args)
    config = cli.config[cli.subcommand].as_dict()
    config |= {"model": config["model"]["init_args"], "method": config["model"]["class_path"]}
    PARSED[tuple(args)] = copy.deepcopy(config)
    return config


def shrunk_skills(folder: Path) -> Path:
    """Write the preset of kept skills with a few short items of each set, and return its path."""
    config = yaml.safe_load((ROOT / "configs" / "presets" / "kept_skills.yaml").read_text(encoding="utf-8"))
    for skills in config["trainer"]["callbacks+"][0]["init_args"]["sets"].values():
        skills["init_args"]["source"]["init_args"]["size"] = 3
        if "max_new_tokens" in skills["init_args"]:
            skills["init_args"]["max_new_tokens"] = 4
    path = folder / "shrunk_skills.yaml"
    path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    return path
