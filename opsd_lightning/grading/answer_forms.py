r"""Compare two answers as a careful person would, with computer algebra only for expressions.

Both answers are normalized (``answer_text``) and read as one of a few forms: numbers with units (``quantities``), times of
day, choices, words, lists and intervals. These forms are compared here. Other expressions are passed to the caller's
``algebra``, without units, left sides of equations and words, which it would misread.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from fractions import Fraction
from typing import NamedTuple

from opsd_lightning.grading.answer_text import FUNCTIONS, clean, closing_bracket, is_balanced, split_outside_brackets
from opsd_lightning.grading.quantities import (
    PERCENT,
    Quantity,
    Unit,
    equal_numbers,
    equal_quantities,
    read_quantity,
    read_unit,
    unit_ratio,
)

Algebra = Callable[[str, str], bool]
"""Function that returns True if two TeX expressions are equal. The reference is the first argument."""

LONGEST = 2000
"""Maximum length in characters of answers that are parsed. Longer answers are equal only if their texts are identical."""

_DEEPEST = 8  # maximum depth of nested lists
_LONGEST_UNIT, _UNIT_WORDS = 60, 8

_CHOICE = re.compile(
    r"(?:(?:the\s+)?(?:answer\s+)?(?:option|choice)\s*:?\s*)?(?:\(([A-Ja-j])\)|\[([A-J])\]|([A-Ja-j])\)|([A-J])[.:]|([A-J])(?=$))\s*[:.,;]?\s*(.*)",
    re.IGNORECASE | re.DOTALL,
)
_TIME = re.compile(
    r"(\d{1,2})(?::(\d{2}))?(?::(\d{2}))?\s*(?:o'clock\s*)?(?:([ap])\.?\s?m\.?(?:\s+in the \w+)?|o'clock)?", re.IGNORECASE
)
_NAMES = {  # synonyms of the same answer
    "no solutions": "no solution", "none": "no solution", "there is no solution": "no solution", "no answer": "no solution",
    "there are no solutions": "no solution", "empty set": "no solution", "no such number exists": "no solution",
    "dne": "does not exist", "doesn t exist": "does not exist", "n a": "not applicable", "na": "not applicable",
}  # fmt: skip
_SETS = dict.fromkeys(("\\mathbb{r}", "all real numbers", "all reals"), r"(-\infty , \infty )")
_RELATION = re.compile(r"[<>]|\\(?:le|ge|ne|in|equiv|subset)(?![A-Za-z])")
EQUALS = r"(?<![<>!:\\])=(?!=)"
_SMALL_WORDS = set("am an as at be by do go he if in is it me my no of on or so to up us we ok hi".split())


class Choice(NamedTuple):
    """Choice of a multiple-choice question, with the text after its letter."""

    letter: str
    content: str


class Clock(NamedTuple):
    """Time of day."""

    seconds: int
    half: str  # "a" or "p" for am and pm, "24" for a 24-hour time such as 15:30 or 03:30, "" if ambiguous


@dataclass(frozen=True)
class Items:
    """Answer with several parts: a list, set, tuple, interval, or union of intervals."""

    opening: str
    closing: str
    parts: tuple[str, ...]

    @property
    def ordered(self) -> bool:
        """True for tuples and intervals."""
        return self.opening in ("(", "[")


def read_choice(text: str) -> Choice | None:
    """Read ``B``, ``(B)``, ``(B) 12``, ``B. 12`` or ``option B``."""
    found = _CHOICE.fullmatch(text)
    if found is None:
        return None
    letter = next(group for group in found.groups()[:5] if group)
    content = found[6].strip()
    if (letter.islower() and found[5] and not re.match("(?i)option|choice", text)) or re.search(
        r"\([a-zA-Z]\)|\b[A-J][.):]", content
    ):
        return None
    return Choice(letter.upper(), content)


def read_clock(text: str) -> Clock | None:
    """Read a time of day, such as ``3:30 PM`` or ``15:30``. ``3:2`` is not one."""
    found = _TIME.fullmatch(text)
    half = found[4].lower() if found is not None and found[4] else ""
    if found is None or not (found[2] or half or "clock" in text.lower()):
        return None
    hour, minute, second = int(found[1]), int(found[2] or 0), int(found[3] or 0)
    if hour > 24 or minute > 59 or second > 59 or (half and not 0 < hour < 13):
        return None
    if half:
        hour = hour % 12 + (12 if half == "p" else 0)
    elif hour > 12 or found[1].startswith("0"):
        half = "24"
    return Clock((hour * 60 + minute) * 60 + second, half)


def _same_time(ours: Clock, theirs: Clock) -> bool:
    """Return True if two times are equal. An ambiguous ``3:30`` does not equal ``3:30 PM``."""
    marked = [time.half in ("a", "p") for time in (ours, theirs)]
    return ours.seconds == theirs.seconds and (marked[0] == marked[1] or "" not in (ours.half, theirs.half))


def read_items(text: str) -> Items | None:
    """Read an answer with several parts, separated by commas, semicolons, "and" or "or", with or without brackets."""
    french = re.fullmatch(r"\](.*),(.*)\[", text)
    if french is not None and is_balanced(french[1]) and is_balanced(french[2]):
        return Items("(", ")", (french[1].strip(), french[2].strip()))
    union = split_outside_brackets(text, r"\\cup(?![A-Za-z])")
    if len(union) > 1:
        return Items("", "", tuple(union))
    opening = closing = ""
    inner = text
    for bracket in (r"\{", "{", "(", "["):
        if text.startswith(bracket):
            end = closing_bracket(text, 0)
            closing = next((b for b in (r"\}", "}", ")", "]") if text.endswith(b)), "")
            if closing and end == len(text) - len(closing):
                opening, inner = bracket.lstrip("\\"), text[len(bracket) : end]
                closing = closing.lstrip("\\")
            else:
                closing = ""
            break
    comma = r",(?!\d{3}(?!\d))" if re.search(r",\s|\\ ", inner) else ","
    parts = split_outside_brackets(inner, rf"{comma}\s*(?:and|or)\b|{comma}|;|\band\b|\bor\b|(?<=\d)\s*[或和と]\s*(?=\d)")
    parts = [part for part in parts if part]
    if len(parts) == 1 and not opening:
        sides = split_outside_brackets(inner, r"\\pm(?![A-Za-z])")
        if len(sides) == 2 and sides[1]:
            return Items("", "", (f"{sides[0]}+{sides[1]}".lstrip("+"), f"{sides[0]}-{sides[1]}"))
        numbers = inner.split(" ")
        if len(numbers) > 1 and all(re.fullmatch(r"[-+]?\d+(?:\.\d+)?", number) for number in numbers):
            return Items("[", "]", tuple(numbers))
    if len(parts) > 1 or (opening and opening != "(" and parts):
        return Items(opening, closing, tuple(parts))
    return None


def has_words(text: str) -> bool:
    """Return True if a text contains words, such as ``cat`` and ``AB``, and not only products such as ``xy`` and ``2ab``."""
    text = re.sub(r"\\(?:begin|end|operatorname|math(?:bb|cal))\s*\{[^{}]*\}", " ", text)
    if re.search(r"[^\W\d_A-Za-z]", text):
        return True
    algebra = re.search(r"[+*/^=<>\\|-]|\d[A-Za-z]|[A-Za-z]\d", text) is not None
    for found in re.finditer(r"\\?[A-Za-z]+", text):
        run = found[0]
        if run.startswith("\\") or len(run) < 2 or run in FUNCTIONS or set(run) <= set("xyz"):
            continue
        if algebra and ((len(run) <= 3 and run.islower()) or len(run) == 2) and run.lower() not in _SMALL_WORDS:
            continue
        if len(run) == 2 and run.islower() and run not in _SMALL_WORDS:
            continue
        return True
    return bool(re.search(r"(?<!\d)\d{4}-\d{1,2}-\d{1,2}(?!\d)|(?<![\d/])\d{1,2}/\d{1,2}/\d{2,4}(?!\d)", text)) or bool(
        re.search(r"(?<![_\d])\d+\s+\d", text) or re.fullmatch(r"[A-Z][A-Za-z]*\d[A-Za-z0-9]*", text)
    )


def _words(text: str) -> str:
    """Normalize words: no case, punctuation or leading article, and one name for synonyms."""
    text = re.sub(r"[\W_]+", " ", text.replace(r"\emptyset", "empty set")).strip().casefold()
    text = re.sub(r"^(?:the|an?) (?=\w)", "", text)
    return _NAMES.get(text, text)


def is_label(text: str) -> bool:
    """Return True if a text can be the name on one side of an equation: ``x``, ``f(x)``, ``\\angle ABC``, ``total``."""
    bare = re.sub(r"_\{[^{}]*\}|_\w|'", "", text)
    bare = re.sub(r"(?<=[A-Za-z\s])\([^()]*\)", "", bare)
    bare = re.sub(r"^\([A-Za-z, ]+\)$", "x", bare.strip())
    return bool(bare) and re.search(r"[\d+*/^-]|\\(?:sqrt|frac|sum|int|lim|cdot|times|pm)(?![A-Za-z])", bare) is None


def strip_unit(text: str) -> tuple[str, Unit | None]:
    """Split a unit from the end of an expression such as ``2\\sqrt{3} cm``."""
    tail = max(0, len(text) - _LONGEST_UNIT)
    for place in list(re.compile(r"\s+(?=[A-Za-z(])|(?=[°%])").finditer(text, tail))[-_UNIT_WORDS:]:
        before, after = text[: place.start()].strip(), text[place.end() :].strip()
        if not before or not after or (after[:1] == "(" and not re.search(r"[A-Za-z]", after)):
            continue
        if not re.search(r"[\d})\]A-Za-z|]$", before) or not is_balanced(before) or has_words(before):
            continue
        unit = read_unit(after)
        letters = re.search(r"(?<![\\A-Za-z])[A-Za-z](?![A-Za-z])", before) is not None
        if unit is None or (letters and len(after) == 1 and after.isalpha()):
            continue
        if unit.known or re.search(r"[\d\\]", before):
            return before, unit
    return text, None


def _in_base(text: str) -> tuple[str, str] | None:
    found = re.fullmatch(r"\(?([0-9A-Fa-f]+)\)?_\{?\s*([2-9]|[12]\d|3[0-6]|two|three|eight|sixteen)\s*\}?", text)
    return None if found is None else (found[1].lstrip("0").lower() or "0", found[2])


# -- the comparison ------------------------------------------------------------------------------------------------------


def equal(reference: str, answer: str, algebra: Algebra) -> bool:
    """Return True if an answer equals the reference.

    A unit may be missing on one side, but two units must agree. Numbers are compared exactly. A decimal equals a fraction
    with an infinite decimal expansion only if it is that fraction rounded to six or more digits. Order matters in tuples
    and intervals, but not in sets and lists without brackets. Words are compared without case.

    Args:
        reference: The right answer.
        answer: The answer to compare.
        algebra: Compares expressions. Its exceptions are passed on.
    """
    reference, answer = reference.strip(), answer.strip()
    if not reference or not answer:
        return False
    if reference == answer:
        return True
    if max(len(reference), len(answer)) > LONGEST:
        return False
    ours, theirs = clean(reference), clean(answer)
    return bool(ours and theirs) and _equal(ours, theirs, algebra, _DEEPEST)


def _equal(reference: str, answer: str, algebra: Algebra, depth: int) -> bool:
    if reference == answer:
        return True
    if depth == 0 or not reference or not answer:
        return False
    reference, answer = (_SETS.get(text.casefold(), text) for text in (reference, answer))
    decided = _choices(reference, answer, algebra, depth)
    if decided is not None:
        return decided
    times = read_clock(reference), read_clock(answer)
    if times[0] is not None and times[1] is not None:
        return _same_time(times[0], times[1])
    ratios = [re.sub(r"^(\d+)\s*:\s*(\d+)$", r"\1/\2", text) for text in (reference, answer)]
    if ratios != [reference, answer]:
        return _equal(ratios[0], ratios[1], algebra, depth - 1)
    bases = _in_base(reference), _in_base(answer)
    if bases[0] is not None or bases[1] is not None:
        return _equal_in_bases(bases, reference, answer)

    numbers = read_quantity(reference), read_quantity(answer)
    if numbers[0] is not None and numbers[1] is not None:
        return equal_quantities(numbers[0], numbers[1])
    reference, answer = (re.sub(r"^[A-Za-z]\s*\\in(?![A-Za-z])\s*", "", text) for text in (reference, answer))
    lists = read_items(reference), read_items(answer)
    for number, text in ((numbers[0], answer), (numbers[1], reference)):
        if number is not None and re.fullmatch(r"-?\d+,\d+", text):  # a decimal comma
            return equal_numbers(number, Quantity(Fraction(text.replace(",", "."))))
    if (lists[0] is not None and numbers[0] is None) or (lists[1] is not None and numbers[1] is None):
        return _equal_lists(
            lists[0] if numbers[0] is None else None,
            lists[1] if numbers[1] is None else None,
            reference,
            answer,
            algebra,
            depth,
        )

    sides = [split_outside_brackets(text, EQUALS) for text in (reference, answer)]
    if len(sides[0]) > 1 or len(sides[1]) > 1:
        return _equal_equations(sides[0], sides[1], reference, answer, algebra, depth)
    related = [_RELATION.search(text) is not None for text in (reference, answer)]
    if related[0] != related[1]:
        return False

    (left, unit), (right, other) = strip_unit(reference), strip_unit(answer)
    if unit is not None or other is not None:
        factor = unit_ratio(unit, other)
        if factor is None:
            return False
        for side in (unit, other):
            if side is not None and side.dimensions == PERCENT and (unit is None or other is None):
                whole = [rf"\frac{{{text}}}{{100}}" if u is side else text for text, u in ((left, unit), (right, other))]
                if _expressions(whole[0], whole[1], algebra):
                    return True
        if factor != 1:
            right = rf"\frac{{{factor.numerator}}}{{{factor.denominator}}} \cdot ({right})"
        return left == right or _equal(left, right, algebra, depth - 1)
    return _expressions(reference, answer, algebra)


def _expressions(reference: str, answer: str, algebra: Algebra) -> bool:
    if any(has_words(text) or r"\emptyset" in text for text in (reference, answer)):
        return _words(reference) == _words(answer) != "" and _operators(reference) == _operators(answer)
    if not (is_balanced(reference) and is_balanced(answer)):
        return False
    reference, answer = (re.sub(r"\*", r" \\cdot ", text) for text in (reference, answer))
    return algebra(reference, answer) or algebra(answer, reference)  # math-verify is not symmetric


def _operators(text: str) -> list[str]:
    """Return the operators in a text, which `_words` removes. Hyphens between letters are not operators."""
    return re.findall(r"[+*/^=<>|%]|(?<![A-Za-z])-|-(?![A-Za-z])", text)


def _choices(reference: str, answer: str, algebra: Algebra, depth: int) -> bool | None:
    ours, theirs = read_choice(reference), read_choice(answer)
    for one, other in ((ours, answer), (theirs, reference)):
        if one is not None and re.fullmatch("[a-e]", other) and read_choice(other) is None:
            return one.letter.lower() == other
    if ours is not None and theirs is not None:
        if ours.letter != theirs.letter:
            return False
        numbers = read_quantity(ours.content), read_quantity(theirs.content)
        return numbers[0] is None or numbers[1] is None or equal_quantities(numbers[0], numbers[1])
    if ours is None and theirs is None:
        return None
    if ours is not None:
        return bool(ours.content) and _equal(ours.content, answer, algebra, depth - 1) if ours.content else None
    assert theirs is not None
    return _equal(reference, theirs.content, algebra, depth - 1) if theirs.content else None


def _equal_in_bases(bases: tuple[tuple[str, str] | None, tuple[str, str] | None], reference: str, answer: str) -> bool:
    """Compare digits, and bases if both answers have one."""
    if bases[0] is not None and bases[1] is not None:
        return bases[0] == bases[1]
    known = bases[0] or bases[1]
    other = answer if bases[0] is not None else reference
    return known is not None and (other.replace(",", "").lstrip("0").lower() or "0") == known[0]


def _equal_lists(
    ours: Items | None, theirs: Items | None, reference: str, answer: str, algebra: Algebra, depth: int
) -> bool:
    if ours is None or theirs is None:
        many, one = (ours, answer) if theirs is None else (theirs, reference)
        assert many is not None
        if _RELATION.search(one) is not None or r"\begin" in one:
            return _expressions(reference, answer, algebra)
        pairs = ((part, one) if theirs is None else (one, part) for part in many.parts)
        if (len(many.parts) == 1 or many.opening in ("", "{")) and all(_equal(*pair, algebra, depth - 1) for pair in pairs):
            return True
        sides = split_outside_brackets(one, EQUALS)
        if len(sides) == 2 and is_label(sides[0]):
            pair = (sides[1], answer) if ours is None else (reference, sides[1])
            return _equal(*pair, algebra, depth - 1)
        return False
    brackets = {ours.opening, theirs.opening}
    if "" not in brackets and len(ours.parts) == 2 and (ours.opening, ours.closing) != (theirs.opening, theirs.closing):
        return False
    half_open = any(each.opening + each.closing in ("[)", "(]") for each in (ours, theirs))
    if brackets == {"(", "{"} or ("" in brackets and half_open):
        return False
    labels = [[split_outside_brackets(part, EQUALS) for part in each.parts] for each in (ours, theirs)]
    labelled = [all(len(sides) == 2 for sides in each) and len({sides[0] for sides in each}) == len(each) for each in labels]
    ordered = "{" not in brackets and (ours.ordered or theirs.ordered or labelled[0] != labelled[1])
    left, right = list(ours.parts), list(theirs.parts)
    if len(left) != len(right) and not ordered:
        left, right = _distinct(left), _distinct(right)
    if len(left) != len(right) or (len(left) > 40 and not ordered):
        return False
    if ordered:
        return all(_equal(a, b, algebra, depth - 1) for a, b in zip(left, right, strict=True))
    for part in left:
        place = next((i for i, other in enumerate(right) if _equal(part, other, algebra, depth - 1)), None)
        if place is None:
            return False
        del right[place]
    return True


def _distinct(parts: Sequence[str]) -> list[str]:
    found: list[str] = []
    for part in parts:
        if not any(_equal(part, other, lambda *_: False, 2) for other in found):
            found.append(part)
    return found


def _equal_equations(ours: list[str], theirs: list[str], reference: str, answer: str, algebra: Algebra, depth: int) -> bool:
    if len(ours) > 1 and len(theirs) > 1:
        if len(ours) == len(theirs) == 2:
            for left in (ours, ours[::-1]):
                for right in (theirs, theirs[::-1]):
                    if left[0] == right[0]:
                        return _equal(left[1], right[1], algebra, depth - 1)
            named = [re.fullmatch(r"\\?[A-Za-z]+(?:_\S+)?", side[0]) and read_quantity(side[1]) for side in (ours, theirs)]
            if all(named):
                return False
        return _expressions(reference, answer, algebra)
    chain, other = (ours, answer) if len(ours) > 1 else (theirs, reference)
    if is_label(chain[-1]) and not is_label(chain[0]):
        chain = chain[::-1]
    if not all(is_label(side) or not re.search(r"(?<![\\A-Za-z])[A-Za-z]", side) for side in chain[:-1]):
        return False
    value = chain[-1]
    return _equal(value, other, algebra, depth - 1) if len(ours) > 1 else _equal(other, value, algebra, depth - 1)
