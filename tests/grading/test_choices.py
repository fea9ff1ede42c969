"""Choices read from completions: verdicts by hand, for answers that models write and for traps."""

from __future__ import annotations

import random
import time

import pytest

from helpers.messages import mentions
from opsd_lightning.grading.choice_grader import ChoiceGrader
from opsd_lightning.grading.choices import ChoiceReader, OptionError, read_options
from opsd_lightning.types import ConfigError, Example

NUMBERS = ["10", "12", "14", "16"]
TEXTS = ["Paris", "The Nile", "A whale", "all of the above"]

# What a completion chooses between the options 10, 12, 14 and 16. None: it makes no clear choice.
READ: list[tuple[str, str | None]] = [
    ("B", "B"),
    ("A) 10\n\nThe correct answer is (B) 12.", "B"),  # a first guess above an answer
    ("(A) 10\nThe answer is B.", "B"),
    ("Option A\nThe correct answer is (B) 12.", "B"),
    ("(B) 12\n\nThe answer is B because 5 + 7 = 12.", "B"),
    ("b", "B"),
    ("B.", "B"),
    ("B)", "B"),
    ("(B)", "B"),
    ("[B]", "B"),
    ("(B) 12", "B"),
    ("B. 12", "B"),
    ("b) 12", "B"),
    ("B: 12", "B"),
    ("B - 12", "B"),
    ("**B**", "B"),
    ("**B. 12**", "B"),
    ("**(B)** 12", "B"),
    ("`B`", "B"),
    ("$B$", "B"),
    ("\\boxed{B}", "B"),
    ("So it is $\\boxed{\\text{B}}$.", "B"),
    ("\\boxed{(B) 12}", "B"),
    ("\\boxed{12}", "B"),
    ("Ｂ", "B"),
    ("（B）", "B"),
    ("12", "B"),
    ("12.", "B"),
    ("Option B", "B"),
    ("option b", "B"),
    ("Choice B.", "B"),
    ("Answer: B", "B"),
    ("answer: b", "B"),
    ("**Answer:** B", "B"),
    ("**Answer: B**", "B"),
    ("Answer: (B) 12", "B"),
    ("Answer: 12", "B"),
    ("The answer is B.", "B"),
    ("The answer is (B).", "B"),
    ("The answer is **B**.", "B"),
    ("The answer is **(B) 12**.", "B"),
    ("The answer is 12.", "B"),
    ("The answer is: B", "B"),
    ("The answer is option B.", "B"),
    ("The correct answer is B, because 5 + 7 = 12.", "B"),
    ("The correct option is B) 12.", "B"),
    ("The final answer is $\\boxed{B}$.", "B"),
    ("Therefore, the correct choice is \"B\".", "B"),
    ("I would choose B.", "B"),
    ("I'd pick option B since it equals 12.", "B"),
    ("I choose (B).", "B"),
    ("Option B is correct.", "B"),
    ("B is correct.", "B"),
    ("(B) is the correct answer.", "B"),
    ("Option (B) is the right answer, since 5 + 7 = 12.", "B"),
    ("5 + 7 = 12, so the answer must be B.", "B"),
    ("Adding gives 12.\n\nB", "B"),
    ("Adding gives 12.\n\n(B) 12", "B"),
    ("B. 12\n\nExplanation: 5 + 7 = 12. (A) is too small.", "B"),
    ("B\n\nBecause 5 + 7 = 12.", "B"),
    ("A) 10\nB) 12\nC) 14\nD) 16\n\nThe answer is B.", "B"),
    ("A) 10\nB) 12\nC) 14\nD) 16\n\nB", "B"),
    ("At first the answer is A. But no: the answer is B.", "B"),
    ("The answer is A? Let me check. No, the correct answer is B.", "B"),
    ("Option A is wrong, option C is wrong. Option B is correct.", "B"),
    ("<answer>B</answer>", "B"),
    ("Let me add.\n<answer> (B) </answer>", "B"),
    ('{"answer": "B"}', "B"),
    ("The answer is B, not C.", "B"),
    ("5 + 7 makes twelve, which is (B).", "B"),
    ("The answer is A.", "A"),
    ("The answer is A because it fits.", "A"),
    ("A", "A"),
    ("答案是B", "B"),
    ("答案：B", "B"),
    ("Die Antwort ist B.", "B"),
    ("La respuesta es B.", "B"),
    ("<think>Maybe A.</think>B", "B"),
    ("To solve this, we add 5 and 7 to get 12. So B is the answer.", "B"),
    ("So the answer would be B.", "B"),
    ("My answer: B", "B"),
    ("Final answer: B", "B"),
    ("Final Answer: **(B)**", "B"),
    ("### Answer\nB", "B"),
    ("### Answer\n\n(B) 12", "B"),
    ("Answer:\nB", "B"),
    ("**Answer:**\n\n**B. 12**", "B"),
    ("Correct answer: B. 12", "B"),
    ("The correct answer is B: 12", "B"),
    ("The correct answer is: **B. 12**\n\nExplanation: A is too small", "B"),
    ("B is the correct answer.", "B"),
    ("Therefore B.", "B"),
    ("So, B.", "B"),
    ("Hence, (B).", "B"),
    ("Thus option B.", "B"),
    ("The answer's B", "B"),
    ("It's B.", "B"),
    ("It is B", "B"),
    ("We have 5 + 7 = 12 (B).", "B"),
    ("12 (B)", "B"),
    ("12, which is option B", "B"),
    ("Sure! The answer is B.", "B"),
    ("A. 10 is wrong. B. 12 is right.", "B"),
    ("The answer is B. I hope this helps!", "B"),
    ("B. I hope this helps!", "B"),
    ("The best answer is B", "B"),
    ("Answer - B", "B"),
    ("Ans: B", "B"),
    ("The answer is B\nThe answer is C", "C"),
    ("A because 10 is less", "A"),
    ("a", "A"),
    ("The answer is (B) or 12", "B"),
    ("B, C, and D are wrong, so A is correct.", "A"),
    ("(A), (C) and (D) are wrong, so the answer is (B).", "B"),
    ("Option B is incorrect, so option C is correct.", "C"),
    ("The answer is $12$.", "B"),
    ("12 is the answer.", "B"),
    ("12 is correct", "B"),
    ("The answer is $\\textbf{(B)}\\ 12$", "B"),
    ("\\textbf{(B)}", "B"),
    ("\\boxed{\\textbf{(B) }12}", "B"),
    ("C is incorrect because. The answer is D", "D"),
    ("The answer is D. A is not possible.", "D"),
    ("The answer is\n\nB", "B"),
    ("I believe the answer is likely B.", "B"),
    ("I think the answer is B, but it could be C.", "B"),
    ("I'd go with B", "B"),
    ("We choose option (B) 12.", "B"),
    ("It's B. A is wrong.", "B"),
    ("If 5 + 7 = 12, the answer is B.", "B"),
    ("Thus, 12 is correct, not 14.", "B"),
    # traps
    ("", None),
    ("   \n", None),
    ("<think>The answer is B.", None),
    ("A good question.", None),
    ("A train leaves the station.", None),
    ("A simple sum.\nWe add the numbers.", None),
    ("I think so.", None),
    ("I do not know.", None),
    ("B or C", None),
    ("A or B?", None),
    ("A, B", None),
    ("B and C", None),
    ("The answer is B or C.", None),
    ("The answer is either (B) or (C).", None),
    ("The answer is both B and C.", None),
    ("A) 10\nB) 12\nC) 14\nD) 16", None),
    ("(A) 10 (B) 12 (C) 14", None),
    ("(A) 10, (B) 12", None),
    ("It could be (A) or (C).", None),
    ("It is not (C).", None),
    ("(A) is wrong.", None),
    ("Option A is incorrect.", None),
    ("The answer is not B.", None),
    ("The answer is a matter of taste.", None),
    ("The answer is a number.", None),
    ("The answer is A number between 1 and 20.", None),
    ("The answer is I think twelve.", None),
    ("(B) 14", None),
    ("The answer is (B) 14.", None),
    ("E", None),
    ("The answer is E.", None),
    ("BB", None),
    ("Because.", None),
    ("Bob has 12 pens.", None),
    ("12 or 14", None),
    ("The sum of 5 and 7 is 12 and not 14.", None),
    ("If the answer is B, we would need 13.", None),
    ("Vitamin B is healthy.", None),
    ("Plan B failed.", None),
    ("#### 5", None),
    ("Let's consider option A: 10 no. Option B: 12 yes. Option C: no.", None),
    ("I am sure", None),
    ("Is it A?", None),
    ("A?", None),
    ("The question asks about A.", None),
    ("The answer choices are A, B, C, D.", None),
    ("The answer options are:\nA) 10\nB) 12", None),
    ("Which option is correct? A is the first.", None),
    ("None of the above", None),
    ("The answer is C) 12.", None),
    ("The answer is A) 10, no wait, B) 12.", None),
    ("Both (B) and (C) are correct.", None),
    ("Option B is not correct.", None),
    ("The answer cannot be B.", None),
    ("The answer is none of A, B, C.", None),
    ("The answer is 12.0", None),
    ("The answer is 12 apples", None),
    ("Answer: A) 10 B) 12", None),
    ("I choose A good one.", None),
    ("So (A) is wrong.", None),
    ("It is (A) that is wrong.", None),
]  # fmt: skip

# The same for the options of `TEXTS`.
READ_TEXTS: list[tuple[str, str | None]] = [
    ("Paris", "A"),
    ("paris.", "A"),
    ("The answer is Paris.", "A"),
    ("the nile", "B"),
    ("The answer is the Nile.", "B"),
    ("The answer is: The Nile", "B"),
    ("A whale", "C"),
    ("A whale.", "C"),
    ("The answer is a whale.", "C"),
    ("A", "A"),
    ("A. Paris", "A"),
    ("C. A whale", "C"),
    ("Answer: D. All of the above", "D"),
    ("All of the above.", "D"),
    ("The answer is **All of the above**.", "D"),
    ("C. Paris", None),
    ("A whale is a mammal.", None),
    ("Paris is a city, and the Nile is a river.", None),
    ("Not Paris.", None),
    ("The answer is not Paris.", None),
]  # fmt: skip


@pytest.mark.parametrize(("text", "choice"), READ)
def test_choices_between_numbers(text: str, choice: str | None) -> None:
    example = Example("What is 5 + 7?", "", "B", {"options": NUMBERS})
    grade = ChoiceGrader().grade(text, example)
    assert (grade.answer, grade.score) == (choice, float(choice == "B"))


@pytest.mark.parametrize(("text", "choice"), READ_TEXTS)
def test_choices_between_texts(text: str, choice: str | None) -> None:
    assert ChoiceReader(read_options(TEXTS)).read(text) == choice


def test_the_whole_answer_after_a_pattern_must_be_a_choice() -> None:
    example, grader = Example("?", "", "B", {"options": NUMBERS}), ChoiceGrader(answer_pattern=r"Pick: (.*)")
    assert grader.grade("I think of A. Pick: (B)", example).answer == "B"
    assert grader.grade("Pick: A\nPick: 12", example).answer == "B"
    assert grader.grade("Pick: one that is (B) or so", example).answer is None
    assert grader.grade("B", example).answer is None


@pytest.mark.parametrize(
    "options",
    [
        NUMBERS,
        dict(zip("ABCD", NUMBERS, strict=True)),
        dict(zip("abcd", NUMBERS, strict=True)),
        {"label": list("ABCD"), "text": NUMBERS},
        [*[f"{letter}) {text}" for letter, text in zip("ABCD", NUMBERS, strict=True)], None],
        "A) 10\nB) 12\nC) 14\nD) 16",
        "(A) 10 (B) 12 (C) 14 (D) 16",
    ],
)
def test_forms_of_options(options: object) -> None:
    assert read_options(options) == dict(zip("ABCD", NUMBERS, strict=True))
    grade = ChoiceGrader(options="o").grade("The answer is 12.", Example("?", "", "B", {"o": options}))
    assert grade.answer == "B" and grade.score == 1


def test_options_in_the_question() -> None:
    question = "Plan A) or B) fails.\n\nWhat is 5 + 7?\nA. 10\nB. 12\nC. 14\n\nAnswer with a letter."
    assert read_options(question) == {"A": "10", "B": "12", "C": "14"}
    grader = ChoiceGrader(options=None)
    assert grader.grade("B", Example(question, "", "12")).score == 1
    assert read_options("Which?\n1. red\n2. blue") == {"1": "red", "2": "blue"}
    assert grader.grade("The answer is 2.", Example("Which?\n1. red\n2. blue", "", "blue")).score == 1


@pytest.mark.parametrize(
    "options",
    [[], ["one"], {"A": "x", "a": "y"}, {"first": "x", "second": "y"}, 3, None, "no options", ["a"] * 40, [["a"], ["b"]]],
)
def test_unreadable_options_are_refused(options: object) -> None:
    with pytest.raises(OptionError):
        read_options(options)
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.options")):
        ChoiceGrader(options="o").grade("A", Example("?", "", "A", {"o": options}))


@pytest.mark.parametrize(
    ("settings", "reference"),
    [
        ({}, "B"), ({}, "b"), ({}, "(B)"), ({}, "12"), ({}, "(B) 12"), ({}, "B. 12"), ({"reference": "letter"}, "B"), ({"reference": "text"}, "12"),
        ({"reference": "index"}, "1"), ({"reference": "index", "first_index": 1}, "2"),
    ],
)  # fmt: skip
def test_forms_of_references(settings: dict[str, object], reference: str) -> None:
    grader = ChoiceGrader(**settings)  # type: ignore[arg-type]
    example = Example("?", "", reference, {"options": NUMBERS})
    assert [grader.grade(text, example).score for text in ("B", "12", "A", "14")] == [1, 1, 0, 0]


@pytest.mark.parametrize(
    ("settings", "reference", "options"),
    [
        ({}, "E", NUMBERS), ({}, "13", NUMBERS), ({}, "(B) 14", NUMBERS), ({"reference": "letter"}, "12", NUMBERS),
        ({"reference": "text"}, "B", NUMBERS), ({"reference": "index"}, "B", NUMBERS), ({"reference": "index"}, "4", NUMBERS),
        ({"reference": "index", "first_index": 1}, "0", NUMBERS), ({}, "B", ["B", "A"]), ({}, "same", ["same", "same", "x"]),
    ],
)  # fmt: skip
def test_references_that_are_no_option_or_two_are_refused(
    settings: dict[str, object], reference: str, options: list[str]
) -> None:
    grader = ChoiceGrader(**settings)  # type: ignore[arg-type]
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.reference")):
        grader.grade("A", Example("?", "", reference, {"options": options}))


def test_letters_that_are_also_texts_need_the_form_of_the_reference() -> None:
    example = Example("Which letter comes first?", "", "A", {"options": ["B", "A"]})
    assert ChoiceGrader(reference="text").grade("(B) A", example).score == 1
    assert ChoiceGrader(reference="text").grade("A", example).score == 0  # a label, or a text: unclear


def test_missing_options_and_references() -> None:
    with pytest.raises(ConfigError, match=mentions("data.grader.init_args.options", "options", "question")):
        ChoiceGrader().grade("A", Example("?", "", "A", {"question": "?"}))
    grade = ChoiceGrader().grade(
        "B", Example("?", "", "", {"options": NUMBERS})
    )  # a trace whose answer becomes the reference
    assert grade.answer == "B" and grade.score == 0


def test_long_and_hostile_texts_are_read_in_time() -> None:
    rng = random.Random(0)
    reader = ChoiceReader(read_options(NUMBERS))
    atoms = [
        "(A) ",
        "B) ",
        "the answer is ",
        "option ",
        "\n",
        "A\n",
        "**",
        "\\boxed{",
        "$",
        "or ",
        "B",
        "<answer>",
        "not ",
        "(",
        "A) 10\n",
        "\\text{",
        " ",
        "I choose ",
    ]
    texts = [atom * 20_000 for atom in atoms] + ["".join(rng.choice(atoms) for _ in range(30_000)) for _ in range(5)]
    for text in texts:
        started = time.thread_time()
        reader.read(text)
        assert time.thread_time() - started < 5.0, text[:60]
    assert reader.read("x " * 500_000 + "The answer is B.") == "B"
