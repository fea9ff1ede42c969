"""Run code of others once in a child process, within a time and a memory limit, before this process runs it."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress

_FAILED, _MEMORY = 1, 2


def exceeded_limit(run: Callable[[], object], seconds: float, memory: int) -> str:
    """Run a function in a forked child and return what it runs out of: ``time``, ``memory`` or nothing.

    The system's alarm ends the child, also where no code of Python runs. Its exceptions are left to the caller, who runs the
    function again. Where processes cannot be forked, nothing is run.

    Args:
        run: The function. It must start no thread, and use none.
        seconds: Time limit.
        memory: Bytes that it may take. macOS does not limit them.
    """
    if not hasattr(os, "fork"):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # of forking beside other threads
        child = os.fork()
    if child == 0:
        status = _FAILED
        try:
            status = _run(run, seconds, memory)
        finally:
            os._exit(status)
    try:
        status = os.waitpid(child, 0)[1]
    except ChildProcessError:  # a handler of SIGCHLD was faster
        return ""
    if os.WIFSIGNALED(status):
        return "time" if os.WTERMSIG(status) == signal.SIGALRM else "memory"
    return "memory" if os.WEXITSTATUS(status) == _MEMORY else ""


def _run(run: Callable[[], object], seconds: float, memory: int) -> int:
    import resource

    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGALRM})
    signal.setitimer(signal.ITIMER_REAL, seconds)
    silent = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silent, 1)
    os.dup2(silent, 2)
    with suppress(OSError, ValueError), open("/proc/self/statm", encoding="ascii") as file:
        most = int(file.read().split()[0]) * resource.getpagesize() + memory
        resource.setrlimit(resource.RLIMIT_AS, (most, most))
        resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    try:
        run()
    except MemoryError:
        return _MEMORY
    except BaseException:  # see `exceeded_limit`
        return _FAILED
    return 0
