"""Parts that graders share: the name of their settings, and columns of an example."""

from __future__ import annotations

from typing import Any

from opsd_lightning.types import ConfigError, Example

SETTING = "data.grader.init_args."
"""Name of a grader's settings on the command line, without the setting itself."""


def column_of(example: Example, name: str, setting: str) -> Any:
    """Return the value of a column.

    Args:
        example: The example.
        name: Name of the column.
        setting: Setting that names the column, for the message.

    Raises:
        ConfigError: The data have no such column.
    """
    if name not in example.columns:
        known = ", ".join(map(str, example.columns)) or "none"
        raise ConfigError(f"the data have no column {name!r}; columns: {known}", setting, "Name a column of the data")
    return example.columns[name]


def shown(value: object, longest: int = 100) -> str:
    """Return the start of a value's ``repr``, for feedback and messages."""
    text = repr(value[: longest + 1]) if isinstance(value, str) else repr(value)
    return text if len(text) <= longest else f"{text[:longest]}..."
