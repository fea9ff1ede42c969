"""Texts of messages of a conversation, and the comparison of questions."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from opsd_lightning.types import Example
from opsd_lightning.utils.texts import normalize_text


def content_text(content: Any, between: str = "\n") -> str:
    """Return the text of a message's content: a text, a list of text parts, or null.

    Args:
        content: The content.
        between: Text between two parts.
    """
    if isinstance(content, list | tuple):
        texts = [part.get("text") if isinstance(part, Mapping) else part for part in content]
        return between.join(text for text in texts if isinstance(text, str))
    return content if isinstance(content, str) else ""


def question_key(example: Example) -> str:
    """Return a text that is the same for two examples if they ask the same question.

    Texts are compared as by `normalize_text`. All messages and tools of a conversation count, not only the last user turn. A
    conversation of one user turn equals the same question without a conversation.

    Example::

        >>> from opsd_lightning import Example
        >>> turns = [{"role": "user", "content": [{"type": "text", "text": "1 +  1?"}]}]
        >>> question_key(Example("1 +  1?", "", "", messages=turns))
        '1 + 1?'
    """
    messages = [_normalized({**message, "content": content_text(message.get("content"))}) for message in example.messages]
    if not example.tools and messages in ([], [{"role": "user", "content": normalize_text(example.question)}]):
        return normalize_text(example.question)
    return json.dumps([messages, _normalized(example.tools)], ensure_ascii=False, sort_keys=True)


def _normalized(value: Any) -> Any:
    if isinstance(value, str):
        return normalize_text(value)
    if isinstance(value, Mapping):
        return {str(key): _normalized(each) for key, each in value.items()}
    if isinstance(value, list | tuple):
        return [_normalized(each) for each in value]
    return value
