"""Find parts of a conversation that a chat template drops or changes."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence

from opsd_lightning.prompts.control_tokens import texts_in
from opsd_lightning.types import Message
from opsd_lightning.utils.messages import SYSTEM_ROLES, calls_of

#: Tags around the thinking in an assistant's message.
THOUGHT_START, THOUGHT_END = "<think>", "</think>"


def missing_part(text: str, messages: Sequence[Message], tools: Sequence[Message]) -> str:
    """Return the name of the first part of a conversation that is not in its rendered text, or an empty text.

    Templates may trim and wrap texts, write them as JSON, move the system message, and leave out the assistant's thinking.
    They must write the other messages in their order, each tool call's name and texts, and the name of each tool outside the
    messages.

    Args:
        text: The rendered text.
        messages: The messages that it was rendered from.
        tools: The tool schemas that it was rendered from.

    Example::

        >>> turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
        >>> missing_part("<user>1 + 1?</user>", turns, [])
        "the system message ('Be brief.')"
    """
    used: list[tuple[int, int]] = []
    position = 0
    for place, message in enumerate(messages, 1):
        system = message["role"] in SYSTEM_ROLES
        start = 0 if system else position
        for part in _texts(message):
            found = _find(text, part, start)
            if found is None:
                name = f"the {message['role']} message" if system else f"message {place}, the {message['role']}'s,"
                return f"{name} ({part.strip()[:40]!r})"
            used.append(found)
            start = found[1]
        for call in calls_of(message):
            for part in (str(call["name"]), *texts_in(call["arguments"])):
                found = _find(text, part, position)
                if found is None:
                    return f"the tool call {call['name']!r} of message {place} ({part.strip()[:40]!r})"
                used.append(found)
        position = position if system else start
    rest, end = "", 0
    for first, last in sorted(used):
        rest, end = rest + text[end:first] + "\n" * (first > end), max(end, last)
    rest += text[end:]
    for tool in tools:
        name = str(tool.get("function", tool)["name"])
        if _find(rest, name, 0) is None:
            return f"the tool {name!r}"
    return ""


def holds_answer(text: str, answer: str) -> bool:
    """Return True if a rendered text has an assistant's message with its thinking, in the template's form.

    Example::

        >>> holds_answer("<channel>final</channel>It is 4.", "It is 4.")
        True
        >>> holds_answer("It is 4.", "<think>2 + 2</think>It is 4.")
        False
    """
    position = 0
    for part in filter(str.strip, re.split(f"{THOUGHT_START}|{THOUGHT_END}", answer)):
        found = _find(text, part, position)
        if found is None:
            return False
        position = found[1]
    return True


def _texts(message: Message) -> list[str]:
    """Return the texts of a message's content that every template should write."""
    content = message.get("content")
    texts = [part["text"] for part in content] if isinstance(content, list | tuple) else [content or ""]
    if message["role"] == "assistant":
        texts = [text.rpartition(THOUGHT_END)[2] for text in texts]
    return texts


def _find(text: str, part: str, start: int) -> tuple[int, int] | None:
    """Return the place of a part in a text, as it is, as JSON, or with other white space."""
    part = part.strip()
    for written in dict.fromkeys((part, *(json.dumps(part, ensure_ascii=ascii_)[1:-1] for ascii_ in (False, True)))):
        if (place := text.find(written, start)) >= 0:
            return place, place + len(written)
    match = re.compile(r"\s+".join(map(re.escape, part.split()))).search(text, start)
    return match.span() if match else None
