"""Privileged contexts: the text that only the teacher reads, made from an example alone."""

from __future__ import annotations

import math
import random
import re
import unicodedata
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import regex
from jsonargparse.typing import OpenUnitInterval

from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.types import ConfigError, Example, UserError
from opsd_lightning.utils.texts import NotTextError, text_of

if TYPE_CHECKING:
    pass
from opsd_lightning.prompts.templates import _UNIT


class PrivilegedContext(ABC):
    """What the teacher gets to read beside the question.

    Attributes:
        needs_traces: Whether it is made of traces: if not, training questions need none.
        grader: Compares answers. The data module sets it to ``data.grader``.
    """

    needs_traces: bool = True
    grader: MathGrader = MathGrader()

    @abstractmethod
    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        """The context of ``examples[index]``; None for none at all, where the teacher sees the student's wording. An
        empty or blank text leaves the row out.

        Raises:
            UserError: The examples do not hold what this context needs.
        """


class TraceContext(PrivilegedContext):
    """The verified reasoning trace (default)."""

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return examples[index].trace


class AnswerContext(PrivilegedContext):
    """The reference answer alone."""

    needs_traces = False

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        answer = examples[index].answer
        return f"The final answer is {answer}." if answer.strip() else ""


class HintContext(PrivilegedContext):
    """The beginning of the trace, never all of it.

    Words are counted, and characters where a script puts no spaces between words, such as Chinese and Thai. The answer is in
    the hint where the trace states it that early.

    Args:
        share: Share of the trace that the teacher sees, above 0 and below 1.
    """

    def __init__(self, share: OpenUnitInterval = 0.5) -> None:
        self.share = OpenUnitInterval(share)

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        trace = examples[index].trace.strip()
        units = _UNIT.findall(trace)
        if len(units) < 2:  # one word
            units = regex.findall(r"\X", trace)
        return "".join(units[: min(math.ceil(len(units) * self.share), len(units) - 1)]).strip() if units else ""


class OtherProblemContext(PrivilegedContext):
    """The trace of a different question: shows the style without the solution.

    A question that differs in white space alone is the same one, and so is one with the same trace.

    Args:
        seed: Seed for choosing the other question.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        own = examples[index]
        question, trace = _folded(own.question), _folded(own.trace)
        if not trace and not any(example.trace for example in examples):
            return ""

        def differs(other: Example) -> bool:
            return bool(other.trace) and _folded(other.question) != question and _folded(other.trace) != trace

        return _another(index, examples, self.seed, differs, "question and trace").trace


class NoContext(PrivilegedContext):
    """Nothing: the teacher reads the student's wording.

    The null control, in which a fixed teacher teaches nothing, only where both roles' prompts are then equal: the chat
    template's arguments and ``data.prompts.teacher_response_prefix`` may still make them differ, and such a teacher trains
    the student. A warning says so before training.
    """

    needs_traces = False

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return None


class WrongContext(PrivilegedContext):
    """The trace with its answer replaced, wherever it stands, by that of a question with another answer.

    ``data.grader`` calls the result wrong: the other answer is not equal to the reference in any notation, and where the
    trace stays right because it writes its answer in several ways, the wrong answer alone takes its place.

    Args:
        seed: Seed for choosing the other question.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        example = examples[index]
        reference = example.answer.strip()
        if not reference:
            return ""

        def wrong(other: Example) -> bool:
            answer = other.answer.strip()
            return bool(answer) and answer != reference and not self.grader.equal(answer, reference)

        try:
            answer = _another(index, examples, self.seed, wrong, "answer").answer.strip()
        except ConfigError:
            if {other.answer.strip() for other in examples} <= {reference, ""}:
                raise
            # All are equal, only written in several ways.
            answer = next(number for number in ("0", "1") if not self.grader.equal(number, reference))
        # Alone: not a part of a word, nor of a longer number or fraction.
        alone = rf"(?<!\w)(?<!\d[.,/]){re.escape(reference)}(?!\w)(?![.,/]\d)"
        trace, replaced = re.subn(alone, lambda _: answer, example.trace)
        final = self.grader.find_answer(trace) if replaced else None
        if final is None or (final.strip() != answer and self.grader.equal(final, reference)):
            return f"The final answer is {answer}."
        return trace


class ColumnContext(PrivilegedContext):
    """Another column of the data. A row where it is null or blank is left out.

    Args:
        column: Its name in the source's rows.
    """

    needs_traces = False

    def __init__(self, column: str) -> None:
        self.column = column

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        columns = examples[index].columns
        if self.column not in columns:
            raise UserError(
                f"data.context.column: the data have no column {self.column!r}; they have {', '.join(map(str, columns))}"
            )
        try:
            return (text_of(columns[self.column]) or "").strip()
        except NotTextError as error:
            problem = f"the column {self.column!r} holds {error} at the question {examples[index].question[:60]!r}"
            raise ConfigError(problem, "data.context.column", "Name a column of text or numbers") from None


def _another(
    index: int, examples: Sequence[Example], seed: int, differs: Callable[[Example], bool], field_name: str
) -> Example:
    """An example that differs from ``examples[index]``, the same one for the same seed."""
    start = random.Random(f"{seed} {examples[index].question}").randrange(len(examples))
    for offset in range(len(examples)):
        other = examples[(start + offset) % len(examples)]
        if differs(other):
            return other
    raise ConfigError(
        f"needs examples that differ in their {field_name}; all {len(examples)} have the same",
        "data.context",
        "Give more data, or another context",
    )


def _folded(text: str) -> str:
    """A text with characters in one form and white space folded, to tell whether two are the same."""
    return " ".join(unicodedata.normalize("NFC", text).split())
