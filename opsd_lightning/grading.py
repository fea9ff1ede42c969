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
from collections.abc import Sequence
from dataclasses import dataclass
from functools import lru_cache

from jsonargparse.typing import PositiveFloat

_NUMBER = r"[-+]?\$?\d[\d,]*(?:\.\d+)?(?:\s*/\s*\d+)?"
_INTEGER = re.compile(r"-?[0-9]{1,18}")
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
            finds "The answer is 42" and the "#### 42" of GSM8K. Null: only what is boxed counts.
        timeout_seconds: The longest that one comparison may take before it counts as wrong.
    """

    answer_pattern: str | None = rf"(?i)(?:####|answer\s*(?:is|:|=))\s*({_NUMBER})"
    timeout_seconds: PositiveFloat = 5.0

    def __post_init__(self) -> None:
        if self.answer_pattern is None:
            return
        try:
            groups = re.compile(self.answer_pattern).groups
        except re.error as error:
            raise ValueError(f"grader.answer_pattern is not a regular expression: {error}") from None
        if groups < 1:
            raise ValueError("grader.answer_pattern has no group: put the answer's part in parentheses")

    def find_answer(self, text: str) -> str | None:
        """The final answer that a text gives, or None."""
        boxed = last_boxed(text)
        if boxed is not None or self.answer_pattern is None:
            return boxed
        matches = re.findall(self.answer_pattern, text)
        if not matches:
            return None
        return (matches[-1] if isinstance(matches[-1], str) else matches[-1][0]).strip()

    def equal(self, answer: str | None, reference: str) -> bool:
        """Whether an answer equals the reference, mathematically; False where that takes too long."""
        return answer is not None and bool(_compare(reference.strip(), answer.strip(), self.timeout_seconds))

    def grade(self, completion: str, reference: str) -> bool:
        """Whether a completion's final answer equals the reference."""
        return self.equal(self.find_answer(completion), reference)

    def votes(self, answers: Sequence[str | None], correct: Sequence[bool]) -> list[int | None]:
        """Which of one question's answers are one vote, because they are mathematically equal ("0.5" and "1/2").

        Correct answers are one vote. Each wrong one is compared with the first of every wrong vote so far; once a
        comparison took too long, neither of the two is compared again, so that no more comparisons run into their time
        limit than there are different answers.

        Args:
            answers: The final answer of each completion, None where there is none.
            correct: Whether each is right.

        Returns:
            The number of each answer's vote: 0 for the correct ones, from 1 on in order of appearance for the others, None
            where there is no answer.
        """
        known: dict[str, int] = {}  # wrong answers, as they are written
        firsts: list[str | None] = []  # of each wrong vote the answer that others are compared with
        found: list[int | None] = []
        for answer, right in zip(answers, correct, strict=True):
            if answer is None or right:
                found.append(None if answer is None else 0)
                continue
            answer = answer.strip()
            if answer not in known:
                vote, comparable = len(firsts), True
                for place, first in enumerate(firsts):
                    same = None if first is None else _compare(first, answer, self.timeout_seconds)
                    if same:
                        vote = place
                        break
                    if same is None and first is not None:
                        firsts[place], comparable = None, False
                        break
                if vote == len(firsts):
                    firsts.append(answer if comparable else None)
                known[answer] = vote + 1
            found.append(known[answer])
        return found


def _compare(reference: str, answer: str, timeout_seconds: float) -> bool | None:
    """Whether two answers are equal; None where that takes too long."""
    try:
        if _INTEGER.fullmatch(answer) and _INTEGER.fullmatch(reference):
            return int(answer) == int(reference)  # what math-verify would say, without its process
        return answer == reference or _verdict(reference, answer, timeout_seconds)
    except TimeoutError:
        return None


@lru_cache(maxsize=65536)  # time-outs are not remembered: a busy machine may have caused them
def _verdict(reference: str, answer: str, timeout_seconds: float) -> bool:
    return _Worker.shared().verify(reference, answer, timeout_seconds)


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
