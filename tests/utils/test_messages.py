"""Texts of messages, and the comparison of questions."""

from __future__ import annotations

import json
from typing import Any

import pytest

from opsd_lightning import Example
from opsd_lightning.utils.messages import column_text, content_text, question_key
from opsd_lightning.utils.texts import NotTextError

TURNS: list[dict[str, Any]] = [
    {"role": "system", "content": "Be brief."},
    {"role": "user", "content": "Add  one."},
    {"role": "assistant", "content": None, "tool_calls": [{"function": {"name": "add", "arguments": {"n": 1}}}]},
    {"role": "tool", "name": "add", "content": "2"},
    {"role": "user", "content": [{"type": "text", "text": "Again?"}]},
]
TOOLS: list[dict[str, Any]] = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]


def example(turns: list[dict[str, Any]] = TURNS, tools: list[dict[str, Any]] = TOOLS) -> Example:
    return Example("Again?", "", "", messages=turns, tools=tools)


def changed(place: int, **values: Any) -> list[dict[str, Any]]:
    return [{**turn, **values} if number == place else turn for number, turn in enumerate(TURNS)]


@pytest.mark.parametrize(
    "other",
    [
        example(changed(0, content="Be long.")),
        example(changed(1, content="Add two.")),
        example(changed(2, tool_calls=[{"function": {"name": "add", "arguments": {"n": 2}}}])),
        example(changed(3, content="3")),
        example(changed(4, content="Stop?")),
        example(tools=[]),
        example(TURNS[1:]),
        Example("Again?", "", ""),
    ],
)
def test_any_other_message_or_tool_is_another_question(other: Example) -> None:
    assert question_key(other) != question_key(example())


def test_white_space_and_the_form_of_a_text_do_not_make_another_question() -> None:
    same = changed(1, content="Add one.\n")
    same[4] = {"content": "Again?", "role": "user"}
    assert question_key(example(same)) == question_key(example())
    alone = example([{"role": "user", "content": "Again? "}], [])
    assert question_key(alone) == question_key(Example("Again?", "other", "2"))


def test_contents_of_a_question_are_its_three_texts() -> None:
    assert Example("q", "t", "a", {"q": "x"}).contents == ("q", "t", "a")


@pytest.mark.parametrize("field", ["messages", "tools", "demonstration"])
def test_contents_cover_the_conversation(field: str) -> None:
    whole = example()._replace(demonstration={"role": "assistant", "content": "3"})
    other = whole._replace(**{field: None if field == "demonstration" else ()})
    assert other.contents != whole.contents


def test_content_text() -> None:
    parts = [{"type": "text", "text": "a"}, {"type": "text", "text": None}, "b"]
    assert [content_text(each) for each in ("x", None, parts, 2)] == ["x", "", "a\nb", "2"]
    assert content_text(parts, " ") == "a b"
    with pytest.raises(NotTextError, match="image_url"):
        content_text([{"type": "image_url", "image_url": {"url": "x"}}])


def test_column_text_of_messages_has_a_line_for_each_message_and_call() -> None:
    calls = [{"function": {"name": "add", "arguments": {"n": 1}}}, {"name": "stop", "arguments": {}}]
    messages = [
        {"role": "user", "content": [{"type": "text", "text": "a"}, {"type": "text", "text": "b"}]},
        {"role": "assistant", "content": None, "tool_calls": calls},
        {"role": "assistant", "content": ""},
        {"from": "gpt", "value": "c"},
    ]
    lines = [json.loads(line) for line in str(column_text(messages)).splitlines()[1:3]]
    assert lines == [{"name": "add", "arguments": {"n": 1}}, {"name": "stop", "arguments": {}}]
    assert str(column_text(messages)).splitlines()[::3] == ["a b", "c"]
    assert (column_text(None), column_text(2), column_text("x")) == (None, "2", "x")
    with pytest.raises(NotTextError):
        column_text(["a"])


def test_ids_of_calls_do_not_make_another_question() -> None:
    def asked(number: int, argument: int = 1, **more: Any) -> str:
        call = {"id": f"call_{number}", "type": "function", "function": {"name": "add", "arguments": {"n": argument}}}
        turns = [{"role": "user", "content": "1+1?"}, {"role": "assistant", "tool_calls": [call]} | more]
        result = {"role": "tool", "tool_call_id": f"call_{number}", "content": "2"}
        return question_key(Example("1+1?", "", "", messages=[*turns, result]))

    assert asked(1) == asked(2) == asked(3, content="", weight=0)
    assert asked(1) != asked(1, 2) and asked(1) != asked(1, content="Let me see.")
