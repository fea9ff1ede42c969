"""Delay the effect of signals on a rank until all ranks have joined their process group, so that all end together.

A rank that exits before it joins would leave the others waiting until their process group times out. If the others do not
join in time, or a second signal arrives, the rank exits. This module imports only the standard library, to start early.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

#: Seconds that a signalled rank waits for the other ranks to join.
WAIT_SECONDS = 10.0
#: A second signal ends the process only after this many seconds, because launchers may send the same signal twice.
SECOND_SIGNAL_SECONDS = 2.0


class _EarlySignals:
    """State of the handlers: former handlers, received signal, wakeup pipe and timeouts."""

    def __init__(self) -> None:
        self.former_handlers: dict[int, Any] = {}
        self.received, self.received_at, self.joining_at = 0, 0.0, 0.0
        self.ended = threading.Event()
        self.reader, self.writer = os.pipe()
        for descriptor in (self.reader, self.writer):
            os.set_blocking(descriptor, descriptor == self.reader)
        self.former_wakeup_fd = -1

    def read_signals(self) -> None:
        """Read signals in a thread, so that they are seen while the main thread waits for other ranks."""
        while not self.ended.is_set():
            for number in os.read(self.reader, 4096):
                if number in self.former_handlers:
                    self.handle(number)

    def handle(self, number: int) -> None:
        """Start the timeout at the first signal, and exit at a second one."""
        now = time.monotonic()
        if self.received:
            if now - self.received_at >= SECOND_SIGNAL_SECONDS:
                _exit(number)
            return
        self.received, self.received_at = number, now
        threading.Thread(target=self.exit_after_timeout, name="opsd-early-wait", daemon=True).start()

    def exit_after_timeout(self) -> None:
        """Exit if the other ranks have not joined within `WAIT_SECONDS`."""
        while not self.ended.wait(0.2):
            if self.joining_at and time.monotonic() - max(self.joining_at, self.received_at) > WAIT_SECONDS:
                _exit(self.received)


_early: _EarlySignals | None = None


def install() -> None:
    """Install the handlers if this process is one of several ranks. Call it early, in the main thread."""
    global _early
    if _early is not None or threading.current_thread() is not threading.main_thread() or not _has_other_ranks():
        return
    early = _EarlySignals()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if (before := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler):
            early.former_handlers[number] = before
            signal.signal(number, _ignore_in_main_thread)
    early.former_wakeup_fd = signal.set_wakeup_fd(early.writer, warn_on_full_buffer=False)
    threading.Thread(target=early.read_signals, name="opsd-early-signals", daemon=True).start()
    _early = early


def start_join_timeout() -> None:
    """Start the timeout of a signalled rank: from now on this rank waits for the others."""
    if _early is not None:
        _early.joining_at = time.monotonic()


def uninstall() -> int:
    """Restore the former handlers and return the number of the received signal, or 0."""
    global _early
    early, _early = _early, None
    if early is None:
        return 0
    early.ended.set()
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(early.former_wakeup_fd)
        for number, before in early.former_handlers.items():
            if signal.getsignal(number) is _ignore_in_main_thread:
                signal.signal(number, before)
    os.write(early.writer, b"\0")
    return early.received


def _uninstall_in_child() -> None:
    """Restore the former handlers in a forked child."""
    global _early
    early, _early = _early, None
    if early is not None:
        signal.set_wakeup_fd(-1)
        for number, before in early.former_handlers.items():
            signal.signal(number, before)


os.register_at_fork(after_in_child=_uninstall_in_child)


def _has_other_ranks() -> bool:
    sizes = [os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_NTASKS")]
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def _ignore_in_main_thread(number: int, frame: Any) -> None:
    """Do nothing: the thread reads the signal from the wakeup descriptor."""


def _exit(number: int) -> None:
    """End the process with the exit status of a signal, from a thread: the main thread may be blocked."""
    os._exit(128 + number)
