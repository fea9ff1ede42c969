"""Reasons for which the data module drops a row, and the context lengths that rows must fit."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass
from enum import Enum
from typing import NamedTuple


class DropReason(Enum):
    """A reason for dropping a row. ``str()`` gives its text; `RowLimits.text` adds the lengths."""

    EMPTY_QUESTION = "empty question"
    EMPTY_TRACE = "empty trace"
    EMPTY_CONTEXT = "data.context gives the teacher an empty text"
    NO_ANSWER = "data.grader has no reference to compare completions with"
    HELD_OUT = "question is also in data.val or data.test"
    NO_FINAL_ANSWER = "data.grader finds no answer in the trace"
    WRONG_ANSWER = "data.grader grades the trace as wrong"
    PROMPT_TOO_LONG = "prompt and completion do not fit the model's context"
    TRACE_TOO_LONG = "prompt and trace do not fit the model's context"
    TEACHER_TOO_LONG = "prompt and completion do not fit the context of a teacher"

    def __str__(self) -> str:
        return self.value


#: Reasons that depend on ``data.grader``.
GRADED = frozenset({DropReason.NO_ANSWER, DropReason.NO_FINAL_ANSWER, DropReason.WRONG_ANSWER})


class TeacherLimit(NamedTuple):
    """Context length of a teacher that scores completions.

    Args:
        setting: Name of the teacher's setting, such as ``model.teacher``.
        tokens: Its longest prompt and completion, in tokens.
        privileged: If True, it reads the teacher's prompts, otherwise the student's.
    """

    setting: str
    tokens: int
    privileged: bool


@dataclass(frozen=True)
class RowLimits:
    """Context lengths that the rows of a split must fit.

    Args:
        max_new_tokens: Longest completion that must fit the policy's context behind a prompt, in tokens.
        policy: The policy's context length in tokens. None if unknown.
        hint: Text behind the policy's context length in messages (see `Policy.limit_hint`).
        sampled_tokens: Longest completion that is sampled in training, in tokens. Teachers must have room for it.
        teachers: Context lengths of the teachers.
    """

    max_new_tokens: int
    policy: int | None = None
    hint: str = ""
    sampled_tokens: int = 0
    teachers: tuple[TeacherLimit, ...] = ()

    def exceeded(self, student: int, teacher: int, trace: int | None = None) -> DropReason | None:
        """Return why a row is too long, or None if it fits.

        Args:
            student: Tokens of the student's prompt.
            teacher: Tokens of the teacher's prompt, 0 if there is none.
            trace: Tokens of the trace as a completion, if it is trained on.
        """
        if self.policy is not None:
            if max(student, teacher) + self.max_new_tokens > self.policy:
                return DropReason.PROMPT_TOO_LONG
            if trace is not None and student + trace > self.policy:
                return DropReason.TRACE_TOO_LONG
        completion = max(self.sampled_tokens, trace or 0)
        for limit in self.teachers:
            if max(student, teacher if limit.privileged else 0) + completion > limit.tokens:
                return DropReason.TEACHER_TOO_LONG
        return None

    def text(self, reason: DropReason) -> str:
        """Return the text of a reason, with the lengths that it is about."""
        match reason:
            case DropReason.PROMPT_TOO_LONG:
                completion, context = f"{self.max_new_tokens} new tokens", f"{self.policy} tokens{self.hint}"
                return f"prompt and {completion} do not fit the model's context of {context}"
            case DropReason.TRACE_TOO_LONG:
                return f"prompt and trace do not fit the model's context of {self.policy} tokens{self.hint}"
            case DropReason.TEACHER_TOO_LONG:
                contexts = " or ".join(f"{limit.setting}, {limit.tokens} tokens" for limit in self.teachers)
                return f"prompt and completion do not fit the context of {contexts}"
        return str(reason)

    def texts(self, dropped: Counter[DropReason]) -> dict[str, int]:
        """Return the number of dropped rows by the text of the reason."""
        return {self.text(reason): count for reason, count in dropped.items()}
