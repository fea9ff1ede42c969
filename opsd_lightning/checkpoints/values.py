"""Load plain values of numpy, collections, datetime, pathlib and decimal in a checkpoint without calling their classes.

``torch.load(weights_only=True)`` rejects them. Here each class is replaced by a stand-in of this module, which accepts only
the serialized form of plain values.
"""

from __future__ import annotations

import datetime
import re
from collections import defaultdict, deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from decimal import Decimal
from pathlib import Path, PurePosixPath
from typing import Any

import numpy as np
import torch

#: Codes of numpy types whose values are stored as raw bytes.
_DTYPE = re.compile(r"(b1|[iuf][1248]|c8|c16|[SU]\d{1,6})")
_FACTORIES = (bool, dict, float, int, list, set, str, tuple)


class _DType:
    """Stand-in for ``numpy.dtype``."""

    __hash__ = None  # type: ignore[assignment]

    def __init__(self, code: str, *_: Any) -> None:
        self.code, self.order = str(code), "="
        _require(_DTYPE.fullmatch(self.code))

    def __setstate__(self, state: Any) -> None:
        _require(isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", ">", "|", "="))
        self.order = state[1]

    @property
    def value(self) -> np.dtype[Any]:
        return np.dtype(self.order + self.code)


class _Array:
    """Stand-in for ``numpy.ndarray``."""

    __hash__ = None  # type: ignore[assignment]
    value: Any = None

    def __setstate__(self, state: Any) -> None:
        _require(isinstance(state, tuple) and len(state) == 5)
        _, shape, dtype, fortran, content = state
        _require(isinstance(dtype, _DType) and isinstance(content, bytes) and isinstance(shape, tuple))
        self.value = np.frombuffer(content, dtype.value).reshape(shape, order="F" if fortran else "C").copy("K")


class _Factory:
    """Stand-in for a built-in class, which only a ``defaultdict`` may refer to."""

    def __init__(self, kind: type) -> None:
        self.kind = kind


class _StandIns:
    """Stand-ins of one load, and the conversion of its result.

    ``deque`` and ``defaultdict`` are loaded as a list and a dict, which torch can fill, and converted at the end.
    """

    def __init__(self) -> None:
        self.made: dict[int, tuple[Any, Callable[[Any], Any]]] = {}
        self.done: dict[int, Any] = {}

    def stand_ins(self) -> list[Any]:
        found: dict[str, Any] = {"numpy.dtype": _DType, "numpy.ndarray": _Array}
        for package in ("numpy._core", "numpy.core"):  # numpy 2 and numpy 1
            found |= {f"{package}.multiarray.scalar": _scalar, f"{package}.multiarray._reconstruct": _array}
        taken = {_name(one) for one in torch.serialization.get_safe_globals()}
        if not taken.isdisjoint(found):  # the user has allowed numpy's classes
            found = {}
        for kind in (datetime.datetime, datetime.date, datetime.time, datetime.timedelta, datetime.timezone):
            found[f"datetime.{kind.__name__}"] = _constructor(kind, (int, str, bytes, datetime.timedelta, datetime.timezone))
        for name, path in {"PosixPath": Path, "PurePosixPath": PurePosixPath}.items():
            found[f"pathlib.{name}"] = found[f"pathlib._local.{name}"] = _constructor(path, (str,))
        found |= {"decimal.Decimal": _constructor(Decimal, (str,)), "builtins.frozenset": _constructor(frozenset, (list,))}
        found |= {"builtins.range": _constructor(range, (int,)), "builtins.slice": _constructor(slice, (int, type(None)))}
        found |= {"builtins.bytes": _constructor(bytes, ())}
        found |= {f"builtins.{kind.__name__}": _Factory(kind) for kind in _FACTORIES}
        found |= {"collections.deque": self._deque, "collections.defaultdict": self._defaultdict}
        return [(value, name) for name, value in found.items() if name not in taken]

    def _deque(self, items: Any = (), maxlen: Any = None) -> list[Any]:
        _require(isinstance(items, (list, tuple)) and (maxlen is None or type(maxlen) is int))
        return self._keep(list(items), lambda filled: deque(filled, maxlen))

    def _defaultdict(self, factory: Any = None) -> dict[Any, Any]:
        _require(factory is None or isinstance(factory, _Factory))
        return self._keep({}, lambda filled: defaultdict(factory and factory.kind, filled))

    def _keep(self, value: Any, finish: Callable[[Any], Any]) -> Any:
        self.made[id(value)] = (value, finish)
        return value

    def finished(self, value: Any) -> Any:
        """Replace all stand-ins in a value. Mutable containers keep their identity."""
        if isinstance(value, (_Array, _DType)):
            return value.value
        _require(not isinstance(value, _Factory))
        if not isinstance(value, (dict, list, tuple)):
            return value
        if id(value) in self.done:
            return self.done[id(value)]
        self.done[id(value)] = value
        if isinstance(value, dict):
            for key, part in value.items():
                value[key] = self.finished(part)
        elif isinstance(value, list):
            value[:] = [self.finished(part) for part in value]
        elif type(value) is tuple:
            parts = [self.finished(part) for part in value]
            if any(new is not old for new, old in zip(parts, value, strict=True)):
                self.made[id(value)] = (value, lambda _: tuple(parts))
        if id(value) in self.made:
            self.done[id(value)] = self.made[id(value)][1](value)
        return self.done[id(value)]


@contextmanager
def plain_values() -> Iterator[Callable[[Any], Any]]:
    """Let ``torch.load(weights_only=True)`` accept plain values inside the block.

    Yields:
        A function to which the loaded value must be passed. It returns the final value.
    """
    values = _StandIns()
    with torch.serialization.safe_globals(values.stand_ins()):
        yield values.finished


def _name(one: Any) -> str:
    return str(one[1]) if isinstance(one, tuple) else f"{one.__module__}.{one.__qualname__}"


def _require(holds: object) -> None:
    if not holds:
        raise ValueError("not a plain value")


def _constructor(kind: Callable[..., Any], takes: tuple[type, ...]) -> Callable[..., Any]:
    """Return a function that calls a class after checking that all arguments have the given types."""

    def make(*arguments: Any) -> Any:
        _require(all(isinstance(one, takes) for one in arguments))
        return kind(*arguments)

    return make


def _scalar(dtype: Any, content: Any) -> Any:
    _require(isinstance(dtype, _DType) and isinstance(content, bytes) and len(content) == dtype.value.itemsize)
    return np.frombuffer(content, dtype.value)[0]


def _array(*_: Any) -> _Array:
    return _Array()
