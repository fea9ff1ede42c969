"""Render messages with a tokenizer's chat template.

Some templates, such as those of vision models, take the content of a message as a list of parts, and others as a text alone;
`content_form` tests for that. Templates such as Llama 3's write today's date; they get a fixed date, so that prompts are the
same on every day.

A template is a program, which may come with a downloaded model. transformers denies it access to files and Python objects,
but does not limit its run time. So each template is first rendered in a child process with a time and a memory limit, once
for each `kind` of conversation.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from contextlib import suppress
from datetime import date, datetime
from typing import TYPE_CHECKING, Any, Literal
from weakref import WeakKeyDictionary

from opsd_lightning.types import ConfigError, Message
from opsd_lightning.utils.limited_process import exceeded_limit
from opsd_lightning.utils.messages import content_text

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SETTING = "model.policy.chat_template"
Form = Literal["text", "parts", "either"]

# Replaces transformers' function of the same name, which reads the clock. For a date format that is not in `days`, it raises
# an error with the format, which `_apply` reads. Jinja removes the line break behind a block.
_DAY = (
    "{%- macro strftime_now(format) -%}{{ days[format] if format in days else raise_exception(asks ~ format) }}"
    "{%- endmacro %}\n"
)
_ASKS = "opsd: format of a date: "
_FORMATS: set[str] = set()
_FORMS: WeakKeyDictionary[Any, tuple[str, Form]] = WeakKeyDictionary()
_WORD = "Pangolin"
_SECONDS, _MEMORY = 10.0, 1 << 29  # limits of the first rendering
_LONGEST = 1 << 24  # longest rendered text in characters, far more than any model reads
_ENDING: set[tuple[Any, ...]] = set()  # templates, with their arguments, that stayed within the limits


def render(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    kwargs: dict[str, Any],
    day: date,
    generation: bool = True,
    tools: Sequence[Message] = (),
) -> str:
    """Render messages as the text that the model reads.

    Args:
        tokenizer: Tokenizer with the chat template.
        messages: Messages with ``role`` and ``content``.
        kwargs: Further arguments of the template.
        day: Date that the template writes as today's.
        generation: If True, open the assistant's turn at the end.
        tools: Schemas of the tools that the template describes.

    Raises:
        ConfigError: The template fails.
    """
    if tools:
        if "tools" in kwargs:
            problem = "the chat_template_kwargs give tools, and a row has tools of its own"
            raise ConfigError(problem, "data.prompts", "Leave tools out of the chat_template_kwargs of both roles")
        kwargs = {**kwargs, "tools": list(tools)}
    _check_ends(tokenizer, messages, kwargs, day, generation)
    written = _in_form(messages, content_form(tokenizer))
    try:
        return _apply(tokenizer, written, kwargs, day, generation)
    except Exception as error:  # templates are programs, which can raise anything
        if any(message.get("tool_calls") for message in messages):
            with suppress(Exception):
                return _apply(tokenizer, _as_sent(written), kwargs, day, generation)
        reason = " ".join(str(error).split()) or "no message"
        held = ", ".join(dict.fromkeys(str(message["role"]) for message in messages))
        several = f" on a conversation with the roles {held}" if len(messages) > 2 else ""
        raise ConfigError(
            f"the chat template fails{several} with {type(error).__name__}: {reason}",
            SETTING,
            "Check data.prompts.system, data.prompts.context_position and the chat_template_kwargs, or use another template",
        ) from None


def kind(messages: Sequence[Message], tools: object) -> tuple[Any, ...]:
    """Return the roles of a conversation and the use of tools in it: what decides the parts of a template that run."""
    roles = tuple(sorted({str(message["role"]) for message in messages}))
    return roles, any(message.get("tool_calls") for message in messages), bool(tools)


def _check_ends(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    kwargs: dict[str, Any],
    day: date,
    generation: bool,
) -> None:
    """Raise `ConfigError` if rendering with these arguments exceeds a time or memory limit."""
    settings = repr(sorted((name, value) for name, value in kwargs.items() if name != "tools"))
    key = (str(tokenizer.chat_template), settings, generation, *kind(messages, kwargs.get("tools")))
    if key in _ENDING:
        return

    def both() -> None:
        for written in (messages, _in_form(messages, "parts"), _as_sent(messages)):
            try:
                if len(_apply(tokenizer, written, kwargs, day, generation)) > _LONGEST:
                    raise MemoryError
            except MemoryError:
                raise
            except Exception:  # a template may accept only one of them
                continue

    taken = exceeded_limit(both, _SECONDS, _MEMORY)
    if taken:
        limit = f"{_SECONDS:g} seconds" if taken == "time" else f"{_MEMORY >> 20} MiB"
        problem = f"rendering one prompt through the chat template takes more than {limit} of {taken}"
        raise ConfigError(problem, SETTING, "Use another template, and check the origin of this one")
    _ENDING.add(key)


def content_form(tokenizer: PreTrainedTokenizerBase) -> Form:
    """Return the form of content that the template writes: ``text``, ``parts``, or ``either``."""
    template = str(tokenizer.chat_template)
    known = _FORMS.get(tokenizer)
    if known is not None and known[0] == template:
        return known[1]
    message = {"role": "user", "content": _WORD}
    text, parts = _shows(tokenizer, [message]), _shows(tokenizer, _in_form([message], "parts"))
    form: Form = "either" if text and parts else "parts" if parts else "text"
    _FORMS[tokenizer] = (template, form)
    return form


def _shows(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message]) -> bool:
    try:
        text = _apply(tokenizer, messages, {}, date(2024, 7, 26), True)
    except Exception:  # see `render`
        return False
    return _WORD in text and "'text'" not in text and '"text"' not in text  # some templates write a list as Python or JSON


def _in_form(messages: Sequence[Message], form: Form) -> list[dict[str, Any]]:
    """Return messages with their content in the form that a template writes."""
    found = [dict(message) for message in messages]
    for message in found:
        content = message.get("content")
        if form == "parts" and isinstance(content, str):
            message["content"] = [{"type": "text", "text": content}]
        elif form == "text" and isinstance(content, list | tuple):
            message["content"] = content_text(content)
    return found


def _as_sent(messages: Sequence[Message]) -> list[dict[str, Any]]:
    """Return messages with tool calls as a server takes them: with a content, and with arguments as a JSON text.

    DeepSeek's templates read this form only.
    """
    found = [dict(message) for message in messages]
    for message in found:
        if message.get("tool_calls"):
            message.setdefault("content", "")
            message["tool_calls"] = [_with_json(call) for call in message["tool_calls"]]
    return found


def _with_json(call: Message) -> dict[str, Any]:
    if "function" in call:
        return {**call, "function": _with_json(call["function"])}
    return {**call, "arguments": json.dumps(call.get("arguments"), ensure_ascii=False)}


def _apply(
    tokenizer: PreTrainedTokenizerBase,
    messages: Sequence[Message],
    kwargs: dict[str, Any],
    day: date,
    generation: bool,
) -> str:
    template = tokenizer.get_chat_template(tools=kwargs.get("tools"))
    given: dict[str, Any] = {}
    if "strftime_now" in template:
        template = _DAY + template
        midnight = datetime(day.year, day.month, day.day)
        given = {"asks": _ASKS}
    while True:
        if given:
            given["days"] = {form: midnight.strftime(form) for form in _FORMATS}
        try:
            return str(
                tokenizer.apply_chat_template(
                    [dict(message) for message in messages],
                    chat_template=template,
                    add_generation_prompt=generation,
                    tokenize=False,
                    **given,
                    **kwargs,
                )
            )
        except Exception as error:
            asked = str(error)
            if not asked.startswith(_ASKS) or asked[len(_ASKS) :] in _FORMATS:
                raise
            _FORMATS.add(asked[len(_ASKS) :])
