"""Tests of the prompts of both roles: templates, chat-template settings and privileged contexts."""

from __future__ import annotations

from dataclasses import replace

import pytest

from helpers.classes import subclasses
from helpers.messages import mentions
from helpers.models import make_tokenizer
from opsd_lightning.prompts.contexts import (
    AnswerContext,
    ColumnContext,
    HintContext,
    NoContext,
    OtherProblemContext,
    PrivilegedContext,
    TraceContext,
    WrongContext,
)
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example, UserError

TOKENIZER = make_tokenizer()
EXAMPLES = [
    Example("1+1?", "one and 1 is 2. Answer: 2", "2", {"tip": "count"}),
    Example("2+3?", "2 plus 3 is 5. Answer: 5", "5", {"tip": None}),
    Example("4+1?", "4 plus 1 is 5. Answer: 5", "5", {"tip": "fingers"}),
]
CONTEXTS = {
    TraceContext(): "2 plus 3 is 5. Answer: 5",
    AnswerContext(): "The final answer is 5.",
    HintContext(0.5): "2 plus 3 is",
    OtherProblemContext(): None,  # its own test
    NoContext(): None,
    WrongContext(): "2 plus 3 is 2. Answer: 2",
    ColumnContext("tip"): None,
}


def test_every_context_is_under_test() -> None:
    ours = {cls for cls in subclasses(PrivilegedContext) if cls.__module__.startswith("opsd_lightning")}
    assert ours == {type(context) for context in CONTEXTS}


@pytest.mark.parametrize("context", [c for c in CONTEXTS if CONTEXTS[c]], ids=lambda c: type(c).__name__)
def test_contexts_give_their_text(context: PrivilegedContext) -> None:
    assert context.text(1, EXAMPLES) == CONTEXTS[context] == context.text(1, EXAMPLES)


def test_other_problem_is_never_the_own_trace() -> None:
    seen = {OtherProblemContext(seed).text(0, EXAMPLES) for seed in range(20)}
    assert seen == {EXAMPLES[1].trace, EXAMPLES[2].trace}
    with pytest.raises(ConfigError, match=r"^data\.context: "):
        OtherProblemContext().text(0, EXAMPLES[:1])


def test_wrong_context_has_no_right_answer() -> None:
    for index, example in enumerate(EXAMPLES):
        text = WrongContext(1).text(index, EXAMPLES)
        assert text is not None and example.answer not in text
    half = Example("half of 1?", r"so \boxed{\frac{1}{2}}", "0.5")
    assert WrongContext().text(0, [half, EXAMPLES[0]]) == "The final answer is 2."
    with pytest.raises(ConfigError, match=r"^data\.context: "):
        WrongContext().text(0, EXAMPLES[1:])


def test_column_context_reads_its_column() -> None:
    assert [ColumnContext("tip").text(i, EXAMPLES) for i in range(3)] == ["count", "", "fingers"]
    with pytest.raises(ConfigError, match=r"^data\.context\.column: .*'hint'.* tip"):
        ColumnContext("hint").text(0, EXAMPLES)


def test_prompts_of_both_roles() -> None:
    prompts = Prompts(student_template="S {question}", teacher_template="T {question} <{context}>")
    student = TOKENIZER.decode(prompts.student(TOKENIZER, EXAMPLES[0]))
    teacher = TOKENIZER.decode(prompts.teacher(TOKENIZER, EXAMPLES[0], "ref"))
    assert student == "<|im_start|>user\nS 1+1?<|im_end|><|im_start|>assistant\n"
    assert teacher == "<|im_start|>user\nT 1+1? <ref><|im_end|><|im_start|>assistant\n"


def test_default_wording_is_pinned() -> None:
    """Question, reference between markers, and the boxed instruction, all inside the one user turn."""
    student = TOKENIZER.decode(Prompts().student(TOKENIZER, EXAMPLES[0]))
    teacher = TOKENIZER.decode(Prompts().teacher(TOKENIZER, EXAMPLES[0], "THE TRACE"))
    assert "THE TRACE" not in student and r"\boxed{}" in student
    parts = ["user", "1+1?", "Reference Solution Begin", "THE TRACE", "Reference Solution End", r"\boxed{}", "<|im_end|>"]
    positions = [teacher.index(part) for part in [*parts, "assistant"]]
    assert positions == sorted(positions)


def test_no_context_gives_the_students_wording() -> None:
    assert Prompts().teacher(TOKENIZER, EXAMPLES[0], None) == Prompts().student(TOKENIZER, EXAMPLES[0])


def test_braces_and_placeholders_in_values_are_left_alone() -> None:
    example = Example("What is {context} in \\frac{1}{2}?", "t", "1")
    teacher = TOKENIZER.decode(Prompts().teacher(TOKENIZER, example, "a {question} b"))
    assert "What is {context} in \\frac{1}{2}?" in teacher and "a {question} b" in teacher


def test_chat_template_settings_per_role_and_response_prefix() -> None:
    prompts = Prompts(
        student_chat_template_kwargs={"enable_thinking": False},
        teacher_response_prefix="<think></think>",
        system="Be brief.",
    )
    student, teacher = prompts.student(TOKENIZER, EXAMPLES[0]), prompts.teacher(TOKENIZER, EXAMPLES[0], "ref")
    think = TOKENIZER.convert_tokens_to_ids(["<think>", "</think>"])
    assert student[-2:] == think and teacher[-2:] == think
    assert Prompts().teacher(TOKENIZER, EXAMPLES[0], "ref")[-2:] != think
    for prompt in (student, teacher):
        assert TOKENIZER.decode(prompt).startswith("<|im_start|>system\nBe brief.<|im_end|>")


def test_evaluation_has_its_own_chat_template_settings() -> None:
    off, on = {"enable_thinking": False}, {"enable_thinking": True}
    prompts = Prompts(student_chat_template_kwargs=off, teacher_chat_template_kwargs=off, evaluation_chat_template_kwargs=on)
    rendered = {split: prompts.of_split(split).student(TOKENIZER, EXAMPLES[0]) for split in ("train", "val", "test")}
    closed = TOKENIZER.convert_tokens_to_ids(["<think>", "</think>"])
    assert rendered["train"] == prompts.student(TOKENIZER, EXAMPLES[0]) == [*rendered["val"], *closed]
    assert rendered["val"] == rendered["test"]
    assert prompts.of_split("val").kwargs("teacher") == off
    assert Prompts(student_chat_template_kwargs=off).of_split("val").student_chat_template_kwargs == off
    assert Prompts(student_chat_template_kwargs=off, evaluation_chat_template_kwargs={}).of_split("val") == Prompts()
    assert prompts.of_split("train") == replace(prompts, evaluation_chat_template_kwargs=None)  # one key of cached rows


def test_special_tokens_come_from_the_template_alone() -> None:
    """A tokenizer that adds a BOS by default would double the one that the template renders (Llama, Gemma)."""
    from tokenizers import processors

    tokenizer = make_tokenizer()
    bos = tokenizer.convert_tokens_to_ids("<pad>")
    tokenizer.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", bos)]
    )
    tokenizer.chat_template = "<pad>" + tokenizer.chat_template
    assert tokenizer.encode("a")[0] == bos
    prompts = Prompts(teacher_response_prefix="<think>")
    for prompt in (prompts.student(tokenizer, EXAMPLES[0]), prompts.teacher(tokenizer, EXAMPLES[0], "ref")):
        assert prompt.count(bos) == 1 and prompt[0] == bos


@pytest.mark.parametrize("limit", [1, 5, 1000])
def test_only_the_traces_own_text_is_cut(limit: int) -> None:
    prompts = Prompts(teacher_template="head {question} [{context}] tail", max_trace_tokens=limit)
    trace = "abcdefghij"
    teacher = prompts.teacher(TOKENIZER, EXAMPLES[0], trace)
    assert f"head 1+1? [{trace[:limit]}] tail<|im_end|>" in TOKENIZER.decode(teacher)
    assert TOKENIZER.decode(teacher).endswith("assistant\n")
    assert teacher.trace_was_cut == (limit < len(trace))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"student_template": "no"}, r"data\.prompts\.student_template: .*\{question\}"),
        ({"teacher_template": "{question}"}, "{context}"),
    ],
)
def test_templates_must_have_their_placeholders(settings: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Prompts(**settings)


def test_errors_of_a_chat_template_name_the_setting() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "{{ raise_exception('no system turn') if messages[0]['role'] == 'system' else 'x' }}"
    with pytest.raises(UserError, match=mentions("no system turn", "data.prompts.system")):
        Prompts(system="Be brief.").student(tokenizer, EXAMPLES[0])
