"""The interface of graders: a score for each completion, and groups of equal answers for majority votes."""

from __future__ import annotations

import math
import threading
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import ClassVar, Literal, NamedTuple, TypeVar, get_args

from opsd_lightning.types import ConfigError, Example

#: Reason for a grade without a verdict: a time limit, or a lack of memory or a crash.
Problem = Literal["", "timeout", "failure"]

PROBLEMS: dict[str, Problem] = {"grading_timeouts": "timeout", "grading_failures": "failure"}
"""Problems that make a completion count as wrong, by the metric that counts them (without the prefix ``val/``)."""

_Call = TypeVar("_Call")
_Result = TypeVar("_Result")


class Grade(NamedTuple):
    """Grade of a completion.

    Args:
        score: Score from 0 (worst) to 1 (best).
        answer: Answer of the completion, for majority votes and reports. None if it has none.
        feedback: Text for the teacher about the completion, such as the message of a failed test. May be empty.
        problem: Reason why there is no verdict and the score is 0. ``timeout`` if grading took too long, ``failure`` if it
            needed too much memory or crashed, otherwise empty.
    """

    score: float
    answer: str | None = None
    feedback: str = ""
    problem: Problem = ""


class Grader(ABC):
    """Base class of graders.

    A grader implements `grade`. The other methods have defaults. Grading must end: limit the time of everything that depends
    on a completion, and run code that may crash in another process.

    Attributes:
        grades_completions: False for `NoGrader`. Validation then measures demonstrations instead of sampling completions.
        repeatable: True if grades depend on the settings and the code of this package alone. Verified rows are then cached.
        concurrent_calls: Number of calls of `grade` and `verify` at one time. Above 1, they are called from threads.

    Example::

        >>> from opsd_lightning import Example, Grade, Grader
        >>> class Length(Grader):
        ...     def grade(self, completion, example):
        ...         return Grade(score=min(len(completion) / 10, 1.0))
        >>> Length().grade("short", Example("Write ten letters.", "", "")).score
        0.5
    """

    grades_completions: ClassVar[bool] = True
    repeatable: ClassVar[bool] = False

    @property
    def concurrent_calls(self) -> int:
        return 1

    @property
    def reads_boxes(self) -> bool:
        r"""True if the answer may be in ``\boxed{...}``, which the default prompts of questions ask for. Defaults to False.

        If it is False, ``data.prompts.student_template`` should be set, and a message before training says so.
        """
        return False

    @abstractmethod
    def grade(self, completion: str, example: Example) -> Grade:
        """Grade a completion.

        Args:
            completion: Text of the completion, without special tokens.
            example: The question, with its reference answer and the other columns of its row.
        """

    def can_grade(self, example: Example) -> bool:
        """Return True if an example has what `grade` compares completions with. Defaults to a reference answer.

        The data module calls it before training.

        Raises:
            ConfigError: The example has a reference that cannot be read.
        """
        return bool(example.answer)

    def shown_reference(self, example: Example) -> str:
        """Return the reference answer of an example as contexts and reports show it. Defaults to ``example.answer``."""
        return example.answer

    def is_right(self, score: float) -> bool:
        """Return True if a completion with this score counts as right in pass@k, maj@k and contexts. Defaults to score 1."""
        return score >= 1

    def same(self, first: str, second: str) -> bool | None:
        """Return True if two answers are equal, for votes. None if there is no verdict.

        Defaults to equal texts without surrounding white space.
        """
        return first.strip() == second.strip()

    def verify(self, example: Example) -> Grade:
        """Grade the trace of an example. Under ``data.verify`` rows with a wrong trace are dropped.

        Defaults to the grade of the trace as a completion. If the example has nothing to compare it with (`can_grade`), a
        trace with an answer gets score 1, and this answer becomes the reference.
        """
        grade = self.grade(example.trace, example)
        return grade if self.can_grade(example) else grade._replace(score=float(grade.answer is not None), feedback="")

    # -- many at once ------------------------------------------------------------------------------------------------------

    def grades(self, completions: Sequence[str], examples: Sequence[Example]) -> list[Grade]:
        """Grade many completions with `grade`.

        Args:
            completions: Texts of the completions.
            examples: The example of each completion.

        Raises:
            ConfigError: `grade` returns something else than a `Grade`, or a score that is not a number from 0 to 1.
        """
        found = self.map(lambda pair: self.grade(*pair), list(zip(completions, examples, strict=True)))
        return [self._checked(grade) for grade in found]

    def verifications(self, examples: Sequence[Example]) -> list[Grade]:
        """Grade the traces of many examples with `verify`.

        Raises:
            ConfigError: See `grades`.
        """
        return [self._checked(grade) for grade in self.map(self.verify, examples)]

    def votes(self, answers: Sequence[str | None], right: Sequence[bool]) -> list[int | None]:
        """Group the answers to one question with `same`, for a majority vote.

        All right answers are one group. A wrong answer is compared with the first answer of each wrong group. After a
        comparison without a verdict, neither of its answers is compared again. So there are at most as many of these as
        different answers.

        Args:
            answers: Answer of each completion, or None.
            right: For each completion, True if it is right.

        Returns:
            Group number of each answer: 0 for right answers, 1, 2, ... for wrong ones in order of appearance, and None for a
            missing answer.
        """
        known: dict[str, int] = {}  # group of each wrong answer, by its text
        firsts: list[str | None] = []  # for each wrong group, the answer to compare with; None if it is not to be compared
        found: list[int | None] = []
        for answer, is_right in zip(answers, right, strict=True):
            if answer is None or is_right:
                found.append(None if answer is None else 0)
                continue
            answer = answer.strip()
            if answer not in known:
                vote, comparable = len(firsts), True
                for place, first in enumerate(firsts):
                    same = None if first is None else self.same(first, answer)
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
        """Group the answers to many questions with `votes`.

        An answer whose grade has no verdict is not compared again. It is grouped with identical texts only.

        Args:
            questions: For each question, the grades of its completions.
        """

        def cast(grades: Sequence[Grade]) -> list[int | None]:
            votes = self.votes([None if g.problem else g.answer for g in grades], [self.is_right(g.score) for g in grades])
            return _add_undecided_votes(votes, grades)

        return self.map(cast, questions)

    def map(self, function: Callable[[_Call], _Result], calls: Sequence[_Call]) -> list[_Result]:
        """Apply a function that calls `grade`, `verify` or `same`, in at most `concurrent_calls` threads."""
        if self.concurrent_calls < 2 or len(calls) < 2:
            return [function(call) for call in calls]
        return in_threads(function, calls, self.concurrent_calls, self.cancel)

    def cancel(self, threads: Sequence[threading.Thread]) -> None:
        """End the running calls of some threads, after an error or Ctrl-C. Called if `concurrent_calls` is above 1."""

    def _checked(self, grade: object) -> Grade:
        """Return a grade with its score as a float. The methods of a user's grader may return anything."""

        def refused(what: str, fix: str) -> ConfigError:
            return ConfigError(f"{type(self).__name__} returns {what}", "data.grader", fix)

        if not isinstance(grade, Grade):
            raise refused(f"a {type(grade).__name__} instead of a Grade", "Return Grade(score=...)")
        try:
            score = math.nan if isinstance(grade.score, str) else float(grade.score)
        except (TypeError, ValueError):
            score = math.nan
        if not 0 <= score <= 1:  # also NaN
            raise refused(f"the score {grade.score!r}", "Return a number from 0 to 1")
        if not isinstance(grade.answer, (str, type(None))):
            raise refused(f"an answer of type {type(grade.answer).__name__}", "Return a text, or None for no answer")
        if not isinstance(grade.feedback, str):
            raise refused(f"feedback of type {type(grade.feedback).__name__}", "Return a text, which may be empty")
        if grade.problem not in get_args(Problem):
            raise refused(f"the problem {grade.problem!r}", "Return timeout, failure or an empty text")
        return grade._replace(score=score)


def _add_undecided_votes(votes: Sequence[int | None], grades: Sequence[Grade]) -> list[int | None]:
    """Add groups for the answers without a verdict."""
    found, own = list(votes), dict[str, int]()
    first = max((vote for vote in votes if vote is not None), default=0) + 1
    for place, grade in enumerate(grades):
        if grade.problem and grade.answer is not None:
            found[place] = own.setdefault(grade.answer.strip(), first + len(own))
    return found


def in_threads(
    function: Callable[[_Call], _Result],
    calls: Sequence[_Call],
    count: int,
    cancel: Callable[[Sequence[threading.Thread]], object] = lambda threads: None,
) -> list[_Result]:
    """Apply a function to each call in daemon threads.

    Args:
        function: The function.
        calls: Its arguments.
        count: Largest number of threads.
        cancel: Called with the threads if a call raises an error or Ctrl-C is pressed.
    """
    found: dict[int, _Result] = {}
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

    threads = [threading.Thread(target=work, name="grading", daemon=True) for _ in range(min(count, len(calls)))]
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    except BaseException as error:
        errors.append(error)
        cancel(threads)
        raise
    if errors:
        raise errors[0]
    return [found[place] for place in range(len(calls))]
