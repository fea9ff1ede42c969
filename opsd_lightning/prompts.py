"""What the student sees and what the teacher sees.

Each role gets one user turn through the tokenizer's chat template, with a generation prompt. The teacher's turn also
holds a privileged context, by default the verified trace, between clear markers. Source: arXiv 2601.18734, section 3 and
its prompt figures; the wording here is our own. Contexts other than the trace: "other problem" is OP2SD's control
(arXiv 2608.09228); the rest are plain ablations.
"""

from __future__ import annotations

import math
import random
import re
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from jinja2 import TemplateError
from jsonargparse.typing import OpenUnitInterval, PositiveInt

from opsd_lightning.texts import NotTextError, text_of
from opsd_lightning.types import ConfigError, Example, UserError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

STUDENT_TEMPLATE = """{question}

Please reason step by step, and put your final answer within \\boxed{}."""

TEACHER_TEMPLATE = """{question}

Here is a reference solution to this problem.
=== Reference Solution Begin ===
{context}
=== Reference Solution End ===

Make sure that you understand why each step of it holds. Then solve the problem yourself: derive the answer in your own \
words, without copying the reference solution and without mentioning it.

Please reason step by step, and put your final answer within \\boxed{}."""


class PrivilegedContext(ABC):
    """What the teacher gets to read beside the question.

    Attributes:
        needs_traces: Whether it is made of traces: if not, training questions need none.
    """

    needs_traces: bool = True

    @abstractmethod
    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        """The context of ``examples[index]``; None for none at all, where the teacher sees the student's prompt.

        Raises:
            UserError: The examples do not hold what this context needs.
        """


class TraceContext(PrivilegedContext):
    """The verified reasoning trace (default)."""

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return examples[index].trace


class AnswerContext(PrivilegedContext):
    """The reference answer alone."""

    needs_traces = False

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return f"The final answer is {examples[index].answer}."


class HintContext(PrivilegedContext):
    """The beginning of the trace.

    Args:
        share: How much of the trace's words the teacher sees, above 0 and below 1.
    """

    def __init__(self, share: OpenUnitInterval = 0.5) -> None:
        self.share = OpenUnitInterval(share)

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        pieces = re.findall(r"\s*\S+", examples[index].trace)
        return "".join(pieces[: math.ceil(len(pieces) * self.share)]).strip()


class OtherProblemContext(PrivilegedContext):
    """The trace of a different question: shows the style without the solution.

    Args:
        seed: Of the choice of that question.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return _another(index, examples, self.seed, "question").trace


class NoContext(PrivilegedContext):
    """Nothing: the teacher sees the student's prompt. The null control: a fixed teacher then teaches nothing."""

    needs_traces = False

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return None


class WrongContext(PrivilegedContext):
    """The trace with its answer replaced, wherever it stands, by that of a question with another answer.

    A trace that writes its answer differently from the reference (1/2 for 0.5) would stay right: the wrong answer alone
    takes its place.

    Args:
        seed: Of the choice of that question.
    """

    def __init__(self, seed: int = 0) -> None:
        self.seed = seed

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        example = examples[index]
        wrong = _another(index, examples, self.seed, "answer").answer
        trace, replaced = re.subn(rf"(?<!\w){re.escape(example.answer)}(?!\w)", lambda _: wrong, example.trace)
        return trace if replaced else f"The final answer is {wrong}."


class ColumnContext(PrivilegedContext):
    """Another column of the data.

    Args:
        column: Its name in the source's rows.
    """

    needs_traces = False

    def __init__(self, column: str) -> None:
        self.column = column

    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        columns = examples[index].columns
        if self.column not in columns:
            raise UserError(
                f"data.context.column: the data have no column {self.column!r}; they have {', '.join(map(str, columns))}"
            )
        try:
            return text_of(columns[self.column])
        except NotTextError as error:
            problem = f"the column {self.column!r} holds {error} at the question {examples[index].question[:60]!r}"
            raise ConfigError(problem, "data.context.column", "Name a column of text or numbers") from None


def _another(index: int, examples: Sequence[Example], seed: int, field_name: str) -> Example:
    """An example that differs from ``examples[index]`` in one field, the same one for the same seed."""
    own = getattr(examples[index], field_name)
    start = random.Random(f"{seed} {examples[index].question}").randrange(len(examples))
    for offset in range(len(examples)):
        other = examples[(start + offset) % len(examples)]
        if getattr(other, field_name) != own:
            return other
    raise UserError(f"data.context needs examples that differ in their {field_name}; all {len(examples)} have the same")


class Prompt(list[int]):
    """The token ids of a prompt, and whether its trace had to be cut."""

    trace_was_cut: bool = False


@dataclass(frozen=True)
class Prompts:
    """The wording of both roles' prompts. ``{question}`` and ``{context}`` are filled in; no other brace is special.

    Args:
        student_template: The student's user turn, with ``{question}``.
        teacher_template: The teacher's, with ``{question}`` and ``{context}``.
        system: System message of both roles; none, or the chat template's own, unless given.
        student_chat_template_kwargs: Further arguments of the chat template, such as ``{enable_thinking: false}``.
        teacher_chat_template_kwargs: The same for the teacher.
        teacher_response_prefix: Text put after the teacher's generation prompt, such as an empty thinking block, so
            that a teacher which would think first expects the first token of a student which does not.
        max_trace_tokens: Longer contexts are cut to this many tokens of their own text (never the template), counted
            and reported. No limit unless given.
    """

    student_template: str = STUDENT_TEMPLATE
    teacher_template: str = TEACHER_TEMPLATE
    system: str | None = None
    student_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_response_prefix: str = ""
    max_trace_tokens: PositiveInt | None = None

    def __post_init__(self) -> None:
        for name, needed in {"student_template": ["question"], "teacher_template": ["question", "context"]}.items():
            for placeholder in needed:
                if f"{{{placeholder}}}" not in getattr(self, name):
                    raise ValueError(f"data.prompts.{name} lacks the placeholder {{{placeholder}}}")

    def student(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> Prompt:
        """The student's prompt."""
        content = fill(self.student_template, question=example.question)
        return self._render(tokenizer, content, self.student_chat_template_kwargs)

    def cut(self, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """At most ``max_trace_tokens`` of a text."""
        if self.max_trace_tokens is not None:
            ids = tokenizer.encode(text, add_special_tokens=False)
            if len(ids) > self.max_trace_tokens:
                return str(tokenizer.decode(ids[: self.max_trace_tokens]))
        return text

    def teacher(
        self, tokenizer: PreTrainedTokenizerBase, example: Example, context: str | None, whole: bool = False
    ) -> Prompt:
        """The teacher's prompt with a privileged context, cut unless ``whole``; the student's wording where it is None."""
        cut = False
        if context is None:
            content = fill(self.student_template, question=example.question)
        else:
            shown = context if whole else self.cut(tokenizer, context)
            cut = shown != context
            content = fill(self.teacher_template, question=example.question, context=shown)
        prompt = self._render(tokenizer, content, self.teacher_chat_template_kwargs)
        if self.teacher_response_prefix:
            prompt.extend(tokenizer.encode(self.teacher_response_prefix, add_special_tokens=False))
        prompt.trace_was_cut = cut
        return prompt

    def chat(self, tokenizer: PreTrainedTokenizerBase, message: str) -> Prompt:
        """A user message of one's own to the teacher."""
        return self._render(tokenizer, message, self.teacher_chat_template_kwargs)

    def trace(self, tokenizer: PreTrainedTokenizerBase, example: Example, eos: int) -> list[int]:
        """The trace as a completion of the student's prompt: its tokens and the one that ends it."""
        return [*tokenizer.encode(example.trace, add_special_tokens=False), eos]

    def messages(self, content: str) -> list[dict[str, str]]:
        """The turns that a prompt is rendered from."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": content}]

    def _render(self, tokenizer: PreTrainedTokenizerBase, content: str, kwargs: dict[str, Any]) -> Prompt:
        # The template's own tokenization adds no special tokens: what it renders already holds the BOS, once.
        try:
            ids: Any = tokenizer.apply_chat_template(
                self.messages(content), add_generation_prompt=True, tokenize=True, return_dict=False, **kwargs
            )
        except TemplateError as error:
            raise UserError(
                f"the model's chat template refuses this prompt ({error}): check data.prompts.system and the "
                "chat_template_kwargs, or give another template as model.policy.chat_template"
            ) from None
        return Prompt(ids)


def fill(template: str, **values: str) -> str:
    """Replace placeholders in one pass: braces of LaTeX stay, and so does a placeholder inside a value."""
    return re.sub(r"\{(" + "|".join(values) + r")\}", lambda match: values[match[1]], template)
