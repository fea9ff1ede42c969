"""Convert values of a dataset to text, and normalize text for comparison."""

from __future__ import annotations

import unicodedata
from collections.abc import Mapping
from datetime import date, time
from decimal import Decimal
from numbers import Integral, Real
from typing import Any


class NotTextError(ValueError):
    """A value that has no text form. The message names its kind, such as ``a list``."""


class NumberAsWritten(float):
    """A float that prints with its original digits: ``str(NumberAsWritten("0.10"))`` is ``0.10``."""

    text: str

    def __new__(cls, text: str) -> NumberAsWritten:
        number = super().__new__(cls, text)
        number.text = text
        return number

    def __str__(self) -> str:
        return self.text


class UnreadableValue:
    """Placeholder for a value that cannot be represented in Python, in a row with readable values.

    Args:
        kind: Type of the value, for messages.
    """

    def __init__(self, kind: str) -> None:
        self.kind = kind


def text_of(value: Any) -> str | None:
    """Return a dataset value as text, or None for null and NaN.

    Numbers keep all their digits, booleans are written as in JSON, and dates in ISO 8601.

    Raises:
        NotTextError: The value is a list, an object, binary data, or a string with a lone surrogate.
    """
    match value:
        case None:
            return None
        case str():
            try:
                value.encode("utf-8")
            except UnicodeEncodeError as error:
                raise NotTextError(f"a text with a lone surrogate, {value[error.start]!a}") from None
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
        return f"an object with {', '.join(map(str, value)) or 'no keys'}"
    if isinstance(value, bytes | bytearray | memoryview):
        return "binary data"
    if isinstance(value, UnreadableValue):
        return f"a value that cannot be read ({value.kind})"
    return f"a value of type {type(value).__name__}"


def normalize_text(text: str) -> str:
    """Normalize a text to Unicode NFC, and collapse each run of whitespace, including line ends, to one space.

    Two questions with equal results are the same question. Case and compatibility characters stay: ``x²`` is not ``x2``.
    """
    return " ".join(unicodedata.normalize("NFC", text).split())
