"""Files that are whole or not there, and data inside a page."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any


def replace(path: Path, content: str | bytes, lasting: bool = False) -> None:
    """Write a file under a temporary name, and rename it. Folders are made.

    Args:
        path: The file.
        content: Text is written in UTF-8; halves of surrogate pairs as ``\\udc80``.
        lasting: Wait until the disk has it, where it must outlive the machine's end.
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    temporary = path.with_name(f".{path.name}.partial")
    with temporary.open("wb") as file:
        file.write(content.encode("utf-8", "backslashreplace") if isinstance(content, str) else content)
        if lasting:
            file.flush()
            os.fsync(file.fileno())
    os.replace(temporary, path)


def script_json(value: Any) -> str:
    """JSON in ASCII without anything that could end a script element or begin a comment in it."""
    text = json.dumps(value, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
