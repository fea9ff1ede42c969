"""Equality of answers against the verdicts of a person: answer_pairs.tsv, with what math-verify alone decides otherwise."""

from __future__ import annotations

import time
from pathlib import Path

import pytest

from opsd_lightning.grading import answer_forms
from opsd_lightning.grading.math_grader import MathGrader

GRADER = MathGrader(timeout_seconds=20.0)
ROWS = [
    line.split("\t")
    for line in Path(__file__).with_name("answer_pairs.tsv").read_text(encoding="utf-8").splitlines()
    if not line.startswith("# ")
]


def test_grader_agrees_with_human_verdicts() -> None:
    """In both directions: none of the verdicts depends on which of the two is the reference."""
    assert len(ROWS) > 600 and len({(row[0], row[1]) for row in ROWS}) == len(ROWS)
    wrong = [
        (reference, answer, verdict)
        for reference, answer, verdict, *_ in ROWS
        for pair in ((answer, reference), (reference, answer))
        if GRADER.equal(*pair) is not (verdict == "equal")
    ]
    assert not wrong


def test_answers_equal_themselves_and_empty_ones_never() -> None:
    for text in {text for row in ROWS for text in row[:2]}:
        assert GRADER.equal(text, text) is bool(text.strip()), text
        assert not GRADER.equal("", text) and not GRADER.equal(text, "") and not GRADER.equal(None, text)


def test_votes_use_the_same_equality() -> None:
    answers = ["**12**", "12 km", "5 m", "5 km", "twelve", "cat", "act", "(B) 3", None, "B", "5000 m"]
    assert GRADER.votes(answers, [False] * len(answers)) == [1, 1, 2, 3, 1, 4, 5, 6, None, 6, 3]


@pytest.mark.parametrize(
    "text",
    ["(" * 2000, "1," * 1000, "a " * 1000, "km " * 600, "=5" * 900, "9^" * 1000, "\\text{" * 300 + "}" * 300, "9^{999999999}",
     "1e999999999", "{" * 900 + "1" + "}" * 900, " " * 1900 + "1", "1" * 100_000, "\\frac" * 400, "1 and " * 300],
    ids=lambda text: text[:6],
)  # fmt: skip
def test_comparison_without_algebra_is_fast(text: str) -> None:
    started = time.perf_counter()
    for other in ("5", text + "1", f"x{text}"):
        answer_forms.equal(text, other, lambda *_: False)
        answer_forms.equal(other, text, lambda *_: False)
    assert time.perf_counter() - started < 10


@pytest.mark.slow
def test_known_disagreements_with_math_verify() -> None:
    from math_verify import parse, verify

    def said(reference: str, answer: str) -> bool:
        read = [
            parse(rf"$\boxed{{{t}}}$", parsing_timeout=None) or parse(t, parsing_timeout=None) for t in (reference, answer)
        ]
        return verify(*read, timeout_seconds=None)

    for reference, answer, verdict, *reason in ROWS:
        assert (said(reference, answer) == (verdict == "equal")) is not bool(reason), (reference, answer)
