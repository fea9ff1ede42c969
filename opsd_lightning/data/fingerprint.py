"""Fingerprints of everything that the prepared rows of a split depend on.

A value of an unknown type has no fingerprint, so nothing that depends on it is cached.

``Dataset.map`` of `datasets` has a cache as well, but its fingerprints are digests of the serialized function and arguments.
Functions of an installed package are serialized by name, so another version of their code, or of a library that they call,
has the same fingerprint.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import platform
import unicodedata
from collections.abc import Callable
from datetime import date, datetime, time, timedelta
from decimal import Decimal
from enum import Enum
from importlib.metadata import version
from pathlib import Path
from typing import TYPE_CHECKING, Any

import opsd_lightning
from opsd_lightning.utils.texts import NumberAsWritten

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

#: Libraries that find and compare answers, render templates and tokenize.
_LIBRARIES = (
    *("transformers", "tokenizers", "jinja2", "regex"),
    *("math-verify", "latex2sympy2_extended", "sympy", "antlr4-python3-runtime"),
)
# Attributes of a tokenizer that change while it is used and do not change its tokens, and its backend.
_TOKENIZER_STATE = {"_tokenizer", "deprecation_warnings", "verbose", "_in_target_context_manager"}


class UnknownValueError(Exception):
    """A value that has no fingerprint. The message names it."""


def fingerprint(*values: Any) -> str:
    """Return a digest of values, 64 hexadecimal digits. It is the same in every process.

    Plain values, lists, dictionaries, dates, dataclasses and named tuples of this package have a fingerprint. The order of a
    dictionary counts.

    Raises:
        UnknownValueError: A value is of another type.
    """
    digest = hashlib.blake2b(digest_size=32)
    try:
        for value in values:
            _feed(digest.update, value)
    except RecursionError:
        raise UnknownValueError("a value that is nested too deeply") from None
    return digest.hexdigest()


def _feed(update: Callable[[bytes], None], value: Any) -> None:
    """Feed a value with its type and its length, so that no two values give the same bytes."""
    kind = type(value)
    if kind is str:
        content = value.encode("utf-8", "surrogatepass")
        update(b"s%d:" % len(content))
        update(content)
    elif kind is int:
        _feed_text(update, "int", f"{value:x}")  # decimal digits of long integers are refused by Python
    elif value is None or kind in (bool, timedelta, date, time, datetime, Decimal):
        _feed_text(update, kind.__name__, repr(value))
    elif kind is float:
        _feed_text(update, "float", value.hex())
    elif kind is NumberAsWritten:
        _feed_text(update, "NumberAsWritten", value.text)
    elif kind is bytes:
        update(b"b%d:" % len(value))
        update(value)
    elif kind in (list, tuple):
        update(b"%s%d:" % (kind.__name__.encode(), len(value)))
        for each in value:
            _feed(update, each)
    elif kind is dict:
        update(b"dict%d:" % len(value))
        for key, each in value.items():
            _feed(update, key)
            _feed(update, each)
    elif is_ours(kind) and isinstance(value, Enum):
        _feed_text(update, kind.__qualname__, value.name)
    elif is_ours(kind) and isinstance(value, tuple):
        _feed_text(update, "named tuple", kind.__qualname__)
        _feed(update, tuple(value))
    elif is_ours(kind) and dataclasses.is_dataclass(value):
        _feed_text(update, "dataclass", kind.__qualname__)
        _feed(update, {field.name: getattr(value, field.name) for field in dataclasses.fields(value)})
    else:
        raise UnknownValueError(f"a value of type {kind.__module__}.{kind.__qualname__}")


def _feed_text(update: Callable[[bytes], None], kind: str, text: str) -> None:
    content = f"{kind} {text}".encode()
    update(b"t%d:" % len(content))
    update(content)


def is_ours(kind: type) -> bool:
    """Return True if a class is defined in this package, so that `code_fingerprint` covers its code."""
    return kind.__module__.startswith("opsd_lightning.")


def object_fingerprint(value: object) -> str:
    """Return a digest of an object of this package: its class and its attributes.

    Raises:
        UnknownValueError: Its class is defined elsewhere, or an attribute has no fingerprint.
    """
    if not is_ours(type(value)):
        raise UnknownValueError(f"{type(value).__qualname__}, which is not a class of this package")
    return fingerprint(type(value).__qualname__, vars(value))


def tokenizer_fingerprint(tokenizer: PreTrainedTokenizerBase) -> str:
    """Return a digest of a tokenizer's class, vocabulary, merges, normalization, special tokens, chat template and settings.

    Raises:
        UnknownValueError: It is not one of the fast tokenizers of transformers, or an attribute has no fingerprint.
    """
    kind = type(tokenizer)
    if not tokenizer.is_fast or not kind.__module__.startswith("transformers."):
        raise UnknownValueError(f"{kind.__qualname__}, which is not a fast tokenizer of transformers")
    try:
        backend = tokenizer.backend_tokenizer.to_str()
    except Exception:  # parts written in Python cannot be serialized, and tokenizers has no error class
        raise UnknownValueError("a tokenizer with parts that cannot be saved") from None
    attributes = {name: value for name, value in vars(tokenizer).items() if name not in _TOKENIZER_STATE}
    return fingerprint(kind.__qualname__, backend, _without_tokens(attributes), tokenizer.special_tokens_map)


def _without_tokens(value: Any) -> Any:
    """Replace the tokens in a tokenizer's attributes by their descriptions, which contain all their settings."""
    from tokenizers import AddedToken

    if isinstance(value, AddedToken):
        return ("AddedToken", repr(value))
    if type(value) is dict:
        return {key: _without_tokens(each) for key, each in value.items()}
    if type(value) in (list, tuple):
        return [_without_tokens(each) for each in value]
    return value


@functools.cache
def code_fingerprint() -> str:
    """Return a digest of this package's source code and of the versions of Python and of the libraries.

    Raises:
        UnknownValueError: The source files are not there.
    """
    folder = Path(opsd_lightning.__file__).parent
    files = {path.relative_to(folder).as_posix(): path for path in sorted(folder.rglob("*.py"))}
    if "types.py" not in files:
        raise UnknownValueError("this package without its source files")
    sources = {name: path.read_bytes() for name, path in files.items()}
    libraries = {name: version(name) for name in _LIBRARIES}
    return fingerprint(sources, libraries, platform.python_version(), unicodedata.unidata_version)
