"""Regular expressions of the user that find an answer, searched in bounded time."""

from __future__ import annotations

import regex

from opsd_lightning.types import ConfigError


def check_pattern(pattern: str, setting: str, fix: str = "Put the part with the answer in parentheses") -> None:
    """Check that a text is a regular expression with a group.

    Raises:
        ConfigError: It is not a regular expression, or has no capturing group.
    """
    try:
        groups = regex.compile(pattern).groups
    except regex.error as error:
        raise ConfigError(f"{pattern!r} is not a regular expression ({error})", setting, fix) from None
    if groups < 1:
        raise ConfigError(f"{pattern!r} has no capturing group", setting, fix)


def last_match(pattern: str, text: str, seconds: float) -> str | None:
    """Return the first group of the last match whose group is not blank, without surrounding white space, or None.

    Raises:
        TimeoutError: The search took longer than ``seconds``.
    """
    found = None
    # concurrent=True releases the GIL
    for match in regex.finditer(pattern, text, timeout=seconds, concurrent=True):
        found = (match[1] or "").strip() or found
    return found
