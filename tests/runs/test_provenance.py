"""Tests of the facts that results carry."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

from opsd_lightning.runs.provenance import made_with, model_digest


def test_weights_decide_the_digest(tmp_path: Path) -> None:
    (tmp_path / "model.safetensors").write_bytes(b"weights")
    one = model_digest(tmp_path)
    assert one == hashlib.sha256(b"weights").hexdigest()
    (tmp_path / "config.json").write_text("{}")
    assert model_digest(str(tmp_path)) == one
    (tmp_path / "model-2.safetensors").write_bytes(b"more")
    two = model_digest(tmp_path)
    (tmp_path / "model-2.safetensors").write_bytes(b"else")
    assert len({one, two, model_digest(tmp_path)}) == 3
    assert model_digest("owner/model") == "owner/model"


def test_libraries_are_named_with_their_versions(tmp_path: Path) -> None:
    found = made_with(tmp_path)
    assert all(found[name] == version(name) for name in ("torch", "transformers", "peft", "lightning"))
    assert found["revision"] and found["machine"] and all(isinstance(value, str) for value in found.values())
