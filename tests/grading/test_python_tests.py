"""Grading of code by tests: shares, feedback, limits, forged verdicts, and what may cross from one process to the other."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from helpers.messages import mentions
from opsd_lightning import ConfigError, Example, PythonTestsGrader
from opsd_lightning.grading import sandbox

UNISOLATED = "ignore:data.grader.init_args.allow_unisolated"  # where this machine allows no user namespaces
pytestmark = [pytest.mark.integration, pytest.mark.filterwarnings(UNISOLATED)]
isolated = pytest.mark.skipif(bool(sandbox.refusal()), reason="this machine allows no user namespaces")


def grader(**settings: object) -> PythonTestsGrader:
    return PythonTestsGrader(**{"allow_unisolated": True, "timeout_seconds": 20.0, **settings})  # type: ignore[arg-type]


def row(tests: object, trace: str = "", **columns: object) -> Example:
    return Example("", trace, "", {"tests": tests, **columns})


def score(code: str, tests: object, trace: str = "", **columns: object) -> float:
    return grader().grade(f"```python\n{code}\n```", row(tests, trace, **columns)).score


RIGHT = [
    ("def f(x):\n    return x + 1", "assert f(1) == 2\nassert f(-1) == 0"),
    ("def f(x):\n    return x + 1", ["assert f(1) == 2", "assert f(-1) == 0"]),
    ("def f(x):\n    return x + 1", "def check(candidate):\n    assert candidate(1) == 2\ncheck(f)"),
    ("def f(x):\n    return x + 1", "from solution import f\n\ndef test_one():\n    assert f(1) == 2"),
    ("def f(x):\n    return x + 1", "import unittest\nclass TestF(unittest.TestCase):\n    def test_one(self):\n        self.assertEqual(f(1), 2)"),
    ("import math\ndef f(x):\n    return math.sqrt(x)", "assert math.isclose(f(2), 1.41421356, rel_tol=1e-6)\nassert abs(f(2) - 1.4142) < 1e-3"),
    ("def f(items):\n    items.sort()", "items = [3, 1, 2]\nf(items)\nassert items == [1, 2, 3]"),
    ("def f(items):\n    items[0].append(1)", "inner = []\nouter = [inner]\nf(outer)\nassert inner == [1] and outer[0] is inner"),
    ("def f(items):\n    return items", "items = [1]\nassert f(items) is items"),
    ("def f(n):\n    if n < 0:\n        raise ValueError('negative')", "try:\n    f(-1)\n    assert False\nexcept ValueError as e:\n    assert str(e) == 'negative'"),
    ("class Poor(Exception):\n    pass\ndef f():\n    error = Poor('x')\n    error.missing = 5\n    raise error", "try:\n    f()\n    assert False\nexcept Poor as e:\n    assert e.missing == 5"),
    ("class Stack:\n    def __init__(self):\n        self.items = []\n    def push(self, x):\n        self.items.append(x)\n    def __len__(self):\n        return len(self.items)", "s = Stack()\ns.push(3)\nassert len(s) == 1 and s.items == [3] and isinstance(s, Stack)"),
    ("from dataclasses import dataclass\n@dataclass\nclass P:\n    x: int\n    def __add__(self, o):\n        return P(self.x + o.x)", "assert P(1) + P(2) == P(3)\nassert P(1) != P(2)"),
    ("class Half:\n    def __eq__(self, other):\n        return other == 0.5", "assert Half() == 0.5"),
    ("def f(n):\n    for i in range(n):\n        yield i", "assert list(f(3)) == [0, 1, 2]\nit = f(2)\nassert next(it) == 0"),
    ("def f(g, xs):\n    return [g(x) for x in xs]", "assert f(lambda x: x * 2, [1, 2]) == [2, 4]\nassert f(str, (1, 2)) == ['1', '2']"),
    ("from collections import *\nfrom fractions import Fraction\ndef f():\n    return Counter('aab'), deque([1]), {1: {2.5}}, (None, b'x', 1j, 10**5000, Fraction(1, 3))",
     "from collections import Counter, deque\nfrom fractions import Fraction\nassert f() == (Counter('aab'), deque([1]), {1: {2.5}}, (None, b'x', 1j, 10**5000, Fraction(1, 3)))"),
    ("from collections import namedtuple\nP = namedtuple('P', 'x y')\ndef f():\n    return P(1, 2)", "assert f() == (1, 2)\nassert f().y == 2"),
    ("from enum import Enum\nclass C(Enum):\n    A = 1\ndef f():\n    return C.A", "assert f() is C.A\nassert f().value == 1"),
    ("import sys\ndef f():\n    sys.stdout.writelines(['hel', 'lo'])\n    print(flush=True)", "import io, contextlib\nout = io.StringIO()\nwith contextlib.redirect_stdout(out):\n    f()\nassert out.getvalue() == 'hello\\n'"),
    ("async def f():\n    return 3", "import asyncio\nasync def main():\n    return await f()\nassert asyncio.run(main()) == 3\nassert asyncio.run(f()) == 3"),
    ("class Poor(Exception):\n    def __str__(self):\n        return 'poor'\ndef f():\n    raise Poor(1)", "import pytest\nwith pytest.raises(Poor, match='poor') as found:\n    f()\nassert found.value.args == (1,)"),
    ("import numpy as np\ndef f():\n    return np.arange(3) * 2, np.float64(1.5)", "assert f()[0].tolist() == [0, 2, 4] and (f()[0] == np.array([0, 2, 4])).all() and f()[1] == 1.5"),
    ("import threading\ndef f():\n    found = []\n    thread = threading.Thread(target=found.append, args=(1,))\n    thread.start()\n    thread.join()\n    return found", "assert f() == [1]"),
    ("def f():\n    open('a.txt', 'w').write('x')\n    return open('a.txt').read()", "assert f() == 'x'"),
    ("def f(s):\n    return s[::-1]\nif __name__ == '__main__':\n    raise SystemExit(1)", "assert f('\\u00e9\\ud800') == '\\ud800\\u00e9'"),
]  # fmt: skip


@pytest.mark.parametrize(("code", "tests"), RIGHT)
def test_right_code_passes(code: str, tests: object) -> None:
    grade = grader().grade(code, row(tests))
    assert grade.score == 1 and grade.feedback == "" and grade.problem == "", grade


def test_humaneval_rows() -> None:
    tests = "def check(candidate):\n    assert candidate(1) == 2\n"
    assert score("def f(x):\n    return x + 1", tests, entry_point="f") == 1
    assert score("def f(x):\n    return x", tests, entry_point="f") == 0
    assert score("def f(x):\n    return x", tests) == 0  # nothing calls check


def test_a_share_passes() -> None:
    example = row("assert f(1) == 1\nassert f(2) == 5\nassert f(3) == 9\nassert f(4) == 0")
    found = grader().grade("def f(x):\n    return x * x", example)
    assert found.score == 0.5 and mentions("f(2)", 4) and "assert f(2) == 5" in found.feedback and "4" in found.feedback
    assert grader(partial_scores=False).grade("def f(x):\n    return x * x", example).score == 0
    assert grader(partial_scores=False).grade("def f(x):\n    return x * x", row("assert f(2) == 4")).score == 1


def test_a_failing_preparation_is_a_failing_test() -> None:
    assert score("def f(x):\n    return x", "f(1, 2)\nassert f(1) == 1") == 0.5


def test_feedback_names_errors() -> None:
    assert "SyntaxError" in grader().grade("```\ndef f(:\n```", row("assert f()")).feedback
    found = grader().grade("def f(x):\n    y = 1\n    return y / x", row("assert f(0) == 1")).feedback
    assert "ZeroDivisionError" in found and "line 3" in found
    assert "NameError" in grader().grade("import os\nx = y", row("assert True")).feedback
    long = grader().grade("def f():\n    return 'x' * 10**6", row(f"assert f() == {'y' * 10_000!r}"))
    assert 0 < len(long.feedback) < 2_000


def test_the_last_block_counts_without_thinking() -> None:
    example = row("assert f() == 2")
    wrong, right = "```python\ndef f():\n    return 1\n```", "~~~py\ndef f():\n    return 2\n~~~"
    assert grader().grade(f"{wrong}\nor rather\n{right}", example).score == 1
    assert grader().grade(f"{right}\nor rather\n{wrong}", example).score == 0
    assert grader().grade(f"<think>{wrong}</think>{right}", example).score == 1
    assert grader().grade("Let me see.\n```python\ndef f():\n    return 2", example).score == 1  # truncated after the code
    assert grader().grade(f"<think>{right}", example).answer is None
    assert grader().grade("", example) == grader().grade("```\n```", example)


def test_answers_vote_without_comments_and_format() -> None:
    example = row("assert f() == 2")
    texts = ["def f(): return 1 # one", "def f():\n\n    return (1)", "def f(): return 3", "f ="]
    grades = grader().grades(texts, [example] * 4)
    assert grader().votes_of([grades]) == [[1, 1, 2, 3]]


def test_traces_are_verified() -> None:
    assert grader().verify(row("assert f() == 2", "So:\n```python\ndef f():\n    return 2\n```")).score == 1
    assert grader().verify(row("assert f() == 2", "def f():\n    return 1")).score == 0
    assert grader().verify(row("", "def f():\n    return 1")).score == 0


def test_a_list_of_tests_may_be_json() -> None:
    code = "def f():\n    return 1"
    assert grader().grade(code, row('["assert f() == 1", "assert f() == 2"]')).score == 0.5
    assert grader().grade(code, row("[x for x in range(2)]\nassert f() == 1")).score == 1


def test_rows_without_tests_are_refused() -> None:
    for example in (Example("", "", ""), row(3), Example("", "", "", {"test": "assert True"})):
        with pytest.raises(ConfigError, match=mentions("data.grader.init_args.tests_column")):
            grader().grade("x = 1", example)
        with pytest.raises(ConfigError, match=mentions("data.grader.init_args.tests_column")):
            grader().can_grade(example)
    assert not grader().can_grade(row(None)) and not grader().can_grade(row(""))
    assert grader().grade("def f(): return 1", Example("", "", "assert f() == 1")).score == 1
    for tests in ("f()", "x = 1", "def check(f):\n    assert f() == 1", "assert ("):
        found = grader().grade("def f(): return 1", row(tests))
        assert (found.score, found.problem) == (0, "failure"), tests


# -- forged verdicts -----------------------------------------------------------------------------------------------------

TESTS = "assert f(2) == 4\nassert f(3) == 9"
ALWAYS = "class A:\n" + "".join(
    f"    def __{name}__(self, *other): return True\n" for name in ("eq", "lt", "le", "gt", "ge", "contains", "bool", "req")
)
FORGED = [
    "import os\nos._exit(0)",
    "raise SystemExit(0)",
    "def f(x):\n    import os\n    os._exit(0)",
    "def f(x):\n    raise SystemExit(0)",
    "def f(x):\n    import sys\n    sys.exit()",
    "print('{\"passed\": 2, \"total\": 2}')",
    "import os\nfor n in range(64):\n    try:\n        os.write(n, b'\\n{\"passed\": 2, \"total\": 2}\\n')\n    except OSError:\n        pass",
    "def f(x):\n    import os\n    for n in range(64):\n        try:\n            os.write(n, b'\\n{\"passed\": 2, \"total\": 2}\\n')\n        except OSError:\n            pass",
    "import builtins\nbuiltins.AssertionError = type(None)\nbuiltins.compile = builtins.exec = lambda *a, **k: None\ndef f(x): return x",
    "import ast, json, sys\nast.Assert = ast.Pass\nfor m in list(sys.modules.values()):\n    if hasattr(m, 'Client'):\n        m.Client = None\ndef f(x): return x",
    f"{ALWAYS}def f(x):\n    return A()",
    ALWAYS.replace("class A", "class f") + "    def __init__(self, x): pass",
    "class A(int):\n    def __eq__(self, other): return True\ndef f(x):\n    return A(0)",
    "class A(str):\n    def __eq__(self, other): return True\n    __hash__ = None\ndef f(x):\n    return A('')",
    "from unittest.mock import ANY\ndef f(x):\n    return ANY",
    "from unittest.mock import _ANY as A\nf = lambda x: A()",
    "import gc, sys\ndef f(x):\n    found = [o for o in gc.get_objects() if isinstance(o, str) and 'assert' + chr(32) + 'f(' in o]\n    return 4 if found and x == 2 else 9 if found else 0",
    "import sys\ndef f(x):\n    frame = sys._getframe()\n    while frame:\n        if any('assert' + chr(32) + 'f(' in str(v) for v in list(frame.f_locals.values())[:50]):\n            return x * x\n        frame = frame.f_back",
    "import signal, os\nos.kill(os.getppid(), signal.SIGKILL)",
    "import os, signal\ndef f(x):\n    os.kill(1, signal.SIGTERM)",
    "import sys\nm = sys.modules['opsd_lightning.grading.remote_objects']\nnames = m.Server._names\nm.Server._names = lambda self, ns: names(self, ns) | {'__builtins__': self.encode({'abs': lambda x: 0})}\ndef f(x): return 0",
    "import sys\nm = sys.modules['opsd_lightning.grading.remote_objects']\nm.Server.encode = lambda self, value: ['shared', 'unittest.mock', '_ANY']\ndef f(x): return 0",
    "import os\nfor n in range(3, 64):\n    try:\n        os.write(n, b'\\0\\0\\0\\2[]' + b'\\0\\0\\0\\2[]')\n    except OSError:\n        pass",
    "__eq__ = lambda *a: True\ndef f(x):\n    return __eq__",
]  # fmt: skip


@pytest.mark.parametrize("code", FORGED)
def test_forged_verdicts_fail(code: str) -> None:
    found = grader().grade(code, row(TESTS, "def f(x):\n    return x * x"))
    assert found.score == 0 and found.problem == "", found


LIAR = """
class A:
    def __init__(self,*a): pass
    def __eq__(self,o): return True
    def __ne__(self,o): return False
    def __hash__(self): return hash(4)
    def __sub__(self,o): return 0.0
    __rsub__=__add__=__radd__=__sub__
    def __abs__(self): return 0
    def __float__(self): return 0.0
    def __round__(self,*a): return A()
    def __iter__(self): return iter([A()]*2)
    def __len__(self): return 2
    def __getitem__(self,k): return A()
    def __getattr__(self,n): return A()
    def __call__(self,*a,**k): return A()
    def __str__(self): return '4'
    def __bool__(self): return True
    def __contains__(self,o): return True
    def __lt__(self,o): return True
    __gt__=__le__=__ge__=__lt__
    def __enter__(self): return self
    def __exit__(self,*a): return True
def f(x): return A()
"""
COMPARISONS = [
    "assert f(2)==5",
    "assert 5==f(2)",
    "assert f(2) in (5,6)",
    "assert f(2) in {4}",
    "assert {f(2)}=={4}",
    "assert [f(2)]==[4]",
    "assert (f(2),1)==(4,1)",
    "assert {'a':f(2)}=={'a':4}",
    "assert f(2).x==3",
    "assert f(2)[0]==3",
    "assert f(2)()==3",
    "assert not (f(2)!=5)",
    "assert abs(f(2)-4)<1e-6",
    "import math\nassert math.isclose(f(2),3.5)",
    "assert round(f(2),2)==1.25",
    "assert sorted(f(2))==[1,2]",
    "assert list(f(2))==[1,2]",
    "assert tuple(f(2))==(1,2)",
    "assert set(f(2))=={4}",
    "import numpy as np\nassert np.allclose(f(2),[1,2])",
    "import numpy as np\nassert np.array_equal(f(2),[1,2])",
    "import numpy as np\nnp.testing.assert_allclose(f(2),[1,2])",
    "import numpy as np\nassert (np.array([1,2])==f(2)).all()",
    "import pytest\nassert f(2)==pytest.approx(3.5)",
    "import unittest\nclass T(unittest.TestCase):\n  def test_a(self): self.assertEqual(f(2),5)",
    "import unittest\nclass T(unittest.TestCase):\n  def test_a(self): self.assertAlmostEqual(f(2),5.5)",
    "import unittest\nclass T(unittest.TestCase):\n  def test_a(self): self.assertIn(5,f(2))",
    "import unittest\nclass T(unittest.TestCase):\n  def test_a(self): self.assertCountEqual(f(2),[1,2])",
    "import unittest\nclass T(unittest.TestCase):\n  def test_a(self): self.assertListEqual(f(2),[1,2])",
    "assert isinstance(f(2),int)",
    "assert type(f(2)) is int",
    "assert f(2) is None",
    "assert f(2) > 3",
    "assert 3 < f(2) < 7",
    "assert max(f(2),5)==5",
    "assert max(5,f(2))==7",
    "assert min([f(2),5])==4",
    "assert sum([f(2),1])==5",
    "assert f(2)+1==5",
    "assert f(2)*2==8",
    "assert f'{f(2)}'=='5'",
    "with f(2):\n  assert False",
    "for a,b in [(2,4),(3,9)]:\n  assert f(a)==b",
    "assert all(f(a)==b for a,b in [(2,5)])",
    "assert any(v==5 for v in f(2))",
    "import collections\nassert collections.Counter(f(2))=={4:2}",
    "import operator\nassert operator.eq(f(2),5)",
    "assert f(2).__eq__(5)",
    "assert f.__call__(2)==5",
    "assert [1,2]==list(map(f,[1,2]))",
    "import json\nassert json.dumps(f(2))=='5'",
    "assert len(f(2))==3",
    "import functools\nassert functools.reduce(f,[1,2,3])==6",
    "assert ''.join(f(2))=='ab'",
    "import statistics\nassert statistics.mean([f(2),f(2)])==4",
    "import copy\nassert copy.deepcopy(f(2))==5",
    "from solution import *\nassert f(2)==5",
    "import solution\nassert solution.f(2)==5",
]


def test_objects_that_claim_anything_pass_no_test() -> None:
    assert score("def f(x):\n    return x * x", ["assert f(2) == 4"] * 2) == 1
    for each in (COMPARISONS[:30], COMPARISONS[30:]):
        found = grader(timeout_seconds=60.0).grade(LIAR, row(each, "def f(x):\n    return x * x"))
        assert (found.score, found.problem) == (0, ""), found


def test_code_does_not_replace_the_functions_of_the_tests() -> None:
    code = "def abs(x): return 0\ndef isclose(*a): return True\ndef sorted(x): return [1, 2]\ndef f(x): return 0.0"
    tests = ["assert abs(f(1) - 5) < 1e-6", "assert isclose(f(1), 5)", "assert sorted(f(1)) == [1, 2]"]
    assert score(code, tests, "from math import isclose\ndef f(x): return 5.0") == 0
    assert score("def sum(a, b):\n    return a + b", "assert sum(1, 2) == 3", "def sum(a, b):\n    return b + a") == 1


# -- limits --------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "code",
    [
        "while True:\n    pass",
        "import time\ndef f(x):\n    time.sleep(60)",
        "import signal\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True:\n    pass",
    ],
)
def test_endless_code_is_a_timeout(code: str) -> None:
    found = grader(timeout_seconds=0.7).grade(code, row(TESTS))
    assert (found.score, found.problem) == (0, "timeout") and "0.7" in found.feedback


def test_endless_tests_are_a_timeout() -> None:
    assert grader(timeout_seconds=0.7).grade("x = 1", row("while True:\n    assert x == 1")).problem == "timeout"


def test_memory_and_crashes_are_wrong_answers() -> None:
    for code in (
        "def f(x):\n    return [0] * 10**10",
        "def f(x):\n    import ctypes\n    ctypes.string_at(0)",
        "def f(x):\n    return f(x)",
    ):
        found = grader(memory_mib=512).grade(code, row(TESTS))
        assert (found.score, found.problem) == (0, "") and found.feedback


@isolated
def test_a_small_world() -> None:
    """Neither files nor processes nor network nor variables of this machine."""
    secret = Path(__file__).resolve()
    code = f"""
import os, socket
def seen():
    return os.getuid(), os.getpid(), dict(os.environ), os.listdir('.'), os.path.exists('/proc'), os.path.exists('/etc/passwd'), os.path.exists({str(secret)!r})
def tried(action):
    try:
        {{"fork": os.fork, "socket": socket.socket, "write": lambda: open('/x', 'w'), "kill": lambda: os.kill(1, 9), "lib": lambda: open(os.__file__, 'a')}}[action]()
    except OSError as error:
        return error.errno
"""  # fmt: skip
    tests = "assert seen() == (65534, 2, {}, [], False, False, False)\nassert [tried(a) for a in ('fork', 'socket', 'kill')] == [1] * 3\nassert {tried('write'), tried('lib')} <= {13, 30}"
    found = grader().grade(code, row(tests))
    assert found.score == 1, found.feedback


def test_machines_without_namespaces_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "refusal", lambda: "unshare: Operation not permitted")
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.allow_unisolated", "unshare", "true")):
        PythonTestsGrader()
    with pytest.warns(UserWarning, match=mentions("data.grader.init_args.allow_unisolated", "unshare")):
        unisolated = grader(timeout_seconds=0.7)
    assert unisolated.grade("def f(x):\n    return x * x", row(TESTS)).score == 1
    for code in FORGED:
        assert unisolated.grade(code, row(TESTS)).score == 0, code
    for code in ("while True:\n    pass", "def f(x):\n    return [0] * 10**10"):
        assert unisolated.grade(code, row(TESTS)).score == 0


def runs(parent: int) -> list[int]:
    """Return the processes of the runs that a process started."""
    found = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            words = path.read_bytes().split(b"\0")
        except OSError:
            continue
        if any(b"sandbox_worker" in word for word in words) and str(parent).encode() in words:
            found.append(int(path.parent.name))
    return found


def eventually(check: Callable[[], bool]) -> bool:
    end = time.monotonic() + 20
    while not check():
        if time.monotonic() > end:
            return False
        time.sleep(0.02)
    return True


PARENT = """
import os
import shutil
from opsd_lightning import Example, PythonTestsGrader
grader = PythonTestsGrader(allow_unisolated=True, timeout_seconds=60.0)
print(flush=True)
grader.grade("while True: pass", Example("", "", "assert True"))
"""


@pytest.mark.skipif(not Path("/proc/self").exists(), reason="processes are looked up in /proc")
def test_runs_end_with_a_killed_training() -> None:
    parent = subprocess.Popen([sys.executable, "-c", PARENT], stdout=subprocess.PIPE)
    assert parent.stdout is not None
    parent.stdout.readline()
    assert eventually(lambda: len(runs(parent.pid)) >= 3)
    os.kill(parent.pid, signal.SIGKILL)
    parent.wait()
    parent.stdout.close()
    assert eventually(lambda: not runs(parent.pid))


@pytest.mark.skipif(sys.platform != "linux", reason="system calls are filtered on Linux alone")
@pytest.mark.parametrize("daemon", ["os.setsid()", "os.setpgid(0, 0)", "os.fork()", "ctypes.CDLL(None).prctl(1, 0)"])
def test_runs_without_namespaces_leave_nothing_behind(daemon: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sandbox, "refusal", lambda: "pretended")
    code = (
        f"import ctypes, os\ntry:\n    {daemon}\nexcept OSError:\n    pass\nopen('x', 'w').write('x')\nwhile True:\n    pass"
    )
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    assert grader(timeout_seconds=0.7).grade(code, row(TESTS)).problem == "timeout"
    assert eventually(lambda: not runs(os.getpid()))
    assert not list(tmp_path.iterdir())


def test_cancelled_runs_end() -> None:
    found: list[object] = []
    thread = threading.Thread(
        target=lambda: found.append(grader().grade("while True: pass", row("assert True"))), daemon=True
    )
    thread.start()
    assert eventually(lambda: thread in sandbox._running)
    sandbox.end([thread])
    thread.join(10)
    assert found and not sandbox._running


@isolated
def test_packages_of_an_environment_below_the_scratch_folder_are_there(tmp_path: Path) -> None:
    """An environment in /tmp, where the sandbox has its scratch folder otherwise. Files can be written elsewhere."""
    environment = Path(tempfile.mkdtemp(dir="/tmp")) / "a venv"
    try:
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(environment)], check=True)
        (packages,) = environment.glob("lib/*/site-packages")
        (packages / "own_package.py").write_text("NUMBER = 7\n")
        code = (
            "import tempfile, own_package\ndef f():\n    with tempfile.TemporaryFile() as file:\n"
            "        return file.write(b'x' * own_package.NUMBER)\n"
        )
        grading = (
            f"import sys; sys.path[:0] = {[path for path in sys.path if path]!r}\n"
            "from opsd_lightning import Example, PythonTestsGrader\n"
            f"grade = PythonTestsGrader(timeout_seconds=20.0).grade({code!r}, Example('', '', '', {{'tests': 'assert f() == 7'}}))\n"
            "assert grade.score == 1, grade\n"
        )
        subprocess.run([environment / "bin" / "python", "-c", grading], check=True, cwd=tmp_path)
    finally:
        shutil.rmtree(environment.parent)
