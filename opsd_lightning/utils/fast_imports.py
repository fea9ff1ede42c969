"""Faster imports of large libraries: no garbage collection, and no bitsandbytes until something uses it."""

from __future__ import annotations

import gc
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from importlib import import_module
from importlib.util import find_spec
from types import ModuleType
from typing import Any


@contextmanager
def fast_imports() -> Iterator[None]:
    """Speed up the imports in the block.

    The garbage collector is off, since it would visit the objects of all modules several times and find nothing to free.
    The import of bitsandbytes is `deferred`: peft imports it at once, but only quantized models need it, and on CPUs it logs
    a warning.
    """
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        with deferred("bitsandbytes"):
            yield
    finally:
        if was_enabled:
            gc.enable()


@contextmanager
def deferred(name: str) -> Iterator[None]:
    """Defer the import of a library: in the block, ``import name`` binds a module that loads on first use.

    After the block, the library is imported as usual. Without effect if it is imported already or not installed.

    Args:
        name: Name of a top-level module.
    """
    spec = None if name in sys.modules else find_spec(name)
    if spec is None:
        yield
        return
    placeholder = _Deferred(name)
    placeholder.__spec__ = spec
    sys.modules[name] = placeholder
    try:
        yield
    finally:
        if sys.modules.get(name) is placeholder:
            del sys.modules[name]


class _Deferred(ModuleType):
    """A module that is imported when one of its attributes is read."""

    def __getattr__(self, name: str) -> Any:
        # `inspect` reads dunder attributes of all modules. Only `__path__` says that a submodule is being imported.
        if name.startswith("__") and name != "__path__":
            raise AttributeError(name)
        if sys.modules.get(self.__name__) is self:
            del sys.modules[self.__name__]
        return getattr(import_module(self.__name__), name)
