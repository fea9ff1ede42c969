"""Signals to one of several ranks before they are connected: it joins the others first, and all end together.

A rank that ended at once would leave the others waiting for it until their process group times out. Where the others do not
come, or a second signal does, it ends as it would without this module. Imports nothing that takes long.
"""

from __future__ import annotations

import os
import signal
import threading
import time
from typing import Any

#: Seconds that a rank with a signal waits for the others.
WAIT_SECONDS = 10.0
#: From this many seconds after a signal on, another one ends the process: launchers may send one twice.
SECOND_SIGNAL_SECONDS = 2.0


class _Early:
    def __init__(self) -> None:
        self.before: dict[int, Any] = {}
        self.asked, self.at, self.joins_at = 0, 0.0, 0.0
        self.over = threading.Event()
        self.reader, self.writer = os.pipe()
        for descriptor in (self.reader, self.writer):
            os.set_blocking(descriptor, descriptor == self.reader)
        self.wakeup = -1

    def look(self) -> None:
        """See signals at once, also while the main thread waits for other ranks."""
        while not self.over.is_set():
            for number in os.read(self.reader, 4096):
                if number in self.before:
                    self.note(number)

    def note(self, number: int) -> None:
        now = time.monotonic()
        if self.asked:
            if now - self.at >= SECOND_SIGNAL_SECONDS:
                _exit(number)
            return
        self.asked, self.at = number, now
        threading.Thread(target=self.wait, name="opsd-early-wait", daemon=True).start()

    def wait(self) -> None:
        while not self.over.wait(0.2):
            if self.joins_at and time.monotonic() - max(self.joins_at, self.at) > WAIT_SECONDS:
                _exit(self.asked)


_early: _Early | None = None


def install() -> None:
    """Note signals from now on, if this is one of several ranks. To be called early, in the main thread."""
    global _early
    if _early is not None or threading.current_thread() is not threading.main_thread() or not _has_other_ranks():
        return
    early = _Early()
    for number in (signal.SIGTERM, signal.SIGINT, signal.SIGHUP):
        if (before := signal.getsignal(number)) in (signal.SIG_DFL, signal.default_int_handler):
            early.before[number] = before
            signal.signal(number, _ignore_in_main_thread)
    early.wakeup = signal.set_wakeup_fd(early.writer, warn_on_full_buffer=False)
    threading.Thread(target=early.look, name="opsd-early-signals", daemon=True).start()
    _early = early


def start_join_timeout() -> None:
    """Note that this rank waits for the others from now on."""
    if _early is not None:
        _early.joins_at = time.monotonic()


def uninstall() -> int:
    """Put the former handlers back, and return the number of the signal that came; 0 for none."""
    global _early
    early, _early = _early, None
    if early is None:
        return 0
    early.over.set()
    if threading.current_thread() is threading.main_thread():
        signal.set_wakeup_fd(early.wakeup)
        for number, before in early.before.items():
            if signal.getsignal(number) is _ignore_in_main_thread:
                signal.signal(number, before)
    os.write(early.writer, b"\0")
    return early.asked


def _uninstall_in_child() -> None:
    """In a process forked from this one: its signals are its own."""
    global _early
    early, _early = _early, None
    if early is not None:
        signal.set_wakeup_fd(-1)
        for number, before in early.before.items():
            signal.signal(number, before)


os.register_at_fork(after_in_child=_uninstall_in_child)


def _has_other_ranks() -> bool:
    sizes = [os.environ.get(name, "") for name in ("WORLD_SIZE", "SLURM_NTASKS")]
    return any(size.isdigit() and int(size) > 1 for size in sizes)


def _ignore_in_main_thread(number: int, frame: Any) -> None:
    """The thread has seen it."""


def _exit(number: int) -> None:
    """End the process. The main thread, which could set the signal's own effect, waits for other ranks."""
    os._exit(128 + number)
