"""Exact match: each normalization alone, several references, and a pattern."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.messages import mentions
from opsd_lightning.grading.exact_match import ExactMatch
from opsd_lightning.types import ConfigError, Example


@pytest.mark.parametrize(
    ("setting", "value", "completion", "reference"),
    [
        ("ignore_case", True, "PARIS", "Paris"), ("ignore_case", True, "STRASSE", "straße"), ("ignore_white_space", True, "New \n York", "New York"),
        ("ignore_punctuation", True, "Hello, world!", "Hello world"), ("ignore_punctuation", True, "«snake_case»", "snakecase"),
        ("ignore_articles", True, "the Nile", "Nile"), ("ignore_articles", True, "Rise of the Sun", "Rise of Sun"),
        ("unicode_form", "NFC", "Cafe\u0301", "Café"), ("unicode_form", "NFKC", "１２ ㎞", "12 km"),
    ],
)  # fmt: skip
def test_each_normalization_can_be_turned_off(setting: str, value: Any, completion: str, reference: str) -> None:
    example = Example("?", "", reference)
    off = {"unicode_form": None}.get(setting, False)
    assert ExactMatch(**{setting: value}).grade(completion, example).score == 1
    assert ExactMatch(**{setting: off}).grade(completion, example).score == 0


@pytest.mark.parametrize(
    "completion", ["It is Paris", "Paris\nRome", "Paris, I think", "Pari", "", "  ", "<think>Paris", "<think>x</think>"]
)
def test_a_completion_with_more_than_the_answer_is_wrong(completion: str) -> None:
    grader = ExactMatch(ignore_case=True, ignore_punctuation=True, ignore_articles=True, unicode_form="NFKC")
    assert grader.grade(completion, Example("?", "", "Paris")).score == 0


def test_answers_of_ignored_characters_alone_still_differ() -> None:
    grader = ExactMatch(ignore_punctuation=True, ignore_articles=True)
    assert grader.grade("!", Example("?", "", "?")).score == 0
    assert grader.grade("a", Example("?", "", "the")).score == 0
    assert grader.grade("!", Example("?", "", "!")).score == 1
    assert grader.grade("", Example("?", "", "")).score == 0


def test_several_references() -> None:
    grader = ExactMatch(references="also")
    example = Example("?", "", "NYC", {"also": ["New York", "New York City", None, 7]})
    assert [grader.grade(text, example).score for text in ("NYC", "New York", "7", "York", "None", "")] == [1, 1, 1, 0, 0, 0]
    assert grader.grade("Paris", Example("?", "", "", {"also": "Paris"})).score == 1
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.references", "also")):
        grader.grade("NYC", Example("?", "", "NYC"))
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.references", "also")):
        grader.grade("NYC", Example("?", "", "NYC", {"also": [["nested"]]}))


def test_the_last_match_of_a_pattern_counts() -> None:
    grader = ExactMatch(answer_pattern=r"A:\s*(.*)")
    assert grader.grade("A: Rome\nA: Paris\nA:", Example("?", "", "Paris")).score == 1
    assert grader.grade("Paris", Example("?", "", "Paris")).answer is None


def test_a_slow_pattern_is_a_timeout() -> None:
    grade = ExactMatch(answer_pattern=r"((?:\w+\s?)+)=", timeout_seconds=0.2).grade(
        "a" * 5_000 + "!=", Example("?", "", "x")
    )
    assert grade.score == 0 and grade.problem == "timeout"


@pytest.mark.parametrize(
    ("settings", "name"),
    [
        ({"answer_pattern": "("}, "answer_pattern"),
        ({"answer_pattern": "x"}, "answer_pattern"),
        ({"unicode_form": "NFX"}, "unicode_form"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any], name: str) -> None:
    with pytest.raises(ConfigError, match=mentions(f"data.grader.init_args.{name}")):
        ExactMatch(**settings)
