"""Runs of Python code with tests, each in a sandbox of its own, and the check that this machine can make one.

A run is a new process of ``sandbox_worker``, which shares nothing with the training. It is killed with all of its processes
at its time limit, when it is cancelled, and when the process that started it ends.
"""

from __future__ import annotations

import functools
import json
import os
import selectors
import signal
import subprocess
import sys
import tempfile
import threading
import time
import weakref
from collections.abc import Collection, Sequence
from contextlib import suppress
from math import ceil
from pathlib import Path
from typing import Any, Literal, NamedTuple

from opsd_lightning.utils.folders import remove_tree

_SCRIPT = Path(__file__).with_name("sandbox_worker.py")
_GRACE_SECONDS = 30.0  # to start and to end a run on a busy machine, beyond its time limit
_MOST_REPORT = 4 << 20
_SCRATCH_BYTES = 16 << 20
_OPEN_FILES = 64
_TRIES = 2  # of a run that ends without a verdict

Status = Literal["done", "timeout", "failure"]


class Limits(NamedTuple):
    """Limits of a run.

    Args:
        seconds: Wall-clock time.
        memory_bytes: Address space of the code under test, and of the tests.
    """

    seconds: float
    memory_bytes: int


class Run(NamedTuple):
    """Result of a run.

    Args:
        status: ``done``, ``timeout``, or ``failure`` if there is no verdict.
        passed: Number of passing tests.
        total: Number of tests. 0 if the code could not be executed as a whole.
        canonical: The code without comments, in one format. None if it is no Python.
        feedback: First failing test with its error, or the error of the code.
        broken: Reason why the tests cannot be run, or an empty text.
    """

    status: Status
    passed: int = 0
    total: int = 0
    canonical: str | None = None
    feedback: str = ""
    broken: str = ""


class RefusedError(Exception):
    """This machine does not allow the namespaces of a sandbox."""


_running: dict[threading.Thread, subprocess.Popen[bytes]] = {}
_stopped: weakref.WeakSet[threading.Thread] = weakref.WeakSet()


@functools.cache
def refusal() -> str:
    """Return the reason why this machine cannot make a sandbox, or an empty text. The answer is computed once."""
    try:
        found = run("def answer():\n    return 42", ["assert answer() == 42"], "", Limits(30.0, 1 << 30), isolated=True)
    except RefusedError as error:
        return str(error) or "refused"
    return "" if found.passed == 1 else f"a trial run ended with {found.status} {found.feedback}{found.broken}"


def run(code: str, tests: Sequence[str], reference: str, limits: Limits, *, isolated: bool) -> Run:
    """Run tests against code, in a sandbox.

    Args:
        code: The code under test.
        tests: Texts with tests. Each is run in a namespace of its own.
        reference: Code of a reference solution, which is read but not run. Its imports are the tests' too, and the code
            under test may replace a built-in function for the tests only if the reference does.
        limits: Limits of the run.
        isolated: If True, in namespaces of its own.

    Raises:
        RefusedError: The system refuses the namespaces.
    """
    thread = threading.current_thread()
    known: dict[str, Any] = {}
    for _ in range(_TRIES):
        if thread in _stopped:
            break
        known = {}
        for line in _run_once(code, tests, reference, limits, isolated):
            known |= line
        if "refused" in known:
            raise RefusedError(known["refused"])
        canonical, test = known.get("canonical"), known.get("test", "")
        if "passed" in known:
            names = ("passed", "total", "canonical", "feedback", "broken")
            known["feedback"] = known["feedback"].encode(errors="replace").decode()  # it may hold surrogates
            return Run("done", **{name: known[name] for name in names if name in known})
        if "timeout" in known:
            feedback = f"Time limit of {limits.seconds:g} s exceeded" + (f" in test: {test}" if test else "")
            return Run("timeout", canonical=canonical, feedback=feedback)
    return Run("failure", feedback=f"The run ended without a verdict {known.get('crash', '')}".strip())


def end(threads: Collection[threading.Thread]) -> None:
    """End the current and later runs of some threads."""
    for thread in threads:
        _stopped.add(thread)
        if (process := _running.get(thread)) is not None:
            _kill(process)


def _run_once(code: str, tests: Sequence[str], reference: str, limits: Limits, isolated: bool) -> list[dict[str, Any]]:
    settings = {
        "isolated": isolated, "seconds": limits.seconds, "cpu_seconds": ceil(limits.seconds) + 1,
        "memory": limits.memory_bytes, "file_bytes": _SCRATCH_BYTES, "scratch_bytes": _SCRATCH_BYTES,
        "open_files": _OPEN_FILES,
    }  # fmt: skip
    request = json.dumps({"texts": list(tests), "reference": reference})
    # Threads of numerical libraries take address space; a fixed seed gives sets of texts the same order in each run.
    environment = {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "PYTHONUTF8": "1"}
    if (libraries := os.environ.get("LD_LIBRARY_PATH")) is not None:  # Python may need it to start
        environment["LD_LIBRARY_PATH"] = libraries
    scratch = None if isolated else tempfile.mkdtemp(prefix="opsd-run-")
    thread = threading.current_thread()
    try:
        with tempfile.TemporaryFile() as file:  # a pipe would block while nobody reads
            for frame in (json.dumps(settings), code, request):
                data = frame.encode("utf-8", "surrogatepass")
                file.write(b"%d\n%b" % (len(data), data))
            file.seek(0)
            process = subprocess.Popen(
                # -I without -E: PYTHONHASHSEED is read, and the environment holds nothing else
                [sys.executable, "-s", "-P", str(_SCRIPT), str(os.getpid())],
                stdin=file, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment, cwd=scratch or "/",
                start_new_session=True,  # the parent handles Ctrl-C
            )  # fmt: skip
        _running[thread] = process
        try:
            if thread in _stopped:
                return []
            return _lines(process, limits.seconds + _GRACE_SECONDS)
        finally:
            _kill(process)
            del _running[thread]
            process.wait()
            if process.stdout is not None:
                process.stdout.close()
    finally:
        if scratch is not None:
            remove_tree(Path(scratch))


def _kill(process: subprocess.Popen[bytes]) -> None:
    """Kill a run. Its processes die with it in namespaces, and are in its process group without."""
    with suppress(ProcessLookupError, PermissionError):
        os.killpg(process.pid, signal.SIGKILL)


def _lines(process: subprocess.Popen[bytes], seconds: float) -> list[dict[str, Any]]:
    """Return what a run reports."""
    assert process.stdout is not None
    found, deadline = bytearray(), time.monotonic() + seconds
    with selectors.DefaultSelector() as selector:
        selector.register(process.stdout, selectors.EVENT_READ)
        while len(found) < _MOST_REPORT and (left := deadline - time.monotonic()) > 0:
            if not selector.select(left):
                continue
            part = os.read(process.stdout.fileno(), 1 << 16)
            if not part:
                break
            found += part
    lines = []
    for line in found.splitlines():
        with suppress(ValueError):
            if isinstance(known := json.loads(line), dict):
                lines.append(known)
    return lines
