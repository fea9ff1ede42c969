"""Grade completions with the scores of reasoning-gym's own data sets, in bounded time."""

from __future__ import annotations

import json
import math
import re
import threading
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

from opsd_lightning.grading import worker_pool
from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.example_columns import SETTING, shown
from opsd_lightning.grading.final_answer import final_answer, strip_thinking
from opsd_lightning.grading.patterns import check_pattern, last_match
from opsd_lightning.types import ConfigError, Example, PositiveFloat, checked

JOB = "reasoning_gym_job"
"""Job of the workers that score answers."""

COLUMN = "reasoning_gym"
"""Column in which `ReasoningGymSource` stores the task, its options and the entry, as JSON text."""

_TAGS = re.compile(r"<answer>(.*?)</answer>", re.DOTALL)


@checked
@dataclass(frozen=True)
class ReasoningGymGrader(Grader):
    """Grader that asks reasoning-gym for the score of an answer. Works with every task of `ReasoningGymSource`.

    The score is the data set's own (``score_answer``), limited to 0 and 1. Some tasks give part of the score for a wrong
    answer. Score 1 counts as right. A task that scores nonsense as right is refused, as ``game_of_life_halting`` of version
    0.1.25 does. Scoring runs in worker processes that are limited in time and memory. Answers that are evaluated by the data
    set have no access to files, processes and the network there. Thinking blocks are removed first.

    The answer is the text in the last ``<answer>...</answer>``, as reasoning-gym's prompts ask for.

    Args:
        without_tags: Answer of a completion without these tags: its ``last_line``, the ``whole`` text (for tasks whose
            answer has several lines, such as a board), or ``none`` for no answer.
        answer_pattern: Regular expression whose first group is the answer. Its last match counts. Null looks for tags.
        timeout_seconds: Time limit of scoring one answer in seconds. An answer that exceeds it counts as wrong and is
            counted in ``val/grading_timeouts``.

    Example::

        >>> from opsd_lightning import ReasoningGymGrader, ReasoningGymSource
        >>> (example,) = ReasoningGymSource("chain_sum", size=1, seed=2).examples()
        >>> grader = ReasoningGymGrader()
        >>> grader.grade(f"So it is <answer>{example.answer}</answer>.", example).score
        1.0
    """

    without_tags: Literal["last_line", "whole", "none"] = "last_line"
    answer_pattern: str | None = None
    timeout_seconds: PositiveFloat = 10.0

    def __post_init__(self) -> None:
        if self.answer_pattern is not None:
            fix = "Put the answer in parentheses, or set it to null"
            check_pattern(self.answer_pattern, f"{SETTING}answer_pattern", fix)
        if self.without_tags not in ("last_line", "whole", "none"):
            fix = "Set it to last_line, whole or none"
            raise ConfigError(f"it is {self.without_tags!r}", f"{SETTING}without_tags", fix)

    @property
    def concurrent_calls(self) -> int:
        return worker_pool.workers()

    def cancel(self, threads: Sequence[threading.Thread]) -> None:
        worker_pool.shared(JOB).end(threads)

    @property
    def reads_boxes(self) -> bool:
        return "boxed" in (self.answer_pattern or "")

    def can_grade(self, example: Example) -> bool:
        return COLUMN in example.columns

    def grade(self, completion: str, example: Example) -> Grade:
        task = self._task(example)
        try:
            answer = self.find_answer(completion)
        except TimeoutError:
            return Grade(0.0, problem="timeout", feedback="The search for the answer took too long.")
        return self._scored(answer, task)

    def verify(self, example: Example) -> Grade:
        """Grade the trace. Its answer is also found after phrases such as "The answer is" and "####"."""
        try:
            answer = self.find_answer(example.trace)
        except TimeoutError:
            return Grade(0.0, problem="timeout")
        if self.answer_pattern is None and not _TAGS.search(example.trace):
            answer = final_answer(example.trace) or answer
        return self._scored(answer, self._task(example))

    def find_answer(self, completion: str) -> str | None:
        """Return the answer of a completion, or None.

        Raises:
            TimeoutError: The search with ``answer_pattern`` took too long.
        """
        text = strip_thinking(completion) or ""
        if self.answer_pattern is not None:
            return last_match(self.answer_pattern, text, self.timeout_seconds)
        if tagged := _TAGS.findall(text):
            return tagged[-1].strip() or None
        text = text.strip()
        if self.without_tags == "last_line":
            text = text.rpartition("\n")[2].strip()
        return text or None if self.without_tags != "none" else None

    def _scored(self, answer: str | None, task: dict[str, Any]) -> Grade:
        if answer is None:
            return Grade(0.0, feedback="The completion has no answer.")
        question = (task["task"], task["options"], task["entry"], answer)
        try:
            score, _ = worker_pool.shared(JOB).ask(question, self.timeout_seconds)
        except TimeoutError:
            _warn(
                "timeout", f"scoring {shown(answer)} took longer than {SETTING}timeout_seconds. Such answers count as wrong"
            )
            return Grade(0.0, answer, "Scoring the answer took too long.", "timeout")
        except worker_pool.UngradableError as error:
            _warn("failure", f"scoring {shown(answer)} failed ({error}). Such answers count as wrong")
            return Grade(0.0, answer, "The answer could not be scored.", "failure")
        if not isinstance(score, float) or not math.isfinite(score):
            return Grade(0.0, answer, f"The answer {shown(answer)} cannot be read.")
        score = min(max(score, 0.0), 1.0)
        return Grade(score, answer, "" if score == 1 else f"The answer {shown(answer)} is not right (score {score:.2f}).")

    def _task(self, example: Example) -> dict[str, Any]:
        if COLUMN not in example.columns:
            problem = f"the question {shown(example.question)} is not from ReasoningGymSource"
            raise ConfigError(problem, "data.grader", "Use ReasoningGymSource for the data, or another grader")
        found: dict[str, Any] = json.loads(example.columns[COLUMN])
        if found["task"] not in _distinguishing:
            question = (found["task"], found["options"], found["entry"], _NONSENSE)
            try:
                score, _ = worker_pool.shared(JOB).ask(question, self.timeout_seconds)
            except (TimeoutError, worker_pool.UngradableError):
                return found
            if isinstance(score, float) and score >= 1:
                problem = f"reasoning-gym scores any answer to the task {found['task']!r} as right"
                raise ConfigError(problem, "data.grader", "Choose another task, or another grader")
            _distinguishing.add(found["task"])
        return found


_NONSENSE = "?!"
_distinguishing: set[str] = set()  # tasks that do not score nonsense as right
_warned: set[str] = set()


def _warn(kind: str, text: str) -> None:
    """Warn about the first answer without a verdict of its kind."""
    if kind not in _warned:
        _warned.add(kind)
        warnings.warn(text, stacklevel=2)
