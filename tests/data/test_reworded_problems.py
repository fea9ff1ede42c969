"""Tests of the word problems that measure transfer: right, and in no words of those that are trained."""

from __future__ import annotations

import re

import pytest

from helpers.messages import mentions
from opsd_lightning.data.reworded_problems import RewordedProblems
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.types import ConfigError


def sentences(question: str) -> set[str]:
    """Return the sentences of a question without numbers and names."""
    return {re.sub(r"\d+|\b[A-Z]\w+", "_", sentence).strip() for sentence in re.split(r"(?<=[.?])\s", question)}


def test_answers_are_right() -> None:
    for example in RewordedProblems(400, seed=4).examples():
        found = re.search(r" (\d+) ([+-]) (\d+) = (\d+) [\w ]+, so the answer is (\d+)\.$", example.trace)
        assert found, example.trace
        a, sign, b, result, answer = found.groups()
        value = int(a) + int(b) if sign == "+" else int(a) - int(b)
        assert value == int(result) == int(answer) == int(example.answer) and 0 < value <= 30
        assert re.findall(r"\d+", example.question) == [a, b]
        assert MathGrader().verify(example).score == 1
        assert not re.search(r"[{}]", example.question + example.trace)


def test_no_sentence_and_no_name_is_trained() -> None:
    trained = [example.question for example in WordProblems(1000, seed=1, largest=10).examples()]
    reworded = [example.question for example in RewordedProblems(1000, seed=1).examples()]
    assert not set().union(*map(sentences, trained)) & set().union(*map(sentences, reworded))
    things = {*WordProblems._NAMES, *WordProblems._THINGS}
    assert not {word for question in reworded for word in re.findall(r"\w+", question)} & things


def test_numbers_are_larger() -> None:
    largest = [max(map(int, re.findall(r"\d+", f"{e.question} {e.answer}"))) for e in RewordedProblems(500).examples()]
    assert max(largest) == 30 and min(largest) == 11
    narrow = RewordedProblems(200, largest=12).examples()
    assert {max(map(int, re.findall(r"\d+", f"{e.question} {e.answer}"))) for e in narrow} == {11, 12}
    with pytest.raises(ConfigError, match=mentions("largest", 11, 12)):
        RewordedProblems(largest=11)
