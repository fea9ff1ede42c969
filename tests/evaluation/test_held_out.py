"""Tests of the scores of held-out questions, against values counted by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from opsd_lightning.evaluation.held_out import HeldOut, held_out_scores
from opsd_lightning.utils.statistics import paired_change, wilson


def record(index: int, completion: str, correct: bool | None, reference: str = "9", **more: Any) -> dict[str, Any]:
    given = {"index": index, "question": "q", "completion": completion, "correct": correct, "reference": reference}
    answer = "9" if correct else None
    return given | {"answer": answer, "truncated": False, "completion_tokens": 10, "sample": 0} | more


RIGHT, LOOSE, WRONG = "so the answer is 9.", "That is 9.", "so the answer is 8."
# The form is learned at questions 1 and 2, arithmetic at 3, both at 4, and one is lost.
BEFORE = [RIGHT, LOOSE, LOOSE, WRONG, "N.", RIGHT]
AFTER = [RIGHT, RIGHT, RIGHT, RIGHT, RIGHT, WRONG]


def records(texts: list[str], reference: str = "9") -> list[dict[str, Any]]:
    return [record(i, text, text == RIGHT, reference) for i, text in enumerate(texts)]


def found(**more: Any) -> HeldOut:
    scores = held_out_scores({"before: student": records(BEFORE), "after: student": records(AFTER)} | more)
    assert scores is not None
    return scores


def test_scores_are_those_counted_by_hand() -> None:
    scores = found()
    before, after = scores.rows
    assert before.last_number is not None and after.last_number is not None
    assert (before.strict.value, after.strict.value) == (2 / 6, 5 / 6)
    assert (before.last_number.value, after.last_number.value) == (4 / 6, 5 / 6)
    assert before.strict[1:] == wilson([True] * 2 + [False] * 4) and before.last_number[1:] == wilson(
        [True] * 4 + [False] * 2
    )
    assert (before.silent, before.tokens, before.questions, before.name) == (4 / 6, 10.0, 6, "before: student")
    assert scores.strict == paired_change([1, 0, 0, 0, 0, 1], [1, 1, 1, 1, 1, 0])
    assert scores.last_number == paired_change([1, 1, 1, 0, 0, 1], [1, 1, 1, 1, 1, 0])
    assert scores.form == paired_change([0] * 6, [0, 1, 1, 0, 0, 0])
    assert scores.strict[0] == pytest.approx(scores.last_number[0] + scores.form[0])


def test_the_sentence_has_the_numbers() -> None:
    scores = found()
    assert scores.form is not None
    half = f"{100 * scores.form.half:.1f}"
    assert all(text in scores.sentence for text in ("50.0 points", f"33.3 ± {half}", "66.7%", "83.3%"))
    lost = held_out_scores({"before: student": records(AFTER), "after: student": records(BEFORE)})
    assert lost is not None and "gain" not in lost.sentence and "83.3% to 66.7%" in lost.sentence
    alone = held_out_scores({"before: student": records(BEFORE)})
    assert alone is not None and not alone.sentence and alone.strict is None


def test_answers_that_are_no_numbers_have_one_score() -> None:
    scores = found(**{"before: teacher": [record(0, "It is B.", True, "B")]})
    assert [row.last_number for row in scores.rows] == [None] * 3 and scores.last_number is None and not scores.sentence
    assert scores.strict == found().strict


def test_several_and_partial_scores_of_a_question_are_averaged() -> None:
    first = [record(0, RIGHT, True), record(0, LOOSE, False, sample=1), record(1, WRONG, False, score=0.5)]
    scores = held_out_scores({"before: student": first, "after: student": [record(1, RIGHT, True), record(7, RIGHT, True)]})
    assert scores is not None
    row = scores.rows[0]
    assert row.strict.value == 0.5 and row.questions == 1 and row.last_number is not None and row.last_number.value == 0
    assert scores.strict is not None and scores.strict.value == 0.5  # of the one question in both
    assert scores.last_number is not None and scores.last_number.value == 1
    alone = held_out_scores({"before: student": first})
    assert alone is not None and alone.rows[0].questions == 2 and alone.rows[0].strict.value == 0.5


def test_levels_and_change_are_over_the_same_questions() -> None:
    scores = held_out_scores({"before: student": records(BEFORE), "after: student": records(AFTER)[:3]})
    assert scores is not None and scores.strict is not None and scores.last_number is not None
    before, after = scores.rows
    assert before.questions == after.questions == 3 and before.last_number is not None and after.last_number is not None
    assert scores.strict.value == pytest.approx(after.strict.value - before.strict.value)
    assert scores.last_number.value == pytest.approx(after.last_number.value - before.last_number.value)
    apart = held_out_scores({"before: student": records(BEFORE)[:2], "after: student": records(AFTER)[4:]})
    assert apart is not None and apart.strict is None and [row.questions for row in apart.rows] == [2, 2]
    assert not apart.sentence


def test_an_interval_does_not_vanish_where_all_questions_change_alike() -> None:
    scores = held_out_scores({"before: student": records([LOOSE] * 8), "after: student": records([RIGHT] * 8)})
    assert scores is not None and scores.strict is not None and scores.last_number is not None and scores.form is not None
    assert scores.strict.value == 1 and all(each.half > 0.1 for each in (scores.strict, scores.last_number, scores.form))


def test_a_gain_without_arithmetic_has_no_share_above_all_of_it() -> None:
    # Three completions learn the form of a wrong number that the grader takes, and every last number gets worse.
    before = [record(i, LOOSE, False) for i in range(10)]
    after = [record(i, WRONG, i < 3) for i in range(10)]
    scores = held_out_scores({"before: student": before, "after: student": after})
    assert scores is not None and scores.form is not None and scores.form.value > 1
    assert mentions_none(scores.sentence) and "130.0" not in scores.sentence and "100.0% to 0.0%" in scores.sentence
    still = held_out_scores({"before: student": before, "after: student": [record(i, LOOSE, i < 3) for i in range(10)]})
    assert still is not None and mentions_none(still.sentence) and "30.0 points" in still.sentence
    assert not mentions_none(found().sentence)


def mentions_none(sentence: str) -> bool:
    return "none is arithmetic" in sentence


def test_ungraded_completions_have_no_score() -> None:
    assert held_out_scores({}) is None
    assert held_out_scores({"before: student": [record(0, RIGHT, None)]}) is None


def test_all_numbers_are_json() -> None:
    values = json.loads(json.dumps(found().as_dict()))
    assert values["change"]["form"]["value"] == pytest.approx(1 / 3)
    assert values["scores"]["after: student"]["last_number"]["value"] == pytest.approx(5 / 6)
    assert all(math.isfinite(change["half"]) for change in values["change"].values())
