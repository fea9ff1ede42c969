"""JSON values and tool calls: forms, comparison field by field, and hostile texts."""

from __future__ import annotations

import json
import random
import time
from typing import Any

import pytest

from helpers.messages import mentions
from opsd_lightning.grading.json_grader import JSONGrader
from opsd_lightning.grading.json_values import DEEPEST, JSONError, read_calls, read_value
from opsd_lightning.types import ConfigError, Example

CALL = {"name": "weather", "arguments": {"city": "Rome", "days": 2}}
OTHER = {"name": "time", "arguments": {"zone": "CET"}}
TEXT = json.dumps(CALL)
OPENAI = {"id": "call_1", "type": "function", "function": {"name": "weather", "arguments": json.dumps(CALL["arguments"])}}
BOTH = json.dumps([CALL, OTHER])


def score(grader: JSONGrader, completion: str, reference: Any) -> float:
    return grader.grade(completion, Example("?", "", json.dumps(reference))).score


@pytest.mark.parametrize(
    ("completion", "calls"),
    [
        (TEXT, [CALL]),
        (f"  {TEXT}\n", [CALL]),
        (f"```json\n{TEXT}\n```", [CALL]),
        (f"I look it up.\n```\n{TEXT}\n```\nDone.", [CALL]),
        (f"<tool_call>\n{TEXT}\n</tool_call>", [CALL]),
        (f"Let me see.\n<tool_call>{TEXT}</tool_call>\n<tool_call>{json.dumps(OTHER)}</tool_call>", [CALL, OTHER]),
        (f"<tool_call>{TEXT}", [CALL]),  # stopped before the closing tag
        (f"[TOOL_CALLS] [{TEXT}]", [CALL]),
        (f"[TOOL_CALLS]{BOTH}", [CALL, OTHER]),
        (f"[TOOL_CALLS]weather[ARGS]{json.dumps(CALL['arguments'])}", [CALL]),
        (
            f"[TOOL_CALLS]weather{json.dumps(CALL['arguments'])}[TOOL_CALLS]time{json.dumps(OTHER['arguments'])}",
            [CALL, OTHER],
        ),
        (json.dumps({"name": "weather", "parameters": CALL["arguments"]}), [CALL]),
        (f"<|python_tag|>{TEXT}; {json.dumps(OTHER)}", [CALL, OTHER]),
        (json.dumps({"role": "assistant", "content": None, "tool_calls": [OPENAI]}), [CALL]),
        (json.dumps([OPENAI]), [CALL]),
        (json.dumps({"function": "weather", "arguments": CALL["arguments"]}), [CALL]),
        (f"I call {TEXT} and then {json.dumps(OTHER)}.", [CALL, OTHER]),
        (json.dumps({"name": "now"}), [{"name": "now", "arguments": {}}]),
        ("It is sunny in Rome.", []),
        ("It takes [1, 2] days.", []),
        ("", []),
    ],
)
def test_forms_of_tool_calls(completion: str, calls: list[Any]) -> None:
    assert read_calls(completion) == calls
    assert score(JSONGrader(form="tool_calls"), f"<think>{BOTH}</think>{completion}", calls) == 1


@pytest.mark.parametrize(
    "completion",
    [
        '{"name": "weather", "arguments": {"city": "Rome", "days": 2}', '<tool_call>{"name": "weather",}</tool_call>', "<tool_call></tool_call>",
        '{"name": "weather", "arguments": [1]}', '{"name": "weather", "arguments": "Rome"}', '{"name": 3, "arguments": {}}', "[TOOL_CALLS]",
        '{"arguments": {"city": "Rome"}}', '[{"name": "weather", "arguments": {}}, 3]', '{"name": "f", "arguments": {}, "parameters": {}}',
        '{"name": "weather", "name": "time", "arguments": {}}', "```json\n{'name': 'weather'}\n```",
    ],
)  # fmt: skip
def test_malformed_calls_are_wrong_and_say_why(completion: str) -> None:
    grade = JSONGrader(form="tool_calls", partial=True).grade(completion, Example("?", "", TEXT))
    assert grade.score == 0 and (grade.feedback or completion.startswith("```"))


def test_a_reference_of_several_calls_is_order_free() -> None:
    for ordered, expected in ((False, 1.0), (True, 0.0)):
        assert (
            score(JSONGrader(form="tool_calls", ordered_calls=ordered), json.dumps([OTHER, CALL]), [CALL, OTHER]) == expected
        )
    free = JSONGrader(form="tool_calls")
    assert score(free, json.dumps([CALL, CALL]), [CALL, OTHER]) == 0
    assert score(free, TEXT, [CALL, OTHER]) == 0
    assert score(free, BOTH, [CALL]) == 0
    assert score(free, "No call is needed.", [CALL]) == 0
    assert score(free, TEXT, []) == 0


def test_share_of_fields() -> None:
    grader = JSONGrader(form="tool_calls", partial=True)
    assert score(grader, json.dumps({"name": "weather", "arguments": {"city": "Rome"}}), [CALL]) == pytest.approx(2 / 3)
    assert score(grader, json.dumps({"name": "weather", "arguments": {"city": "Bari", "days": 2, "x": 1}}), [CALL]) == 2 / 4
    assert score(grader, json.dumps([OTHER]), [CALL, OTHER]) == pytest.approx(2 / 5)
    values = JSONGrader(partial=True)
    assert score(values, '{"a": [1, 2, 4], "b": {}}', {"a": [1, 2, 3], "b": {}}) == 3 / 4
    assert score(values, "[]", [1, 2]) == 0 and score(values, "[]", []) == 1 and score(values, '{"a": 1}', 1) == 0


def test_the_feedback_names_the_field() -> None:
    grade = JSONGrader().grade('{"a": {"b": [1, 3]}}', Example("?", "", '{"a": {"b": [1, 2]}}'))
    assert "a.b[1]" in grade.feedback and "3" in grade.feedback and "2" in grade.feedback
    assert (
        "days"
        in JSONGrader(form="tool_calls")
        .grade('{"name": "weather", "arguments": {"city": "Rome"}}', Example("?", "", TEXT))
        .feedback
    )


@pytest.mark.parametrize(
    ("settings", "completion", "reference", "expected"),
    [
        ({}, '{"b": 1, "a": 2}', {"a": 2, "b": 1}, 1), ({}, "1.0", 1, 1), ({}, "true", 1, 0), ({}, "1", True, 0), ({}, '"1"', 1, 0),
        ({}, "null", False, 0), ({}, '"é"', "é", 1), ({}, '"Rome"', "rome", 0), ({}, "0.30000000000000004", 0.3, 0),
        ({"relative_tolerance": 0.01}, "100.9", 100, 1), ({"relative_tolerance": 0.01}, "101.1", 100, 0),
        ({"absolute_tolerance": 0.5}, "[1.5, 0]", [1, 0.5], 1), ({"absolute_tolerance": 0.5}, "true", 1, 0),
        ({"relative_tolerance": 0.1}, "9" * 900, 1.5, 0), ({}, "9007199254740993", 9007199254740992, 0),
        ({}, "[2, 1]", [1, 2], 0), ({"ordered_lists": False}, "[2, 1]", [1, 2], 1), ({"ordered_lists": False}, "[1, 1, 2]", [1, 2, 2], 0),
        ({"ordered_lists": False, "absolute_tolerance": 1}, "[2, 1]", [1.5, 2.8], 1),  # 1.5 must leave 2 to 2.8
        ({"ignored_keys": ["id"]}, '{"id": 3, "a": [{"id": 4}]}', {"a": [{"id": 5}]}, 1),
        ({"ignored_keys": ["id"]}, '{"a": 1}', {"id": 1, "a": 1}, 1),
    ],
)  # fmt: skip
def test_equal_values(settings: dict[str, Any], completion: str, reference: Any, expected: float) -> None:
    assert score(JSONGrader(**settings), completion, reference) == expected


def test_where_a_value_is_found() -> None:
    assert read_value('x {"a": 1} y {"a": 2} z') == {"a": 2}
    assert read_value('```json\n{"a": 1}\n```\nand {"a": 2}') == {"a": 1}
    assert read_value('The list [1, 2] has {"a": {"b": 3}}') == {"a": {"b": 3}}
    for text in (
        "",
        "no JSON",
        '{"a": 1',
        '{"a": 1} {"a": 1, "a": 2}',
        "NaN",
        "[Infinity]",
        "1e999",
        "1" * 2000,
        "{'a': 1}",
    ):
        with pytest.raises(JSONError):
            read_value(text)


def test_references_come_from_a_column() -> None:
    grader = JSONGrader(reference="gold")
    assert [grader.grade("[1, 2]", Example("?", "", "x", {"gold": gold})).score for gold in ("[1,2]", [1, 2], [1])] == [
        1,
        1,
        0,
    ]
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.reference", "gold")):
        grader.grade("1", Example("?", "", "1"))
    for bad in ("{", {1, 2}, float("nan")):
        with pytest.raises(ConfigError, match=mentions("data.grader.init_args.reference")):
            grader.grade("1", Example("?", "", "1", {"gold": bad}))
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.reference")):
        JSONGrader(form="tool_calls").grade("1", Example("?", "", "[1]"))


def test_votes_are_by_value() -> None:
    grader = JSONGrader(absolute_tolerance=0.1)
    grades = [
        grader.grade(text, Example("?", "", "0"))
        for text in ('{"a": 1, "b": 2}', '{"b": 2.05, "a": 1}', '{"a": 1}', "0", "no")
    ]
    assert grader.votes_of([grades]) == [[1, 1, 2, 0, None]]


def test_hostile_texts_end_in_time() -> None:
    atoms = [
        "[",
        "{",
        '{"a":',
        '"',
        "\\",
        "[[",
        "]",
        "}",
        "```\n",
        "<tool_call>",
        "</tool_call>",
        "[TOOL_CALLS]",
        "[ARGS]",
        "1,",
        "-",
        "{}",
        "\ud800",
        '\\"',
        'x " [',
    ]
    draw = random.Random(1)
    texts = [atom * 200_000 for atom in atoms]
    texts += ["".join(draw.choice(atoms) for _ in range(20_000)) for _ in range(20)]
    texts += [
        "[" * DEEPEST + "]" * DEEPEST,
        json.dumps([CALL] * 300),
        "[" + "[]," * 200_000 + "[]]",
        '{"a": ' * 60 + "1" + "}" * 60,
    ]
    for text in texts:
        for grader in (
            JSONGrader(partial=True),
            JSONGrader(form="tool_calls", partial=True),
            JSONGrader(ordered_lists=False),
        ):
            started = time.thread_time()
            grade = grader.grade(text, Example("?", "", TEXT))
            assert 0 <= grade.score < 1 and time.thread_time() - started < 5.0, text[:60]


@pytest.mark.parametrize(
    ("completion", "feedback"),
    [
        ('{"city": "Rome"}', 'city is "Rome"'),
        ("{}", "city is missing"),
        ('{"city": "Oslo", "unit": 1}', "unit is not expected"),
    ],
)
def test_the_feedback_spells_keys_as_they_are(completion: str, feedback: str) -> None:
    """A teacher that reads "City is missing" would ask for another key."""
    assert JSONGrader().grade(completion, Example("q", "", '{"city": "Oslo"}')).feedback.startswith(feedback)
