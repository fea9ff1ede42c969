"""Find the final answer of a text and decide whether it equals the reference, in bounded time anywhere.

Reading is the work of ``final_answer``, comparing that of ``answer_forms``, which leaves expressions to math-verify. That
runs in processes of its own (``math_pool``): a question that takes too long counts as wrong.
"""

from __future__ import annotations

import threading
import warnings
from collections.abc import Callable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, TypeVar

import regex

from opsd_lightning.grading import answer_forms, math_pool
from opsd_lightning.grading.final_answer import behind_thinking, final_answer, last_boxed
from opsd_lightning.types import ConfigError, PositiveFloat, checked

AUTO = "auto"
"""The ``answer_pattern`` that stands for the package's own reader."""

Problem = Literal["", "timeout", "failure"]

PROBLEMS: dict[str, Problem] = {"grading_timeouts": "timeout", "grading_failures": "failure"}
"""The metrics that count completions which are wrong for want of a verdict, by their names behind ``val/``."""

T = TypeVar("T")


class Grade(NamedTuple):
    """A completion, graded.

    Args:
        answer: Its final answer, or None.
        correct: True if that equals the reference.
        problem: ``timeout`` where it counts as wrong because the time was over, ``failure`` because comparing it ended its
            worker twice or needed too much memory, otherwise empty.
    """

    answer: str | None
    correct: bool
    problem: Problem = ""


@checked
@dataclass(frozen=True)
class MathGrader:
    r"""Grades the final answer of a completion against the reference.

    The final answer is the last ``\boxed{...}`` of the text, otherwise what ``answer_pattern`` finds, otherwise there is
    none and the completion is wrong. Text in a thinking block is not looked at; one that is not closed gives no answer.

    Args:
        answer_pattern: How an answer that is not boxed is found. ``auto`` reads the whole answer behind phrases such as
            "The answer is 42", "**Answer:** 3 1/2" or a last line "#### 42", or none where its end is not clear.
            Null: only what is boxed counts. Otherwise a regular expression whose first group is the answer; the last
            match counts. It is run for at most ``timeout_seconds``.
        timeout_seconds: The longest that one comparison may take before it counts as wrong. Such completions are counted as
            ``val/grading_timeouts``.
    """

    answer_pattern: str | None = AUTO
    timeout_seconds: PositiveFloat = 5.0

    def __post_init__(self) -> None:
        if self.answer_pattern is None or self.answer_pattern == AUTO:
            return
        setting, fix = "data.grader.answer_pattern", "Put the answer's part in parentheses, or set it to auto or null"
        try:
            groups = regex.compile(self.answer_pattern).groups
        except regex.error as error:
            raise ConfigError(f"{self.answer_pattern!r} is not a regular expression ({error})", setting, fix) from None
        if groups < 1:
            raise ConfigError(f"{self.answer_pattern!r} has no group", setting, fix)

    def find_answer(self, text: str) -> str | None:
        """The final answer that a text gives, or None. It is never empty."""
        if self.answer_pattern == AUTO:
            return final_answer(text)
        text = behind_thinking(text) or ""
        boxed = last_boxed(text)
        if boxed is not None or self.answer_pattern is None:
            return boxed
        found = None
        try:
            # concurrent: other threads run meanwhile
            for match in regex.finditer(self.answer_pattern, text, timeout=self.timeout_seconds, concurrent=True):
                found = (match[1] or "").strip() or found
        except TimeoutError:
            _note("timeout", f"data.grader.answer_pattern in {text[-200:]!r}")
            return None
        return found

    def equal(self, answer: str | None, reference: str) -> bool:
        """Whether an answer equals the reference, mathematically; False where that takes too long."""
        return answer is not None and bool(_compare(reference.strip(), answer.strip(), self.timeout_seconds))

    def grade(self, completion: str, reference: str) -> bool:
        """Whether a completion's final answer equals the reference."""
        return self.equal(self.find_answer(completion), reference)

    def grades(self, completions: Sequence[str], references: Sequence[str]) -> list[Grade]:
        """Grade many completions, several at the same time, by `find_answer` and `equal`.

        What is written alike is compared once. A subclass's own `find_answer`, `equal` and `grade` are called in this
        thread, one after the other; its `grade` decides in the place of `equal`.

        Args:
            completions: Texts.
            references: The right answer of each.
        """
        in_turn = type(self).find_answer is not MathGrader.find_answer or self.answer_pattern in (None, AUTO)
        found = _each(self.find_answer, [(text,) for text in completions], in_turn)
        if type(self).grade is not MathGrader.grade:
            graded = _each(self.grade, list(zip(completions, references, strict=True)), in_turn=True)
            return [Grade(answer, *verdict) for (answer, _), verdict in zip(found, graded, strict=True)]
        pairs = [(answer, reference) for (answer, _), reference in zip(found, references, strict=True)]
        different = list(dict.fromkeys(pairs))
        verdicts = _each(self.equal, different, in_turn=type(self).equal is not MathGrader.equal)
        known = dict(zip(different, verdicts, strict=True))
        return [
            Grade(answer, known[pair][0], problem or known[pair][1])
            for (answer, problem), pair in zip(found, pairs, strict=True)
        ]

    def votes(self, answers: Sequence[str | None], correct: Sequence[bool]) -> list[int | None]:
        """Which of one question's answers are one vote, because they are mathematically equal ("0.5" and "1/2").

        Correct answers are one vote. Each wrong one is compared with the first of every wrong vote so far; once a
        comparison took too long, neither of the two is compared again, so that no more comparisons run into their time
        limit than there are different answers.

        Args:
            answers: The final answer of each completion, None where there is none.
            correct: Whether each is right.

        Returns:
            The number of each answer's vote: 0 for the correct ones, from 1 on in order of appearance for the others, None
            where there is no answer.
        """
        known: dict[str, int] = {}  # wrong answers, as they are written
        firsts: list[str | None] = []  # of each wrong vote the answer that others are compared with
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
        """Let the answers of many questions vote, several questions at the same time, by `votes`.

        An answer whose comparison with the reference gave no verdict is not compared again: its vote is of those alone that
        are written alike.

        Args:
            questions: The grades of each question's completions.
        """
        clear = [([None if g.problem else g.answer for g in grades], [g.correct for g in grades]) for grades in questions]
        cast = _each(self.votes, clear, in_turn=type(self).votes is not MathGrader.votes)
        return [_with_unclear(votes, grades) for (votes, _), grades in zip(cast, questions, strict=True)]


def _with_unclear(votes: Sequence[int | None], grades: Sequence[Grade]) -> list[int | None]:
    """Add the votes of answers whose comparison gave no verdict."""
    found, own = list(votes), dict[str, int]()
    first = max((vote for vote in votes if vote is not None), default=0) + 1
    for place, grade in enumerate(grades):
        if grade.problem and grade.answer is not None:
            found[place] = own.setdefault(grade.answer.strip(), first + len(own))
    return found


# -- time-outs and failures ----------------------------------------------------------------------------------------------

_problem: ContextVar[list[Problem] | None] = ContextVar("problem", default=None)
_warned: set[Problem] = set()
_MEANING = {
    "timeout": "took longer than data.grader.timeout_seconds: it counts as wrong, as all that follow (grading_timeouts)",
    "failure": "could not be compared: it counts as wrong, as all that follow (grading_failures)",
}


def _each(function: Callable[..., T], calls: Sequence[tuple[Any, ...]], in_turn: bool) -> list[tuple[T, Problem]]:
    """Call a function with each tuple of arguments; return its values with the problems noted in the calls."""

    def watched(arguments: tuple[Any, ...]) -> tuple[T, Problem]:
        noted: list[Problem] = []
        token = _problem.set(noted)
        try:
            return function(*arguments), noted[-1] if noted else ""
        finally:
            _problem.reset(token)

    if in_turn or len(calls) < 2:
        return [watched(arguments) for arguments in calls]
    return _in_parallel(watched, calls)


def _in_parallel(function: Callable[[tuple[Any, ...]], T], calls: Sequence[tuple[Any, ...]]) -> list[T]:
    """Call a function with each tuple of arguments, in threads that do not keep the interpreter from ending.

    What is under way ends at once where a call raises, or Ctrl-C is pressed.
    """
    found: dict[int, T] = {}
    errors: list[BaseException] = []
    waiting = iter(range(len(calls)))  # its next() is one step, also with several threads

    def work() -> None:
        try:
            for place in waiting:
                if errors:
                    return
                found[place] = function(calls[place])
        except BaseException as error:
            errors.append(error)

    count = min(len(calls), math_pool.workers())
    threads = [threading.Thread(target=work, name="grading", daemon=True) for _ in range(count)]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        math_pool.shared().end(threads)
        raise
    if errors:
        raise errors[0]
    return [found[place] for place in range(len(calls))]


def _note(problem: Problem, example: str) -> None:
    """Count a call without a verdict, and warn of the first of its kind."""
    if (noted := _problem.get()) is not None:
        noted.append(problem)
    if problem not in _warned:
        _warned.add(problem)
        warnings.warn(f"{example:.300} {_MEANING[problem]}", stacklevel=2)


# -- comparing -----------------------------------------------------------------------------------------------------------

_KEPT, _LONGEST_KEPT = 16384, 500
_verdicts: dict[tuple[str, str], bool] = {}  # time-outs are not remembered: a busy machine may have caused them


def _compare(reference: str, answer: str, timeout_seconds: float) -> bool | None:
    """Return whether two answers are equal; None where that takes too long or fails."""
    left = timeout_seconds

    def algebra(reference: str, answer: str) -> bool:
        nonlocal left
        question = (reference, answer)
        same = _verdicts.get(question)
        if same is None:
            if left <= 0:
                raise TimeoutError
            same, spent = math_pool.shared().ask(reference, answer, left)
            left -= spent
            if len(reference) + len(answer) <= _LONGEST_KEPT:
                if len(_verdicts) >= _KEPT:
                    _verdicts.clear()
                _verdicts[question] = same
        return same

    try:
        return answer_forms.equal(reference, answer, algebra)
    except TimeoutError:
        _note("timeout", f"comparing {answer[:100]!r} with {reference[:100]!r}")
    except math_pool.Ungradable as error:
        _note("failure", f"comparing {answer[:100]!r} with {reference[:100]!r}: {error}, and it")
    return None
