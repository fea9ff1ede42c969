"""Tests of finding the final answer of a text, for all forms of answers and phrasings."""

from __future__ import annotations

import time

import pytest

from helpers.grading import with_answers
from opsd_lightning.grading.final_answer import final_answer
from opsd_lightning.grading.math_grader import MathGrader

pytestmark = pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.grading")


GRADER = MathGrader()
FORMS = [
    "42", "7", "-17", "−8", "+3", "1,234", "1,234,567", "12 000", "3.75", ".5", "-0.25", "3/4", "-7/8", "5 2/3", "2½", "\\frac{3}{8}",
    "2^12", "2**12", "10¹²", "1e-07", "6.02 × 10^23", "9 kg", "12 km/h", "8 cm^2", "3 m²", "45°", "60 degrees", "15 °C", "12.5%",
    "30 percent", "$18", "$1,250.75", "€7.50", "19 dollars", "4:15", "4:15 PM", "16:05", "x + 3", "x^2 - 5x + 6", "(x-2)(x-3)",
    "y = 4", "y = 4 and z = 9", "3\\sqrt{5}", "sqrt(7)", "√11", "4π", "2 + 3i", "(2, 5)", "[3, 8)", "(-∞, 4]", "]1, 6[", "{2, 4, 6}",
    "\\{2, 4\\}", "2, 4, 6", "2, 4, and 6", "3 or 9", "(C)", "C", "C) 15", "(C) 15", "C. 15", "option C", "5:8", "yes", "True",
    "no solution", "infinity", "nine", "thirty-two", "three and a half", "2 million", "1 hour and 20 minutes",
    "Madrid", "New Zealand", "0.454545...", "2023-11-05", "x > 7", "11_2",
]  # fmt: skip
PHRASES = [
    "The answer is {}.", "So the answer is {}", "The final answer is: {}.", "the correct answer is therefore {}.", "Answer: {}",
    "**Answer:** {}", "**Answer: {}**", "**Final Answer**\n\n{}", "### Answer\n{}\n", "Final answer = {}", "The answer is **{}**.",
    "The answer is `{}`.", "The answer is {}, as was to be shown.", "The answer is {} because nothing else fits.",
    "The answer is {}; we are done.", "(Hence the answer is {})", "The answer is {}\nLet me know if this answer helps!",
    "<answer>{}</answer>", "<think>The answer is 1001.</think>\nThe answer is {}.", "The answer is 1001. No: the answer is {}.",
    "答案是{}。", "答案：{}", "Die Antwort ist {}.", "Réponse : {}", "La respuesta es {}.", "Ответ: {}", "The answer is：{}。",
]  # fmt: skip
IN_TEX = ["The answer is ${}$.", "The answer is \\({}\\), as shown.", "Answer: $${}$$", "The answer is\n\\[ {} \\]", "Answer: \\boxed{{{}}}",
          "It is $\\boxed{{{}}}$ and no other.", "So \\boxed {{{}}}", "\\fbox{{{}}}"]  # fmt: skip
TEX = ["42", "-17", "1,234", "3.75", "\\frac{3}{8}", "5\\frac{2}{3}", "2^{12}", "12.5\\%", "9 \\text{ kg}", "45^\\circ", "x^2 - 5x + 6", "(2, 5)",
       "[3, 8)", "\\{2, 4\\}", "2, 4", "y = 4", "3\\sqrt{5}", "\\infty", "(-\\infty, 4] \\cup [9, \\infty)", "x \\ge 7",
       "\\begin{pmatrix} 1 & 2 \\\\ 3 & 4 \\end{pmatrix}", "\\text{no solution}"]  # fmt: skip


@pytest.mark.parametrize("phrase", PHRASES)
def test_answer_forms_are_found_in_phrases(phrase: str) -> None:
    found = {form: GRADER.find_answer("First we add.\n" + phrase.format(form)) for form in FORMS}
    assert {form: answer for form, answer in found.items() if answer != form} == {}


@pytest.mark.parametrize("phrase", IN_TEX)
def test_answer_forms_are_found_in_tex(phrase: str) -> None:
    found = {form: GRADER.find_answer(phrase.format(form)) for form in TEX}
    assert {form: answer for form, answer in found.items() if answer != form} == {}


@pytest.mark.parametrize("form", ["42", "-17", "1,234", "3/4", "5 2/3", "$18", "2.5", "x + 3", "(2, 5)", "**42**", "$42$"])
def test_gsm8k_marker_is_read(form: str) -> None:
    assert final_answer(f"5 + 5 = 10\n#### {form}\n") == form.strip("*") if form != "$42$" else "42"


@pytest.mark.parametrize(
    "text",
    [
        "", " ", "There is none.", "Answer:", "The answer is", "The answer is ...", "The answer is **.**", "\\boxed{}", "\\boxed{ \\, }",
        "#### 3. Divide\nThe sum is 12.", "#### 3 Divide", "#### 3) Divide", "#### Step 4", "#### 3\nThen we divide by 2.", "##### 5",
        "## 7", "The answer is obvious.", "The answer is not 5.", "If the answer is 5, we are done.", "The answer is 5 +", "The answer is (3, 4",
        "The answer is $5 + x", "The answer is \\boxed{5", "The answer is 5 apples are left.", "The answer is 7 more than 3.",
        "The answer is 5 feet by 3 feet.", "The answer is between 5 and 6 or so.", "Answer: First we add 2 and 3.", "so the answer is N.",
        "The answer is 5. Wait, the answer is about 6 times 7 of them.", "<think>The answer is 5.", "The answer is 5. <think>Is it?",
        "<think>\\boxed{5}</think>", "<think>The answer is 5.</think> Done.", "[THINK]Answer: 5", "x </think> y",
    ],
)  # fmt: skip
def test_no_answer_rather_than_a_fragment(text: str) -> None:
    assert final_answer(text) is None
    assert MathGrader(answer_pattern=None).find_answer(text) is None


@pytest.mark.parametrize(
    ("text", "answer"),
    [
        ("\\boxed 7", "7"), ("$\\boxed 42$", "42"), ("\\boxed{3} or \\boxed{4}", "3, 4"), ("$x=\\boxed{3}$ and $x=\\boxed{4}$", "3, 4"),
        ("\\boxed{3}, no: \\boxed{4}", "4"), ("\\boxed{5}, so write it within \\boxed{}", "5"), ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("Answer: 5. Write it within \\boxed{}", "5"), ("<think>\\boxed{5}</think>\\boxed{6}", "6"), ("\\boxed{5}</think>\\boxed{6}", "6"),
        ("The answer is 8 (eight).", "8"), ("The answer is 8, not 9.", "8"), ("The answer is 8!", "8"), ("The answer is approximately 2.5.", "2.5"),
        ("The answer is $3$ or $4$.", "3 or 4"), ("The answer is **3** or **4**.", "3 or 4"), ("The answer is **blue**.", "blue"),
        ("答えは8です。", "8"), ("정답은 8입니다.", "8"), ("The answer is 8<|im_end|>", "8"), ("Answer (in km): 8", "8"),
        ("The answer is 6 red marbles.", "6"), ("The answer is 2 3/4 spoons, say.", "2 3/4"), ("The answer is 3 million people.", "3 million"),
        ("答案是8个。", "8"), ("The answer is 7 km away.", "7 km away"), ("The answer is 4 dogs and 2 cats.", "4 dogs and 2 cats"), ("#### 6 eggs", "6"),
    ],
)  # fmt: skip
def test_final_answers_are_read(text: str, answer: str) -> None:
    assert final_answer(text) == answer


@pytest.mark.parametrize(
    ("completion", "fragment"),
    [("The answer is 5 2/3.", "5"), ("The answer is 8 or 9.", "8"), ("The answer is 2^5.", "2"), ("The answer is 4 out of 7.", "4"),
     ("The answer is 3 million.", "3"), ("The answer is x = 2 or x = 6.", "2"), ("The answer is 7:45.", "7"), ("The answer is (4, 9).", "4")],
)  # fmt: skip
def test_fragments_are_not_graded_right(completion: str, fragment: str) -> None:
    assert GRADER.find_answer(completion) is not None and GRADER.grade(completion, *with_answers([fragment])).score == 0


@pytest.mark.parametrize(
    "text",
    ["\\boxed{", "\\boxed ", "\\boxed{1},", "9", " ", "\n", "answer is ", "the final ", "answer to ", "answer (", "#### ", "**", "$", "(", "<", "\\",
     "答案", "<think>", "The answer is 1,", "the "],
)  # fmt: skip
def test_hostile_text_takes_bounded_time(text: str) -> None:
    started = time.perf_counter()
    final_answer("The answer is 5. " + text * (100_000 // len(text)))
    final_answer("answer" + text * (100_000 // len(text)) + "}")
    assert time.perf_counter() - started < 15


def test_user_pattern_runs_in_bounded_time() -> None:
    grader = MathGrader(answer_pattern=r"((?:\w+\s?)+)=", timeout_seconds=0.5)
    started = time.perf_counter()
    assert grader.find_answer("a" * 100_000) is None
    assert time.perf_counter() - started < 10


def test_user_pattern_is_matched() -> None:
    grader = MathGrader(answer_pattern=r"=> *(\w*)|end")
    assert grader.find_answer("=> 4 => 5 => end") == "end"
    assert grader.find_answer("=> 4 end") == "4", "a match without the group is none"
    assert grader.find_answer("=> ") is None
    assert grader.find_answer("<think>=> 4</think>") is None and grader.find_answer("<think>=> 4</think>=> 5") == "5"
    assert grader.find_answer("=> 4 \\boxed{6}") == "6"
