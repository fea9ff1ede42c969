"""Check of a GGUF file's header against the size of the file.

A reader that trusts the counts in a damaged or hostile header may loop without end, for example over an array of 2^60
numbers that the file does not contain.
"""

from __future__ import annotations

import os
import stat
from functools import lru_cache
from pathlib import Path
from typing import BinaryIO

from opsd_lightning.types import ConfigError

_SIZES = {0: 1, 1: 1, 2: 2, 3: 2, 4: 4, 5: 4, 6: 4, 7: 1, 10: 8, 11: 8, 12: 8}  # bytes of each number type
_STRING, _ARRAY = 8, 9
_MOST_DIMENSIONS = 8
_MOST_ITEMS = 20_000_000  # in all arrays together: readers create objects for each item


class _Header:
    """Reader that parses counts, skips contents, and never goes beyond the end of the file."""

    def __init__(self, file: BinaryIO, size: int) -> None:
        self.file, self.size, self.order, self.items = file, size, "little", 0

    def number(self, count: int) -> int:
        found = self.file.read(count)
        if len(found) < count:
            raise ValueError("it ends within the header")
        return int.from_bytes(found, self.order)  # type: ignore[arg-type]

    def skip(self, count: int) -> None:
        if count > self.size - self.file.tell():
            raise ValueError(f"the header announces {count} bytes beyond the end of the file")
        self.file.seek(count, os.SEEK_CUR)

    def string(self) -> None:
        self.skip(self.number(8))

    def value(self, kind: int, deep: bool = False) -> None:
        if kind == _STRING:
            self.string()
        elif kind == _ARRAY and not deep:
            inner, count = self.number(4), self.number(8)
            self.items += count
            if self.items > _MOST_ITEMS:
                raise ValueError(f"the header announces an array of {count} items")
            if inner in _SIZES:
                self.skip(count * _SIZES[inner])
            else:
                for _ in range(count):
                    self.value(inner, deep=True)
        elif kind in _SIZES:
            self.skip(_SIZES[kind])
        else:
            raise ValueError(f"the header has a value of unknown type {kind}")

    def check(self) -> None:
        if self.file.read(4) != b"GGUF":
            raise ValueError("it does not start with GGUF")
        version = self.number(4)
        if version & 0xFFFF == 0:
            self.order, version = "big", version >> 24
        if version not in (2, 3):
            raise ValueError(f"version {version} is not supported")
        tensors, values = self.number(8), self.number(8)
        for _ in range(values):
            self.string()
            self.value(self.number(4))
        for _ in range(tensors):
            self.string()
            if (dimensions := self.number(4)) > _MOST_DIMENSIONS:
                raise ValueError(f"a tensor has {dimensions} dimensions")
            for _ in range(dimensions):
                if self.number(8) > self.size * 16:  # the narrowest types take about one bit
                    raise ValueError("a tensor is larger than the file")
            self.skip(12)  # data type and offset


def check_gguf(path: Path, setting: str) -> None:
    """Check that a GGUF file contains everything that its header announces.

    Args:
        path: The file.
        setting: Name of the setting that names the file, for errors.

    Raises:
        ConfigError: The file is truncated, damaged or not a GGUF file.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):
            raise ValueError("it is not a regular file")
        _check(path, status.st_size, status.st_mtime_ns)
    except (ValueError, OverflowError, OSError) as error:
        problem = f"{path} is damaged or not a GGUF file ({error})"
        raise ConfigError(problem, setting, "Download or convert the model again") from None


@lru_cache(maxsize=8)  # the size and the time of change invalidate the cache
def _check(path: Path, size: int, changed: int) -> None:
    with path.open("rb") as file:
        _Header(file, size).check()
