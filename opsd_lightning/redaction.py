"""Secrets kept out of what a run leaves behind: keys, tokens and passwords in settings, commands and messages.

A secret is known by the name of its setting (``api_key``, ``password``, ``token`` ...), by its form (``hf_...``, a password
in a URL), or because an environment variable with such a name holds it. In its place stands ``***``.
"""

from __future__ import annotations

import os
import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
_WORD = (
    r"(?:api[_-]?key|access[_-]?key|private[_-]?key|secret(?:[_-]?key)?|passw(?:or)?d|passphrase|credentials?|authorization"
    r"|token)"
)
_NAME = re.compile(rf"(?:^|[_.\-]){_WORD}$", re.IGNORECASE)
# Settings of tokenizers, whose values are no secrets.
_HARMLESS = re.compile(r"(?:pad|eos|bos|unk|sep|cls|mask|stop|think|image)_token$", re.IGNORECASE)
_FORMS = re.compile(
    r"\b(?:hf_[A-Za-z0-9]{16,}|sk-[A-Za-z0-9_\-]{16,}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,}|glpat-[\w\-]{16,}"
    r"|AKIA[0-9A-Z]{16}|xox[abprs]-[\w\-]{10,}|eyJ[\w\-]{10,}\.[\w\-]{10,}\.[\w\-]+)"
)
_IN_URL = re.compile(r"(://)[^/@\s]+@")
# {"api_key": "..."} or api_key=... inside a longer text
_IN_TEXT = re.compile(rf"""((?:[\w.\-]*[_.\-])?{_WORD}["']?\s*[:=]\s*)(["']?)([^\s"',}}]+)""", re.IGNORECASE)


def is_secret(name: str) -> bool:
    """Whether a setting of this name holds a secret."""
    return bool(_NAME.search(name)) and not _HARMLESS.search(name)


def redact(value: Any, name: str = "") -> Any:
    """Settings, however nested, without secrets.

    Args:
        value: Mappings, sequences and plain values.
        name: Of the setting.
    """
    if isinstance(value, Mapping):
        return {key: redact(part, str(key)) for key, part in value.items()}
    if isinstance(value, (list, tuple)):
        return [redact(part, name) for part in value]
    if is_secret(name) and value not in (None, "", HIDDEN) and not isinstance(value, bool):
        return HIDDEN
    return redact_text(value) if isinstance(value, str) else value


def redact_text(text: str) -> str:
    """A text without secrets that can be told by their form, by a name before them, or by the environment."""
    for name, value in os.environ.items():
        if is_secret(name) and len(value) >= 8:
            text = text.replace(value, HIDDEN)
    text = _IN_URL.sub(rf"\1{HIDDEN}@", _FORMS.sub(HIDDEN, text))

    def hide(found: re.Match[str]) -> str:
        named = re.split(r"[\"'\s:=]", found[1])[0]
        plain = found[3] in ("null", "None", "true", "false") or not is_secret(named)
        return found[0] if plain else f"{found[1]}{found[2]}{HIDDEN}"

    return _IN_TEXT.sub(hide, text)


def redact_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line's arguments without secrets: ``--api_key X`` as well as ``--api_key=X``."""
    found: list[str] = []
    hides = False  # the value of the option before
    for argument in arguments:
        name, _, value = argument.partition("=")
        option = name.startswith("-")
        if hides and not option:
            found.append(HIDDEN)
        else:
            found.append(f"{name}={HIDDEN}" if option and value and is_secret(name) else redact_text(argument))
        hides = option and not value and is_secret(name)
    return found
