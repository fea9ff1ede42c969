"""CSV files that grow row by row, also over kills, full disks and resumed runs, and that spreadsheets do not execute.

A text cell that begins with a character that a spreadsheet takes for the start of a formula (``= + - @``, tab, carriage
return, line feed) gets an apostrophe in front, and so does one that begins with apostrophes before such a character. `unescape_formula`
takes it away again. Numbers and truth values are written as they are.
"""

from __future__ import annotations

import csv
import io
import re
import sys
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import append, atomic_write
from opsd_lightning.utils.folders import free_name

_FORMULA = re.compile("'*[=+\\-@\t\r\n\uff1d\uff0b\uff0d\uff20]")


def escape_formula(value: Any) -> Any:
    """Return a value as it is written: a text that a spreadsheet would take for a formula with an apostrophe in front."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unescape_formula(written: str) -> str:
    """Return the text of a cell that was written with `escape_formula` and read with `csv.reader`."""
    return written[1:] if written.startswith("'") and _FORMULA.match(written) else written


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Append rows to a CSV file, all or none. A file that does not exist begins with the names of its columns.

    Raises:
        OSError: They cannot be written. The file is as it was.
    """
    lines = _lines([[escape_formula(value) for value in row] for row in rows])
    if path.exists() and path.stat().st_size:
        append(path, lines)
    else:
        atomic_write(path, _lines([columns]) + lines)


def check_table(path: Path, columns: Sequence[str], setting: str) -> None:
    """Refuse a file that exists and is no table with these columns.

    Raises:
        ConfigError: With the setting that names the file.
    """
    problem = None
    if path.is_symlink() or (path.exists() and not path.is_file()):
        problem = f"{path} is no ordinary file"
    elif path.exists():
        header = _lines([columns])
        with path.open("rb") as file:
            start = file.read(len(header))
        if not header.startswith(start):
            problem = f"{path} is no table of rollouts, and rows would be added to it"
    if problem is not None:
        raise ConfigError(problem, setting, "Choose another file, or move this one away")


def prepare_table(path: Path, columns: Sequence[str], step: int, keep: bool) -> None:
    """Prepare a table whose first column is the optimizer step for a run that begins or goes on.

    A new run's table is a new file: the earlier one is renamed to ``NAME-1.csv`` and so on. A run that goes on makes later
    steps again, and their rows are taken away, as is a row that was not written to its end.

    Args:
        path: The file. It need not exist.
        columns: Names of the columns.
        step: Optimizer steps made, above 0 for a run that goes on.
        keep: Keep a copy of the table, as ``NAME-1.csv`` and so on, where rows of later steps are taken away.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    if _lines([columns]).startswith(content):  # empty, or killed within its first line
        atomic_write(path, _lines([columns]))
    elif not step:
        path.rename(free_name(path))
    else:
        rows = _rows(content.decode("utf-8", "surrogateescape"))[1:]
        whole = [row for row in rows if len(row) == len(columns) and row[0].isdecimal()]
        kept = [row for row in whole if int(row[0]) <= step]
        if keep and len(kept) < len(whole):
            atomic_write(free_name(path), content)
        if (now := _lines([columns, *kept])) != content:
            atomic_write(path, now)


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode("utf-8", "surrogateescape")


def _rows(content: str) -> list[list[str]]:
    """Return the rows that were written to their end."""
    found: list[list[str]] = []
    limit = csv.field_size_limit(sys.maxsize)
    try:
        for row in csv.reader(io.StringIO(content, newline=""), strict=True):
            found.append(row)
    except csv.Error:  # the file ends within quotes
        return found
    finally:
        csv.field_size_limit(limit)
    return found if content.endswith("\r\n") else found[:-1]
