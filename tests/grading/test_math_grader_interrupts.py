"""Tests of interrupted grading and of infinite time limits."""

from __future__ import annotations

import math
import os
import signal
import subprocess
import sys
import threading
import time

import pytest

from helpers.grading import with_answers
from helpers.paths import ROOT
from opsd_lightning.grading.math_grader import MathGrader

pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading")]


SLOW = r"\boxed{10^{10^{%d}}}"  # sympy never ends


def test_an_interrupt_ends_slow_comparisons_at_once() -> None:
    grader = MathGrader(timeout_seconds=60.0)
    assert grader.equal(r"\sqrt{4}", r"2\cdot 1")  # the pool has started
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where a shell started this in the background
    threading.Timer(1.0, lambda: os.kill(os.getpid(), signal.SIGINT)).start()
    started = time.monotonic()
    try:
        with pytest.raises(KeyboardInterrupt):
            grader.grades([SLOW % n for n in range(9, 15)], with_answers([r"\pi^2"] * 6))
    finally:
        signal.signal(signal.SIGINT, before)
    assert time.monotonic() - started < 20
    assert [grade.score for grade in grader.grades([r"\boxed{\sqrt{9}}"] * 2, with_answers([r"2\cdot 1", r"3\cdot 1"]))] == [
        0.0,
        1.0,
    ]


def test_the_interpreter_ends_while_a_thread_grades() -> None:
    program = (
        "import threading, time\n"
        "from opsd_lightning import Example, MathGrader\n"
        f"texts = [{SLOW!r} % n for n in range(9, 15)]\n"
        "work = lambda: MathGrader(timeout_seconds=120.0).grades(texts, [Example('', '', '\\\\pi^2')] * 6)\n"
        "threading.Thread(target=work, daemon=True).start()\n"
        "time.sleep(4)\n"
    )
    environment = os.environ | {"PYTHONPATH": str(ROOT)}
    subprocess.run([sys.executable, "-c", program], env=environment, timeout=60, check=True)


@pytest.mark.parametrize("seconds", [math.inf, 1e12])
def test_infinite_time_limit_is_accepted(seconds: float) -> None:
    assert MathGrader(timeout_seconds=seconds).equal(r"\sqrt{16}", r"2\cdot 2")
