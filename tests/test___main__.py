"""A rank that Lightning has started ends where the first rank is gone, also before they are connected."""

from __future__ import annotations

import os
import select
import signal
import time
from pathlib import Path

import pytest

from helpers.processes import Child
from opsd_lightning import __main__

pytestmark = pytest.mark.integration


def test_ranks_end_with_the_first(tmp_path: Path) -> None:
    reader, writer = os.pipe()
    os.set_inheritable(writer, True)

    def rank() -> None:
        __main__._END_SECONDS = 0.1
        __main__.end_with_first_rank()
        os.write(writer, b"started")
        time.sleep(60)

    def first() -> None:
        os.environ.pop("TORCHELASTIC_RUN_ID", None)
        __main__.end_with_first_rank()
        Child(rank, tmp_path / "rank.log", {"LOCAL_RANK": "1"})
        time.sleep(60)

    parent = Child(first, tmp_path / "first.log", {"LOCAL_RANK": "0"})
    os.close(writer)
    assert os.read(reader, 100) == b"started"
    assert not select.select([reader], [], [], 1.5)[0]  # the first one lives, and so does the other
    parent.send(signal.SIGKILL)
    assert select.select([reader], [], [], 20)[0] and os.read(reader, 100) == b""  # closed: it is gone
    os.close(reader)
    parent.kill()
