"""Grade completions by the last number that they contain, whatever their form.

The graders of this package ask for a form, such as a box or a phrase before the answer. A model that is trained can gain by
learning the form alone. The last number tells how much of a gain is left without it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from opsd_lightning.grading.final_answer import strip_thinking

_DECIMAL = r"(?:(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?|(?<![\w.)\]}])\.[0-9]+)"
_MINUS = "-−–"
_VALUE = re.compile(
    rf"""\\[dt]?frac\s*(?:\{{\s*(?P<top>[{_MINUS}]?\s*{_DECIMAL})\s*\}}|(?P<top_digit>[0-9]))
        \s*(?:\{{\s*(?P<bottom>{_DECIMAL})\s*\}}|(?P<bottom_digit>[0-9]))
      | (?<![0-9])(?<![0-9]\.)
        (?:(?<![0-9]/)(?P<over>{_DECIMAL})/(?P<under>{_DECIMAL})(?![0-9])(?!/[0-9])
          | (?P<number>{_DECIMAL}(?:[eE][-+]?[0-9]+(?!\w))?))""",
    re.VERBOSE,
)
_DOLLAR = r"(?:\\?\$)?"
_SIGNED = re.compile(rf"\s*{_DOLLAR}(?P<sign>[{_MINUS}+]?)\s*{_DOLLAR}\s*(?=[0-9.\\])")
_SIGN = re.compile(rf"[{_MINUS}](?P<blank>[^\S\n]*){_DOLLAR}[^\S\n]*$")
_LISTED = re.compile(r"\s*[0-9]{1,3}\)\s*")
_TERM = re.compile(r"(?:[0-9)\]}]\\?[$%]?[^\S\n]*|\w)$")
_AWAITS_VALUE = re.compile(r"(?:[=≈<>≤≥:(,\[{]|(?<![0-9)\]}])\$|\b(?:is|are|was|equals))[^\S\n]*$")
_MOST_CHARACTERS = 1000  # of a number: longer ones are no answers, and slow to parse
_LARGEST_EXPONENT = 1000


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, or None.

    Only the text after the last thinking block is read. A text with an open thinking block has no number. ``1,200``,
    ``.5``, ``1e3``, ``1/2`` and ``\\frac{1}{2}`` are one number each. Powers such as ``10^3`` and mixed numbers such as
    ``2 1/2`` are not: their last part is the number.

    A hyphen, a minus or an en dash, also before a dollar sign, is read as follows:

    - Directly before the number it is a sign, unless it follows a number, a word without a space or a closing bracket, as
      in ``7 -3``, ``x-3`` and ``f(x) -3``.
    - With a space after it, it is a sign after ``=``, a comparison, ``:``, ``,``, an opening bracket, or the words "is",
      "are", "was" and "equals". Otherwise it is a subtraction, a dash or the mark of a list, as in ``x - 3``.
    - After the mark of a numbered list, as in ``1) -3``, it is a sign.

    A text that is one number has the value of `number_of`.

    Example::

        >>> last_number("Eva has 4 + 5 = 9 books.")
        Fraction(9, 1)
        >>> last_number("7 - 10 = -3.00")
        Fraction(-3, 1)
        >>> last_number("Many.") is None
        True
    """
    rest = strip_thinking(text)
    if rest is None:
        return None
    whole = number_of(rest.strip().removesuffix("."))
    if whole is not None:
        return whole
    found = next(reversed(list(_VALUE.finditer(rest))), None)
    value = None if found is None else _value(found)
    if found is None or value is None:
        return None
    return -value if _is_negative(rest[: found.start()]) else value


def number_of(text: str) -> Fraction | None:
    """Return the value of a text that is one number, or None for any other text.

    A number is written as for `last_number`, such as ``1,200``, ``-0.5``, ``-$3`` or ``1/2``.
    """
    sign = _SIGNED.match(text) if len(text) <= _MOST_CHARACTERS else None
    found = None if sign is None else _VALUE.fullmatch(text.rstrip(), sign.end())
    value = None if found is None else _value(found)
    if sign is None or value is None:
        return None
    return -value if sign["sign"] and sign["sign"] in _MINUS else value


def ends_in(completion: str, reference: str) -> bool | None:
    """Return True if the last number of a completion is the reference. None if the reference is not a number."""
    value = number_of(reference)
    return None if value is None else last_number(completion) == value


def _value(found: re.Match[str]) -> Fraction | None:
    """Return the value of a number without the sign before it. None if it is too long or divides by zero."""
    if len(found[0]) > _MOST_CHARACTERS:
        return None
    if found["number"]:
        digits, _, exponent = found["number"].replace(",", "").lower().partition("e")
        if abs(int(exponent or 0)) > _LARGEST_EXPONENT:
            return None
        return Fraction(digits) * Fraction(10) ** int(exponent or 0)
    top, bottom = (
        found["over"] or found["top"] or found["top_digit"],
        found["under"] or found["bottom"] or found["bottom_digit"],
    )
    size, divisor = (Fraction(part.lstrip(_MINUS).strip().replace(",", "")) for part in (top, bottom))
    if not divisor:
        return None
    return (-size if top[0] in _MINUS else size) / divisor


def _is_negative(before: str) -> bool:
    """Return True if the text before a number ends in a sign, as in ``= -3``, and not in a subtraction or a dash."""
    line = before[-50:].rpartition("\n")[2]
    sign = _SIGN.search(line)
    if sign is None:
        return False
    rest = line[: sign.start()]
    if _LISTED.fullmatch(rest):
        return True
    return bool(_AWAITS_VALUE.search(rest)) if sign["blank"] else not _TERM.search(rest)
