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
from typing import Any, Literal, NamedTuple, TypeVar

import regex

from opsd_lightning.grading import answer_forms, worker_pool
from opsd_lightning.grading.final_answer import final_answer, last_boxed, strip_thinking
from opsd_lightning.types import ConfigError, PositiveFloat, checked

AUTO = "auto"
"""Value of ``answer_pattern`` that selects `final_answer`."""

JOB = "math_job"
"""Job of the workers that compare expressions."""

Problem = Literal["", "timeout", "failure"]

PROBLEMS: dict[str, Problem] = {"grading_timeouts": "timeout", "grading_failures": "failure"}
"""Problems that make a completion count as wrong, by the metric that counts them (without the prefix ``val/``)."""

T = TypeVar("T")


class Grade(NamedTuple):
    """Grade of a completion.

    Args:
        answer: Final answer of the completion, or None.
        correct: True if the answer equals the reference.
        problem: Reason why there is no verdict and the completion counts as wrong. ``timeout`` if the comparison took too
            long, ``failure`` if it needed too much memory or ended two workers, otherwise empty.
    """

    answer: str | None
    correct: bool
    problem: Problem = ""


@checked
@dataclass(frozen=True)
class MathGrader:
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

        >>> from opsd_lightning import MathGrader
        >>> grader = MathGrader()
        >>> grader.find_answer("There are 7 apples left, so the answer is 7.")
        '7'
        >>> grader.grade(r"Together they have \boxed{0.5} litres.", reference="1/2")
        True
        >>> [grade.correct for grade in grader.grades([r"\boxed{3 cm}", "#### 4"], ["3", "5"])]
        [True, False]
    """

    answer_pattern: str | None = AUTO
    timeout_seconds: PositiveFloat = 5.0

    def __post_init__(self) -> None:
        if self.answer_pattern is None or self.answer_pattern == AUTO:
            return
        setting, fix = "data.grader.answer_pattern", "Put the part with the answer in parentheses, or set it to auto or null"
        try:
            groups = regex.compile(self.answer_pattern).groups
        except regex.error as error:
            raise ConfigError(f"{self.answer_pattern!r} is not a regular expression ({error})", setting, fix) from None
        if groups < 1:
            raise ConfigError(f"{self.answer_pattern!r} has no capturing group", setting, fix)

    def find_answer(self, text: str) -> str | None:
        """Return the final answer of a text, or None. The answer is never empty."""
        if self.answer_pattern == AUTO:
            return final_answer(text)
        text = strip_thinking(text) or ""
        boxed = last_boxed(text)
        if boxed is not None or self.answer_pattern is None:
            return boxed
        found = None
        try:
            # concurrent=True releases the GIL
            for match in regex.finditer(self.answer_pattern, text, timeout=self.timeout_seconds, concurrent=True):
                found = (match[1] or "").strip() or found
        except TimeoutError:
            _record_problem("timeout", f"searching {text[-200:]!r} for data.grader.answer_pattern")
            return None
        return found

    def equal(self, answer: str | None, reference: str) -> bool:
        """Return True if an answer is mathematically equal to the reference, and False if the comparison takes too long."""
        return answer is not None and bool(_compare(reference.strip(), answer.strip(), self.timeout_seconds))

    def grade(self, completion: str, reference: str) -> bool:
        """Return True if the final answer of a completion equals the reference."""
        return self.equal(self.find_answer(completion), reference)

    def grades(self, completions: Sequence[str], references: Sequence[str]) -> list[Grade]:
        """Grade many completions in parallel with `find_answer` and `equal`.

        Identical pairs of answer and reference are compared once. Methods that a subclass overrides are called in this
        thread, one call at a time. An overridden `grade` replaces `equal`.

        Args:
            completions: Texts of the completions.
            references: The right answer for each completion.
        """
        sequential = type(self).find_answer is not MathGrader.find_answer or self.answer_pattern in (None, AUTO)
        found = _map_with_problems(self.find_answer, [(text,) for text in completions], sequential)
        if type(self).grade is not MathGrader.grade:
            graded = _map_with_problems(self.grade, list(zip(completions, references, strict=True)), sequential=True)
            return [Grade(answer, *verdict) for (answer, _), verdict in zip(found, graded, strict=True)]
        pairs = [(answer, reference) for (answer, _), reference in zip(found, references, strict=True)]
        different = list(dict.fromkeys(pairs))
        verdicts = _map_with_problems(self.equal, different, sequential=type(self).equal is not MathGrader.equal)
        known = dict(zip(different, verdicts, strict=True))
        return [
            Grade(answer, known[pair][0], problem or known[pair][1])
            for (answer, problem), pair in zip(found, pairs, strict=True)
        ]

    def votes(self, answers: Sequence[str | None], correct: Sequence[bool]) -> list[int | None]:
        """Group the answers to one question by mathematical equality, such as "0.5" and "1/2", for a majority vote.

        All correct answers are one group. A wrong answer is compared with the first answer of each wrong group. After a
        comparison that takes too long, neither of its answers is compared again. So there are at most as many timeouts as
        different answers.

        Args:
            answers: Final answer of each completion, or None.
            correct: For each completion, True if the answer is correct.

        Returns:
            Group number of each answer: 0 for correct answers, 1, 2, ... for wrong ones in order of appearance, and None
            for a missing answer.
        """
        known: dict[str, int] = {}  # group of each wrong answer, by its text
        firsts: list[str | None] = []  # for each wrong group, the answer to compare with; None after a timeout
        found: list[int | None] = []
        for answer, right in zip(answers, correct, strict=True):
            if answer is None or right:
                found.append(None if answer is None else 0)
                continue
            answer = answer.strip()
            if answer not in known:
                vote, comparable = len(firsts), True
                for place, first in enumerate(firsts):
                    same = None if first is None else _compare(first, answer, self.timeout_seconds)
                    if same:
                        vote = place
                        break
                    if same is None and first is not None:
                        firsts[place], comparable = None, False
                        break
                if vote == len(firsts):
                    firsts.append(answer if comparable else None)
                known[answer] = vote + 1
            found.append(known[answer])
        return found

    def votes_of(self, questions: Sequence[Sequence[Grade]]) -> list[list[int | None]]:
        """Group the answers to many questions with `votes`, several questions in parallel.

        An answer whose comparison with the reference gave no verdict is not compared again. It is grouped with identical
        texts only.

        Args:
            questions: For each question, the grades of its completions.
        """
        clear = [([None if g.problem else g.answer for g in grades], [g.correct for g in grades]) for grades in questions]
        cast = _map_with_problems(self.votes, clear, sequential=type(self).votes is not MathGrader.votes)
        return [_add_undecided_votes(votes, grades) for (votes, _), grades in zip(cast, questions, strict=True)]


def _add_undecided_votes(votes: Sequence[int | None], grades: Sequence[Grade]) -> list[int | None]:
    """Add groups for the answers without a verdict."""
    found, own = list(votes), dict[str, int]()
    first = max((vote for vote in votes if vote is not None), default=0) + 1
    for place, grade in enumerate(grades):
        if grade.problem and grade.answer is not None:
            found[place] = own.setdefault(grade.answer.strip(), first + len(own))
    return found


# -- timeouts and failures -----------------------------------------------------------------------------------------------

_problem: ContextVar[list[Problem] | None] = ContextVar("problem", default=None)
_warned: set[Problem] = set()
_CONSEQUENCE = {
    "timeout": "took longer than data.grader.timeout_seconds. Such answers count as wrong (see grading_timeouts)",
    "failure": "failed. Such answers count as wrong (see grading_failures)",
}


def _map_with_problems(
    function: Callable[..., T], calls: Sequence[tuple[Any, ...]], sequential: bool
) -> list[tuple[T, Problem]]:
    """Call a function with each tuple of arguments, and return its results with the problems of the calls."""

    def watched(arguments: tuple[Any, ...]) -> tuple[T, Problem]:
        noted: list[Problem] = []
        token = _problem.set(noted)
        try:
            return function(*arguments), noted[-1] if noted else ""
        finally:
            _problem.reset(token)

    if sequential or len(calls) < 2:
        return [watched(arguments) for arguments in calls]
    return _in_parallel(watched, calls)


def _in_parallel(function: Callable[[tuple[Any, ...]], T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call a function with each tuple of arguments in daemon threads.

    If a call raises an error or Ctrl-C is pressed, running comparisons are cancelled.
    """
    found: dict[int, T] = {}
    errors: list[BaseException] = []
    waiting = iter(range(len(calls)))  # next() is atomic, so threads can share it

    def work() -> None:
        try:
            for place in waiting:
                if errors:
                    return
                found[place] = function(calls[place])
        except BaseException as error:
            errors.append(error)

    count = min(len(calls), worker_pool.workers())
    threads = [threading.Thread(target=work, name="grading", daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        worker_pool.shared(JOB).end(threads)
        raise
    if errors:
        raise errors[0]
    return [found[place] for place in range(len(calls))]


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
