"""Folders are replaced where nothing can be lost, and refused elsewhere."""

from __future__ import annotations

import ast
import hashlib
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.paths import ROOT
from opsd_lightning.types import ConfigError
from opsd_lightning.utils import folders as module
from opsd_lightning.utils.folders import MANIFEST, check_replaceable, remove_export, replace_folder


def tree(root: Path) -> dict[str, str]:
    """Everything below a folder, with digests of files and targets of links."""
    found = {}
    for path in sorted(root.rglob("*")):
        name = str(path.relative_to(root))
        if path.is_symlink():
            found[name] = f"-> {os.readlink(path)}"
        else:
            found[name] = hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
    return found


def export(folder: Path, text: str = "weights", kind: str = "adapter") -> Path:
    with replace_folder(folder, "folder", kind) as temporary:
        (temporary / "sub").mkdir()
        (temporary / "sub" / "weights").write_text(text)
    return folder


def test_an_export_replaces_an_earlier_one_and_leaves_nothing_beside(tmp_path: Path) -> None:
    for text in ("first", "second"):
        export(tmp_path / "adapter", text)
        assert (tmp_path / "adapter" / "sub" / "weights").read_text() == text
    (tmp_path / "empty").mkdir()
    export(tmp_path / "empty")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "empty"]


def add(folder: Path) -> None:
    (folder / "notes.txt").write_text("mine")


def change(folder: Path) -> None:
    (folder / "sub" / "weights").write_text("WEIGHTS")


def link(folder: Path) -> None:
    (folder / "link").symlink_to(ROOT)


def make(folder: Path) -> None:
    (folder / "sub" / "empty").mkdir()


def forget(folder: Path) -> None:
    (folder / MANIFEST).unlink()


def forge(folder: Path) -> None:
    (folder / MANIFEST).write_text(
        json.dumps({"made_by": "opsd_lightning", "kind": "adapter", "files": {"../x": [1, None]}})
    )


def nonsense(folder: Path) -> None:
    (folder / MANIFEST).write_text("[" * 5000)


def other_kind(folder: Path) -> None:
    text = (folder / MANIFEST).read_text()
    (folder / MANIFEST).write_text(text.replace('"adapter"', '"merged model"'))


@pytest.mark.parametrize("touch", [add, change, link, make, forget, forge, nonsense, other_kind])
def test_a_folder_that_holds_more_than_an_export_stays(touch: Callable[[Path], None], tmp_path: Path) -> None:
    folder = export(tmp_path / "runs" / "adapter")
    touch(folder)
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as caught, replace_folder(folder, "some.setting", "adapter"):
        pass
    assert caught.value.setting == "some.setting" and tree(tmp_path) == before


def test_what_is_added_while_an_export_is_written_stays(tmp_path: Path) -> None:
    folder = export(tmp_path / "adapter")

    def work() -> None:
        with replace_folder(folder, "folder", "adapter") as temporary:
            (temporary / "new").write_text("new")
            add(folder)

    with pytest.raises(ConfigError):
        work()
    assert (folder / "notes.txt").read_text() == "mine" and (folder / "sub" / "weights").read_text() == "weights"
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_protected_places_are_never_replaced(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    here, home = tmp_path / "a" / "here", tmp_path / "home"
    here.mkdir(parents=True)
    home.mkdir()
    monkeypatch.chdir(here)
    monkeypatch.setenv("HOME", str(home))
    (tmp_path / "linked").symlink_to(export(tmp_path / "elsewhere" / "adapter"))
    (tmp_path / "dangling").symlink_to(tmp_path / "nowhere")
    (tmp_path / "file").write_text("text")
    (tmp_path / "up").symlink_to(here)
    before = tree(tmp_path)
    refused = [".", "..", "../..", here, "/", "~/..", home, tmp_path / "a", tmp_path / "linked", tmp_path / "dangling",
               tmp_path / "file", tmp_path / "file" / "below", "/proc", tmp_path / "up", tmp_path / "up" / ".."]  # fmt: skip
    for folder in refused:
        folder = Path(folder).expanduser() if str(folder).startswith("~") else folder
        with pytest.raises(ConfigError):
            check_replaceable(folder, "folder", "adapter")
    with pytest.raises(ConfigError):
        check_replaceable(tmp_path / "base", "folder", "adapter", [("the base model", tmp_path / "base" / "weights")])
    with pytest.raises(ConfigError):
        check_replaceable(tmp_path / "elsewhere", "folder", "adapter", [("what is linked", tmp_path / "linked")])
    assert tree(tmp_path) == before
    assert check_replaceable(tmp_path / "up" / "new", "folder", "adapter") == here / "new", "links on the way are followed"


@pytest.mark.skipif(os.geteuid() == 0 and not os.access("/sys", os.W_OK), reason="root may write everywhere")
def test_a_folder_that_cannot_be_written_is_refused(tmp_path: Path) -> None:
    parent = tmp_path / "parent"
    parent.mkdir()
    parent.chmod(0o500)
    if os.access(parent, os.W_OK):
        parent = Path("/sys/kernel")  # root writes to any folder, but not there
        if os.access(parent, os.W_OK):
            pytest.skip("this user writes everywhere")
    with pytest.raises(ConfigError):
        check_replaceable(parent / "adapter", "folder", "adapter")


def test_removing_takes_away_what_was_written_and_nothing_else(tmp_path: Path) -> None:
    folder = export(tmp_path / "adapter")
    add(folder)
    assert not remove_export(folder)
    assert sorted(path.name for path in folder.rglob("*")) == ["notes.txt", MANIFEST]
    (folder / "notes.txt").unlink()
    assert remove_export(folder) and not folder.exists()
    mine = tmp_path / "mine"
    mine.mkdir()
    add(mine)
    (tmp_path / "linked").symlink_to(export(tmp_path / "other"))
    before = tree(tmp_path)
    assert not remove_export(mine) and not remove_export(tmp_path / "linked") and tree(tmp_path) == before


def test_two_exports_at_the_same_time_leave_one_whole(tmp_path: Path) -> None:
    folder = export(tmp_path / "adapter", "old")
    with replace_folder(folder, "folder", "adapter") as first:
        (first / "weights").write_text("first")
        with replace_folder(folder, "folder", "adapter") as second:
            (second / "weights").write_text("second")
    assert (folder / "weights").read_text() == "first" and [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_no_other_module_removes_folders() -> None:
    """`folders` alone removes folders that are not empty; `checkpoints.io` those of which it has removed the shards."""
    for path in [*(ROOT / "opsd_lightning").rglob("*.py"), *(ROOT / "benchmarks").rglob("*.py")]:
        names = {
            node.attr for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Attribute)
        }
        names |= {node.id for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))) if isinstance(node, ast.Name)}
        if path.name != "folders.py":
            assert not names & {"rmtree", "removedirs"}, path
            assert "rmdir" not in names or path.parts[-2:] == ("checkpoints", "io.py"), path
    source = ast.parse(Path(module.__file__).read_text(encoding="utf-8"))
    calls = [node for node in ast.walk(source) if isinstance(node, ast.Call) and ast.unparse(node.func).endswith("rmtree")]
    assert {ast.unparse(call.args[0]) for call in calls} == {"path", "folder"}  # `_remove_temporary`, `remove_tree`
