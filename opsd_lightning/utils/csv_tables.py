"""CSV tables that survive kills, full disks and resumed runs, with cells escaped against formula injection.

A spreadsheet may execute a cell that begins with ``=``, ``+``, ``-``, ``@``, tab, carriage return or line feed. Such texts
are written with a leading apostrophe, as are texts with apostrophes before one of these characters. `unescape_formula`
removes the apostrophe. Numbers and booleans are written unchanged.
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
    """Return a value for a CSV cell, with an apostrophe before a text that a spreadsheet would read as a formula."""
    return f"'{value}" if isinstance(value, str) and _FORMULA.match(value) else value


def unescape_formula(written: str) -> str:
    """Undo `escape_formula` for a cell that was read with `csv.reader`."""
    return written[1:] if written.startswith("'") and _FORMULA.match(written) else written


def append_rows(path: Path, columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> None:
    """Append rows to a CSV file, all or none. A missing or empty file gets a header first.

    Raises:
        OSError: The rows cannot be written. The file is unchanged.
    """
    if path.exists() and path.stat().st_size:
        append(path, _escaped(rows))
    else:
        atomic_write(path, table_bytes(columns, rows))


def table_bytes(columns: Sequence[str], rows: Iterable[Sequence[Any]]) -> bytes:
    """Return a table as the contents of a CSV file, with its cells escaped (see `escape_formula`)."""
    return _lines([columns]) + _escaped(rows)


def check_table(path: Path, columns: Sequence[str], setting: str) -> None:
    """Check that a file does not exist or is a table with these columns.

    Args:
        path: The file.
        columns: Expected column names.
        setting: Setting that names the file, for the error.

    Raises:
        ConfigError: The file is something else.
    """
    problem = None
    if path.is_symlink() or (path.exists() and not path.is_file()):
        problem = f"{path} is not a regular file"
    elif path.exists():
        header = _lines([columns])
        with path.open("rb") as file:
            start = file.read(len(header))
        if not header.startswith(start):
            problem = f"{path} exists and does not have the columns of this table"
    if problem is not None:
        raise ConfigError(problem, setting, "Choose another file or move this one away")


def prepare_table(path: Path, columns: Sequence[str], step: int, keep: bool) -> None:
    """Prepare a table for a new or resumed run. Its first column is the optimizer step.

    A new run starts a new file and renames an existing one to ``NAME-1.csv``, ``NAME-2.csv`` and so on. A resumed run
    repeats the steps after its checkpoint, so their rows are removed. An incomplete last row is removed as well.

    Args:
        path: The file. It need not exist.
        columns: Column names.
        step: Optimizer steps already made, above 0 for a resumed run.
        keep: If True, save a copy as ``NAME-1.csv`` and so on before rows of later steps are removed.
    """
    if not path.exists():
        return
    content = path.read_bytes()
    if _lines([columns]).startswith(content):  # empty, or the process was killed while it wrote the header
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


def read_table(path: Path) -> tuple[list[str], list[list[str]]]:
    """Read the columns of a table and its complete rows, with `escape_formula` undone.

    Raises:
        ValueError: A row has another number of cells than there are columns.
    """
    columns, *rows = _rows(path.read_bytes().decode("utf-8", "surrogateescape")) or [[]]
    if wrong := next((row for row in rows if len(row) != len(columns)), None):
        raise ValueError(f"a row has {len(wrong)} cells, and there are {len(columns)} columns")
    return columns, [[unescape_formula(cell) for cell in row] for row in rows]


def _escaped(rows: Iterable[Sequence[Any]]) -> bytes:
    return _lines([escape_formula(value) for value in row] for row in rows)


def _lines(rows: Iterable[Sequence[Any]]) -> bytes:
    buffer = io.StringIO(newline="")
    csv.writer(buffer).writerows(rows)
    return buffer.getvalue().encode("utf-8", "surrogateescape")


def _rows(content: str) -> list[list[str]]:
    """Parse CSV text and drop an incomplete last row."""
    found: list[list[str]] = []
    limit = csv.field_size_limit(sys.maxsize)
    try:
        for row in csv.reader(io.StringIO(content, newline=""), strict=True):
            found.append(row)
    except csv.Error:  # the file ends inside quotes
        return found
    finally:
        csv.field_size_limit(limit)
    return found if content.endswith("\r\n") else found[:-1]
