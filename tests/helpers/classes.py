"""Subclasses of the package's base classes."""

from __future__ import annotations

from collections.abc import Iterator


def subclasses(base: type) -> Iterator[type]:
    for child in base.__subclasses__():
        if not child.__name__.startswith("_"):
            yield child
        yield from subclasses(child)
