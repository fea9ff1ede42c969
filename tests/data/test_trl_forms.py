"""Forms of data in TRL's documentation of SDFT and SDPO, and of its dataset formats: each trains, or is refused with advice.

TRL's pages ``sdft_trainer``, ``sdpo_trainer`` and ``dataset_formats``, and the code of ``trl.experimental``.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from datasets import Dataset

from helpers.files import write_jsonl
from helpers.messages import mentions
from helpers.steps import one_step
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import Columns, FileSource, HubSource
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.contexts import AnswerContext, ColumnContext, PrivilegedContext, TraceContext
from opsd_lightning.prompts.online_contexts import FeedbackContext, OnlineContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, Sampling

pytestmark = pytest.mark.integration

SYSTEM = {"role": "system", "content": "Be brief."}
ASK = {"role": "user", "content": "Solve 2+2."}
SOLVED = "Example answer: 4."
REPLY = {"role": "assistant", "content": SOLVED}
CALL = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "add", "arguments": {"n": 2}}}]}
RESULT = {"role": "tool", "name": "add", "content": "4"}
TOOLS = [{"type": "function", "function": {"name": "add", "parameters": {"type": "object"}}}]
# Writes tools and tool calls, as chat templates do that know them.
TEMPLATE = (
    "{% if tools %}{{ tools | tojson }}{% endif %}{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' }}"
    "{{ m['content'] or '' }}{% if m['tool_calls'] %}{{ m['tool_calls'] | tojson }}{% endif %}{{ '<|im_end|>' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
TRL = Columns("prompt", "privileged_context")


class Form(NamedTuple):
    """A row in a form of TRL's, with the settings that read it.

    Args:
        row: The row.
        columns: Settings that read it.
        student: Texts in the student's prompt, in their order.
        teacher: Text that only the teacher's prompt has.
        context: ``data.context``.
        online: ``model.context``.
    """

    row: dict[str, Any]
    columns: Columns
    student: list[str]
    teacher: str = SOLVED
    context: PrivilegedContext = TraceContext()
    online: OnlineContext | None = None


def row(prompt: Any, privileged: Any = SOLVED) -> dict[str, Any]:
    return {"prompt": prompt, "privileged_context": privileged}


TEXT_PARTS = [{"type": "text", "text": "Solve"}, {"type": "text", "text": "2+2."}]
FORMS = {
    "SDFT: messages and text": Form(row([ASK]), TRL, ["Solve 2+2."]),
    "SDFT: text and text": Form(row("Solve 2+2."), TRL, ["Solve 2+2."]),
    "SDFT: text and messages": Form(row("Solve 2+2.", [REPLY]), TRL, ["Solve 2+2."]),
    "SDFT: messages and messages": Form(row([SYSTEM, ASK], [ASK, REPLY]), TRL, ["Be brief.", "Solve 2+2."], f"\n{SOLVED}"),
    "SDFT: several turns": Form(
        row([SYSTEM, ASK, {"role": "assistant", "content": "It is 5."}, {"role": "user", "content": "Sure?"}]),
        TRL,
        ["Be brief.", "Solve 2+2.", "It is 5.", "Sure?"],
    ),
    "SDFT: text parts": Form(
        row(
            [{"role": "user", "content": TEXT_PARTS}], [{"role": "assistant", "content": [{"type": "text", "text": SOLVED}]}]
        ),
        TRL,
        ["Solve", "2+2."],
    ),
    "SDFT: a number": Form(row([ASK], 42), TRL, ["Solve 2+2."], "42"),
    "SDPO: feedback": Form(
        row([ASK], "Your earlier answer used the wrong format.") | {"gold": 4},
        Columns("prompt", None, "gold"),
        ["Solve 2+2."],
        "Your earlier answer used the wrong format.",
        ColumnContext("privileged_context"),
    ),
    "SDPO: feedback as messages": Form(
        row([ASK], [{"role": "user", "content": TEXT_PARTS}]) | {"gold": 4},
        Columns("prompt", None, "gold"),
        ["Solve 2+2."],
        "Solve 2+2.",
        ColumnContext("privileged_context"),
    ),
    "SDPO: prompt only": Form(
        {"prompt": [ASK], "gold": 4}, Columns("prompt", None, "gold"), ["Solve 2+2."], "", online=FeedbackContext()
    ),
    "prompt-only, messages": Form(
        {"prompt": [ASK], "gold": 4}, Columns("prompt", None, "gold"), ["Solve 2+2."], "is 4", AnswerContext()
    ),
    "prompt-only, text": Form(
        {"prompt": "Solve 2+2.", "gold": 4}, Columns("prompt", None, "gold"), ["Solve 2+2."], "is 4", AnswerContext()
    ),
    "prompt-completion, messages": Form(
        {"prompt": [ASK], "completion": [REPLY]}, Columns("prompt", "completion"), ["Solve 2+2."]
    ),
    "prompt-completion, text": Form(
        {"prompt": "Solve 2+2.", "completion": SOLVED}, Columns("prompt", "completion"), ["Solve 2+2."]
    ),
    "language modeling, messages": Form(
        {"messages": [SYSTEM, ASK, REPLY]}, Columns(messages="messages"), ["Be brief.", "2+2"]
    ),
    "tool calling": Form(
        {"messages": [ASK, CALL, RESULT, REPLY], "tools": TOOLS},
        Columns(messages="messages", tools="tools"),
        ['"name": "add"', "Solve 2+2.", '"n": 2', "tool\n4"],
    ),
    "tool calling, a call as the demonstration": Form(
        {"messages": [ASK, CALL], "tools": TOOLS},
        Columns(messages="messages", tools="tools"),
        ['"name": "add"', "Solve 2+2."],
        '{"name": "add", "arguments": {"n": 2}}',
    ),
    "harmony": Form(
        {"messages": [{"role": "developer", "content": "Be kind."}, ASK, REPLY | {"thinking": "hm"}]},
        Columns(messages="messages"),
        ["developer", "Be kind.", "Solve 2+2."],
    ),
    "preference": Form(
        {"prompt": [ASK], "chosen": [REPLY], "rejected": [REPLY]}, Columns("prompt", "chosen"), ["Solve 2+2."]
    ),
    "preference, implicit prompt": Form(
        {"chosen": [ASK, REPLY], "rejected": []}, Columns(messages="chosen"), ["Solve 2+2."]
    ),
    "unpaired preference": Form(
        {"prompt": [ASK], "completion": [REPLY], "label": True}, Columns("prompt", "completion"), ["Solve 2+2."]
    ),
}


@pytest.mark.parametrize("arrow", [False, True], ids=["jsonl", "arrow"])
@pytest.mark.parametrize("name", FORMS)
def test_form_trains(name: str, arrow: bool, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    form = FORMS[name]
    path = tmp_path / "rows"
    if arrow:
        Dataset.from_list([form.row]).save_to_disk(path)
    else:
        path = write_jsonl(tmp_path / "rows.jsonl", [form.row])
    source = HubSource(str(path), columns=form.columns) if arrow else FileSource(str(path), columns=form.columns)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    policy = make_policy(chat_template=str(template))
    prompts = Prompts("{question}", "{question} {context}")
    sampling = Sampling(max_new_tokens=4)
    module = OPSDModule(
        policy, context=form.online, prompts=prompts, sampling=sampling, optimizer=lambda p: torch.optim.SGD(p, 0.1)
    )
    data = OPSDDataModule(
        policy, source, prompts=prompts, context=form.context, verify=False, batch_size=1, max_new_tokens=4, cache_dir=None
    )
    trainer = one_step(tmp_path)
    trainer.fit(module, data)
    assert trainer.global_step == 1 and math.isfinite(float(trainer.callback_metrics["train/loss"]))
    tokenizer, rows = policy.load_tokenizer(), data.rows["train"]
    student = str(tokenizer.decode(rows.student[0]))
    places = [student.index(text) for text in form.student]
    assert places == sorted(places)
    if form.online is None:
        teacher = str(tokenizer.decode(rows.teacher[0]))
        assert form.teacher in teacher and student.count(form.teacher) < teacher.count(form.teacher)


IMAGES = {"images": ["x"]}
REFUSED: dict[str, tuple[dict[str, Any], Columns, list[str]]] = {
    "language modeling, text": ({"text": "The sky is blue."}, Columns("text", None), ["data.train", "trace"]),
    "prompt-only without a context": ({"prompt": [ASK]}, Columns("prompt", None), ["data.train", "trace"]),
    "SDFT: no privileged context": (row([ASK], None), TRL, ["data.train", "trace"]),
    "SDFT: a list": (row([ASK], ["a", "b"]), TRL, ["columns.trace", "list"]),
    "SDFT: an object": (row([ASK], {"hint": "a"}), TRL, ["columns.trace", "object"]),
    "preference, implicit prompt, text": ({"chosen": "It is blue.", "rejected": "x"}, TRL, ["columns.question", "chosen"]),
    "stepwise supervision": (
        {"prompt": "Which?", "completions": ["a", "b"], "labels": [True, False]},
        Columns("prompt", "completions"),
        ["columns.trace", "list"],
    ),
    "vision: columns": ({"prompt": [ASK], "completion": [REPLY], **IMAGES}, Columns("prompt", "completion"), ["images"]),
    "vision: parts": (
        {"messages": [{"role": "user", "content": [{"type": "image"}, *TEXT_PARTS]}, REPLY]},
        Columns(messages="messages"),
        ["columns.messages", "image"],
    ),
    "tools that are not read": (
        {"messages": [ASK, CALL, RESULT, REPLY], "tools": TOOLS},
        Columns(messages="messages"),
        ["columns.tools"],
    ),
    "arguments of the template in each row": (
        {"messages": [ASK, REPLY], "chat_template_kwargs": {"enable_thinking": False}},
        Columns(messages="messages"),
        ["columns.messages", "chat_template_kwargs"],
    ),
}


@pytest.mark.parametrize("name", REFUSED)
def test_form_is_refused_with_advice(name: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    values, columns, words = REFUSED[name]
    source = FileSource(str(write_jsonl(tmp_path / "rows.jsonl", [values])), columns=columns)
    policy = make_policy()
    data = OPSDDataModule(
        policy, source, prompts=Prompts("{question}", "{question} {context}"), batch_size=1, cache_dir=None
    )
    with pytest.raises(ConfigError, match=mentions(*words)) as caught:
        data.setup("fit")
    assert caught.value.fix


def test_demonstrations_of_tool_calls_are_trained_on_as_the_template_writes_them(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    rows = [{"messages": [ASK, CALL | {"content": f"{n}"}] if n % 2 else [ASK, REPLY], "tools": TOOLS} for n in range(40)]
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE, encoding="utf-8")
    policy = make_policy(chat_template=str(template))
    columns = Columns(messages="messages", tools="tools")
    source = FileSource(str(write_jsonl(tmp_path / "rows.jsonl", rows)), columns=columns)
    prompts = Prompts("{question}", "{question} {context}")
    module = SFTModule(policy, optimizer=lambda p: torch.optim.SGD(p, 0.1))
    data = OPSDDataModule(policy, source, prompts=prompts, verify=False, batch_size=4, max_new_tokens=4, cache_dir=None)
    one_step(tmp_path).fit(module, data)
    tokenizer, made = policy.load_tokenizer(), data.rows["train"]
    for example, student, trace in zip(made.examples, made.student, made.traces, strict=True):
        whole = tokenizer.apply_chat_template(
            [*example.messages, example.demonstration],  # type: ignore[list-item]
            tools=list(example.tools),  # type: ignore[arg-type]
            return_dict=False,
        )
        assert [*student, *trace] == whole
