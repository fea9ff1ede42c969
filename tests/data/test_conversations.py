"""Conversations of data files: forms that are read, and those that are refused by row and setting."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from helpers.files import write_jsonl
from helpers.messages import mentions
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import Columns, ExampleSource, FileSource, HubSource
from opsd_lightning.doctor.data_checks import data_facts
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example

COLUMNS = Columns(messages="chat", tools="tools")
SYSTEM = {"role": "system", "content": "Be brief."}
TOOL = {
    "type": "function",
    "function": {"name": "add", "parameters": {"type": "object", "properties": {"n": {"type": "integer"}}}},
}


def user(content: Any) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: Any) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def calling(arguments: Any, **more: Any) -> dict[str, Any]:
    return {
        "role": "assistant",
        "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": arguments}}],
    } | more


RESULT = {"role": "tool", "name": "add", "content": "3"}


def read(chat: Any, tools: Any = None, columns: Columns = COLUMNS, **row: Any) -> Example:
    (example,) = columns.read([{"chat": chat, "tools": tools, **row}], "rows")
    return example


def test_the_last_assistant_turn_is_the_demonstration() -> None:
    turns = [SYSTEM, user("1+1?"), assistant("2"), user(" And\none more? "), assistant("3")]
    example = read(turns, [TOOL])
    assert list(example.messages) == turns[:-1] and example.demonstration == turns[-1] and list(example.tools) == [TOOL]
    assert (example.question, example.trace) == ("And\none more?", "3")


@pytest.mark.parametrize("end", [[user("1+1?")], [user("1+1?"), calling({"n": 1}), RESULT]])
def test_a_conversation_without_a_demonstration(end: list[Any]) -> None:
    example = read([SYSTEM, *end])
    assert len(example.messages) == 1 + len(end) and example.demonstration is None
    assert (example.question, example.trace) == ("1+1?", "")


def test_tool_calls_are_objects_and_their_text_is_json() -> None:
    for arguments in ({"n": 1}, '{"n": 1}'):
        example = read([user("?"), calling(arguments, content=None)])
        assert example.demonstration == calling({"n": 1})
        assert json.loads(example.trace) == {"name": "add", "arguments": {"n": 1}}
    assert read([user("?"), calling("")]).demonstration == calling({}) == read([user("?"), calling(None)]).demonstration
    flat = {"role": "assistant", "content": "So:", "tool_calls": [{"name": "add", "arguments": {"n": 1}}]}
    assert read([user("?"), flat]).trace.splitlines() == ["So:", '{"name": "add", "arguments": {"n": 1}}']


def test_parts_and_other_forms_of_text() -> None:
    parts = [{"type": "text", "text": "a", "image_url": None}, "b"]
    example = read([{**user(parts), "name": None}, assistant(2)])
    assert list(example.messages) == [user([{"type": "text", "text": "a"}, {"type": "text", "text": "b"}])]
    assert (example.question, example.trace) == ("a\nb", "2")


def test_sharegpt() -> None:
    turns = [{"from": "system", "value": "x"}, {"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]
    example = read(turns)
    assert list(example.messages) == [{"role": "system", "content": "x"}, user("1+1?")]
    assert example.demonstration == assistant("2")


def test_written_json_is_read() -> None:
    turns, tools = [user("?"), calling({"n": None})], [TOOL]
    for given in (json.dumps(tools), [json.dumps(TOOL)]):
        example = read(json.dumps(turns), given)
        assert example.demonstration == calling({"n": None}) and list(example.tools) == tools
    asked = Columns("chat", "work", tools="tools").read([{"chat": json.dumps(turns[:1]), "work": "2", "tools": ""}], "rows")
    assert list(asked[0].messages) == turns[:1] and asked[0].trace == "2" and not asked[0].tools


def test_nulls_of_arrow_are_left_out_and_those_of_json_stay(tmp_path: Path) -> None:
    other = {
        "type": "function",
        "function": {"name": "stop", "parameters": {"type": "object", "properties": {"why": {"type": "x"}}}},
    }
    rows: list[Any] = [
        {"chat": [user("?"), calling({"n": 1})], "tools": [TOOL | {"strict": None}]},
        {"chat": [SYSTEM, user("?"), calling({"why": "x"}), RESULT, assistant("Done.")], "tools": [other]},
    ]
    source = FileSource(str(write_jsonl(tmp_path / "a.jsonl", rows)), columns=COLUMNS)
    assert [list(example.tools) for example in source.examples()] == [row["tools"] for row in rows]
    dataset = Dataset.from_list(rows)
    dataset.to_parquet(tmp_path / "a.parquet")
    dataset.save_to_disk(tmp_path / "saved")
    for found in (
        FileSource(str(tmp_path / "a.parquet"), columns=COLUMNS).examples(),
        HubSource(str(tmp_path / "saved"), columns=COLUMNS).examples(),
    ):
        assert [[*example.messages, example.demonstration] for example in found] == [row["chat"] for row in rows]
        assert found[1].tools == [other]
        assert "strict" not in found[0].tools[0] and "why" not in str(found[0].tools)


def test_messages_in_the_columns_of_questions_and_traces() -> None:
    columns = Columns("chat", "work", "gold")
    (example,) = columns.read([{"chat": [SYSTEM, user("1+1?")], "work": [assistant("It is 2.")], "gold": 2}], "rows")
    assert (example.question, example.trace, example.answer) == ("1+1?", "It is 2.", "2")
    assert list(example.messages) == [SYSTEM, user("1+1?")] and example.demonstration == assistant("It is 2.")
    several = [user("Before?"), assistant("2 it is."), user("Sure?"), assistant([{"type": "text", "text": "Yes"}])]
    (example,) = columns.read([{"chat": "1+1?", "work": several, "gold": None}], "rows")
    assert example == Example("1+1?", "Before?\n2 it is.\nSure?\nYes", "", example.columns)
    (example,) = columns.read([{"chat": "1+1?", "work": [calling({"n": 1})], "gold": None}], "rows")
    assert list(example.messages) == [user("1+1?")] and example.demonstration == calling({"n": 1})
    (example,) = Columns("chat", None, tools="tools").read([{"chat": "1+1?", "tools": [TOOL]}], "rows")
    assert list(example.messages) == [user("1+1?")] and list(example.tools) == [TOOL]


NESTED: dict[str, Any] = {}
for _ in range(200):
    NESTED = {"n": [NESTED]}
IMAGE = {"type": "image_url", "image_url": {"url": "data:"}}


MALFORMED: list[tuple[Any, list[Any]]] = [
    ([], ["empty"]),
    (None, ["empty"]),
    ("", ["empty"]),
    ("[{'role': 'user', 'content': 'x'}]", ["JSON"]),  # Python's text, as pandas writes it into CSV
    ("x", ["JSON"]),
    ({"role": "user", "content": "x"}, ["list"]),
    (["x"], ["message", 1]),
    ([{"content": "x"}], ["message", 1, "role"]),
    ([{"role": "bot", "content": "x"}], ["message", 1, "bot"]),
    ([user("x"), {"role": "function", "name": "f", "content": "x"}], ["message", 2, "function"]),
    ([user("x"), {"role": "assistant", "function_call": {"name": "f"}}], ["message", 2, "function_call"]),
    ([user(None)], ["message", 1, "content"]),
    ([user({"a": 1})], ["message", 1, "object"]),
    ([user("x"), assistant(None)], ["message", 2, "content"]),
    ([SYSTEM, assistant("x")], ["user"]),
    ([assistant("x")], ["user"]),
    ([user("x"), SYSTEM, user("y")], ["message", 2, "system"]),
    ([SYSTEM, SYSTEM, user("y")], ["message", 2, "system"]),
    ([user("x"), assistant("y"), assistant("z")], [2, 3, "assistant"]),
    ([user("x"), RESULT], ["message", 2, "tool"]),
    ([user("x"), assistant("y"), RESULT], ["message", 3, "tool"]),
    ([{**user("x"), "tool_calls": [{"name": "f"}]}], ["message", 1, "tool_calls"]),
    ([user("x"), calling("{")], ["add", "JSON"]),
    ([user("x"), calling([1])], ["add", "object"]),
    ([user("x"), {"role": "assistant", "tool_calls": [{"function": {"arguments": {}}}]}], ["message", 2, "name"]),
    ([user([{"type": "text", "text": "x"}, IMAGE])], ["message", 1, "image_url"]),
    ([user([{"type": "image"}])], ["image"]),
    ([user("x"), calling(NESTED)], ["add", "deeply"]),
    ([user([{"type": "input_audio", "input_audio": {}}])], ["input_audio"]),
    ([user([{"type": "video", "video": "x"}])], ["video"]),
    ([user("\ud800")], ["message", 1, "surrogate"]),
]


def is_list_of_messages(chat: Any) -> bool:
    return isinstance(chat, list) and bool(chat) and all(isinstance(each, dict) and "role" in each for each in chat)


@pytest.mark.parametrize(
    ("setting", "chat", "words"),
    [("messages", *case) for case in MALFORMED]
    + [("question", *case) for case in MALFORMED if is_list_of_messages(case[0])],
)
def test_malformed_conversations_are_refused_by_row(setting: str, chat: Any, words: list[Any]) -> None:
    columns = Columns(messages="chat") if setting == "messages" else Columns("chat", None)
    with pytest.raises(ConfigError, match=mentions("rows", "row", 2, *words)) as caught:
        columns.read([{"chat": [user("?")]}, {"chat": chat}], "rows")
    assert caught.value.setting == f"columns.{setting}" and caught.value.fix


@pytest.mark.parametrize(
    "tools",
    [
        "x",
        {"name": "f"},
        [{"name": ""}],
        [{"name": "f", "parameters": NESTED}],
        [{"type": "function"}],
        [1],
        ["{"],
        [{"function": {"name": None}}],
    ],
)
def test_malformed_tools_are_refused(tools: Any) -> None:
    with pytest.raises(ConfigError) as caught:
        read([user("?")], tools)
    assert caught.value.setting == "columns.tools"


@pytest.mark.parametrize("column", ["images", "image", "videos", "audio", "tools", "chat_template_kwargs"])
def test_columns_that_would_be_dropped_in_silence_are_refused(column: str) -> None:
    row = {"chat": [user("?")], column: [{"name": "f"}]}
    for columns in (Columns(messages="chat"), Columns("chat", None)):
        with pytest.raises(ConfigError, match=mentions(column)):
            columns.read([row], "rows")
        columns.read([row | {column: None}], "rows")


def test_a_system_column_beside_a_conversation_without_a_system_message_is_refused() -> None:
    for messages in ([user("1+1?"), assistant("2")], [{"from": "human", "value": "1+1?"}, {"from": "gpt", "value": "2"}]):
        with pytest.raises(ConfigError, match=mentions("system", "row 1")):
            read(messages, system="You are a pirate.")
        assert read(messages, system=" ").question == "1+1?"
    assert read([SYSTEM, user("1+1?")], system="Be brief.").messages[0] == SYSTEM


@pytest.mark.parametrize(
    ("row", "dropped"),
    [
        ({"instruction": "Translate.", "output": "cat", "input": "chat"}, "input"),
        ({"query": "And?", "output": "Yes.", "history": [["a", "b"]]}, "history"),
        ({"query": "And?", "output": "Yes.", "system": "Be brief."}, "system"),
    ],
)
def test_further_parts_of_a_prompt_in_forms_of_others_are_refused(row: dict[str, Any], dropped: str) -> None:
    question = next(iter(row))
    columns = Columns(question, "output")
    with pytest.raises(ConfigError, match=mentions(dropped, question)) as caught:
        columns.read([row], "rows")
    assert caught.value.setting == "columns.question"
    for empty in ("", None, []):
        assert columns.read([row | {dropped: empty}], "rows")[0].question == row[question]
    other = {f"my {key}" if key == question else key: value for key, value in row.items()}
    assert Columns(f"my {question}", "output").read([other], "rows")[0].question == row[question]


@pytest.mark.parametrize("mark", [{"weight": 0}, {"loss": False}, {"train": False}, {"weight": 0.0}])
def test_a_demonstration_that_must_not_be_learned_is_refused(mark: dict[str, Any]) -> None:
    (name,) = mark
    with pytest.raises(ConfigError, match=mentions(name, "4")):
        read([user("1+1?"), assistant("2"), user("More?"), assistant("3") | mark])
    earlier = read([user("1+1?"), assistant("2") | mark, user("More?"), assistant("3") | {name: 1}])
    assert earlier.trace == "3"
    with pytest.raises(ConfigError, match=mentions(name)) as caught:
        Columns("prompt", "completion").read([{"prompt": "1+1?", "completion": [assistant("2") | mark]}], "rows")
    assert caught.value.setting == "columns.trace"


def test_a_trace_that_repeats_the_prompt_is_its_last_message() -> None:
    columns, whole = Columns("prompt", "chosen"), [user("1+1?"), assistant("2")]
    for prompt in ("1+1?", [user("1+1?")]):
        (example,) = columns.read([{"prompt": prompt, "chosen": whole}], "rows")
        assert (example.question, example.trace) == ("1+1?", "2")
    (example,) = columns.read([{"prompt": [SYSTEM, user("1+1?")], "chosen": [SYSTEM, *whole]}], "rows")
    assert example.trace == "2" and example.demonstration == whole[-1]
    (other,) = columns.read([{"prompt": "2+2?", "chosen": whole}], "rows")
    assert other.trace == "1+1?\n2"


def test_a_column_of_conversations_is_named() -> None:
    with pytest.raises(ConfigError, match=mentions("conversations")) as caught:
        Columns().read([{"conversations": [user("1+1?"), assistant("2")]}], "rows")
    assert caught.value.setting == "columns.messages"


def test_settings_that_contradict_each_other_are_refused() -> None:
    for settings in ({"question": "q"}, {"trace": "t"}):
        with pytest.raises(ConfigError) as caught:
            Columns(messages="chat", **settings)
        assert caught.value.setting == "columns.messages"
    assert Columns(messages="chat", trace=None).read([{"chat": [user("?"), assistant("!")]}], "rows")[0].trace == "!"
    with pytest.raises(ConfigError, match=mentions("columns.trace")):
        Columns("chat", "work").read([{"chat": [user("?"), assistant("!")], "work": "x"}], "rows")


# -- in the data module ------------------------------------------------------------------------------------------------


class Asked(ExampleSource):
    def __init__(self, *examples: Example) -> None:
        self.made = examples

    def examples(self) -> list[Example]:
        return list(self.made)


def made(first: str, last: str = "Why?", tools: Any = ()) -> Example:
    return Example(last, "so \\boxed{5}", "5", messages=[user(first), assistant("So."), user(last)], tools=tools)


PROMPTS = Prompts("{question}", "{question} {context}")


def prepared(policy: Policy, *train: Example, prompts: Prompts = PROMPTS, **splits: Any) -> OPSDDataModule:
    data = OPSDDataModule(policy, Asked(*train), prompts=prompts, batch_size=1, max_new_tokens=4, **splits)
    data.setup("fit")
    return data


def test_held_out_and_repeated_questions_are_whole_conversations(make_policy: Callable[..., Policy]) -> None:
    rows = [made("a"), made("b"), made("b "), made("c")]
    data = prepared(make_policy(), *rows, val=Asked(made("a")))
    assert [row.messages[0]["content"] for row in data.rows["train"].examples] == ["b", "b ", "c"]
    assert data_facts(data, "train")["repeated_questions"] == 1


def test_a_template_that_drops_a_part_stops_the_run(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    policy = make_policy()
    with pytest.raises(ConfigError, match=mentions("data.train", "'Why?'", "add")) as caught:  # it writes no tools
        prepared(policy, made("a"), made("b", tools=[TOOL]))
    assert caught.value.setting == "model.policy.chat_template"
    assert AutoTokenizer.from_pretrained(policy.model).chat_template


def test_prompts_of_both_roles_hold_the_conversation(make_policy: Callable[..., Policy]) -> None:
    policy = make_policy()
    data = prepared(policy, made("First."))
    tokenizer, rows = policy.load_tokenizer(), data.rows["train"]
    student, teacher = (str(tokenizer.decode(ids)) for ids in (rows.student[0], rows.teacher[0]))
    assert "First." in student and "First." in teacher and "boxed" in teacher and "boxed" not in student


@pytest.mark.parametrize(
    "example",
    [
        made("a")._replace(messages=[{"role": "bot", "content": "x"}]),
        made("a")._replace(messages=[{"role": "user", "content": "x", "tool_calls": None}]),
        made("a")._replace(messages=[user([IMAGE])]),
        made("a")._replace(tools=[{"x": 1}]),
        made("a")._replace(messages=())._replace(demonstration=assistant("x")),
    ],
)
def test_conversations_of_other_sources_are_checked(example: Example, make_policy: Callable[..., Policy]) -> None:
    with pytest.raises(ConfigError) as caught:
        prepared(make_policy(), example)
    assert caught.value.setting == "data.train"
