"""Job of a worker: score answers with the data sets of reasoning-gym. Runs in the process of ``worker``.

Some data sets evaluate the answer's text, by ``eval`` or sympy's parser. While an answer is scored, evaluated text may only
call functions of sympy and arithmetic ones, and files, processes, sockets and modules of the system are closed.
"""

from __future__ import annotations

import builtins
import dis
import os
import sys
from collections.abc import Callable, Mapping
from datetime import date, datetime
from decimal import Decimal
from fractions import Fraction
from types import CodeType
from typing import Any

MEMORY = 2 << 30
"""Limit of a worker's address space in bytes. Has no effect on macOS."""

_Answer = Callable[[Any], Any]

#: Beginnings of the names of audit events that are refused while an answer is scored.
_DENIED = tuple(
    "os. subprocess. socket. shutil. ctypes. pty. fcntl. mmap. signal. tempfile. ftplib. http. smtplib. urllib. webbrowser. "
    "gc. code. function. cpython. sqlite3. builtins.input glob. resource. sys.settrace sys.setprofile sys.addaudithook "
    "sys._current syslog. setopencodehook pathlib. winreg.".split()
)
_ALLOWED = {"os.listdir", "os.scandir", "os.getxattr"}  # of imports
_SAFE_BUILTINS = {
    "abs",
    "max",
    "min",
    "sum",
    "pow",
    "round",
    "int",
    "float",
    "complex",
    "range",
    "len",
    "list",
    "tuple",
    "sorted",
}
_INSTRUCTIONS = ("LOAD_ATTR", "LOAD_METHOD", "LOAD_SUPER", "STORE_ATTR", "DELETE_", "IMPORT_", "STORE_GLOBAL", "STORE_NAME")


def encode(value: Any) -> Any:
    """Return a JSON value that stands for an entry of a data set, whose values JSON alone cannot hold, such as tuples.

    Raises:
        TypeError: The entry holds a value of another type.
    """
    if isinstance(value, Mapping):
        return {"dict": [[encode(name), encode(each)] for name, each in value.items()]}
    for kind in (list, tuple, set, frozenset):
        if isinstance(value, kind):
            return {kind.__name__: [encode(each) for each in value]}
    if value is None or isinstance(value, (bool, int, float)):
        return value
    if isinstance(value, str):
        return str(value)
    if isinstance(value, complex):
        return {"complex": [value.real, value.imag]}
    if isinstance(value, (Fraction, Decimal)):
        return {type(value).__name__: str(value)}
    if isinstance(value, (datetime, date)):
        return {type(value).__name__: value.isoformat()}
    if hasattr(value, "item"):  # a number of numpy
        return encode(value.item())
    raise TypeError(f"the entry holds a {type(value).__name__}")


_DECODERS: dict[str, Callable[[Any], Any]] = {
    "list": lambda parts: [decode(each) for each in parts],
    "tuple": lambda parts: tuple(decode(each) for each in parts),
    "set": lambda parts: {decode(each) for each in parts},
    "frozenset": lambda parts: frozenset(decode(each) for each in parts),
    "dict": lambda parts: {decode(name): decode(each) for name, each in parts},
    "complex": lambda parts: complex(*parts),
    "Fraction": Fraction,
    "Decimal": Decimal,
    "datetime": datetime.fromisoformat,
    "date": date.fromisoformat,
}


def decode(value: Any) -> Any:
    """Return what `encode` was given."""
    if not isinstance(value, dict):
        return value
    ((kind, parts),) = value.items()
    return _DECODERS[kind](parts)


def make_dataset(task: str, options: Mapping[str, Any]) -> Any:
    """Return a data set of reasoning-gym.

    Args:
        task: Name of the task. ``composite`` takes its parts as objects with name, weight and config.
        options: Settings of the task.
    """
    import reasoning_gym
    from reasoning_gym.composite import DatasetSpec

    options = dict(options)
    if task == "composite":
        options["datasets"] = [DatasetSpec(**{"weight": 1.0, "config": {}} | part) for part in options.get("datasets") or ()]
    return reasoning_gym.create_dataset(task, **options)


def load() -> _Answer:
    """Import reasoning-gym and return a function that scores an answer.

    A question of the function is the task, its options, the encoded entry and the answer. The answer to it is a score, which
    need not be from 0 to 1, or an empty list if the data set cannot read the text.
    """
    import random

    import reasoning_gym  # noqa: F401

    guard = _Guard()
    sys.addaudithook(guard)
    known: dict[str, Any] = {}

    def score(question: Any) -> Any:
        task, options, entry, text = question
        key = repr((task, options))
        if key not in known:
            known.clear()  # a run has one task, or a few
            known[key] = make_dataset(task, options)
        random.seed(0)
        item = decode(entry)
        guard.closed = True
        try:
            return float(known[key].score_answer(text, item))
        except MemoryError:
            raise
        except Exception:  # text that the data set cannot read
            return []
        finally:
            guard.closed = False

    return score


class _Guard:
    """Audit hook that refuses what scoring an answer does not need.

    Attributes:
        closed: True while an answer is scored.
    """

    def __init__(self) -> None:
        self.closed = False
        self._library = os.path.dirname(os.__file__)
        roots = {sys.prefix, sys.base_prefix, *(path for path in sys.path if os.path.isabs(path))}
        self._readable = tuple(os.path.join(root, "") for root in roots)
        self._builtins = frozenset(vars(builtins)) - _SAFE_BUILTINS

    def __call__(self, event: str, arguments: tuple[Any, ...]) -> None:
        if not self.closed:
            return
        if event == "exec":
            self._check_code(arguments[0], sys._getframe(1).f_code.co_filename)
        elif event == "open":
            path, _, flags = arguments
            written = (flags or 0) & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND)
            if written or not isinstance(path, str) or not os.path.abspath(path).startswith(self._readable):
                raise PermissionError("an answer opens a file")
        elif event.startswith(_DENIED) and event not in _ALLOWED:
            raise PermissionError(f"an answer calls {event}")

    def _check_code(self, code: CodeType, caller: str) -> None:
        """Refuse evaluated text with attributes, imports or names other than those of functions.

        Args:
            code: The compiled text.
            caller: File of the code that evaluates it.

        Raises:
            PermissionError: The code is refused.
        """
        if os.path.isfile(code.co_filename):
            return  # an imported module
        if caller.startswith(self._library) and "site-packages" not in caller:
            return  # a dataclass or a named tuple of an imported module
        if code.co_names == ("sympy",) and caller.endswith(os.path.join("sympy", "parsing", "sympy_parser.py")):
            return  # the parser's own names: "from sympy import *"
        for instruction in dis.get_instructions(code):
            name = instruction.argval
            if instruction.opname.startswith(_INSTRUCTIONS):
                raise PermissionError(f"an answer has the instruction {instruction.opname}")
            if isinstance(name, CodeType):
                self._check_code(name, caller)
            elif instruction.opname in ("LOAD_NAME", "LOAD_GLOBAL") and (name in self._builtins or name.startswith("_")):
                raise PermissionError(f"an answer names {name}")
