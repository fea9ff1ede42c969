"""Privileged contexts that are made at each step, from the student's completions or by the teacher.

Contexts that are made once from the data are in contexts.py. Sources: majority vote, U-OPSD (arXiv 2608.06296); shortest
correct completion, SSOPD (arXiv 2605.17497); `ReasonFirst` is the variant of arXiv 2601.18734 in which the teacher first
writes about the trace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, NamedTuple

from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.prompts.templates import fill
from opsd_lightning.types import ConfigError, Example, OpenUnitInterval, PromptBatch, Rollouts, Sampling, checked

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Attempts(NamedTuple):
    """The decoded and graded completions of a step. Completion ``i`` belongs to question ``i // n``.

    Args:
        examples: The questions.
        texts: Text of each completion, without special tokens.
        answers: Final answer of each completion. None if it has none.
        correct: True for each completion with a right answer.
        finished: True for each completion that ended with an EOS token.
        n: Number of completions of each question.
        grader: The grader of the answers.
        problems: Reason why a completion could not be graded, for each completion. See `Grade`.
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
    """Decode and grade completions."""
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rollouts.completions]
    grades = grader.grades(texts, [batch.examples[i // rollouts.n].answer for i in range(len(texts))])
    answers, correct = [grade.answer for grade in grades], [grade.correct for grade in grades]
    problems = [grade.problem for grade in grades]
    return Attempts(batch.examples, texts, answers, correct, rollouts.terminated, rollouts.n, grader, problems)


#: Samples the teacher's answers to user messages, each in the conversation of its example (see `Prompts.ask`). None for a
#: message that does not fit the context with its answer.
Write = Callable[[Sequence[Example], Sequence[str], Sampling], list[str | None]]


class OnlineContext(ABC):
    """Base class of texts that the teacher reads beside the question, made at each step.

    Attributes:
        needs_traces: If True, the context is made of traces, and training questions without one are dropped.
        needs_answers: If True, the context depends on grades, and training questions without answer and trace are dropped.
    """

    needs_traces: bool = False
    needs_answers: bool = True

    def check(self, sampling: Sampling) -> None:
        """Raise `ConfigError` if the context cannot be made with these settings of ``model.sampling``."""

    @abstractmethod
    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        """Return the context of every completion, for ``data.prompts.teacher_template``.

        Args:
            attempts: The completions. The traces of its examples are cut to ``data.prompts.max_trace_tokens``.
            write: Samples answers of the teacher.

        Returns:
            One text per completion. The loss ignores completions with None.
        """


class ReasonFirst(OnlineContext):
    """The trace and an analysis of it, which the teacher writes first.

    Args:
        template: User message that asks for the analysis, with ``{question}`` and ``{trace}``.
        joined: Context of the teacher, with ``{trace}`` and ``{analysis}``.
        sampling: Sampling of the analysis. Its ``n`` must be 1. Defaults to greedy decoding of at most 256 tokens.
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
                raise ConfigError(f"it lacks {{{needed}}}", f"model.context.init_args.{name}", "Add the placeholder")
        if sampling.n != 1:
            problem = f"it is {sampling.n}, and each question gets one analysis"
            raise ConfigError(problem, "model.context.init_args.sampling.n", "Set it to 1")
        self.template, self.joined, self.sampling = template, joined, sampling

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        messages = [fill(self.template, question=example.question, trace=example.trace) for example in attempts.examples]
        analyses = write(attempts.examples, messages, self.sampling)
        found = [
            None if text is None else fill(self.joined, trace=example.trace, analysis=text.strip())
            for example, text in zip(attempts.examples, analyses, strict=True)
        ]
        return [text for text in found for _ in range(attempts.n)]


class _OwnCompletionContext(OnlineContext):
    """The shortest accepted completion of the same question, other than the scored one."""

    def check(self, sampling: Sampling) -> None:
        if sampling.n < 2:
            raise ConfigError(
                f"it is {sampling.n}, and model.context {type(self).__name__} shows another completion of the same question",
                "model.sampling.n",
                "Set it to 4, for example, and divide data.batch_size by 4",
            )

    @abstractmethod
    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: MathGrader) -> list[bool]:
        """Return True for each completion of a question that the teacher may read."""

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
    """The shortest correct completion of the same question. Needs the reference answer, but no trace."""

    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: MathGrader) -> list[bool]:
        return list(correct)


@checked
class MajorityContext(_OwnCompletionContext):
    """The shortest completion with the most frequent answer to the question. Needs neither answer nor trace.

    Mathematically equal answers ("0.5" and "1/2") count as one, as in maj@k.

    Args:
        min_share: Share of a question's completions that must agree, above 0 and below 1.
    """

    needs_answers = False

    def __init__(self, min_share: OpenUnitInterval = 0.5) -> None:
        self.min_share = min_share

    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: MathGrader) -> list[bool]:
        cast = grader.votes(answers, [False] * len(answers))  # the context may not use the reference
        most = Counter(vote for vote in cast if vote is not None).most_common(2)
        if not most or most[0][1] < self.min_share * len(answers) or (len(most) > 1 and most[1][1] == most[0][1]):
            return [False] * len(answers)
        return [vote == most[0][0] for vote in cast]


class FeedbackContext(OnlineContext):
    """The completion itself with its grade, and the reference answer if it is wrong. Needs no trace.

    Args:
        right: Context for a right completion. Placeholders are ``{attempt}``, ``{answer}`` and ``{reference}``.
        wrong: Context for a wrong completion, with the same placeholders.
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
