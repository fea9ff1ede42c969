"""Patterns for messages, which hold whatever the wording is."""

from __future__ import annotations

import re


def mentions(*parts: object) -> str:
    """Return the regular expression of a text that holds all these names and numbers, in any order."""
    return "(?s)" + "".join(rf"(?=.*(?<!\w){re.escape(str(part))}(?!\w))" for part in parts)
