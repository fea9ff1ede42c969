"""Tests of `opsd chat`: both roles answer and are scored as in training, and a terminal shows the divergence of each token."""

from __future__ import annotations

import io
import json
import re
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from helpers.files import write_record
from helpers.models import perturb
from opsd_lightning.chat.command import main
from opsd_lightning.chat.roles import Roles
from opsd_lightning.chat.shading import shaded, summary
from opsd_lightning.models.export import write_adapter
from opsd_lightning.models.policy import LoRA, Policy, base_of
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Example, Sampling

QUESTIONS = ["1+1?", "What is 2+2?"]
CONTEXT = "Two and two make four."
SAMPLING = Sampling(max_new_tokens=12, temperature=0.0)


@pytest.fixture(scope="module")
def adapter(roomy: str, tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return an exported adapter that changes the model."""
    torch.manual_seed(0)
    model = Policy(roomy, lora=LoRA(r=2, alpha=4)).build()
    perturb(model, scale=0.3)
    return str(write_adapter(model, tmp_path_factory.mktemp("export") / "adapter"))


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Callable[..., str]:
    """Return a function that runs the command with questions on standard input, and returns what it prints."""

    def run(*arguments: str, questions: list[str] = QUESTIONS) -> str:
        monkeypatch.setattr(sys, "stdin", io.StringIO("\n".join([*questions, ""])))
        capsys.readouterr()
        main([*arguments, "--max_new_tokens=12"])
        return capsys.readouterr().out

    return run


def expected(policy: Policy, context: str | None) -> list[str]:
    """Return greedy answers of the policy to `QUESTIONS`, with the package's prompts for them."""
    model, tokenizer, prompts = policy.build(), policy.load_tokenizer(), Prompts()
    examples = [Example(question, "", "") for question in QUESTIONS]
    asked = [prompts.teacher(tokenizer, example, context) for example in examples]
    rollouts = TransformersEngine().generate(model, asked, SAMPLING, seed=0)
    return [str(tokenizer.decode(tokens, skip_special_tokens=True)) for tokens in rollouts.completions]


def test_student_answers_each_line_with_the_adapter(chat: Callable[..., str], adapter: str, roomy: str) -> None:
    with_adapter = expected(Policy(roomy, lora=None, adapter=adapter), None)
    assert chat("--adapter", adapter) == "".join(f"{answer}\n" for answer in with_adapter)
    base = expected(Policy(roomy, lora=LoRA(r=1)), None)
    assert chat("--model", roomy) == "".join(f"{answer}\n" for answer in base)
    assert base != with_adapter


def test_adapter_of_a_run_has_its_base_model_and_prompts(
    chat: Callable[..., str], adapter: str, roomy: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Its own settings name a model of the hub, which is not reached."""
    folder = tmp_path / "run" / "adapter"
    shutil.copytree(adapter, folder)
    settings = json.loads((folder / "adapter_config.json").read_text())
    (folder / "adapter_config.json").write_text(json.dumps(settings | {"base_model_name_or_path": "nobody/base"}))
    export = {"class_path": "opsd_lightning.AdapterExport", "init_args": {"base_model": "nobody/base"}}
    config = {
        "model": {"class_path": "opsd_lightning.OPSDModule", "init_args": {"policy": {"model": roomy}}},
        "data": {
            "prompts": {"student_template": "{question} Be brief.", "system": "You add.", "max_trace_tokens": 4},
        },
        "trainer": {"callbacks": [export]},
    }
    write_record(tmp_path / "run", config)
    roles = Roles.load(None, str(folder), CONTEXT, SAMPLING)
    student, teacher = map(str, map(roles.tokenizer.decode, roles.answer(QUESTIONS[0], "student", seed=0).prompts))
    assert f"{QUESTIONS[0]} Be brief." in student and "You add." in student
    assert CONTEXT in teacher, "a context that is typed is not cut"
    capsys.readouterr()
    other = Roles.load(None, str(folder), None, SAMPLING, system="You subtract.")
    assert roomy in capsys.readouterr().err
    assert "You subtract." in str(other.tokenizer.decode(other.answer(QUESTIONS[0], "student", seed=0).prompts[0]))
    assert chat("--adapter", str(folder), questions=QUESTIONS[:1]) != ""
    with pytest.raises(SystemExit) as end:
        chat("--adapter", str(folder), "--model", "nobody/other")  # an explicit model is the one that is loaded
    assert end.value.code == 2 and "nobody/other" in capsys.readouterr().err


def test_teacher_reads_the_context_without_the_adapter(
    chat: Callable[..., str], adapter: str, roomy: str, tmp_path: Path
) -> None:
    (tmp_path / "solution.txt").write_text(CONTEXT)
    answers = expected(Policy(roomy, lora=LoRA(r=1)), CONTEXT)
    assert answers != expected(Policy(roomy, lora=LoRA(r=1)), None)
    context = ["--context", str(tmp_path / "solution.txt")]
    assert chat("--adapter", adapter, *context) == "".join(f"{answer}\n" for answer in answers)


def test_divergence_is_that_of_both_roles(adapter: str) -> None:
    roles = Roles.load(None, adapter, CONTEXT, SAMPLING)
    answer = roles.answer(QUESTIONS[0], "student", seed=0)
    divergence = roles.divergence(answer)
    roles.model.eval()  # without dropout
    logprobs = []
    for prompt, role in zip(answer.prompts, ("student", "teacher"), strict=True):
        with roles.teachers[role].weights(roles.model), torch.no_grad():
            logits = base_of(roles.model)(torch.tensor([[*prompt, *answer.tokens]])).logits[0]
        logprobs.append(logits[len(prompt) - 1 : -1].log_softmax(-1))
    student, teacher = logprobs
    wanted = (teacher.exp() * (teacher - student)).sum(-1)
    assert divergence == pytest.approx(wanted.tolist(), abs=1e-5)
    assert wanted.max() > 0.01


def test_a_pipe_gets_plain_text_and_a_terminal_shades(
    chat: Callable[..., str], adapter: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    plain = chat("--adapter", adapter, "--shade")
    assert "\x1b" not in plain
    monkeypatch.setattr(sys.stdout, "isatty", lambda: True)
    coloured = chat("--adapter", adapter, "--shade")
    assert "\x1b[" in coloured
    text = re.sub(r"\x1b\[[\d;]*m", "", coloured)
    assert [line for line in text.splitlines() if "nats" in line] == [line for line in plain.splitlines() if "nats" in line]


def test_shades_grow_with_the_divergence() -> None:
    pieces = ["no", " little", " more", " much", " most\n"]
    text = shaded(pieces, [0.0, 0.02, 0.3, 2.0, 50.0])
    assert re.sub(r"\x1b\[[\d;]*m", "", text) == "".join(pieces)
    colours = re.findall(r"48;5;(\d+)m([^\x1b]*)", text)
    assert [word for _, word in colours] == [" little", " more", " much", " most"]
    assert len({colour for colour, _ in colours[:3]}) == 3 and colours[2][0] == colours[3][0]
    assert "\x1b[31m" not in shaded(["\x1b[31mred"], [1.0])


def test_summary_names_the_tokens_with_the_largest_divergence() -> None:
    line = summary(["a", "b", "c", "d"], [0.0, 3.0, 1.0, 2.0])
    assert "1.500" in line and line.index("'b'") < line.index("'d'") < line.index("'c'") and "'a'" not in line


def test_a_conversation_goes_on(adapter: str) -> None:
    roles = Roles.load(None, adapter, None, SAMPLING)
    first = roles.answer(QUESTIONS[0], "student", seed=0)
    second = roles.answer(QUESTIONS[1], "student", seed=1)
    said = str(roles.tokenizer.decode(second.prompts[0]))
    assert said.index(QUESTIONS[0]) < said.index(QUESTIONS[1])
    assert [message["content"] for message in roles.history] == [QUESTIONS[0], first.text, QUESTIONS[1], second.text]
    roles.history.clear()
    again = roles.answer(QUESTIONS[0], "student", seed=0)
    assert again.text == first.text


def test_a_question_that_does_not_fit_is_refused(adapter: str) -> None:
    roles = Roles.load(None, adapter, None, SAMPLING)
    with pytest.raises(ConfigError) as refused:
        roles.answer("x" * 3000, "student", seed=0)
    assert "2048" in str(refused.value)


def test_end_of_input_ends(chat: Callable[..., str], adapter: str) -> None:
    assert chat("--adapter", adapter, questions=[]) == ""
