"""Grade the Python code of completions by tests, in a sandbox."""

from __future__ import annotations

import json
import re
import threading
import warnings
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from opsd_lightning.grading import sandbox
from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.grading.final_answer import strip_thinking
from opsd_lightning.grading.worker_pool import workers
from opsd_lightning.types import ConfigError, Example, PositiveFloat, PositiveInt, checked

_FENCE = re.compile(r"^[ ]{0,3}(`{3,}|~{3,})([^\n`]*)\n(.*?)(?:^[ ]{0,3}\1[`~]*[ \t]*$|\Z)", re.MULTILINE | re.DOTALL)
_LONGEST_CODE = 100_000
_SETTING = "data.grader.init_args"


@checked
@dataclass(frozen=True)
class PythonTestsGrader(Grader):
    r"""Grader that runs the Python code of a completion against tests, in a sandbox.

    The code is the last fenced block of the completion, or the whole completion if it has none. Thinking blocks are
    skipped. The score is the share of the tests that pass, and 0 if the code itself raises an exception. The feedback is the
    first failing test with its error.

    Tests are Python texts with ``assert`` statements. They see the code's global names, also as a module ``solution``. Each
    of these counts as one test: a statement at the top with an ``assert`` in it, a call of a function that the text defines,
    such as HumanEval's ``check(f)``, a function ``test...`` without arguments, and a method ``test...`` of a class. A text
    that defines ``check`` without calling it is called with the row's ``entry_point``. Other statements prepare the tests.
    One that fails counts as a failing test.

    Tests run in another process than the code, so that the code cannot change its grade: it may print, exit and replace what
    it likes. Arguments and results are copied from one process to the other. So tests cannot pass instances of their own
    classes or derive classes from the code's, and an object of the code does not equal plain data by its own ``__eq__``,
    unless the tests compare a call of its class. ``data.verify`` finds rows whose reference solution fails.
    ``docs/reliability.md`` describes the sandbox and what it leaves possible.

    A run that exceeds its time limit has the problem ``timeout``. Code that needs too much memory or crashes is wrong,
    without a problem. ``failure`` is a run that ended without a verdict twice, or tests that cannot be run.

    Args:
        tests_column: Column with the tests of a row: a text, or a list of texts that are run one after another, each with
            global names of its own. In CSV, the list is its JSON text. The reference answer is used if the row does not have
            the column.
        partial_scores: If False, the score is 1 if all tests pass, otherwise 0.
        timeout_seconds: Time limit of the code and its tests in seconds of wall-clock time.
        memory_mib: Limit of the code's address space in MiB. The tests' process has the same limit.
        allow_unisolated: If True, code runs without namespaces on machines that do not allow them. It can then read and
            write what the user can. Limits on time and memory still hold. Otherwise such machines are refused.

    Raises:
        ConfigError: The machine does not allow namespaces, and ``allow_unisolated`` is False. Or a row has no tests.

    Example::

        >>> from opsd_lightning import Example, PythonTestsGrader
        >>> grader = PythonTestsGrader(allow_unisolated=True)
        >>> row = Example("Write double(x).", "", "", {"tests": "assert double(2) == 4\nassert double('a') == 'aa'"})
        >>> grader.grade("```python\ndef double(x):\n    return 2 * x\n```", row).score
        1.0
        >>> print(grader.grade("```python\ndef double(x):\n    return x ** 2\n```", row).feedback)
        Test failed: assert double('a') == 'aa'
        TypeError: unsupported operand type(s) for ** or pow(): 'str' and 'int' (line 2 of the code)
    """

    tests_column: str = "tests"
    partial_scores: bool = True
    timeout_seconds: PositiveFloat = 10.0
    memory_mib: PositiveInt = 1024
    allow_unisolated: bool = False

    def __post_init__(self) -> None:
        if not (reason := sandbox.refusal()):
            return
        if not self.allow_unisolated:
            raise _refused(reason)
        warnings.warn(f"{_SETTING}.allow_unisolated: the model's code runs with your rights ({reason})", stacklevel=4)

    @property
    def concurrent_calls(self) -> int:
        return workers()

    def can_grade(self, example: Example) -> bool:
        held = example.columns.get(self.tests_column) or example.answer
        missing = not held and self.tests_column not in example.columns  # an error names the setting
        return bool((held or missing) and self._tests(example))

    def grade(self, completion: str, example: Example) -> Grade:
        """Run the code of a completion against the tests of its row."""
        code = _code(strip_thinking(completion) or "")
        if not code.strip():
            return Grade(0.0, feedback="The completion holds no code")
        if len(code) > _LONGEST_CODE:
            return Grade(0.0, feedback=f"The code is longer than {_LONGEST_CODE} characters")
        limits = sandbox.Limits(self.timeout_seconds, self.memory_mib << 20)
        isolated = not self.allow_unisolated or not sandbox.refusal()
        try:
            run = sandbox.run(code, self._tests(example), _code(example.trace), limits, isolated=isolated)
        except sandbox.RefusedError as error:  # of a grader that was made on another machine
            raise _refused(str(error)) from None
        answer = run.canonical or code
        if run.status != "done":
            return Grade(0.0, answer, run.feedback, run.status)
        if run.broken:
            return Grade(0.0, answer, f"The tests of this row cannot be run: {run.broken}", "failure")
        share = run.passed / run.total if run.total else 0.0
        return Grade(share if self.partial_scores else float(share == 1), answer, run.feedback)

    def verify(self, example: Example) -> Grade:
        """Run the code of the trace against the tests. A row whose column has no tests is wrong."""
        found = example.columns.get(self.tests_column)
        if isinstance(found, (str, list, tuple)) and not "".join(map(str, found)).strip():
            return Grade(0.0, feedback=f"The column {self.tests_column!r} holds no tests")
        return self.grade(example.trace, example)

    def cancel(self, threads: Sequence[threading.Thread]) -> None:
        sandbox.end(threads)

    def _tests(self, example: Example) -> list[str]:
        found: Any = example.columns.get(self.tests_column)
        if found is None:
            found = example.answer
        texts = _listed(found) if isinstance(found, str) else found
        if not isinstance(texts, Sequence) or not all(isinstance(text, str) for text in texts):
            raise ConfigError(
                f"the column {self.tests_column!r} holds a {type(found).__name__}",
                f"{_SETTING}.tests_column",
                "Name a column with a text, or a list of texts",
            )
        if not any(text.strip() for text in texts):
            raise ConfigError(
                f"a row has neither a column {self.tests_column!r} nor an answer with tests",
                f"{_SETTING}.tests_column",
                f"Name the column with the tests. This row has {', '.join(map(repr, example.columns)) or 'no columns'}",
            )
        return [_with_check(text, example.columns) for text in texts]


def _listed(text: str) -> list[str]:
    """Return the texts of a JSON list, or the text itself."""
    if text.lstrip().startswith("["):
        with suppress(ValueError, RecursionError):
            found = json.loads(text)
            if found and all(isinstance(each, str) for each in found):
                return list(found)
    return [text]


def _refused(reason: str) -> ConfigError:
    return ConfigError(
        f"this machine does not let code run isolated in Linux namespaces ({reason})",
        f"{_SETTING}.allow_unisolated",
        "Allow unprivileged user namespaces (Linux 5.12 or later), or set it to true to run the code with your rights",
    )


def _code(text: str) -> str:
    """Return the last fenced block of a text, or the text. The last block need not be closed."""
    blocks = [match[3] for match in _FENCE.finditer(text)]
    return blocks[-1] if blocks else text


def _with_check(tests: str, columns: Mapping[str, Any]) -> str:
    """Add the call of HumanEval's function ``check``."""
    name = columns.get("entry_point")
    defined, called = (re.search(pattern, tests, re.MULTILINE) for pattern in (r"^def check\(", r"^check\("))
    if isinstance(name, str) and name.isidentifier() and defined and not called:
        return f"{tests}\n\ncheck({name})\n"
    return tests
