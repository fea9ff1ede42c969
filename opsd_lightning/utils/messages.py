"""Texts of messages of a conversation, and the comparison of questions."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from typing import Any

from opsd_lightning.types import Example, Message
from opsd_lightning.utils.texts import NotTextError, normalize_text, text_of

#: Roles of the message at the beginning of a conversation that instructs the assistant.
SYSTEM_ROLES = ("system", "developer")


def is_messages(value: Any) -> bool:
    """Return True if a value is a list of messages, in the OpenAI (``role``, ``content``) or ShareGPT form."""
    if not isinstance(value, list | tuple) or not value:
        return False
    return all(isinstance(each, Mapping) and ("role" in each or {"from", "value"} <= each.keys()) for each in value)


def content_text(content: Any, between: str = "\n") -> str:
    """Return the text of a message's content: a text, a list of text parts, or null.

    Args:
        content: The content.
        between: Text between two parts.

    Raises:
        NotTextError: It is something else, such as an image.
    """
    if not isinstance(content, list | tuple):
        return text_of(content) or ""
    texts = []
    for part in content:
        if isinstance(part, Mapping):
            if (kind := part.get("type") or "text") != "text":
                raise NotTextError(f"a part of type {kind!r}")
            part = part.get("text")
        texts.append(text_of(part) or "")
    return between.join(text for text in texts if text)


def calls_of(message: Message) -> Iterator[Mapping[str, Any]]:
    """Yield the name and the arguments of each tool call of an assistant's message."""
    for call in message.get("tool_calls") or ():
        function = call.get("function") or call
        yield {"name": function.get("name"), "arguments": function.get("arguments")}


def message_text(message: Message, between: str = "\n") -> str:
    """Return the text of a message: its content, and a line of JSON for each tool call.

    Example::

        >>> message_text({"role": "assistant", "tool_calls": [{"function": {"name": "add", "arguments": {"n": 1}}}]})
        '{"name": "add", "arguments": {"n": 1}}'
    """
    texts = [content_text(message.get("content", message.get("value")), between)]
    texts += [json.dumps(call, ensure_ascii=False) for call in calls_of(message)]
    return "\n".join(text for text in texts if text)


def column_text(value: Any) -> str | None:
    """Return a dataset value as text, as `text_of` does. A list of messages gives their texts, one a line.

    trl reads messages in ``privileged_context`` in the same way, with a space between text parts.

    Raises:
        NotTextError: The value has no text form.
    """
    return "\n".join(filter(None, (message_text(each, " ") for each in value))) if is_messages(value) else text_of(value)


def prompt_text(example: Example) -> str:
    """Return the question, or a conversation of several messages as text: each message below its role.

    Example::

        >>> from opsd_lightning import Example
        >>> turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
        >>> print(prompt_text(Example("1 + 1?", "", "", messages=turns)))
        system:
        Be brief.
        <BLANKLINE>
        user:
        1 + 1?
    """
    if len(example.messages) < 2:
        return example.question
    return "\n\n".join(f"{message['role']}:\n{message_text(message)}" for message in example.messages)


def question_key(example: Example) -> str:
    """Return a text that is the same for two examples if they ask the same question.

    Texts are compared as by `normalize_text`. The texts, roles and calls of all messages count, and the tools. Other fields,
    such as the ids of calls, do not. A conversation of one user turn equals the same question without a conversation.

    Example::

        >>> from opsd_lightning import Example
        >>> turns = [{"role": "user", "content": [{"type": "text", "text": "1 +  1?"}]}]
        >>> question_key(Example("1 +  1?", "", "", messages=turns))
        '1 + 1?'
    """
    messages = [_normalized(_said(message)) for message in example.messages]
    if not example.tools and messages in ([], [{"role": "user", "content": normalize_text(example.question)}]):
        return normalize_text(example.question)
    return json.dumps([messages, _normalized(example.tools)], ensure_ascii=False, sort_keys=True)


def _said(message: Message) -> dict[str, Any]:
    said: dict[str, Any] = {"role": message["role"], "content": content_text(message.get("content"))}
    return said | ({"calls": list(calls_of(message))} if message.get("tool_calls") else {})


def _normalized(value: Any) -> Any:
    if isinstance(value, str):
        return normalize_text(value)
    if isinstance(value, Mapping):
        return {str(key): _normalized(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_normalized(each) for each in value]
    return value
