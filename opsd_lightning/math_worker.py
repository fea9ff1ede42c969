"""Run math-verify in a process of its own, so that every comparison ends in bounded time on any thread.

math-verify's own time-out uses ``signal.alarm``, which works on the main thread of a Unix process only, and an answer
such as ``10**10**10`` keeps sympy busy for ever. So this file is started as a script: a question that takes too long
costs that process its life. It imports nothing of this package.
"""

from __future__ import annotations

import atexit
import json
import queue
import subprocess
import sys
import threading

_STARTUP_SECONDS = 120.0  # importing sympy on a busy machine


class Worker:
    """A process that runs math-verify, restarted when a question outlasts its time. Safe from any thread."""

    _shared: Worker | None = None

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.replies = queue.Queue[str]()

    @classmethod
    def shared(cls) -> Worker:
        if cls._shared is None:
            cls._shared = cls()
            atexit.register(cls._shared.stop)
        return cls._shared

    def start(self) -> subprocess.Popen[str]:
        self.process = process = subprocess.Popen(
            [sys.executable, "-P", __file__],  # -P: our types.py must not shadow the standard one
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            start_new_session=True,  # Ctrl-C is the parent's to handle
        )
        self.replies = replies = queue.Queue[str]()
        assert process.stdout is not None
        lines = process.stdout

        def listen() -> None:
            for line in lines:
                replies.put(line)

        threading.Thread(target=listen, daemon=True).start()
        if self._reply(_STARTUP_SECONDS) != "ready":
            self.stop()
            raise RuntimeError("the math-verify process did not start: is `pip install math-verify` complete?")
        return process

    def verify(self, reference: str, answer: str, timeout_seconds: float) -> bool:
        with self.lock:
            process = self.process
            if process is None or process.poll() is not None:
                process = self.start()
            assert process.stdin is not None
            try:
                process.stdin.write(json.dumps([reference, answer]) + "\n")
                process.stdin.flush()
            except BrokenPipeError:
                pass
            reply = self._reply(timeout_seconds)
            if reply is None:
                self.stop()
                raise TimeoutError
            return reply == "equal"

    def _reply(self, timeout_seconds: float) -> str | None:
        try:
            return self.replies.get(timeout=timeout_seconds).strip()
        except queue.Empty:
            return None

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            process.wait()


def _serve() -> None:
    """The worker's loop: a JSON line ``[reference, answer]`` in, ``equal`` or ``different`` out."""
    import logging

    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable()
    # As math-verify's default, but for units: it takes the variable of 2h for hours, and 5 km for 5 m.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    forms = [LatexExtractionConfig(normalization_config=spelling), ExprExtractionConfig()]

    def understood(text: str) -> list[object]:
        # The time limits of math-verify are off: ours ends the whole process.
        found = parse(rf"$\boxed{{{text}}}$", forms, parsing_timeout=None)
        return found or parse(text, forms, parsing_timeout=None)

    print("ready", flush=True)
    for line in sys.stdin:
        try:
            reference, answer = json.loads(line)
            same = verify(understood(reference), understood(answer), timeout_seconds=None)
        except Exception:  # whatever a model wrote that the parser cannot take is a wrong answer
            same = False
        print("equal" if same else "different", flush=True)


if __name__ == "__main__":
    _serve()
