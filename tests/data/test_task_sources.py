"""Tests of the generated tasks: distinct questions, right references, and no question that gives its answer away."""

from __future__ import annotations

import json
import re

import pytest

from helpers.classes import subclasses
from opsd_lightning.data.generation import distinct_examples
from opsd_lightning.data.task_sources import (
    CategoryQuestions,
    HomeRequests,
    HotelReplies,
    NumberFunctions,
    TableBookings,
    TaskSource,
)
from opsd_lightning.types import ConfigError, Example
from opsd_lightning.utils.messages import question_key

SOURCES = sorted(subclasses(TaskSource), key=lambda source: source.__name__)


@pytest.mark.parametrize("source", SOURCES)
def test_examples_are_distinct_and_repeatable(source: type[TaskSource]) -> None:
    examples = source(500, seed=1).examples()
    assert len({question_key(example) for example in examples}) == 500
    assert examples == source(500, seed=1).examples()
    assert all(example.question.strip() and example.trace.strip() for example in examples)


@pytest.mark.parametrize("source", SOURCES)
def test_splits_share_few_questions(source: type[TaskSource]) -> None:
    """The data module drops shared questions from training, so that a recipe keeps most of its rows."""
    train, val, test = (
        {question_key(e) for e in source(size, seed).examples()} for size, seed in ((1000, 1), (24, 2), (96, 3))
    )
    assert len(train & (val | test)) < 64


def test_too_many_examples_are_refused() -> None:
    with pytest.raises(ConfigError, match=r"^size: .* 3 .* raise largest$"):
        distinct_examples(lambda numbers: Example(f"{numbers.randint(1, 2)}?", "", ""), 3, "seed", "raise largest")


def test_choices_have_one_word_of_the_category() -> None:
    words = {name: set(words.split()) for name, words in CategoryQuestions._WORDS.items()}
    assert sum(map(len, words.values())) == len(set().union(*words.values()))  # no word has two categories
    for example in CategoryQuestions(200).examples():
        options = example.columns["options"]
        right = [option for option in options if option in words[example.columns["category"]]]
        assert right == [options["ABCD".index(example.answer)]]
        assert all(f"({letter}) {option}" in example.question for letter, option in zip("ABCD", options, strict=True))
        assert f"({example.answer}) {right[0]}" in example.trace


def test_answers_are_not_always_the_same_letter() -> None:
    letters = [example.answer for example in CategoryQuestions(400).examples()]
    assert all(60 < letters.count(letter) < 140 for letter in "ABCD")


def test_calls_are_made_of_words_of_the_request() -> None:
    for example in HomeRequests(300).examples():
        call = json.loads(example.answer)
        assert call == json.loads(example.trace.strip("`json\n")) and call["name"] in (
            "switch",
            "set_temperature",
            "set_timer",
        )
        assert all(re.search(rf"\b{value}\b", example.question) for value in call["arguments"].values())


def test_functions_pass_their_tests() -> None:
    for example in NumberFunctions(300).examples():
        names: dict[str, object] = {}
        code = example.trace.removeprefix("```python\n").removesuffix("\n```")
        exec(f"{code}\n{example.columns['tests']}", names)  # our own text


def test_functions_without_their_number_fail_their_tests() -> None:
    for example in NumberFunctions(100).examples():
        name = example.trace.split("def ")[1].split("(")[0]
        with pytest.raises(AssertionError):
            exec(f"def {name}(x): return x\n{example.columns['tests']}", {})


def test_replies_repeat_the_guest() -> None:
    for example in HotelReplies(100).examples():
        said = example.trace.split(" that ")[1].rstrip(".")
        assert said in example.question.lower() and not example.answer


def test_bookings_change_in_one_place() -> None:
    for example in TableBookings(200).examples():
        assert [message["role"] for message in example.messages] == ["system", "user", "assistant", "user"]
        assert example.messages[-1]["content"] == example.question
        assert example.demonstration == {"role": "assistant", "content": example.trace}
        old = re.search(r"table for (\d) on (\w+) at (\d)", example.messages[2]["content"])
        new = re.fullmatch(r"A table for (\d) on (\w+) at (\d)", example.answer)
        assert old and new and example.trace.startswith(f"{example.answer}.")
        (changed,) = [after for before, after in zip(old.groups(), new.groups(), strict=True) if before != after]
        assert re.search(rf"\b{changed}\b", example.question)
