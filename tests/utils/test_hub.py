"""Tests that folders are pushed to the hub, and that a push that cannot work is refused before training."""

from __future__ import annotations

import shlex
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import constants

from helpers.hub_server import HubServer, Repository
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.folders import MANIFEST
from opsd_lightning.utils.hub import check_push, push_command, push_folder

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:Use .content=<...>. to upload:DeprecationWarning"),  # huggingface_hub's own call
]


@pytest.mark.parametrize(("given", "name"), [("ann/mine", "ann/mine"), ("mine", "ann/mine"), ("lab/ours", "lab/ours")])
def test_a_folder_is_pushed_to_a_new_repository(given: str, name: str, hub: HubServer, tmp_path: Path) -> None:
    (tmp_path / "README.md").write_text("---\nlibrary_name: peft\n---\n# Card\n")
    (tmp_path / "adapter_model.safetensors").write_bytes(bytes(range(256)) * 100)
    (tmp_path / MANIFEST).write_text("{}")
    assert check_push(given, True, "hub_id") == name
    assert not hub.repositories, "the check creates nothing"
    address = push_folder(tmp_path, name, True, "After 3 steps")
    assert address == f"{hub.url}/{name}"
    repository = hub.repositories[name]
    assert repository.private and repository.commits == ["After 3 steps"]
    assert repository.files == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.name != MANIFEST}
    assert check_push(given, True, "hub_id") == name
    (tmp_path / "README.md").write_text("another")
    push_folder(tmp_path, name, True, "Again")
    assert repository.files["README.md"] == b"another"
    assert push_folder(tmp_path, f"{name}-public", False, "") and not hub.repositories[f"{name}-public"].private


def test_a_repository_that_became_public_gets_nothing(hub: HubServer, tmp_path: Path) -> None:
    """Its owner publishes it while the model trains."""
    (tmp_path / "README.md").write_text("card")
    hub.repositories["ann/mine"] = Repository(private=True)
    assert check_push("mine", True, "hub_id") == "ann/mine"
    hub.repositories["ann/mine"].private = False
    with pytest.raises(ConfigError) as refused:
        push_folder(tmp_path, "ann/mine", True, "After 3 steps")
    assert refused.value.setting == "hub_private" and not hub.repositories["ann/mine"].files


def broken(hub: HubServer, monkeypatch: pytest.MonkeyPatch, case: str) -> str:
    """Make a push impossible, and return the id to push to."""
    token: dict[str, Any] = hub.account["auth"]["accessToken"]  # type: ignore[index]
    if case == "offline":
        monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    elif case == "no token":
        monkeypatch.setenv("HF_TOKEN", "")
    elif case == "wrong token":
        monkeypatch.setenv("HF_TOKEN", "hf_" + "y" * 34)
    elif case == "no hub":
        hub.close()
    elif case == "broken hub":
        hub.failures["whoami"] = 500
    elif case == "reads only":
        token["role"] = "read"
    elif case == "scopes without writing":
        scope = {"entity": {"type": "user", "name": "ann"}, "permissions": ["repo.content.read"]}
        token |= {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}
    elif case == "not writable":
        hub.repositories["ann/mine"] = Repository(private=True, writable=False)
    elif case == "public":
        hub.repositories["ann/mine"] = Repository(private=False)
    return {"malformed": "a/b/c", "of another": "bob/mine"}.get(case, "ann/mine")


CASES = [
    "offline",
    "no token",
    "wrong token",
    "no hub",
    "broken hub",
    "reads only",
    "scopes without writing",
    "not writable",
    "public",
    "malformed",
    "of another",
]


@pytest.mark.parametrize("case", CASES)
def test_a_push_that_cannot_work_is_refused(case: str, hub: HubServer, monkeypatch: pytest.MonkeyPatch) -> None:
    repo = broken(hub, monkeypatch, case)
    before = dict(hub.repositories)
    with pytest.raises(ConfigError) as refused:
        check_push(repo, True, "trainer.callbacks.hub_id")
    assert refused.value.setting == "trainer.callbacks.hub_id"
    assert "hf_" not in str(refused.value) and len(str(refused.value).splitlines()) == 1
    assert hub.repositories == before
    if case in ("offline", "no token"):
        assert not hub.paths, "nothing is asked"


def test_a_fine_grained_token_that_may_write_is_accepted(hub: HubServer) -> None:
    scope = {"entity": {"type": "user", "name": "ann"}, "permissions": ["repo.content.read", "repo.write"]}
    hub.account["auth"]["accessToken"] |= {"role": "fineGrained", "fineGrained": {"scoped": [scope]}}  # type: ignore[index]
    assert check_push("mine", True, "hub_id") == "ann/mine"


def test_the_command_pushes_the_same_folder(tmp_path: Path) -> None:
    folder = tmp_path / "with space"
    words = shlex.split(push_command(folder, "ann/mine", True))
    assert words[:5] == ["hf", "upload", "ann/mine", str(folder), "."] and MANIFEST in words and "--private" in words
    assert "--private" not in push_command(folder, "ann/mine", False)
