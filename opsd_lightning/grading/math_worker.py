"""Run math-verify in processes of its own, forked from one that has imported it.

A script, started by ``math_pool``; it imports nothing of this package. It forks a worker for each socket that it is sent. A
question that takes too long ends its worker by the system's alarm: no code of Python runs while sympy computes
``10**10**10``.
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
"""Address space of a worker in bytes. macOS does not limit it."""

# A request: "f" and 0 with a socket asks for a worker on it, "k" and a worker's process id ends that worker.
_REQUEST = struct.Struct("!ci")
_WATCH_SECONDS = 1.0  # between two looks at whether the process above is still there

Compare = Callable[[str, str], bool]


def _load_math_verify() -> Compare:
    """Import math-verify and let its parser learn usual expressions, which every worker then knows."""
    import logging

    import sympy.core.random
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable()
    # As math-verify's default, but for units: it takes the variable of 2h for hours, and 5 km for 5 m.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    forms = [LatexExtractionConfig(normalization_config=spelling), ExprExtractionConfig()]

    def understood(text: str) -> list[object]:
        # The time limits of math-verify are off: the alarm ends the whole process.
        found = parse(rf"$\boxed{{{text}}}$", forms, parsing_timeout=None)
        return found or parse(text, forms, parsing_timeout=None)

    def compare(reference: str, answer: str) -> bool:
        random.seed(0)  # sympy tries random numbers: a verdict must not depend on what was asked before
        sympy.core.random.seed(0)
        try:
            return bool(verify(understood(reference), understood(answer), timeout_seconds=None))
        except MemoryError:
            raise
        except Exception:  # whatever a model wrote that the parser cannot take is a wrong answer
            return False

    for reference, answer in ((r"\frac{x}{2}", "0.5x"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2+2x+1", "(x+1)^2")):
        compare(reference, answer)
    return compare


def _answer_questions(connection: socket.socket, parent: int, compare: Compare) -> NoReturn:
    """Answer questions until the socket is closed or the process above is gone.

    A question is a JSON line ``[reference, answer, seconds]``, the reply ``equal``, ``different`` or ``memory``.
    """
    for number in (signal.SIGALRM, signal.SIGTERM):
        signal.signal(number, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_SETMASK, set())
    for limit, most in ((resource.RLIMIT_AS, MEMORY), (resource.RLIMIT_CORE, 0)):
        with suppress(OSError, ValueError):  # not on every system
            resource.setrlimit(limit, (most, most))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # where memory is short, the system ends this process rather than the training
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
    """Fork and end workers as requested, until the parent is gone; then end all of them."""
    compare = _load_math_verify()
    gc.freeze()  # what workers share with this process stays shared
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
