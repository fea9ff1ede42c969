"""Kills and full disks while folders, tables and records are written: nothing is lost, nothing is half."""

from __future__ import annotations

import csv
import json
import os
import resource
import signal
import time
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path

import pytest

from helpers.attack import Attack
from opsd_lightning.runs.reader import read_complete_lines
from opsd_lightning.runs.record import Record
from opsd_lightning.utils.csv_tables import append_rows, prepare_table, unescape_formula
from opsd_lightning.utils.folders import MANIFEST, replace_folder

pytestmark = pytest.mark.integration


COLUMNS = ("step", "completion")


def killed(work: Callable[[], None], seconds: float) -> bool:
    """Run work in a child that is killed after some time; returns whether it was still at work."""
    child = os.fork()
    if not child:
        try:
            work()
        finally:
            os._exit(0)
    time.sleep(seconds)
    os.kill(child, signal.SIGKILL)
    return os.WIFSIGNALED(os.waitpid(child, 0)[1])


def export(folder: Path, version: int) -> None:
    with replace_folder(folder, "folder", "adapter") as temporary:
        for name in ("a", "b", "c"):
            (temporary / name).write_text(f"{version} " * 20_000)


def versions(folder: Path) -> set[str]:
    return {path.read_text().split(" ", 1)[0] for path in folder.iterdir() if path.name != MANIFEST}


def whole(folder: Path) -> bool:
    return {path.name for path in folder.iterdir()} == {"a", "b", "c", MANIFEST} and len(versions(folder)) == 1


def test_a_kill_during_an_export_leaves_the_old_or_the_new(attack: Attack, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    export(folder, 0)
    started = time.perf_counter()
    export(folder, 0)
    duration = time.perf_counter() - started
    (tmp_path / "mine").write_text("mine")
    hit = 0
    for number in range(1, attack.tries(sample=12, whole=300) + 1):

        def work(start: int = number) -> None:
            for version in range(100 * start, 100 * start + 99):
                export(folder, version)

        hit += killed(work, attack.random.uniform(0, 4 * duration))
        found = [path for path in tmp_path.iterdir() if path.is_dir() and not path.name.startswith(".")]
        assert any(whole(path) for path in found), (attack.round, number, sorted(tmp_path.iterdir()))
        assert not folder.exists() or whole(folder), (attack.round, number)
        attack.tried("kill during an export")
    assert hit
    export(folder, -1)
    export(folder, -2)
    assert versions(folder) == {"-2"} and sorted(path.name for path in tmp_path.iterdir()) == ["adapter", "mine"]


def test_a_kill_during_appends_repeats_no_row(attack: Attack, tmp_path: Path) -> None:
    """A run writes a table and a record, is killed, goes on from its last checkpoint, and so on."""
    path, last = tmp_path / "rollouts.csv", 0
    rows = {step: "=1+1\n\"q'" * attack.random.randint(1, 3000) for step in range(1, 2000)}
    reached = tmp_path / "checkpoint"
    for number in range(attack.tries(sample=15, whole=150)):

        def work(start: int = last) -> None:
            prepare_table(path, COLUMNS, start, keep=False)
            record = Record(tmp_path / "record", start, reached.read_text().split()[1] if start else None)
            record.start({}, [], "")
            for step in range(start + 1, len(rows)):
                append_rows(path, COLUMNS, [[step, rows[step]]])
                record.metrics("train", step, 0.0, 0, {"loss": 1.0})
                if step % 5 == 0:
                    partial = tmp_path / "partial"
                    partial.write_text(f"{step} {record.checkpoint(step)}")
                    partial.replace(reached)

        killed(work, attack.random.uniform(0.005, 0.06))
        last = int(reached.read_text().split()[0]) if reached.exists() else 0
        attack.tried("kill during appends")
        if not last:
            continue
        keep = [p for p in tmp_path.iterdir() if p.name.startswith(("record-", "rollouts-"))]
        assert all(
            json.loads((p / "run.json").read_text())["status"] for p in keep if p.is_dir() and (p / "run.json").exists()
        )

        def look(start: int = last) -> None:
            prepare_table(path, COLUMNS, start, keep=False)

        look()
        with path.open(newline="") as file:
            header, *found = list(csv.reader(file))
        assert tuple(header) == COLUMNS, (attack.round, number)
        assert [int(row[0]) for row in found] == list(range(1, last + 1)), (attack.round, number)
        assert all(unescape_formula(row[1]) == rows[int(row[0])] for row in found), (attack.round, number)
        steps = [line["step"] for line in read_complete_lines(tmp_path / "record" / "metrics.jsonl")]
        assert steps[:last] == list(range(1, last + 1)) and len(set(steps)) == len(steps), (attack.round, number)


def limited(bytes_: int, work: Callable[[], None]) -> int:
    """Run work in a child whose files may not grow above a size, as on a full disk; returns its exit status."""
    child = os.fork()
    if not child:
        status = 1
        try:
            resource.setrlimit(resource.RLIMIT_FSIZE, (bytes_, resource.RLIM_INFINITY))
            work()
            status = 0
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_a_full_disk_during_an_export_leaves_the_old(attack: Attack, tmp_path: Path) -> None:
    folder = tmp_path / "adapter"
    export(folder, 0)
    for number in range(attack.tries(sample=10, whole=100)):
        size = attack.random.randint(0, 39_000)
        assert limited(size, lambda: export(folder, 1)) == 1
        assert whole(folder) and versions(folder) == {"0"} and len(list(tmp_path.iterdir())) == 1, (
            attack.round,
            number,
            size,
        )
        attack.tried("full disk during an export")


def test_a_record_tells_the_truth_after_a_full_disk(attack: Attack, tmp_path: Path) -> None:
    """From a random step to a random step later, or to the end, nothing more fits."""
    for number in range(attack.tries(sample=10, whole=100)):
        folder = tmp_path / f"{number}" / "record"
        first = attack.random.randint(1, 30)
        until = attack.random.choice([attack.random.randint(first, 40), 1000])

        def work(folder: Path = folder, first: int = first, until: int = until) -> None:
            record = Record(folder, 0)
            record.start({}, [], "")
            for step in range(1, 41):
                if step == first:
                    size = (folder / "metrics.jsonl").stat().st_size if step > 1 else 0
                    resource.setrlimit(resource.RLIMIT_FSIZE, (max(size, 2000), resource.RLIM_INFINITY))
                if step == until:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
                record.metrics("train", step, 0.0, 0, {"loss": 1.0, "name" * 20: 1.0})
            record.end("finished", "", [])

        assert limited(resource.RLIM_INFINITY, work) == 0
        info = json.loads((folder / "run.json").read_text())
        steps = [line["step"] for line in read_complete_lines(folder / "metrics.jsonl")]
        assert info["status"] == "finished" and info["ended"], (attack.round, number)
        assert steps == list(range(1, len(steps) + 1)), (attack.round, number)
        lost = {} if len(steps) == 40 else {"metrics.jsonl": f"{40 - len(steps)} lines"}
        assert info["unwritten"] == lost and (until > 40 or not lost), (attack.round, number)
        attack.tried("full disk at a record")


@pytest.mark.skipif(os.geteuid() != 0, reason="a file system is mounted, which needs root")
def test_the_end_is_written_to_a_disk_without_room(attack: Attack, tmp_path: Path) -> None:
    disk = tmp_path / "disk"
    disk.mkdir()
    if os.system(f"mount -t tmpfs -o size=512k tmpfs {disk} 2>/dev/null"):
        pytest.skip("file systems cannot be mounted here")
    try:
        for number in range(attack.tries(sample=2, whole=30)):
            record = Record(disk / f"record{number}", 0)
            record.start({}, [], "")
            filler = disk / "filler"
            with filler.open("wb", buffering=0) as file, suppress(OSError):
                while True:
                    file.write(b"\0" * 4096)
            for step in range(1, attack.random.randint(2, 300)):
                record.metrics("train", step, 0.0, 0, {f"name {i}": 1.0 for i in range(20)})
            record.end("failed", "out of room", [])
            info = json.loads((disk / f"record{number}" / "run.json").read_text())
            assert info["status"] == "failed" and info["reason"] == "out of room", (attack.round, number)
            filler.unlink()
            for path in (disk / f"record{number}").iterdir():
                path.unlink()
            attack.tried("end of a run on a full disk")
    finally:
        os.system(f"umount {disk}")
