"""Tests of `opsd doctor`: it finds planted defects with their settings, and none in a healthy run."""

from __future__ import annotations

import json
import re
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from transformers import BitsAndBytesConfig, DynamicCache

from helpers.commands import MISTAKES, folder
from helpers.files import write_jsonl
from helpers.models import ARCHITECTURES, CHAT_TEMPLATE, PLAIN, make_model, make_tokenizer
from opsd_lightning.__main__ import entry
from opsd_lightning.doctor import diagnosis, probe, trial
from opsd_lightning.doctor.command import main
from opsd_lightning.doctor.findings import at_share, histogram
from opsd_lightning.doctor.memory import (
    RESERVE,
    DeviceMemory,
    Estimator,
    Step,
    kept_bytes_per_token,
    logits_bytes,
    optimizer_bytes,
    quantized_layers,
    size_of,
    skeleton,
    weight_bytes,
)
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.cache_size import cache_bytes
from opsd_lightning.models.policy import LoRA, Policy, base_of, is_adapter_key
from opsd_lightning.rollouts.self_checks import agreement
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Sampling

pytestmark = pytest.mark.integration


Doctor = Callable[..., dict[str, Any]]


def make_rows(count: int = 12, **changes: Callable[[int], str]) -> list[dict[str, object]]:
    make: dict[str, Callable[[int], str]] = {
        "problem": lambda n: f"{n}+1?",
        "solution": lambda n: f"The answer is {n + 1}.",
        "gold": lambda n: str(n + 1),
    }
    return [{name: value(n) for name, value in (make | changes).items()} for n in range(count)]


@pytest.fixture
def base(folders: dict[str, str], tmp_path: Path) -> list[str]:
    """Arguments of a tiny run in which nothing is wrong."""
    write_jsonl(tmp_path / "rows.jsonl", make_rows())
    (tmp_path / "plain.jinja").write_text(PLAIN)  # a student that thinks is a finding
    columns = {"answer": "gold"}
    splits = {"train": "train[4:]", "val": "train[:2]", "test": "train[2:4]"}
    config = {
        "model": {
            "policy": {
                "model": folders["llama"],
                "dtype": "float32",
                "lora": {"r": 4, "alpha": 8.0},
                "chat_template": str(tmp_path / "plain.jinja"),
            },
            "sampling": {"max_new_tokens": 24},
            "eval_sampling": {"max_new_tokens": 24},
        },
        "data": {
            split: {
                "class_path": "FileSource",
                "init_args": {"path": str(tmp_path / "rows.jsonl"), "split": part, "columns": columns},
            }
            for split, part in splits.items()
        }
        | {"batch_size": 2, "eval_batch_size": 4}
        # The wording of both roles ends alike, as far as a model of random weights can tell.
        | {"prompts": {"student_template": "{question}", "teacher_template": "{context} {question}"}},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path / "logs")}},
            "default_root_dir": str(tmp_path / "out"),
        },
    }
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    return [f"--config={tmp_path / 'base.yaml'}"]


@pytest.fixture
def doctor(base: list[str], tmp_path: Path) -> Doctor:
    """Runs the command on the healthy run with some changes; gives what it wrote with ``--json``, and its status."""

    def run(*arguments: str) -> dict[str, Any]:
        path = tmp_path / "findings.json"
        status = 0
        try:
            main([*base, f"--json={path}", *arguments])
        except SystemExit as stop:
            status = int(stop.code or 0)
        found: dict[str, Any] = json.loads(path.read_text())
        assert found["healthy"] == (status == 0) and status in (0, 1)
        assert found["healthy"] == (not [f for f in found["findings"] if f["level"] == "error"])
        return found

    return run


def lines(found: dict[str, Any], *levels: str) -> list[str]:
    return [
        f"{f['level']} {f['part']}: {f['text']} [{f['setting']}] {f['fix']}"
        for f in found["findings"]
        if not levels or f["level"] in levels
    ]


def test_conversations(doctor: Doctor, tmp_path: Path) -> None:
    """A template that writes no tools stops the run; one that does is healthy, and its own text is told."""
    tools = [{"type": "function", "function": {"name": "add", "description": "Adds."}}]
    turns = [
        [
            {"role": "user", "content": "Hello <|im_end|>"},
            {"role": "assistant", "content": "Yes?"},
            {"role": "user", "content": f"{n}+1?"},
        ]
        for n in range(12)
    ]
    rows = [
        {"chat": [*turn, {"role": "assistant", "content": f"The answer is {n}."}], "tools": tools}
        for n, turn in enumerate(turns)
    ]
    path = write_jsonl(tmp_path / "chats.jsonl", [dict(row) for row in rows])
    columns = json.dumps({"messages": "chat", "tools": "tools", "answer": None})
    arguments = [f"--data.{split}.init_args.{name}={value}" for split in ("train", "val", "test")
                 for name, value in (("path", path), ("columns", columns))]  # fmt: skip
    found = doctor(*arguments, "--no-model")
    assert any("add" in line and "[model.policy.chat_template]" in line for line in lines(found, "error"))
    template = tmp_path / "tools.jinja"
    template.write_text("{% if tools %}You may call these tools: {{ tools | tojson }}{% endif %}" + CHAT_TEMPLATE)
    found = doctor(*arguments, f"--model.policy.chat_template={template}")
    assert lines(found, "error") == []
    assert any("12 rows" not in line and "You may call these tools" in line for line in lines(found, "note"))
    assert any("<|im_end|>" in line for line in lines(found, "warning"))
    student, teacher = (found["facts"]["template"]["prompts"][role] for role in ("student", "teacher"))
    assert "Hello" in student and '"name": "add"' in student and "The answer is 4." in teacher and "answer" not in student


def test_healthy_run_has_no_findings(doctor: Doctor, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    before = sorted(tmp_path.rglob("*"))
    found = doctor()
    assert lines(found, "error", "warning") == []
    assert sorted(tmp_path.rglob("*")) == sorted([*before, tmp_path / "findings.json"]), "something else was written"
    facts = found["facts"]
    assert set(facts) == {"data", "lengths", "template", "thinking", "memory", "divergence", "agreement", "time"}
    assert facts["data"]["train"] == {"rows": 8, "kept": 8, "left_out": {}, "repeated_questions": 0, "traces_cut": 0}
    assert facts["agreement"]["agreed"] == facts["agreement"]["tokens"] > 0
    assert facts["time"]["steps"] == 2 and 0 < facts["time"]["run_seconds"][0] <= facts["time"]["run_seconds"][1]
    printed = capsys.readouterr().out
    prompts = facts["template"]["prompts"]
    assert prompts["student"] == "<|im_start|>user\n4+1?<|im_end|><|im_start|>assistant\n"
    assert prompts["teacher"] == "<|im_start|>user\nThe answer is 5. 4+1?<|im_end|><|im_start|>assistant\n"
    assert all(text in printed for text in prompts.values())
    for phrase in (
        "Data",
        "Lengths in tokens",
        "teacher's prompts",
        "\N{FULL BLOCK}",
        "Divergence",
        "Memory",
        "A step takes",
        "Nothing to fix, 0 warnings",
    ):
        assert phrase in printed, phrase


def test_lengths_are_counted_in_tokens(doctor: Doctor) -> None:
    """The tokenizer has one token a character."""
    lengths = doctor("--no-model")["facts"]["lengths"]
    turn = len("<|im_start|>user\n") - len("<|im_start|>") + 1
    student = [turn + len(f"{n}+1?") + 1 + len("assistant\n") + 1 for n in range(4, 12)]
    traces = [len(f"The answer is {n + 1}.") + 1 for n in range(4, 12)]
    assert lengths["student_prompts"]["mean"] == pytest.approx(sum(student) / 8)
    assert lengths["traces"]["longest"] == max(traces) and lengths["traces"]["mean"] == pytest.approx(sum(traces) / 8)
    assert lengths["teacher_prompts"]["mean"] == pytest.approx((sum(student) + sum(t for t in traces)) / 8)
    assert lengths["student_prompts"]["limit"] == 512 - 24
    assert sum(count for _, _, count in lengths["traces"]["bins"]) == 8


def test_command_exits_with_the_number_of_errors(
    base: list[str], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    def run(*arguments: str) -> int:
        monkeypatch.setattr(sys, "argv", ["opsd", *arguments])
        monkeypatch.setattr(sys, "path", list(sys.path))
        try:
            entry()
        except SystemExit as stop:
            return int(stop.code or 0)
        return 0

    assert run("doctor", *base, "--no-model") == 0
    assert "Nothing to fix" in capsys.readouterr().out
    assert run("doctor", *base, "--no-model", "--data.train=null") == 1
    assert "1 thing to fix" in capsys.readouterr().out
    assert run("doctor", *base, "--examples=0") == 2
    assert run("doctor", *base, "--model.nonsense=1") == 2
    assert "nonsense" in capsys.readouterr().err
    assert run("doctor", *base, "--no-model", f"--json={tmp_path / 'base.yaml' / 'x.json'}") == 2
    assert "error: --json" in capsys.readouterr().err
    assert run("doctor", "--help") == 0
    assert "opsd fit" in capsys.readouterr().out
    assert run("--help") == 0
    assert "opsd doctor" in capsys.readouterr().out


# -- what `fit` refuses ----------------------------------------------------------------------------------------------------

# One of every place that refuses: a part, the data, the tokenizer, the model's configuration, its optimizer.
_REFUSED = [
    "missing column",
    "context without its column",
    "fsdp of the first kind",
    "no chat template",
    "LoRA targets",
    "EMA without an adapter",
    "top-k over the vocabulary",
    "schedule too short",
]


@pytest.mark.parametrize("mistake", _REFUSED)
def test_errors_of_fit_are_found(mistake: str, doctor: Doctor, folders: dict[str, str], tmp_path: Path) -> None:
    """With one clear line each, and without the model's weights."""
    (tmp_path / "there").mkdir()
    own = ["--model.policy.chat_template=null"]  # the models' own, which one of them lacks
    found = doctor("--no-model", *own, *MISTAKES[mistake].arguments(tmp_path / "there", folders))
    errors = lines(found, "error")
    said = [f"{each['setting']}: {each['text']}. {each['fix']}" for each in found["findings"]]
    assert any(all(word in " ".join(line.split()) for word in MISTAKES[mistake].words) for line in [*errors, *said]), errors
    assert not [line for line in errors if "\n" in line or "Traceback" in line]


def test_errors_of_the_loaded_model_are_found(doctor: Doctor) -> None:
    found = doctor("--model.objective.support=TopKWithTail", "--model.objective.support.k=999")
    (error,) = [each for each in found["findings"] if each["level"] == "error"]
    assert error["setting"] == "model.objective.support.k"


def test_several_errors_are_reported_together(doctor: Doctor) -> None:
    found = doctor("--data.val.path=nowhere.jsonl", "--trainer.gradient_clip_val=1", "--no-model")
    text = "\n".join(lines(found, "error"))
    for phrase in ("nowhere.jsonl", "model.max_grad_norm"):
        assert phrase in text
    assert found["facts"]["data"]["train"]["kept"] == 8, "the other split is read all the same"


# -- what it would not refuse ----------------------------------------------------------------------------------------------


def data(tmp_path: Path, rows: Sequence[dict[str, object]], split: str = "train") -> list[str]:
    path = write_jsonl(tmp_path / "planted.jsonl", rows)
    return [f"--data.{split}.path={path}", f"--data.{split}.split=train"]


def template(tmp_path: Path, text: str) -> list[str]:
    path = tmp_path / "template.jinja"
    path.write_text(text)
    return [f"--model.policy.chat_template={path}"]


def thinking(tmp_path: Path) -> list[str]:
    """A template in which the model thinks unless ``enable_thinking`` is false."""
    return template(tmp_path, CHAT_TEMPLATE)


def doubled_bos(tmp_path: Path) -> list[str]:
    path = folder(tmp_path, bos_token="<|end|>")
    return [f"--model.policy.model={path}", *template(tmp_path, "{{ '<|end|><|end|>' }}" + CHAT_TEMPLATE)]


def endless(tmp_path: Path) -> list[str]:
    """A model whose only EOS is not what its template ends a turn with."""
    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.eos_token = "<|end|>"
    end = tokenizer.convert_tokens_to_ids("<|end|>")
    model.config.eos_token_id = model.generation_config.eos_token_id = end
    model.save_pretrained(tmp_path / "endless")
    tokenizer.save_pretrained(tmp_path / "endless")
    return [f"--model.policy.model={tmp_path / 'endless'}"]


def more_tokens(tmp_path: Path) -> list[str]:
    tokenizer = make_tokenizer()
    tokenizer.add_tokens(["plus"])
    make_model("llama").save_pretrained(tmp_path / "more")
    tokenizer.save_pretrained(tmp_path / "more")
    return [f"--model.policy.model={tmp_path / 'more'}", "--data.prompts.student_template={question} plus"]


OFF = "={enable_thinking: false}"
SILENT = CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{% if add_generation_prompt")]
STUDENT, TEACHER = "--data.prompts.student_chat_template_kwargs", "--data.prompts.teacher_chat_template_kwargs"


def bad_rows(tmp_path: Path) -> list[str]:
    """40 rows, of which 14 contradict themselves, 4 have no trace and 1 has no answer; 6 of the 21 left are repeats."""
    rows = make_rows(
        40, problem=lambda n: f"{n + 100} \u00d7 1?<|im_end|>", solution=lambda n: f"<think> </think>The answer is {n + 1}."
    )
    for row in rows[:14]:
        row["gold"] = "1000"
    for row in rows[14:18]:
        row["solution"] = ""
    rows[18]["solution"] = "Hm."
    for row in rows[19:25]:
        row |= {name: rows[30][name] for name in ("problem", "solution", "gold")}
    return data(tmp_path, rows)


# What is planted, and what lines must say: level, part, text, [setting], fix.
DEFECTS: dict[str, tuple[Callable[[Path], list[str]], list[str]]] = {
    "rows": (
        bad_rows,
        [
            r"warning data: 14.*40.*data\.train \(35 %\) .*\[data\.train\.init_args\.columns\.answer\]",
            r"warning data: 4.*40.*data\.train \(10 %\).*\[data\.train\.init_args\.columns\.trace\]",
            r"warning data: 1.*40.*data\.train \(2\.5 %\).*\[data\.grader\]",
            r"warning data: 6.*21.*data\.train \(29 %\)",
            r"warning template: .*student's",
            r"warning template: 21.*\(100 %\).*'<\|im_end\|>' \[data\.train\]",
            r"warning thinking: 21.*21.*\(100 %\).*\[data\.train\]",
            r"warning thinking: 21.*21.*\(100 %\).*<think>.*\[data\.train\]",
        ],
    ),
    "mostly bad rows, none allowed": (
        lambda p: [*data(p, make_rows(gold=lambda n: str(n + n % 3), problem=lambda n: f"{n} and 1?")), "--data.on_invalid=error"],
        [r"error data: 8 of 12 rows of data\.train \(67 %\) are left out: .* or set data\.on_invalid to drop"],
    ),
    "settings": (
        lambda p: [
            "--data.val.split=train[2:4]",
            "--data.prompts.max_trace_tokens=4",
            "--model.sampling={max_new_tokens: 10, temperature: 0, n: 2}",
            "--model.eval_sampling.max_new_tokens=9",
            "--model.optimizer=torch.optim.AdamW",
            "--model.optimizer.lr=0",
            "--trainer.callbacks=ModelCheckpoint",
            "--trainer.callbacks.monitor=val/avg@4",
            "--trainer.val_check_interval=25",
        ],
        [
            r"warning data: 2.*2.*data\.val \(100 %\).*data\.test",
            r"warning data: 8.*8 .*\[data\.prompts\.max_trace_tokens\]",
            r"warning lengths: 100 %.*10 .*\[model\.sampling\.max_new_tokens\] .*\b18\b",
            r"warning settings: .*\[model\.eval_sampling\.max_new_tokens\]",
            r"error settings: .*2 .*\[model\.sampling\.temperature\]",
            r"error settings: .*0.*\[model\.optimizer\.init_args\.lr\]",
            r"error settings: ModelCheckpoint.*val/avg@4,.*1 .*\[model\.eval_sampling\.n\].*4,.*val/avg@1",
            r"error settings: .*an.*4 batches.*\[trainer\.check_val_every_n_epoch\]",
        ],
    ),
    "no validation": (
        lambda p: ["--data.val=null", "--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/avg@1", "--trainer.max_steps=400"],
        [
            r"error settings: ModelCheckpoint.*val/avg@1,.*\[data\.val\]",
            r"warning settings: 400 .*\b100 .*\b8.*\[trainer\.max_steps\]",
        ],
    ),
    "BOS twice, and a switch without effect": (
        lambda p: [f"--model.policy.model={folder(p, bos_token='<|end|>')}", *template(p, "{{ '<|end|><|end|>' }}" + PLAIN), TEACHER + OFF],
        [
            r"error template: .*student's.*'<\|end\|>'.*\[model\.policy\.chat_template\]",
            r"error template: .*teacher's.*'<\|end\|>'",
            r"error template: enable_thinking:.*nothing.*\[data\.prompts\.teacher_chat_template_kwargs\]",
        ],
    ),
    "no generation prompt": (
        lambda p: template(p, SILENT),
        [r"error template: .*student's.*prompt.*\[model\.policy\.chat_template\]"],
    ),
    "answers that do not end": (
        endless,
        [r"error template: .*'<\|im_end\|>', .*\('<\|end\|>'\).*\[model\.policy\.model\] .*eos_token_id"],
    ),
    "tokens without embedding": (
        more_tokens,
        [r"error template: .*student's.*107.*\b107\b.*\[model\.policy\.model\]"],
    ),
    "one thinks": (
        lambda p: [*thinking(p), STUDENT + OFF],
        [
            r"warning thinking: .*student.*closed.*teacher.*"
            r"\[data\.prompts\.teacher_chat_template_kwargs\] .*teacher_response_prefix.*skip_first_tokens"
        ],
    ),
    "one thinks, its first token skipped": (
        lambda p: [*thinking(p), STUDENT + OFF, "--model.objective.skip_first_tokens=1"],
        [r"note thinking: .*skip_first_tokens.*1"],
    ),
    "the student thinks": (
        lambda p: [*thinking(p), TEACHER + OFF],
        [
            r"warning thinking: .*student.*before.*teacher.*closed",
            r"warning thinking: the student thinks.*\[data\.prompts\.student_chat_template_kwargs\] .*evaluation_chat_template_kwargs",
        ],
    ),
    "validation thinks": (
        lambda p: [*thinking(p), STUDENT + OFF, TEACHER + OFF, "--data.prompts.evaluation_chat_template_kwargs={enable_thinking: true}"],
        [r"note thinking: .*\[data\.prompts\.evaluation_chat_template_kwargs\]"],
    ),
    "thinking closed twice": (
        lambda p: [*thinking(p), STUDENT + OFF, TEACHER + OFF, "--data.prompts.teacher_response_prefix=<think></think>"],
        [r"error thinking: .*teacher's.*\[data\.prompts\.teacher_response_prefix\]"],
    ),
    "thinking traces behind closed thinking": (
        lambda p: ["--model=SFTModule", *thinking(p), STUDENT + OFF, *data(p, make_rows(solution=lambda n: f"<think>Hm</think>The answer is {n + 1}.", problem=lambda n: f"{n}, 1?"))],
        [r"error data: .*closed.*trace.* \[data\.prompts\.student_chat"],
    ),
    "prompts of mathematics for another task": (
        lambda p: ["--data.grader=NoGrader", "--data.prompts.student_template=null"], [r"warning template: .*data\.val.*\[data\.prompts\.student_template\]"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("defect", DEFECTS)
def test_planted_defects_are_found(defect: str, doctor: Doctor, tmp_path: Path) -> None:
    plant, expected = DEFECTS[defect]
    (tmp_path / "planted").mkdir()
    found = lines(doctor("--no-model", *plant(tmp_path / "planted")))
    assert not [line for line in expected if not any(re.match(line, each) for each in found)], found


def test_healthy_run_matches_no_planted_defect(doctor: Doctor) -> None:
    found = lines(doctor("--no-model"))
    planted = [line for _, expected in DEFECTS.values() for line in expected]
    assert not [line for line in planted if any(re.match(line, each) for each in found)]


def test_the_suggested_cut_loses_less_than_a_hundredth(doctor: Doctor, tmp_path: Path) -> None:
    long = make_rows(
        problem=lambda n: f"{n} and 1?", solution=lambda n: f"{'because ' * 60 * (n % 2)}The answer is {n + 1}."
    )
    arguments = data(tmp_path, long)
    (line,) = lines(doctor("--no-model", *arguments), "warning")
    fitting = re.match(
        r"warning lengths: 6 of 12 training prompts \(50 %\) do not fit .*\[data\.prompts\.max_trace_tokens\] "
        r"set data\.prompts\.max_trace_tokens to about (\d+)",
        line,
    )
    assert fitting, line
    again = doctor("--no-model", *arguments, f"--data.prompts.max_trace_tokens={fitting[1]}")
    assert again["facts"]["data"]["train"]["left_out"] == {}
    assert again["facts"]["data"]["train"]["traces_cut"] == 6 and int(fitting[1]) > 300


def test_the_suggested_length_loses_less_than_a_hundredth(doctor: Doctor) -> None:
    found = doctor("--no-model", "--model.sampling.max_new_tokens=500", "--model.eval_sampling.max_new_tokens=500")
    text = "\n".join(lines(found, "error"))
    number = re.search(
        r"\[model\.sampling\.max_new_tokens\] lower model\.sampling\.max_new_tokens \(and .*?\) to (\d+)", text
    )
    assert number and "no usable row" in text, text
    shorter = [f"--model.{name}.max_new_tokens={number[1]}" for name in ("sampling", "eval_sampling")]
    again = doctor("--no-model", *shorter)
    assert again["healthy"] and again["facts"]["data"]["train"]["kept"] == 8


@pytest.mark.skipif(torch.cuda.is_available(), reason="here is one")
def test_missing_gpu_is_reported(doctor: Doctor) -> None:
    found = doctor("--trainer.accelerator=gpu")
    assert len(lines(found, "error")) == 1 and "[trainer.accelerator]" in lines(found, "error")[0]
    assert "divergence" in found["facts"], "the rest is examined"
    found = doctor("--trainer.accelerator=gpu", "--no-model")  # a laptop
    assert found["healthy"] and "[trainer.accelerator]" in lines(found, "warning")[0]


def test_no_model_option_reads_no_weights(doctor: Doctor, folders: dict[str, str], tmp_path: Path) -> None:
    shutil.copytree(folders["llama"], tmp_path / "bare", ignore=shutil.ignore_patterns("*.safetensors"))
    found = doctor(f"--model.policy.model={tmp_path / 'bare'}", "--no-model")
    assert found["healthy"] and found["facts"]["memory"]["bytes"]["total"] > 0
    assert not {"divergence", "time"} & set(found["facts"])
    assert "model.policy.model" in lines(doctor(f"--model.policy.model={tmp_path / 'bare'}"), "error")[0]


# -- what the model tells --------------------------------------------------------------------------------------------------


def test_context_free_teacher_is_reported(doctor: Doctor, tmp_path: Path) -> None:
    full = tmp_path / "full.yaml"
    full.write_text("model: {policy: {lora: null}, teacher: ModelTeacher}\n")
    for change in ("--data.context=NoContext", f"--config={full}"):
        found = doctor(change)
        (line,) = [each for each in lines(found, "warning") if " divergence: " in each]
        assert "[data.context]" in line
        assert max(each["first_forward_kl"] for each in found["facts"]["divergence"]) < 1e-6


def test_different_first_tokens_are_reported(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    """In the middle of a sentence the teacher expects other tokens than at its start, by 2.6 nats of this model's."""
    monkeypatch.setattr(probe, "HUGE", 2.0)
    prefix = ["--data.prompts.teacher_response_prefix=zzz"]
    found = doctor(*prefix)
    (line,) = lines(found, "warning")
    first = [each["first_forward_kl"] for each in found["facts"]["divergence"]]
    assert (
        line.startswith("warning divergence: ")
        and f"{sum(first) / len(first):.1f} nats" in line
        and "[data.prompts.teacher_template]" in line
    )
    assert not lines(doctor(*prefix, "--model.objective.skip_first_tokens=1"), "warning")


def test_methods_without_a_teacher_have_no_divergence(doctor: Doctor) -> None:
    for method in (["--model=SFTModule"], ["--model=GRPOModule", "--model.sampling.n=2"]):
        found = doctor(*method)
        assert found["healthy"], lines(found)
        assert "divergence" not in found["facts"]
        assert ("rollouts" in found["facts"]["time"]["phases"]) == (method[0] == "--model=GRPOModule")
        assert found["facts"]["time"]["validation_seconds"] > 0


def test_mixed_steps_have_a_divergence(doctor: Doctor) -> None:
    assert doctor("--model=MixedOPSDModule")["facts"]["divergence"]


def test_online_contexts_are_not_examined(doctor: Doctor) -> None:
    found = doctor("--model.context=FeedbackContext")
    assert found["healthy"] and "divergence" not in found["facts"]
    assert [each for each in found["findings"] if each["setting"] == "model.context" and each["level"] == "note"]


@pytest.mark.parametrize(
    "changes",
    [
        ["--model.teacher=EMATeacher"],
        ["--model.policy.lora=null", "--model.optimizer.lr=0.1"],
        ["--model=MixedOPSDModule", "--model.trace_share=0.9", "--model.updates_per_batch=2"],
        ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.1", "--model.lr_scheduler.total_steps=2"],
    ],
    ids=" ".join,
)
def test_trial_steps_change_nothing(changes: list[str], base: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    kept: list[Any] = []
    original = diagnosis.run_trials

    def keep(module: Any, *rest: Any) -> Any:
        weights = {name: p.detach().clone() for name, p in module.model.named_parameters()}
        kept.extend([module, weights, dict(vars(module)), torch.random.get_rng_state()])
        found = original(module, *rest)
        kept.extend([found, torch.random.get_rng_state()])
        return found

    monkeypatch.setattr(diagnosis, "run_trials", keep)
    main([*base, *changes])
    module, weights, attributes, random, (steps, _), random_after = kept
    assert all(torch.equal(weights[name], p) for name, p in module.model.named_parameters())
    assert all(p.grad is None for p in module.model.parameters())
    assert {name: id(value) for name, value in vars(module).items()} == {n: id(v) for n, v in attributes.items()}
    assert torch.equal(random, random_after)
    assert [step.completion for step in steps[:2]] == [trial.SHORT_TOKENS, trial.TRIAL_TOKENS]
    assert all(step.scoring_seconds > 0 and step.rollout_seconds > 0 for step in steps)


def test_a_trial_step_that_runs_out_of_memory_is_a_finding(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*arguments: Any) -> Any:
        raise torch.OutOfMemoryError

    monkeypatch.setattr(diagnosis, "run_trials", fail)
    found = doctor()
    (line,) = lines(found, "error")
    assert line.startswith("error memory: ") and "[model." in line
    assert "time" not in found["facts"]


def test_a_machine_too_small_for_a_step_runs_none(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    estimate = Estimator.parts
    weights = doctor("--no-model")["facts"]["memory"]["bytes"]["base weights"]
    monkeypatch.setattr(diagnosis.DeviceMemory, "of", lambda device: DeviceMemory("cpu", 2 * weights, 2 * weights))
    monkeypatch.setattr(Estimator, "parts", lambda self, step: estimate(self, step) | {"total": 3 * weights})
    found = doctor()
    assert [line for line in lines(found, "error") if " memory: " in line]
    assert "divergence" in found["facts"] and "time" not in found["facts"]


def test_sampling_and_scoring_disagreement_is_reported(make_policy: Callable[..., Policy]) -> None:
    module = OPSDModule(make_policy())
    module.configure_model()
    prompts = [[20, 21, 22], [30, 31]]
    sampled = (
        TransformersEngine().generate(module.model, prompts, Sampling(max_new_tokens=8, temperature=0.0), 0).completions
    )
    total = sum(map(len, sampled))
    assert agreement(module.model, prompts, sampled) == (total, total)
    agreed, _ = agreement(module.model, prompts, [[(token + 1) % 107 for token in row] for row in sampled])
    assert agreed < total / 2


# -- memory ----------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("lora", [LoRA(r=4, alpha=8), None], ids=["lora", "full"])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_weight_memory_equals_the_models(architecture: str, lora: LoRA | None, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(architecture, lora=lora)
    thought, real = skeleton(policy), policy.build()
    assert {p.device.type for p in thought.parameters()} == {"meta"}
    expected = size_of([*(p for n, p in real.named_parameters() if not is_adapter_key(n)), *real.buffers()])
    assert weight_bytes(thought, None) == expected
    trainable = [p for p in real.parameters() if p.requires_grad]
    assert size_of(p for p in thought.parameters() if p.requires_grad) == size_of(trainable)
    for make in (
        torch.optim.AdamW,
        lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
        lambda p: torch.optim.SGD(p, lr=0.1),
    ):
        optimizer = make(trainable)
        for parameter in trainable:
            parameter.grad = torch.ones_like(parameter)
        optimizer.step()
        state = [value for each in optimizer.state.values() for value in each.values() if isinstance(value, torch.Tensor)]
        assert optimizer_bytes(make, [p for p in thought.parameters() if p.requires_grad]) == size_of(state)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_activation_memory_is_near_the_models(architecture: str, make_policy: Callable[..., Policy]) -> None:
    policy = make_policy(architecture, lora=LoRA(r=4, alpha=8, dropout=0.1))
    real = policy.build()
    assert kept_bytes_per_token(skeleton(policy)) == pytest.approx(kept_bytes_per_token(real), rel=0.1)
    cache = DynamicCache(config=base_of(real).config)
    ids = torch.arange(20, 40)[None]
    base_of(real)(input_ids=ids, past_key_values=cache, use_cache=True)
    layers: list[Any] = list(cache.layers)
    held = size_of([tensor for layer in layers for tensor in (layer.keys, layer.values)])
    assert cache_bytes(base_of(real).config, 20, 4) == held


@pytest.mark.parametrize("settings", [{"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}, {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4"}])  # fmt: skip
def test_quantized_weight_memory_equals_the_models(settings: dict[str, Any], folders: dict[str, str]) -> None:
    pytest.importorskip("bitsandbytes")
    policy = Policy(folders["llama"], LoRA(r=4, alpha=8), dtype="float32", quantization=BitsAndBytesConfig(**settings))
    real = policy.build()
    held = size_of([*(p for n, p in real.named_parameters() if not is_adapter_key(n)), *real.buffers()])
    for parameter in real.parameters():
        state: Any = getattr(parameter, "quant_state", None)
        if state is not None:
            held += size_of([state.absmax, *([state.state2.absmax] if state.nested else [])])
    assert weight_bytes(skeleton(policy), policy.quantization) == pytest.approx(held, rel=0.02)


def test_memory_parts_add_up(make_policy: Callable[..., Policy]) -> None:
    objective = DivergenceObjective(logits_memory_mib=2)
    assert logits_bytes(objective, 1000, 10, 4) == 10 * 1000 * (12 * 4 + 2 * 4)
    assert logits_bytes(objective, 100_000, 10_000, 2) == 2 * 2**20
    policy = make_policy()
    model = skeleton(policy)
    step = Step(rows=8, prompt=20, completion=12, rows_at_once=4, token_budget=70)
    assert step.pass_tokens == 64
    gpu, cpu = DeviceMemory("cuda", 2**34, 2**34), DeviceMemory("cpu", 2**34, 2**34)

    def parts(step: Step, policy: Policy = policy, device: DeviceMemory = gpu, **settings: Any) -> dict[str, int]:
        engine = settings.pop("engine", TransformersEngine(merge_adapter=False))
        make = torch.optim.AdamW
        return Estimator(model, policy, objective, make, engine, device, **settings).parts(step)

    found = parts(step)
    total = found.pop("total")
    phases = {name: sum(v for k, v in found.items() if k.startswith(name)) for name in ("rollout", "scoring")}
    kept = sum(v for k, v in found.items() if ":" not in k)
    assert total == kept + max(phases.values()) and found["reserve"] == RESERVE
    on_a_cpu = parts(step, device=cpu)
    assert on_a_cpu["total"] == sum(size for part, size in on_a_cpu.items() if part != "total")
    adapter = size_of(p for p in model.parameters() if p.requires_grad)
    assert found["gradients"] == found["trainable weights"] == adapter
    assert (
        found["rollout: keys and values"] == 4 * 2 * 2 * 2 * 16 * 32 * 4
    )  # rows, keys and values, layers, heads, width, tokens
    assert found["scoring: states of teachers"] == 8 * 12 * 64 * 4
    less = parts(step, make_policy(gradient_checkpointing=True))
    assert less["scoring: activations"] < found["scoring: activations"]
    shared = parts(step, shards=4)
    assert shared["optimizer state"] == found["optimizer state"] // 4
    validated = parts(step._replace(eval_rows=6, eval_completion=100))
    assert validated["validation: keys and values"] == 4 * 2 * 2 * 2 * 16 * 120 * 4, "four rows at one time"
    assert validated["total"] >= kept + validated["validation: keys and values"]
    merged = parts(step, device=cpu, engine=TransformersEngine())
    assert merged["rollout: copies of weights"] == 2 * merged["base weights"], "merged, and packed for a CPU"


def test_memory_of_quantized_rollouts_is_that_of_the_copy(folders: dict[str, str]) -> None:
    """A card with room samples with dequantized weights, a smaller one with the 4-bit weights."""
    quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype="bfloat16")
    policy = Policy(folders["llama"], LoRA(r=4, alpha=8), dtype="bfloat16", quantization=quantization)
    model = skeleton(policy)
    step = Step(rows=2, prompt=20, completion=12, rows_at_once=2, token_budget=70)
    linear = sum(layer.weight.numel() for layer in quantized_layers(model, quantization))
    adapter = sum(p.numel() for p in model.parameters() if p.requires_grad)

    def parts(size: int) -> dict[str, int]:
        device = DeviceMemory("cuda", size, size)
        return Estimator(
            model, policy, DivergenceObjective(), torch.optim.AdamW, TransformersEngine(), device, "bf16-mixed"
        ).parts(step)

    large = parts(2 * RESERVE)
    assert large["rollout: copies of weights"] == 2 * (linear + adapter)
    kept = sum(size for part, size in large.items() if ":" not in part and part != "total")
    small = parts(kept + 2 * (linear + adapter))  # no room for a row beside this copy
    assert small["rollout: copies of weights"] == 2 * adapter
    assert small["rollout: keys and values"] > 0


def test_too_little_memory_is_reported(doctor: Doctor, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(diagnosis.DeviceMemory, "of", lambda device: DeviceMemory("cpu", 2**16, 2**16))
    found = doctor()
    (line,) = lines(found, "error")
    assert re.match(r"error memory: about .* GiB are needed, most of it for .*\[model\.\w+", line), line
    assert "time" not in found["facts"], "a model that does not fit is not loaded"


# -- numbers ---------------------------------------------------------------------------------------------------------------


def test_quantiles_and_bins_are_exact() -> None:
    values = list(range(1, 201))
    assert at_share(values, 0.99) == 198 and sum(v > 198 for v in values) / 200 <= 0.01
    assert at_share([5], 0.99) == 5 and at_share([], 0.5) == 0 and at_share([1, 2], 0.5) == 1
    for given in ([7], [3, 3], values, [1, 10_000]):
        found = histogram(given, limit=100)
        assert sum(count for _, _, count in found["bins"]) == len(given) == found["count"]
        assert found["bins"][0][0] == min(given) and found["bins"][-1][1] > max(given) and len(found["bins"]) <= 12
        assert found["over"] == sum(value > 100 for value in given)
    assert histogram([])["count"] == 0
