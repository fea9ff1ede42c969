"""Find the final answer of a text and decide whether it equals the reference, in bounded time anywhere.

Reading is the work of ``answers``, comparing that of ``answer_forms``, which leaves expressions to math-verify. That
runs in a process of its own (``math_worker``): a question that takes too long counts as wrong.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

import regex
from jsonargparse.typing import PositiveFloat

from opsd_lightning import answer_forms
from opsd_lightning.answers import behind_thinking, final_answer, last_boxed
from opsd_lightning.math_worker import Worker
from opsd_lightning.types import ConfigError

AUTO = "auto"
"""The ``answer_pattern`` that stands for the package's own reader."""


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
        timeout_seconds: The longest that one comparison may take before it counts as wrong.
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
            for match in regex.finditer(self.answer_pattern, text, timeout=self.timeout_seconds):
                found = (match[1] or "").strip() or found
        except TimeoutError:
            return None
        return found

    def equal(self, answer: str | None, reference: str) -> bool:
        """Whether an answer equals the reference, mathematically; False where that takes too long."""
        return answer is not None and bool(_compare(reference.strip(), answer.strip(), self.timeout_seconds))

    def grade(self, completion: str, reference: str) -> bool:
        """Whether a completion's final answer equals the reference."""
        return self.equal(self.find_answer(completion), reference)

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


def _compare(reference: str, answer: str, timeout_seconds: float) -> bool | None:
    """Whether two answers are equal; None where that takes too long."""
    deadline: float | None = None  # from the first question's end: it may have had to start the process

    def algebra(reference: str, answer: str) -> bool:
        nonlocal deadline
        if deadline is not None and time.monotonic() > deadline:
            raise TimeoutError
        same = _verdict(reference, answer, timeout_seconds)
        deadline = deadline or time.monotonic() + timeout_seconds
        return same

    try:
        return answer_forms.equal(reference, answer, algebra)
    except TimeoutError:
        return None


@lru_cache(maxsize=65536)  # time-outs are not remembered: a busy machine may have caused them
def _verdict(reference: str, answer: str, timeout_seconds: float) -> bool:
    return Worker.shared().verify(reference, answer, timeout_seconds)
