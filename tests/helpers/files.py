"""Files that tests write."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def write_record(root: Path, config: dict[str, Any], folder: str | None = None) -> Path:
    """Write the parts of a run's record that describe its settings.

    Args:
        root: Folder of the run.
        config: Settings of the run.
        folder: Folder in which the run was started.
    """
    record = root / "record"
    record.mkdir(parents=True)
    (record / "run.json").write_text(json.dumps({"starts": [{"folder": folder}]}), encoding="utf-8")
    (record / "config.yaml").write_text(yaml.safe_dump(config), encoding="utf-8")
    return record
