"""The workers of a job, math-verify: bounded in time and memory, repeated when killed, never left behind, and safe to fork."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import ClassVar

import pytest

from helpers.grading import with_answers
from opsd_lightning.grading import answer_forms, math_grader as grading, worker_pool
from opsd_lightning.grading.base import Grade
from opsd_lightning.grading.math_grader import JOB, MathGrader
from opsd_lightning.types import Example

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc"),
    pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading"),
]

SLOW = ["10^{10^{10}}+x", "9!!!!!!", "2^{3^{4^{5^{6}}}}", "7^{7^{7^{7}}}x"]


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    grading._verdicts.clear()
    yield
    grading._warned.update(("timeout", "failure"))


def children(pid: int) -> list[int]:
    """Processes whose parent is ``pid``, without zombies."""
    found = []
    for stat in Path("/proc").glob("[0-9]*/stat"):
        try:
            state, parent = stat.read_text().rpartition(")")[2].split()[:2]
        except OSError:
            continue
        if int(parent) == pid and state != "Z":
            found.append(int(stat.parent.name))
    return found


def server() -> int:
    """The process that forks the workers, started if there is none."""
    pool = worker_pool.shared(JOB)
    if pool._process is not None and not alive(pool._process.pid):
        pool.stop()
    assert pool.ask(("2x", "x+x"), 30.0)[0]
    process = pool._process
    assert process is not None
    return process.pid


def eventually(check: Callable[[], bool], seconds: float = 20.0) -> bool:
    end = time.monotonic() + seconds
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


def alive(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def busy(pid: int) -> bool:
    """Return whether a process computes; a worker that waits does not."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] == "R"
    except OSError:
        return False


def in_thread(run: Callable[[], object]) -> threading.Thread:
    thread = threading.Thread(target=run, daemon=True)
    thread.start()
    return thread


def test_slow_answers_are_graded_side_by_side(monkeypatch: pytest.MonkeyPatch) -> None:
    """In the time of all divided by the workers, on another thread than the main one, in the order of the questions."""
    server()
    monkeypatch.setattr(worker_pool, "workers", lambda: 4)
    answers = [f"{n}0^{{10^{{10}}}}+x" for n in range(1, 17)]
    texts = [rf"so \boxed{{{answer}}}" for answer in [*answers, "2x/4", "x"]]
    found: list[Grade] = []
    started = time.monotonic()
    in_thread(lambda: found.extend(MathGrader(timeout_seconds=0.5).grades(texts, with_answers(["0.5x"] * 18)))).join(60)
    assert time.monotonic() - started < 16 * 0.5 / 4 + 2.0
    assert found == [Grade(0.0, answer, problem="timeout") for answer in answers] + [Grade(1.0, "2x/4"), Grade(0.0, "x")]


def test_identical_comparisons_run_once() -> None:
    server()
    started = time.monotonic()
    found = MathGrader(timeout_seconds=1.0).grades([r"\boxed{9!!!!!!}"] * 50, with_answers(["3x"] * 50))
    assert found == [Grade(0.0, "9!!!!!!", problem="timeout")] * 50 and time.monotonic() - started < 4


def test_a_worker_killed_at_work_costs_a_retry() -> None:
    pid, grader = server(), MathGrader(timeout_seconds=60.0)
    for n in range(1, 4):
        found = list[Grade]()
        texts = [rf"\boxed{{(x+{n})^{{40}}(x+5)^{{40}}}}"]
        references = with_answers([f"(x^2+{n + 5}x+{5 * n})^{{40}}"])
        thread = in_thread(lambda to=found, of=(texts, references): to.extend(grader.grades(*of)))
        assert eventually(lambda: any(busy(worker) for worker in children(pid)))
        for worker in children(pid):
            if busy(worker):
                os.kill(worker, signal.SIGKILL)
        thread.join(60)
        assert [grade.score for grade in found] == [1.0]


def test_a_question_that_ends_two_workers_is_wrong_and_counted() -> None:
    pid, found = server(), list[Grade]()
    thread = in_thread(
        lambda: found.extend(MathGrader(timeout_seconds=30.0).grades([r"\boxed{9!!!!!!}"], with_answers(["3x"])))
    )
    dead = set[int]()
    for _ in range(2):
        assert eventually(lambda: any(busy(worker) for worker in set(children(pid)) - dead))
        for worker in set(children(pid)) - dead:
            if busy(worker):
                os.kill(worker, signal.SIGKILL)
                dead.add(worker)
    thread.join(20)
    assert found == [Grade(0.0, "9!!!!!!", problem="failure")]
    assert MathGrader().equal("0.5x", r"\frac{x}{2}")


def test_dead_workers_and_their_parent_are_replaced() -> None:
    pid = server()
    for worker in children(pid):
        os.kill(worker, signal.SIGKILL)
    assert MathGrader().equal("0.5x", r"\frac{x}{2}")
    os.kill(pid, signal.SIGKILL)
    assert MathGrader().equal("0.25x", r"\frac{x}{4}") and server() != pid
    pid = server()
    for each in [pid, *children(pid)]:
        os.kill(each, signal.SIGKILL)
    assert MathGrader().equal("0.125x", r"\frac{x}{8}")


def test_a_stopped_worker_is_ended(monkeypatch: pytest.MonkeyPatch) -> None:
    """It does not even hear its alarm."""
    monkeypatch.setattr(worker_pool, "_GRACE_SECONDS", 0.5)
    pid = server()
    workers = children(pid)
    for worker in workers:
        os.kill(worker, signal.SIGSTOP)
    for _ in workers:
        with pytest.raises(TimeoutError):
            worker_pool.shared(JOB).ask(("2x", "x+x"), 0.3)
    assert workers and eventually(lambda: not any(alive(worker) for worker in workers))
    assert MathGrader().equal("0.5x", r"\frac{x}{2}")


def test_memory_is_bounded() -> None:
    """The system's limit, since what an answer takes is found out by computing it."""
    pid = server()
    limits = [Path(f"/proc/{worker}/limits").read_text() for worker in children(pid)]
    assert limits and all(re.search(rf"Max address space +{2**30} +{2**30} ", text) for text in limits)
    grader, peaks, done = MathGrader(timeout_seconds=2.0), [0], threading.Event()

    def watch() -> None:
        while not done.is_set():
            for worker in children(pid):
                with suppress(OSError, IndexError):
                    peaks.append(int(Path(f"/proc/{worker}/statm").read_text().split()[1]))
            time.sleep(0.02)

    watcher = in_thread(watch)
    bombs = [r"2^{2^{34}}", r"\binom{10^{9}}{5 \cdot 10^{8}}", r"2^{2^{33}}-2^{2^{33}}+1", "10**10**10"]
    assert not any(
        grade.score for grade in grader.grades([rf"\boxed{{{bomb}}}" for bomb in bombs], with_answers(["3x"] * 4))
    )
    done.set()
    watcher.join()
    assert max(peaks) * os.sysconf("SC_PAGESIZE") < 2**30


PARENT = """
import sys, threading, time
from opsd_lightning import Example, MathGrader
from opsd_lightning.grading.math_grader import JOB
from opsd_lightning.grading.worker_pool import shared
grader = MathGrader(timeout_seconds=600.0)
grader.equal("0.5x", "x/2")
threading.Thread(target=grader.grades, args=([r"\\boxed{9!!!!!!}", r"\\boxed{7^{7^{7^{7}}}x}"], [Example("", "", answer) for answer in ("3x", "4x")])).start()
print(shared(JOB)._process.pid, flush=True)
time.sleep(600)
"""


@pytest.mark.parametrize("number", [signal.SIGKILL, signal.SIGTERM])
def test_workers_die_with_their_parent_while_busy(number: int) -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL)
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert eventually(lambda: any(busy(worker) for worker in children(pid)))
    workers = children(pid)
    parent.send_signal(number)
    parent.wait(20)
    assert workers and eventually(lambda: not any(alive(each) for each in [pid, *workers]), 10.0)
    parent.stdout.close()


def test_workers_end_with_a_killed_process_above_them() -> None:
    pid = server()
    workers = children(pid)
    os.kill(pid, signal.SIGKILL)
    assert workers and eventually(lambda: not any(alive(worker) for worker in workers), 10.0)


def forked(run: Callable[[], bool]) -> int:
    """The exit status of a forked child that runs a function: 0 if it returns true."""
    child = os.fork()
    if child == 0:
        status = 1
        try:
            signal.alarm(60)
            status = 0 if run() else 2
        finally:
            os._exit(status)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_forking_while_threads_grade() -> None:
    """Children have workers of their own; neither side hears the other's replies or waits for its locks."""
    grader, stop = MathGrader(timeout_seconds=20.0), threading.Event()
    pid, wrong, asked = server(), list[str](), [0]

    def grade(start: int) -> None:
        number = start
        while not stop.is_set():
            number += 4
            asked[0] += 1
            if not grader.equal(f"{number}x+1", f"1+{number}*x") or grader.equal(f"{number}x+1", f"2+{number}*x"):
                wrong.append(str(number))

    threads = [in_thread(lambda start=start: grade(start)) for start in range(4)]
    try:
        for number in range(6):
            assert (
                forked(lambda n=number: len(worker_pool.shared(JOB)._open) == 0 and (n % 3 > 0 or child_grades(grader))) == 0
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join(60)
    assert not wrong and asked[0] > 4 and server() == pid


def child_grades(grader: MathGrader) -> bool:
    found = grader.grades([r"\boxed{5x+7}", r"\boxed{5x}"], with_answers(["7+5x"] * 2))
    return [grade.score for grade in found] == [1.0, 0.0]


def test_a_forked_child_does_not_keep_the_parents_workers_alive() -> None:
    """As a data loader's worker that outlives a killed trainer."""
    code = PARENT + "\n"
    code = code.replace("time.sleep(600)", "import os\nif os.fork() == 0:\n    time.sleep(30)\nelse:\n    time.sleep(600)")
    parent = subprocess.Popen(
        [sys.executable, "-c", code], stdout=subprocess.PIPE, text=True, stderr=subprocess.DEVNULL, start_new_session=True
    )
    assert parent.stdout is not None
    pid = int(parent.stdout.readline())
    assert eventually(lambda: any(busy(worker) for worker in children(pid)) and len(children(parent.pid)) > 1)
    workers = children(pid)
    parent.kill()
    parent.wait(20)
    try:
        assert eventually(lambda: not any(alive(each) for each in [pid, *workers]), 10.0)
    finally:
        os.killpg(parent.pid, signal.SIGKILL)  # the child of the fork
        parent.stdout.close()


def test_verdicts_do_not_depend_on_the_number_of_workers(monkeypatch: pytest.MonkeyPatch) -> None:
    pairs = [(f"\\frac{{{n}x}}{{{n + 1}}}", f"{n}x/{n + 1 + n % 2}") for n in range(1, 21)]
    pairs += [("x^2-1", "(x-1)(x+1)"), ("\\sin^2 x+\\cos^2 x", "1"), ("\\sqrt{8}", "2\\sqrt{2}"), ("e^{i\\pi}", "-1")]
    seen = []
    for count in (1, 3):
        monkeypatch.setattr(worker_pool, "workers", lambda count=count: count)
        worker_pool.shared(JOB).stop()
        grading._verdicts.clear()
        found = MathGrader(timeout_seconds=30.0).grades(
            [rf"\boxed{{{a}}}" for a, _ in pairs], with_answers([r for _, r in pairs])
        )
        seen.append([(grade.score, grade.problem) for grade in found])
    assert seen[0] == seen[1] and {correct for correct, _ in seen[0]} == {True, False}


def test_number_of_workers_follows_cores_and_ranks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(64)))
    monkeypatch.delenv("WORLD_SIZE", raising=False)
    for ranks, count in (("", 8), ("1", 8), ("16", 4), ("64", 1), ("1000", 1), ("0", 8), ("many", 8)):
        monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks)
        assert worker_pool.workers() == count


class Lenient(MathGrader):
    """A user's: any number of words is right that holds the reference."""

    threads: ClassVar[list[int]] = []

    def find_answer(self, text: str) -> str | None:
        self.threads.append(threading.get_ident())
        return text.rpartition(":")[2].strip() or None

    def equal(self, answer: str | None, reference: str) -> bool:
        self.threads.append(threading.get_ident())
        return answer is not None and (reference in answer or super().equal(answer, reference))


def test_a_subclass_grades_many_in_turn_on_this_thread() -> None:
    grader = Lenient(timeout_seconds=1.0)
    found = grader.grades(["is: a cat", "is: x/2", "is:", "is: 9!!!!!!"], with_answers(["cat", "0.5x", "1", "3x"]))
    assert found == [Grade(1.0, "a cat"), Grade(1.0, "x/2"), Grade(0.0), Grade(0.0, "9!!!!!!", problem="timeout")]
    assert set(Lenient.threads) == {threading.get_ident()}


class ByGrade(MathGrader):
    """A user's: grades whole texts."""

    def grade(self, completion: str, example: Example) -> Grade:
        return Grade(1.0) if completion.endswith(example.answer) else super().grade(completion, example)


def test_subclass_may_grade_whole_texts() -> None:
    found = ByGrade(timeout_seconds=1.0).grades(
        ["so it is a cat", r"\boxed{x/2}", r"\boxed{9!!!!!!}"], with_answers(["cat", "0.5x", "3x"])
    )
    assert found == [Grade(1.0), Grade(1.0, "x/2"), Grade(0.0, "9!!!!!!", problem="timeout")]


def test_a_slow_answer_votes_by_its_text_without_waiting_again() -> None:
    server()
    grader = MathGrader(timeout_seconds=0.5)
    grades = [Grade(0.0, answer, problem="timeout") for answer in [SLOW[0], SLOW[1], SLOW[0]]]
    questions = [[Grade(1.0, "2"), *grades, Grade(0.0), Grade(0.0, "2x"), Grade(0.0, "x+x")]] * 2
    started = time.monotonic()
    cast = grader.votes_of(questions)
    assert time.monotonic() - started < 0.5 and cast[0] == cast[1]
    assert cast[0] == [0, 2, 3, 2, None, 1, 1]


def test_a_slow_pattern_is_a_time_out_and_runs_beside_others(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(worker_pool, "workers", lambda: 8)
    grader = MathGrader(answer_pattern=r"((?:\w+\s?)+)=", timeout_seconds=0.5)
    started = time.monotonic()
    found = grader.grades(["a" * 5_000 + f"{n}!=" for n in range(8)] + ["7="], with_answers(["7"] * 9))
    assert found == [Grade(0.0, problem="timeout")] * 8 + [Grade(1.0, "7")]
    assert time.monotonic() - started < 8 * 0.5 - 0.2


def test_first_timeout_is_logged() -> None:
    server()
    grading._warned.clear()
    grader = MathGrader(timeout_seconds=0.3)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        assert [grader.equal(answer, "3x") for answer in SLOW[:2]] == [False, False]
    assert ["grading_timeouts" in str(warning.message) for warning in told] == [True]


def test_repeated_comparison_waits_once() -> None:
    """Also where it asks several questions: of a list, and each of them both ways."""
    server()
    left = []

    def algebra(reference: str, answer: str) -> bool:
        left.append((reference, answer))
        return False

    answer_forms.equal("x^2+1, x^3+1, x^4+1", "x^2+2, x^3+2, x^4+2", algebra)
    assert len(left) > 2
    grader, started = MathGrader(timeout_seconds=1.0), time.monotonic()
    assert not grader.equal(", ".join(SLOW), ", ".join(f"{answer}+1" for answer in SLOW))
    assert time.monotonic() - started < 2.0
