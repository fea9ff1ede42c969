"""Grade the form of a completion, such as its number of words."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.example_columns import SETTING, column_of, shown
from opsd_lightning.grading.final_answer import strip_thinking
from opsd_lightning.grading.json_values import JSONError, parse
from opsd_lightning.types import ConfigError, Example, checked

_LONGEST = 20_000  # characters of a completion; a longer one has no form that an instruction asks for
_QUOTES = "\"'“”‘’`"
_PAIRS = ('""', "''", "“”", "‘’")
_ENDS = " .,;:!?*-–—…" + _QUOTES
_BREAKS = re.compile(r"\s+|(?<=[^\W\d_])[,;:!?…—](?=[^\W\d_])")  # between words, also "yes,no"
_EMPHASIS = re.compile(r"\A([*_]{1,3})(.*)\1\Z", re.DOTALL)
_FENCE = re.compile(r"```(?:json)?\s(.*)```", re.DOTALL)


@checked
@dataclass(frozen=True)
class FormatGrader(Grader):
    """Grader that checks if a completion has the form that its row names. It does not read the content.

    A form is an object with ``kind`` and the arguments of that kind, or its JSON text:

    - ``begins`` (``texts``): the completion begins with one of these texts. ``ends`` (``word``): its last word.
    - ``contains`` (``words``): all of these words. ``includes`` (``text``): this text, with its case and spaces.
    - ``element`` (``tag``, ``text``): an HTML element with this text, with or without attributes.
    - ``numbered`` (``count``): the numbered lines are 1 to the count, in order. ``bulleted`` (``count``): this many lines
      begin with ``-``, ``*`` or a bullet. Both lists begin in the first or the second line. Other lines do not count.
    - ``list`` (``count``): this many different items of up to three words, separated by commas on one line.
    - ``words`` (``count``): this many words. ``capitals``: at least one letter, and all letters in upper case.
    - ``question``: the completion ends with a question mark. ``quoted``: one text in quotation marks, and nothing else.
    - ``repeats`` (``text``): this text, and nothing else. ``one_of`` (``choices``): one of these texts, and nothing else.
    - ``json`` (``keys``): an object with these keys and no others, bare or in a fenced block, and nothing else.

    Case and punctuation around words do not count, except for ``includes``, ``element``, ``repeats`` and ``json``.
    ``ends``, ``contains``, ``quoted`` and ``question`` need at least two words. Thinking blocks are skipped. A completion of
    over 20,000 characters is wrong. So is one that contains the whole instruction, if the instruction has the form itself:
    a sentence with the word that it asks for, for example.

    Args:
        form: Column with the form.

    Example::

        >>> from opsd_lightning import Example, FormatGrader
        >>> example = Example("Name three colors, separated by commas.", "", "", {"form": {"kind": "list", "count": 3}})
        >>> [FormatGrader().grade(text, example).score for text in ("Red, blue, green", "Red, blue", "1. Red\\n2. Blue")]
        [1.0, 0.0, 0.0]
    """

    repeatable: ClassVar[bool] = True

    form: str = "form"

    def can_grade(self, example: Example) -> bool:
        self._form(example)
        return True

    def grade(self, completion: str, example: Example) -> Grade:
        kind, arguments = self._form(example)
        text = strip_thinking(completion)
        if text is None:
            return Grade(0.0, feedback="The thinking block is not closed.")
        text = text.strip()
        if not text:
            return Grade(0.0, feedback="The completion is empty.")
        if len(text) > _LONGEST:
            return Grade(0.0, feedback="The completion is too long.")
        has_form = _KINDS[kind].has_form
        right = has_form(text, **arguments)
        if right and _repeats_words(text, example.question) and has_form(example.question.strip(), **arguments):
            return Grade(0.0, text, "The completion repeats the instruction.")
        return Grade(float(right), text, "" if right else f"The completion does not have the form {shown(kind)}.")

    def _form(self, example: Example) -> tuple[str, dict[str, Any]]:
        """Return the kind of an example's form, and its arguments."""
        setting = f"{SETTING}form"
        value = column_of(example, self.form, setting)
        if isinstance(value, str):
            try:
                value = parse(value)
            except JSONError:
                value = None
        kind = value.get("kind") if isinstance(value, Mapping) else None
        if not isinstance(value, Mapping) or not isinstance(kind, str) or kind not in _KINDS:
            problem = f"the column {self.form!r} of {shown(example.question)} has no known form"
            raise ConfigError(problem, setting, f"Give it an object whose kind is one of {', '.join(_KINDS)}")
        # Arrow gives every object the keys of all others, with null.
        arguments = {name: argument for name, argument in value.items() if name != "kind" and argument is not None}
        expected = _KINDS[kind].arguments
        if set(arguments) != set(expected) or not all(_ARGUMENTS[name][0](arguments[name]) for name in expected):
            problem = f"the form {shown(dict(value))} of {shown(example.question)} has other arguments than its kind"
            needs = ", ".join(f"{name} ({_ARGUMENTS[name][1]})" for name in expected) or "no arguments"
            raise ConfigError(problem, setting, f"Give {kind} {needs}")
        return kind, arguments


# -- arguments -----------------------------------------------------------------------------------------------------------


def _is_word(value: Any) -> bool:
    return isinstance(value, str) and len(_words(value)) == 1


def _is_texts(value: Any) -> bool:
    return isinstance(value, (list, tuple)) and bool(value) and all(isinstance(each, str) and each.strip() for each in value)


_ARGUMENTS: dict[str, tuple[Callable[[Any], bool], str]] = {
    "count": (lambda value: isinstance(value, int) and not isinstance(value, bool) and value > 0, "a whole number above 0"),
    "word": (_is_word, "one word"),
    "tag": (lambda value: isinstance(value, str) and value.isascii() and value.isalnum(), "the name of an HTML element"),
    "words": (lambda value: _is_texts(value) and all(map(_is_word, value)), "a list of words"),
    "text": (lambda value: isinstance(value, str) and bool(value.strip()), "a text"),
    "texts": (_is_texts, "a list of texts"),
    "choices": (_is_texts, "a list of texts"),
    "keys": (_is_texts, "a list of texts"),
}
"""For each argument, a check of its value, and a description."""


# -- kinds ---------------------------------------------------------------------------------------------------------------


def _words(text: str) -> list[str]:
    """Return the words of a text in lower case, without punctuation around them."""
    return [word for part in _BREAKS.split(text) if (word := part.strip(_ENDS + "()").casefold())]


def _repeats_words(text: str, words: str) -> bool:
    """Return True if a text contains all words of another text, one after the other."""
    inside, whole = (f" {' '.join(_words(each))} " for each in (words, text))
    return bool(inside.strip()) and inside in whole


def _unquoted(text: str) -> str:
    return text[1:-1].strip() if len(text) > 1 and text[0] + text[-1] in _PAIRS else text


def _is_capitals(text: str) -> bool:
    return text.isupper()


def _has_count_of_words(text: str, count: int) -> bool:
    return len(_words(text)) == count


def _is_list(text: str, count: int) -> bool:
    items = [tuple(_words(item)) for item in text.split(",")]
    return "\n" not in text and all(0 < len(item) < 4 for item in items) and len(set(items)) == len(items) == count


_ITEM = r" *[*_\[(" + _QUOTES + r"]{0,4}[^\W\d_]"
_NUMBERED = re.compile(r"\*{0,2}(\d{1,3})[.)]\*{0,2}" + _ITEM)
_BULLETED = re.compile(r"(?:[-•]|\*(?!\*))" + _ITEM)


def _marks(text: str, mark: re.Pattern[str]) -> list[re.Match[str]]:
    """Return the matches of a mark at the starts of lines. None count if they do not begin in the first two lines."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    if not any(mark.match(line) for line in lines[:2]):
        return []
    return [found for line in lines if (found := mark.match(line)) is not None]


def _is_numbered(text: str, count: int) -> bool:
    return [int(found[1]) for found in _marks(text, _NUMBERED)] == list(range(1, count + 1))


def _is_bulleted(text: str, count: int) -> bool:
    return len(_marks(text, _BULLETED)) == count


def _begins(text: str, texts: list[str]) -> bool:
    words = _words(text)
    starts = [_words(each) for each in texts]
    return any(words[: len(start)] == start for start in starts)


def _ends(text: str, word: str) -> bool:
    words = _words(text)
    return len(words) > 1 and words[-1] == _words(word)[0]


def _contains(text: str, words: list[str]) -> bool:
    found = re.findall(r"\w+", text.casefold())
    return len(found) > 1 and {_words(word)[0] for word in words} <= set(found)


def _includes(completion: str, text: str) -> bool:
    return text.strip() in completion


def _has_element(completion: str, tag: str, text: str) -> bool:
    inside = r"\s+".join(map(re.escape, text.split()))
    return bool(re.search(rf"<(?i:{tag})(?:\s[^<>]*)?>\s*{inside}\s*</(?i:{tag})\s*>", completion))


def _is_quoted(text: str) -> bool:
    inside = _unquoted(text)
    return inside != text and len(_words(inside)) > 1 and not re.search(r'["“”]', inside)


def _is_question(text: str) -> bool:
    return len(_words(text)) > 1 and _unquoted(_EMPHASIS.sub(r"\2", _unquoted(text))).endswith("?")


def _repeats(completion: str, text: str) -> bool:
    return _unquoted(completion) == text.strip()


def _is_one_of(text: str, choices: list[str]) -> bool:
    return text.strip(_ENDS).casefold() in {choice.strip(_ENDS).casefold() for choice in choices}


def _is_object(text: str, keys: list[str]) -> bool:
    fenced = _FENCE.fullmatch(text)
    try:
        value = parse(fenced[1] if fenced else text)
    except JSONError:
        return False
    return isinstance(value, dict) and set(value) == set(keys)


@dataclass(frozen=True)
class _Kind:
    """A kind of form: a function of the text and the arguments, and the names of the arguments."""

    has_form: Callable[..., bool]
    arguments: tuple[str, ...] = ()


_KINDS = {
    "begins": _Kind(_begins, ("texts",)),
    "ends": _Kind(_ends, ("word",)),
    "contains": _Kind(_contains, ("words",)),
    "includes": _Kind(_includes, ("text",)),
    "element": _Kind(_has_element, ("tag", "text")),
    "numbered": _Kind(_is_numbered, ("count",)),
    "bulleted": _Kind(_is_bulleted, ("count",)),
    "list": _Kind(_is_list, ("count",)),
    "words": _Kind(_has_count_of_words, ("count",)),
    "capitals": _Kind(_is_capitals),
    "question": _Kind(_is_question),
    "quoted": _Kind(_is_quoted),
    "repeats": _Kind(_repeats, ("text",)),
    "one_of": _Kind(_is_one_of, ("choices",)),
    "json": _Kind(_is_object, ("keys",)),
}
