r"""Normalize the text of answers: ``**42**.``, ``\[42\]`` and ``42`` become the same text."""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Sequence

_ROUNDS = 12  # maximum depth of nested decorations that are removed
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ", "0123456789+-()n")
_SUBSCRIPT = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_GREEK = {
    letter: name
    for name, letters in {
        "alpha": "α", "beta": "β", "gamma": "γ", "delta": "δ", "epsilon": "ε", "theta": "θ", "lambda": "λ",
        "mu": "μ", "pi": "π", "rho": "ρ", "sigma": "σ", "tau": "τ", "phi": "φϕ", "omega": "ω", "Delta": "Δ", "Omega": "Ω",
    }.items()
    for letter in letters
}  # fmt: skip
_SYMBOLS = {
    **dict.fromkeys("−‐‑‒﹣－", "-"),
    **dict.fromkeys("×✕⨯", r"\times "),
    **dict.fromkeys("·⋅∙", r"\cdot "),
    **dict.fromkeys("÷∕⁄", "/"),
    **dict.fromkeys("“”„«»＂", '"'),
    **dict.fromkeys("‘’′", "'"),
    **dict.fromkeys("。．", "."),
    **dict.fromkeys("，、", ","),
    **dict.fromkeys("\u200b\u200c\u200d\ufeff\u2060", ""),
    "∞": r"\infty ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∪": r"\cup ",
    "∩": r"\cap ", "∈": r"\in ", "∅": r"\emptyset ", "≈": r"\approx ", "º": "°", "ℝ": r"\mathbb{R}",
    "ℤ": r"\mathbb{Z}", "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}",
    **{letter: rf"\{name} " for letter, name in _GREEK.items()},
}  # fmt: skip
_TABLE = str.maketrans(_SYMBOLS)
FUNCTIONS = (
    "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc log ln exp max min gcd lcm det dim ker deg arg lim mod"
).split()
_REWRITES: Sequence[tuple[re.Pattern[str], str]] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\(?:left|right)(?![A-Za-z])\s*\.?", ""),
        (r"\\(?:[bB]igg?[lr]?|displaystyle|textstyle|limits)(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"(?<!\\)\\!", ""),
        (r"(\d)\{,\}(\d{3})(?!\d)", r"\1,\2"),
        (r"(\d)\{,\}(\d)", r"\1.\2"),
        (r"(?<!\\)\\[,;:> ]|~|\\q?quad(?![A-Za-z])|\\(?:thinspace|enspace|hspace\{[^{}]*\})", " "),
        (r"\\(?:text|math)(?:rm|sf|tt|up|normal)\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:text|mbox|hbox)(?:bf|it)?\s*\{([^{}]*)\}", r" \1 "),
        (r"\\(?:math(?:bf|it)|emph|textsc|boldsymbol|bm|underline)\s*\{([^{}]*)\}", r"\1"),
        (r"\\([%$#_])", r"\1"),
        (r"\s*(?:\^\s*(?:\{\s*\\circ\s*\}|\\circ(?![A-Za-z]))|\\degrees?(?![A-Za-z]))", "°"),
        (r"\\(?:geqslant|geq|ge)(?![A-Za-z])|>=", r"\\ge "),
        (r"\\(?:leqslant|leq|le)(?![A-Za-z])|<=", r"\\le "),
        (r"\\(?:neq|ne)(?![A-Za-z])|!=", r"\\ne "),
        (r"\\lt(?![A-Za-z])", "<"),
        (r"\\gt(?![A-Za-z])", ">"),
        (r"\\(?:varnothing|empty)(?![A-Za-z])", r"\\emptyset "),
        (r"\\(?:l?dots|cdots)(?![A-Za-z])|…", "..."),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\langle(?![A-Za-z])", "("),
        (r"\\rangle(?![A-Za-z])", ")"),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"\\frac\s*(\{[^{}]*\})\s*(\d)", r"\\frac\1{\2}"),
        (r"\*\*", "^"),
        (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
        (r"√\s*(\d+(?:\.\d+)?|[A-Za-z])", r"\\sqrt{\1}"),
        (r"(?:√|(?<![\\A-Za-z])sqrt)\s*\(([^()]*)\)", r"\\sqrt{\1}"),
        (r"\^\s*([-+]?\d+)", r"^{\1}"),
        (r"\^\s*\(([^()]*)\)", r"^{\1}"),
        (r"(?<![\\A-Za-z])(?:infinity|infty|inf)(?![A-Za-z])", r"\\infty "),
        (r"(?<![\\A-Za-z])(pi|theta|alpha|beta|gamma|lambda)(?![A-Za-z])", r"\\\1 "),
        (rf"(?<![\\A-Za-z])({'|'.join(FUNCTIONS)})\s*(?=[(^_])", r"\\\1"),
        (r"(?<![\\A-Za-z])(sin|cos|tan|cot|csc|log|ln|arcsin|arccos|arctan) (?=[a-z0-9\\](?![a-z]))", r"\\\1 "),
        (r"\s+(?=[\^_])", ""),
        (r"\^([A-Za-z])(?![A-Za-z])", r"^{\1}"),
        (r"\|\s+|\s+\|", "|"),
        (r"([)\]])\s*U\s*([(\[])", r"\1\\cup \2"),
        (r"(?<!\d)(\d+) out of (\d+)(?!\d)", r"\1/\2"),
    )
]
_PAIRS = [
    ("$$", "$$"), ("$", "$"), (r"\(", r"\)"), (r"\[", r"\]"), ("**", "**"), ("__", "__"), ("```", "```"), ("`", "`"),
    ("*", "*"), ("_", "_"), ('"', '"'), ("'", "'"), ("``", "''"),
]  # fmt: skip
_TRAILING = re.compile(r"(?:[\s,;:]|\\\\|\\(?=$)|\\[,;:!.](?=$)|(?<!\.\.)\.(?=$))+$")
_TAIL = 40  # characters at the end that one search covers
_LEADING = re.compile(
    r"^(?:[\s:]|=|(?:the\s+)?(?:final\s+)?answer\s*(?:is\b|:)|\\(?:approx|simeq|sim)(?![A-Za-z])|(?:approximately|approx\.?|about|roughly|around|exactly|only|either|both)\s)+",
    re.IGNORECASE,
)


def clean(text: str) -> str:
    r"""Normalize the text of an answer.

    Emphasis, TeX delimiters, ``\boxed``, quotes and punctuation around the answer are removed. Unicode signs, digits and
    fractions, TeX spaces, ``\text``, ``\dfrac`` and ``**`` are replaced by a canonical spelling. Markup inside is kept.
    """
    text = re.sub(r"\s+", " ", text)
    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿ]+", lambda found: f"^{{{found[0].translate(_SUPERSCRIPT)}}}", text)
    text = re.sub("[₀₁₂₃₄₅₆₇₈₉₊₋₍₎]+", lambda found: f"_{{{found[0].translate(_SUBSCRIPT)}}}", text)
    text = re.sub(r"(\d?)\s*([¼½¾⅐-⅞])", _vulgar, text)
    text = re.sub(r"(?<=\d)\s*[–—]\s*(?=\d)", " to ", text).replace("–", "-").replace("—", "-")
    text = unicodedata.normalize("NFKC", text.translate(_TABLE)).translate(_TABLE)
    for _ in range(_ROUNDS):
        before = text
        text = _strip_decoration(text)
        for pattern, replacement in _REWRITES:
            text = pattern.sub(replacement, text)
        text = re.sub(r"\s+", " ", text).strip()
        if text == before:
            break
    return text


def _strip_trailing(text: str) -> str:
    """Remove punctuation from the end. The search begins near the end, since one from the start takes quadratic time."""
    while (found := _TRAILING.search(text, bound := max(0, len(text) - _TAIL))) is not None:
        text = text[: found.start()]
        if found.start() > bound:
            break
    return text


def _vulgar(found: re.Match[str]) -> str:
    fraction = unicodedata.normalize("NFKC", found[2]).replace("\u2044", "/")
    return f"{found[1]} {fraction}" if found[1] else fraction


def _strip_decoration(text: str) -> str:
    text = _LEADING.sub("", _strip_trailing(text.strip()))
    if re.fullmatch(r"\\?\{ ?\\?\}", text):
        return r"\emptyset"
    for opening, closing in _PAIRS:
        inside = text[len(opening) : -len(closing)]
        if (
            len(text) > len(opening) + len(closing)
            and text.startswith(opening)
            and text.endswith(closing)
            and opening not in inside
            and closing not in inside
        ):
            return inside.strip()
    box = re.match(r"\\f?box(?:ed)?\s*(?=\{)", text)
    start = box.end() if box else 0
    if (
        text[start : start + 1] == "{"
        and closing_bracket(text, start) == len(text) - 1
        and (box or not split_outside_brackets(text[1:-1], ",")[1:])
    ):
        return text[start + 1 : -1].strip()
    return text


# -- brackets ------------------------------------------------------------------------------------------------------------

_BRACKET = re.compile(r"\\begin\s*\{[^{}]*\}|\\end\s*\{[^{}]*\}|\\[{}]|\\.|[()\[\]{}]", re.DOTALL)
_OPENING = {"(": ")", "[": "]", "{": "}", r"\{": r"\}"}


def closing_bracket(text: str, start: int) -> int:
    """Return the index of the bracket that closes the one at ``start``, or -1."""
    depth = 0
    for token in _BRACKET.finditer(text, start):
        depth += _depth_change(token[0])
        if depth == 0:
            return token.start()
    return -1


def _depth_change(token: str) -> int:
    if token in _OPENING or token.startswith(r"\begin"):
        return 1
    return -1 if token in (")", "]", "}", r"\}") or token.startswith(r"\end") else 0


def is_balanced(text: str) -> bool:
    """Return True if every bracket in a text is closed by a bracket of any kind, as in ``[0, 1)``."""
    depth = 0
    for token in _BRACKET.finditer(text):
        depth += _depth_change(token[0])
        if depth < 0:
            return False
    return depth == 0


def split_outside_brackets(text: str, pattern: str) -> list[str]:
    """Split a text at the matches of a regular expression that are outside all brackets."""
    parts, start, depth = [], 0, 0
    for token in re.finditer(rf"(?P<separator>{pattern})|{_BRACKET.pattern}", text, re.DOTALL):
        if token["separator"] is None:
            depth += _depth_change(token[0])
        elif depth <= 0:
            parts.append(text[start : token.start()].strip())
            start = token.end()
    return [*parts, text[start:].strip()]
