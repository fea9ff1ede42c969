"""Find known names that are spelled like a misspelt one."""

from __future__ import annotations

from collections.abc import Iterable
from difflib import SequenceMatcher

_CUTOFF = 0.66  # lowest ratio of `SequenceMatcher` of a near name
_TIE = 0.06  # largest distance to the best ratio


def near_names(name: str, known: Iterable[str], most: int = 3) -> list[str]:
    """Return the known names that are spelled most like a name, best first.

    Case, underscores, hyphens and spaces are ignored. A known name that begins with the name also counts as near.

    Args:
        name: The name, of at least one letter.
        known: The known names.
        most: Maximum number of names to return.

    Example::

        >>> near_names("EMATeachr", ["FixedTeacher", "EMATeacher", "LiveTeacher"])
        ['EMATeacher']
        >>> near_names("max-steps", ["max_steps", "min_steps"])
        ['max_steps']
        >>> near_names("seed", ["seed_everything", "trainer"])
        ['seed_everything']
    """
    wanted = _letters(name)
    matcher = SequenceMatcher()
    matcher.set_seq2(wanted)
    rated: list[tuple[float, str]] = []
    for each in dict.fromkeys(known):
        letters = _letters(each)
        matcher.set_seq1(letters)
        likeness = 0.0
        if matcher.real_quick_ratio() >= _CUTOFF and matcher.quick_ratio() >= _CUTOFF:
            likeness = matcher.ratio()
        if len(wanted) > 2 and letters.startswith(wanted):
            likeness = max(likeness, _CUTOFF)
        rated.append((1.0 if letters == wanted else likeness, each))
    best = max((likeness for likeness, _ in rated), default=0.0)
    found = [(likeness, each) for likeness, each in rated if likeness >= max(_CUTOFF, best - _TIE)]
    if best == 1.0:
        found = [each for each in found if each[0] == 1.0]
    return [each for _, each in sorted(found, key=lambda pair: -pair[0])[:most]]


def question(names: Iterable[str]) -> str:
    """Return a question that suggests names. Empty without names.

    Example::

        >>> question(["ddp", "fsdp2"])
        'Did you mean ddp or fsdp2?'
    """
    listed = " or ".join(names)
    return f"Did you mean {listed}?" if listed else ""


def _letters(name: str) -> str:
    return "".join(letter for letter in name.casefold() if letter not in "_- ")
