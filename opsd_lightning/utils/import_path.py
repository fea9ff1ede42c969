"""Control whether the ``opsd`` command can import modules from the current folder.

A downloaded folder may contain a ``json.py`` or a ``wandb.py``, which must not shadow the real modules. The current folder
is therefore removed from ``sys.path``. If the settings name a module in it, it is appended as the last entry.
"""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def without_current_folder() -> Iterator[None]:
    """Remove the current folder from ``sys.path``, where ``python -m``, ``python -c`` or a script put it first.

    A folder that ``PYTHONPATH`` names stays. The former path is restored at the end of the block. Child processes, such as
    spawned ranks, run with ``PYTHONSAFEPATH``, unless this package itself is imported from the current folder.
    """
    before = list(sys.path)
    if sys.flags.safe_path:
        os.environ["PYTHONSAFEPATH"] = "1"
    try:
        here = os.path.realpath(os.getcwd())
        if os.path.realpath(Path(__file__).parents[2]) != here:
            os.environ["PYTHONSAFEPATH"] = "1"
        parts = [] if sys.flags.ignore_environment else os.environ.get("PYTHONPATH", "").split(os.pathsep)
        explicit = any(part and os.path.realpath(part) == here for part in parts)
        leading = 0 if sys.flags.safe_path else 1  # the interpreter's own entry
        if not explicit and not all(parts):  # an empty part of PYTHONPATH also means the current folder
            leading += len(parts)
        sys.path[:] = [entry for n, entry in enumerate(sys.path) if n >= leading or os.path.realpath(entry) != here]
    except OSError:  # the current folder is gone
        pass
    try:
        yield
    finally:
        sys.path[:] = before


def add_current_folder(arguments: Sequence[str]) -> None:
    """Append the current folder to ``sys.path`` if arguments or config files name a module in it.

    Args:
        arguments: Arguments of a command that instantiates classes named in its settings.
    """
    import re
    from importlib.util import find_spec

    try:
        here = os.getcwd()
    except OSError:
        return
    # A dotted path surrounded by separators, such as the value of class_path.
    path = re.compile(r"(?:^|(?<=[\s=:,\[({\"']))([^\W\d]\w*)(?:\.[^\W\d]\w*)*\.([^\W\d]\w*)(?=$|[\s,:\])}\"'])")
    for text in _texts(arguments):
        for found in path.finditer(re.sub(r"(?m)(?:^|\s)#.*$", "", text)):
            name, ending = found[1], found[2].lower()
            if ending in _FILES or not _is_module(here, name):
                continue
            try:
                elsewhere = name in sys.modules or find_spec(name) is not None
            except (ImportError, ValueError):
                elsewhere = True
            if not elsewhere:
                sys.path.append(here)
                return


_FILES = {"yaml", "yml", "json", "jsonl", "csv", "parquet", "txt", "md", "html", "htm", "ckpt", "gguf", "safetensors", "py"}
_LARGEST_BYTES, _MOST_FILES = 2**20, 100


def _texts(arguments: Sequence[str]) -> Iterator[str]:
    """Yield the arguments, then the text of every config file that they or these files name."""
    yield from arguments
    waiting = [(".", part) for argument in arguments for part in (argument, argument.partition("=")[2]) if part]
    seen: set[str] = set()
    while waiting and len(seen) < _MOST_FILES:
        folder, name = waiting.pop(0)
        for path in dict.fromkeys((os.path.join(folder, name), name)):
            try:
                if path in seen or not os.path.isfile(path) or os.path.getsize(path) > _LARGEST_BYTES:
                    continue
                seen.add(path)
                with open(path, encoding="utf-8", errors="replace") as file:
                    text = file.read(_LARGEST_BYTES)
            except (OSError, ValueError):
                continue
            yield text
            words = (word.strip("\"',[]{}") for word in text.replace(":", " ").split())
            waiting += [(os.path.dirname(path), word) for word in words if word.lower().endswith((".yaml", ".yml", ".json"))]


def _is_module(folder: str, name: str) -> bool:
    """Return True if a folder contains a module or package of this name."""
    try:
        entries = os.listdir(folder)
        inner = os.listdir(os.path.join(folder, name)) if os.path.isdir(os.path.join(folder, name)) else []
    except OSError:
        return False
    endings = (".py", ".pyc", ".so", ".pyd")
    alone = any(entry.startswith(f"{name}.") and entry.endswith(endings) for entry in entries)
    return alone or any(entry.endswith(endings) or os.path.isdir(os.path.join(folder, name, entry)) for entry in inner)
