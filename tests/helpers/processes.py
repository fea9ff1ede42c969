"""Processes forked from this one, which need not repeat its imports."""

from __future__ import annotations

import contextlib
import faulthandler
import itertools
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

_ports = itertools.count()


def free_port() -> int:
    """Return a port that no other test uses and that the system gives to no outgoing connection."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20000 + 1000 * (worker % 10) + (os.getpid() + next(_ports)) % 1000
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


class Child:
    """A process forked from this one, which need not repeat its imports.

    Args:
        work: Work of the process.
        log: File to which its output is appended.
        environment: Variables to set.
    """

    def __init__(self, work: Callable[[], Any], log: Path, environment: Mapping[str, str] | None = None) -> None:
        self.log, self.started = log, time.monotonic()
        self._said_before = log.stat().st_size if log.exists() else 0
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            self._run(work, environment or {})
        self.code: int | None = None
        #: From its start to its end.
        self.seconds = 0.0

    def _run(self, work: Callable[[], Any], environment: Mapping[str, str]) -> None:
        code = 1
        try:
            out = os.open(self.log, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(out, 1)
            os.dup2(out, 2)
            sys.stdout, sys.stderr = (os.fdopen(n, "w", buffering=1, closefd=False) for n in (1, 2))
            os.environ.update(environment)
            signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where pytest runs in the background,
            signal.signal(signal.SIGHUP, signal.SIG_DFL)  # or by nohup
            work()
            code = 0
        except SystemExit as stop:
            code = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
        finally:
            for stream in (sys.stdout, sys.stderr):
                with contextlib.suppress(OSError):
                    stream.flush()
            os._exit(code)

    def ended(self, seconds: float) -> bool:
        """Wait up to so many seconds for the end of the process; return whether it ended."""
        deadline = time.monotonic() + seconds
        while self.code is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.code, self.seconds = os.waitstatus_to_exitcode(status), time.monotonic() - self.started
            elif time.monotonic() > deadline:
                return False
            else:
                time.sleep(0.01)
        return True

    def end(self, seconds: float) -> int:
        """Return the exit status, or minus the signal's number. Fail if the process runs longer than so many seconds."""
        try:
            assert self.ended(seconds), f"it still runs after {seconds} seconds:\n{self.said()}"
        finally:
            self.kill()
        assert self.code is not None
        return self.code

    def send(self, number: int) -> None:
        if self.code is None and not self.ended(0):
            os.kill(self.pid, number)

    def kill(self) -> None:
        self.send(signal.SIGKILL)
        self.ended(60)

    def said(self) -> str:
        """Return the end of the process's output."""
        text = self.log.read_bytes()[self._said_before :] if self.log.exists() else b""
        return text.decode(errors="replace")[-6000:]


def two_ranks(folder: Path, work: Callable[[], Any]) -> list[Child]:
    """Run a function in two processes with the environments of torchrun's ranks."""
    port, ranks = str(free_port()), []
    for rank in map(str, range(2)):
        environment = {
            "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0",
            "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "TORCHELASTIC_RUN_ID": "test",
        }  # fmt: skip
        ranks.append(Child(work, folder / f"rank{rank}.log", environment))
    return ranks


DEADLOCK_SECONDS = 240  # of the ranks' whole work, of which no test takes a quarter


def _worker(rank: int, work: Callable[[int], Any], world: int, port: int, folder: Path) -> None:
    os.environ |= {
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "RANK": str(rank), "LOCAL_RANK": str(rank),
        "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world), "GROUP_RANK": "0", "TORCHELASTIC_RUN_ID": "test",
    }  # fmt: skip
    faulthandler.enable(open(folder / f"{rank}.error", "w"))  # noqa: SIM115 (to the end of the process)
    try:
        torch.save(work(rank), folder / f"{rank}.pt")
        if dist.is_initialized():
            dist.barrier()  # one that leaves first would cut off what gloo still sends to the other
    except BaseException:
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise
    finally:
        if dist.is_initialized():
            dist.destroy_process_group()


def on_ranks(work: Callable[[int], Any], tmp_path: Path, world: int = 2) -> list[Any]:
    """Return the results of ``work(rank)`` in several processes forked from this one."""
    folder = Path(tempfile.mkdtemp(prefix="ranks", dir=tmp_path))
    context = torch.multiprocessing.start_processes(
        _worker, (work, world, free_port(), folder), nprocs=world, join=False, start_method="fork"
    )
    deadline = time.monotonic() + DEADLOCK_SECONDS
    try:
        while not context.join(timeout=5):
            if time.monotonic() > deadline:
                for pid in context.pids():
                    os.kill(pid, signal.SIGABRT)  # each writes where it is stuck
    except Exception as error:
        errors = "\n".join(path.read_text() for path in sorted(folder.glob("*.error")))
        raise AssertionError(f"{errors}\n{error}") from None
    return [torch.load(folder / f"{rank}.pt", weights_only=False) for rank in range(world)]
