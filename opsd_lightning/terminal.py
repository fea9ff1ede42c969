"""Text on the terminal: control characters shown instead of sent, and no secrets.

Texts of servers, models, data and settings may hold escape sequences, which move the cursor, set the window's title or the
clipboard; characters that hide or reorder text; markup of rich; halves of surrogate pairs, which cannot be printed.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import threading
import traceback
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from types import TracebackType
from typing import Any, NoReturn

from opsd_lightning.redaction import redact_text

# C0 and C1 but for newline and tab, characters without width, bidirectional controls, line and paragraph separators,
# invisible fillers, tags, halves of surrogate pairs, and code points that are no characters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)


def shown(text: str) -> str:
    r"""Return a text with its control characters written out, such as ``\x1b``. Newlines and tabs stay."""
    return _UNSEEN.sub(_written, text.replace("\r\n", "\n"))


def _written(found: re.Match[str]) -> str:
    code = ord(found[0])
    if found[0] == "\r":
        return "\\r"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def message(text: object) -> str:
    """Return a text, or an exception's, for the terminal and for records: `shown`, and without secrets."""
    return shown(redact_text(str(text)))


def marked(text: object) -> str:
    """Return a `message` in which rich finds no markup."""
    from rich.markup import escape

    return escape(message(text))


def say(text: object, error: bool = False) -> None:
    """Print a `message`. Characters that the terminal's encoding lacks are written out.

    Args:
        text: Text to print.
        error: Print to the standard error instead of the standard output.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(message(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


class Arguments(argparse.ArgumentParser):
    """A parser of arguments whose errors are messages."""

    def error(self, text: str) -> NoReturn:
        super().error(message(text))


@contextmanager
def guarded() -> Iterator[None]:
    """Make messages of what is logged and warned of by anyone, in this process and until the end of the block."""
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        found = factory(*args, **kwargs)
        try:
            text = found.getMessage()
        except Exception:  # a log call's own mistake, which logging reports
            return found
        found.msg, found.args = message(text), ()
        if found.exc_info:
            found.exc_text = message("".join(traceback.format_exception(*found.exc_info)).rstrip("\n"))
        return found

    def warning(*args: Any, **kwargs: Any) -> str:
        return message(form(*args, **kwargs))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form


def guard_tracebacks() -> None:
    """Print the traceback of an exception that nothing catches as a message, until the process ends."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)

    def of_thread(found: threading.ExceptHookArgs) -> None:
        if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
            show(found.exc_type, found.exc_value, found.exc_traceback)

    sys.excepthook, threading.excepthook = show, of_thread
