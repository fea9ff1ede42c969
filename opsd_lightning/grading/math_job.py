"""Job of a worker: compare two expressions with math-verify. Runs in the process of ``worker``."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

MEMORY = 1 << 30
"""Limit of a worker's address space in bytes. Has no effect on macOS."""

Answer = Callable[[Any], Any]


def load() -> Answer:
    """Import math-verify and return a comparison function. Its parser is warmed up, so that workers inherit the caches.

    A question of the function is a pair of the reference and the answer to compare, the answer to it True or False.
    """
    import logging

    import sympy.core.random
    from latex2sympy2_extended.latex2sympy2 import NormalizationConfig
    from math_verify import ExprExtractionConfig, LatexExtractionConfig, parse, verify

    logging.disable()
    # math-verify's default without units: with units it reads the variable in 2h as hours, and 5 km as 5 m.
    spelling = NormalizationConfig(
        basic_latex=True, units=False, malformed_operators=True, nits=True, boxed="all", equations=False
    )
    forms = [LatexExtractionConfig(normalization_config=spelling), ExprExtractionConfig()]

    def parsed(text: str) -> list[object]:
        # math-verify's own timeouts are off, because the alarm ends the whole process.
        found = parse(rf"$\boxed{{{text}}}$", forms, parsing_timeout=None)
        return found or parse(text, forms, parsing_timeout=None)

    def compare(question: Any) -> bool:
        reference, answer = question
        random.seed(0)  # sympy tests random numbers, and a verdict must not depend on earlier comparisons
        sympy.core.random.seed(0)
        try:
            return bool(verify(parsed(reference), parsed(answer), timeout_seconds=None))
        except MemoryError:
            raise
        except Exception:  # text that the parser cannot handle is a wrong answer
            return False

    for reference, answer in ((r"\frac{x}{2}", "0.5x"), (r"\sqrt{8}", r"2\sqrt{2}"), ("x^2+2x+1", "(x+1)^2")):
        compare((reference, answer))
    return compare
