"""Try third-party code in a child process with time and memory limits before this process runs it."""

from __future__ import annotations

import os
import signal
import warnings
from collections.abc import Callable
from contextlib import suppress

_FAILED, _MEMORY = 1, 2


def exceeded_limit(run: Callable[[], object], seconds: float, memory: int) -> str:
    """Run a function in a forked child and return the limit that it exceeds: ``"time"``, ``"memory"`` or ``""``.

    The child is ended by the system's alarm, even inside native code. Exceptions in the child are ignored: the caller runs
    the function again and sees them. Platforms without fork run nothing.

    Args:
        run: The function. It must not start or use threads.
        seconds: Time limit in seconds.
        memory: Memory limit in bytes. Has no effect on macOS.
    """
    if not hasattr(os, "fork"):
        return ""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # about forking a process that has threads
        child = os.fork()
    if child == 0:
        status = _FAILED
        try:
            status = _run(run, seconds, memory)
        finally:
            os._exit(status)
    try:
        status = os.waitpid(child, 0)[1]
    except ChildProcessError:  # a SIGCHLD handler already reaped the child
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
    except BaseException:  # the caller runs the function again and sees the error
        return _FAILED
    return 0
