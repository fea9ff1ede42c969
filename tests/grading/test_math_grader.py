"""Tests of finding and comparing final answers in bounded time."""

from __future__ import annotations

import threading
import time

import pytest

from opsd_lightning.grading import worker_pool
from opsd_lightning.grading.final_answer import last_boxed
from opsd_lightning.grading.math_grader import JOB, MathGrader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading")


GRADER = MathGrader(timeout_seconds=3.0)


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        (r"so \boxed{42}.", "42"),
        (r"\boxed{1} no, \boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"\boxed{3} and then \boxed{4", "3"),  # truncated
        (r"\boxed{\text{a}_{1}}", r"\text{a}_{1}"),
        ("The answer is 12. The answer is 7.", "7"),
        (r"The answer is 12, that is \boxed{13}", "13"),
        ("work\n#### 1,234", "1,234"),
        ("Answer: -3/4", "-3/4"),
        ("there is none", None),
        ("", None),
    ],
)
def test_final_answer_is_found(text: str, answer: str | None) -> None:
    assert GRADER.find_answer(text) == answer


def test_last_boxed_is_linear() -> None:
    """A looping model writes many boxes and closes none: an answer in a second, where a quadratic search takes an hour."""
    started = time.perf_counter()
    assert last_boxed(r"\boxed{" * 200_000) is None
    assert last_boxed(r"\boxed{7}" + r"\boxed{" * 200_000) == "7"
    assert last_boxed("}" * 100_000 + r"\boxed{5}") == "5"
    assert last_boxed(r"{ \boxed{a{b}c} \boxed{\boxed{3}}") == "3"
    assert time.perf_counter() - started < 20


@pytest.mark.parametrize(
    ("answer", "reference", "same"),
    [
        ("42", "42", True),
        ("42.0", "42", True),
        ("1,234", "1234", True),
        (r"\frac{1}{2}", "0.5", True),
        ("3/4", "0.75", True),
        (r"x^2 + 2x + 1", "(x+1)^2", True),
        ("(1, 2)", "(1,2)", True),
        ("41", "42", False),
        ("(2, 1)", "(1,2)", False),
        ("", "42", False),
        ("}{", "42", False),
        (None, "42", False),
    ],
)
def test_equality_of_answers(answer: str | None, reference: str, same: bool) -> None:
    assert GRADER.equal(answer, reference) is same


@pytest.mark.parametrize("bomb", ["10^{10^{10}}", "10**10**10", "9!!!!!!", "2^{3^{4^{5^{6}}}}"])
def test_huge_powers_are_wrong_within_the_time_limit(bomb: str) -> None:
    quick = MathGrader(timeout_seconds=1.0)
    assert quick.equal("0.5", r"\frac{1}{2}")  # the worker runs
    started = time.perf_counter()
    assert not quick.equal(quick.find_answer(rf"so it is \boxed{{{bomb}}}"), "3")
    assert time.perf_counter() - started < 9
    assert GRADER.equal("0.5", r"\frac{1}{2}"), "the grader works on after a time-out"


def test_grader_works_from_other_threads() -> None:
    """math-verify's own time limit raises there: signal only works in the main thread."""
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(GRADER.equal("2/4", "0.5"))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(timeout=60)
    assert found == [True] * 3


def test_equal_answers_are_one_vote() -> None:
    answers = ["0.5", "1/2", r"\frac{2}{4}", "7", None, "3", "7.0", "0.3"]
    assert GRADER.votes(answers, [False] * 8) == [1, 1, 1, 2, None, 3, 2, 4]
    assert GRADER.votes(answers, [True] * 3 + [False] * 5) == [0, 0, 0, 1, None, 2, 1, 3]
    assert GRADER.votes([], []) == []


def test_huge_powers_vote_in_bounded_time() -> None:
    """Each different one may take its time once, not once for every other."""
    quick = MathGrader(timeout_seconds=1.0)
    assert quick.equal("0.5", r"\frac{1}{2}")
    bombs = [f"{n}0^{{10^{{10}}}}" for n in range(1, 6)]
    started = time.perf_counter()
    votes = quick.votes([*bombs, "2/4", "0.5", *bombs], [False] * 12)
    assert votes[:5] == votes[7:] and len(set(votes[:5])) == 5
    assert time.perf_counter() - started < 60  # a new process for each time-out


def test_boxed_answers_only_without_a_pattern() -> None:
    grader = MathGrader(answer_pattern=None)
    assert grader.find_answer("The answer is 3. #### 3") is None and grader.find_answer(r"\boxed{4}. The answer is 3") == "4"


def test_custom_pattern_is_used() -> None:
    grader = MathGrader(answer_pattern=r"=> (\d+)")
    assert grader.find_answer("=> 4 => 5") == "5"
    assert grader.find_answer("The answer is 3") is None
    for bad in ["(", "no group"]:
        with pytest.raises(ValueError, match=r"grader\.init_args\.answer_pattern"):
            MathGrader(answer_pattern=bad)


def test_plain_integers_need_no_process(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [("07", "7"), ("-0", "0"), ("8", "7"), ("-7", "7"), ("70", "7")]
    said = [worker_pool.shared(JOB).ask((reference, answer), 30.0)[0] for answer, reference in pairs]
    monkeypatch.setattr(worker_pool, "shared", lambda job: pytest.fail("math-verify was asked"))
    assert [GRADER.equal(answer, reference) for answer, reference in pairs] == said == [True, True, False, False, False]
