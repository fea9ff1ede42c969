"""Prompts of both roles: templates, chat markup, token budgets."""

from __future__ import annotations

import datetime
import re
from bisect import bisect_right
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import regex
from jsonargparse.typing import PositiveInt

from opsd_lightning.prompts.chat_template import SETTING, render
from opsd_lightning.prompts.control_tokens import encode, encode_text, hide
from opsd_lightning.types import ConfigError, Example

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
# Characters of scripts that put no spaces between words count one by one; other words are cut where they are very long.
_UNIT = regex.compile(rf"\s*(?:(?={_UNSPACED})\X|(?:(?!{_UNSPACED})(?!\s)\X){{1,24}})")
# Stands for an answer where a template is looked at.
_ANSWER = "Pangolin7"


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
        date: Day that a chat template which asks for today's date gets, as YYYY-MM-DD, so that the prompts of a run are the
            same on every day.
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
                    raise ValueError(f"data.prompts.{name} lacks the placeholder {{{placeholder}}}")

    @property
    def day(self) -> datetime.date:
        """The day that a chat template takes for today."""
        return datetime.date.fromisoformat(self.date)

    def student(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> Prompt:
        """The student's prompt."""
        content, inserted = filled(self.student_template, question=example.question)
        return self._prompt(tokenizer, content, inserted, self.student_chat_template_kwargs)

    def cut(self, tokenizer: PreTrainedTokenizerBase, text: str) -> str:
        """At most ``max_trace_tokens`` of a text, cut between characters."""
        limit = self.max_trace_tokens
        if limit is None or len(ids := encode_text(tokenizer, text)) <= limit:
            return text
        # Decoding tells about where; the text itself is cut, because half a character decodes to a replacement sign.
        end = len(str(tokenizer.decode(ids[:limit])))
        places = [0, *(match.end() for match in regex.finditer(r"\X", text[: end + 32]) if match.end() <= end)]
        if len(encode_text(tokenizer, text[: places[-1]])) > limit:
            tokens = lambda place: len(encode_text(tokenizer, text[:place]))  # noqa: E731
            places = places[: max(bisect_right(places, limit, key=tokens), 1)]
        return text[: places[-1]]

    def teacher(
        self, tokenizer: PreTrainedTokenizerBase, example: Example, context: str | None, whole: bool = False
    ) -> Prompt:
        """The teacher's prompt with a privileged context, cut unless ``whole``; the student's wording where it is None."""
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
        """A user message of one's own to the teacher."""
        return self._prompt(tokenizer, message, [(0, len(message))], self.teacher_chat_template_kwargs)

    def trace(self, tokenizer: PreTrainedTokenizerBase, example: Example, end: Sequence[int]) -> list[int]:
        """The trace as a completion of the student's prompt: its tokens and those that end it (see `end`)."""
        return [*encode_text(tokenizer, example.trace, "completion"), *end]

    def end(self, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]) -> list[int]:
        """The tokens that end a completion to train on: what the chat template ends an answer with.

        Args:
            tokenizer: The policy's.
            eos: Every token that ends a sampled completion. The first one stands for the end where the template writes
                none.

        Raises:
            ConfigError: The template ends an answer with a text that ends no sampled completion.
        """
        turns = [*self.messages("1+1?"), {"role": "assistant", "content": _ANSWER}]
        try:
            text = self.rendered(tokenizer, turns, self.student_chat_template_kwargs, generation=False)
        except ConfigError:  # a template for a question alone
            return [eos[0]]
        ending = text[text.rindex(_ANSWER) + len(_ANSWER) :] if _ANSWER in text else ""
        if not ending.strip():
            return [eos[0]]
        # Behind a word, because some tokenizers put a space in front of a text that begins.
        start, ids = encode(tokenizer, _ANSWER, {}), encode(tokenizer, _ANSWER + ending, {})
        ids = ids[len(start) :] if ids[: len(start)] == start else encode(tokenizer, ending, {})
        place = next((place for place, token in enumerate(ids) if token in eos), None)
        if place is None:
            names = ", ".join(repr(tokenizer.convert_ids_to_tokens(token)) for token in eos)
            raise ConfigError(
                f"the template ends an answer with {ending.strip()!r}, and the model's completions end with {names} alone: "
                "a trace that is trained on would end otherwise than what is sampled",
                SETTING,
                "Add the template's token to eos_token_id in the model's generation_config.json, or give the template that "
                "belongs to the model",
            )
        return ids[: place + 1]

    def messages(self, content: str) -> list[dict[str, str]]:
        """The turns that a prompt is rendered from."""
        system = [] if self.system is None else [{"role": "system", "content": self.system}]
        return [*system, {"role": "user", "content": content}]

    def rendered(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[dict[str, str]],
        kwargs: dict[str, Any],
        generation: bool = True,
    ) -> str:
        """Messages as the text that a model reads.

        Raises:
            ConfigError: The chat template fails.
        """
        return render(tokenizer, messages, kwargs, self.day, generation)

    def _prompt(
        self, tokenizer: PreTrainedTokenizerBase, content: str, inserted: list[tuple[int, int]], kwargs: dict[str, Any]
    ) -> Prompt:
        # No special tokens are added: what the template renders already holds the BOS, once.
        marked, hidden = hide(tokenizer, content, inserted)
        return Prompt(encode(tokenizer, self.rendered(tokenizer, self.messages(marked), kwargs), hidden))


def fill(template: str, **values: str) -> str:
    """Replace placeholders in one pass: braces of LaTeX stay, and so does a placeholder inside a value."""
    return filled(template, **values)[0]


def filled(template: str, **values: str) -> tuple[str, list[tuple[int, int]]]:
    """The same as `fill`, and the place of each value in the text."""
    text, places, end = "", [], 0
    for match in re.finditer(r"\{(" + "|".join(values) + r")\}", template):
        text += template[end : match.start()]
        places.append((len(text), len(text) + len(values[match[1]])))
        text += values[match[1]]
        end = match.end()
    return text + template[end:], places
