"""Run checks one after the other in a process of their own, within a limit of time, and write the results as JSON.

This process imports the standard library alone, so that nothing that a check does can stop it: a check that hangs is ended,
and one that crashes, or leaves a CUDA device in an error, costs the process of the checks, which is then started again.
"""

from __future__ import annotations

import contextlib
import importlib.util
import json
import math
import os
import select
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

#: Seconds that are kept for ending a process and writing the results.
RESERVE = 5.0
#: A check may take this many times its estimate, or at least this many seconds, before it is ended.
PATIENCE, LEAST_LIMIT = 4.0, 45.0
#: Characters of a process's output that are kept with a failed check.
OUTPUT = 3000


@dataclass(frozen=True)
class Check:
    """A check, as this process knows it.

    Args:
        name: Name of the check.
        function: Place of its function, as ``module:function``. It takes the machine, and a mapping that it fills with facts.
        seconds: Estimated seconds on a GPU. The check is skipped if less time is left.
        shows: One line about what a pass shows.
        packages: Modules that it imports beside the package's own dependencies. It is skipped if one is missing.
        alone: If True, the check has a process of its own.
    """

    name: str
    function: str
    seconds: float
    shows: str
    packages: tuple[str, ...] = ()
    alone: bool = False


@dataclass
class Result:
    """The result of a check.

    Args:
        name: Name of the check.
        status: ``pass``, ``fail`` or ``skip``.
        seconds: Seconds that it took.
        estimate: Estimated seconds.
        facts: Numbers that the check found, by name, also those found before a failure or before it was ended.
        reason: Reason for a failure or for skipping.
        details: Traceback and output of a failed check.
    """

    name: str
    status: str
    seconds: float = 0.0
    estimate: float = 0.0
    facts: dict[str, Any] = field(default_factory=dict)
    reason: str = ""
    details: str = ""


class Skip(Exception):
    """Raised by a check that cannot run here, with the reason."""


class Ended(Exception):
    """The process of the checks ended, or was ended, before it answered."""


class Worker:
    """The process that runs the checks. It and its children are one process group.

    Args:
        arguments: Arguments of the module ``gpu.worker``.
        output: File to which its output is appended.
    """

    def __init__(self, arguments: Sequence[str], output: Path) -> None:
        self.output = output
        answers, theirs = os.pipe()
        self._answers = os.fdopen(answers, "rb", buffering=0)
        tests = Path(__file__).parents[1]
        paths = [str(tests.parent), str(tests), *filter(None, [os.environ.get("PYTHONPATH")])]
        # Nothing is downloaded, and Python's warnings of libraries do not fill the output.
        defaults = {"HF_HUB_OFFLINE": "1", "TOKENIZERS_PARALLELISM": "false", "PYTHONWARNINGS": "ignore"}
        with output.open("ab") as log:
            self._process = subprocess.Popen(
                [sys.executable, "-u", "-m", "gpu.worker", "--answers", str(theirs), *arguments],
                stdin=subprocess.PIPE, stdout=log, stderr=log, pass_fds=[theirs], start_new_session=True,
                env={**defaults, **os.environ, "PYTHONPATH": os.pathsep.join(paths)},
            )  # fmt: skip
        os.close(theirs)
        self._received = b""

    def answer(self, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Wait up to so many seconds for the next answer, and add the facts that come before it.

        Raises:
            TimeoutError: There is none.
            Ended: The process has ended.
        """
        deadline = time.monotonic() + seconds
        while True:
            while b"\n" in self._received:
                line, _, self._received = self._received.partition(b"\n")
                found: dict[str, Any] = json.loads(line)
                if "fact" not in found:
                    return found
                facts[found["fact"]] = found["value"]
            left = deadline - time.monotonic()
            if left <= 0 or not select.select([self._answers], [], [], left)[0]:
                raise TimeoutError(f"no answer in {seconds:.0f} s")
            if not (more := self._answers.read(65536)):
                status = self._process.wait()
                how = f"by {signal.Signals(-status).name}" if status < 0 else f"with status {status}"
                raise Ended(f"the process of the checks ended {how}")
            self._received += more

    def run(self, function: str, seconds: float, facts: dict[str, Any]) -> dict[str, Any]:
        """Run a check and return its answer. Adds facts and raises as `answer` does."""
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):  # `answer` says how it ended
            self._process.stdin.write(f"{function}\n".encode())
            self._process.stdin.flush()
        return self.answer(seconds, facts)

    def end(self) -> None:
        """End the process and its children."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        self._answers.close()
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError):
            self._process.stdin.close()


class Run:
    """A run of several checks.

    Args:
        checks: The checks, the most valuable first.
        arguments: Arguments of the module ``gpu.worker``.
        json_path: File for the results, which is replaced after each check.
        facts: Facts about the run, for the file.
        budget: Seconds for everything.
        say: Function that is called with each line to print.
        estimates: If False, no check is skipped because of its estimate.
    """

    def __init__(
        self,
        checks: Sequence[Check],
        arguments: Sequence[str],
        json_path: Path,
        facts: dict[str, Any],
        budget: float,
        say: Callable[[str], None] = print,
        estimates: bool = True,
    ) -> None:
        self.checks, self.arguments, self.json_path = list(checks), list(arguments), json_path
        self.facts, self.budget, self.say, self.estimates = facts, budget, say, estimates
        self.results: list[Result] = []
        self.output = json_path.with_suffix(".log")
        self._worker: Worker | None = None
        self._broken = ""
        self._start_seconds = 0.0
        self._began = time.monotonic()

    @property
    def left(self) -> float:
        """Seconds that are left for checks."""
        return self.budget - RESERVE - (time.monotonic() - self._began)

    def run(self) -> list[Result]:
        """Run the checks, and return their results. The file of results is whole at any time."""
        self.output.parent.mkdir(parents=True, exist_ok=True)
        self.output.write_bytes(b"")
        self._write(complete=False)
        try:
            for check in self.checks:
                started = time.monotonic()
                result = self._result(check)
                result.seconds = round(time.monotonic() - started, 1)
                result.estimate = check.seconds
                self.results.append(result)
                self._write(complete=False)
                self.say(line_of(result))
            self._write(complete=True)
        finally:
            self._stop()
        return self.results

    def _result(self, check: Check) -> Result:
        if missing := [name for name in check.packages if not installed(name)]:
            return Result(check.name, "skip", reason=f"{' and '.join(missing)} is not installed")
        if self._broken:
            return Result(check.name, "skip", reason=self._broken)
        needed = check.seconds + (self._start_seconds if self._worker is None or check.alone else 0.0)
        if self.left < (needed if self.estimates else 0.0):
            return Result(
                check.name,
                "skip",
                reason=f"no time left: it takes about {needed:.0f} s, and {max(self.left, 0):.0f} s are left",
            )
        if check.alone:
            self._stop()
        began = self.output.stat().st_size
        try:
            worker = self._start()
        except (TimeoutError, Ended) as error:
            printed = self._tail(began)
            last = (printed.strip().splitlines() or [str(error)])[-1]  # the message of an error, such as a missing package
            self._broken = f"the process of the checks did not start: {last}"
            return Result(check.name, "fail", reason=self._broken, details=printed)
        written = self.output.stat().st_size
        result = self._ask(worker, check)
        if result.status == "fail":
            result.details = f"{result.details}\n{self._tail(written)}".strip()
            self._stop()  # its CUDA context may be in an error, and its memory in use
        elif check.alone:
            self._stop()
        return result

    def _ask(self, worker: Worker, check: Check) -> Result:
        """Let the process run a check, and end the process if the check takes too long."""
        patience, left = max(PATIENCE * check.seconds, LEAST_LIMIT), max(self.left, 0.0)
        facts: dict[str, Any] = {}
        try:
            return Result(check.name, facts=facts, **worker.run(check.function, min(patience, left), facts))
        except TimeoutError:
            self._stop()
            if left < patience:
                return Result(check.name, "skip", facts=facts, reason=f"ended after {left:.0f} s, when no time was left")
            reason = f"ended after {patience:.0f} s, {patience / max(check.seconds, 1):.0f} times its estimate"
            return Result(check.name, "fail", facts=facts, reason=reason)
        except Ended as error:
            return Result(check.name, "fail", facts=facts, reason=str(error))

    def _start(self) -> Worker:
        if self._worker is None:
            began = time.monotonic()
            worker = Worker(self.arguments, self.output)
            try:
                worker.answer(max(self.left, 1.0), {})
            except BaseException:
                worker.end()
                raise
            self._worker, self._start_seconds = worker, time.monotonic() - began
        return self._worker

    def _stop(self) -> None:
        if self._worker is not None:
            self._worker.end()
            self._worker = None

    def _tail(self, start: int) -> str:
        return self.output.read_bytes()[start:][-OUTPUT:].decode(errors="replace")

    def _write(self, complete: bool) -> None:
        content = self.facts | {
            "complete": complete,
            "seconds": round(time.monotonic() - self._began, 1),
            "waiting": [check.name for check in self.checks[len(self.results) :]],
            "checks": [asdict(result) for result in self.results],
        }
        temporary = self.json_path.with_name(f".{self.json_path.name}.partial")
        temporary.write_text(json.dumps(plain(content), indent=1, allow_nan=False) + "\n", encoding="utf-8")
        os.replace(temporary, self.json_path)


def installed(module: str) -> bool:
    """Return True if a module can be imported, without importing it."""
    try:
        return importlib.util.find_spec(module) is not None
    except (ImportError, ValueError):
        return False


def plain(value: Any) -> Any:
    """Return a value with text in the place of numbers that JSON has not."""
    if isinstance(value, dict):
        return {str(name): plain(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [plain(each) for each in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


def shown(value: Any) -> str:
    """Return a fact as text: a number with three digits, a mapping as ``name value`` pairs."""
    if isinstance(value, dict):
        return ", ".join(f"{name} {shown(each)}" for name, each in value.items())
    if isinstance(value, list | tuple):
        return ", ".join(map(shown, value))
    if isinstance(value, float):
        return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"
    return str(value)


def line_of(result: Result) -> str:
    """Return the lines that report a result as soon as it is there."""
    lines = [f"{result.status.upper():4} {result.name} ({result.seconds:.0f} s){': ' * bool(result.reason)}{result.reason}"]
    lines += [f"       {name}: {shown(value)}" for name, value in result.facts.items()]
    return "\n".join(lines)


def table(results: Sequence[Result], checks: Sequence[Check]) -> str:
    """Return one row for each check: its status, its seconds, and what it shows or why it did not."""
    shows = {check.name: check.shows for check in checks}
    rows = [("check", "status", "seconds", "shows, or the reason")]
    for result in results:
        reason = " ".join((result.reason or shows.get(result.name, "")).split())
        rows.append((result.name, result.status, f"{result.seconds:.0f}", reason[:110]))
    widths = [max(len(row[column]) for row in rows) for column in range(3)]
    lines = ["  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[3]]) for row in rows]
    lines.insert(1, "-" * max(map(len, lines)))
    counts = {status: sum(result.status == status for result in results) for status in ("pass", "fail", "skip")}
    return "\n".join([*lines, f"{counts['pass']} passed, {counts['fail']} failed, {counts['skip']} skipped"])
