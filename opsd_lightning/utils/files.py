"""Atomic file writes, remote paths, and JSON for embedding in HTML pages."""

from __future__ import annotations

import errno
import json
import os
import re
from contextlib import suppress
from pathlib import Path
from typing import Any

#: A URL scheme of at least two letters, unlike a Windows drive, or a chain such as ``simplecache::s3://``.
SCHEME = re.compile(r"(?:registry:|[A-Za-z][A-Za-z0-9+.\-]+:/|[A-Za-z][A-Za-z0-9+.\-]*::)")


def is_remote(path: str | os.PathLike[str]) -> bool:
    """Return True if a path is a URL of any scheme and there is no local file of that name."""
    text = os.fspath(path)
    return isinstance(text, str) and SCHEME.match(text) is not None and "\0" not in text and not os.path.lexists(text)


def atomic_write(path: Path, content: str | bytes, durable: bool = False) -> None:
    """Write a file under a temporary name, then rename it. Missing folders are created.

    Args:
        path: The file.
        content: Bytes, or text to be encoded as UTF-8. Lone surrogates are written as ``\\udc80``.
        durable: If True, wait until the content is on disk, so that it survives a crash of the machine.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    try:
        temporary.unlink(missing_ok=True)  # left by a killed process, or a link placed by someone else
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
            temporary.unlink(missing_ok=True)  # free its space on a full disk
        raise


def fsync_path(path: Path) -> None:
    """Flush a file, or the entries of a folder, to disk. File systems without fsync are ignored."""
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
    """Append to a file, and restore its former length if that fails. A killed process may still leave a partial write.

    Args:
        path: The file.
        content: Bytes to append.
        durable: If True, wait until the content is on disk.

    Raises:
        OSError: The file cannot be written or is a symbolic link. The file is unchanged.
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
    """Serialize a value as ASCII JSON that cannot close a script element or open a comment in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
