"""Values of data as the text they stand for, and texts compared as a reader does."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from numbers import Integral, Real
from typing import Any


class NotTextError(ValueError):
    """A value that no text stands for. The message says what it is, such as ``a list``."""


class NumberAsWritten(float):
    """A number that keeps the digits it was written with: ``str(Written("0.10"))`` is ``0.10``."""

    text: str

    def __new__(cls, text: str) -> NumberAsWritten:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


class UnreadableValue:
    """Stands for a value that Python cannot hold, in rows whose other values are read.

    Args:
        kind: Its type, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind


def text_of(value: Any) -> str | None:
    """Return the text of a value of a data set; None for null and for NaN.

    Numbers keep all their digits, truth values are written as JSON does, dates in ISO 8601.

    Raises:
        NotTextError: The value is a list, an object or binary data, or a text that has no encoding.
    """
    match value:
        case None:
            return None
        case str():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise NotTextError(f"half of a surrogate pair, {value[error.start]!a}, which is no character") from None
            return str(value)
        case bool():
            return "true" if value else "false"
        case Integral():
            return str(int(value))
        case Decimal():
            return None if value.is_nan() else format(value, "f")
        case Real():
            return None if value != value else str(value).replace("inf", "Infinity")
        case date() | time():
            return str(value)
    raise NotTextError(_kind(value))


def _kind(value: Any) -> str:
    if isinstance(value, list | tuple):
        messages = value and all(isinstance(each, Mapping) and ({"content", "value"} & each.keys()) for each in value)
        return "a list of messages" if messages else "a list"
    if isinstance(value, Mapping):
        return f"an object with {', '.join(map(str, value)) or 'nothing in it'}"
    if isinstance(value, bytes | bytearray | memoryview):
        return "binary data"
    if isinstance(value, UnreadableValue):
        return f"a value that cannot be read ({value.kind})"
    return f"a value of type {type(value).__name__}"


def normalize_text(text: str) -> str:
    """Return a text with composed letters (Unicode NFC) and each run of white space, line ends included, as one space.

    Two questions that agree in it are the same question. Case and compatibility characters stay: ``x²`` is not ``x2``.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())
