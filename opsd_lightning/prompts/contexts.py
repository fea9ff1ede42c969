"""Privileged contexts: texts that only the teacher reads, made from the data."""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import regex

from opsd_lightning.grading.base import Grader
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.prompts.templates import UNIT
from opsd_lightning.types import ConfigError, Example, OpenUnitInterval, checked
from opsd_lightning.utils.messages import column_text, question_key
from opsd_lightning.utils.texts import NotTextError, normalize_text


class PrivilegedContext(ABC):
    """Base class of texts that the teacher reads beside the question.

    Attributes:
        needs_traces: If True, the context is made of traces, and training questions without one are dropped.
        grader: Compares answers. The data module sets it to ``data.grader``.
    """

    needs_traces: bool = True
    grader: Grader = MathGrader()

    @abstractmethod
    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        """Return the context of ``examples[index]``.

        Returns:
            The text. A blank text drops the row. None gives the teacher the student's prompt template.

        Raises:
            ConfigError: The examples lack the data that this context is made of.
        """


class TraceContext(PrivilegedContext):
    """The verified reasoning trace (default).

    Example::

        >>> from opsd_lightning import Example, TraceContext
        >>> TraceContext().text(0, [Example("1 + 1?", "1 + 1 = 2. The answer is 2.", "2")])
        '1 + 1 = 2. The answer is 2.'
    """

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return examples[index].trace


class AnswerContext(PrivilegedContext):
    """The reference answer alone."""

    needs_traces = False

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        answer = self.grader.shown_reference(examples[index])
        return f"The final answer is {answer}." if answer.strip() else ""


@checked
class HintContext(PrivilegedContext):
    """The beginning of the trace, never all of it.

    The share counts words, or characters in scripts without spaces between words, such as Chinese and Thai. The hint may
    contain the answer, if the trace states it early.

    Args:
        share: Share of the trace that the teacher reads, above 0 and below 1.

    Example::

        >>> from opsd_lightning import Example, HintContext
        >>> HintContext(share=0.5).text(0, [Example("1 + 1?", "Add one to one. It is 2.", "2")])
        'Add one to one.'
    """

    def __init__(self, share: OpenUnitInterval = 0.5) -> None:
        self.share = share

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        trace = examples[index].trace.strip()
        units = UNIT.findall(trace)
        if len(units) < 2:  # one word
            units = regex.findall(r"\X", trace)
        return "".join(units[: min(math.ceil(len(units) * self.share), len(units) - 1)]).strip() if units else ""


class OtherProblemContext(PrivilegedContext):
    """The trace of a different question, which shows the style without the solution.

    The other question and its trace differ from the own ones in more than white space.

    Args:
        seed: Seed for choosing the other question.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        own = examples[index]
        question, trace = question_key(own), normalize_text(own.trace)
        if not trace and not any(example.trace for example in examples):
            return ""

        def differs(other: Example) -> bool:
            return bool(other.trace) and question_key(other) != question and normalize_text(other.trace) != trace

        return _another(index, examples, self.seed, differs, "question and trace").trace


class NoContext(PrivilegedContext):
    """No context: the teacher's prompt is made with the student's template.

    This is the null control, in which a fixed teacher teaches nothing, if the prompts of both roles are equal. They still
    differ with other chat template arguments for the teacher, or with ``data.prompts.teacher_response_prefix``. Then the
    teacher trains the student, and a warning says so before training: this is the control of a run in which the teacher
    thinks, the student does not, and the teacher also reads a context (arXiv 2609.20612).
    """

    needs_traces = False

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return None


class WrongContext(PrivilegedContext):
    """The trace with every occurrence of its answer replaced by the answer of another question.

    ``data.grader`` grades the result as wrong: the other answer differs from the reference in any notation. If the trace
    would still be right, because it writes its answer in several ways, the context is the wrong answer alone.

    Args:
        seed: Seed for choosing the other question.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        example, known = examples[index], self.grader.shown_reference
        reference = known(example).strip()
        if not reference:
            return ""

        def wrong(other: Example) -> bool:
            answer = known(other).strip()
            return bool(answer) and answer != reference and not self.grader.same(answer, reference)

        try:
            answer = known(_another(index, examples, self.seed, wrong, "answer")).strip()
        except ConfigError:
            if {known(other).strip() for other in examples} <= {reference, ""}:
                raise
            # All answers are equal, in several notations.
            answer = next(number for number in ("0", "1") if not self.grader.same(number, reference))
        # Not inside a word, a longer number or a fraction.
        alone = rf"(?<!\w)(?<!\d[.,/]){re.escape(reference)}(?!\w)(?![.,/]\d)"
        trace, replaced = re.subn(alone, lambda _: answer, example.trace)
        if not replaced:
            return f"The final answer is {answer}."
        grade = self.grader.grade(trace, example)
        right = self.grader.is_right(grade.score) and (grade.answer or "").strip() != answer
        if grade.answer is None or right:
            return f"The final answer is {answer}."
        return trace


class ColumnContext(PrivilegedContext):
    """A text of another column of the data. Rows with null or blank text are dropped.

    A list of messages reads as their texts, one a line, as in trl's column ``privileged_context``.

    Args:
        column: Name of the column in the source's rows.
    """

    needs_traces = False

    def __init__(self, column: str) -> None:
        self.column = column

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return text_of_column(examples[index], self.column, "data.context.column")


def text_of_column(example: Example, column: str, setting: str) -> str:
    """Return the text of a column of an example's row. Empty for null.

    Raises:
        ConfigError: The row has no such column, or it holds no text.
    """
    if column not in example.columns:
        problem = f"the data have no column {column!r}; they have {', '.join(map(str, example.columns))}"
        raise ConfigError(problem, setting, "Set it to one of them")
    try:
        return (column_text(example.columns[column]) or "").strip()
    except NotTextError as error:
        problem = f"the column {column!r} holds {error} at the question {example.question[:60]!r}"
        raise ConfigError(problem, setting, "Name a column of text or numbers") from None


def _another(
    index: int, examples: Sequence[Example], seed: int, differs: Callable[[Example], bool], field_name: str
) -> Example:
    """Return an example that differs from ``examples[index]``, always the same one for a seed."""
    start = random.Random(f"{seed} {examples[index].question}").randrange(len(examples))
    for offset in range(len(examples)):
        other = examples[(start + offset) % len(examples)]
        if differs(other):
            return other
    raise ConfigError(
        f"it needs examples with different {field_name}, and all {len(examples)} have the same",
        "data.context",
        "Give more data, or choose another context",
    )
