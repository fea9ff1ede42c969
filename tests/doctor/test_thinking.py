"""Tests of the thinking mode that the doctor reads from the chat templates of published models."""

from __future__ import annotations

from typing import Any

import pytest

from helpers.chat_templates import tokenizer_for
from opsd_lightning.doctor.findings import Finding
from opsd_lightning.doctor.prompt_checks import roles_of, thinking_facts, thinking_findings
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Example, PromptBatch

ON, OFF = {"enable_thinking": True}, {"enable_thinking": False}
EXAMPLES = [Example("1+1?", "It is 2.", "2")]


def diagnosed(family: str, in_place: bool = False, **kwargs: Any) -> tuple[dict[str, Any], list[Finding]]:
    tokenizer, prompts = tokenizer_for(family), Prompts(**kwargs)
    evaluation = PromptBatch([[1]], [[1]], EXAMPLES, [True])
    roles = roles_of(prompts, EXAMPLES, [[1]], [[1]], evaluation)
    facts = thinking_facts(tokenizer, prompts, roles, ["It is 2."])
    return facts, list(thinking_findings(tokenizer, prompts, roles, facts, 0, in_place))


@pytest.mark.parametrize(
    ("family", "kwargs", "thinks"),
    [
        ("gemma4", {}, False), ("gemma4", OFF, False), ("gemma4", ON, True),
        ("diffusion_gemma", {}, False), ("diffusion_gemma", OFF, False), ("diffusion_gemma", ON, True),
        ("qwen3", {}, True), ("qwen3", OFF, False), ("qwen3", ON, True),
        ("qwen2_5", {}, False), ("gptoss", {}, False), ("lfm2_2_5", {}, False), ("lfm2_v2", {}, False), ("deepseek_r1_distill", {}, True),
    ],
)  # fmt: skip
def test_a_student_that_thinks_is_told_from_one_that_does_not(family: str, kwargs: dict[str, Any], thinks: bool) -> None:
    facts, findings = diagnosed(family, student_chat_template_kwargs=kwargs, teacher_chat_template_kwargs=kwargs)
    assert facts["thinks"] == {"student": thinks, "teacher": thinks}
    warned = [each for each in findings if each.setting == "data.prompts.student_chat_template_kwargs"]
    assert [each.level for each in warned] == ["warning"] * thinks
    unknown = [each for each in findings if each.setting == "model.policy.chat_template"]
    assert [each.level for each in unknown] == ["note"] * (family in ("gptoss", "lfm2_2_5"))
    assert not [each for each in findings if each.level == "error"]


@pytest.mark.parametrize("family", ["gemma4", "diffusion_gemma", "qwen3"])
@pytest.mark.parametrize("evaluation", [ON, OFF], ids=["on", "off"])
def test_a_validation_in_another_mode_is_noted(family: str, evaluation: dict[str, Any]) -> None:
    both = {"student_chat_template_kwargs": OFF, "teacher_chat_template_kwargs": OFF}
    facts, findings = diagnosed(family, **both, evaluation_chat_template_kwargs=evaluation)
    assert facts["thinks"]["evaluation"] == (evaluation == ON)
    noted = [each for each in findings if each.setting == "data.prompts.evaluation_chat_template_kwargs"]
    assert [each.level for each in noted] == ["note"] * (evaluation == ON)


@pytest.mark.parametrize(("family", "asks"), [("qwen3", True), ("gemma4", False)])
def test_traces_without_thinking_contradict_only_a_prompt_that_asks_for_it(family: str, asks: bool) -> None:
    _, findings = diagnosed(family, in_place=True)
    found = [each for each in findings if "traces" in each.text]
    assert bool(found) == asks
