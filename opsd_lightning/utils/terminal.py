"""Safe terminal output: control characters are escaped and secrets are redacted.

Texts from servers, models, data and settings may contain escape sequences that move the cursor or set the clipboard,
characters that hide or reorder text, rich markup, and lone surrogates, which cannot be printed.
"""

from __future__ import annotations

import argparse
import logging
import re
import sys
import threading
import traceback
import unicodedata
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import TYPE_CHECKING, Any, NoReturn

from opsd_lightning.utils.near_names import near_names, question
from opsd_lightning.utils.redaction import redact_text

if TYPE_CHECKING:
    from opsd_lightning.types import UserError

# C0 and C1 controls except newline and tab, zero-width characters, bidirectional controls, line and paragraph separators,
# invisible fillers, tags, lone surrogates, and noncharacters.
_UNSEEN = re.compile(
    "[\x00-\x08\x0b-\x1f\x7f-\x9f\xad\u034f\u061c\u115f\u1160\u17b4\u17b5"
    "\u180b-\u180f\u200b-\u200f\u2028-\u202e\u2060-\u206f\u3164\ufeff\uffa0\ufff0-\ufffb\ufffe\uffff\ud800-\udfff"
    "\U00013430-\U0001343f\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff]"
)
# Scripts in which a joiner changes the shape of letters: Arabic to N'Ko, Mandaic, Indic, Myanmar, Khmer, Mongolian.
_JOINING = re.compile("[\u0600-\u07ff\u0840-\u0dff\u1000-\u109f\u1780-\u18af\ua840-\ua8ff]")
_EMOJI = "\u2190-\u21ff\u2300-\u23ff\u25a0-\u27bf\u2b00-\u2bff\U0001f000-\U0001faff"
_BEFORE, _AFTER = re.compile(f"[{_EMOJI}]\ufe0f?$"), re.compile(f"[{_EMOJI}]")
_NON_JOINER, _JOINER = "\u200c", "\u200d"


def escape_controls(text: str) -> str:
    r"""Return a text with its control characters escaped, such as ``\x1b``.

    Newlines and tabs are kept. Zero-width joiners are kept between emoji and between letters of scripts that use them.
    """
    return _UNSEEN.sub(_written, text.replace("\r\n", "\n"))


def _written(found: re.Match[str]) -> str:
    if found[0] in (_NON_JOINER, _JOINER) and _joins(found.string, found.start()):
        return found[0]
    code = ord(found[0])
    if found[0] == "\r":
        return "\\r"
    return f"\\x{code:02x}" if code < 0x100 else f"\\u{code:04x}" if code < 0x10000 else f"\\U{code:08x}"


def _joins(text: str, place: int) -> bool:
    """Return True if the joiner at a place stands between letters or emoji that it joins."""
    before, after = text[place - 1 : place], text[place + 1 : place + 2]
    if not before:
        return False
    if _letter(before) and (_letter(after) or unicodedata.combining(before) == 9):  # 9: a virama, also at a word's end
        return True
    return text[place] == _JOINER and bool(_BEFORE.search(text[max(place - 2, 0) : place]) and _AFTER.match(after))


def _letter(sign: str) -> bool:
    """Return True for a letter or mark of a joining script."""
    return bool(_JOINING.match(sign)) and unicodedata.category(sign)[0] in "LM"


def safe_text(text: object) -> str:
    """Return a text, or the text of an exception, with secrets redacted and control characters escaped."""
    return escape_controls(redact_text(str(text)))


def safe_markup(text: object) -> str:
    """Return a `safe_text` with rich markup escaped."""
    from rich.markup import escape

    return escape(safe_text(text))


def say(text: object, error: bool = False) -> None:
    """Print a `safe_text`. Characters that the terminal's encoding lacks are escaped.

    Args:
        text: Text to print.
        error: If True, print to standard error instead of standard output.
    """
    stream = sys.stderr if error else sys.stdout
    encoding = getattr(stream, "encoding", None) or "utf-8"
    print(safe_text(text).encode(encoding, "backslashreplace").decode(encoding), file=stream, flush=True)


def error_line(error: UserError, options: Mapping[str, str]) -> str:
    """Return the line that a command prints for an error.

    Args:
        error: The error.
        options: Option of the command for each setting that it replaces, such as ``--model`` for ``model.policy.model``.
    """
    option = options.get(getattr(error, "setting", ""))
    text = str(error) if option is None else f"{option}: {error.problem}. {error.fix}"  # type: ignore[attr-defined]
    return f"error: {text}"


class SafeArgumentParser(argparse.ArgumentParser):
    """An argument parser that prints its errors as `safe_text`, with the nearest options and without its usage."""

    def error(self, text: str) -> NoReturn:
        """Print a message of a few lines and exit with status 2."""
        rest = text.removeprefix("unrecognized arguments: ")
        option = next((word.partition("=")[0] for word in rest.split() if word.startswith("-")), None)
        asked = question(near_names(option, self._option_string_actions)) if option and rest != text else ""
        say(f"error: {text}{f'. {asked}' if asked else ''}\n`{self.prog} --help` lists the options.", error=True)
        self.exit(2)


@contextmanager
def safe_messages() -> Iterator[None]:
    """Apply `safe_text` to all log records and warnings of this process inside the block."""
    factory, form = logging.getLogRecordFactory(), warnings.formatwarning

    def record(*args: Any, **kwargs: Any) -> logging.LogRecord:
        found = factory(*args, **kwargs)
        try:
            text = found.getMessage()
        except Exception:  # wrong arguments of the log call, which logging itself reports
            return found
        found.msg, found.args = safe_text(text), ()
        if found.exc_info:
            found.exc_text = safe_text("".join(traceback.format_exception(*found.exc_info)).rstrip("\n"))
        return found

    def warning(*args: Any, **kwargs: Any) -> str:
        return safe_text(form(*args, **kwargs))

    logging.setLogRecordFactory(record)
    warnings.formatwarning = warning
    try:
        yield
    finally:
        logging.setLogRecordFactory(factory)
        warnings.formatwarning = form


def safe_tracebacks() -> None:
    """Print the tracebacks of uncaught exceptions as `safe_text` for the rest of the process."""

    def show(kind: type[BaseException], error: BaseException, trace: TracebackType | None) -> None:
        say("".join(traceback.format_exception(kind, error, trace)).rstrip("\n"), error=True)

    def show_in_thread(found: threading.ExceptHookArgs) -> None:
        if found.exc_value is not None and not isinstance(found.exc_value, SystemExit):
            show(found.exc_type, found.exc_value, found.exc_traceback)

    sys.excepthook, threading.excepthook = show, show_in_thread
