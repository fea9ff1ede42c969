"""Forms of completions, with right and wrong ones for each kind."""

from __future__ import annotations

import json
from typing import Any

import pytest

from helpers.messages import mentions
from opsd_lightning.grading.format_grader import _KINDS, FormatGrader
from opsd_lightning.types import ConfigError, Example

#: Form, completions that have it, and completions that do not.
CASES: list[tuple[dict[str, Any], list[str], list[str]]] = [
    ({"kind": "capitals"}, ["DOG", "A RED CAR!", " 12 DOGS\n", "ÉTÉ"], ["Dog", "dog", "12", "A RED CAr", "!"]),
    ({"kind": "words", "count": 3}, ["deep blue sea", "Deep, blue, salty.", "so ... very, well", "old\nred\nhut", "the well-known man"],
     ["deep blue", "a deep blue sea", "...", "deep , ,"]),
    ({"kind": "list", "count": 3}, ["red, blue, green", "Red,Blue,Green.", "dark red, blue, and green"],
     ["red, blue", "red, blue, green, pink", "red, red, blue", "red, , blue", "red,\nblue,\ngreen", "red blue green", "a, b, ", "the first color is red, the second blue, the third green"]),
    ({"kind": "list", "count": 1}, ["red"], ["red, blue", ","]),
    ({"kind": "numbered", "count": 2}, ["1. apple\n2. pear", "1) apple\n\n2) pear", " 1. **Apple**\n 2. Pear ", "Sure:\n1. apple\n2. pear\nThat is all.", '1. "Red"\n2. `red`', "1. [Red](x)\n**2.** *pear*", "1. “Red”\n2. **[Blue](y)**"],
     ["1. apple", '1. "5"\n2. ""', "1. __\n2. __", "1. apple\n2. pear\n3. fig", "- apple\n- pear", "2. apple\n1. pear", "1. apple 2. pear", "1.\n2.", "1. 5\n2. 6", "Hm.\nWell.\n1. apple\n2. pear"]),
    ({"kind": "bulleted", "count": 2}, ["- apple\n- pear", "* apple\n* pear", "Here:\n• **Apple**\n• pear\nDone.", '- "Apple"\n-pear', "- [Apple](x)\n- `pear`", "*apple\n*pear"],
     ["**Apple**\n**Pear**", "- 1\n- 2", "- apple", "- apple\n- pear\n- fig", "1. apple\n2. pear", "apple, pear", "-\n-", "A\nB\n- apple\n- pear"]),
    ({"kind": "begins", "texts": ["Maybe", "Dear Anna"]}, ["Maybe it rains.", '"Maybe, it rains."', "maybe not", "**Maybe** so", "Dear Anna, hello.", "Dear Anna,\nhello", "Dear Anna,hello", "Maybe,of course", "Maybe!No", "Maybe…", "Maybe."],
     ["Maybe-not", "It may be.", "Perhaps maybe", "Maybes go", "Dear Ann, hello", "Dear"]),
    ({"kind": "ends", "word": "lake"}, ["We swim in the lake.", 'She said, "To the lake!"', "the LAKE", "We see the lake…", "the lake..."], ["Lake", "The lake is deep.", "We see lakes.", "We swim in the snowlake"]),
    ({"kind": "contains", "words": ["dog", "ball"]}, ["The dog has a ball.", "Ball, dog!", "A DOG'S ball"],
     ["The dog has a bone.", "The dogs have balls.", "dogball", "ball"]),
    ({"kind": "includes", "text": "<h1>My Diary</h1>"}, ["<h1>My Diary</h1>", "```html\n<h1>My Diary</h1>\n```"], ["<h1>My diary</h1>", "<h1> My Diary </h1>", "My Diary"]),
    ({"kind": "element", "tag": "h1", "text": "My Diary"}, ["<h1>My Diary</h1>", "<h1> My Diary </h1>", '<h1 class="a">My Diary</h1>', "```html\n<H1>\n  My  Diary\n</H1>\n```"],
     ["<h1>My diary</h1>", "My Diary", "<h2>My Diary</h2>", "<h1>My Diary", "<h1x>My Diary</h1>", "<h1>Not My Diary</h1>", "<h1></h1>My Diary"]),
    ({"kind": "quoted"}, ['"It rains today."', "“It rains.”", "'It is red'"], ["It rains today.", '"It rains', '"Rain"', '"It rains" and "it snows"', 'He said "It rains"', '""', '"']),
    ({"kind": "question"}, ["Where do whales live?", '"Why does it rain?"', "Sure! What is it?", "**Where do whales live?**", '*"Why does it rain?"*', '"**Why is it?**"'], ["**Whales live there.**", "Whales live in the sea.", "What?", "Where is it? Here.", "?"]),
    ({"kind": "repeats", "text": "The cat sleeps."}, ["The cat sleeps.", ' "The cat sleeps."\n'], ["the cat sleeps.", "The cat sleeps", "The cat sleeps. The cat sleeps.", "The  cat sleeps."]),
    ({"kind": "one_of", "choices": ["yes", "no"]}, ["yes", "No.", "**Yes**", " NO!"], ["Yes, it is.", "yes no", "maybe", "y", "."]),
    ({"kind": "json", "keys": ["name", "age"]}, ['{"name": "Rex", "age": 3}', '{"age": null, "name": {}}', '```json\n{"name": 1, "age": 2}\n```', '```\n{"name": 1, "age": 2}```'],
     ['{"name": "Rex"}', '{"name": 1, "age": 2, "job": 3}', "{'name': 1, 'age': 2}", '[{"name": 1, "age": 2}]', 'Here: {"name": 1, "age": 2}', '["name", "age"]', '{"name": 1, "name": 2, "age": 3}']),
]  # fmt: skip


def example(form: Any) -> Example:
    return Example("Do it.", "", "", {"form": form})


def test_every_kind_is_under_test() -> None:
    assert {form["kind"] for form, _, _ in CASES} == set(_KINDS)


@pytest.mark.parametrize(
    ("form", "right", "wrong"), CASES, ids=lambda value: value["kind"] if isinstance(value, dict) else ""
)
def test_verdicts(form: dict[str, Any], right: list[str], wrong: list[str]) -> None:
    for asked in (form, json.dumps(form), form | dict.fromkeys({"count", "keys"} - set(form))):  # as Arrow fills objects
        assert FormatGrader().can_grade(example(asked))
        for text in right:
            grade = FormatGrader().grade(text, example(asked))
            assert grade.score == 1 and grade.answer == text.strip() and not grade.feedback, text
            assert FormatGrader().grade(f"<think>Hm.</think>{text}", example(asked)).score == 1
        for text in [*wrong, "", " ", "<think>" + right[0]]:
            grade = FormatGrader().grade(text, example(asked))
            assert grade.score == 0 and grade.feedback, text


@pytest.mark.parametrize(
    "form",
    [
        None, 3, [], {}, "", "words", {"kind": "poem"}, {"kind": ["words"]}, {"kind": "words"}, {"kind": "words", "count": 0},
        {"kind": "words", "count": "3"}, {"kind": "words", "count": True}, {"kind": "words", "count": 3, "word": "a"}, {"kind": "ends", "word": "two words"},
        {"kind": "ends", "word": "."}, {"kind": "contains", "words": "dog"}, {"kind": "contains", "words": []}, {"kind": "json", "keys": [1]},
        {"kind": "repeats", "text": " "}, {"kind": "element", "tag": "h1>", "text": "a"}, {"kind": "element", "tag": "h1"}, {"kind": "capitals", "count": 1}, {"kind": "begins", "word": "a"}, {"kind": "begins", "texts": "a"}, {"kind": "one_of", "choices": []},
    ],
    ids=str,
)  # fmt: skip
def test_unknown_forms_are_refused_before_training(form: Any) -> None:
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.form")):
        FormatGrader().can_grade(example(form))


def test_the_instruction_itself_is_no_answer() -> None:
    instruction = 'Write a short sentence about a dog with the word "table".'
    row = Example(instruction, "", "", {"form": {"kind": "contains", "words": ["table"]}})
    for echo in (instruction, instruction.upper(), f"**{instruction}**\nOkay.", f"Sure: write a short {instruction[14:]}"):
        grade = FormatGrader().grade(echo, row)
        assert grade.score == 0 and grade.feedback
    for right in ("The dog lies under the table.", 'With the word "table": the dog ate it.'):
        assert FormatGrader().grade(right, row).score == 1
    # An instruction without the form cannot be the reason for it.
    shout = Example("Say hello.", "", "", {"form": {"kind": "ends", "word": "there"}})
    assert FormatGrader().grade("You say hello. Say hello, there!", shout).score == 1


def test_the_column_is_a_setting() -> None:
    row = Example("Shout.", "", "", {"rule": {"kind": "capitals"}})
    assert FormatGrader("rule").grade("HELLO", row).score == 1
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.form", "rule")):
        FormatGrader().can_grade(row)
