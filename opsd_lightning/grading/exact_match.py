"""Grade completions by comparing their normalized text with one or more accepted answers."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, ClassVar, Literal

from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.example_columns import SETTING, column_of, shown
from opsd_lightning.grading.final_answer import strip_thinking
from opsd_lightning.grading.patterns import check_pattern, last_match
from opsd_lightning.types import ConfigError, Example, PositiveFloat, checked
from opsd_lightning.utils.texts import NotTextError, text_of

_ARTICLES = re.compile(r"\b(?:a|an|the)\b", re.IGNORECASE)


@checked
@dataclass(frozen=True)
class ExactMatch(Grader):
    r"""Grader that compares the normalized text of a completion with the reference answer.

    A completion that contains more than the answer is wrong, unless ``answer_pattern`` finds the answer in it. Thinking
    blocks are removed first. A completion with an open thinking block has no answer.

    Args:
        answer_pattern: Regular expression whose first group is the answer. Its last match counts. Null compares the whole
            completion.
        ignore_case: If True, case is ignored.
        ignore_white_space: If True, white space at both ends is ignored and each run of white space within counts as one
            space. If False, only white space at both ends is ignored.
        ignore_punctuation: If True, punctuation characters (Unicode category P) are removed. Signs such as ``+`` and ``$``
            are not punctuation.
        ignore_articles: If True, the English articles "a", "an" and "the" are removed.
        unicode_form: Unicode normalization form: ``NFC``, ``NFKC``, which also equates full-width and ordinary characters,
            or null for none.
        references: Column with further accepted answers, a text or a list of texts. Null accepts the reference answer only.
        timeout_seconds: Time limit of the search with ``answer_pattern``, in seconds. A search that exceeds it counts as
            wrong.

    Example::

        >>> from opsd_lightning import ExactMatch, Example
        >>> example = Example("Capital of France?", "", "Paris")
        >>> ExactMatch(ignore_case=True, ignore_punctuation=True).grade("paris.", example).score
        1.0
        >>> ExactMatch().grade("It is Paris.", example).score
        0.0
        >>> ExactMatch(answer_pattern=r"It is (\w+)").grade("It is Paris.", example).score
        1.0
    """

    repeatable: ClassVar[bool] = True

    answer_pattern: str | None = None
    ignore_case: bool = False
    ignore_white_space: bool = True
    ignore_punctuation: bool = False
    ignore_articles: bool = False
    unicode_form: Literal["NFC", "NFKC"] | None = "NFC"
    references: str | None = None
    timeout_seconds: PositiveFloat = 5.0

    def __post_init__(self) -> None:
        if self.answer_pattern is not None:
            check_pattern(
                self.answer_pattern, f"{SETTING}answer_pattern", "Put the answer in parentheses, or set it to null"
            )
        if self.unicode_form not in ("NFC", "NFKC", None):
            raise ConfigError(f"it is {self.unicode_form!r}", f"{SETTING}unicode_form", "Set it to NFC, NFKC or null")

    @property
    def reads_boxes(self) -> bool:
        return "boxed" in (self.answer_pattern or "")

    def can_grade(self, example: Example) -> bool:
        return bool(self._accepted(example))

    def grade(self, completion: str, example: Example) -> Grade:
        text = strip_thinking(completion)
        if text is None:
            return Grade(0.0, feedback="The thinking block is not closed.")
        answer: str | None = text.strip() or None
        if answer is not None and self.answer_pattern is not None:
            try:
                answer = last_match(self.answer_pattern, text, self.timeout_seconds)
            except TimeoutError:
                return Grade(0.0, problem="timeout", feedback="The search for the answer took too long.")
        if answer is None:
            return Grade(0.0, feedback="The completion has no answer.")
        if any(self.same(answer, reference) for reference in self._accepted(example)):
            return Grade(1.0, answer)
        return Grade(0.0, answer, f"The answer {shown(answer)} is wrong.")

    def same(self, first: str, second: str) -> bool:
        """Return True if two texts are equal after normalization."""
        return self._normalized(first) == self._normalized(second)

    def _normalized(self, text: str) -> str:
        if self.unicode_form is not None:
            text = unicodedata.normalize(self.unicode_form, text)
        if self.ignore_case:
            text = text.casefold()
        text = " ".join(text.split()) if self.ignore_white_space else text.strip()
        if self.ignore_punctuation:
            text = _kept("".join(char for char in text if not _is_punctuation(char)), text)
        if self.ignore_articles:
            text = _kept(_ARTICLES.sub(" ", text), text)
        return " ".join(text.split()) if self.ignore_white_space else text.strip()

    def _accepted(self, example: Example) -> Sequence[str]:
        accepted = [example.answer] if example.answer.strip() else []
        if self.references is not None:
            setting = f"{SETTING}references"
            value: Any = column_of(example, self.references, setting)
            for each in value if isinstance(value, (list, tuple)) else [value]:
                try:
                    text = text_of(each)
                except NotTextError as error:
                    problem = f"the column {self.references!r} holds {error} for {shown(example.question)}"
                    raise ConfigError(problem, setting, "Name a column of texts or of lists of texts") from None
                if text is not None and text.strip():
                    accepted.append(text)
        return accepted


def _is_punctuation(char: str) -> bool:
    return unicodedata.category(char).startswith("P")


def _kept(shorter: str, text: str) -> str:
    """Return the shorter text, or the other one if nothing is left of it: "!" must not equal every other sign."""
    return shorter if shorter.strip() else text
