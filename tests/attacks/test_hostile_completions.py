"""Attacks with completions that are to crash or stop the grader: each is graded in time."""

from __future__ import annotations

import gc
import os
import random
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.attack import Attack
from helpers.grading import with_answers
from opsd_lightning.grading import math_grader as grading, worker_pool
from opsd_lightning.grading.math_grader import JOB, MathGrader
from opsd_lightning.grading.math_job import MEMORY

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading")]


SECONDS = 0.5
BATCH = 100
LONG = 100_000
ATOMS = [
    "{", "}", "[", "(", ")", r"\frac", r"\frac{", r"\boxed{", r"\boxed", r"\boxed{1},", r"\boxed{1} and \boxed{2} or ", "$", "$1$", "$$",
    "the answer is ", "The answer is 5. ", "answer: ", "answer", "the final answer to ", "#### ", "\n#### 5", "9", "1,", "1 ", "\u0967",
    "\u00b2", "\u00bd", "e\u0301", "\u0301", "\u200b", "\u202e", "\0", "\ud800", "\\", "\\\\", " ", "\n", "\r\n", "\u2028", "**", "*a*", "_",
    "`", '"', "'", "\u201ca\u201d", "<", "<think>", "</think>", "<answer>", "\u7b54\u6848\u662f", "if the answer is ", "answer (", "-", " - a",
    "\u2014", ".", "...", "1.1", "e9", "1e999", "1/", "1/2 ", "^", "^{", "_{", "km ", "km/h", " per ", "cubic ", " squared", "degrees ", "\u00b0",
    "a", "ab ", "x=", "=", "x^2+", r"\cup", r"\pm", r"\text{", r"\left(", r"\sqrt", r"\begin{", r"\begin{a}", "(A) ", "and ", "or ", ";", "10:",
    "12:30 ", "|", "~", r"\,", "{,}", "five ", "twenty-", "million ", "\u3000", "\uff11", "\ufdfa", "\x02", "\x03", "\u0130", "\U0001f3c6",
    r"the answer is \boxed{", "the answer is (", "the answer is 1, ", "\u221a", "sqrt(", "U.S.", "a.m. ", "!", "!=", "%", "#", "&",
]  # fmt: skip

Family = Callable[[random.Random], str]


def _repeated(rng: random.Random) -> str:
    atom = rng.choice(ATOMS)
    body = atom * (rng.choice([100, 1_900, 10_000, LONG]) // len(atom))
    return rng.choice(
        ["{}", "The answer is 5. {}", "The answer is {}", r"\boxed{{{}}}", "Answer: 1{}1.", "{} the answer is 5"]
    ).format(body)


def _mixed(rng: random.Random) -> str:
    return "".join(rng.choice(ATOMS) for _ in range(rng.choice([5, 50, 500, 5_000])))


def _short_answer(rng: random.Random) -> str:
    return rf"\boxed{{{''.join(rng.choice(ATOMS) for _ in range(rng.randint(1, 40)))}}}"


def _any_text(rng: random.Random) -> str:
    points = [chr(rng.choice([rng.randrange(128), rng.randrange(0x3000), rng.randrange(0x110000)])) for _ in range(300)]
    return rf"\boxed{{{''.join(points[:60])}}}{''.join(points)} The answer is {''.join(points[-20:])}"


def _number(rng: random.Random) -> str:
    digits = rng.choice([10, 400, 4_000, 5_000, LONG])
    forms = [
        "9" * digits,
        f"1e{'9' * min(digits, 900)}",
        f"1/{'7' * digits}",
        f"0.{'3' * digits}...",
        f"{'1,' * digits}000",
        f"-{'9' * digits}.5 km",
    ]
    return rf"\boxed{{{rng.choice(forms)}}}"


def _bomb(rng: random.Random) -> str:
    n = rng.randint(2, 99)
    return rng.choice([
        rf"\boxed{{{n}^{{10^{{10}}}}+x}}", rf"\boxed{{{n}!!!!!!}}", rf"\boxed{{2^{{3^{{4^{{5^{{{n}}}}}}}}}}}", rf"The answer is {n}**10**10.",
        rf"\boxed{{\binom{{10^{{9}}}}{{{n}\cdot 10^{{7}}}}}}", rf"\boxed{{\sum_{{k=1}}^{{10^9}} k^{{{n}}}}}", rf"\boxed{{(x+y+z)^{{{n}00}}-1}}",
    ])  # fmt: skip


def _nested(rng: random.Random) -> str:
    depth = rng.choice([50, 300, 900, 900, 20_000, LONG])
    opening, closing = rng.choice(
        [("{", "}"), ("(", ")"), (r"\sqrt{", "}"), (r"\frac{1}{", "}"), ("[", "]"), (r"\left(", r"\right)"), ("x^{", "}")]
    )
    return rf"\boxed{{{opening * depth}x{closing * depth}}}"


def _matrix(rng: random.Random) -> str:
    row = "&".join(rng.choice(["1", "x", r"\frac{1}{2}"]) for _ in range(rng.choice([3, 100, 300])))
    rows = r"\\".join([row] * rng.choice([1, 3, 40]))
    return rf"\boxed{{\begin{{pmatrix}}{rows}\end{{pmatrix}}}}"


FAMILIES: list[Family] = [_repeated, _mixed, _short_answer, _any_text, _number, _nested, _matrix]
RIGHT = [
    (r"\boxed{{{n}x+1}}", "1+{n}*x"), ("The answer is {n}/2.", r"\frac{{{n}}}{{2}}"), ("#### {n}", "{n}.0"),
    (r"\boxed{{x^2+{n}x}}", "x(x+{n})"), ("so it is **{n} km**. The answer is {n} km.", "{n}000 m"),
]  # fmt: skip
WRONG = [(r"\boxed{{{n}x+1}}", "2+{n}*x"), ("The answer is {n}.", "{n}1"), (r"\boxed{{x^2+{n}x}}", "x(x+{n}+1)")]


def memory(pid: int | str = "self") -> int:
    try:
        return int(Path(f"/proc/{pid}/statm").read_text().split()[1]) * os.sysconf("SC_PAGESIZE")
    except (OSError, IndexError):
        return 0


def children(pid: int) -> list[int]:
    listed = Path(f"/proc/{pid}/task/{pid}/children")
    return [int(child) for child in listed.read_text().split()] if listed.exists() else []


def test_hostile_completions(attack: Attack, monkeypatch: pytest.MonkeyPatch) -> None:
    """In batches, as an evaluation grades them; right and wrong answers between them keep their verdicts."""
    rng, count = attack.random, attack.tries(sample=50, whole=2_000)
    bombs = max(2, count // 20)
    hostile = [(rng.choice(FAMILIES)(rng), rng.choice(["5", "x", r"\frac{1}{2}", "3x+1"])) for _ in range(count - bombs)]
    hostile += [(_bomb(rng), "3x+1") for _ in range(bombs)]
    rng.shuffle(hostile)
    grader, pool = MathGrader(timeout_seconds=SECONDS), worker_pool.shared(JOB)
    MathGrader(timeout_seconds=60.0).equal("2x", "x+x")  # started
    monkeypatch.setattr(grading, "_warned", {"timeout", "failure"})
    gc.collect()
    before = memory()
    for start in range(0, count, BATCH):
        cases: list[tuple[str, str, bool | None]] = [(*case, None) for case in hostile[start : start + BATCH]]
        for text, _, _ in cases:
            started = time.thread_time()
            grader.find_answer(text)
            spent = time.thread_time() - started
            assert spent < 1.0 + 10e-6 * len(text), f"{spent:.1f} s to read {len(text)} characters: {text[:80]!r}"
        attack.tried("hostile completions", len(cases))
        known = len(cases) // 6
        for forms, verdict in ((RIGHT, True), (WRONG, False)):
            for text, reference in rng.choices(forms, k=known):
                n = rng.randint(10, 10_000)
                cases.append((text.format(n=n), reference.format(n=n), verdict))
        rng.shuffle(cases)
        started = time.monotonic()
        grades = grader.grades([text for text, _, _ in cases], with_answers([reference for _, reference, _ in cases]))
        seconds, slow = time.monotonic() - started, sum(grade.problem != "" for grade in grades)
        allowed = 20.0 + 0.3 * len(cases) + (slow + 1) * SECONDS  # a busy machine's, far below what one endless case takes
        assert seconds < allowed, f"round {attack.round}: {seconds:.0f} s for {len(cases)} completions, {slow} of them slow"
        for (text, reference, verdict), grade in zip(cases, grades, strict=True):
            if verdict is not None:
                correct = grade.score == 1
                if grade.problem == "timeout":  # on a busy machine
                    correct = MathGrader(timeout_seconds=60.0).grade(text, *with_answers([reference])).score == 1
                assert correct is verdict, f"round {attack.round}: {text!r} against {reference!r}"
            elif grade.score:
                assert len(grade.answer or "") < 60, f"round {attack.round}: {text[:200]!r}"
        assert pool._process is not None
        assert all(memory(pid) < MEMORY for pid in children(pool._process.pid))
    gc.collect()
    assert memory() - before < 300 * 2**20
    server = pool._process
    assert server is not None
    workers = children(server.pid)
    end = time.monotonic() + 10  # those that were ended are gone in a moment
    while len(workers) > worker_pool.workers() and time.monotonic() < end:
        time.sleep(0.05)
        workers = children(server.pid)
    assert len(workers) <= worker_pool.workers()
    pool.stop()
    end = time.monotonic() + 10
    while any(Path(f"/proc/{pid}").exists() for pid in (*workers, server.pid)) and time.monotonic() < end:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}").exists() for pid in (*workers, server.pid))
