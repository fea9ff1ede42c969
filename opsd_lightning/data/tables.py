"""Rows of data files and data sets, with values that keep the text they were written as."""

from __future__ import annotations

import csv
import json
import re
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import numpy

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.texts import NumberAsWritten, UnreadableValue

#: Longer integers stay text: Python refuses to convert them.
_INTEGER_DIGITS = 4000


class Table(NamedTuple):
    """Rows of a file or data set.

    Args:
        rows: Values by column.
        places: Place of each row in messages, such as ``line 12``.
    """

    rows: list[dict[str, Any]]
    places: list[str]

    def part(self, split: str) -> Table:
        """Return the rows of a split specification as `datasets` understands it, with ``train`` as the only split.

        Raises:
            ConfigError: The specification is wrong.
        """
        if split in ("train", "all"):
            return self
        from datasets import ReadInstruction

        try:
            slices = ReadInstruction.from_spec(split).to_absolute({"train": len(self.rows)})
        except ValueError as error:
            problem = f"{split!r} is not a slice of a file's rows ({first_line(error)})"
            raise ConfigError(
                problem, "split", "Write train for all rows, or a slice such as train[:90%] or train[100:]"
            ) from None
        indices = [index for each in slices for index in range(each.from_, each.to)]
        if self.rows and not indices:
            raise ConfigError(f"{split!r} has none of the {len(self.rows)} rows", "split", "Widen it")
        return Table([self.rows[index] for index in indices], [self.places[index] for index in indices])


def read_table(path: Path) -> Table:
    """Read a file with the reader in `FORMATS` for its ending.

    Raises:
        ConfigError: The file has another format, or a row is malformed. The message names the row's line.
        OSError: The file cannot be opened.
    """
    try:
        return FORMATS[path.suffix](path)
    except UnicodeDecodeError:
        raise _not_utf8(path) from None


def typed_rows(dataset: Any) -> list[dict[str, Any]]:
    """Return the rows of a ``datasets.Dataset``.

    Class labels become their names, and float16 and float32 values the shortest digits of their type.
    """
    from datasets import ClassLabel, Value

    labels: dict[str, list[str]] = {}
    narrow: dict[str, Any] = {}
    for name, feature in dataset.features.items():
        if isinstance(feature, ClassLabel):
            labels[name] = feature.names
        elif isinstance(feature, Value) and feature.dtype in ("float16", "float32"):
            narrow[name] = numpy.dtype(feature.dtype).type
    rows: list[dict[str, Any]] = []
    for row in dataset.with_format(None):
        for name, names in labels.items():
            row[name] = names[row[name]] if row[name] is not None and row[name] >= 0 else None
        for name, narrowed in narrow.items():
            row[name] = _widened(row[name], narrowed)
        rows.append(row)
    return rows


def _widened(value: float | None, narrow: type[numpy.floating[Any]]) -> float | None:
    """Return a float16 or float32 number with the shortest digits of its type: 0.1, not 0.10000000149011612."""
    if value is None or (value.is_integer() and abs(value) < 2**24):
        return value
    return float(str(narrow(value)))


def numbered(rows: list[dict[str, Any]]) -> Table:
    """Return a table whose places are the numbers of the rows, from 1."""
    return Table(rows, [f"row {number} of {len(rows)}" for number in range(1, len(rows) + 1)])


def first_line(error: Exception) -> str:
    """Return the first line of a library's message."""
    return (str(error).strip() or type(error).__name__).splitlines()[0]


def _malformed(path: Path, place: str, problem: str, fix: str) -> ConfigError:
    return ConfigError(f"{path}, {place}: {problem}", "path", fix)


def _not_utf8(path: Path) -> ConfigError:
    content = path.read_bytes()
    try:
        content.decode("utf-8")
    except UnicodeDecodeError as error:
        line = content.count(b"\n", 0, error.start) + 1
        problem = f"byte 0x{content[error.start]:02x} (at {error.start}) is not UTF-8"
        return _malformed(path, f"line {line}", problem, "Save the file in UTF-8")
    return ConfigError(f"{path} changed while it was read", "path", "Start again when the file is complete")


# -- CSV ---------------------------------------------------------------------------------------------------------------

#: Separators that spreadsheets and databases write instead of commas.
_SEPARATORS = {";": "semicolons", "\t": "tabs"}
_SPACED_QUOTE = re.compile(r'\s+"')
_SPACED_QUOTE_IN_RECORD = re.compile(r'(?:^|,)[^\S\r\n]+"')
_QUOTED = re.compile(r'(^|,)"(?:[^"]|"")*"(?=,|[\r\n]*$)')


def _read_csv(path: Path) -> Table:
    limit = csv.field_size_limit(2**31 - 1)  # a trace may be longer than the default, 128 KiB
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            return _csv_table(path, file)
    finally:
        csv.field_size_limit(limit)


def _csv_table(path: Path, file: TextIO) -> Table:
    table = Table([], [])
    header: list[str] = []
    named, top = 0, ""
    for place, cells, text in _records(path, file):
        if not cells or (len(cells) == 1 != len(header) and not cells[0].strip()):
            continue  # a blank line
        if any(_SPACED_QUOTE.match(cell) for cell in cells) and _holds_spaced_quote(text):
            raise _malformed(path, place, "a space before a double quote", "Remove the space before the quote")
        if not header:
            header, top = cells, place
            named = len(header)
            while named > 1 and not header[named - 1].strip():  # spreadsheets write empty columns at the end
                named -= 1
            header = header[:named] + [""] * (len(header) - named)
            for index, name in enumerate(header[:named]):
                if index and not name:  # pandas writes its index as a first column without a name
                    raise _malformed(path, place, f"column {index + 1} has no name", "Give each column a name of its own")
                if header.index(name) < index:
                    raise _malformed(path, place, f"two columns are called {name!r}", "Give each column a name of its own")
        elif len(cells) != len(header):
            problem = f"{len(cells)} cells, and the header has {len(header)}"
            raise _malformed(path, place, problem, 'Put cells that hold a comma into double quotes ("a, b")')
        elif extra := [index for index in range(named, len(cells)) if cells[index].strip()]:
            problem = f"column {extra[0] + 1} has no name, and {place} has a value in it"
            raise _malformed(path, top, problem, "Give each column a name of its own")
        else:
            table.rows.append(dict(zip(header[:named], cells[:named], strict=True)))
            table.places.append(place)
    return table


def _holds_spaced_quote(record: str) -> bool:
    """Return True if a cell of a record begins with white space before a quote.

    The csv module then reads the quote as text.
    """
    return _SPACED_QUOTE_IN_RECORD.search(_QUOTED.sub(r"\1", record)) is not None


def _records(path: Path, file: TextIO) -> Iterator[tuple[str, list[str], str]]:
    """Yield all records: the line at which a record begins, its cells and its text.

    Raises:
        ConfigError: A record is malformed, or the first one has another separator than commas.
    """
    lines: list[str] = []

    def noted() -> Iterator[str]:
        headed = False
        for text in file:
            if not headed and text.strip():
                headed = True
                if "," not in text and (found := [name for sign, name in _SEPARATORS.items() if sign in text.strip()]):
                    problem = f"columns are separated by {found[0]}"
                    raise _malformed(path, f"line {reader.line_num + 1}", problem, "Separate columns by commas")
            lines.append(text)
            yield text

    reader = csv.reader(noted(), strict=True)
    line = 1
    while True:
        lines.clear()
        try:
            cells = next(reader)
        except StopIteration:
            return
        except csv.Error as error:
            place = f"line {line}" if reader.line_num <= line else f"lines {line} to {reader.line_num}"
            fix = 'Close every double quote, and double those inside a quoted cell ("")'
            raise _malformed(path, place, str(error), fix) from None
        yield f"line {line}", cells, "".join(lines)
        line = reader.line_num + 1


# -- JSON --------------------------------------------------------------------------------------------------------------


class _Repeated:
    """Placeholder for the value of a key that an object has twice."""


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        found |= {key: _Repeated() for key, count in Counter(key for key, _ in pairs).items() if count > 1}
    return found


def _integer(text: str) -> int | str:
    return int(text) if len(text) < _INTEGER_DIGITS and text != "-0" else text


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=NumberAsWritten)


def _read_json(path: Path) -> Table:
    """Read a file with one object per line, or with one list of objects."""
    table = Table([], [])
    with path.open(encoding="utf-8-sig", newline="\n") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            if not table.rows and line.lstrip().startswith("["):
                found = numbered(_decode(path, line + file.read(), number))
                for row, place in zip(*found, strict=True):
                    _check_object(path, row, place)
                return found
            value = _decode(path, line, number)
            _check_object(path, value, f"line {number}")
            table.rows.append(value)
            table.places.append(f"line {number}")
    return table


def _decode(path: Path, text: str, line: int) -> Any:
    fix = "Write one whole object per line, or the file as one list of objects"
    try:
        return _DECODER.decode(text)
    except json.JSONDecodeError as error:
        place = f"line {line + error.lineno - 1}"
        raise _malformed(path, place, f"no JSON at character {error.colno} ({error.msg})", fix) from None
    except RecursionError:
        raise _malformed(path, f"line {line}", "lists or objects are nested too deeply", fix) from None


def _check_object(path: Path, value: Any, place: str) -> None:
    if not isinstance(value, dict):
        raise _malformed(path, place, "not an object with column names as keys", 'Write rows such as {"problem": "1 + 1?"}')
    if repeated := [key for key, each in value.items() if isinstance(each, _Repeated)]:
        raise _malformed(path, place, f"{', '.join(map(repr, repeated))} given twice", "Give each key once")


# -- Parquet -----------------------------------------------------------------------------------------------------------


def _read_parquet(path: Path) -> Table:
    from pyarrow.parquet import ParquetFile

    with path.open("rb") as file:  # from a path, pyarrow would also read partitions
        try:
            table = ParquetFile(file).read()
            if repeated := [name for name, count in Counter(table.column_names).items() if count > 1]:
                raise ValueError(f"two columns are called {repeated[0]!r}")
            labels = _class_labels(table.schema)
            columns = [_values(table[name], labels.get(name)) for name in table.column_names]
        except Exception as error:  # pyarrow has no base class for its errors
            problem = f"{path} cannot be read as Parquet ({first_line(error)})"
            raise ConfigError(problem, "path", "Write the file again, or as JSON Lines") from error
    return numbered([dict(zip(table.column_names, values, strict=True)) for values in zip(*columns, strict=True)])


def _class_labels(schema: Any) -> dict[str, list[str]]:
    """Return the names of class labels by column, which `datasets` stores in the metadata of the schema."""
    kept = json.loads((schema.metadata or {}).get(b"huggingface", b"{}"))
    features = (kept.get("info") or {}).get("features") or {}
    return {
        name: feature["names"]
        for name, feature in features.items()
        if isinstance(feature, dict) and feature.get("_type") == "ClassLabel" and feature.get("names")
    }


def _values(column: Any, labels: list[str] | None) -> list[Any]:
    """Return the values of a column of any type. Values that Python cannot represent become `Unreadable`."""
    from pyarrow import types

    kind = column.type
    try:
        if types.is_dictionary(kind):
            column = column.cast(kind.value_type)
        values = column.to_pylist()
    except Exception:  # pyarrow has no base class for its errors
        return [_value(each) for each in column]
    if labels and types.is_integer(column.type):
        known = dict(enumerate(labels))
        return [
            known.get(value, UnreadableValue(f"label {value}")) if value is not None and value >= 0 else None
            for value in values
        ]
    if types.is_float16(column.type) or types.is_float32(column.type):
        return [_widened(value, numpy.dtype(column.type.to_pandas_dtype()).type) for value in values]
    return list(values)


def _value(cell: Any) -> Any:
    try:
        return cell.as_py()
    except Exception:  # see `_values`
        return UnreadableValue(str(cell.type))


#: Readers by a file's ending.
FORMATS: dict[str, Callable[[Path], Table]] = {
    ".jsonl": _read_json,
    ".json": _read_json,
    ".parquet": _read_parquet,
    ".csv": _read_csv,
}
