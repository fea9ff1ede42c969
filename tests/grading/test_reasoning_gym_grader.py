"""Every task of reasoning-gym: scores are the data set's own, and hostile answers end in time without an effect."""

from __future__ import annotations

import json
import os
import time
from collections.abc import Iterator
from datetime import date
from decimal import Decimal
from fractions import Fraction
from pathlib import Path

import pytest
from reasoning_gym.factory import DATASETS

from helpers.messages import mentions
from opsd_lightning.data.sources import ReasoningGymSource
from opsd_lightning.grading import reasoning_gym_grader as grading, worker_pool
from opsd_lightning.grading.reasoning_gym_grader import COLUMN, JOB, ReasoningGymGrader
from opsd_lightning.grading.reasoning_gym_job import decode, encode, make_dataset
from opsd_lightning.types import ConfigError, Example

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading")]

TASKS = sorted(DATASETS)
OPTIONS = {"composite": {"datasets": [{"name": "chain_sum"}, {"name": "graph_color", "weight": 2.0}]}}
ANY_ANSWER = {"game_of_life_halting"}  # tasks that score every answer as right
EVALUATED = ["binary_matrix", "countdown", "n_queens", "polynomial_multiplication", "puzzle24", "simple_integration", "spiral_matrix", "string_insertion"]  # fmt: skip


def examples(task: str, size: int = 2) -> list[Example]:
    return ReasoningGymSource(task, size=size, seed=11, options=OPTIONS.get(task)).examples()


@pytest.fixture(autouse=True)
def quiet() -> Iterator[None]:
    grading._warned.update(("timeout", "failure"))
    yield
    grading._warned.clear()


def test_scores_are_the_data_sets_own() -> None:
    """For the item's own answer, another item's, and a text that is no answer; with all values that entries hold."""
    grader, right = ReasoningGymGrader(timeout_seconds=60.0), 0
    for task in TASKS:
        found = examples(task)
        dataset = make_dataset(task, {"size": 2, "seed": 11, **OPTIONS.get(task, {})})
        if task in ANY_ANSWER:
            with pytest.raises(ConfigError, match=mentions(task, "data.grader")):
                grader.grade("<answer>?</answer>", found[0])
            continue
        texts = [found[0].answer, found[1].answer, "nothing of the kind", "[1, 2]"]
        texts = [text.strip() for text in texts if text.strip()]
        grades = grader.grades([f"<answer>{text}</answer>" for text in texts], [found[0]] * len(texts))
        item = dataset[0]
        expected = list[float]()
        for text in texts:
            try:
                expected.append(min(max(float(dataset.score_answer(text, item)), 0.0), 1.0))
            except Exception:
                expected.append(0.0)  # a text that the data set cannot read
        assert [grade.score for grade in grades] == expected, task
        right += bool(found[0].answer) and grades[0].score == 1
        if found[0].answer:
            assert grades[0].score == 1, task
    assert right > 90


def test_entries_keep_their_types() -> None:
    for task in TASKS:
        item = make_dataset(task, {"size": 1, "seed": 4, **OPTIONS.get(task, {})})[0]
        assert decode(json.loads(json.dumps(encode(item)))) == item, task
    value = {
        1: (2, {3}),
        None: frozenset("a"),
        "b": [True, 1.5, {}],
        "c": (Fraction(1, 3), Decimal("0.10"), 1 + 2j, date(2026, 1, 2)),
    }
    assert decode(json.loads(json.dumps(encode(value)))) == value
    with pytest.raises(TypeError):
        encode(object())


HOSTILE = [
    "10**10**10", "9" * 5_000, "(" * 3_000 + ")" * 3_000, "[1]*10**11", "x" * 200_000, "1/0", "factorial(10**8)", "\0", "\ud800", "lambda: 0",
    "[[]" * 2_000, "{" * 3_000, "exit()", "quit()", "input()", "breakpoint()", "[].__class__.__base__.__subclasses__()", "globals()", "x.doit",
]  # fmt: skip
CRIMES = [
    "__import__('os').system('touch {0}')", "open('{0}', 'w')", "exec(\"open('{0}', 'w')\")", "eval(\"open('{0}','w')\")", "sympify(\"open('{0}', 'w')\")",
    "parse_expr(\"__import__('os').system('touch {0}')\")", "utilities.misc.os.system('touch {0}')", "preview(x, viewer='file', filename='{0}')",
    "lambdify((), \"__import__('os').system('touch {0}')\", 'sympy')()", "print_gtk(x, '{0}')", "S(\"exec(chr(105))\")", "getattr(x, 'doit')()",
    "[c for c in ().__class__.__base__.__subclasses__()]", "(lambda: open('{0}', 'w'))()", "[open('{0}', 'w') for _ in [1]]", "f\"{{open('{0}', 'w')}}\"",
    "compile(\"open('{0}','w')\", 'a', 'eval')", "srepr(open('/etc/passwd'))", "source(x)",
]  # fmt: skip


@pytest.mark.parametrize("task", EVALUATED)
def test_evaluated_answers_have_no_effect(task: str, tmp_path: Path) -> None:
    target = tmp_path / "hacked"
    grader, (example, _) = ReasoningGymGrader(timeout_seconds=2.0), examples(task)
    texts = [crime.format(target) for crime in CRIMES]
    grades = grader.grades([f"<answer>{text}</answer>" for text in texts], [example] * len(texts))
    assert all(grade.score < 1 for grade in grades) and not target.exists()
    assert grader.grade(f"<answer>{example.answer}</answer>", example).score == 1  # the worker still works


@pytest.mark.slow
def test_hostile_answers_to_every_task_end_in_time() -> None:
    grader = ReasoningGymGrader(timeout_seconds=0.3)
    ReasoningGymGrader(timeout_seconds=60.0).grade("1", examples("chain_sum")[0])  # started
    for task in sorted(set(TASKS) - ANY_ANSWER):
        example, started = examples(task)[0], time.monotonic()
        grades = grader.grades([f"<answer>{text}</answer>" for text in HOSTILE], [example] * len(HOSTILE))
        assert all(0 <= grade.score < 1 for grade in grades), task
        assert time.monotonic() - started < len(HOSTILE) * 2.0 + 20, task  # far below what one endless answer takes


def test_a_crash_of_the_worker_is_a_failure(monkeypatch: pytest.MonkeyPatch) -> None:
    example, grader = examples("chain_sum")[0], ReasoningGymGrader(timeout_seconds=30.0)
    assert grader.grade(example.answer, example).score == 1
    monkeypatch.setattr(worker_pool, "_MOST_DEATHS", 0)
    grade = grader.grade(example.answer, example)
    assert grade.score == 0 and grade.problem == "failure"


def test_how_the_answer_is_found() -> None:
    text = "So.\n<answer>1</answer> no: <answer> 2\n3 </answer>\n4"
    assert ReasoningGymGrader().find_answer(text) == "2\n3"
    assert [ReasoningGymGrader(without_tags=way).find_answer("5\n6\n") for way in ("last_line", "whole", "none")] == [
        "6",
        "5\n6",
        None,
    ]  # type: ignore[arg-type]
    assert ReasoningGymGrader(answer_pattern=r"= (\d+)").find_answer("1 = 1\n2 = 7 <answer>3</answer>") == "7"
    for nothing in ("", "<think>7", "<think>7</think>", "<answer></answer>"):
        assert ReasoningGymGrader().find_answer(nothing) is None
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.without_tags")):
        ReasoningGymGrader(without_tags="first")  # type: ignore[arg-type]


def test_worked_traces_verify_by_their_final_answer() -> None:
    found = examples("gsm_symbolic", 20)
    grades = ReasoningGymGrader().verifications(found)
    assert sum(grade.score == 1 for grade in grades) > 10
    wrong = found[0]._replace(trace="It is 3. The answer is 123456.")
    assert ReasoningGymGrader().verify(wrong).score < 1


def test_rows_of_other_sources_are_refused() -> None:
    grader = ReasoningGymGrader()
    assert not grader.can_grade(Example("?", "", "1")) and COLUMN in examples("chain_sum")[0].columns
    with pytest.raises(ConfigError, match=mentions("data.grader", "ReasoningGymSource")):
        grader.grade("1", Example("?", "", "1"))


def test_workers_read_only_what_imports_need() -> None:
    secret = Path(os.path.expanduser("~/.opsd_secret_of_a_test"))
    example = examples("countdown")[0]
    assert ReasoningGymGrader().grade(f"<answer>open({str(secret)!r})</answer>", example).score < 1
    assert worker_pool.shared(JOB)._process is not None
