"""What the teacher reads, where that is made anew at each step: from the student's own completions, or by the teacher.

Contexts of a question alone are in contexts.py. Sources: majority vote, U-OPSD (arXiv 2608.06296); shortest correct, SSOPD
(arXiv 2605.17497); `ReasonFirst` is the paper's variant in which the teacher first writes about the trace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jsonargparse.typing import OpenUnitInterval

from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.prompts.templates import fill
from opsd_lightning.types import Example, PromptBatch, Rollouts, Sampling, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Attempts(NamedTuple):
    """A step's completions, read and graded; completion ``i`` belongs to question ``i // n``.

    Args:
        examples: One a question.
        texts: Of each completion, without special tokens.
        answers: Its final answer, or None.
        correct: Whether that is right.
        finished: Whether it ended by itself.
        n: Completions of each question.
        grader: Which graded them.
        problems: Why grading of each gave no verdict, see `Grade`.
    """

    examples: Sequence[Example]
    texts: Sequence[str]
    answers: Sequence[str | None]
    correct: Sequence[bool]
    finished: Sequence[bool]
    n: int
    grader: MathGrader = MathGrader()
    problems: Sequence[str] = ()


def read_attempts(
    tokenizer: PreTrainedTokenizerBase, grader: MathGrader, batch: PromptBatch, rollouts: Rollouts
) -> Attempts:
    """Completions as text, with their answers and grades."""
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rollouts.completions]
    grades = grader.grades(texts, [batch.examples[i // rollouts.n].answer for i in range(len(texts))])
    answers, correct = [grade.answer for grade in grades], [grade.correct for grade in grades]
    problems = [grade.problem for grade in grades]
    return Attempts(batch.examples, texts, answers, correct, rollouts.terminated, rollouts.n, grader, problems)


#: Has the teacher's weights answer one user message each: message texts, and what to sample, to texts; None where message
#: and answer do not fit the model's context.
Write = Callable[[Sequence[str], Sampling], list[str | None]]


class OnlineContext(ABC):
    """What the teacher reads beside the question, made at each step.

    Attributes:
        needs_traces: Whether it is made of the data's traces: if not, training questions need none.
        needs_answers: Whether it looks at grades: if not, training questions need no reference answer either.
    """

    needs_traces: bool = False
    needs_answers: bool = True

    def check(self, sampling: Sampling) -> None:
        """Raise `UserError` where it cannot work with what is sampled in training."""

    @abstractmethod
    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        """The context of every completion, for ``data.prompts.teacher_template``. None: there is none, and nothing is
        learned from the completion. The examples' traces are already cut to ``data.prompts.max_trace_tokens``."""


class ReasonFirst(OnlineContext):
    """The teacher's weights first write an analysis of the trace, which then stands in its context below the trace.

    Args:
        template: The user message that asks for the analysis, with ``{question}`` and ``{trace}``.
        joined: What the teacher then reads, with ``{trace}`` and ``{analysis}``.
        sampling: How the analysis is sampled: greedy, at most 256 tokens, unless given. Its ``n`` is 1.
    """

    needs_traces = True

    def __init__(
        self,
        template: str = "{question}\n\nHere is a reference solution:\n{trace}\n\nExplain in a few sentences which idea it "
        "rests on, and why each step follows.",
        joined: str = "{trace}\n\nWhy it holds:\n{analysis}",
        sampling: Sampling = Sampling(max_new_tokens=256, temperature=0.0),
    ) -> None:
        for name, text, needed in (("template", template, "trace"), ("joined", joined, "analysis")):
            if f"{{{needed}}}" not in text:
                raise ValueError(f"model.context.init_args.{name} lacks the placeholder {{{needed}}}")
        if sampling.n != 1:
            raise ValueError("model.context.init_args.sampling.n must be 1: one analysis a question")
        self.template, self.joined, self.sampling = template, joined, sampling

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        messages = [fill(self.template, question=example.question, trace=example.trace) for example in attempts.examples]
        analyses = write(messages, self.sampling)
        found = [
            None if text is None else fill(self.joined, trace=example.trace, analysis=text.strip())
            for example, text in zip(attempts.examples, analyses, strict=True)
        ]
        return [text for text in found for _ in range(attempts.n)]


class _OwnCompletionContext(OnlineContext):
    """The shortest of a question's completions that are good enough, another one than that which is scored."""

    def check(self, sampling: Sampling) -> None:
        if sampling.n < 2:
            raise UserError(
                f"model.context is {type(self).__name__}, which shows the teacher another completion of the same question, "
                f"but model.sampling.n is {sampling.n}: set it to 4, say, and divide data.batch_size by as much"
            )

    @abstractmethod
    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: MathGrader) -> list[bool]:
        """Which of one question's completions may be shown."""

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        found: list[str | None] = []
        for start in range(0, len(attempts.texts), attempts.n):
            rows = range(start, start + attempts.n)
            answers, correct = [attempts.answers[i] for i in rows], [attempts.correct[i] for i in rows]
            good = self.good(answers, correct, attempts.grader)
            shown = [i for i, may in zip(rows, good, strict=True) if may and attempts.finished[i]]
            for row in rows:
                others = [i for i in shown if i != row]
                best = min(others, key=lambda i: len(attempts.texts[i]), default=None)
                found.append(None if best is None else attempts.texts[best].strip())
        return found


class ShortestCorrectContext(_OwnCompletionContext):
    """The shortest correct completion of the same question: needs the reference answer, but no trace."""

    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: MathGrader) -> list[bool]:
        return list(correct)


class MajorityContext(_OwnCompletionContext):
    """The shortest completion with the answer that most of a question's completions give: needs no reference at all.

    Answers that are mathematically equal ("0.5" and "1/2") are one, as in maj@k.

    Args:
        min_share: The share of a question's completions that must agree, above 0 and below 1.
    """

    needs_answers = False

    def __init__(self, min_share: OpenUnitInterval = 0.5) -> None:
        self.min_share = OpenUnitInterval(min_share)

    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: MathGrader) -> list[bool]:
        cast = grader.votes(answers, [False] * len(answers))  # none is known to be right
        most = Counter(vote for vote in cast if vote is not None).most_common(2)
        if not most or most[0][1] < self.min_share * len(answers) or (len(most) > 1 and most[1][1] == most[0][1]):
            return [False] * len(answers)
        return [vote == most[0][0] for vote in cast]


class FeedbackContext(OnlineContext):
    """The completion itself with the grader's verdict on it, and the reference answer if it is wrong: needs no trace.

    Args:
        right: What the teacher reads of a right one, with ``{attempt}``, ``{answer}`` and ``{reference}`` as it likes.
        wrong: Of a wrong one.
    """

    def __init__(
        self,
        right: str = "An earlier attempt:\n{attempt}\n\nIts answer, {answer}, is correct.",
        wrong: str = "An earlier attempt:\n{attempt}\n\nIts answer, {answer}, is wrong. The correct answer is {reference}.",
    ) -> None:
        self.right, self.wrong = right, wrong

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        found: list[str | None] = []
        for i, (text, answer, correct) in enumerate(zip(attempts.texts, attempts.answers, attempts.correct, strict=True)):
            values = {
                "attempt": text.strip(),
                "answer": answer or "none",
                "reference": attempts.examples[i // attempts.n].answer,
            }
            found.append(fill(self.right if correct else self.wrong, **values))
        return found
