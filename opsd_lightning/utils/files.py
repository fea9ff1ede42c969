"""Files that are whole or not there, and data inside a page."""

from __future__ import annotations

import errno
import json
import os
from contextlib import suppress
from pathlib import Path
from typing import Any


def atomic_write(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a file under a temporary name, and rename it. Folders are made.

    Args:
        path: The file.
        content: Text is written in UTF-8; halves of surrogate pairs as ``\\udc80``.
        durable: Wait until the disk has it, where it must outlive the machine's end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process, or a link that somebody put there
        with temporary.open("xb") as file:
            file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
            if durable:
                file.flush()
                os.fsync(file.fileno())
        os.replace(temporary, path)
        if durable:
            fsync_path(path.parent)
    except OSError:
        with suppress(OSError):
            temporary.unlink(missing_ok=True)  # on a full disk it would only take room
        raise


def fsync_path(path: Path) -> None:
    """Wait until the disk has a file's contents, or a folder's names, where the file system can."""
    try:
        handle = os.open(path, os.O_RDONLY)
        try:
            os.fsync(handle)
        finally:
            os.close(handle)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.ENOTSUP, errno.EACCES):
            raise


def append(path: Path, content: bytes, durable: bool = False) -> None:
    """Append to a file, all or nothing. A process that is killed within it may still leave a part.

    Args:
        path: The file.
        content: Bytes to append.
        durable: Wait until the disk has it.

    Raises:
        OSError: It cannot be written, or is a link. The file is as it was.
    """
    flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | getattr(os, "O_NOFOLLOW", 0)
    with open(os.open(path, flags, 0o666), "ab", buffering=0) as file:
        size, rest = file.seek(0, os.SEEK_END), memoryview(content)
        try:
            while rest:
                rest = rest[file.write(rest) :]
            if durable:
                os.fsync(file.fileno())
        except OSError:
            os.ftruncate(file.fileno(), size)
            raise


def script_json(value: Any) -> str:
    """JSON in ASCII without anything that could end a script element or begin a comment in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
