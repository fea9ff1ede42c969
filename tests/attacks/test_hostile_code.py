"""Attacks with code that is to crash, stop or deceive its grader, or to leave its sandbox: wrong in time, nothing left behind."""

from __future__ import annotations

import hashlib
import os
import random
import signal
import socket
import subprocess
import sys
import tempfile
import textwrap
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import pytest

from helpers.attack import Attack
from opsd_lightning.grading import sandbox
from opsd_lightning.grading.python_tests import PythonTestsGrader
from opsd_lightning.grading.worker_pool import workers
from opsd_lightning.types import Example

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(bool(sandbox.refusal()), reason="this machine allows no user namespaces"),
]

SECONDS = 1.0
GRADER = PythonTestsGrader(timeout_seconds=SECONDS, memory_mib=512) if not sandbox.refusal() else None
C = "import ctypes\nlibc = ctypes.CDLL(None)\n"


class Target:
    """Parts of this machine that the code tries to reach.

    Args:
        folder: Folder with files that everyone may write.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.secret = "a-secret-" + hashlib.sha256(str(folder).encode()).hexdigest()[:16]
        folder.mkdir()
        for name in ("a.txt", "b.txt"):
            (folder / name).write_text(self.secret)
            (folder / name).chmod(0o666)
        folder.chmod(0o777)
        self.victim = subprocess.Popen(["sleep", "3600"])
        self.server = socket.create_server(("127.0.0.1", 0))
        self.server.settimeout(0.1)
        self.port: int = self.server.getsockname()[1]
        self.connections = 0
        self._over = False
        self._thread = threading.Thread(target=self._accept, daemon=True)
        self._thread.start()

    def _accept(self) -> None:
        while not self._over:
            try:
                self.server.accept()[0].close()
                self.connections += 1
            except TimeoutError:
                continue

    def state(self) -> dict[str, object]:
        """Return everything that an attack may change."""
        files = {path.name: (path.read_text(), path.stat().st_mode) for path in sorted(self.folder.iterdir())}
        parts = ("mountinfo", "cgroup", "uid_map", "limits", "oom_score_adj", "attr/current")
        own = {name: Path(f"/proc/self/{name}").read_text() for name in parts if readable(Path(f"/proc/self/{name}"))}
        return own | {
            "files": files,
            "mode": self.folder.stat().st_mode,
            "victim": self.victim.poll(),
            "connections": self.connections,
            "host": socket.gethostname(),
            "shared memory": Path("/proc/sysvipc/shm").read_text() if readable(Path("/proc/sysvipc/shm")) else "",
            "temporary files": sorted(os.listdir(tempfile.gettempdir())),
            "made": sorted(
                str(path)
                for path in (Path("/opsd-was-here"), Path("/tmp/opsd-was-here"), Path("/dev/shm/opsd-was-here"))
                if path.exists()
            ),
            "python": sorted(
                path.name for folder in (sys.prefix, os.path.dirname(os.__file__)) for path in Path(folder).glob("opsd-*")
            ),
        }

    def close(self) -> None:
        self._over = True
        self._thread.join()
        self.server.close()
        self.victim.kill()
        self.victim.wait()


def readable(path: Path) -> bool:
    try:
        path.read_text()
    except OSError:
        return False
    return True


@contextmanager
def signals_counted() -> Iterator[list[int]]:
    """Count signals that reach this process."""
    found: list[int] = []

    def note(number: int, frame: FrameType | None) -> None:
        found.append(number)

    numbers = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP, signal.SIGALRM, signal.SIGINT)
    before = {number: signal.signal(number, note) for number in numbers}
    try:
        yield found
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def runs() -> set[int]:
    """Return the processes of this test's runs, and those that a run might start, which have another command line."""
    found, own = set(), os.readlink("/proc/self/ns/pid")
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            is_run = any(b"sandbox_worker" in word for word in words)
            if str(os.getpid()).encode() in words if is_run else os.readlink(path / "ns/pid") != own:
                found.add(int(path.name))
        except OSError:
            continue
    return found


# -- bodies that attack ---------------------------------------------------------------------------------------------------

Family = Callable[[random.Random, Target], str]


def _processes(rng: random.Random, target: Target) -> str:
    n = rng.choice([1, 50, 10_000])
    return rng.choice([
        f"import os\nfor _ in range({n}):\n    os.fork()",
        "import os\nwhile True:\n    try:\n        os.fork()\n    except OSError:\n        pass",
        f"import subprocess, sys\nfor _ in range({n}):\n    subprocess.Popen([sys.executable, '-c', 'while True: pass'])",
        "import multiprocessing as m\nm.Process(target=print).start()",
        f"import os\nfor _ in range({n}):\n    os.system('sleep 100 &')",
        "import os\nos.posix_spawn('/bin/sh', ['sh'], {})",
        "import os, sys\nos.execv(sys.executable, [sys.executable, '-c', 'while True: pass'])",
        f"{C}for number in (56, 57, 58, 220, 435):\n    for flags in (0, 17, 0x100, 0x4000, 0x10000000, 0x2000000):\n        libc.syscall(number, flags, 0, 0, 0, 0)",
        f"import threading, time\nfor _ in range({n}):\n    threading.Thread(target=time.sleep, args=(1000,)).start()",
        "import concurrent.futures as c\nwith c.ProcessPoolExecutor(50) as pool:\n    list(pool.map(abs, range(50)))",
        "import os\nif os.fork() == 0:\n    os.setsid()\n    if os.fork() == 0:\n        while True:\n            pass",
        "import os\nos.setsid()\nos.setpgid(0, 0)\nwhile True:\n    pass",
        "import pty\npty.spawn('/bin/sh')",
    ])  # fmt: skip


def _memory(rng: random.Random, target: Target) -> str:
    size = rng.choice([2 * 10**9, 10**10, 10**12])
    return rng.choice([
        f"x = [0] * {size}",
        f"x = bytearray({size})",
        "x = []\nwhile True:\n    x.append(bytearray(10**6))",
        "x = 'a'\nwhile True:\n    x += x",
        f"import mmap\nx = mmap.mmap(-1, {size})\nx.write(b'a' * 10**6)",
        f"import os\nfile = os.memfd_create('x')\nos.truncate(file, {size})\nwhile True:\n    os.write(file, b'a' * 10**6)",
        f"{C}for key in range(1000):\n    n = libc.shmget(key, 10**8, 0o1777)\n    p = libc.shmat(n, 0, 0)",
        "x = {}\nwhile True:\n    x[len(x)] = str(len(x)) * 1000",
        "import os\nx = [os.pipe() for _ in range(100000)]",
        "x = 7\nwhile True:\n    x = x * x",
        "import numpy\nx = [numpy.ones(10**7) for _ in range(1000)]",
        "import resource\nresource.setrlimit(resource.RLIMIT_AS, (-1, -1))\nx = [0] * 10**10",
    ])  # fmt: skip


def _endless(rng: random.Random, target: Target) -> str:
    return rng.choice([
        "while True:\n    pass",
        "while True:\n    try:\n        while True:\n            pass\n    except BaseException:\n        pass",
        "import time\ntime.sleep(10**6)",
        "import signal, sys\nsignal.pthread_sigmask(signal.SIG_BLOCK, range(1, 65))\nwhile True:\n    pass",
        "import signal\nfor n in range(1, 65):\n    try:\n        signal.signal(n, signal.SIG_IGN)\n    except (OSError, ValueError):\n        pass\nwhile True:\n    pass",
        "import re\nre.match('(a+)+$', 'a' * 60 + 'b')",
        "x = 10**10**9",
        "sum(range(10**14))",
        "import os\nr, w = os.pipe()\nos.read(r, 1)",
        "import threading\nlock = threading.Lock()\nlock.acquire()\nlock.acquire()",
        "import os\nos.mkfifo('x')\nopen('x').read()",
        "input()\nwhile True:\n    pass",
        "import itertools\nlist(itertools.count())",
    ])  # fmt: skip


def _files(rng: random.Random, target: Target) -> str:
    path = rng.choice([str(target.folder / "a.txt"), str(target.folder / "new.txt"), "/opsd-was-here", "/tmp/../opsd-was-here", "/etc/passwd",
                       "/dev/shm/opsd-was-here", os.path.join(sys.prefix, "opsd-x"), os.path.join(os.path.dirname(os.__file__), "opsd-x"), "/proc/self/mem"])  # fmt: skip
    return rng.choice([
        f"open({path!r}, 'w').write('broken')",
        f"import os\nos.remove({path!r})",
        f"import os\nos.chmod({str(target.folder)!r}, 0)\nos.rename({path!r}, {path + 'x'!r})",
        f"import os\nos.symlink({path!r}, 'link')\nopen('link', 'a').write('broken')",
        f"import os\nos.link({path!r}, 'link')\nopen('link', 'a').write('broken')",
        f"import os\nos.symlink('/', 'root')\nopen('root{path}', 'a').write('broken')",
        f"open('../' * 20 + {path.lstrip('/')!r}, 'a').write('broken')",
        "import shutil\nshutil.rmtree('/', ignore_errors=True)",
        "import os\nfor folder, _, names in os.walk('/'):\n    for name in names:\n        try:\n            os.remove(os.path.join(folder, name))\n        except OSError:\n            pass",
        f"raise ValueError(open({str(target.folder / 'a.txt')!r}).read())",
        "import os\nraise ValueError(str(dict(os.environ)))",
        "import glob\nraise ValueError(str([open(p, errors='ignore').read() for p in glob.glob('/proc/*/environ')]))",
        "raise ValueError(open('/proc/1/environ').read() + open('/proc/self/environ').read())",
        f"import os\nos.chroot('/')\nopen({path!r}, 'w').write('broken')",
        f"import os\nos.setuid(0)\nopen({path!r}, 'w').write('broken')",
        f"{C}libc.mount(b'none', b'/', b'', 0x4021, b'')\nopen({path!r}, 'w').write('broken')",
        f"{C}libc.unshare(0x10020000)\nlibc.mount(b'none', b'/', b'', 0x4021, b'')\nopen({path!r}, 'w').write('broken')",
        f"{C}libc.umount2(b'/tmp', 2)\nlibc.umount2(b'/', 2)\nlibc.setns(0, 0)\nopen({path!r}, 'w').write('broken')",
        f"{C}libc.open_by_handle_at(0, b'x' * 100, 0)\nlibc.syscall(428, -100, b'/', 1)\nopen({path!r}, 'w').write('broken')",
    ])  # fmt: skip


def _disk(rng: random.Random, target: Target) -> str:
    return rng.choice([
        "file = open('x', 'wb')\nwhile True:\n    file.write(b'a' * 10**6)",
        "import os\nos.truncate(os.open('x', os.O_CREAT | os.O_RDWR), 10**12)",
        "import os\nos.posix_fallocate(os.open('x', os.O_CREAT | os.O_RDWR), 0, 10**10)",
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').close()",
        "import os\nwhile True:\n    os.mkdir('x')\n    os.chdir('x')",
        "n = 0\nwhile True:\n    n += 1\n    open(str(n), 'w').write('a' * 10**6)",
        "import os\nos.symlink('x', 'x')\nopen('x').read()",
        "import os\nos.chmod('.', 0)\nos.mkdir('x')",
        "import os\nfiles = []\nwhile True:\n    files.append(open('x', 'w'))",
        "import tempfile\nx = [tempfile.TemporaryFile() for _ in range(10000)]",
    ])  # fmt: skip


def _network(rng: random.Random, target: Target) -> str:
    return rng.choice([
        f"import socket\nsocket.create_connection(('127.0.0.1', {target.port}))",
        f"import urllib.request\nurllib.request.urlopen('http://127.0.0.1:{target.port}')",
        "import socket\nsocket.getaddrinfo('example.com', 80)",
        "import socket\nsocket.socket(socket.AF_UNIX).connect('\\0/x')",
        "import socket\nsocket.create_server(('', 0))",
        f"{C}import struct\nfor number in (41, 198):\n    s = libc.syscall(number, 2, 1, 0)\n    libc.connect(s, struct.pack('=HHI', 2, {socket.htons(target.port)}, 0x0100007f) + bytes(8), 16)",
        f"import socket\na, b = socket.socketpair()\na.connect(('127.0.0.1', {target.port}))",
        "import asyncio\nasyncio.run(asyncio.start_server(print, '127.0.0.1', 0))",
        f"{C}for domain in range(64):\n    for kind in (1, 2, 3):\n        libc.socket(domain, kind, 0)",
    ])  # fmt: skip


def _signals(rng: random.Random, target: Target) -> str:
    number, pid = rng.choice([1, 2, 9, 10, 15, 19]), rng.choice([os.getpid(), target.victim.pid, 1])
    return rng.choice([
        f"import os\nos.kill({pid}, {number})",
        f"import os\nos.kill(os.getppid(), {number})",
        f"import os\nfor pid in (0, -1):\n    try:\n        os.kill(pid, {number})\n    except OSError:\n        pass",
        f"import os\nos.killpg(0, {number})",
        f"import os\nfor pid in range(1, 5000):\n    try:\n        os.kill(pid, {number})\n    except OSError:\n        pass",
        f"import os, signal\nsignal.pidfd_send_signal(os.pidfd_open({pid}), {number})",
        f"{C}for call in (62, 129, 200, 130):\n    libc.syscall(call, {pid}, {number})\nlibc.syscall(234, {pid}, {pid}, {number})\nlibc.syscall(131, {pid}, {pid}, {number})",
        f"{C}for request in (16, 0x4206, 0):\n    libc.ptrace(request, {pid}, 0, 0)",
        f"{C}buffer = ctypes.create_string_buffer(100)\nlibc.process_vm_readv({pid}, buffer, 1, buffer, 1, 0)\nlibc.process_vm_writev({pid}, buffer, 1, buffer, 1, 0)",
        f"import resource\nresource.prlimit({pid}, resource.RLIMIT_CPU, (0, 0))",
        "import os\nos.kill(os.getpid(), 9)",
        "import os\nos.abort()",
        "import signal\nsignal.alarm(1)\nsignal.raise_signal(signal.SIGSTOP)",
        f"import os\nos.setpriority(os.PRIO_USER, 0, 19)\nos.sched_setaffinity({pid}, [0])",
    ])  # fmt: skip


def _output(rng: random.Random, target: Target) -> str:
    return rng.choice([
        "while True:\n    print('x' * 10**6)",
        "import os\nwhile True:\n    for n in (1, 2):\n        os.write(n, b'x' * 10**6)",
        "import sys\nfor n in range(10**4):\n    sys.__stdout__.write('x' * 10**4)",
        "print('x' * 10**8)",
        "raise ValueError('x' * 10**8)",
        "import sys\nsys.stdout = None\nprint('x')\nsys.stderr.write('\\ud800' * 10**6)",
        "import warnings\nwarnings.warn('x' * 10**7)",
        "def f(x):\n    print('x' * 10**6)\n    raise KeyError('y' * 10**7)",
    ])  # fmt: skip


def _crash(rng: random.Random, target: Target) -> str:
    depth = rng.choice([100, 1_000, 30_000])
    return rng.choice([
        "import ctypes\nctypes.string_at(0)",
        "import sys\nsys.setrecursionlimit(10**9)\ndef g():\n    g()\ng()",
        "def g():\n    g()\ng()",
        f"x = {'(' * depth}{')' * depth}",
        f"x = {'-' * depth}1",
        f"x = {'+'.join(['1'] * depth)}",
        f"x = []\nfor _ in range({depth}):\n    x = [x]\ny = repr(x)",
        "import types\nx = types.CodeType(0, 0, 0, 0, 9, 0, bytes(range(256)), (), (), (), '', '', '', 0, b'', b'')\nexec(x)",
        "import faulthandler\nfaulthandler._sigsegv()",
        "import os\nos._exit(0)",
        "raise SystemExit(0)",
        "import sys\nsys.modules.clear()\nimport gc\ngc.collect()",
        "import atexit, os\natexit.register(os._exit, 0)\nraise KeyboardInterrupt",
        "class E(BaseException):\n    def __str__(self):\n        raise E\nraise E",
        "class E(BaseException):\n    def __str__(self):\n        while True:\n            pass\nraise E",
        "import sys\nsys.settrace(lambda *a: 1 / 0)\nsys.setprofile(lambda *a: 1 / 0)",
        "import threading\ndef g():\n    while True:\n        pass\nfor _ in range(10):\n    threading.Thread(target=g, daemon=True).start()",
        "".join(chr(rng.randrange(32, 0x300)) for _ in range(200)),
    ])  # fmt: skip


def _protocol(rng: random.Random, target: Target) -> str:
    data = rng.choice([b"\0" * 100, b"\xff" * 1000, b'\0\0\0\2[]' * 5, b'\0\0\0\2{}' * 5, b'\0\0\0\x0b{"ok":true}' * 9, rng.randbytes(500),
                       b'{"passed": 3, "total": 3, "feedback": "", "broken": ""}\n', b'\0\0\0\x34{"callback": 0, "args": ["list"], "kwargs": ["dict"]}' * 3])  # fmt: skip
    every = "import os\nfor n in range(64):\n    try:\n        {}\n    except OSError:\n        pass"
    module = "import sys\nm = sys.modules['opsd_lightning.grading.remote_objects']\n"
    return rng.choice([
        every.format(f"os.write(n, {data!r})"),
        every.format("os.close(n)"),
        every.format(f"os.write(n, {data!r}); os.close(n)"),
        every.format(f"os.write(n, {data!r}); os.read(n, 10**6)"),
        "import os\nos.closerange(0, 1000)",
        "import os\nfor n in range(64):\n    try:\n        os.dup2(n, (n + 1) % 64)\n    except OSError:\n        pass",
        f"{module}m.send = lambda connection, message: __import__('os').write(connection, {data!r})",
        f"{module}m.Server.encode = lambda self, value: {rng.choice(['[]', '[[]]', 'value', '[1]', '{}', 'None', ['remote'], ['remote', -1, 'int', 4], ['shared', 'os', '_exit'], ['shared', 'builtins', 'exec'], ['module', 'os'], ['ndarray', 'O', [2], ['list']], ['int', '0x' + 'f' * 10**5], ['Decimal', 'x'], ['list', 1, ['list']], ['range', 1, 2, 0]])}",
        f"{module}m.Server._names = lambda self, names: {{'f': ['shared', 'operator', 'eq'], '__builtins__': ['dict'], 'abs': ['shared', 'builtins', 'bool'], '__name__': 1}}",
        f"{module}m.json = None\nm.os = None",
        "import gc\nfor x in gc.get_objects():\n    try:\n        x.clear()\n    except Exception:\n        pass",
        "import builtins\nfor name in list(vars(builtins)):\n    try:\n        setattr(builtins, name, lambda *a, **k: True)\n    except Exception:\n        pass",
    ])  # fmt: skip


FAMILIES: dict[str, Family] = {
    "processes": _processes, "memory": _memory, "endless": _endless, "files": _files, "disk": _disk, "network": _network,
    "signals": _signals, "output": _output, "crash": _crash, "protocol": _protocol,
}  # fmt: skip

# Results of a function that would have to be equal to what is expected.
LIES = [
    "0", "None", "f", "lambda *a: True", "float('nan')", "[[]] * 10**6", "'x' * 10**8", "list(range(10**7))", "NotImplemented", "...",
    "type('A', (), {'__eq__': lambda s, o: True, '__ne__': lambda s, o: False, '__hash__': lambda s: 0})()",
    "type('A', (int,), {'__eq__': lambda s, o: True, '__hash__': lambda s: 4})()",
    "type('A', (), {'__getattr__': lambda s, n: s, '__call__': lambda s, *a: s})()",
    "type('A', (), {'__eq__': lambda s, o: (_ for _ in iter(int, 1)).__next__()})()",
    "type('A', (), {'__class__': property(lambda s: int), '__repr__': lambda s: 'x' * 10**8})()",
    "type('A', (type,), {'__eq__': lambda s, o: True, '__hash__': lambda s: 0})('B', (), {})",
    "(x for x in iter(int, 1))", "__import__('unittest.mock').mock.ANY", "__import__('os')._exit(0)", "__import__('sys').exit(0)",
    "(lambda a: a.append(a) or a)([])", "iter(int, 1)", "open('x', 'w')", "__import__('threading').Lock()", "{1: {2: {3: object()}}}",
]  # fmt: skip


def hostile(rng: random.Random, target: Target) -> tuple[str, str]:
    """Return a family and hostile code of it, whose function ``f`` is wrong."""
    name = rng.choice(list(FAMILIES))
    body, lie = FAMILIES[name](rng, target), rng.choice(LIES)
    function = f"def f(x):\n    return {lie}\n"
    inner = textwrap.indent(body, "    ")
    code = rng.choice([
        f"{body}\n{function}",
        f"def f(x):\n{inner}\n    return {lie}\n",
        f"try:\n{inner}\nexcept BaseException:\n    pass\n{function}",
        f"def f(x):\n    try:\n{textwrap.indent(inner, '    ')}\n    finally:\n        return {lie}\n",
        f"import threading\ndef g():\n{inner}\nthreading.Thread(target=g, daemon={rng.random() < 0.5}).start()\n{function}",
        f"class A:\n    def __init__(self):\n{textwrap.indent(inner, '    ')}\n    __eq__ = __repr__ = __str__ = lambda self, *a: A()\ndef f(x):\n    return A()\n",
        f"class A:\n    def __del__(self):\n{textwrap.indent(inner, '    ')}\nA()\n{function}",
    ])  # fmt: skip
    return name, code


def random_tests(rng: random.Random) -> str:
    """Return tests of a function that no hostile code computes by chance."""
    a, b = rng.randint(100, 999), rng.randint(100, 999)
    return rng.choice([
        "assert f({x}) == {y}", "assert {y} == f({x})", "assert f({x}) in [{y}]", "assert f({x}) != {x} and not f({x}) != {y}",
        "import math\nassert math.isclose(f({x}), {y})", "def check(g):\n    assert g({x}) == {y}\ncheck(f)", "x = f({x})\nassert x == {y}",
        "import unittest\nclass T(unittest.TestCase):\n    def test_f(self):\n        self.assertEqual(f({x}), {y})",
    ]).format(x=a, y=a * b + 7)  # fmt: skip


RIGHT = "def f(x):\n    return {slope} * x + 7"


def test_hostile_code_is_wrong_and_leaves_nothing_behind(
    attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert GRADER is not None
    rng, left = attack.random, attack.tries(sample=40, whole=1000)
    target = Target(tmp_path / "target")
    monkeypatch.setenv("OPSD_SECRET", target.secret)
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    others = runs()
    try:
        GRADER.grade("x = 1", Example("", "", "assert x == 2"))  # opens what stays open
        before, descriptors = target.state(), len(os.listdir("/proc/self/fd"))
        with signals_counted() as signals:
            while left:
                count = min(left, 50)
                left -= count
                cases = [(*hostile(rng, target), random_tests(rng)) for _ in range(count)]
                slopes = [rng.randint(2, 9) for _ in range(count // 10)]
                codes = [code for _, code, _ in cases] + [RIGHT.format(slope=slope) for slope in slopes]
                examples = [Example("", RIGHT.format(slope=3), "", {"tests": tests}) for _, _, tests in cases]
                examples += [Example("", "", f"assert f(5) == {5 * slope + 7}") for slope in slopes]
                order = rng.sample(range(len(codes)), len(codes))
                started = time.monotonic()
                grades = GRADER.grades([codes[place] for place in order], [examples[place] for place in order])
                seconds = time.monotonic() - started
                assert seconds < 60 + len(codes) * (SECONDS + 2.0) / workers(), f"round {attack.round}: {seconds:.0f} s"
                for place, grade in zip(order, grades, strict=True):
                    if place < count:
                        name, code, tests = cases[place]
                        shown = f"round {attack.round}, {name}:\n{code[:2000]}\n--\n{tests}\n{grade}"
                        assert grade.score == 0, shown
                        assert target.secret not in grade.feedback, shown
                        assert len(grade.feedback) < 2_000, shown
                        attack.tried(f"hostile code: {name}")
                    elif grade.score != 1:  # on a busy machine
                        patient = PythonTestsGrader(timeout_seconds=60.0)
                        assert grade.problem and patient.grade(codes[place], examples[place]).score == 1, grade
                assert not signals and len(os.listdir("/proc/self/fd")) <= descriptors
                assert target.state() == before, f"round {attack.round}"
                end = time.monotonic() + 10
                while runs() - others and time.monotonic() < end:  # another test's run that ends has no command line
                    time.sleep(0.05)
                assert not runs() - others
    finally:
        target.close()


@pytest.mark.filterwarnings("ignore:data.grader.init_args.allow_unisolated")
def test_the_attacks_are_real(attack: Attack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Without namespaces, the same code changes files and reads secrets, and the checks above notice."""
    target = Target(tmp_path / "target")
    monkeypatch.setattr(sandbox, "refusal", lambda: "pretended")
    (tmp_path / "temporary").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "temporary"))
    grader = PythonTestsGrader(timeout_seconds=20.0, allow_unisolated=True)
    example = Example("", "", "assert f(1) == 2")
    try:
        before = target.state()
        path = target.folder / "a.txt"
        assert target.secret in grader.grade(f"raise ValueError(open({str(path)!r}).read())", example).feedback
        assert target.state() == before
        grader.grade(f"open({str(target.folder / 'new.txt')!r}, 'w').write('broken')", example)
        assert target.state() != before
    finally:
        target.close()
