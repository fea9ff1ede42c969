"""Privileged contexts that are made at each step, from the student's completions or by the teacher.

Contexts that are made once from the data are in contexts.py. Sources: majority vote, U-OPSD (arXiv 2608.06296); shortest
correct completion, SSOPD (arXiv 2605.17497); feedback, SDPO (TRL's ``SDPOTrainer``); critique of the student's attempt,
arXiv 2606.11173; `ReasonFirst` is the variant of arXiv 2601.18734 in which the teacher first writes about the trace.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.final_answer import strip_thinking
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.prompts.contexts import text_of_column
from opsd_lightning.prompts.templates import fill
from opsd_lightning.types import (
    ConfigError,
    Example,
    OpenUnitInterval,
    PositiveFloat,
    PromptBatch,
    Rollouts,
    Sampling,
    checked,
)

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase


class Attempts(NamedTuple):
    """The decoded and graded completions of a step. Completion ``i`` belongs to question ``i // n``.

    Args:
        examples: The questions.
        texts: Text of each completion, without special tokens.
        grades: Grade of each completion.
        finished: True for each completion that ended with an EOS token.
        n: Number of completions of each question.
        grader: The grader.
    """

    examples: Sequence[Example]
    texts: Sequence[str]
    grades: Sequence[Grade]
    finished: Sequence[bool]
    n: int
    grader: Grader = MathGrader()

    @property
    def answers(self) -> list[str | None]:
        """Answer of each completion. None if it has none."""
        return [grade.answer for grade in self.grades]

    @property
    def correct(self) -> list[bool]:
        """True for each right completion."""
        return [self.grader.is_right(grade.score) for grade in self.grades]


def read_attempts(tokenizer: PreTrainedTokenizerBase, grader: Grader, batch: PromptBatch, rollouts: Rollouts) -> Attempts:
    """Decode and grade completions."""
    texts = [str(tokenizer.decode(row, skip_special_tokens=True)) for row in rollouts.completions]
    grades = grader.grades(texts, [batch.examples[i // rollouts.n] for i in range(len(texts))])
    return Attempts(batch.examples, texts, grades, rollouts.terminated, rollouts.n, grader)


#: Samples the teacher's answers to user messages, each in the conversation of its example (see `Prompts.ask`). None for a
#: message that does not fit the context with its answer.
Write = Callable[[Sequence[Example], Sequence[str], Sampling], list[str | None]]


class OnlineContext(ABC):
    """Base class of texts that the teacher reads beside the question, made at each step.

    Attributes:
        needs_traces: If True, the context is made of traces, and training questions without one are dropped.
        needs_answers: If True, the context depends on answers, and training questions without answer and trace are dropped.
        needs_grades: If True, the context depends on the grades of ``data.grader``.
        shows_attempt: If True, the context is about the scored completion itself. It is then not presented as a reference,
            unless ``data.prompts.teacher_template`` does so, and it is not cut to ``data.prompts.max_trace_tokens``, since
            the verdict is at its end.
        prefix_share: Share of the tokens of each completion that are learned from, from its start.
    """

    needs_traces: bool = False
    needs_answers: bool = True
    needs_grades: bool = True
    shows_attempt: bool = False
    prefix_share: float = 1.0

    def check(self, sampling: Sampling) -> None:
        """Raise `ConfigError` if the context cannot be made with these settings of ``model.sampling``."""

    def check_examples(self, examples: Sequence[Example]) -> None:
        """Raise `ConfigError` if the context cannot be made for these training questions."""

    @abstractmethod
    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        """Return the context of every completion, for ``data.prompts.teacher_template``.

        Args:
            attempts: The completions. The traces of its examples are cut to ``data.prompts.max_trace_tokens``.
            write: Samples answers of the teacher.

        Returns:
            One text per completion. The loss ignores completions with None.
        """


class WrittenContext(OnlineContext):
    """Base class of contexts that the teacher writes. The teacher must be able to generate text.

    Its thinking blocks are left out. A text that ends within a thinking block, or is empty, gives no context.

    Attributes:
        sampling: Sampling of the texts.
    """

    sampling: Sampling


class ReasonFirst(WrittenContext):
    """The trace and an analysis of it, which the teacher writes first.

    Args:
        template: User message that asks for the analysis, with ``{question}`` and ``{trace}``.
        joined: Context of the teacher, with ``{trace}`` and ``{analysis}``.
        sampling: Sampling of the analysis. Its ``n`` must be 1. Defaults to greedy decoding of at most 256 tokens.
    """

    needs_traces = True
    needs_grades = False

    def __init__(
        self,
        template: str = "{question}\n\nHere is a reference solution:\n{trace}\n\nExplain in a few sentences which idea it "
        "rests on, and why each step follows.",
        joined: str = "{trace}\n\nWhy it holds:\n{analysis}",
        sampling: Sampling = Sampling(max_new_tokens=256, temperature=0.0),
    ) -> None:
        _check_writing({"template": (template, "trace"), "joined": (joined, "analysis")}, sampling)
        self.template, self.joined, self.sampling = template, joined, sampling

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        messages = [fill(self.template, question=example.question, trace=example.trace) for example in attempts.examples]
        analyses = write(attempts.examples, messages, self.sampling)
        found = [
            None if (analysis := written_text(text)) is None else fill(self.joined, trace=example.trace, analysis=analysis)
            for example, text in zip(attempts.examples, analyses, strict=True)
        ]
        return [text for text in found for _ in range(attempts.n)]


class CritiqueContext(WrittenContext):
    """A critique of the completion, which the teacher's weights write with the reference at hand.

    Source: arXiv 2606.11173. Every completion gets its own critique, so that a step samples as many further texts as it has
    completions. Thinking blocks of the completion are not shown.

    Args:
        template: User message that asks for the critique. Placeholders are ``{question}``, ``{attempt}``, ``{reference}``
            (the trace, or without one the reference answer) and ``{feedback}`` of the grader, which may be empty.
        joined: Context of the teacher, with ``{critique}``. Further placeholders are ``{attempt}`` and ``{reference}``.
        sampling: Sampling of the critique. Its ``n`` must be 1. Defaults to greedy decoding of at most 256 tokens.
    """

    needs_grades = False
    shows_attempt = True

    def __init__(
        self,
        template: str = "{question}\n\nHere is a reference solution:\n{reference}\n\nHere is a student's attempt:\n{attempt}"
        "\n\nGo through the attempt step by step. Name the first step that is wrong, and say how to correct it. If every "
        "step is right, say so.",
        joined: str = "An earlier attempt:\n{attempt}\n\nA critique of it:\n{critique}",
        sampling: Sampling = Sampling(max_new_tokens=256, temperature=0.0),
    ) -> None:
        _check_writing({"template": (template, "attempt"), "joined": (joined, "critique")}, sampling)
        self.template, self.joined, self.sampling = template, joined, sampling

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        examples = [attempts.examples[i // attempts.n] for i in range(len(attempts.texts))]
        shown = [
            {
                "attempt": shown_attempt(text),
                "reference": example.trace or attempts.grader.shown_reference(example),
                "feedback": grade.feedback,
            }
            for text, example, grade in zip(attempts.texts, examples, attempts.grades, strict=True)
        ]
        messages = [fill(self.template, question=e.question, **each) for e, each in zip(examples, shown, strict=True)]
        critiques = write(examples, messages, self.sampling)
        return [
            None
            if (critique := written_text(text)) is None or not each["reference"]
            else fill(self.joined, critique=critique, **each)
            for text, each in zip(critiques, shown, strict=True)
        ]


def _check_writing(templates: Mapping[str, tuple[str, str]], sampling: Sampling) -> None:
    """Check the settings of a context that the teacher writes: each template by name, with its placeholder."""
    for name, (text, needed) in templates.items():
        if f"{{{needed}}}" not in text:
            raise ConfigError(f"it lacks {{{needed}}}", f"model.context.init_args.{name}", "Add the placeholder")
    if sampling.n != 1:
        problem = f"it is {sampling.n}, and the teacher writes one text each time"
        raise ConfigError(problem, "model.context.init_args.sampling.n", "Set it to 1")


def written_text(text: str | None) -> str | None:
    """Return a text of the teacher without its thinking blocks. None if nothing else is left, or if there is none."""
    return None if text is None else (strip_thinking(text) or "").strip() or None


def shown_attempt(text: str) -> str:
    """Return a completion without its thinking blocks, as a context shows it."""
    answer = strip_thinking(text)
    return "(no answer: it ends while still thinking)" if answer is None else answer.strip()


@checked
class _OwnCompletionContext(OnlineContext):
    """The shortest accepted completion of the same question, other than the scored one.

    Args:
        only_longest_wrong: If True, learn only from the longest completion of each question that is not accepted.
        prefix_share: Share of the tokens of a completion that are learned from, from its start. Above 0 and at most 1.
    """

    @abstractmethod
    def __init__(self, only_longest_wrong: bool, prefix_share: float) -> None:
        if not 0 < prefix_share <= 1:
            raise ConfigError(
                f"it is {prefix_share:g}", "model.context.init_args.prefix_share", "Set it above 0 and at most to 1"
            )
        self.only_longest_wrong, self.prefix_share = only_longest_wrong, prefix_share

    def check(self, sampling: Sampling) -> None:
        if sampling.n < 2:
            raise ConfigError(
                f"it is {sampling.n}, and model.context {type(self).__name__} shows another completion of the same question",
                "model.sampling.n",
                "Set it to 4, for example, and divide data.batch_size by 4",
            )

    @abstractmethod
    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: Grader) -> list[bool] | None:
        """Return True for each completion of a question that the teacher may read. None if the question is left out."""

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        found: list[str | None] = []
        answers, correct = attempts.answers, attempts.correct
        for start in range(0, len(attempts.texts), attempts.n):
            rows = range(start, start + attempts.n)
            good = self.good([answers[i] for i in rows], [correct[i] for i in rows], attempts.grader)
            if good is None:
                found += [None] * attempts.n
                continue
            shown = {
                i: shown_attempt(attempts.texts[i])
                for i, may in zip(rows, good, strict=True)
                if may and attempts.finished[i] and strip_thinking(attempts.texts[i]) is not None
            }
            wrong = [i for i, may in zip(rows, good, strict=True) if not may]
            longest = max(wrong, key=lambda i: len(attempts.texts[i]), default=None)
            for row in rows:
                others = {i: text for i, text in shown.items() if i != row}
                best = min(others.values(), key=len, default=None)
                found.append(None if self.only_longest_wrong and row != longest else best)
        return found


@checked
class ShortestCorrectContext(_OwnCompletionContext):
    """The shortest correct completion of the same question. Needs the reference answer, but no trace.

    Source: SSOPD (arXiv 2605.17497), which learns from prefixes of the longest wrong completion only
    (``only_longest_wrong``).

    Args:
        only_longest_wrong: If True, learn only from the longest wrong completion of each question.
        prefix_share: Share of the tokens of a completion that are learned from, from its start. Above 0 and at most 1.
    """

    def __init__(self, only_longest_wrong: bool = False, prefix_share: PositiveFloat = 1.0) -> None:
        super().__init__(only_longest_wrong, prefix_share)

    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: Grader) -> list[bool] | None:
        return list(correct)


@checked
class MajorityContext(_OwnCompletionContext):
    """The shortest completion with the most frequent answer to the question. Needs neither answer nor trace.

    Answers that ``data.grader`` finds equal ("0.5" and "1/2") count as one, as in maj@k. With ``only_longest_wrong`` this is
    U-OPSD (arXiv 2608.06296), which distills a prefix of the longest completion that disagrees with the majority.

    Args:
        min_share: Share of a question's completions that must agree, above 0 and below 1.
        only_longest_wrong: If True, learn only from the longest completion of each question with another answer or none.
        prefix_share: Share of the tokens of a completion that are learned from, from its start. Above 0 and at most 1.
    """

    needs_answers = False

    def __init__(
        self,
        min_share: OpenUnitInterval = 0.5,
        only_longest_wrong: bool = False,
        prefix_share: PositiveFloat = 1.0,
    ) -> None:
        super().__init__(only_longest_wrong, prefix_share)
        self.min_share = min_share

    def good(self, answers: Sequence[str | None], correct: Sequence[bool], grader: Grader) -> list[bool] | None:
        cast = grader.votes(answers, [False] * len(answers))  # the context may not use the reference
        most = Counter(vote for vote in cast if vote is not None).most_common(2)
        if not most or most[0][1] < self.min_share * len(answers) or (len(most) > 1 and most[1][1] == most[0][1]):
            return None
        return [vote == most[0][0] for vote in cast]


class FeedbackContext(OnlineContext):
    """The completion itself with its grade and the grader's feedback. Needs no trace.

    The feedback is the text of ``column`` in the data, or the feedback of ``data.grader`` for the completion, such as a
    failed test or the error of a parser. Without either, it is the reference answer. Thinking blocks of the completion are
    not shown. Source: SDPO, as in TRL.

    Args:
        right: Context for a right completion. Placeholders are ``{attempt}``, ``{answer}``, ``{score}``, ``{feedback}`` and
            ``{reference}``.
        wrong: Context for a wrong completion, with the same placeholders.
        column: Column of the data with feedback. Defaults to none.
        undecided: Context for a completion without a verdict (`Grade.problem`), with the same placeholders.
    """

    shows_attempt = True

    def __init__(
        self,
        right: str = "An earlier attempt:\n{attempt}\n\nIt is correct.",
        wrong: str = "An earlier attempt:\n{attempt}\n\nIt is wrong. {feedback}",
        column: str | None = None,
        undecided: str = "An earlier attempt:\n{attempt}\n\nIt could not be graded. {feedback}",
    ) -> None:
        self.right, self.wrong, self.column, self.undecided = right, wrong, column, undecided
        if column is not None and not any("{feedback}" in text for text in (right, wrong, undecided)):
            problem = "no template has {feedback}, so that the column is not read"
            raise ConfigError(problem, "model.context.init_args.column", "Add {feedback} to wrong, or leave column out")

    def check_examples(self, examples: Sequence[Example]) -> None:
        for example in examples:
            self._column(example)

    def texts(self, attempts: Attempts, write: Write) -> list[str | None]:
        found: list[str | None] = []
        for i, (text, grade, right) in enumerate(zip(attempts.texts, attempts.grades, attempts.correct, strict=True)):
            example = attempts.examples[i // attempts.n]
            answer = attempts.grader.shown_reference(example)
            reference = f"The correct answer is {answer}." if answer else ""
            values = {
                "attempt": shown_attempt(text),
                "answer": grade.answer or "none",
                "score": f"{grade.score:.2g}",
                "feedback": self._column(example) or grade.feedback or reference,
                "reference": answer,
            }
            template = self.undecided if grade.problem else self.right if right else self.wrong
            found.append(fill(template, **values).strip())
        return found

    def _column(self, example: Example) -> str:
        if self.column is None:
            return ""
        return text_of_column(example, self.column, "model.context.init_args.column")
