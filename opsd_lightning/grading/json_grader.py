"""Grade JSON values and tool calls field by field."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.example_columns import SETTING, column_of, shown
from opsd_lightning.grading.final_answer import strip_thinking
from opsd_lightning.grading.json_values import Comparer, JSONError, calls_of, parse, read_calls, read_value
from opsd_lightning.types import ConfigError, Example, NonNegativeFloat, checked


@checked
@dataclass(frozen=True)
class JSONGrader(Grader):
    r"""Grader that compares the JSON value or the tool calls of a completion with the reference.

    The order of an object's keys does not count. Numbers are equal by value (``1`` and ``1.0``), texts by characters, and
    ``true`` does not equal ``1``. A value is the whole completion, else its last fenced block, else the last list or object
    in it. Tool calls may be bare or fenced JSON, ``<tool_call>{...}</tool_call>`` (Hermes, Qwen), ``[TOOL_CALLS]``
    (Mistral), objects with ``name`` and ``parameters`` (Llama), or the ``tool_calls`` of OpenAI's messages. Invalid JSON is
    wrong, and so are repeated keys, NaN, texts of over a million characters and more than 64 nested levels. Thinking blocks
    are skipped.

    Args:
        form: ``value`` for a JSON value, or ``tool_calls`` for calls with a name and arguments. If the reference has no
            calls (``[]``), a completion without a call is right.
        reference: Column of the reference, as JSON text, list or object. Null for the reference answer.
        partial: If True, the score is the share of matching fields: texts, numbers, truth values, nulls, and empty lists and
            objects. A missing or additional field counts as one that does not match. If False, the score is 1 or 0.
        relative_tolerance: Largest difference of two equal numbers, as a share of the reference.
        absolute_tolerance: Largest difference of two equal numbers.
        ignored_keys: Keys of objects that are not compared, at any depth.
        ordered_lists: If False, the order of lists does not count. Such lists have at most 64 elements.
        ordered_calls: If True, the order of tool calls counts.

    Example::

        >>> from opsd_lightning import Example, JSONGrader
        >>> example = Example("Weather in Rome?", "", '{"name": "weather", "arguments": {"city": "Rome", "days": 1}}')
        >>> grader = JSONGrader(form="tool_calls", partial=True)
        >>> call = '<tool_call>{"name": "weather", "arguments": {"days": 1, "city": "Roma"}}</tool_call>'
        >>> grade = grader.grade(call, example)
        >>> round(grade.score, 2), grade.feedback
        (0.67, '[0].arguments.city is "Roma", not "Rome".')
    """

    repeatable: ClassVar[bool] = True

    form: Literal["value", "tool_calls"] = "value"
    reference: str | None = None
    partial: bool = False
    relative_tolerance: NonNegativeFloat = 0.0
    absolute_tolerance: NonNegativeFloat = 0.0
    ignored_keys: Sequence[str] = ()
    ordered_lists: bool = True
    ordered_calls: bool = False

    def __post_init__(self) -> None:
        if self.form not in ("value", "tool_calls"):
            raise ConfigError(f"it is {self.form!r}", f"{SETTING}form", "Set it to value or tool_calls")
        if isinstance(self.ignored_keys, str):
            raise ConfigError(f"it is {self.ignored_keys!r}", f"{SETTING}ignored_keys", "Give a list of keys")

    def can_grade(self, example: Example) -> bool:
        return self._reference(example) is not None

    def grade(self, completion: str, example: Example) -> Grade:
        reference = self._reference(example)
        text = strip_thinking(completion)
        if text is None:
            return Grade(0.0, feedback="The thinking block is not closed.")
        try:
            found = read_calls(text) if self.form == "tool_calls" else read_value(text)
        except JSONError as error:
            return Grade(0.0, feedback=_sentence(str(error)))
        answer = json.dumps(self._comparer.canonical(found), ensure_ascii=False, sort_keys=True)
        if reference is None:
            return Grade(0.0, answer)
        try:
            result = self._compare(reference[0], found)
        except JSONError as error:
            return Grade(0.0, answer, _sentence(str(error)))
        if not result.difference:
            return Grade(1.0, answer)
        score = result.share if self.partial else 0.0
        return Grade(score, answer, f"{result.difference}.")

    def same(self, first: str, second: str) -> bool:
        """Return True if two answers are equal as JSON."""
        try:
            return not self._compare(parse(first), parse(second)).difference
        except JSONError:
            return first.strip() == second.strip()

    @property
    def _comparer(self) -> Comparer:
        return Comparer(self.relative_tolerance, self.absolute_tolerance, self.ignored_keys, self.ordered_lists)

    def _compare(self, reference: Any, found: Any) -> Any:
        return self._comparer.compare(reference, found, ordered=self.ordered_calls if self.form == "tool_calls" else None)

    def _reference(self, example: Example) -> tuple[Any] | None:
        """Return the reference in a tuple, or None if there is none."""
        setting = f"{SETTING}reference"
        value: Any = example.answer
        if self.reference is not None:
            value = column_of(example, self.reference, setting)
        if value is None or (isinstance(value, str) and not value.strip()):
            return None
        try:
            text = value if isinstance(value, str) else json.dumps(value, allow_nan=False)
            found = parse(text)
            return (calls_of(found) if self.form == "tool_calls" else found,)
        except (JSONError, TypeError, ValueError) as error:
            form = "tool calls" if self.form == "tool_calls" else "JSON value"
            problem = f"the reference {shown(value)} of {shown(example.question)} is no {form} ({error})"
            fix = 'Write it as JSON, such as {"name": "f", "arguments": {}} for a tool call'
            raise ConfigError(problem, setting, fix) from None


def _sentence(text: str) -> str:
    return f"{text[:1].upper()}{text[1:]}." if text[:1].isalpha() and " " in text.split(".")[0] else f"{text}."
