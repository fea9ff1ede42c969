"""Server process that loads a job and forks workers that answer its questions with limited time and memory.

``worker_pool`` starts this file as a script. It imports nothing from this package. The server forks one worker for each
socket that it receives. A question that exceeds its time limit ends its worker by the system's alarm, because no Python
code runs while sympy computes ``10**10**10``.
"""

from __future__ import annotations

import gc
import importlib.util
import json
import os
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import Any, NoReturn

# Requests: b"f" and 0 with a socket forks a worker for it. b"k" and a process id kills that worker.
_REQUEST = struct.Struct("!ci")
_WATCH_SECONDS = 1.0  # interval between checks that the parent process is alive

Answer = Callable[[Any], Any]
"""Function of a job: takes a question and returns its answer, both as JSON values."""


def _load(path: str) -> tuple[Answer, int]:
    """Import a job's module, and return its function and its limit of a worker's address space in bytes."""
    spec = importlib.util.spec_from_file_location("job", path)
    assert spec is not None and spec.loader is not None
    job = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(job)
    return job.load(), job.MEMORY


def _answer_questions(connection: socket.socket, parent: int, answer: Answer, memory: int) -> NoReturn:
    """Answer questions until the socket is closed or the parent process ends.

    A question is a JSON line ``[question, seconds]``. The reply is ``[answer]`` or ``"memory"``.
    """
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    for limit, most in ((resource.RLIMIT_AS, memory), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # some systems do not support the limit
            resource.setrlimit(limit, (most, most))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, the system kills this process first, not the training
    connection.sendall(f"{os.getpid()}\n".encode())
    questions = connection.makefile("rb")
    while True:
        while not select.select([connection], [], [], _WATCH_SECONDS)[0]:
            if os.getppid() != parent:
                os._exit(0)
        line = questions.readline()
        if not line:
            os._exit(0)
        question, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        reply: Any
        try:
            reply = [answer(question)]
        except MemoryError:
            reply = "memory"
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall((json.dumps(reply) + "\n").encode())


def _serve(control: socket.socket, parent: int, job: str) -> None:
    """Fork and kill workers as requested until the parent process ends, then kill all workers."""
    answer, memory = _load(job)
    gc.freeze()  # keep memory pages shared with the forked workers
    own = os.getpid()
    workers: set[int] = set()
    control.sendall(b"ready\n")
    try:
        while os.getppid() == parent:
            if select.select([control], [], [], _WATCH_SECONDS)[0]:
                request, descriptors, _, _ = socket.recv_fds(control, _REQUEST.size, 1)
                if len(request) < _REQUEST.size:
                    break
                kind, number = _REQUEST.unpack(request)
                if kind == b"k" and number in workers:
                    os.kill(number, signal.SIGKILL)
                for descriptor in descriptors:
                    if pid := os.fork():
                        workers.add(pid)
                        os.close(descriptor)
                    else:
                        control.close()
                        _answer_questions(socket.socket(fileno=descriptor), own, answer, memory)
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                    workers.discard(ended)
    finally:
        if os.getpid() == own:
            for number in workers:
                os.kill(number, signal.SIGKILL)
        os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=os.dup(0)), int(sys.argv[1]), sys.argv[2])
