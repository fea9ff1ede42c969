"""Read conversations: messages in the OpenAI or the ShareGPT form, and tool schemas.

Messages become plain values that chat templates accept, and everything that a template could drop or misread in silence is
refused: roles in an impossible order, images, tool calls without a name.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

from opsd_lightning.types import Example, Message
from opsd_lightning.utils.messages import SYSTEM_ROLES, content_text, message_text
from opsd_lightning.utils.texts import NotTextError, text_of

#: Columns of data sets with images, video or audio.
MEDIA = ("image", "images", "video", "videos", "audio", "audios")

_ROLES = (*SYSTEM_ROLES, "user", "assistant", "tool")
_DEEPEST = 100  # levels of nesting in tools and arguments
_LEARNED = ("weight", "train", "training", "loss")  # of a message: OpenAI, Axolotl, ms-swift
_CALLS = ("tool_call", "function_call", "tool_response", "observation", "function")  # roles of other forms
_SHAREGPT = {"human": "user", "gpt": "assistant"}


class ConversationError(ValueError):
    """A value that is no conversation.

    Args:
        problem: The problem, as a clause without a final period.
        fix: An imperative sentence without a final period.
    """

    def __init__(self, problem: str, fix: str) -> None:
        super().__init__(problem)
        self.problem, self.fix = problem, fix


class Conversation(NamedTuple):
    """A conversation, split into the prompt and its demonstration.

    Args:
        messages: All messages before the demonstration. One of them is a user's.
        demonstration: The last message, if it is the assistant's.
    """

    messages: list[dict[str, Any]]
    demonstration: dict[str, Any] | None

    @property
    def question(self) -> str:
        """Text of the last user turn."""
        return next(content_text(each.get("content")) for each in reversed(self.messages) if each["role"] == "user")

    @property
    def trace(self) -> str:
        """Text of the demonstration."""
        return message_text(self.demonstration) if self.demonstration else ""


def read_conversation(value: Any, null_filled: bool = False) -> Conversation:
    """Read a list of messages, or a JSON text of one.

    Args:
        value: Messages with ``role`` and ``content``, or with ``from`` and ``value``. Content is a text or a list of text
            parts. The assistant's messages may have ``tool_calls``, with arguments as an object or as its JSON text.
        null_filled: If True, leave null values of objects out. Arrow fills every object with the keys of all others.

    Raises:
        ConversationError: It is no conversation of texts with a user turn.

    Example::

        >>> read_conversation([{"from": "human", "value": "1 + 1?"}, {"from": "gpt", "value": "2"}])
        Conversation(messages=[{'role': 'user', 'content': '1 + 1?'}], demonstration={'role': 'assistant', 'content': '2'})
    """
    value = decoded(value, "messages") if value not in (None, "") else ()
    if not value:
        raise ConversationError("the conversation is empty", "Leave such rows out")
    messages = [read_message(message, place, null_filled) for place, message in enumerate(value, 1)]
    _check_order(messages)
    demonstration = None
    if messages[-1]["role"] == "assistant":
        demonstration = _demonstration(messages[-1], len(messages))
        messages.pop()
    if not any(message["role"] == "user" for message in messages):
        raise ConversationError("no user turn before the demonstration", "Write the question as a message of the role user")
    return Conversation(messages, demonstration)


def read_message(message: Any, place: int = 1, null_filled: bool = False) -> dict[str, Any]:
    """Read one message. See `read_conversation`.

    Args:
        message: The message.
        place: Number of the message in its conversation, from 1, for messages of errors.
        null_filled: See `read_conversation`.

    Raises:
        ConversationError: It is no message.
    """
    if not isinstance(message, Mapping):
        fix = 'Write messages such as {"role": "user", "content": "1 + 1?"}'
        raise ConversationError(f"message {place} is {_kind(message)}, not an object", fix)
    given = {str(key): value for key, value in message.items() if value is not None}
    if "role" not in given and "from" in given:
        given["role"] = _SHAREGPT.get(str(given["from"]), given.pop("from"))
        given["content"] = given.pop("value", None)
        given.pop("from", None)
    role = given.pop("role", None)
    if role not in _ROLES:
        problem = f"message {place} has {'no role' if role is None else f'the unknown role {role!r}'}"
        calls = "write a call as tool_calls of the assistant's message, and its result as a tool's message"
        raise ConversationError(problem, f"Use the roles {', '.join(_ROLES)}" + (f"; {calls}" if role in _CALLS else ""))
    if "function_call" in given:
        raise ConversationError(
            f"message {place} has function_call", "Write it as tool_calls, and its result as a tool's turn"
        )
    where = f"message {place} (role {role})"
    found = {"role": role}
    if given.get("content") is not None:
        found["content"] = _content(given.pop("content"), where)
    else:
        given.pop("content", None)
    if calls := given.pop("tool_calls", None):
        if role != "assistant":
            raise ConversationError(f"{where} has tool_calls", "Write tool_calls in messages of the role assistant")
        found["tool_calls"] = [_call(call, where, null_filled) for call in decoded(calls, f"tool_calls of {where}")]
    if "content" not in found and "tool_calls" not in found:
        raise ConversationError(f"{where} has no content", "Write its text as content")
    return found | {key: _plain(value, f"{key} of {where}", null_filled) for key, value in given.items()}


def read_demonstration(message: Any, null_filled: bool = False) -> dict[str, Any]:
    """Read a message that is a reference by itself. See `read_message`."""
    return _demonstration(read_message(message, 1, null_filled), 1)


def _demonstration(message: dict[str, Any], place: int) -> dict[str, Any]:
    """Return a demonstration, or raise `ConversationError` if the data say that it must not be learned."""
    for name in _LEARNED:
        if message.get(name) in (False, 0):
            fix = "Leave such rows out, or end the conversation with a turn to learn"
            raise ConversationError(f"message {place} is the demonstration, and its {name} is {message[name]!r}", fix)
    return message


def read_tools(value: Any, null_filled: bool = False) -> list[dict[str, Any]]:
    """Read a list of tool schemas, or a JSON text of one. Each item may be a JSON text too.

    Args:
        value: The schemas, or None.
        null_filled: See `read_conversation`.

    Raises:
        ConversationError: A schema is no object with a name.
    """
    found = []
    for place, tool in enumerate(decoded(value, "tools") if value not in (None, "") else (), 1):
        tool = _from_json(tool, f"tool {place}") if isinstance(tool, str) else tool
        tool = _plain(tool, f"tool {place}", null_filled)
        function = tool.get("function", tool) if isinstance(tool, dict) else None
        if not isinstance(function, dict) or not isinstance(function.get("name"), str) or not function["name"]:
            fix = 'Write JSON schemas such as {"type": "function", "function": {"name": "add", "parameters": {...}}}'
            raise ConversationError(f"tool {place} has no name", fix)
        found.append(tool)
    return found


def check_example(example: Example) -> None:
    """Check the messages and tools of an example that a source has made by itself.

    Raises:
        ConversationError: They are no conversation, or not written as `read_conversation` returns them.
    """
    if not (example.messages or example.tools or example.demonstration):
        return
    end: list[Message] = [] if example.demonstration is None else [example.demonstration]
    made = read_conversation([*example.messages, *end])
    fix = "Make examples with columns.messages, or write the messages as opsd_lightning.Columns does"
    if made.demonstration != example.demonstration or made.messages != [dict(each) for each in example.messages]:
        raise ConversationError("the messages are not as a chat template reads them", fix)
    if read_tools(example.tools) != [dict(each) for each in example.tools]:
        raise ConversationError("the tools are not as a chat template reads them", fix)


def check_no_media(row: Mapping[str, Any]) -> None:
    """Raise `ConversationError` if a row with messages has a column of images, video or audio."""
    if held := [name for name in MEDIA if row.get(name)]:
        fix = "Use rows of text alone: models of text read no media"
        raise ConversationError(f"the column {held[0]!r} holds media, which are not supported", fix)


def _check_order(messages: list[dict[str, Any]]) -> None:
    """Raise `ConversationError` for roles in an order that no conversation has."""
    before: dict[str, Any] = {"role": "system"}
    seen: set[str] = set()
    for place, message in enumerate(messages, 1):
        role, previous = message["role"], before["role"]
        if role in SYSTEM_ROLES and (previous not in SYSTEM_ROLES or role in seen):
            fix = "Write one system message, as the first message"
            raise ConversationError(f"message {place} has the role {role} and is not the first", fix)
        if role == "tool" and previous != "tool" and "tool_calls" not in before:
            fix = "Write a tool's result behind the assistant's message with the tool_calls"
            raise ConversationError(f"message {place} is a tool's, and the message before has no tool_calls", fix)
        if role == previous == "assistant":
            fix = "Join them to one message, or write the turn between them"
            raise ConversationError(f"messages {place - 1} and {place} are both the assistant's", fix)
        seen.add(role)
        before = message


def _content(content: Any, where: str) -> str | list[dict[str, str]]:
    """Return content as a text or a list of text parts."""
    if isinstance(content, Mapping):
        raise ConversationError(f"the content of {where} is an object", "Write it as a text, such as JSON")
    try:
        if not isinstance(content, list | tuple):
            return text_of(content) or ""
        return [{"type": "text", "text": content_text([part])} for part in content]
    except NotTextError as error:
        fix = "Use parts of the type text: images, audio and video are not supported, and calls belong into tool_calls"
        raise ConversationError(f"the content of {where} holds {error}", fix) from None


def _call(call: Any, where: str, null_filled: bool) -> dict[str, Any]:
    """Return a tool call with its arguments as an object.

    Templates write arguments as JSON, so that a text would be escaped once more.
    """
    fix = 'Write tool calls such as {"type": "function", "function": {"name": "add", "arguments": {"n": 1}}}'
    given = {key: value for key, value in call.items() if value is not None} if isinstance(call, Mapping) else {}
    nested = isinstance(given.get("function"), Mapping)
    function = {key: value for key, value in (given["function"] if nested else given).items() if value is not None}
    if not isinstance(function.get("name"), str) or not function["name"]:
        raise ConversationError(f"a tool call of {where} has no name", fix)
    arguments = function.get("arguments") or {}
    if isinstance(arguments, str):
        arguments = _from_json(arguments, f"the arguments of {function['name']!r} in {where}")
        null_filled = False
    if not isinstance(arguments, Mapping):
        raise ConversationError(f"the arguments of {function['name']!r} in {where} are no object", fix)
    arguments = _plain(arguments, f"the arguments of {function['name']!r} in {where}", null_filled)
    function = {"name": function.pop("name"), "arguments": arguments} | {
        key: _plain(value, where, null_filled) for key, value in function.items() if key != "arguments"
    }
    if not nested:
        return function
    return {key: function if key == "function" else _plain(value, where, null_filled) for key, value in given.items()}


def decoded(value: Any, what: str) -> Sequence[Any]:
    """Return a list, or the list behind a JSON text.

    Raises:
        ConversationError: It is something else. ``what`` names it.
    """
    if isinstance(value, str):
        value = _from_json(value, what)
    if not isinstance(value, list | tuple):
        raise ConversationError(f"{what}: {_kind(value)}, not a list", "Write a list of objects, or its JSON text")
    return value


def _from_json(text: str, what: str) -> Any:
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise ConversationError(f"{what}: a text that is no JSON ({error})", "Write it as JSON, or as an object") from None


def _plain(value: Any, where: str, null_filled: bool, depth: int = 0) -> Any:
    """Return a value of the types that JSON has."""
    if depth > _DEEPEST:
        raise ConversationError(f"{where} is nested too deeply", f"Use at most {_DEEPEST} levels of lists and objects")
    if isinstance(value, Mapping):
        items = {str(key): each for key, each in value.items() if each is not None or not null_filled}
        return {key: _plain(each, where, null_filled, depth + 1) for key, each in items.items()}
    if isinstance(value, list | tuple):
        return [_plain(each, where, null_filled, depth + 1) for each in value]
    if value is None or type(value) in (bool, int):
        return value
    if isinstance(value, float):
        return float(value)
    try:
        return text_of(value)
    except NotTextError as error:
        raise ConversationError(f"{where} holds {error}", "Use texts, numbers, lists and objects") from None


def _kind(value: Any) -> str:
    return "null" if value is None else f"of type {type(value).__name__}"
