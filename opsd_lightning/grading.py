"""Find the final answer of a text and decide whether it equals the reference, in bounded time anywhere.

math-verify decides equality. Its own time-out uses ``signal.alarm``, which works on the main thread of a Unix process
only, and an answer such as ``10**10**10`` keeps sympy busy for ever. So it runs in a process of its own, this file
started as a script: a question that takes too long costs that process its life and counts as wrong.
"""

from __future__ import annotations

import atexit
import json
import queue
import re
import subprocess
import sys
import threading
from dataclasses import dataclass

from jsonargparse.typing import PositiveFloat

_NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?"
_STARTUP_SECONDS = 120.0  # importing sympy on a busy machine


def last_boxed(text: str) -> str | None:
    """The content of the last complete ``\\boxed{...}``, braces balanced, or None. One pass: linear in the text."""
    last: tuple[int, int] | None = None
    opened: list[tuple[bool, int]] = []  # is it a box, and where its content starts
    for brace in re.finditer(r"\\boxed\{|[{}]", text):
        if brace[0] != "}":
            opened.append((brace[0] != "{", brace.end()))
        elif opened:
            box, start = opened.pop()
            if box and (last is None or start > last[0]):
                last = (start, brace.start())
    return None if last is None else text[last[0] : last[1]].strip()


@dataclass(frozen=True)
class MathGrader:
    """Grades the final answer of a completion against the reference.

    The final answer is the last ``\\boxed{...}`` of the text, otherwise the last match of ``answer_pattern``,
    otherwise there is none and the completion is wrong.

    Args:
        answer_pattern: Regular expression whose first group is the answer, used where nothing is boxed. The default
            finds "The answer is 42" and the "#### 42" of GSM8K.
        timeout_seconds: The longest that one comparison may take before it counts as wrong.
    """

    answer_pattern: str = rf"(?i)(?:####|answer\s*(?:is|:|=))\s*({_NUMBER})"
    timeout_seconds: PositiveFloat = 5.0

    def __post_init__(self) -> None:
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"grader.answer_pattern is not a regular expression: {error}") from None
        if groups < 1:
            raise ValueError("grader.answer_pattern has no group: put the answer's part in parentheses")

    def find_answer(self, text: str) -> str | None:
        """The final answer that a text gives, or None."""
        boxed = last_boxed(text)
        if boxed is not None:
            return boxed
        matches = re.findall(self.answer_pattern, text)
        if not matches:
            return None
        return (matches[-1] if isinstance(matches[-1], str) else matches[-1][0]).strip()

    def equal(self, answer: str | None, reference: str) -> bool:
        """Whether an answer equals the reference, mathematically; False where that takes too long."""
        if answer is None:
            return False
        if answer.strip() == reference.strip():
            return True
        return _Worker.shared().verify(reference, answer, self.timeout_seconds)

    def grade(self, completion: str, reference: str) -> bool:
        """Whether a completion's final answer equals the reference."""
        return self.equal(self.find_answer(completion), reference)


class _Worker:
    """A process that runs math-verify, restarted when a question outlasts its time. Safe from any thread."""

    _shared: _Worker | None = None

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None
        self.replies = queue.Queue[str]()

    @classmethod
    def shared(cls) -> _Worker:
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

    from math_verify import parse, verify

    logging.disable()

    def understood(text: str) -> list[object]:
        # The time limits of math-verify are off: ours ends the whole process.
        found = parse(rf"$\boxed{{{text}}}$", parsing_timeout=None)
        return found or parse(text, parsing_timeout=None)

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
