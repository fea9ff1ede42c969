"""Read JSON values and tool calls from completions, and compare them field by field."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Collection, Iterator, Sequence
from typing import Any, NamedTuple

LONGEST = 1_000_000
"""Largest number of characters of a text that is read."""

DEEPEST = 64
"""Largest depth of nested lists and objects."""

_LONGEST_NUMBER = 1000  # digits
_MOST_TRIES = 100  # places of a text at which a value is looked for
_MOST_CALLS = 64
_FENCE = re.compile(r"```[ \t]*[\w+-]*[ \t]*\n(.*?)```", re.DOTALL)
_CALL = re.compile(r"<tool_call>(.*?)(</tool_call>|(?=<tool_call>)|\Z)", re.DOTALL)
_MISTRAL, _LLAMA, _MISTRAL_ARGUMENTS = "[TOOL_CALLS]", "<|python_tag|>", "[ARGS]"
_OPENING = re.compile(r"[\[{]")


class JSONError(ValueError):
    """A text holds no valid JSON value or tool call. The message is the problem."""


# -- reading -------------------------------------------------------------------------------------------------------------


def _object(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        raise JSONError(f"the key {next(name for name in names if names.count(name) > 1)[:100]!r} is given twice")
    return found


def _integer(text: str) -> int:
    if len(text) > _LONGEST_NUMBER:
        raise JSONError(f"a number has {len(text):,} digits")
    return int(text)


def _float(text: str) -> float:
    value = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
    if not math.isfinite(value):
        raise JSONError(f"the number {text[:40]} is too large")
    return value


def _constant(text: str) -> Any:
    raise JSONError(f"{text} is not JSON")


_DECODER = json.JSONDecoder(object_pairs_hook=_object, parse_int=_integer, parse_float=_float, parse_constant=_constant)


def parse(text: str) -> Any:
    """Return the value of a JSON text.

    Raises:
        JSONError: The text is not one JSON value, too long or too deep, repeats a key, or holds NaN, an infinity or a
            number of more than 1,000 digits.
    """
    _check_size(text)
    text = text.strip()
    try:
        value, end = _decode(text)
        if end < len(text):
            raise json.JSONDecodeError("Extra data", text, end)
    except json.JSONDecodeError as error:
        raise JSONError(f"no JSON at line {error.lineno}, column {error.colno} ({error.msg})") from None
    return value


def _check_size(text: str) -> None:
    if len(text) > LONGEST:
        raise JSONError(f"the text has {len(text):,} characters; the limit is {LONGEST:,}")


def _decode(text: str, start: int = 0) -> tuple[Any, int]:
    """Return the value at the start of a text, and its end.

    Raises:
        json.JSONDecodeError: There is none.
        JSONError: The value is refused.
    """
    too_deep = f"lists or objects are nested more than {DEEPEST} deep"
    try:
        value, end = _DECODER.raw_decode(text, start)
    except RecursionError:
        raise JSONError(too_deep) from None
    level = [value]
    for _ in range(DEEPEST + 1):
        inner = [each for each in level if isinstance(each, (list, dict))]
        level = [each for outer in inner for each in (outer.values() if isinstance(outer, dict) else outer)]
        if not inner:
            return value, end
    raise JSONError(too_deep)


def read_value(text: str) -> Any:
    """Return the JSON value of a completion: the whole text, else the last fenced block, else the last list or object.

    Raises:
        JSONError: There is no valid value.
    """
    _check_size(text)
    whole: JSONError
    try:
        return parse(text)
    except JSONError as error:
        whole = error
    blocks = _FENCE.findall(text)
    if blocks:
        return parse(blocks[-1])
    values = _values_in(text)
    if not values:
        raise whole
    return values[-1]


def _values_in(text: str) -> list[Any]:
    """Return the lists and objects in a text, outermost only."""
    found = list[Any]()
    place = tries = 0
    error: JSONError | None = None
    while (start := _OPENING.search(text, place)) is not None and tries < _MOST_TRIES:
        tries += 1
        place = start.end()
        try:
            value, place = _decode(text, start.start())
            found.append(value)
            error = None
        except JSONError as problem:
            error = problem
        except json.JSONDecodeError:
            continue
    if error is not None:  # the last value is invalid: an earlier one is not the answer
        raise error
    return found


def read_calls(text: str) -> list[dict[str, Any]]:
    """Return the tool calls of a completion, each an object with ``name`` and ``arguments``. May be empty.

    Reads ``<tool_call>{...}</tool_call>`` (Hermes, Qwen), ``[TOOL_CALLS]`` (Mistral), objects with ``name`` and
    ``parameters`` (Llama) or ``arguments``, lists of these, and the ``tool_calls`` of OpenAI's messages, whose arguments are
    texts. They may be in a fenced block.

    Raises:
        JSONError: A call is not valid.
    """
    _check_size(text)
    if "<tool_call>" in text:
        calls = [call for block in _CALL.finditer(text) for call in calls_of(parse(block[1]))]
    elif _MISTRAL in text:
        calls = list(_mistral_calls(text))
    else:
        text = text.replace(_LLAMA, "").strip()
        calls = [call for value in _call_values(text) for call in calls_of(value)]
    if len(calls) > _MOST_CALLS:
        raise JSONError(f"there are {len(calls)} calls; the limit is {_MOST_CALLS}")
    return calls


def _call_values(text: str) -> list[Any]:
    try:
        return [parse(text)]
    except JSONError as error:
        if text[:1] in ("{", "[") and not re.search(r"[}\]]\s*[;,]?\s*[{\[]", text):
            raise error from None  # a whole text that is meant as one value
    blocks = _FENCE.findall(text)
    if blocks:
        return [value for block in blocks for value in _call_values(block.strip()) if _is_call(value)]
    return [value for value in _values_in(text) if _is_call(value)]


def _is_call(value: Any) -> bool:
    """Return True if a value in prose is meant as a call, unlike a list of numbers."""
    if isinstance(value, list):
        return bool(value) and all(map(_is_call, value))
    return isinstance(value, dict) and (("name" in value and len(value) > 1) or "function" in value or "tool_calls" in value)


def _mistral_calls(text: str) -> Iterator[dict[str, Any]]:
    for part in text.split(_MISTRAL)[1:]:
        part = part.strip()
        if part[:1] in ("[", "{"):
            yield from calls_of(parse(part))
        else:  # name[ARGS]{...}, or name{...}
            name, bracket, arguments = part.partition(_MISTRAL_ARGUMENTS if _MISTRAL_ARGUMENTS in part else "{")
            yield from calls_of(
                {"name": name.strip(), "arguments": parse(bracket.removeprefix(_MISTRAL_ARGUMENTS) + arguments)}
            )


def calls_of(value: Any) -> list[dict[str, Any]]:
    """Return the calls that a JSON value describes, each an object with ``name`` and ``arguments``.

    Raises:
        JSONError: The value describes no calls.
    """
    if isinstance(value, list):
        return [call for each in value for call in calls_of(each)]
    if not isinstance(value, dict):
        raise JSONError(f"a tool call is an object with name and arguments, not {json.dumps(value)[:100]}")
    if isinstance(calls := value.get("tool_calls"), list):
        return calls_of(calls)
    function = value.get("function", value)
    if not isinstance(function, dict):
        function = value | {"name": function}
    name = function.get("name")
    keys = [key for key in ("arguments", "parameters") if key in function]
    if not isinstance(name, str) or not name or len(keys) > 1:
        raise JSONError(f"a tool call needs a name, and arguments: {json.dumps(value)[:200]}")
    arguments = function[keys[0]] if keys else {}
    if isinstance(arguments, str):
        arguments = parse(arguments) if arguments.strip() else {}
    if arguments is None:
        arguments = {}
    if not isinstance(arguments, dict):
        raise JSONError(f"the arguments of {name[:100]!r} are not an object")
    return [{"name": name, "arguments": arguments}]


# -- comparing -----------------------------------------------------------------------------------------------------------


class Comparison(NamedTuple):
    """Result of a comparison.

    Args:
        matched: Number of matching fields.
        fields: Number of fields of both values together.
        difference: The first difference, or an empty text.
    """

    matched: int
    fields: int
    difference: str = ""

    @property
    def share(self) -> float:
        """Share of matching fields, from 0 to 1."""
        return self.matched / self.fields


class Comparer:
    """Comparison of JSON values by fields. A field is a number, text, truth value, null, or an empty list or object.

    Args:
        relative_tolerance: Largest difference of two numbers, as a share of the reference.
        absolute_tolerance: Largest difference of two numbers.
        ignored_keys: Keys of objects that are not compared, at any depth.
        ordered: If False, the order of lists does not count.
    """

    def __init__(
        self, relative_tolerance: float, absolute_tolerance: float, ignored_keys: Collection[str], ordered: bool
    ) -> None:
        self.relative, self.absolute = relative_tolerance, absolute_tolerance
        self.ignored, self.ordered = frozenset(ignored_keys), ordered

    def compare(self, reference: Any, found: Any, path: str = "", ordered: bool | None = None) -> Comparison:
        """Compare two values.

        Args:
            reference: The right value.
            found: The value to compare.
            path: Path of both values, for the difference.
            ordered: If False, the order of the outermost list does not count. None for the setting of all lists.
        """
        if isinstance(reference, dict) and isinstance(found, dict):
            return self._objects(reference, found, path)
        if isinstance(reference, list) and isinstance(found, list):
            if self.ordered if ordered is None else ordered:
                return self._lists(reference, found, path)
            return self._sets(reference, found, path)
        if self._equal(reference, found):
            return Comparison(1, 1)
        fields = max(self.fields(reference), self.fields(found))
        return Comparison(0, fields, f"{path or 'The value'} is {_short(found)}, not {_short(reference)}")

    def fields(self, value: Any) -> int:
        """Return the number of fields of a value."""
        if isinstance(value, dict):
            return max(1, sum(self.fields(each) for name, each in value.items() if name not in self.ignored))
        return max(1, sum(map(self.fields, value))) if isinstance(value, list) else 1

    def canonical(self, value: Any) -> Any:
        """Return a value without ignored keys."""
        if isinstance(value, dict):
            return {name: self.canonical(each) for name, each in value.items() if name not in self.ignored}
        return [self.canonical(each) for each in value] if isinstance(value, list) else value

    def _equal(self, reference: Any, found: Any) -> bool:
        if isinstance(reference, bool) or isinstance(found, bool):
            return reference is found
        if isinstance(reference, (int, float)) and isinstance(found, (int, float)):
            if reference == found:
                return True
            if not (self.relative or self.absolute):
                return False
            try:
                return abs(reference - found) <= max(self.absolute, self.relative * abs(reference))
            except OverflowError:  # an integer too large for a float
                return False
        return type(reference) is type(found) and reference == found

    def _objects(self, reference: dict[str, Any], found: dict[str, Any], path: str) -> Comparison:
        parts = list[Comparison]()
        for name in [*reference, *(name for name in found if name not in reference)]:
            if name in self.ignored:
                continue
            where = f"{path}.{name[:100]}" if path else name[:100]
            if name not in found:
                parts.append(Comparison(0, self.fields(reference[name]), f"{where} is missing"))
            elif name not in reference:
                parts.append(Comparison(0, self.fields(found[name]), f"{where} is not expected"))
            else:
                parts.append(self.compare(reference[name], found[name], where))
        return _total(parts)

    def _lists(self, reference: list[Any], found: list[Any], path: str) -> Comparison:
        both = min(len(reference), len(found))
        parts = [self.compare(reference[place], found[place], f"{path}[{place}]") for place in range(both)]
        return _total([*parts, *self._unmatched(reference[both:], found[both:], path)])

    def _sets(self, reference: list[Any], found: list[Any], path: str) -> Comparison:
        """Pair equal elements first, then the rest by their share of matching fields, the largest first."""
        if max(len(reference), len(found)) > _MOST_CALLS:
            raise JSONError(f"{path or 'the list'} has more than {_MOST_CALLS} elements, in any order")
        table = [[self.compare(right, each, f"{path}[{place}]") for each in found] for place, right in enumerate(reference)]
        pairs = _matching([[not cell.difference for cell in row] for row in table])
        rest = sorted(((cell.share, -i, -j) for i, row in enumerate(table) for j, cell in enumerate(row)), reverse=True)
        used = set(pairs.values())
        for share, i, j in rest:
            if share > 0 and -i not in pairs and -j not in used:
                pairs[-i] = -j
                used.add(-j)
        missing = [right for place, right in enumerate(reference) if place not in pairs]
        extra = [each for place, each in enumerate(found) if place not in used]
        return _total([*(table[i][j] for i, j in sorted(pairs.items())), *self._unmatched(missing, extra, path)])

    def _unmatched(self, missing: Sequence[Any], extra: Sequence[Any], path: str) -> list[Comparison]:
        where = f" in {path}" if path else ""
        return [
            *(Comparison(0, self.fields(value), f"{_short(value)} is missing{where}") for value in missing),
            *(Comparison(0, self.fields(value), f"{_short(value)} is not expected{where}") for value in extra),
        ]


def _total(parts: Sequence[Comparison]) -> Comparison:
    if not parts:  # two empty lists or objects
        return Comparison(1, 1)
    difference = next((part.difference for part in parts if part.difference), "")
    return Comparison(sum(part.matched for part in parts), sum(part.fields for part in parts), difference)


def _matching(equal: Sequence[Sequence[bool]]) -> dict[int, int]:
    """Return a maximum matching of rows to columns in a table of truth values, by augmenting paths."""
    row_of = dict[int, int]()

    def place(row: int, seen: set[int]) -> bool:
        for column, same in enumerate(equal[row]):
            if same and column not in seen:
                seen.add(column)
                if column not in row_of or place(row_of[column], seen):
                    row_of[column] = row
                    return True
        return False

    for row in range(len(equal)):
        place(row, set())
    return {row: column for column, row in row_of.items()}


def _short(value: Any) -> str:
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 200 else f"{text[:200]}..."
