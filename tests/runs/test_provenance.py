"""Tests of the facts that results carry."""

from __future__ import annotations

import hashlib
from importlib.metadata import version
from pathlib import Path

import pytest
from huggingface_hub import constants

from opsd_lightning.runs.provenance import hub_commit, made_with, model_digest


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
    assert "model_commit" not in found
    assert found["revision"] and found["machine"] and all(isinstance(value, str) for value in found.values())


def test_a_model_of_the_hub_is_named_with_its_commit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    files = tmp_path / "models--owner--model"
    (files / "refs").mkdir(parents=True)
    commits = {"main": "0" * 40, "v2": "1" * 40}
    for revision, commit in commits.items():
        (files / "snapshots" / commit).mkdir(parents=True)
        (files / "refs" / revision).write_text(commit)
        (files / "snapshots" / commit / "config.json").write_text('{"model_type": "llama"}')
    for revision, commit in {None: "0" * 40, "v2": "1" * 40, "1" * 40: "1" * 40}.items():
        found = made_with("owner/model", revision)
        assert found["model_commit"] == commit and found["model_sha256"] == "owner/model"
    assert hub_commit(tmp_path / "gone" / "model") is None
    assert hub_commit("owner/model", "v3") is hub_commit("owner/other") is hub_commit(tmp_path) is None
