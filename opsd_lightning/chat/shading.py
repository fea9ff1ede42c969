"""Divergence of tokens in a terminal."""

from __future__ import annotations

import math
from collections.abc import Sequence

from opsd_lightning.utils.terminal import safe_text

# Background colours of the 256-colour palette, from pale to dark orange, all readable under black text.
_SHADES = (230, 229, 223, 222, 216, 215, 209, 208)
_DARKEST = 2.0  # nats of the darkest shade
_MOST = 3  # tokens to name


def shaded(pieces: Sequence[str], divergence: Sequence[float]) -> str:
    """Return the text of tokens with ANSI background colours by their divergence.

    Args:
        pieces: The text of each token.
        divergence: The divergence at each token, in nats.
    """
    parts = []
    for piece, value in zip(pieces, divergence, strict=True):
        # A shade ends before a newline: a terminal would fill the rest of the line.
        lines = [_on_shade(line, value) if line else "" for line in safe_text(piece).split("\n")]
        parts.append("\n".join(lines))
    return "".join(parts)


def _on_shade(text: str, value: float) -> str:
    share = math.sqrt(min(max(value, 0.0) / _DARKEST, 1.0))  # the square root makes small values visible
    place = round(share * len(_SHADES))
    return text if place == 0 else f"\x1b[30;48;5;{_SHADES[place - 1]}m{text}\x1b[0m"


def summary(pieces: Sequence[str], divergence: Sequence[float]) -> str:
    """Return the mean divergence and the tokens with the largest one, as a line of text."""
    if not divergence:
        return "The answer is empty."
    order = sorted(range(len(pieces)), key=lambda place: -divergence[place])[:_MOST]
    named = ", ".join(f"{pieces[place]!r} {divergence[place]:.2f}" for place in order)
    mean = sum(divergence) / len(divergence)
    return f"Divergence of student and teacher: {mean:.3f} nats a token, most at {named}."
