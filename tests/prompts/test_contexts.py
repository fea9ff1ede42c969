"""Tests of privileged contexts: hints, wrong answers and traces of other problems."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import pytest
import regex

from helpers.files import write_jsonl
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import FileSource
from opsd_lightning.grading.base import Grade
from opsd_lightning.grading.choice_grader import ChoiceGrader
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import (
    AnswerContext,
    ColumnContext,
    HintContext,
    OtherProblemContext,
    PrivilegedContext,
    WrongContext,
)
from opsd_lightning.prompts.online_contexts import Attempts, CritiqueContext, FeedbackContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example

FAMILY, ACCENTED, FLAG = "\U0001f468\u200d\U0001f469\u200d\U0001f467", "o\u0308\u0323", "\U0001f1ef\U0001f1f5"
UNSPACED = {
    "Chinese": "首先把两个数相加得到七然后乘以三所以答案是二十一\\boxed{21}",
    "Chinese with spaces": "首先 $x=7$ 然后乘以三、得到二十一 所以答案是\\boxed{21}",
    "Japanese": "まず二つの数を足して七になりますそれに三をかけると二十一です答えは\\boxed{21}",
    "Thai": "ก่อนอื่นบวกสองจำนวนได้เจ็ดแล้วคูณด้วยสามจึงได้ยี่สิบเอ็ดคำตอบคือ\\boxed{21}",
    "Thai with spaces": "บวกสองจำนวนได้เจ็ด แล้วคูณด้วยสามจึงได้ยี่สิบเอ็ดดังนั้นคำตอบคือ \\boxed{21}",
    "Khmer": "ដំបូងបូកលេខពីរបានប្រាំពីរបន្ទាប់មកគុណនឹងបី\\boxed{21}",
    "a formula": "3*(3+4)=3*7=7+7+7=14+7=20+1=21;" * 3 + "\\boxed{21}",
    "a word before a formula": "Thus 3*(3+4)=3*7=7+7+7=14+7=20+1=(10+10)+1=((5+5)+(5+5))+1=21=\\boxed{21}",
    "clusters": (FAMILY + ACCENTED + FLAG) * 4,
    "clusters behind words": f"na{ACCENTED} a{ACCENTED} {FAMILY} {FLAG}b {ACCENTED} {FAMILY}{FAMILY}",
}


def hint(share: float, trace: str) -> str:
    text = HintContext(share).text(0, [Example("q", trace, "21")])
    assert text is not None
    return text


@pytest.mark.parametrize("text", UNSPACED)
def test_a_hint_is_a_share_of_any_script(text: str) -> None:
    trace = UNSPACED[text]
    clusters, before = regex.findall(r"\X", trace), 0
    for share in (0.1, 0.25, 0.5, 0.75, 0.99):
        shown = hint(share, trace)
        assert trace.startswith(shown) and shown != trace
        assert regex.findall(r"\X", shown) == clusters[: len(regex.findall(r"\X", shown))], "no character is cut"
        assert abs(len(shown) / len(trace) - share) < 0.35 and len(shown) >= before
        before = len(shown)
    assert "21}" not in hint(0.5, trace)


def test_a_hint_of_spaced_text_counts_words() -> None:
    words = [f"word{'x' * (number % 7)}" for number in range(40)]
    for share, count in ((0.25, 10), (0.51, 21), (0.999, 39)):
        assert hint(share, "\n ".join(words)) == "\n ".join(words[:count])


@pytest.mark.parametrize(
    ("trace", "shown"), [("", ""), ("  ", ""), ("7", ""), ("42", "4"), ("so 7", "so"), (" a b c ", "a b")]
)
def test_hints_of_short_traces_do_not_depend_on_the_share(trace: str, shown: str) -> None:
    assert hint(0.9, trace) == hint(0.6, trace) == shown


def test_missing_answers_give_no_context() -> None:
    for answer in ("", " "):
        rows = [Example("a", "t", answer), Example("b", "u", "1")]
        assert AnswerContext().text(0, rows) == WrongContext().text(0, rows) == "", "which leaves the row out"


class Blank(PrivilegedContext):
    def text(self, index: int, examples: Sequence[Example]) -> str | None:
        return " \n" if index % 2 else "Think of apples."


@pytest.mark.parametrize("context", [ColumnContext("tip"), Blank()], ids=["column", "own"])
def test_rows_without_a_context_are_left_out(
    context: PrivilegedContext, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    tips = ["Count.", None, " Add. ", "\t "]
    rows = [{"problem": f"{n}+1?", "solution": f"The answer is {n + 1}.", "tip": tip} for n, tip in enumerate(tips)]
    source = FileSource(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    prompts = Prompts("{question}", "{question} {context}")
    data = OPSDDataModule(make_policy(), source, batch_size=1, max_new_tokens=4, prompts=prompts, context=context)
    data.setup("fit")
    assert [example.question for example in data.rows["train"].examples] == ["0+1?", "2+1?"]
    assert list(data.dropped["train"].values()) == [2]


# -- wrong -------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("trace", "answer", "others"),
    [
        ("Half: \\boxed{0.5}", "0.5", ["1/2", "\\frac{2}{4}", "3"]),
        ("Half: \\boxed{0.5}", "1/2", ["0.5", "0.50"]),  # none differs, but in how it is written
        ("so 1 of 10, 0.1, 1/10 and 1. The answer is 1.", "1", ["1.0", "2"]),
        ("First the answer is 7. Then the answer is 14/2.", "7", ["7.0", "8"]),
        ("\\boxed{\\frac{3}{4}} or 75%", "0.75", ["3/4", "6/8", "0.8"]),
        ("It has 5 sides: \\boxed{5}", "5", ["5", "15", "05"]),
        ("none stated", "9", ["9.0", "3"]),
        ("The answer is 1,000.", "1000", ["1000.0", "10"]),
    ],
)
def test_a_wrong_answer_is_wrong_in_every_notation(trace: str, answer: str, others: Sequence[str]) -> None:
    rows = [Example("own", trace, answer), *(Example(f"q{n}", "t", other) for n, other in enumerate(others))]
    grader = MathGrader()
    for seed in range(6):
        text = WrongContext(seed).text(0, rows)
        assert (
            text is not None
            and not grader.equal(grader.find_answer(text), answer)
            and text == WrongContext(seed).text(0, rows)
        )


def test_the_answer_is_replaced_where_it_stands_alone() -> None:
    rows = [Example("a", "1 and 10, 2.1, 1.5, 3/1, 1/3, x1 and 1. The answer is 1.", "1"), Example("b", "t", "6")]
    assert WrongContext().text(0, rows) == "6 and 10, 2.1, 1.5, 3/1, 1/3, x1 and 6. The answer is 6."


def test_a_wrong_answer_is_wrong_for_the_grader_of_the_data() -> None:
    class Loose(MathGrader):
        """Only the number of digits counts."""

        def equal(self, answer: str | None, reference: str) -> bool:
            return answer is not None and len(answer) == len(reference)

    context = WrongContext()
    context.grader = Loose()
    rows = [Example("a", "\\boxed{12}", "12"), Example("b", "t", "34"), Example("c", "t", "567")]
    assert context.text(0, rows) == "\\boxed{567}"


def test_equal_answers_alone_are_refused() -> None:
    with pytest.raises(ConfigError) as caught:
        WrongContext().text(0, [Example("a", "t", "5"), Example("b", "t", " 5 "), Example("c", "t", "")])
    assert caught.value.setting == "data.context"


# -- another problem ---------------------------------------------------------------------------------------------------


def test_another_problem_is_another_one() -> None:
    own = Example("What is caf\u00e9 + 1?", "t = 1\nso 2", "2")
    same = [
        Example(" What  is\ncafe\u0301 + 1?", "another trace", "2"),  # the same question
        Example("What is tea + 1?", "t = 1 so 2 ", "2"),  # its solution
        Example("What is milk + 1?", "", "2"),  # nothing to show
    ]
    other = Example("What is it?", "really another", "2")
    for seed in range(12):
        assert OtherProblemContext(seed).text(0, [own, *same, other]) == other.trace
    with pytest.raises(ConfigError) as caught:
        OtherProblemContext().text(0, [own, *same])
    assert caught.value.setting == "data.context"


def test_an_index_is_shown_as_the_letter_that_the_question_shows() -> None:
    """ "The final answer is 1." would name the wrong option to a teacher that reads A) 1 B) 2."""
    options = {"options": ["1", "2", "3"]}
    first = Example("1 + 1? A) 1 B) 2 C) 3", "1 + 1 = 2, so (B).", "1", options)
    second = first._replace(question="1 + 2? A) 1 B) 2 C) 3", trace="It is (C).", answer="2")
    grader = ChoiceGrader(reference="index")
    answer, wrong = AnswerContext(), WrongContext()
    answer.grader = wrong.grader = grader
    assert answer.text(0, [first, second]) == "The final answer is B."
    assert wrong.text(0, [first, second]) == "1 + 1 = 2, so (C)."
    attempts = Attempts([first._replace(trace="")], ["?"], [Grade(0.0)], [True], 1, grader)
    (told,) = FeedbackContext(wrong="{feedback} {reference}").texts(attempts, lambda *_: [])
    assert told == "The correct answer is B. B"
    asked: list[str] = []
    CritiqueContext("{reference} {attempt}").texts(attempts, lambda examples, messages, _: [str(asked.extend(messages))])
    assert asked == ["B ?"]
    assert ChoiceGrader(first_index=1, reference="index").shown_reference(first) == "A"
    assert (
        ChoiceGrader().shown_reference(first._replace(answer="2")) == "2"
        and grader.shown_reference(first._replace(answer="")) == ""
    )
