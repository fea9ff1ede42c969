"""Process that runs code and its tests in a sandbox. ``sandbox`` starts this file as a script for each run.

The script isolates itself and starts two processes. The first process of the new namespace runs the tests and writes the
verdict. Its child runs the code under test, and can neither reach the verdict nor see the tests (``remote_objects``). The
script waits for the end of both, or kills both at the time limit.
"""

from __future__ import annotations

import ast
import builtins
import json
import os
import select
import signal
import socket
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from types import CodeType, ModuleType
from typing import Any, NoReturn

if __name__ == "__main__":  # -P leaves the folder of the package out of the path, and the code under test must not import it
    _FOLDER = os.path.dirname(os.path.dirname(os.path.dirname(os.path.abspath(__file__))))
    sys.path.insert(0, _FOLDER)

from opsd_lightning.grading import isolation
from opsd_lightning.grading.remote_objects import SOLUTION, Client, EndedError, Output, Server, receive, send

if __name__ == "__main__":
    sys.path.remove(_FOLDER)

_WATCH_SECONDS = 0.5  # interval between checks that the parent process is alive
_LONGEST_TEXT = 500  # characters of a test and of its error in the feedback


def _run_code(code: str, connection: int) -> NoReturn:
    """Run the code under test, and serve its objects to the tests."""
    output = Output()
    sys.stdout = sys.stderr = output  # type: ignore[assignment]
    server = Server(connection, output)
    module = ModuleType("solution")
    sys.modules["solution"] = module
    sys.argv = ["solution"]
    namespace = vars(module)
    try:
        canonical = None
        with suppress(RecursionError, MemoryError, SyntaxError, ValueError):
            canonical = ast.unparse(ast.parse(code))
        send(connection, {"canonical": canonical})
        _execute(compile(code, SOLUTION, "exec"), namespace)
        send(connection, {})
    except EndedError:
        os._exit(1)
    except BaseException as error:
        kind = "The code is no Python" if isinstance(error, SyntaxError) and error.filename == SOLUTION else "The code fails"
        send(connection, {"error": f"{kind}: {server.encode_error(error)[4]}"})
        os._exit(0)
    with suppress(EndedError):
        server.serve(namespace)
    os._exit(0)


def _execute(code: CodeType, namespace: dict[str, Any]) -> None:
    """Execute a compiled text with a namespace as its global names."""
    exec(code, namespace)


class _Tests:
    """Runs the tests of a row against the code under test.

    Args:
        client: Connection to the code under test.
        reference: Code of the reference solution, or an empty text. It is not run.
        report: File descriptor for the name of the current test.
    """

    def __init__(self, client: Client, reference: str, report: int) -> None:
        self._client, self._report = client, report
        self.passed = self.total = 0
        #: First failing test with its error.
        self.feedback = ""
        self._reference: list[ast.stmt] = []
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            self._reference = ast.parse(reference).body

    def run(self, text: str) -> None:
        """Run the tests of a text, in a namespace of their own.

        Raises:
            ValueError: The text is no Python, or has no tests.
        """
        try:
            tree = ast.parse(text)
        except SyntaxError as error:
            raise ValueError(f"the tests are no Python: {error}") from None
        namespace = self._namespace()
        failed = before = self.total
        for statement in tree.body:
            shown = ast.get_source_segment(text, statement) or ""
            if _is_test(statement, tree):
                self._try(shown, lambda each=statement: self._statement(each, namespace))
            else:
                failed += self._set_up(shown, statement, namespace)
        for name, function in _functions(tree, namespace):
            self._try(name, function)
        if self.total == before:
            raise ValueError("the tests hold no assert, no test function and no call of a function of theirs")

    def _namespace(self) -> dict[str, Any]:
        found: dict[str, Any] = {"__name__": "tests"}
        defined = {getattr(each, "name", None) for each in self._reference}
        try:
            names = self._client.names()
        except Exception as error:  # names that cannot be read
            raise EndedError from error
        for name, value in names.items():
            if not hasattr(builtins, name) or name in defined:
                found[name] = value
        module = ModuleType("solution")
        vars(module).update(found, __name__="solution")
        sys.modules["solution"] = module
        for each in self._reference:  # tests may use what the reference imports, whatever the code calls by that name
            if isinstance(each, (ast.Import, ast.ImportFrom)):
                with suppress(Exception):
                    self._statement(each, found)
        return found

    def _statement(self, statement: ast.stmt, namespace: dict[str, Any]) -> None:
        if isinstance(statement, ast.Assert) and statement.msg is None and isinstance(statement.test, ast.Compare):
            self._assert_comparison(statement.test, namespace)
        else:
            _execute(compile(ast.Module([statement], []), "<tests>", "exec"), namespace)

    def _assert_comparison(self, test: ast.Compare, namespace: dict[str, Any]) -> None:
        """Run an assert statement, and show the values that it compares if it fails."""
        names = [f"__value{number}" for number in range(len(test.comparators) + 1)]
        values = [test.left, *test.comparators]
        assigned = [ast.Assign([ast.Name(name, ast.Store())], value) for name, value in zip(names, values, strict=True)]
        loaded: list[ast.expr] = [ast.Name(name, ast.Load()) for name in names]
        check = ast.Assert(ast.Compare(loaded[0], test.ops, loaded[1:]))
        for each in [*assigned, check] if len(values) == 2 else [ast.Assert(test)]:
            tree = ast.fix_missing_locations(ast.Module([each], []))
            try:
                _execute(compile(tree, "<tests>", "exec"), namespace)
            except AssertionError as error:
                if each is check and not error.args:
                    raise AssertionError(f"the left side is {_shown(namespace[names[0]])}") from None
                raise

    def _try(self, shown: str, test: Any) -> None:
        self.total += 1
        os.write(self._report, (json.dumps({"test": shown[:_LONGEST_TEXT]}) + "\n").encode())
        try:
            if self._client.ended:
                raise EndedError
            test()
            if self._client.ended:
                raise EndedError
        except BaseException as error:
            self._fail(shown, error)
        else:
            self.passed += 1

    def _set_up(self, shown: str, statement: ast.stmt, namespace: dict[str, Any]) -> int:
        """Run a statement that is not a test. An error counts as a failing test."""
        try:
            self._statement(statement, namespace)
        except BaseException as error:
            self.total += 1
            self._fail(shown, error)
            return 1
        return 0

    def _fail(self, shown: str, error: BaseException) -> None:
        if self.feedback:
            return
        if isinstance(error, EndedError):
            message = "the code ended its process"
        else:
            notes = getattr(error, "__notes__", None)
            message = str(notes[0]) if notes else f"{type(error).__name__}: {_text(error)}".removesuffix(": ")
        self.feedback = f"Test failed: {shown[:_LONGEST_TEXT]}\n{message[:_LONGEST_TEXT]}"


def _text(error: BaseException) -> str:
    try:
        return str(error)
    except BaseException:
        return ""


def _shown(value: Any) -> str:
    try:
        return repr(value)[:_LONGEST_TEXT]
    except BaseException as error:
        return f"a value whose repr fails ({type(error).__name__})"


def _is_test(statement: ast.stmt, tree: ast.Module) -> bool:
    """Return True for a statement with an assert, and for a call of a function that the tests define."""
    if isinstance(statement, (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)):
        return False
    own = {each.name for each in tree.body if isinstance(each, (ast.FunctionDef, ast.AsyncFunctionDef))}
    if isinstance(statement, ast.Expr) and isinstance(statement.value, ast.Call):
        function = statement.value.func
        return isinstance(function, ast.Name) and function.id in own
    if isinstance(statement, ast.If) and "__name__" in ast.dump(statement.test):
        return False
    return any(isinstance(each, ast.Assert) for each in ast.walk(statement))


def _functions(tree: ast.Module, namespace: dict[str, Any]) -> Iterator[tuple[str, Any]]:
    """Yield test functions without arguments, and the test methods of classes, as pytest and unittest find them."""
    called = {
        each.value.func.id
        for each in tree.body
        if isinstance(each, ast.Expr) and isinstance(each.value, ast.Call) and isinstance(each.value.func, ast.Name)
    }
    for each in tree.body:
        if isinstance(each, ast.FunctionDef) and each.name.startswith("test") and each.name not in called:
            yield each.name, namespace.get(each.name)
        elif isinstance(each, ast.ClassDef):
            for method in each.body:
                if isinstance(method, ast.FunctionDef) and method.name.startswith("test"):
                    yield f"{each.name}.{method.name}", _method(namespace.get(each.name), method.name)


def _method(owner: Any, name: str) -> Any:
    def run() -> None:
        import unittest

        if issubclass(owner, unittest.TestCase):
            owner(name).debug()
        else:
            getattr(owner(), name)()

    return run


def _trusted(texts: list[str]) -> frozenset[str]:
    """Return the names of classes, with a capital letter, that tests call for an operand of a comparison or arithmetic."""
    found = set()
    for text in texts:
        with suppress(SyntaxError, ValueError, RecursionError, MemoryError):
            for node in ast.walk(ast.parse(text)):
                operands: list[ast.expr] = []
                if isinstance(node, ast.Compare):
                    operands = [node.left, *node.comparators]
                elif isinstance(node, ast.BinOp):
                    operands = [node.left, node.right]
                for each in operands:
                    if isinstance(each, ast.Call) and isinstance(each.func, ast.Name) and each.func.id[:1].isupper():
                        found.add(each.func.id)
    return frozenset(found)


def _run_tests(settings: dict[str, Any], alive: int, held: int, report: int) -> NoReturn:
    """Start the code under test, run the tests and write the verdict.

    Args:
        settings: Limits of the run.
        alive: Pipe that is closed when the script ends.
        held: Pipe that is closed when this process ends.
        report: File descriptor for the verdict.
    """
    isolation.end_with_parent()
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    if select.select([alive], [], [], 0)[0]:
        os._exit(1)  # the script ended before the line above
    ours, theirs = socket.socketpair()
    connection = theirs.detach()
    code = _read_frame(0).decode("utf-8", "surrogatepass")
    child = os.fork()
    if child == 0:
        isolation.end_with_parent()
        null = os.open("/dev/null", os.O_RDWR)
        for standard in range(3):
            os.dup2(null, standard)
        isolation.close_all_but({0, 1, 2, connection})
        _restrict(settings)
        _run_code(code, connection)
    os.close(connection)
    tests = json.loads(_read_frame(0))
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 2)
    isolation.close_all_but({0, 1, 2, report, alive, held, ours.fileno()})
    _restrict(settings)
    verdict = _verdict(Client(ours.fileno(), _trusted(tests["texts"])), tests, report)
    _say(report, verdict)
    os._exit(0)


def _verdict(client: Client, tests: dict[str, Any], report: int) -> dict[str, Any]:
    verdict: dict[str, Any] = {"passed": 0, "total": 0, "feedback": "", "broken": ""}
    sys.stdout = sys.stderr = Output()  # type: ignore[assignment]
    os.dup2(0, 1)
    try:
        verdict["canonical"] = receive(client._connection)["canonical"]
        _say(report, {"canonical": verdict["canonical"]})
        loaded = receive(client._connection)
        failure = loaded.get("error") if isinstance(loaded, dict) else "The code disturbs its tests"
    except EndedError:
        failure = "The code ended its process"
    if failure is not None:
        return verdict | {"feedback": str(failure)[: 2 * _LONGEST_TEXT]}
    runner = _Tests(client, tests["reference"], report)
    try:
        for text in tests["texts"]:
            runner.run(text)
    except EndedError:
        verdict["feedback"] = "The code ended its process"
        return verdict
    except Exception as error:
        return verdict | {"broken": f"{error}"[:_LONGEST_TEXT]}
    return verdict | {"passed": runner.passed, "total": runner.total, "feedback": runner.feedback}


def _restrict(settings: dict[str, Any]) -> None:
    os.environ.clear()
    if settings["isolated"]:
        isolation.drop_capabilities()
    isolation.limit_resources(settings["memory"], settings["cpu_seconds"], settings["file_bytes"], settings["open_files"])
    if isolation.can_filter():
        isolation.filter_system_calls()


def _say(report: int, message: object) -> None:
    data = (json.dumps(message) + "\n").encode()
    while data:
        data = data[os.write(report, data) :]


def _read_frame(file: int) -> bytes:
    found = b""
    while not found.endswith(b"\n"):
        if not (part := os.read(file, 1)):
            raise EOFError
        found += part
    size, data = int(found), bytearray()
    while len(data) < size:
        if not (part := os.read(file, size - len(data))):
            raise EOFError
        data += part
    return bytes(data)


def main(parent: int) -> None:
    """Read a request from the standard input, run it and write the verdict to the standard output, in lines of JSON."""
    isolation.end_with_parent()
    if os.getppid() != parent:
        return
    settings = json.loads(_read_frame(0))
    with suppress(OSError), open("/proc/self/oom_score_adj", "w") as file:
        file.write("1000")  # if memory runs out, the system kills these processes first, not the training
    report = os.dup(1)
    if settings["isolated"]:
        try:
            if not isolation.can_filter():
                raise OSError("the system calls of this machine are not known")
            isolation.enter_namespaces(settings["scratch_bytes"])
            isolation.end_with_parent()
        except OSError as error:
            _say(report, {"refused": str(error)})
            return
    alive, writer = os.pipe()
    ended, held = os.pipe()  # read by this process, held open by the tests
    child = os.fork()
    if child == 0:
        os.close(writer)
        os.close(ended)
        try:
            _run_tests(settings, alive, held, report)
        except BaseException as error:
            _say(report, {"crash": f"{type(error).__name__}: {error}"})
        finally:
            os._exit(1)
    os.close(held)
    deadline = time.monotonic() + settings["seconds"]
    while (left := deadline - time.monotonic()) > 0 and os.getppid() == parent:
        if select.select([ended], [], [], min(left, _WATCH_SECONDS))[0]:
            break
    else:
        _say(report, {"timeout": True})
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)  # returns when no process is left in the namespace


if __name__ == "__main__":
    main(int(sys.argv[1]))
