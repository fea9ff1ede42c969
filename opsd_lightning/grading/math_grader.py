"""Grade the final answers of completions against reference answers, in bounded time.

``final_answer`` finds the answer in a text. ``answer_forms`` compares it with the reference, and leaves expressions to
math-verify, which runs in separate processes (``worker_pool``). A comparison that takes too long counts as wrong.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, ClassVar, TypeVar

from opsd_lightning.grading import answer_forms, worker_pool
from opsd_lightning.grading.base import Grade, Grader, Problem
from opsd_lightning.grading.example_columns import SETTING
from opsd_lightning.grading.final_answer import final_answer, last_boxed, strip_thinking
from opsd_lightning.grading.patterns import check_pattern, last_match
from opsd_lightning.types import Example, PositiveFloat, checked

AUTO = "auto"
"""Value of ``answer_pattern`` that selects `final_answer`."""

JOB = "math_job"
"""Job of the workers that compare expressions."""

T = TypeVar("T")


@checked
@dataclass(frozen=True)
class MathGrader(Grader):
    r"""Grader that compares the final answer of a completion with the reference.

    The final answer is the last ``\boxed{...}`` of the text. Without one, it is the answer that ``answer_pattern`` finds.
    A completion without an answer is wrong. Thinking blocks are skipped, and a text with an open thinking block has no
    answer.

    Args:
        answer_pattern: Method to find an answer that is not boxed. ``auto`` reads the answer after phrases such as
            "The answer is 42" or "**Answer:** 3 1/2", or in a last line "#### 42", and finds none if its end is unclear.
            Null accepts boxed answers only. Any other value is a regular expression whose first group is the answer. Its
            last match counts, and the search takes at most ``timeout_seconds``.
        timeout_seconds: Time limit of one comparison in seconds. A comparison that exceeds it counts as wrong and is
            counted in ``val/grading_timeouts``.

    Example::

        >>> from opsd_lightning import Example, MathGrader
        >>> grader = MathGrader()
        >>> grader.find_answer("There are 7 apples left, so the answer is 7.")
        '7'
        >>> half = Example("How many litres do they have together?", trace="", answer="1/2")
        >>> grader.grade(r"Together they have \boxed{0.5} litres.", half).score
        1.0
    """

    repeatable: ClassVar[bool] = True

    answer_pattern: str | None = AUTO
    timeout_seconds: PositiveFloat = 5.0

    def __post_init__(self) -> None:
        if self.answer_pattern is None or self.answer_pattern == AUTO:
            return
        fix = "Put the part with the answer in parentheses, or set it to auto or null"
        check_pattern(self.answer_pattern, f"{SETTING}answer_pattern", fix)

    def find_answer(self, text: str) -> str | None:
        """Return the final answer of a text, or None. The answer is never empty."""
        if self.answer_pattern == AUTO:
            return final_answer(text)
        text = strip_thinking(text) or ""
        boxed = last_boxed(text)
        if boxed is not None or self.answer_pattern is None:
            return boxed
        try:
            return last_match(self.answer_pattern, text, self.timeout_seconds)
        except TimeoutError:
            _record_problem("timeout", f"searching {text[-200:]!r} for {SETTING}answer_pattern")
            return None

    def equal(self, answer: str | None, reference: str) -> bool:
        """Return True if an answer is mathematically equal to the reference, and False if the comparison takes too long."""
        return answer is not None and bool(_compare(reference.strip(), answer.strip(), self.timeout_seconds))

    @property
    def reads_boxes(self) -> bool:
        return True

    @property
    def concurrent_calls(self) -> int:
        return worker_pool.workers() if type(self) is MathGrader else 1  # methods of a subclass need not be thread-safe

    def grade(self, completion: str, example: Example) -> Grade:
        """Return score 1 if the final answer of a completion equals the reference, else 0."""
        return self._graded(_watched(self.find_answer, completion), example.answer)

    def same(self, first: str, second: str) -> bool | None:
        """Return True if two answers are mathematically equal. None if the comparison takes too long or fails."""
        equal, problem = _watched(self.equal, second, first)
        return None if problem else equal

    def verify(self, example: Example) -> Grade:
        """Return score 1 if the final answer of the trace equals the reference, or if there is no reference."""
        if example.answer:
            return self.grade(example.trace, example)
        answer, problem = _watched(self.find_answer, example.trace)
        return Grade(float(answer is not None), answer, problem=problem)

    def grades(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """Grade many completions. Identical pairs of answer and reference are compared once."""
        if type(self).grade is not MathGrader.grade:
            return super().grades(completions, examples)
        if type(self) is MathGrader and self.answer_pattern in (None, AUTO):  # threads gain nothing
            found = [_watched(self.find_answer, text) for text in completions]
        else:
            found = self.map(lambda text: _watched(self.find_answer, text), completions)
        pairs = [(answer, example.answer) for answer, example in zip(found, examples, strict=True)]
        different = list(dict.fromkeys(pairs))
        known = dict(zip(different, self.map(lambda pair: self._graded(*pair), different), strict=True))
        return [known[pair] for pair in pairs]

    def cancel(self, threads: Sequence[threading.Thread]) -> None:
        worker_pool.shared(JOB).end(threads)

    def _graded(self, found: tuple[str | None, Problem], reference: str) -> Grade:
        answer, problem = found
        equal, failed = _watched(self.equal, answer, reference)
        return Grade(float(equal), answer, problem=problem or failed)


# -- timeouts and failures -----------------------------------------------------------------------------------------------

_problem: ContextVar[list[Problem] | None] = ContextVar("problem", default=None)
_warned: set[Problem] = set()
_CONSEQUENCE = {
    "timeout": "took longer than data.grader.init_args.timeout_seconds. Such answers count as wrong (see grading_timeouts)",
    "failure": "failed. Such answers count as wrong (see grading_failures)",
}


def _watched(function: Callable[..., T], *arguments: Any) -> tuple[T, Problem]:
    """Call a function, and return its result with the problem of the call."""
    noted: list[Problem] = []
    token = _problem.set(noted)
    try:
        return function(*arguments), noted[-1] if noted else ""
    finally:
        _problem.reset(token)


def _record_problem(problem: Problem, example: str) -> None:
    """Record a call without a verdict, and warn about the first one of its kind."""
    if (noted := _problem.get()) is not None:
        noted.append(problem)
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"{example:.300} {_CONSEQUENCE[problem]}", stacklevel=2)


# -- comparing -----------------------------------------------------------------------------------------------------------

_KEPT, _LONGEST_KEPT = 16384, 500
_verdicts: dict[tuple[str, str], bool] = {}  # cached verdicts, without timeouts, which a busy machine may have caused


def _compare(reference: str, answer: str, timeout_seconds: float) -> bool | None:
    """Return True if two answers are equal, and None if the comparison takes too long or fails."""
    left = timeout_seconds

    def algebra(reference: str, answer: str) -> bool:
        nonlocal left
        question = (reference, answer)
        same = _verdicts.get(question)
        if same is None:
            if left <= 0:
                raise TimeoutError
            same, spent = worker_pool.shared(JOB).ask((reference, answer), left)
            left -= spent
            if len(reference) + len(answer) <= _LONGEST_KEPT:
                if len(_verdicts) >= _KEPT:
                    _verdicts.clear()
                _verdicts[question] = same
        return same

    try:
        return answer_forms.equal(reference, answer, algebra)
    except TimeoutError:
        _record_problem("timeout", f"comparing {answer[:100]!r} with {reference[:100]!r}")
    except worker_pool.UngradableError as error:
        _record_problem("failure", f"comparing {answer[:100]!r} with {reference[:100]!r} ({error})")
    return None
