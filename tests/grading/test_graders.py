"""The contract of graders, over every subclass of `Grader` in the package."""

from __future__ import annotations

import copy
import inspect
import math
import os
import pickle
import time
import warnings
from collections.abc import Iterator
from typing import Any, NamedTuple

import pytest
import torch
from jsonargparse import ArgumentParser

import opsd_lightning.cli.command  # every class that YAML may name  # noqa: F401
from helpers.classes import subclasses
from helpers.judge_server import JudgeServer
from helpers.messages import mentions
from opsd_lightning.data.sources import ReasoningGymSource
from opsd_lightning.grading.base import PROBLEMS, Grade, Grader
from opsd_lightning.grading.choice_grader import ChoiceGrader
from opsd_lightning.grading.exact_match import ExactMatch
from opsd_lightning.grading.format_grader import FormatGrader
from opsd_lightning.grading.json_grader import JSONGrader
from opsd_lightning.grading.judge_grader import JudgeGrader
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.grading.no_grader import NoGrader
from opsd_lightning.grading.python_tests import PythonTestsGrader
from opsd_lightning.grading.reasoning_gym_grader import ReasoningGymGrader
from opsd_lightning.types import ConfigError, Example

OPTIONS = {"options": ["10", "12", "14"]}
CALL = '{"name": "add", "arguments": {"a": 5, "b": 7}}'

KEY = os.environ["OPSD_TEST_JUDGE_KEY"] = "sk-judge-0123456789abcdefghij"
JUDGE = JudgeServer()
(SUM,) = ReasoningGymSource("chain_sum", size=1, seed=5).examples()

# Machines without user namespaces warn.
pytestmark = pytest.mark.filterwarnings("ignore:data.grader.init_args.allow_unisolated")
with warnings.catch_warnings():
    warnings.simplefilter("ignore")
    PYTHON_TESTS = PythonTestsGrader(timeout_seconds=5.0, allow_unisolated=True)


class Case(NamedTuple):
    """A grader with completions.

    Args:
        grader: The grader.
        example: A question with a reference.
        right: Completions with score 1.
        wrong: Completions with a lower score.
        secret: Text that must not appear in its settings.
    """

    grader: Grader
    example: Example
    right: tuple[str, ...] = ()
    wrong: tuple[str, ...] = ()
    secret: str = ""


CASES = [
    Case(ExactMatch(), Example("?", "Paris", "Paris"), ("Paris", " Paris\n", "<think>Rome?</think>Paris"), ("paris", "It is Paris")),
    Case(ExactMatch(r"is (\w+)", True), Example("?", "It is 12", "Paris"), ("it is PARIS, I say", "is Paris"), ("Paris", "is Rome")),
    Case(ChoiceGrader(), Example("5 + 7?", "(B) 12", "B", OPTIONS), ("B", "12", "The answer is (B)."), ("A", "A or B", "14")),
    Case(ChoiceGrader(options=None, reference="text"), Example("?\nA) 10\nB) 12", "B", "12"), ("B", "b) 12"), ("A", "10")),
    Case(FormatGrader(), Example("Three words?", "A b c", "A b c", {"form": {"kind": "words", "count": 3}}), ("one, two, three", "a\nb c"), ("one two", "1 2 3 4")),
    Case(JSONGrader(), Example("?", '{"a": 1}', '{"a": 1}'), ('{"a": 1.0}', 'So:\n```\n{"a": 1}\n```'), ("{}", '{"a": 2}', "1")),
    Case(JSONGrader("tool_calls", partial=True), Example("?", CALL, CALL), (CALL, f"<tool_call>{CALL}</tool_call>"), ("12", CALL.replace("5", "6"))),
    Case(PYTHON_TESTS, Example("?", "f = abs", "", {"tests": "assert f(-1) == 1"}),
         ("f = abs", "```python\ndef f(x):\n    return -x\n```"), ("f = int", "f = (", "abs")),
    Case(JudgeGrader(JUDGE.url, "judge", "OPSD_TEST_JUDGE_KEY", cache_dir=None), Example("?", "Paris", "Paris"), ("Paris", " Paris"), ("Rome",), KEY),
    Case(ReasoningGymGrader(), SUM, (f"<answer>{SUM.answer}</answer>", f"The sum is\n{SUM.answer}"), ("<answer>?</answer>", SUM.answer + "0")),
    Case(MathGrader(), Example("5 + 7?", "The answer is 12.", "12"), (r"\boxed{12}", "#### 12.0"), ("12 or 13", "Hm.")),
    Case(NoGrader(), Example("Greet me.", "Ahoy!", ""), (), ("Hello.", "Ahoy!")),
]  # fmt: skip
#: Graders that start processes of their own.
PROCESSES = ("PythonTestsGrader", "ReasoningGymGrader")
IDS = [f"{type(case.grader).__name__}-{place}" for place, case in enumerate(CASES)]
cases = pytest.mark.parametrize(
    "case",
    [
        pytest.param(case, id=name, marks=pytest.mark.integration if name.startswith(PROCESSES) else ())
        for case, name in zip(CASES, IDS, strict=True)
    ],
)

ODD = [
    "", " \n\t", "\0", "\ud800", "\x00\x01\xff" * 5_000, "".join(map(chr, range(0, 0x3000, 7))), "<think>", "</think>", "a" * 300_000,
    "(" * 100_000, "[{" * 50_000, "the answer is " * 20_000, "A " * 100_000, "\\boxed{" * 20_000, "10**10**10", "9" * 50_000, "{}", "[]", "null",
    "__import__('os').abort()",
]  # fmt: skip


def texts(case: Case) -> list[str]:
    return [*case.right, *case.wrong, case.example.trace, "", "nothing of the kind"]


def settings(grader: Grader) -> dict[str, Any]:
    return {name: getattr(grader, name) for name in list(inspect.signature(type(grader)).parameters)}


def test_every_grader_is_under_test() -> None:
    ours = {cls for cls in subclasses(Grader) if cls.__module__.startswith("opsd_lightning") and not inspect.isabstract(cls)}
    assert ours == {type(case.grader) for case in CASES}


@cases
def test_verdicts(case: Case) -> None:
    grades = case.grader.grades([*case.right, *case.wrong], [case.example] * len([*case.right, *case.wrong]))
    assert [case.grader.is_right(grade.score) for grade in grades] == [True] * len(case.right) + [False] * len(case.wrong)
    for grade in grades:
        assert isinstance(grade, Grade) and 0 <= grade.score <= 1 and math.isfinite(grade.score)
        assert grade.answer is None or (isinstance(grade.answer, str) and grade.answer)
        assert isinstance(grade.feedback, str) and len(grade.feedback) < 2_000 and grade.problem == ""


@cases
def test_many_are_graded_as_one_by_one_and_again(case: Case) -> None:
    grader, several = case.grader, texts(case)
    examples = [case.example] * len(several)
    alone = [grader.grade(text, example) for text, example in zip(several, examples, strict=True)]
    assert grader.grades(several, examples) == alone == grader.grades(several, examples)
    assert grader.verifications(examples) == [grader.verify(case.example)] * len(several)


@cases
def test_right_completions_and_the_trace_verify(case: Case) -> None:
    for right in case.right or (case.example.trace,):
        assert case.grader.verify(case.example._replace(trace=right)).score == 1


@cases
def test_a_missing_reference_is_filled_in_from_the_trace(case: Case) -> None:
    if case.grader.grades_completions and case.right:
        grade = case.grader.verify(case.example._replace(answer="", trace=case.right[0]))
        assert (
            grade.score == 1
            and grade.answer
            and case.grader.grade(case.right[0], case.example._replace(answer=grade.answer)).score == 1
        )


@cases
def test_equal_answers_are_one_vote(case: Case) -> None:
    grades = case.grader.grades(texts(case), [case.example] * len(texts(case)))
    for grade in grades:
        assert grade.answer is None or case.grader.same(grade.answer, grade.answer) is True
    (votes,) = case.grader.votes_of([[*grades, *grades]])
    assert votes[: len(grades)] == votes[len(grades) :]
    assert [vote is None for vote in votes] == [grade.answer is None for grade in [*grades, *grades]]
    assert [vote == 0 for vote in votes[: len(case.right)]] == [True] * len(case.right)


@cases
@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading")
def test_odd_completions_are_graded_in_time(case: Case) -> None:
    started = time.monotonic()
    for text, grade in zip(ODD, case.grader.grades(ODD, [case.example] * len(ODD)), strict=True):
        assert not case.grader.is_right(grade.score) and grade.problem in ("", *PROBLEMS.values()), text[:40]
        assert len(grade.feedback) < 2_000
    assert time.monotonic() - started < 60  # a bound on hanging, not a speed


@cases
def test_graders_are_copied_and_compared_by_their_settings(case: Case) -> None:
    grader, text = case.grader, texts(case)[0]
    for other in (copy.deepcopy(grader), pickle.loads(pickle.dumps(grader)), type(grader)(**settings(grader))):
        assert other == grader and hash(other) == hash(grader) and repr(other) == repr(grader)
        assert other.grade(text, case.example) == grader.grade(text, case.example)
    assert all(name in repr(grader) and name in vars(grader) for name in settings(grader))
    assert not case.secret or case.secret not in repr(grader) + str(vars(grader))


def configs() -> Iterator[tuple[Grader, str]]:
    for case in CASES:
        yield case.grader, type(case.grader).__name__
        yield case.grader, f"{type(case.grader).__module__}.{type(case.grader).__name__}"


@pytest.mark.parametrize(("grader", "path"), list(configs()), ids=lambda value: value if isinstance(value, str) else "")
def test_yaml_names_graders_by_short_and_full_names(grader: Grader, path: str) -> None:
    parser = ArgumentParser()
    parser.add_argument("--grader", type=Grader)
    text = settings(grader) | {name: list(value) for name, value in settings(grader).items() if isinstance(value, tuple)}
    found = parser.instantiate(parser.parse_object({"grader": {"class_path": path, "init_args": text}}))["grader"]
    assert repr(found).replace("[", "(").replace("]", ")") == repr(grader).replace("[", "(").replace("]", ")")


@cases
def test_what_can_be_graded(case: Case) -> None:
    """Examples with a reference, if the grader grades completions at all."""
    assert case.grader.can_grade(case.example) == case.grader.grades_completions
    if isinstance(case.grader, (MathGrader, ExactMatch, JSONGrader, ChoiceGrader)):
        assert not case.grader.can_grade(case.example._replace(answer=""))


class Returns(Grader):
    """A grader of a user that returns anything."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def grade(self, completion: str, example: Example) -> Grade:
        return self.value  # type: ignore[no-any-return]


@pytest.mark.parametrize(
    "value",
    [None, 0.5, (1.0, "4", "", ""), Grade(2.0), Grade(-0.1), Grade(math.nan), Grade("1"), Grade(None), Grade(0.5, 42),  # type: ignore[arg-type]
     Grade(0.5, "4", None), Grade(0.0, problem="late")],  # type: ignore[arg-type]
)  # fmt: skip
def test_what_is_no_grade_is_refused(value: Any) -> None:
    example = Example("q", "t", "4")
    for call in (lambda: Returns(value).grades(["4"], [example]), lambda: Returns(value).verifications([example])):
        with pytest.raises(ConfigError, match=mentions("data.grader", "Returns")):
            call()


@pytest.mark.parametrize("score", [True, torch.tensor(1.0), 1])
def test_scores_are_plain_numbers(score: Any) -> None:
    """Records of completions are written as JSON."""
    (grade,) = Returns(Grade(score, "4")).grades(["4"], [Example("q", "", "4")])
    assert type(grade.score) is float and grade.score == 1


@pytest.mark.parametrize(
    ("grader", "example"),
    [
        (ChoiceGrader(), Example("5 + 7?", "", "F", OPTIONS)),
        (ChoiceGrader(), Example("5 + 7?", "", "B", {"options": ["12"]})),
        (ChoiceGrader(), Example("5 + 7?", "", "B", {"choices": ["10", "12"]})),
        (JSONGrader(), Example("q", "", "{")),
        (ExactMatch(references="more"), Example("q", "", "4", {"others": ["5"]})),
        (PYTHON_TESTS, Example("q", "", "", {"tests": {"assert": 1}})),
    ],
    ids=lambda value: type(value).__name__,
)
def test_references_that_cannot_be_read_are_refused_before_grading(grader: Grader, example: Example) -> None:
    """The data module asks `can_grade` for every row that it does not verify, before training."""
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args")):
        grader.can_grade(example)
