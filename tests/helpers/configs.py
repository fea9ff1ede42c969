"""Parsed configurations of the folder `configs/`."""

from __future__ import annotations

import copy
from typing import Any

import pytest

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
