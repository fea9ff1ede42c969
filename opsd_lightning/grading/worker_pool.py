"""Thread-safe pools of worker processes with limits on time and memory, for libraries that read a completion's text.

Each job, such as a comparison by math-verify, has a pool. Its server process imports the job's library once (``worker``) and
forks a worker in milliseconds for each concurrent question, so that a timeout costs a fork, not an import.

The process pools of the standard library, `loky` and `pebble` do not fit. Only `pebble` ends a task at its deadline, and it
is under the LGPL. Their spawned workers import the main module of the program, and with it torch (363 MB each, instead of
57 MB here, mostly shared). Their forked workers copy the locks and devices of the training process. None of them ends a
busy worker when its parent is killed, survives a fork of the parent, limits memory, or repeats a question after its worker
was killed.
"""

from __future__ import annotations

import atexit
import json
import os
import socket
import struct
import subprocess
import sys
import threading
import time
import weakref
from collections.abc import Collection
from contextlib import suppress
from pathlib import Path
from typing import Any

_FOLDER = Path(__file__).parent
_REQUEST = struct.Struct("!ci")  # same as in worker
_STARTUP_SECONDS = 120.0  # enough to import sympy on a busy machine
_LONGEST_REPLY = 1 << 20  # bytes
_GRACE_SECONDS = 5.0  # extra time before a worker is ended whose alarm has no effect, such as a stopped process
_LONGEST_SECONDS = 1e7
_MOST_QUESTIONS = 200  # questions for one worker, since the caches of sympy and its parser grow
_MOST_WORKERS = 8
_MOST_DEATHS = 2  # workers that one question may end


class UngradableError(Exception):
    """A question that ended two workers, needs more memory than a worker has, or was cancelled."""


class _DisconnectedError(Exception):
    """The other end of a socket was closed."""


def workers() -> int:
    """Return the number of concurrent workers: the cores of this process divided by the ranks on its machine."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1
    ranks = os.environ.get("LOCAL_WORLD_SIZE") or os.environ.get("WORLD_SIZE") or "1"
    return max(1, min(_MOST_WORKERS, cores // max(1, int(ranks) if ranks.isdecimal() else 1)))


class Pool:
    """Pool of the workers of one process and job. Use `shared`: a forked child gets its own pools.

    Args:
        job: Name of the job's module in this folder.
    """

    def __init__(self, job: str) -> None:
        self.job = job
        self._changed = threading.Condition()  # guards `_idle` and `_busy`
        self._idle: list[_Worker] = []
        self._busy = 0
        self._open: set[socket.socket] = set()
        self._working: dict[threading.Thread, _Worker] = {}  # by the asking thread
        self._stopped: weakref.WeakSet[threading.Thread] = weakref.WeakSet()
        self._starting = threading.Lock()  # guards `_process` and `_control`
        self._process: subprocess.Popen[bytes] | None = None
        self._control: socket.socket | None = None

    def ask(self, question: Any, seconds: float) -> tuple[Any, float]:
        """Ask a worker.

        The time spent waiting for a free worker does not count. If a worker is killed, the question is asked once more.

        Args:
            question: JSON value for the job.
            seconds: Time limit in seconds.

        Returns:
            The job's answer, and the seconds that it took.

        Raises:
            TimeoutError: The question exceeded the time limit.
            UngradableError: The question needed too much memory, ended two workers, or was cancelled by `end`.
        """
        seconds = min(seconds, _LONGEST_SECONDS)
        line = (json.dumps([question, seconds]) + "\n").encode()
        thread = threading.current_thread()
        for _ in range(_MOST_DEATHS):
            worker = self._borrow()
            self._working[thread] = worker
            started, reply = time.monotonic(), list[Any]()
            try:
                reply = worker.ask(line, seconds + _GRACE_SECONDS)
            except (_DisconnectedError, TimeoutError):
                if time.monotonic() - started >= seconds:
                    raise TimeoutError from None
            finally:  # also if a signal handler raises during the wait
                del self._working[thread]
                self._give_back(worker, alive=bool(reply))
            if thread in self._stopped:
                raise UngradableError("cancelled")
            if reply:
                return reply[0], time.monotonic() - started
        raise UngradableError(f"ended {_MOST_DEATHS} workers")

    def end(self, threads: Collection[threading.Thread]) -> None:
        """Cancel the current and later questions of some threads, which raise `UngradableError`."""
        for thread in threads:
            self._stopped.add(thread)
            if (worker := self._working.get(thread)) is not None:
                self._end(worker)

    def _borrow(self) -> _Worker:
        with self._changed:
            self._changed.wait_for(lambda: self._busy < workers())
            self._busy += 1
            worker = self._idle.pop() if self._idle else None
        try:
            while worker is not None and worker.gone:  # the worker was killed while idle
                self._drop(worker)
                with self._changed:
                    worker = self._idle.pop() if self._idle else None
            return worker or self._fork()
        except BaseException:
            with self._changed:
                self._busy -= 1
                self._changed.notify()
            raise

    def _give_back(self, worker: _Worker, alive: bool) -> None:
        keep = alive and worker.asked < _MOST_QUESTIONS
        try:
            if not keep:
                self._drop(worker)
        finally:
            with self._changed:
                self._busy -= 1
                if keep:
                    self._idle.append(worker)
                self._changed.notify()

    def _drop(self, worker: _Worker) -> None:
        """Kill a worker. Closing its socket is not enough if it is stopped or another process has a copy of the socket."""
        self._end(worker)
        self._close(worker.socket)

    def _end(self, worker: _Worker) -> None:
        with self._starting, suppress(OSError):
            if self._control is not None and worker.control is self._control:
                self._control.sendall(_REQUEST.pack(b"k", worker.pid))

    def _fork(self) -> _Worker:
        for _ in range(2):
            with self._starting:
                control = self._ensure_server()
            ours, theirs = socket.socketpair()
            self._open.add(ours)
            try:
                with theirs, self._starting:
                    socket.send_fds(control, [_REQUEST.pack(b"f", 0)], [theirs.fileno()])
                ours.settimeout(_STARTUP_SECONDS)
                return _Worker(ours, control)
            except (OSError, _DisconnectedError):  # the server was killed: start another one
                self._close(ours)
                with self._starting:
                    if self._control is control:
                        self._stop()
            except BaseException:
                self._close(ours)
                raise
        raise self._start_error()

    def _ensure_server(self) -> socket.socket:
        """Return the socket of the server process. Start the server if it is not running."""
        if self._control is not None and self._process is not None and self._process.poll() is None:
            return self._control
        self._stop()
        ours, theirs = socket.socketpair()
        self._open.add(ours)
        with theirs:
            self._process = subprocess.Popen(
                # -P: modules next to the script must not shadow standard ones
                [sys.executable, "-P", str(_FOLDER / "worker.py"), str(os.getpid()), str(_FOLDER / f"{self.job}.py")],
                stdin=theirs.fileno(),
                stdout=subprocess.DEVNULL,
                stderr=subprocess.DEVNULL,
                # A fixed hash seed fixes the order of sympy's terms, and so its verdicts. Threads do not survive a fork.
                env=os.environ | {"PYTHONHASHSEED": "0", "OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1"},
                start_new_session=True,  # the parent handles Ctrl-C
            )
        self._control = ours
        ours.settimeout(_STARTUP_SECONDS)
        try:
            ready = _read_line(ours) == "ready"
        except (_DisconnectedError, TimeoutError):
            ready = False
        if not ready:
            self._stop()
            raise self._start_error()
        return ours

    def stop(self) -> None:
        """End all workers. The next question starts new ones."""
        with self._changed:
            idle, self._idle = self._idle, []
        for worker in idle:
            self._close(worker.socket)
        with self._starting:
            self._stop()

    def _stop(self) -> None:
        process, self._process = self._process, None
        control, self._control = self._control, None
        if control is not None:
            self._close(control)  # the server then kills its workers and exits
        if process is not None:
            try:
                process.wait(timeout=_GRACE_SECONDS)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()

    def _start_error(self) -> RuntimeError:
        problem = f"the process of {self.job} did not start or was killed"
        return RuntimeError(f"{problem}. Check the free memory and the installation of its library")

    def _close(self, connection: socket.socket) -> None:
        self._open.discard(connection)
        connection.close()

    def forget(self) -> None:
        """Close the parent's sockets in a forked child."""
        for connection in list(self._open):
            connection.close()
        if self._process is not None:
            self._process.returncode = 0  # not a child of this process, so there is nothing to wait for


class _Worker:
    """Connection to a worker process."""

    def __init__(self, connection: socket.socket, control: socket.socket) -> None:
        self.socket, self.control = connection, control
        self.asked = 0
        self.pid = int(_read_line(connection))

    @property
    def gone(self) -> bool:
        """True if the worker has ended. An idle worker sends nothing, so any readable data means a closed socket."""
        self.socket.setblocking(False)
        try:
            self.socket.recv(1)
        except BlockingIOError:
            return False
        except OSError:
            pass
        return True

    def ask(self, question: bytes, seconds: float) -> list[Any]:
        """Return a list with the answer.

        Raises:
            UngradableError: The worker ran out of memory.
            _DisconnectedError: The worker has ended.
            TimeoutError: No answer arrived in time.
        """
        self.asked += 1
        self.socket.settimeout(seconds)
        try:
            self.socket.sendall(question)
            reply = json.loads(_read_line(self.socket))
        except TimeoutError:
            raise
        except (OSError, ValueError):
            raise _DisconnectedError from None
        if reply == "memory":
            raise UngradableError("needs more memory than a worker has")
        return list(reply)


def _read_line(connection: socket.socket) -> str:
    """Read a line.

    Raises:
        _DisconnectedError: The other end was closed, or the line is too long.
        TimeoutError: No data arrived within the socket's timeout.
    """
    found = b""
    while not found.endswith(b"\n"):
        try:
            part = connection.recv(4096)
        except TimeoutError:
            raise
        except OSError:
            raise _DisconnectedError from None
        if not part or len(found) > _LONGEST_REPLY:
            raise _DisconnectedError
        found += part
    return found.decode().strip()


_pools: dict[str, Pool] = {}
_making = threading.Lock()


def shared(job: str) -> Pool:
    """Return the pool of a job in this process.

    Args:
        job: Name of a module in this folder with a function ``load``, which returns the function that answers questions, and
            a limit ``MEMORY`` of a worker's address space in bytes. The module imports nothing from this package.
    """
    with _making:
        return _pools.setdefault(job, Pool(job))


def _reset_in_child() -> None:
    global _making
    _making = threading.Lock()
    for pool in _pools.values():
        pool.forget()
    _pools.clear()


def _stop_all() -> None:
    for pool in list(_pools.values()):
        pool.stop()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_reset_in_child)
atexit.register(_stop_all)
