"""Tests of atomic writes in folders that others can write to."""

from __future__ import annotations

from pathlib import Path

import pytest

from opsd_lightning.utils.files import append, atomic_write


@pytest.mark.parametrize("durable", [False, True])
def test_a_link_in_the_place_of_the_temporary_file_is_not_followed(tmp_path: Path, durable: bool) -> None:
    mine, page = tmp_path / "mine.txt", tmp_path / "report.html"
    mine.write_text("mine")
    (tmp_path / ".report.html.partial").symlink_to(mine)
    atomic_write(page, "page", durable)
    assert mine.read_text() == "mine" and page.read_text() == "page" and not page.is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["mine.txt", "report.html"]


def test_a_link_is_not_appended_to(tmp_path: Path) -> None:
    mine, table = tmp_path / "mine.txt", tmp_path / "rollouts.csv"
    mine.write_text("mine")
    table.symlink_to(mine)
    with pytest.raises(OSError, match="rollouts"):
        append(table, b"row")
    assert mine.read_text() == "mine"


def test_rows_are_appended_to_a_file_that_is_made(tmp_path: Path) -> None:
    for row in (b"one\n", b"two\n"):
        append(tmp_path / "rows", row, durable=True)
    assert (tmp_path / "rows").read_bytes() == b"one\ntwo\n"
