"""Tests of the last number of a completion: known texts, and every number in any sentence."""

from __future__ import annotations

from fractions import Fraction

import pytest
from hypothesis import given, strategies as st

from opsd_lightning.grading.last_number import ends_in, last_number, number_of

TEXTS = {
    "Eva has 4 + 5 = 9 books now, so the answer is 9.": 9,
    "so the answer is N.": None,
    "": None,
    "9": 9,
    "It costs $1,234.50.": Fraction("1234.5"),
    "1,2": 2,
    "12 and 1,23": 23,
    "= -3": -3,
    "is -3.0": -3,
    "(-3)": -3,
    "7-3": 3,
    "7 - 3": 3,
    "7 -3": 3,
    "(2 + 5) - 3": 3,
    "x-5": 5,
    "−4": -4,
    "She ends with 10/2": 5,
    "costs .5": Fraction("0.5"),
    ".5": Fraction("0.5"),
    "= -.5 m": Fraction("-0.5"),
    "the answer is...9": 9,
    "4 + 5 is 8 ...9": 9,
    "see 3, No.5": 5,
    "so 9.\n2.8.1": Fraction("2.8"),
    "= - 3": -3,
    "it is - 3.": -3,
    "- 3": -3,
    "- 3.": -3,
    "- 3 apples\n- 5 pears": 5,
    "x - 3": 3,
    "The answer – 9": 9,
    "is –3": -3,
    "3–5": 5,
    "-$3": -3,
    "She has -$3 left": -3,
    r"she owes -\$5.": -5,
    "$7 - $3": 3,
    "$7$ - $3$": 3,
    "so $x = -3$": -3,
    "$- 3$": -3,
    "$-3": -3,
    "1) -3": -3,
    "1) 4\n2) -3": -3,
    "f(x) - 3": 3,
    "f(x) -3": 3,
    "7\n-3": -3,
    "1e3": 1000,
    "It is -2.5E-1 m": Fraction("-0.25"),
    "1e99999": None,
    "room 3e5f": 5,
    r"\boxed{\frac{1}{2}}": Fraction(1, 2),
    r"is -\dfrac{3}{4}.": Fraction(-3, 4),
    r"\frac{-3}{4}": Fraction(-3, 4),
    r"\frac12": Fraction(1, 2),
    r"It is \frac{1}{x}": 1,
    "It is 1/2.": Fraction(1, 2),
    "It is 1/0": None,
    "on 5/6/2024": 2024,
    "v1.2.": Fraction("1.2"),
    "7.": 7,
    "<think>So 8.</think>It is 9": 9,
    "It is 9 <think>or 8": None,
    "9" * 5000: None,
}


@pytest.mark.parametrize("text", TEXTS, ids=lambda text: text[:30])
def test_known_texts(text: str) -> None:
    assert last_number(text) == TEXTS[text]


@given(st.integers(-(10**9), 10**9), st.integers(0, 99), st.sampled_from([" ", "= ", "is $", "**", "("]))
def test_a_number_at_the_end_is_read_as_python_writes_it(whole: int, cents: int, before: str) -> None:
    for text in (f"{whole}", f"{whole:,}", f"{whole}.{cents:02}", f"{whole:,}.{cents:02}"):
        value = Fraction(text.replace(",", ""))
        assert last_number(f"{before}{text} apples.") == number_of(text) == value
        assert ends_in(f"4 + 5 is {before}{text}.", f" {text} ") is True
        assert ends_in(f"{before}{text}1", text) is False


@pytest.mark.parametrize(
    "reference", ["", "N", "3/0", "5 km", "A", "1 2", "--1", "[1]", "nan", "٣", "1e9999", "1/2/3", "2 1/2", "x/2"]
)
def test_references_that_are_no_number_are_not_compared(reference: str) -> None:
    assert number_of(reference) is None and ends_in("It is 1.", reference) is None


@pytest.mark.parametrize(
    ("written", "value"),
    {
        "- 3": -3, "–3": -3, "-$3": -3, r"-\$5": -5, "$5": 5, "+ 4": 4, ".5": Fraction(1, 2), "-.5": Fraction(-1, 2),
        "1e3": 1000, "3/4": Fraction(3, 4), "-3/4": Fraction(-3, 4), r"\frac{1}{2}": Fraction(1, 2), r"-\frac{1}{2}": Fraction(-1, 2),
    }.items(),
)  # fmt: skip
def test_references_and_completions_are_read_alike(written: str, value: Fraction) -> None:
    assert number_of(f" {written}\n") == last_number(written) == last_number(f"It is = {written}.") == value
    assert ends_in(f"It is = {written} in all.", written) is True
