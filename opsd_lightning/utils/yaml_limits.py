"""YAML that is refused before it is loaded: too deep, or too large once its aliases are written out.

A few lines of aliases of aliases stand for billions of values. Loaders make references of them, but whatever walks the
result takes each as often as it occurs.
"""

from __future__ import annotations

import re

MOST_VALUES = 20_000
"""Values of a document, those behind aliases counted each time."""
DEEPEST = 100
"""Lists and mappings inside each other."""
LONGEST = 1_000_000
"""Characters of a document."""
MOST_DIGITS = 1_000
"""Digits of a number. Python refuses to write longer ones."""

_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-Fxob_:.]*")
_SHORT = 2 * DEEPEST  # too short to be too deep


def check_yaml(text: str) -> None:
    """Raise ``yaml.YAMLError`` where a document is too long, too deep or too large. Other errors are left to the loader."""
    if len(text) < _SHORT and "*" not in text:
        return
    import yaml

    def refuse(problem: str) -> None:
        raise yaml.YAMLError(f"it {problem}")

    if len(text) > LONGEST:
        refuse(f"has more than {LONGEST} characters")
    sizes: dict[str, int] = {}  # of what each anchor names, aliases written out
    opened: list[tuple[str | None, int]] = []  # of each open list or mapping its anchor, and the values before it
    values = 0
    try:
        for event in yaml.parse(text, Loader=getattr(yaml, "CSafeLoader", yaml.SafeLoader)):
            if isinstance(event, yaml.CollectionEndEvent):
                anchor, before = opened.pop()
                if anchor is not None:
                    sizes[anchor] = values - before
                continue
            if isinstance(event, yaml.AliasEvent):
                values += (
                    sizes.get(event.anchor or "", 1)
                    if not any(anchor == event.anchor for anchor, _ in opened)
                    else MOST_VALUES
                )
            elif isinstance(event, yaml.NodeEvent):
                values += 1
            if isinstance(event, yaml.ScalarEvent) and len(event.value) > MOST_DIGITS and _NUMBER.fullmatch(event.value):
                refuse(f"has a number of more than {MOST_DIGITS} digits")
            if isinstance(event, yaml.CollectionStartEvent):
                opened.append((event.anchor, values - 1))
                if len(opened) > DEEPEST:
                    refuse(f"has more than {DEEPEST} lists and mappings inside each other")
            elif isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
                sizes[event.anchor] = 1
            if values > MOST_VALUES:
                refuse(f"has more than {MOST_VALUES} values, aliases written out")
    except yaml.MarkedYAMLError:
        return
