"""Tests that settings reach the prompts of both roles, or are refused by name."""

from __future__ import annotations

import warnings
from pathlib import Path
from typing import Any

import pytest

from helpers.files import write_jsonl
from helpers.models import CHAT_TEMPLATE, make_tokenizer
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import FileSource
from opsd_lightning.doctor.prompt_checks import context_findings
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import NoContext, TraceContext
from opsd_lightning.prompts.template_checks import is_null_control, opens_answer, reads_date, rendering_problems
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Example

TEMPLATE, SYSTEM = "model.policy.chat_template", "data.prompts.system"
STUDENT, TEACHER, EVALUATION = (f"data.prompts.{role}_chat_template_kwargs" for role in ("student", "teacher", "evaluation"))
GENERATION = "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
TURN = "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + CONTENT + '<|im_end|>' }}{% endfor %}" + GENERATION


def turns(content: str) -> str:
    return TURN.replace("CONTENT", content)


# Logic that published templates have: a system message inside the first user turn, content stripped, no generation prompt
# because the user's turn closes with a tag, content of either kind, a date, variables with a default.
HEALTHY = {
    "plain": CHAT_TEMPLATE,
    "stripped": turns("m['content'] | trim"),
    "system in the user's turn": (
        "{% if messages[0]['role'] == 'system' %}{% set first = messages[0]['content'] + '\n\n' %}{% set rest = messages[1:] %}"
        "{% else %}{% set first = '' %}{% set rest = messages %}{% endif %}{% for m in rest %}"
        "{{ '<|im_start|>' + (first if loop.first else '') + m['content'] | trim + '<|im_end|>' }}{% endfor %}" + GENERATION
    ),
    "tags": (
        "{% for m in messages %}{% if m['role'] == 'assistant' %}{{ m['content'] + '<|im_end|>' }}"
        "{% else %}{{ '[U] ' + m['content'] + ' [/U]' }}{% endif %}{% endfor %}"
    ),
    "content of either kind": (
        "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['content'] is string %}{{ m['content'] }}{% else %}"
        "{% for p in m['content'] %}{{ p['text'] }}{% endfor %}{% endif %}<|im_end|>{% endfor %}" + GENERATION
    ),
    "lists of parts alone": (
        "{% for m in messages %}<|im_start|>{{ m.role }}\n{% for p in m.content if p.type == 'text' %}{{ p.text }}{% endfor %}"
        "<|im_end|>{% endfor %}" + GENERATION
    ),
    "parts by their first": "{% for m in messages %}{{ '<|im_start|>' ~ m.content[0]['text'] }}{% endfor %}" + GENERATION,
}


def found(template: str, **settings: Any) -> list[str]:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    return [problem.setting for problem in rendering_problems(tokenizer, Prompts(**settings))]


@pytest.mark.parametrize("template", HEALTHY)
@pytest.mark.parametrize("system", [None, "Be brief."])
def test_healthy_templates_keep_all_content(template: str, system: str | None) -> None:
    assert found(HEALTHY[template], system=system) == []
    tokenizer = make_tokenizer()
    tokenizer.chat_template = HEALTHY[template]
    prompts = Prompts(system=system)
    for ids in (
        prompts.student(tokenizer, Example("7*8?", "", "")),
        prompts.teacher(tokenizer, Example("7*8?", "", ""), "56!"),
    ):
        text = tokenizer.decode(ids)
        assert text.count("7*8?") == 1 and text.count("Be brief.") == (system is not None)
    assert "56!" in text and opens_answer(tokenizer, prompts, {})


@pytest.mark.parametrize(
    "content",
    [
        "m['role']",
        "m['content'] | upper",
        "m['content'] | title",
        "m['content'][:4000]",
        "m['content'][200:]",
        "m['content'] | replace('\\\\', '')",
        "m['content'].split() | join(' ')",
        "m['content'] | e",
        "m['content'] | tojson",
        "m['content'].replace('$', '')",
        "m['content'] + m['content']",
        "m['content'].split('Reference')[0]",
        "m['content'].encode('ascii', 'ignore').decode()",
        "m['text']",
    ],
)
def test_dropped_content_is_refused(content: str) -> None:
    assert set(found(turns(content))) == {TEMPLATE}


def test_teacher_turn_is_checked_separately() -> None:
    short = turns("m['content'].split('=== Reference')[0]")  # the student's wording has no such line
    assert found(short) == [TEMPLATE]
    tokenizer = make_tokenizer()
    tokenizer.chat_template = short
    assert rendering_problems(tokenizer, Prompts(), teacher=False) == []


@pytest.mark.parametrize(
    "template",
    [
        "{% for m in messages if m['role'] == 'user' %}{{ m['content'] }}{% endfor %}",
        "{{ messages[-1]['content'] }}",
        "{% for m in messages %}{{ m['content'] | upper if m['role'] == 'system' else m['content'] }}{% endfor %}",
        "{% for m in messages %}{{ m['content'][:20] if m['role'] == 'system' else m['content'] }}{% endfor %}",
        "{{ messages[0]['content'] }}{% for m in messages %}{{ m['content'] }}{% endfor %}",
        "{{ raise_exception('no such role') if messages[0]['role'] == 'system' }}{{ messages[0]['content'] }}",
    ],
)
def test_dropped_system_message_is_refused(template: str) -> None:
    assert found(template, system="Answer in French.") == [SYSTEM]


THINKS = {
    "unless switched off": "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}",
    "unless false": "{% if enable_thinking is defined and not enable_thinking %}<think></think>{% endif %}",
    "where switched on": "{% if enable_thinking %}<think>{% endif %}",
    "by default": "{% set enable_thinking = enable_thinking | default(true) %}{% if enable_thinking %}<think>{% endif %}",
}


@pytest.mark.parametrize("template", THINKS)
@pytest.mark.parametrize("value", [True, False])
def test_a_switch_that_the_template_knows_may_have_its_default(template: str, value: bool) -> None:
    kwargs = {"enable_thinking": value}
    assert found(turns("m['content']") + THINKS[template], student_chat_template_kwargs=kwargs) == []


@pytest.mark.parametrize("template", THINKS)
@pytest.mark.parametrize("value", ["false", "true", "False", "TRUE", " no", "on", "0"])
def test_truth_values_as_text_are_refused(template: str, value: str) -> None:
    template = turns("m['content']") + THINKS[template]
    assert found(template, teacher_chat_template_kwargs={"enable_thinking": value}) == [TEACHER]


def test_numbers_for_truth_values_are_refused_where_the_template_tests_identity() -> None:
    kwargs = {"enable_thinking": 0}
    refused, works = (turns("m['content']") + THINKS[name] for name in ("unless switched off", "unless false"))
    assert found(refused, student_chat_template_kwargs=kwargs) == [STUDENT]
    assert found(works, student_chat_template_kwargs=kwargs) == []


@pytest.mark.parametrize(
    "kwargs",
    [{"enable_thinkng": False}, {"thinking": True}, {"budget": 1024}, {"documents": [{"text": "x"}]}, {"nothing": None}],
)
def test_arguments_that_no_template_reads_are_refused(kwargs: dict[str, Any]) -> None:
    assert found(CHAT_TEMPLATE, student_chat_template_kwargs=kwargs) == [STUDENT]
    assert found(CHAT_TEMPLATE, evaluation_chat_template_kwargs=kwargs) == [EVALUATION]


EFFORT = (
    turns("m['content']")
    + "{% set effort = effort | default('medium') %}{% if effort == 'low' %}L{% elif effort == 'high' %}H{% else %}M{% endif %}"
    + "{% if tools %}{{ tools | length }}{% endif %}{% if flag == 'on' %}F{% endif %}{{ budget | default(8) }}"
)


@pytest.mark.parametrize(
    "kwargs",
    [
        {"effort": "medium"},
        {"effort": "low"},
        {"flag": "on"},
        {"flag": "off"},
        {"budget": 8},
        {"budget": 9, "effort": "high"},
        {"tools": [{"type": "function", "function": {"name": "f", "description": "", "parameters": {}}}]},
    ],
)
def test_arguments_that_the_template_reads_are_taken(kwargs: dict[str, Any]) -> None:
    assert found(EFFORT, student_chat_template_kwargs=kwargs) == []


@pytest.mark.parametrize(("value", "meant"), [("hihg", "high"), ("Medium", "medium"), ("purple", "")])
@pytest.mark.parametrize("default", ["", "{% set effort = effort | default('medium') %}"])
def test_values_that_the_template_does_not_know_are_refused(default: str, value: str, meant: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = (
        turns("m['content']")
        + default
        + (
            "{% generation %}{% if effort == 'low' %}L{% elif effort == \"high\" %}H{% elif effort == 'medium' %}{% endif %}{% endgeneration %}"
        )
    )
    (problem,) = rendering_problems(tokenizer, Prompts(student_chat_template_kwargs={"effort": value}))
    assert problem.setting == STUDENT and value in problem.problem and meant in problem.fix
    for known in ("low", "high", "medium"):
        assert not rendering_problems(tokenizer, Prompts(student_chat_template_kwargs={"effort": known}))


@pytest.mark.parametrize(
    "name", ["padding", "max_length", "truncation", "return_tensors", "return_dict", "chat_template", "conversation", "messages",
             "tokenizer_kwargs", "return_assistant_tokens_mask", "add_generation_prompt", "strftime_now"],
)  # fmt: skip
def test_arguments_of_the_rendering_itself_are_refused(name: str) -> None:
    assert found(CHAT_TEMPLATE, student_chat_template_kwargs={name: 1}) == [STUDENT]


def test_an_argument_that_drops_or_breaks_the_text_is_named() -> None:
    template = turns("(m['content'] if not short else 'x')") + "{% if bad %}{{ bad + 1 }}{% endif %}"
    for kwargs in ({"short": True}, {"bad": "x"}):
        assert found(template, student_chat_template_kwargs=kwargs) == [STUDENT]


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages[0].nothing.more }}",
        "{{ 1 + 'a' }}",
        "{{ 1 / 0 }}",
        "{% if %}",
        "{{ messages['x'] + 1 }}",
        "{{ f() }}",
        "{{ [][3] + 1 }}",
    ],
)
def test_errors_of_a_template_are_one_message(template: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = template
    with pytest.raises(ConfigError) as caught:
        Prompts().student(tokenizer, Example("1+1?", "", "2"))
    assert caught.value.setting == TEMPLATE and "\n" not in str(caught.value)
    assert found(template) == [TEMPLATE]


def test_setup_refuses_before_rows_are_read(folders: dict[str, str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1+1?", "solution": "The answer is 2."}])
    for stage in ("fit", "validate", "test"):
        prompts = Prompts(student_chat_template_kwargs={"enable_thinkin": False})
        sources = {split: FileSource(str(path)) for split in ("train", "val", "test")}
        data = OPSDDataModule(Policy(folders["llama"]), **sources, prompts=prompts, batch_size=1, max_new_tokens=8)  # type: ignore[arg-type]
        with pytest.raises(ConfigError) as caught:
            data.setup(stage)
        assert caught.value.setting == STUDENT and not data.rows


def test_no_context_is_said_not_to_be_a_null_control(folders: dict[str, str], tmp_path: Path) -> None:
    path = write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1+1?", "solution": "The answer is 2."}])
    for settings, null in (
        ({}, True),
        ({"teacher_chat_template_kwargs": {"enable_thinking": False}}, False),
        ({"teacher_response_prefix": "Hm"}, False),
    ):
        prompts = Prompts("{question}", "{question} {context}", **settings)  # type: ignore[arg-type]
        assert is_null_control(make_tokenizer(), prompts) == null
        data = OPSDDataModule(
            Policy(folders["llama"]),
            FileSource(str(path)),
            prompts=prompts,
            context=NoContext(),
            batch_size=1,
            max_new_tokens=8,
        )
        with warnings.catch_warnings(record=True) as warned:
            warnings.simplefilter("always")
            data.setup("fit")
        assert any("NoContext" in str(each.message) for each in warned) != null


# -- today's date ------------------------------------------------------------------------------------------------------


DATED = turns("m['content']") + "{% if strftime_now is defined %}{{ strftime_now('%d %b %Y') }}{% endif %}"


def test_a_template_gets_the_same_day_always(monkeypatch: pytest.MonkeyPatch) -> None:
    import transformers.utils.chat_template_utils as rendering

    tokenizer = make_tokenizer()
    tokenizer.chat_template = DATED

    class Tomorrow(rendering.datetime):  # type: ignore[name-defined,misc]
        @classmethod
        def now(cls, tz: Any = None) -> Any:
            return cls(2031, 5, 6)

    shown = tokenizer.decode(Prompts().student(tokenizer, Example("1?", "", "")))
    monkeypatch.setattr(rendering, "datetime", Tomorrow)
    assert tokenizer.decode(Prompts().student(tokenizer, Example("1?", "", ""))) == shown and "2031" not in shown
    assert tokenizer.decode(Prompts(date="2025-03-04").student(tokenizer, Example("1?", "", ""))).endswith("04 Mar 2025")
    assert reads_date(tokenizer, Prompts()) and not reads_date(make_tokenizer(), Prompts())


@pytest.mark.parametrize(
    ("call", "shown"),
    [
        ("{{ strftime_now('%Y-%m-%d') }}", "2025-03-04"),
        ("{% set form = '%A' %}{{ strftime_now(form) + '!' }}", "Tuesday!"),
        ("{{ strftime_now('100%% %H:%M') }}", "100% 00:00"),
        ("{% macro day() %}{{ strftime_now('%j') }}{% endmacro %}{{ day() }}", "063"),
    ],
)
def test_templates_show_the_given_date_in_any_format(call: str, shown: str) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = "  {% if true %}\n  {{ messages[0]['content'] }}{% endif %}|" + call
    text = tokenizer.decode(Prompts("{question}", date="2025-03-04").student(tokenizer, Example("1?", "", "")))
    tokenizer.chat_template = "  {% if true %}\n  {{ messages[0]['content'] }}{% endif %}|"  # white space as without
    assert text == tokenizer.decode(Prompts("{question}").student(tokenizer, Example("1?", "", ""))) + shown


@pytest.mark.parametrize("date", ["26 July 2024", "", "2024-02-30", "today"])
def test_invalid_dates_are_refused(date: str) -> None:
    with pytest.raises(ConfigError) as caught:
        Prompts(date=date)
    assert caught.value.setting == "data.prompts.date"


def test_the_doctor_finds_what_is_not_refused() -> None:
    tokenizer = make_tokenizer()
    for prompts, context, settings in (
        (Prompts(), NoContext(), []),
        (Prompts(teacher_response_prefix="Hm"), NoContext(), ["data.context"]),
        (Prompts(teacher_response_prefix="Hm"), TraceContext(), []),
    ):
        assert [finding.setting for finding in context_findings(tokenizer, prompts, context, True)] == settings
    tokenizer.chat_template = DATED
    assert [finding.setting for finding in context_findings(tokenizer, Prompts(), NoContext(), False)] == [
        "data.prompts.date"
    ]


def test_a_template_may_close_what_it_opened() -> None:
    """Phi 3 writes an EOS where no answer is opened; a template whose prompts end in the middle of nothing is told apart."""
    tokenizer = make_tokenizer()
    for end, opens in ((GENERATION[:-11] + "{% else %}{{ eos_token }}{% endif %}", True), ("", False)):
        tokenizer.chat_template = turns("m['content']")[: -len(GENERATION)] + end
        assert opens_answer(tokenizer, Prompts(), {}) == opens
