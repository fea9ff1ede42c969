"""Reading a run that came from elsewhere follows no link out of it."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from opsd_lightning.runs.reader import read_run
from opsd_lightning.types import UserError

LINE = {"kind": "train", "step": 1, "seconds": 1.0, "tokens": 1, "metrics": {"train/loss": 1.0}}
NAMES = ("record/run.json", "record/config.yaml", "record/metrics.jsonl", "record/samples.jsonl", "before/test.jsonl")


def run(root: Path) -> Path:
    contents = (json.dumps({"starts": []}), "model: mine\n", json.dumps(LINE) + "\n", "", "")
    for name, content in zip(NAMES, contents, strict=True):
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).write_text(content)
    return root


@pytest.mark.parametrize("name", [*NAMES, "record", "before"])
def test_a_link_inside_a_run_is_refused(name: str, tmp_path: Path) -> None:
    root = run(tmp_path / "run")
    (root / name).rename(tmp_path / "private")
    (root / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="link"):
        read_run(root)


@pytest.mark.parametrize("name", ["config.yaml", "metrics.csv"])
def test_a_link_in_a_log_is_refused(name: str, tmp_path: Path) -> None:
    log = tmp_path / "run" / "version_0"
    log.mkdir(parents=True)
    (log / "metrics.csv").write_text("step,train/loss\n0,1.0\n")
    (log / "config.yaml").write_text("model: mine\n")
    assert read_run(log).train
    (log / name).rename(tmp_path / "private")
    (log / name).symlink_to(tmp_path / "private")
    with pytest.raises(UserError, match="link"):
        read_run(tmp_path / "run")


def test_a_link_to_a_run_is_followed(tmp_path: Path) -> None:
    run(tmp_path / "run")
    (tmp_path / "newest").symlink_to("run")
    assert read_run(tmp_path / "newest").config == {"model": "mine"}
