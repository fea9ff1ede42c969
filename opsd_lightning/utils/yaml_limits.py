"""Size limits of YAML documents, checked before loading.

A few lines of nested aliases can expand to billions of values. Loaders share the aliased objects, but code that walks the
result visits each of them as often as it occurs.
"""

from __future__ import annotations

import re

MOST_VALUES = 20_000
"""Maximum number of values in a document, with aliases expanded."""
DEEPEST = 100
"""Maximum nesting depth of lists and mappings."""
LONGEST = 1_000_000
"""Maximum number of characters in a document."""
MOST_DIGITS = 1_000
"""Maximum number of digits in a number. Python refuses to print much longer integers."""

_NUMBER = re.compile(r"[-+]?[0-9][0-9a-fA-Fxob_:.]*")
_SHORT = 2 * DEEPEST  # a shorter text cannot exceed the depth limit


def check_yaml(text: str) -> None:
    """Check the length, depth and size of a YAML document. Syntax errors are left to the loader.

    Raises:
        yaml.YAMLError: The document exceeds a limit.
    """
    if len(text) < _SHORT and "*" not in text:
        return
    import yaml

    def refuse(problem: str) -> None:
        raise yaml.YAMLError(f"it {problem}")

    if len(text) > LONGEST:
        refuse(f"has more than {LONGEST} characters")
    sizes: dict[str, int] = {}  # number of values under each anchor, aliases expanded
    opened: list[tuple[str | None, int]] = []  # for each open list or mapping: its anchor, and the values before it
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
                    refuse(f"has more than {DEEPEST} nested lists and mappings")
            elif isinstance(event, yaml.ScalarEvent) and event.anchor is not None:
                sizes[event.anchor] = 1
            if values > MOST_VALUES:
                refuse(f"has more than {MOST_VALUES} values with aliases expanded")
    except yaml.MarkedYAMLError:
        return
