"""Objects of another process: the tests' process uses what the code under test defines, but shares no interpreter with it.

Both processes send values as JSON. Plain data are copied, and so are instances of common classes of the standard library
and NumPy's arrays. Lists, dictionaries and sets that a call changes are changed in the caller too. All else stays where it
is: the tests get a `Remote` in its place, the code under test a function that calls back.

The code under test may send anything. The tests' side therefore builds plain data only, imports only what `_MODULES` lists,
and never asks an object of the other process whether it equals an expected value (see `Remote`).
"""

from __future__ import annotations

import builtins
import importlib
import io
import itertools
import json
import operator
import os
import struct
import sys
import threading
import traceback
from collections import Counter, OrderedDict, defaultdict, deque
from collections.abc import Callable, Iterator, Mapping
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from fractions import Fraction
from types import ModuleType
from typing import Any

MOST_BYTES = 1 << 25
"""Size of the largest message."""

_MOST_ITEMS = 100_000  # of an iterator that the tests pass
_LONGEST_ERROR = 10_000  # characters of the text of an exception
_MOST_OUTPUT = 100_000  # characters of printed text that are kept
_HEADER = struct.Struct("!I")
_SCALARS = (type(None), bool, int, float, str)
_BASES = (str, bytes, int, float, tuple, list, dict, set, frozenset)
# Modules whose functions and classes are the same in both processes.
_MODULES = frozenset(
    "abc bisect cmath collections collections.abc copy dataclasses datetime decimal enum fractions functools heapq "
    "itertools json math numbers numpy operator random re statistics string time typing".split()
)
_INNER = {  # where functions and classes of these modules say that they are defined
    "_bisect": "bisect", "_collections": "collections", "_datetime": "datetime", "_decimal": "decimal", "_heapq": "heapq",
    "_functools": "functools", "_operator": "operator", "_pydatetime": "datetime", "_collections_abc": "collections.abc",
}  # fmt: skip

Encoded = Any
Call = Callable[..., Any]


class EndedError(BaseException):
    """The other process has ended. Not an `Exception`, so that no test catches it."""


def send(connection: int, message: object) -> None:
    """Send a message.

    Raises:
        EndedError: The other process has ended.
        ValueError: The message is too large, or no JSON.
    """
    data = json.dumps(message).encode()
    if len(data) > MOST_BYTES:
        raise ValueError(f"a value of {len(data)} bytes is too large")
    data = _HEADER.pack(len(data)) + data
    try:
        while data:
            data = data[os.write(connection, data) :]
    except OSError:
        raise EndedError from None


def receive(connection: int) -> Any:
    """Return the next message.

    Raises:
        EndedError: The other process has ended, or sends no message of this module.
    """
    (size,) = _HEADER.unpack(_read(connection, _HEADER.size))
    if size > MOST_BYTES:
        raise EndedError
    try:
        return json.loads(_read(connection, size))
    except (ValueError, RecursionError):
        raise EndedError from None


def _read(connection: int, size: int) -> bytes:
    found = bytearray()
    while len(found) < size:
        try:
            part = os.read(connection, min(size - len(found), 1 << 20))
        except OSError:
            part = b""
        if not part:
            raise EndedError
        found += part
    return bytes(found)


# -- values ----------------------------------------------------------------------------------------------------------------


class _Codec:
    """Values as JSON: scalars as they are, all else as a list that starts with its kind."""

    def encode(self, value: Any) -> Encoded:
        kind = type(value)
        if value is None or kind in (bool, float, str):
            return value
        if kind is int:
            return value if value.bit_length() < 4000 else ["int", hex(value)]
        if kind in (list, tuple, set, frozenset, deque):
            return [kind.__name__, *map(self.encode, value)]
        if kind in (dict, OrderedDict, Counter, defaultdict):
            name = "dict" if kind is defaultdict else kind.__name__
            return [name, *([self.encode(key), self.encode(each)] for key, each in value.items())]
        if kind in (bytes, bytearray):
            return [kind.__name__, value.decode("latin-1")]
        if kind in (complex, range, slice, Fraction, Decimal, date, datetime, time, timedelta):
            return [kind.__name__, *_parts(value)]
        if value is Ellipsis or value is NotImplemented:
            return [str(value)]
        if (
            str(kind.__module__).partition(".")[0] == "numpy"
            and getattr(getattr(value, "dtype", None), "kind", "-") in "biufc"
        ):
            if kind.__name__ != "ndarray":
                return self.encode(value.item())
            return ["ndarray", value.dtype.str, list(value.shape), self.encode(value.ravel().tolist())]
        if isinstance(value, ModuleType) and value.__name__ in _MODULES:
            return ["module", value.__name__]
        return self.encode_shared(value) or self.encode_other(value)

    def encode_shared(self, value: Any) -> Encoded:
        """Return the name of a function or class of the standard library, or None."""
        name, module = getattr(value, "__qualname__", None), getattr(value, "__module__", None)
        if not callable(value) or type(name) is not str or type(module) is not str:
            return None
        module = _INNER.get(module, module)
        if module != "builtins" and module not in _MODULES:
            return None
        known = sys.modules.get(module)
        return ["shared", module, name] if getattr(known, name, None) is value else None

    def decode(self, data: Encoded) -> Any:
        if not isinstance(data, list):
            return data
        kind, *parts = data
        if kind in ("list", "tuple", "set", "frozenset", "deque"):
            return _CLASSES[kind](map(self.decode, parts))
        if kind in ("dict", "OrderedDict", "Counter"):
            return _CLASSES[kind]({self.decode(key): self.decode(each) for key, each in parts})
        if kind in ("bytes", "bytearray"):
            return _CLASSES[kind](parts[0].encode("latin-1"))
        if kind == "int":
            return int(parts[0], 16)
        if kind in ("Ellipsis", "NotImplemented"):
            return getattr(builtins, kind)
        if kind == "ndarray":
            return _array(parts[0], parts[1], self.decode(parts[2]))
        if kind == "module" and parts[0] in _MODULES:
            return importlib.import_module(parts[0])
        if kind == "shared":
            return self.decode_shared(*parts)
        if kind in _CLASSES:
            return _CLASSES[kind](*parts)
        return self.decode_other(kind, parts)

    def decode_shared(self, module: str, name: str) -> Any:
        if module != "builtins" and module not in _MODULES:
            raise ValueError(f"{module} is not shared")
        return getattr(importlib.import_module(module), name)

    def encode_other(self, value: Any) -> Encoded:
        raise NotImplementedError

    def decode_other(self, kind: str, parts: list[Any]) -> Any:
        raise NotImplementedError

    def encode_error(self, error: BaseException) -> Encoded:
        """Encode an exception: its class, plain arguments and attributes, text, and a message with the line of the code."""
        arguments = [each for each in error.args if type(each) in _SCALARS]
        attributes = {name: each for name, each in vars(error).items() if type(each) in _SCALARS}
        frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename == SOLUTION]
        where = f" (line {frames[-1].lineno} of the code)" if frames else ""
        text = str(error)[:_LONGEST_ERROR]
        message = f"{type(error).__name__}: {text}{where}"
        return [self.encode(type(error)), self.encode(arguments), self.encode(attributes), text, message]


SOLUTION = "<solution>"
"""File name of the code under test, in tracebacks."""

_CLASSES: dict[str, Any] = {
    each.__name__: each
    for each in (list, tuple, set, frozenset, deque, dict, OrderedDict, Counter, bytes, bytearray, complex, range, slice,
                 Fraction, Decimal, timedelta)
}  # fmt: skip
_CLASSES |= {"date": date.fromisoformat, "datetime": datetime.fromisoformat, "time": time.fromisoformat}


def _parts(value: Any) -> list[Any]:
    """Return arguments that make an equal value."""
    if isinstance(value, complex):
        return [value.real, value.imag]
    if isinstance(value, (range, slice)):
        return [value.start, value.stop, value.step]
    if isinstance(value, timedelta):
        return [value.days, value.seconds, value.microseconds]
    return [value.isoformat() if isinstance(value, (date, time)) else str(value)]


def _array(dtype: str, shape: list[int], values: list[Any]) -> Any:
    import numpy

    if numpy.dtype(dtype).kind not in "biufc":
        raise ValueError(f"arrays of {dtype} are not sent")
    return numpy.array(values, dtype=dtype).reshape(shape)


def _restore(old: Any, new: Any) -> None:
    """Change a list, dictionary or set in place to what it became in the other process, and those inside it."""
    if type(old) is not type(new):
        return
    if isinstance(old, (list, deque)):
        kept = [_merged(*pair) for pair in zip(old, new, strict=False)]
        changed = kept + list(new)[len(kept) :]
        old.clear()
        old.extend(changed)
    elif isinstance(old, dict):
        changed_items = {key: _merged(old.get(key), value) for key, value in new.items()}
        old.clear()
        old.update(changed_items)
    elif isinstance(old, set):
        old.clear()
        old.update(new)
    elif isinstance(old, bytearray):
        old[:] = new
    elif isinstance(old, tuple):
        for pair in zip(old, new, strict=False):
            _restore(*pair)


def _merged(old: Any, new: Any) -> Any:
    if type(old) is type(new) and isinstance(old, (list, dict, set, deque, bytearray)):
        _restore(old, new)
        return old
    return new


def _changes(value: Any) -> bool:
    return isinstance(value, (list, dict, set, deque, bytearray, tuple))


# -- the code under test ---------------------------------------------------------------------------------------------------


class Output(io.TextIOBase):
    """A text stream that keeps the beginning of what is printed."""

    def __init__(self) -> None:
        self._parts: list[str] = []
        self._left = _MOST_OUTPUT

    def writable(self) -> bool:
        return True

    def write(self, text: str) -> int:
        if self._left > 0:
            self._parts.append(text[: self._left])
            self._left -= len(self._parts[-1])
        return len(text)

    def take(self) -> str:
        text, self._parts = "".join(self._parts), []
        return text


class Server(_Codec):
    """Serves the objects of the code under test, in its process.

    Args:
        connection: File descriptor of the socket to the tests' process.
        output: Stream that replaced the standard output.
    """

    def __init__(self, connection: int, output: Output) -> None:
        self._connection, self._output = connection, output
        self._objects: dict[int, Any] = {}
        self._numbers: dict[int, int] = {}

    def encode_shared(self, value: Any) -> Encoded:
        found = super().encode_shared(value)  # the tests' side takes no built-in functions, such as exec
        return None if found and found[1] == "builtins" and not isinstance(value, type) else found

    def encode_other(self, value: Any) -> Encoded:
        number = self._numbers.setdefault(id(value), len(self._numbers))
        self._objects[number] = value  # which keeps its id
        if isinstance(value, type) and issubclass(value, BaseException):
            return ["exception", number, value.__name__, self.encode(value.__mro__[1])]
        base = next((each for each in _BASES if isinstance(value, each)), None)
        snapshot = None if base is None or isinstance(value, type) else self.encode(_plain(base, value))
        kind = type(value).__name__ if not isinstance(value, type) else ""
        return ["remote", number, kind, snapshot]

    def decode_other(self, kind: str, parts: list[Any]) -> Any:
        if kind == "remote":
            return self._objects[parts[0]]
        if kind == "iterator":
            return iter([self.decode(each) for each in parts])
        if kind == "callback":
            return _Callback(self, parts[0])
        raise ValueError(kind)

    def serve(self, namespace: Mapping[str, Any]) -> None:
        """Answer requests until the tests end."""
        operations: dict[str, Call] = {
            "names": lambda: self._names(namespace), "call": lambda function, args, more: function(*args, **more),
            "get": getattr, "set": setattr, "del": delattr, "isinstance": isinstance, "issubclass": issubclass,
            "operator": lambda name, *values: _operators[name](*values), "await": _run_coroutine,
        }  # fmt: skip
        while True:
            name, *parts = receive(self._connection)
            reply: dict[str, Any] = {}
            try:
                values = [self.decode(part) for part in parts]
                before = [self.encode(each) for each in values[1]] if name == "call" else []
                result = operations[name](*values)
                if name == "call":
                    reply["changed"] = self._changed(values[1], before)
                    reply["same"] = next((n for n, each in enumerate(values[1]) if each is result and _changes(each)), None)
                reply["ok"] = result if name == "names" else self.encode(result)
            except BaseException as error:
                reply = {"changed": reply.get("changed"), "error": self.encode_error(error)}
            reply["printed"] = self._output.take()
            try:
                send(self._connection, reply)
            except ValueError as error:
                send(self._connection, {"error": self.encode_error(error)})

    def _names(self, namespace: Mapping[str, Any]) -> Encoded:
        found = {}
        for name, value in namespace.items():
            if not name.startswith("__"):
                try:
                    found[name] = self.encode(value)
                except Exception:
                    continue  # a value that cannot be sent, such as a list that holds itself
        return found

    def _changed(self, arguments: Any, before: list[Encoded]) -> dict[int, Encoded]:
        after = {number: self.encode(each) for number, each in enumerate(arguments) if _changes(each)}
        return {number: data for number, data in after.items() if data != before[number]}

    def call_back(self, number: int, arguments: tuple[Any, ...], named: Mapping[str, Any]) -> Any:
        """Call a function of the tests."""
        message = {"callback": number, "args": self.encode(list(arguments)), "kwargs": self.encode(dict(named))}
        send(self._connection, message)
        reply = receive(self._connection)
        if "error" in reply:
            error = getattr(builtins, str(reply["error"][0]), Exception)
            raise error(reply["error"][1])
        return self.decode(reply["ok"])


class _Callback:
    """A function of the tests, for the code under test."""

    def __init__(self, server: Server, number: int) -> None:
        self._server, self._number = server, number

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._server.call_back(self._number, args, kwargs)


def _plain(base: type, value: Any) -> Any:
    """Return an instance of a subclass as an instance of the plain class, whatever methods it replaces."""
    if base is dict:
        return dict(zip(dict.keys(value), dict.values(value), strict=True))
    if base in (tuple, list, set, frozenset):
        return base(base.__iter__(value))  # type: ignore[attr-defined]
    plain: dict[type, Call] = {str: str.__str__, int: int.__int__, float: float.__float__, bytes: bytes.__bytes__}
    return plain[base](value)


def _run_coroutine(coroutine: Any) -> Any:
    import asyncio

    return asyncio.run(coroutine)


# -- the tests -------------------------------------------------------------------------------------------------------------

_BINARY = ["__lt__", "__le__", "__gt__", "__ge__"]
_REFLECTED = [f"__{name}__" for name in "add sub mul truediv floordiv mod matmul and or xor lshift rshift pow".split()]
_UNARY = [f"__{name}__" for name in "abs neg pos invert index".split()]
_operators: dict[str, Call] = {name: getattr(operator, name) for name in (*_BINARY, *_REFLECTED, *_UNARY)}
_operators |= {
    "__len__": len, "__iter__": iter, "__next__": next, "__str__": str, "__repr__": repr, "__hash__": hash, "__bool__": bool,
    "__int__": int, "__float__": float, "__complex__": complex, "__round__": round, "__reversed__": reversed,
    "__getitem__": operator.getitem, "__setitem__": operator.setitem, "__delitem__": operator.delitem, "__format__": format,
    "__enter__": lambda value: type(value).__enter__(value),
}  # fmt: skip
_UNARY = [name for name in _operators if name not in _BINARY and name not in _REFLECTED]
_operators |= {
    "__eq__": operator.eq,
    "__contains__": operator.contains,
    "__exit__": lambda value: type(value).__exit__(value, None, None, None),
}


class Client(_Codec):
    """The tests' end of the connection.

    Args:
        connection: File descriptor of the socket to the code under test.
        trusted: Names of classes whose instances compare themselves with plain data. See `Remote`.

    Attributes:
        ended: True if the code under test has ended its process.
    """

    def __init__(self, connection: int, trusted: frozenset[str]) -> None:
        self._connection, self.trusted = connection, trusted
        self.ended = False
        self._remotes: dict[int, Any] = {}
        self._callbacks: list[Call] = []
        self._lock = threading.RLock()

    def names(self) -> dict[str, Any]:
        """Return the global names of the code under test.

        Raises:
            EndedError: The other process has ended, or sends no names.
        """
        found, names = {}, self.ask("names")
        if not isinstance(names, dict):
            raise EndedError
        for name, data in names.items():
            if name.startswith("__"):  # such as __builtins__, which the tests have of their own
                continue
            try:
                found[name] = self.decode(data)
            except Exception:
                continue
        return found

    def ask(self, operation: str, *values: Any) -> Any:
        """Have the other process do something with values, and return the result.

        Raises:
            EndedError: The other process has ended.
            Exception: The operation raised an exception, of this class or the next one above it that both processes have.
        """
        message = [operation, *map(self.encode, values)]
        with self._lock:
            try:
                if self.ended:
                    raise EndedError
                send(self._connection, message)
                while "callback" in (reply := receive(self._connection)):
                    self._answer(reply)
                return self._result(operation, reply, values)
            except EndedError:
                self.ended = True
                raise

    def _result(self, operation: str, reply: Any, values: tuple[Any, ...]) -> Any:
        if not isinstance(reply, dict):
            raise EndedError
        if isinstance(printed := reply.get("printed"), str):
            sys.stdout.write(printed)
        for number, data in (reply.get("changed") or {}).items():
            _restore(values[1][int(number)], self.decode(data))
        if "error" in reply:
            kind, arguments, attributes = map(self.decode, reply["error"][:3])
            text, message = map(str, reply["error"][3:])
            raise _made(kind, arguments, attributes | {"_opsd_text": text}, message)
        if operation == "names":
            return reply["ok"]
        same = reply.get("same")
        return self.decode(reply["ok"]) if same is None else values[1][same]

    def _answer(self, request: Mapping[str, Any]) -> None:
        try:
            function = self._callbacks[request["callback"]]
            result = function(*self.decode(request["args"]), **self.decode(request["kwargs"]))
            reply: dict[str, Any] = {"ok": self.encode(result)}
        except Exception as error:
            kind = next(each.__name__ for each in type(error).__mro__ if each.__module__ == "builtins")
            reply = {"error": [kind, str(error)]}
        send(self._connection, reply)

    def encode(self, value: Any) -> Encoded:
        return ["remote", value._opsd_number] if type(value) is Remote else super().encode(value)

    def encode_other(self, value: Any) -> Encoded:
        if isinstance(value, type) and issubclass(value, BaseException) and "_opsd_number" in vars(value):
            return ["remote", value._opsd_number]  # type: ignore[attr-defined]
        if isinstance(value, Iterator):
            items = list(itertools.islice(value, _MOST_ITEMS + 1))
            if len(items) > _MOST_ITEMS:
                raise ValueError("an iterator of the tests is too long to be sent")
            return ["iterator", *map(self.encode, items)]
        if callable(value) and not isinstance(value, type):
            self._callbacks.append(value)
            return ["callback", len(self._callbacks) - 1]
        if isinstance(value, Mapping):
            return self.encode(dict(value))
        raise TypeError(f"the tests pass a {type(value).__name__}, which cannot be sent to the code")

    async def _awaited(self, number: int) -> Any:
        return self.ask("await", Remote(self, number, "", None))

    def decode_shared(self, module: str, name: str) -> Any:
        found = super().decode_shared(module, name)
        if name.startswith("_") or not callable(found) or (module == "builtins" and not isinstance(found, type)):
            raise ValueError(f"{module}.{name} is not shared")
        return found

    def decode_other(self, kind: str, parts: list[Any]) -> Any:
        number = int(parts[0])
        if number not in self._remotes:
            if kind == "remote" and parts[1] == "coroutine":
                return self._awaited(number)
            if kind == "exception":
                base = self.decode(parts[2])
                base = base if isinstance(base, type) and issubclass(base, BaseException) else Exception
                names = {"_opsd_number": number, "_opsd_text": None, "__str__": _text_of}
                self._remotes[number] = type(str(parts[1]), (base,), names)
            elif kind == "remote":
                self._remotes[number] = Remote(self, number, str(parts[1]), self.decode(parts[2]))
            else:
                raise ValueError(kind)
        return self._remotes[number]


def _text_of(error: Any) -> str:
    """Return the text of an exception of a class of the code, which may define it."""
    return BaseException.__str__(error) if error._opsd_text is None else error._opsd_text


def _made(kind: Any, arguments: Any, attributes: Any, message: str) -> BaseException:
    """Make an exception of the other process's class. Its text is the other process's message."""
    if not isinstance(kind, type) or not issubclass(kind, BaseException):
        kind = Exception
    try:
        error: BaseException = kind.__new__(kind)
        error.args = tuple(arguments)
        for name, value in attributes.items():
            setattr(error, name, value)
        if isinstance(error, StopIteration):
            error.value = arguments[0] if arguments else None
    except Exception:
        error = Exception(message)
    error.add_note(message)
    return error


class Remote:
    """An object of the code under test, in the tests' process.

    Attributes, calls and methods are passed on. Comparisons and arithmetic with plain data are not: an object that claims to
    equal everything would pass every test. Such an object equals no plain data. If its class derives from ``int``, ``str``,
    ``tuple`` and the like, the plain value that it holds takes its place. Classes that the tests themselves call for an
    operand, with a capital letter as in ``a + b == Vector(1, 2)``, are trusted: their instances compare and compute as they
    define. Two objects of the code compare as they define, too.
    """

    def __init__(self, client: Client, number: int, kind: str, snapshot: Any) -> None:
        values = {"client": client, "number": number, "snapshot": snapshot, "trusted": kind in client.trusted}
        for name, value in values.items():
            object.__setattr__(self, f"_opsd_{name}", value)

    _opsd_client: Client
    _opsd_number: int
    _opsd_snapshot: Any
    _opsd_trusted: bool

    def __getattr__(self, name: str) -> Any:
        return self._opsd_client.ask("get", self, name)

    def __setattr__(self, name: str, value: Any) -> None:
        self._opsd_client.ask("set", self, name, value)

    def __delattr__(self, name: str) -> None:
        self._opsd_client.ask("del", self, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._opsd_client.ask("call", self, args, kwargs)

    def __instancecheck__(self, instance: Any) -> bool:
        return self._opsd_client.ask("isinstance", instance, self) is True

    def __subclasscheck__(self, subclass: Any) -> bool:
        return self._opsd_client.ask("issubclass", subclass, self) is True

    def __eq__(self, other: object) -> bool:
        if self is other:
            return True
        if self._opsd_trusted or isinstance(other, Remote):
            return self._opsd_client.ask("operator", "__eq__", self, other) is True
        return self._opsd_snapshot is not None and self._opsd_snapshot == other

    def __ne__(self, other: object) -> bool:
        return not self.__eq__(other)

    def __contains__(self, item: object) -> bool:
        if self._opsd_trusted:
            return self._opsd_client.ask("operator", "__contains__", self, item) is True
        return any(each is item or each == item for each in self)

    def __exit__(self, *error: object) -> None:  # it must not swallow the failure of a test
        self._opsd_client.ask("operator", "__exit__", self)

    __iter__: Call


def _unary(name: str) -> Call:
    def method(self: Remote, *args: Any) -> Any:
        return self._opsd_client.ask("operator", name, self, *args)

    return method


def _binary(name: str, reflected: bool) -> Call:
    def method(self: Remote, other: Any) -> Any:
        pair = (other, self) if reflected else (self, other)
        if self._opsd_trusted or isinstance(other, Remote):
            return self._opsd_client.ask("operator", name, *pair)
        if self._opsd_snapshot is None:
            return NotImplemented
        return _operators[name](*(self._opsd_snapshot if each is self else each for each in pair))

    return method


for _name in _UNARY:
    setattr(Remote, _name, _unary(_name))
for _name in (*_BINARY, *_REFLECTED):
    setattr(Remote, _name, _binary(_name, reflected=False))
for _name in _REFLECTED:
    setattr(Remote, f"__r{_name[2:]}", _binary(_name, reflected=True))
