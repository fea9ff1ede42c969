"""Grade completions by the last number that they contain, whatever their form.

The graders of this package ask for a form, such as a box or a phrase before the answer. A model that is trained can gain by
learning the form alone. The last number tells how much of a gain is left without it.
"""

from __future__ import annotations

import re
from fractions import Fraction

from opsd_lightning.grading.final_answer import strip_thinking

_NUMBER = re.compile(r"(?<![0-9.])(?:[0-9]{1,3}(?:,[0-9]{3})+(?![0-9])|[0-9]+)(?:\.[0-9]+)?")
_PLAIN = re.compile(rf"\s*(?P<sign>[-+−]?)\s*(?P<number>{_NUMBER.pattern})\s*")
_MOST_CHARACTERS = 1000  # of a number: longer ones are no answers, and slow to parse


def last_number(text: str) -> Fraction | None:
    """Return the last number of a text, or None.

    Only the text after the last thinking block is read. A text with an open thinking block has no number. A minus is a sign
    unless it follows a number, a word or a bracket.

    Example::

        >>> last_number("Eva has 4 + 5 = 9 books.")
        Fraction(9, 1)
        >>> last_number("7 - 10 = -3.00")
        Fraction(-3, 1)
        >>> last_number("Many.") is None
        True
    """
    rest = strip_thinking(text)
    found = None if rest is None else next(reversed(list(_NUMBER.finditer(rest))), None)
    if rest is None or found is None or len(found[0]) > _MOST_CHARACTERS:
        return None
    value = Fraction(found[0].replace(",", ""))
    before = rest[: found.start()]
    return -value if before.endswith(("-", "−")) and _can_be_sign(before[:-1]) else value


def number_of(text: str) -> Fraction | None:
    """Return the value of a text that is one number, such as ``1,200`` or ``-0.5``, or None for any other text."""
    found = _PLAIN.fullmatch(text)
    if found is None or len(text) > _MOST_CHARACTERS:
        return None
    value = Fraction(found["number"].replace(",", ""))
    return -value if found["sign"] in ("-", "−") else value


def ends_in(completion: str, reference: str) -> bool | None:
    """Return True if the last number of a completion is the reference. None if the reference is not a number."""
    value = number_of(reference)
    return None if value is None else last_number(completion) == value


def _can_be_sign(before: str) -> bool:
    """Return True if a minus after this text is a sign, as in ``= -3``, and not a subtraction or a hyphen."""
    return not re.search(r"(?:[0-9)\]}]\s*|\w)$", before[-50:])
