"""Tests of the fingerprints under which prepared rows are cached: a change of any input gives another one."""

from __future__ import annotations

import dataclasses
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from datetime import UTC, date, datetime, timedelta
from decimal import Decimal
from pathlib import Path
from typing import Any

import pytest
from tokenizers.normalizers import Lowercase
from transformers import PreTrainedTokenizerFast

import opsd_lightning
from helpers.models import make_tokenizer
from helpers.paths import ROOT
from opsd_lightning.data import fingerprint as module
from opsd_lightning.data.drop_reasons import DropReason, RowLimits, TeacherLimit
from opsd_lightning.data.fingerprint import UnknownValueError, code_fingerprint, fingerprint, tokenizer_fingerprint
from opsd_lightning.data.preparation import Preparation
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.prompts.contexts import (
    AnswerContext,
    ColumnContext,
    HintContext,
    NoContext,
    OtherProblemContext,
    TraceContext,
    WrongContext,
)
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import DataRequirements, Example
from opsd_lightning.utils.texts import NumberAsWritten, UnreadableValue

VALUES = [
    None, True, 1, 1.0, "1", b"1", "True", "None", 10**5000, -1, 0.1, float("nan"), float("inf"), "", b"", [], (), {},
    [1], (1,), [[1], 2], [1, [2]], ["ab", "c"], ["a", "bc"], ["abc"], {"a": 1, "b": 2}, {"b": 2, "a": 1}, {"a": [1, 2]},
    NumberAsWritten("0.1"), NumberAsWritten("0.10"), Decimal("0.1"), Decimal("0.10"), date(2024, 1, 1),
    datetime(2024, 1, 1), datetime(2024, 1, 1, tzinfo=UTC), timedelta(days=1), "\udc80", "\ufffd",
    MathGrader(), Prompts(), Example("1", "2", "3"), Example("1", "2", "3", {"a": None}), ("1", "2", "3", {}),
    RowLimits(1), RowLimits(2), TeacherLimit("a", 1, True), TeacherLimit("a", 1, False), *DropReason,
]  # fmt: skip


def test_different_values_have_different_fingerprints() -> None:
    digests = [fingerprint(value) for value in VALUES]
    assert len(set(digests)) == len(VALUES) and digests == [fingerprint(value) for value in VALUES]
    assert fingerprint("a", "b") != fingerprint("ab") != fingerprint(["a", "b"])


def test_fingerprints_are_the_same_in_every_process() -> None:
    code = (
        "from opsd_lightning.data.fingerprint import fingerprint as f; print(f({'a': ['x', 1.5, None], 'b': (True, b'y')}))"
    )
    command = [sys.executable, "-c", code]
    said = [
        subprocess.run(command, env=os.environ | {"PYTHONHASHSEED": seed}, capture_output=True, check=True, cwd=ROOT).stdout
        for seed in ("1", "2")
    ]
    assert said[0] == said[1] and len(said[0].strip()) == 64


class TextOfAUser(str):
    """A text whose class may do anything."""


@dataclasses.dataclass
class SettingsOfAUser:
    number: int = 1


@pytest.mark.parametrize(
    "value", [object(), {1, 2}, TextOfAUser("a"), SettingsOfAUser(), UnreadableValue("x"), lambda: 1, int]
)
def test_other_values_have_none(value: Any) -> None:
    for holder in (value, [value], {"a": value}, Example("1", "2", "3", {"a": value})):
        with pytest.raises(UnknownValueError):
            fingerprint(holder)


def test_values_that_are_nested_too_deeply_have_none() -> None:
    value: list[Any] = []
    for _ in range(100_000):
        value = [value]
    with pytest.raises(UnknownValueError):
        fingerprint(value)
    while value:  # freed level by level
        value = value.pop()


def test_code_and_libraries_change_the_fingerprint(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    found = {code_fingerprint.__wrapped__()}
    copy = tmp_path / "opsd_lightning"
    shutil.copytree(Path(opsd_lightning.__file__).parent, copy, ignore=shutil.ignore_patterns("__pycache__"))
    monkeypatch.setattr(opsd_lightning, "__file__", str(copy / "__init__.py"))
    assert code_fingerprint.__wrapped__() in found  # the same code elsewhere
    with (copy / "grading" / "answer_text.py").open("a") as file:
        file.write("# changed\n")
    found.add(code_fingerprint.__wrapped__())
    for library in module._LIBRARIES:
        real = module.version
        monkeypatch.setattr(module, "version", lambda name, real=real, other=library: real(name) + "+1" * (name == other))
        found.add(code_fingerprint.__wrapped__())
        monkeypatch.setattr(module, "version", real)
    assert len(found) == 2 + len(module._LIBRARIES)
    shutil.rmtree(copy)  # as in an archive of compiled files
    with pytest.raises(UnknownValueError):
        code_fingerprint.__wrapped__()


# -- everything that prepared rows depend on ---------------------------------------------------------------------------------

ROWS = [Example(f"{n}+1?", f"It is \\boxed{{{n + 1}}}.", str(n + 1), {"id": n, "tip": "count"}) for n in range(3)]
PLAN = Preparation(
    "train",
    make_tokenizer(),
    Prompts(),
    TraceContext(),
    MathGrader(),
    True,
    DataRequirements(),
    RowLimits(8),
    [3],
    [3, 4],
    frozenset({"a"}),
)

PROMPTS: dict[str, Any] = {
    "student_template": "{question}!",
    "context_position": "turn",
    "teacher_template": "{question} {context}",
    "system": "You are a tutor.",
    "student_chat_template_kwargs": {"enable_thinking": False},
    "teacher_chat_template_kwargs": {"enable_thinking": False},
    "evaluation_chat_template_kwargs": {"enable_thinking": False},
    "teacher_response_prefix": "<think></think>",
    "max_trace_tokens": 7,
    "date": "2025-01-01",
}
GRADER: dict[str, Any] = {"answer_pattern": None, "timeout_seconds": 6.0}
LIMITS: dict[str, Any] = {
    "max_new_tokens": 9,
    "policy": 512,
    "hint": " (model.policy.max_length)",
    "sampled_tokens": 4,
    "teachers": (TeacherLimit("model.teacher", 256, True),),
}
# The teachers' limits and the number of sampled tokens are in the limits. `privileged` decides no row.
NEEDS: dict[str, Any] = {
    "teacher_prompts": False,
    "traces": True,
    "answers": False,
    "trace_completions": True,
    "graded_teacher": True,
    "grades": True,
    "scores_demonstrations": True,
}
CONTEXTS = {
    "answer": AnswerContext(),
    "hint": HintContext(0.5),
    "other share": HintContext(0.4),
    "other problem": OtherProblemContext(),
    "other seed": OtherProblemContext(1),
    "none": NoContext(),
    "column": ColumnContext("tip"),
    "other column": ColumnContext("id"),
}


def another_tokenizer(change: Callable[[PreTrainedTokenizerFast], object]) -> PreTrainedTokenizerFast:
    tokenizer = make_tokenizer()
    change(tokenizer)
    return tokenizer


TOKENIZERS: dict[str, Callable[[PreTrainedTokenizerFast], object]] = {
    "vocabulary": lambda t: t.add_tokens(["pangolin"]),
    "special tokens": lambda t: t.add_special_tokens({"bos_token": "<think>"}),
    "chat template": lambda t: setattr(t, "chat_template", t.chat_template + " "),
    "split_special_tokens": lambda t: setattr(t, "split_special_tokens", True),
    "normalizer": lambda t: setattr(t.backend_tokenizer, "normalizer", Lowercase()),
    "truncation": lambda t: t.backend_tokenizer.enable_truncation(5),
}
FOUND: dict[str, list[Example]] = {
    "question": [ROWS[0]._replace(question="9?"), *ROWS[1:]],
    "trace": [ROWS[0]._replace(trace="9"), *ROWS[1:]],
    "answer": [ROWS[0]._replace(answer="9"), *ROWS[1:]],
    "columns": [ROWS[0]._replace(columns={"id": 0, "tip": "guess"}), *ROWS[1:]],
    "order": ROWS[::-1],
    "fewer": ROWS[:-1],
    "more": [*ROWS, ROWS[0]],
}


def changed(**settings: Any) -> Preparation:
    return dataclasses.replace(PLAN, **settings)


CHANGES: dict[str, Preparation] = {
    "split": changed(split="val"),
    "end": changed(end=[4]),
    "stops": changed(stops=[3]),
    "verify": changed(verify=False),
    "held_out": changed(held_out=frozenset({"a", "b"})),
    **{f"prompts {name}": changed(prompts=Prompts(**{name: value})) for name, value in PROMPTS.items()},
    **{f"grader {name}": changed(grader=MathGrader(**{name: value})) for name, value in GRADER.items()},
    **{
        f"limits {name}": changed(limits=dataclasses.replace(PLAN.limits, **{name: value})) for name, value in LIMITS.items()
    },
    **{f"needs {name}": changed(needs=DataRequirements(**{name: value})) for name, value in NEEDS.items()},
    **{f"context {name}": changed(context=context) for name, context in CONTEXTS.items()},
    **{f"tokenizer {name}": changed(tokenizer=another_tokenizer(change)) for name, change in TOKENIZERS.items()},
}


def test_a_change_of_any_input_gives_another_fingerprint() -> None:
    digests = [PLAN.fingerprint(ROWS), *(plan.fingerprint(ROWS) for plan in CHANGES.values())]
    digests += [PLAN.fingerprint(found) for found in FOUND.values()]
    assert len(set(digests)) == 1 + len(CHANGES) + len(FOUND)
    assert changed(tokenizer=make_tokenizer()).fingerprint(list(ROWS)) == digests[0]


def test_every_input_is_changed_above() -> None:
    assert {name.split()[0] for name in CHANGES} == {field.name for field in dataclasses.fields(Preparation)}
    for values, kind in ((PROMPTS, Prompts), (GRADER, MathGrader), (LIMITS, RowLimits)):
        assert set(values) == {field.name for field in dataclasses.fields(kind)}
    left_out = {"teachers", "max_new_tokens", "privileged"}
    assert set(NEEDS) | left_out == {field.name for field in dataclasses.fields(DataRequirements)}
    assert set(FOUND) >= set(Example._fields[:3]) | {"columns"}


def test_use_does_not_change_a_tokenizers_fingerprint() -> None:
    tokenizer = make_tokenizer()
    before = tokenizer_fingerprint(tokenizer)
    Prompts().teacher(tokenizer, Example("1 <|im_end|>", "2", "3"), "context")
    tokenizer.decode(tokenizer("abc")["input_ids"])
    assert tokenizer_fingerprint(tokenizer) == before


class UsersGrader(MathGrader):
    def find_answer(self, text: str) -> str | None:
        return text[-1:]


class UsersContext(TraceContext):
    def text(self, index: int, examples: Any) -> str | None:
        return "Guess."


class UsersPrompts(Prompts):
    pass


class UsersTokenizer(PreTrainedTokenizerFast):
    pass


def users_tokenizer() -> PreTrainedTokenizerFast:
    tokenizer = UsersTokenizer(tokenizer_object=make_tokenizer().backend_tokenizer)
    tokenizer.chat_template = make_tokenizer().chat_template
    return tokenizer


@pytest.mark.parametrize(
    "plan",
    [
        pytest.param(changed(grader=UsersGrader()), id="grader"),
        pytest.param(changed(context=UsersContext()), id="context"),
        pytest.param(changed(prompts=UsersPrompts()), id="prompts"),
        pytest.param(changed(tokenizer=users_tokenizer()), id="tokenizer"),
        pytest.param(changed(context=WrongContext()), id="a context that depends on time"),
        pytest.param(changed(prompts=Prompts(student_chat_template_kwargs={"x": object()})), id="argument of the template"),
    ],
)
def test_classes_of_users_have_no_fingerprint(plan: Preparation) -> None:
    with pytest.raises(UnknownValueError):
        plan.fingerprint(ROWS)
