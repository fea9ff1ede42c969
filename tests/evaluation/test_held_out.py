"""Tests of the scores of held-out questions, against values counted by hand."""

from __future__ import annotations

import json
import math
from typing import Any

import pytest

from opsd_lightning.evaluation.held_out import HeldOut, held_out_scores
from opsd_lightning.utils.statistics import mean_and_interval, wilson


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
    assert scores.strict == mean_and_interval([0, 1, 1, 1, 1, -1])
    assert scores.last_number == mean_and_interval([0, 0, 0, 1, 1, -1])
    assert scores.form == mean_and_interval([0, 1, 1, 0, 0, 0])
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
    assert row.strict.value == 0.5 and row.questions == 2 and row.last_number is not None and row.last_number.value == 0.5
    assert scores.strict == (0.5, 0.0) and scores.last_number == (1.0, 0.0)  # of the one question in both
    assert row.strict.low == pytest.approx(0.5) and row.strict.high == pytest.approx(0.5)


def test_ungraded_completions_have_no_score() -> None:
    assert held_out_scores({}) is None
    assert held_out_scores({"before: student": [record(0, RIGHT, None)]}) is None


def test_all_numbers_are_json() -> None:
    values = json.loads(json.dumps(found().as_dict()))
    assert values["change"]["form"]["value"] == pytest.approx(1 / 3)
    assert values["scores"]["after: student"]["last_number"]["value"] == pytest.approx(5 / 6)
    assert all(math.isfinite(change["half"]) for change in values["change"].values())
