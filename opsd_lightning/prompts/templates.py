"""Prompts of student and teacher: templates, chat markup, token limits."""

from __future__ import annotations

import datetime
import re
from bisect import bisect_right
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, Self, get_args

import regex

from opsd_lightning.prompts.chat_template import SETTING, render
from opsd_lightning.prompts.control_tokens import Marks, Span, encode, encode_text, texts_in
from opsd_lightning.prompts.missing_parts import THOUGHT_END, THOUGHT_START, holds_answer, missing_part
from opsd_lightning.types import ConfigError, Example, Message, PositiveInt, checked
from opsd_lightning.utils.messages import SYSTEM_ROLES, content_text

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

#: The teacher's message in a conversation, in which the demonstration is a reply of any kind.
CONVERSATION_TEMPLATE = """{question}

Here is a reference response to this message.
=== Reference Response Begin ===
{context}
=== Reference Response End ===

Now respond to the message yourself, in your own words, without copying the reference response and without mentioning it."""

#: The context alone, as a system message or a user turn of its own.
CONTEXT_TEMPLATE = """Here is a reference response to the user's last message.
=== Reference Response Begin ===
{context}
=== Reference Response End ===

Respond to that message yourself, in your own words, without copying the reference response and without mentioning it."""

#: The end of the teacher's message, or the text at another position, if its context is an attempt and not a reference.
ATTEMPT_REQUEST = """{context}

Now answer the last message again yourself, in your own words and without mentioning the attempt."""

#: The messages of a prompt that the teacher's context is part of.
ContextPosition = Literal["user", "system", "turn"]


_UNSPACED = r"[\p{Han}\p{Hiragana}\p{Katakana}\p{Thai}\p{Lao}\p{Khmer}\p{Myanmar}\p{Tibetan}]"
# A word of at most 24 characters, or one character of a script without spaces between words.
UNIT = regex.compile(rf"\s*(?:(?={_UNSPACED})\X|(?:(?!{_UNSPACED})(?!\s)\X){{1,24}})")
# Placeholder for an answer, to find the text that a template writes behind it.
_ANSWER = "Pangolin7"
_SHORT = Example("1+1?", "", "")


class Prompt(list[int]):
    """The token ids of a prompt.

    Attributes:
        trace_was_cut: True if its context was cut to ``max_trace_tokens``.
    """

    trace_was_cut: bool = False


#: The two prompts of a question.
Role = Literal["student", "teacher"]

_DROPS_FIX = "Give a template that writes all messages and tools, or leave such rows out"
_REASONING = ("reasoning_content", "reasoning", "thinking")  # fields with the assistant's thinking


class Turn(NamedTuple):
    """A message of a prompt.

    Args:
        message: The message.
        inserted: Start and end of each value of the data in its content, which is then a text. None if the whole message is
            data.
    """

    message: Message
    inserted: Sequence[Span] | None = None

    @property
    def role(self) -> str:
        return str(self.message["role"])


class _Marked(NamedTuple):
    """Messages and tools, with marks in place of control tokens that the data spell out.

    Args:
        turns: The messages, with marks.
        tools: The tool schemas, with the same marks.
        hidden: The control token behind each mark.
    """

    turns: Sequence[Turn]
    tools: Sequence[Message]
    hidden: Mapping[str, str]


@checked
@dataclass(frozen=True)
class Prompts:
    """Templates of the prompts of student and teacher.

    ``{question}`` and ``{context}`` are placeholders. All other braces are text. In a conversation, templates fill the last
    user turn: ``{question}`` is its text, and all other turns stay as they are.

    Args:
        student_template: The student's last user turn, with ``{question}``. Defaults to a request to reason step by step and
            to box the answer; in conversations to ``{question}`` alone.
        teacher_template: The teacher's last user turn, with ``{question}`` and ``{context}``. Defaults to the question, the
            reference between markers and the student's request; in conversations to the same in neutral words. Where the
            context is an attempt (`FeedbackContext`, `CritiqueContext`), to the student's turn with the attempt below. At
            another ``context_position`` it is the text there, with ``{context}``.
        system: System message of both roles, for rows without a system message of their own. Defaults to none, or to the
            chat template's own.
        student_chat_template_kwargs: Further arguments of the chat template for the student, such as
            ``{enable_thinking: false}``.
        teacher_chat_template_kwargs: Further arguments of the chat template for the teacher.
        evaluation_chat_template_kwargs: Further arguments of the chat template for the student in validation, test and
            predict, such as ``{enable_thinking: true}`` for a student that trains without thinking. Defaults to
            ``student_chat_template_kwargs``.
        teacher_response_prefix: Text behind the teacher's generation prompt. An empty thinking block, for example, makes a
            thinking teacher score the completions of a student that does not think.
        max_trace_tokens: Longest context of the teacher, in tokens. Longer contexts are cut, counted and reported; the
            template around them is not. Defaults to no limit.
        date: Date for chat templates that write today's date, as YYYY-MM-DD. It is fixed, so that prompts are the same on
            every day.
        context_position: Place of the teacher's context. ``user`` is the last user turn, also where turns of a tool follow
            it. ``system`` is the end of the system message, which is added if there is none. ``turn`` is a user turn of its
            own before the last user turn. At ``system`` and ``turn`` the last user turn is the student's.

    Example::

        >>> from opsd_lightning import Example, Prompts
        >>> prompts = Prompts(student_template="{question} Think first.", system="You are a tutor.")
        >>> prompts.messages(Example("1 + 1?", "", ""))
        [{'role': 'system', 'content': 'You are a tutor.'}, {'role': 'user', 'content': '1 + 1? Think first.'}]
        >>> Prompts(student_template="Think first.")
        Traceback (most recent call last):
        opsd_lightning.types.ConfigError: data.prompts.student_template: it lacks {question}. Add the placeholder
    """

    student_template: str | None = None
    teacher_template: str | None = None
    system: str | None = None
    student_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_chat_template_kwargs: dict[str, Any] = field(default_factory=dict)
    teacher_response_prefix: str = ""
    max_trace_tokens: PositiveInt | None = None
    date: str = "2024-07-26"
    context_position: ContextPosition = "user"
    evaluation_chat_template_kwargs: dict[str, Any] | None = None

    def __post_init__(self) -> None:
        try:
            datetime.date.fromisoformat(self.date)
        except (TypeError, ValueError):
            raise ConfigError(
                f"{self.date!r} is not a date", "data.prompts.date", "Write it as YYYY-MM-DD, such as 2024-07-26"
            ) from None
        if self.context_position not in get_args(ContextPosition):
            choices = ", ".join(get_args(ContextPosition))
            raise ConfigError(
                f"it is {self.context_position!r}", "data.prompts.context_position", f"Choose one of {choices}"
            )
        teacher = ["question", "context"] if self.context_position == "user" else ["context"]
        for name, needed in {"student_template": ["question"], "teacher_template": teacher}.items():
            template = getattr(self, name)
            for placeholder in needed:
                if template is not None and f"{{{placeholder}}}" not in template:
                    raise ConfigError(f"it lacks {{{placeholder}}}", f"data.prompts.{name}", "Add the placeholder")

    def template(self, role: Role, conversation: bool, attempt: bool = False) -> str:
        """Return the template of a role, with the default for a question or for a conversation.

        Args:
            role: The role.
            conversation: If True, the template is for a conversation.
            attempt: If True, the teacher's context is about an attempt instead of a reference.
        """
        if role == "student":
            return self.student_template or ("{question}" if conversation else STUDENT_TEMPLATE)
        if attempt and self.teacher_template is None:
            student = self.template("student", conversation)
            return f"{student}\n\n{ATTEMPT_REQUEST}" if self.context_position == "user" else ATTEMPT_REQUEST
        if self.teacher_template or self.context_position == "user":
            return self.teacher_template or (CONVERSATION_TEMPLATE if conversation else TEACHER_TEMPLATE)
        return CONTEXT_TEMPLATE

    def kwargs(self, role: Role) -> dict[str, Any]:
        """Return the further arguments of the chat template for a role."""
        return self.student_chat_template_kwargs if role == "student" else self.teacher_chat_template_kwargs

    def of_split(self, split: str) -> Self:
        """Return the prompts of a split of the data, in which the student's arguments of the chat template are those of it.

        Args:
            split: ``train``, ``val`` or ``test``.
        """
        evaluation = None if split == "train" else self.evaluation_chat_template_kwargs
        student = self.student_chat_template_kwargs if evaluation is None else evaluation
        return replace(self, student_chat_template_kwargs=student, evaluation_chat_template_kwargs=None)

    @property
    def day(self) -> datetime.date:
        """Date for chat templates that write today's date."""
        return datetime.date.fromisoformat(self.date)

    def student(self, tokenizer: PreTrainedTokenizerBase, example: Example) -> Prompt:
        """Return the student's prompt.

        Raises:
            ConfigError: The chat template fails, or drops a part of the conversation.
        """
        return self._prompt(tokenizer, self.turns(example), example, "student")

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
        self,
        tokenizer: PreTrainedTokenizerBase,
        example: Example,
        context: str | None,
        whole: bool = False,
        attempt: bool = False,
    ) -> Prompt:
        """Return the teacher's prompt.

        Args:
            tokenizer: The policy's tokenizer.
            example: The question.
            context: The privileged context. If None, the prompt is made with the student's template.
            whole: If True, do not cut the context to ``max_trace_tokens``.
            attempt: If True, the context is about an attempt instead of a reference.
        """
        shown = context if context is None or whole else self.cut(tokenizer, context)
        prompt = self._prompt(tokenizer, self.turns(example, shown, attempt), example, "teacher")
        if self.teacher_response_prefix:
            prompt.extend(tokenizer.encode(self.teacher_response_prefix, add_special_tokens=False))
        prompt.trace_was_cut = shown != context
        return prompt

    def ask(self, tokenizer: PreTrainedTokenizerBase, example: Example, message: str) -> Prompt:
        """Return the prompt for any user message to the teacher, with the conversation around it.

        The message takes the place of the last user turn. It follows the conversation if that ends with a tool's turn.
        """
        turns = self._with_system([Turn(each) for each in example.messages])
        if turns and turns[-1].role == "user":
            turns.pop()
        return self._prompt(tokenizer, [*turns, Turn({"role": "user", "content": message})], example, "teacher")

    def trace(
        self, tokenizer: PreTrainedTokenizerBase, example: Example, end: Sequence[int], stops: Sequence[int] = ()
    ) -> list[int]:
        """Return the tokens of the trace as a completion of the student's prompt.

        The chat template writes it if it has tool calls or reasoning in a field of its own, or if the template puts text
        between the prompt and an answer, such as an empty thinking block. Otherwise it is the text of the trace and ``end``.

        Args:
            tokenizer: The policy's tokenizer.
            example: The question or conversation, with its trace.
            end: Tokens behind a trace, see `end`.
            stops: All tokens that end a sampled completion. A tool call may end with another one than an answer. Defaults to
                the last one of ``end``.

        Raises:
            ConfigError: The trace cannot follow the student's prompt: the chat template does not write it there, or one of
                them begins or ends a thinking block that the other has not.
        """
        given = example.demonstration or {}
        plain = not given.keys() & {"tool_calls", *_REASONING}
        message = {"role": "assistant", "content": example.trace} if plain else given
        turns, kwargs = self.turns(example), self.student_chat_template_kwargs
        marked = self._marked(tokenizer, [*turns, Turn(message)], example.tools)
        messages = [turn.message for turn in marked.turns]
        try:
            opened = self.rendered(tokenizer, messages[:-1], kwargs, tools=marked.tools)
            whole = self.rendered(tokenizer, messages, kwargs, generation=False, tools=marked.tools)
        except ConfigError:
            if not plain:
                raise
            return [*encode_text(tokenizer, example.trace, "completion"), *end]  # a template for questions only
        written = whole[len(opened) :] if whole.startswith(opened) else ""
        if plain:
            content = str(messages[-1]["content"])
            if written.lstrip().startswith(content) or not holds_answer(written, content):
                text = example.trace if written.lstrip().startswith(content) else _behind(opened, example.trace)
                return [*encode_text(tokenizer, text, "completion"), *end]
        elif not written:
            raise ConfigError(
                "the chat template does not write a demonstration with tool calls or reasoning behind the prompt",
                SETTING,
                "Give a template that writes both and opens the assistant's turn as it writes it, or leave such rows out",
            )
        elif missing := missing_part(written, messages[-1:], ()):
            raise ConfigError(
                f"the chat template drops or changes a part of the demonstration: {missing}", SETTING, _DROPS_FIX
            )
        # Encode it behind the prompt: some tokenizers add a space at the beginning of a text.
        start, ids = encode(tokenizer, opened, marked.hidden), encode(tokenizer, whole, marked.hidden)
        same = ids[: len(start)] == start
        ids = ids[len(start) :] if same else encode(tokenizer, written, marked.hidden)
        stop = next((place for place, token in enumerate(ids) if token in (*stops, end[-1])), None)
        return [*ids, *end] if stop is None else ids[: stop + 1]

    def end(self, tokenizer: PreTrainedTokenizerBase, eos: Sequence[int]) -> list[int]:
        """Return the tokens at the end of a trace that is trained on: those that the chat template writes after an answer.

        Args:
            tokenizer: The policy's tokenizer.
            eos: All tokens that end a sampled completion. The first one is returned if the template writes none.

        Raises:
            ConfigError: The template ends an answer with a text at which sampling does not stop.
        """
        turns = [*self.messages(_SHORT), {"role": "assistant", "content": _ANSWER}]
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

    def turns(self, example: Example, context: str | None = None, attempt: bool = False) -> list[Turn]:
        """Return the messages of a prompt.

        Args:
            example: The question or conversation.
            context: The privileged context. If None, the messages are the student's.
            attempt: If True, the context is about an attempt instead of a reference.
        """
        conversation = bool(example.messages)
        given = example.messages or [{"role": "user", "content": example.question}]
        turns = self._with_system([Turn(message) for message in given])
        last = max((place for place, turn in enumerate(turns) if turn.role == "user"), default=None)
        if last is None:
            raise ConfigError("a conversation has no user turn", "data.train", "Give every conversation a user turn")
        teacher = self.template("teacher", conversation, attempt)
        question = {"question": content_text(turns[last].message["content"])}
        values = question if context is None else question | {"context": context}
        if context is not None and self.context_position == "user":
            turns[last] = _filled(turns[last].message, teacher, values)
            return turns
        template = self.template("student", conversation)
        if template != "{question}":  # content of several parts stays as it is
            turns[last] = _filled(turns[last].message, template, question)
        if context is None:
            return turns
        if self.context_position == "turn":
            return [*turns[:last], _filled({"role": "user"}, teacher, values), *turns[last:]]
        own = turns.pop(0) if turns[0].role in SYSTEM_ROLES else Turn({"role": "system", "content": ""}, [])
        text = content_text(own.message["content"])
        before = text + "\n\n" if text else ""
        added = _filled(own.message, teacher, values)
        places = [(len(before) + start, len(before) + stop) for start, stop in added.inserted or ()]
        kept = [(0, len(text))] if own.inserted is None else list(own.inserted)
        content = before + str(added.message["content"])
        return [Turn({**own.message, "content": content}, [*kept, *places]), *turns]

    def messages(self, example: Example, context: str | None = None) -> list[dict[str, Any]]:
        """Return the messages of a prompt, as `turns` does, without the places of the data in them."""
        return [dict(turn.message) for turn in self.turns(example, context)]

    def rendered(
        self,
        tokenizer: PreTrainedTokenizerBase,
        messages: Sequence[Message],
        kwargs: dict[str, Any],
        generation: bool = True,
        tools: Sequence[Message] = (),
    ) -> str:
        """Return the text of messages, rendered with the chat template.

        Raises:
            ConfigError: The chat template fails.
        """
        return render(tokenizer, messages, kwargs, self.day, generation, tools)

    def _with_system(self, turns: list[Turn]) -> list[Turn]:
        if self.system is None or (turns and turns[0].role in SYSTEM_ROLES):
            return turns
        return [Turn({"role": "system", "content": self.system}, []), *turns]

    def _marked(self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], tools: Sequence[Message]) -> _Marked:
        """Return messages and tools, with marks in place of control tokens that are spelled out in the data."""
        marks = Marks(tokenizer, texts_in([[turn.message for turn in turns], list(tools)]))
        marked = []
        for turn in turns:
            written = ("content", *_REASONING) if turn.role == "assistant" else ()  # the model may think in its own turns
            message = {
                name: marks.hide(value, turn.inserted)
                if name == "content" and turn.inserted is not None
                else marks.hide_in(value, "completion" if name in written else "prompt")
                for name, value in turn.message.items()
            }
            marked.append(Turn(message, turn.inserted))
        return _Marked(marked, [marks.hide_in(tool) for tool in tools], marks.hidden)

    def _prompt(self, tokenizer: PreTrainedTokenizerBase, turns: Sequence[Turn], example: Example, role: Role) -> Prompt:
        # The chat template writes the BOS token, so the tokenizer adds no special tokens.
        marked = self._marked(tokenizer, turns, example.tools)
        messages = [turn.message for turn in marked.turns]
        text = self.rendered(tokenizer, messages, self.kwargs(role), tools=marked.tools)
        if example.messages and (missing := missing_part(text, messages, marked.tools)):
            problem = f"the chat template drops or changes a part of the {role}'s prompt: {missing}"
            raise ConfigError(problem, SETTING, _DROPS_FIX)
        return Prompt(encode(tokenizer, text, marked.hidden))


def _behind(prompt: str, trace: str) -> str:
    """Return a trace as a completion of a prompt that may end inside or behind a thinking block.

    Raises:
        ConfigError: The prompt and the trace do not agree on thinking.
    """
    thinks, end = trace.startswith(THOUGHT_START), prompt.rstrip()
    setting = "data.prompts.student_chat_template_kwargs"
    if end.endswith(THOUGHT_START):
        if thinks:
            return trace.removeprefix(THOUGHT_START).lstrip("\n")
        problem = f"the student's prompt opens a thinking block, and the trace {trace[:40]!r} has none"
        fix = (
            f"Set enable_thinking to false if the chat template knows it, write {THOUGHT_START}...{THOUGHT_END} in traces, "
            "or give another model.policy.chat_template"
        )
        raise ConfigError(problem, setting, fix)
    if end.endswith(THOUGHT_END) and thinks:
        problem = f"the student's prompt ends with a closed thinking block, and the trace {trace[:40]!r} begins with another"
        raise ConfigError(problem, setting, "Leave enable_thinking at true, or remove the blocks from the traces")
    return trace


def _filled(message: Message, template: str, values: Mapping[str, str]) -> Turn:
    """Return a message with a filled template as its content."""
    content, places = filled(template, **values)
    return Turn({**message, "content": content}, places)


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
