"""Figure of some rollouts with shaded tokens, for loggers that show images but no HTML pages. Needs matplotlib."""

from __future__ import annotations

import math
import re
from typing import TYPE_CHECKING, Any

import numpy as np

if TYPE_CHECKING:
    from matplotlib.figure import Figure

COLUMNS, LINES, ROLLOUTS = 104, 14, 4  # characters per line, lines per rollout, rollouts
# A character of DejaVu Sans Mono is 0.60205 times as wide as its font size. At this size it is 10 pixels wide, so that
# rounding does not move a character off its shade.
_DPI, _COLUMN, _LINE, _SIZE = 120, 10 / 120, 0.235, 6 / 0.60205  # widths and heights in inches, font size in points
_INK, _SOFT, _HOT, _COLD = "#23201c", "#645d54", (0xEF, 0x8B, 0x2C), (0x55, 0xA6, 0xC8)
_PLAIN = re.compile("[ -~\u00a1-\u00ac\u00ae-\u024f\u0370-\u03ff\u00b7\u00d7\u2026\u2212\u221a\u2260\u2264\u2265]")
_GRADES = {"correct": "correct", "wrong": "wrong", "none": "no answer", "ungraded": "no reference"}


def draw(step: dict[str, Any]) -> Figure:
    """Draw the rollouts of one step.

    Args:
        step: A step of the data that `TokenReport` writes.
    """
    rollouts = [rollout for rollout in step["rollouts"] if rollout["tokens"]][:ROLLOUTS]
    name = next((n for n in ("forward_kl", "loss") if rollouts and n in rollouts[0]), "loss")
    values = np.abs([v for rollout in rollouts for v in rollout.get(name, ()) if v is not None])
    top = float(np.quantile(values, 0.99, method="lower") or values.max() or 1.0) if values.size else 1.0
    lines: list[tuple[str, list[tuple[int, str, float]]]] = []  # each a heading, or shaded pieces with their columns
    for rollout in rollouts:
        cut = ", truncated" if rollout["truncated"] else ""
        name_of = "Repeated question" if rollout.get("repeated") else "Rollout"
        heading = f"{name_of} {rollout['row'] + 1}: {_GRADES[rollout['grade']]}{cut}, {rollout['length']} tokens. "
        lines.append((_cut(heading + _plain(rollout["question"]), COLUMNS), []))
        lines += [("", line) for line in _wrapped(_texts(step, rollout), rollout.get(name, []))]
        lines.append(("", []))
    title = f"Step {step['step']}: {name.replace('_kl', ' KL')} of each token. Darkest shade: {top:.3g} nats or more"
    return _figure(title, lines, top)


def _figure(title: str, lines: list[tuple[str, list[tuple[int, str, float]]]], top: float) -> Figure:
    from matplotlib.collections import PolyCollection
    from matplotlib.figure import Figure

    height = len(lines) + 2
    figure = Figure(figsize=(COLUMNS * _COLUMN + 0.5, height * _LINE + 0.3), dpi=_DPI, facecolor="white")
    axes = figure.add_axes((0.25 / figure.get_figwidth(), 0.0, 1 - 0.5 / figure.get_figwidth(), 1.0))
    axes.set_xlim(0, COLUMNS)
    axes.set_ylim(height + 0.6, -0.6)
    axes.axis("off")
    # A dollar sign must not start a formula.
    common: dict[str, Any] = {"va": "center", "parse_math": False, "clip_on": True}
    axes.text(0, 0, title, fontsize=11, color=_INK, weight="bold", **common)
    boxes: list[list[tuple[float, float]]] = []
    colours: list[tuple[float, ...]] = []
    for number, (heading, pieces) in enumerate(lines, start=2):
        if heading:
            axes.text(0, number, heading, fontsize=9.5, color=_SOFT, **common)
        for column, text, value in pieces:
            share = math.sqrt(min(1.0, abs(value) / top))  # the square root makes small values visible
            colours.append(tuple(1 - share * (1 - part / 255) for part in (_COLD if value < 0 else _HOT)))
            left, right, upper, lower = column, column + len(text), number - 0.46, number + 0.46
            boxes.append([(left, upper), (right, upper), (right, lower), (left, lower)])
        if pieces:
            line = "".join(text for _, text, _ in pieces)
            axes.text(0, number, line, fontsize=_SIZE, color=_INK, family="DejaVu Sans Mono", **common)
    axes.add_collection(PolyCollection(boxes, facecolors=colours, linewidths=0))
    return figure


def _texts(step: dict[str, Any], rollout: dict[str, Any]) -> list[str]:
    found = []
    for place, token in enumerate(rollout["tokens"]):
        piece = step["pieces"][token]
        text = rollout["joined"].get(place, piece if isinstance(piece, str) else piece[0])
        found.append(text or "\u00b7")
    return found


def _wrapped(texts: list[str], values: list[float | None]) -> list[list[tuple[int, str, float]]]:
    """Break shaded pieces into at most `LINES` lines of `COLUMNS` characters."""
    lines: list[list[tuple[int, str, float]]] = [[]]
    column = 0
    for text, value in zip(texts, values, strict=False):
        for number, part in enumerate(text.split("\n")):
            if number:  # after a newline
                lines.append([])
                column = 0
            part = _plain(part)
            while part:
                if column >= COLUMNS or (column > 0 and column + len(part) > COLUMNS >= len(part)):
                    lines.append([])
                    column = 0
                fits = part[: COLUMNS - column]
                lines[-1].append((column, fits, value or 0.0))
                column, part = column + len(fits), part[len(fits) :]
    if len(lines) > LINES:
        lines = [*lines[: LINES - 1], [(0, "\u2026", 0.0)]]
    return lines


def _plain(text: str) -> str:
    """Replace characters that the font lacks by a box. It has Latin, Greek and a few other characters."""
    return "".join(letter if _PLAIN.match(letter) else " " if letter.isspace() else "\u25a1" for letter in text)


def _cut(text: str, length: int) -> str:
    return text if len(text) <= length else text[: length - 1] + "\u2026"
