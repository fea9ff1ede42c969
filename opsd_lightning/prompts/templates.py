"""Prompts of student and teacher: templates, chat markup, token limits."""

from __future__ import annotations

import datetime
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import regex

from opsd_lightning.prompts.chat_template import SETTING, render
from opsd_lightning.prompts.control_tokens import encode, encode_text, hide
from opsd_lightning.types import ConfigError, Example, PositiveInt, checked

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


_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
# A word of at most 24 characters, or one character of a script without spaces between words.
UNIT = regex.compile(rf"\s*(?:(?={_UNSPACED})\X|(?:(?!{_UNSPACED})(?!\s)\X){{1,24}})")
# Placeholder for an answer, to find the text that a template writes behind it.
_ANSWER = "Pangolin7"


class Prompt(list[int]):
    """The token ids of a prompt.

    Attributes:
        trace_was_cut: True if its context was cut to ``max_trace_tokens``.
    """

    trace_was_cut: bool = False


@checked
@dataclass(frozen=True)
class Prompts:
    """Templates of the prompts of student and teacher.

    ``{question}`` and ``{context}`` are placeholders. All other braces are text.

    Args:
        student_template: User message of the student, with ``{question}``.
        teacher_template: User message of the teacher, with ``{question}`` and ``{context}``.
        system: System message of both roles. Defaults to none, or to the chat template's own.
        student_chat_template_kwargs: Further arguments of the chat template for the student, such as
            ``{enable_thinking: false}``.
        teacher_chat_template_kwargs: Further arguments of the chat template for the teacher.
        teacher_response_prefix: Text behind the teacher's generation prompt. An empty thinking block, for example, makes a
            thinking teacher score the completions of a student that does not think.
        max_trace_tokens: Longest context of the teacher, in tokens. Longer contexts are cut, counted and reported; the
            template around them is not. Defaults to no limit.
        date: Date for chat templates that write today's date, as YYYY-MM-DD. It is fixed, so that prompts are the same on
            every day.

    Example::

        >>> from opsd_lightning import Prompts
        >>> prompts = Prompts(student_template="{question} Think first.", system="You are a tutor.")
        >>> prompts.messages("1 + 1?")
        [{'role': 'system', 'content': 'You are a tutor.'}, {'role': 'user', 'content': '1 + 1?'}]
        >>> Prompts(student_template="Think first.")
        Traceback (most recent call last):
        opsd_lightning.types.ConfigError: data.prompts.student_template: it lacks {question}. Add the placeholder
    """

    student_template: str = STUDENT_TEMPLATE
    teacher_template: str = TEACHER_TEMPLATE
    system: str | None = None
    student_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_response_prefix: str = ""
    max_trace_tokens: PositiveInt | None = None
    date: str = "2024-07-26"

    def __post_init__(self) -> None:
        try:
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self.date!r} is not a date", "data.prompts.date", "Write it as YYYY-MM-DD, such as 2024-07-26"
            ) from None
        for name, needed in {"student_template": ["question"], "teacher_template": ["question", "context"]}.items():
            for placeholder in needed:
                if f"{{{placeholder}}}" not in getattr(self, name):
                    raise ConfigError(f"it lacks {{{placeholder}}}", f"data.prompts.{name}", "Add the placeholder")

    @property
    def day(self) -> datetime.date:
        """Date for chat templates that write today's date."""
        return datetime.date.fromisoformat(self.date)

    def student(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> Prompt:
        """Return the student's prompt."""
        content, inserted = filled(self.student_template, question=example.question)
        return self._prompt(tokenizer, content, inserted, self.student_chat_template_kwargs)

    def cut(self, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """Return the first ``max_trace_tokens`` tokens of a text, cut between characters."""
        limit = self.max_trace_tokens
        if limit is None or len(ids := encode_text(tokenizer, text)) <= limit:
            return text
        # Cut the text, not the tokens: half a character decodes to a replacement character. Decoding estimates the place.
        end = len(str(tokenizer.decode(ids[:limit])))
        places = [0, *(match.end() for match in regex.finditer(r"\X", text[: end + 32]) if match.end() <= end)]
        if len(encode_text(tokenizer, text[: places[-1]])) > limit:
            tokens = lambda place: len(encode_text(tokenizer, text[:place]))  # noqa: E731
            places = places[: max(bisect_right(places, limit, key=tokens), 1)]
        return text[: places[-1]]

    def teacher(
        self, tokenizer: PreTrainedTokenizerBase, example: Example, context: str | None, whole: bool = False
    ) -> Prompt:
        """Return the teacher's prompt.

        Args:
            tokenizer: The policy's tokenizer.
            example: The question.
            context: The privileged context. If None, the prompt is made with the student's template.
            whole: If True, do not cut the context to ``max_trace_tokens``.
        """
        cut = False
        if context is None:
            content, inserted = filled(self.student_template, question=example.question)
        else:
            shown = context if whole else self.cut(tokenizer, context)
            cut = shown != context
            content, inserted = filled(self.teacher_template, question=example.question, context=shown)
        prompt = self._prompt(tokenizer, content, inserted, self.teacher_chat_template_kwargs)
        if self.teacher_response_prefix:
            prompt.extend(tokenizer.encode(self.teacher_response_prefix, add_special_tokens=False))
        prompt.trace_was_cut = cut
        return prompt

    def chat(self, tokenizer: PreTrainedTokenizerBase, message: str) -> Prompt:
        """Return the prompt for any user message to the teacher."""
        return self._prompt(tokenizer, message, [(0, len(message))], self.teacher_chat_template_kwargs)

    def trace(self, tokenizer: PreTrainedTokenizerBase, example: Example, end: Sequence[int]) -> list[int]:
        """Return the tokens of the trace as a completion of the student's prompt, with the tokens ``end`` at its end."""
        return [*encode_text(tokenizer, example.trace, "completion"), *end]

    def end(self, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]) -> list[int]:
        """Return the tokens at the end of a trace that is trained on: those that the chat template writes after an answer.

        Args:
            tokenizer: The policy's tokenizer.
            eos: All tokens that end a sampled completion. The first one is returned if the template writes none.

        Raises:
            ConfigError: The template ends an answer with a text at which sampling does not stop.
        """
        turns = [*self.messages("1+1?"), {"role": "assistant", "content": _ANSWER}]
        try:
            text = self.rendered(tokenizer, turns, self.student_chat_template_kwargs, generation=False)
        except ConfigError:  # a template for questions only
            return [eos[0]]
        ending = text[text.rindex(_ANSWER) + len(_ANSWER) :] if _ANSWER in text else ""
        if not ending.strip():
            return [eos[0]]
        # Encode it behind a word: some tokenizers add a space at the beginning of a text.
        start, ids = encode(tokenizer, _ANSWER, {}), encode(tokenizer, _ANSWER + ending, {})
        ids = ids[len(start) :] if ids[: len(start)] == start else encode(tokenizer, ending, {})
        place = next((place for place, token in enumerate(ids) if token in eos), None)
        if place is None:
            names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in eos)
            raise ConfigError(
                f"the template ends an answer with {ending.strip()!r}, and the model's completions end with {names}: traces "
                "that are trained on would end in another way than sampled completions",
                SETTING,
                "Add the template's token to eos_token_id in the model's generation_config.json, or give the template that "
                "belongs to the model",
            )
        return ids[: place + 1]

    def messages(self, content: str) -> list[dict[str, str]]:
        """Return the messages that a prompt is rendered from."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": content}]

    def rendered(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[dict[str, str]],
        kwargs: dict[str, Any],
        generation: bool = True,
    ) -> str:
        """Return the text of messages, rendered with the chat template.

        Raises:
            ConfigError: The chat template fails.
        """
        return render(tokenizer, messages, kwargs, self.day, generation)

    def _prompt(
        self, tokenizer: PreTrainedTokenizerBase, content: str, inserted: list[tuple[int, int]], kwargs: dict[str, Any]
    ) -> Prompt:
        # The chat template writes the BOS token, so the tokenizer adds no special tokens.
        marked, hidden = hide(tokenizer, content, inserted)
        return Prompt(encode(tokenizer, self.rendered(tokenizer, self.messages(marked), kwargs), hidden))


def fill(template: str, **values: str) -> str:
    """Replace placeholders in one pass. Braces of LaTeX stay, and so do placeholders inside values."""
    return filled(template, **values)[0]


def filled(template: str, **values: str) -> tuple[str, list[tuple[int, int]]]:
    """Replace placeholders as `fill` does. Also return the start and end of each value in the text."""
    text, places, end = "", [], 0
    for match in re.finditer(r"\{(" + "|".join(values) + r")\}", template):
        text += template[end : match.start()]
        places.append((len(text), len(text) + len(values[match[1]])))
        text += values[match[1]]
        end = match.end()
    return text + template[end:], places
