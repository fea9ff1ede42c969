"""Server process that imports math-verify and forks workers for single comparisons with limited time and memory.

``math_pool`` starts this file as a script. It imports nothing from this package. The server forks one worker for each
socket that it receives. A comparison that exceeds its time limit ends its worker by the system's alarm, because no Python
code runs while sympy computes ``10**10**10``.
"""

from __future__ import annotations

import gc
import json
import os
import random
import resource
import select
import signal
import socket
import struct
import sys
from collections.abc import Callable
from contextlib import suppress
from typing import NoReturn

MEMORY = 1 << 30
"""Limit of a worker's address space in bytes. Has no effect on macOS."""

# Requests: b"f" and 0 with a socket forks a worker for it. b"k" and a process id kills that worker.
_REQUEST = struct.Struct("!ci")
_WATCH_SECONDS = 1.0  # interval between checks that the parent process is alive

Compare = Callable[[str, str], bool]


def _load_math_verify() -> Compare:
    """Import math-verify and return a comparison function. Its parser is warmed up, so that workers inherit the caches."""
    import logging

    import sympy.core.random
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable()
    # math-verify's default without units: with units it reads the variable in 2h as hours, and 5 km as 5 m.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    forms = [LatexExtractionConfig(normalization_config=spelling), ExprExtractionConfig()]

    def parsed(text: str) -> list[object]:
        # math-verify's own timeouts are off, because the alarm ends the whole process.
        found = parse(rf"$\boxed{{{text}}}$", forms, parsing_timeout=None)
        return found or parse(text, forms, parsing_timeout=None)

    def compare(reference: str, answer: str) -> bool:
        random.seed(0)  # sympy tests random numbers, and a verdict must not depend on earlier comparisons
        sympy.core.random.seed(0)
        try:
            return bool(verify(parsed(reference), parsed(answer), timeout_seconds=None))
        except MemoryError:
            raise
        except Exception:  # text that the parser cannot handle is a wrong answer
            return False

    for reference, answer in ((r"\frac{x}{2}", "0.5x"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2+2x+1", "(x+1)^2")):
        compare(reference, answer)
    return compare


def _answer_questions(connection: socket.socket, parent: int, compare: Compare) -> NoReturn:
    """Answer questions until the socket is closed or the parent process ends.

    A question is a JSON line ``[reference, answer, seconds]``. The reply is ``equal``, ``different`` or ``memory``.
    """
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
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
        reference, answer, seconds = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, seconds)
        try:
            reply = b"equal\n" if compare(reference, answer) else b"different\n"
        except MemoryError:
            reply = b"memory\n"
        signal.setitimer(signal.ITIMER_REAL, 0)
        connection.sendall(reply)


def _serve(control: socket.socket, parent: int) -> None:
    """Fork and kill workers as requested until the parent process ends, then kill all workers."""
    compare = _load_math_verify()
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
                        _answer_questions(socket.socket(fileno=descriptor), own, compare)
            with suppress(ChildProcessError):
                while (ended := os.waitpid(-1, os.WNOHANG)[0]) != 0:
                    workers.discard(ended)
    finally:
        if os.getpid() == own:
            for number in workers:
                os.kill(number, signal.SIGKILL)
        os._exit(0)


if __name__ == "__main__":
    _serve(socket.socket(fileno=os.dup(0)), int(sys.argv[1]))
