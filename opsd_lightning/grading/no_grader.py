"""The grader of data without right answers."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.types import Example


@dataclass(frozen=True)
class NoGrader(Grader):
    """Grader for demonstrations without a right answer, such as a style or a format.

    Completions are not graded. Validation measures how well the model predicts the demonstrations instead of sampling
    completions. Every demonstration counts as verified.

    Example::

        >>> from opsd_lightning import Example, NoGrader
        >>> example = Example("Greet me like a pirate.", "Ahoy, matey!", "")
        >>> NoGrader().grade("Hello.", example)
        Grade(score=0.0, answer=None, feedback='', problem='')
        >>> NoGrader().verify(example).score
        1.0
    """

    repeatable: ClassVar[bool] = True
    grades_completions: ClassVar[bool] = False

    def grade(self, completion: str, example: Example) -> Grade:
        """Return score 0 without an answer, for callers that grade regardless of `grades_completions`."""
        return Grade(0.0)

    def can_grade(self, example: Example) -> bool:
        return False

    def verify(self, example: Example) -> Grade:
        """Return score 1."""
        return Grade(1.0)
