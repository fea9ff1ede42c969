"""The command line: what it runs, what it prints, and one clear message for each user's mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import yaml

from conftest import make_model, make_tokenizer, write_jsonl
from opsd_lightning import __version__
from opsd_lightning.cli.command import main
from opsd_lightning.models.export import write_adapter
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine

ROOT = Path(__file__).parents[1]


@pytest.fixture
def base(folders: dict[str, str], tmp_path: Path) -> list[str]:
    """Arguments of a tiny run that works."""
    rows = [{"problem": f"{n}+1?", "solution": f"The answer is {n + 1}.", "gold": str(n + 1)} for n in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = {
        "model": {
            "policy": {"model": folders["llama"], "dtype": "float32", "lora": {"r": 4, "alpha": 8.0}},
            "sampling": {"max_new_tokens": 6},
            "eval_sampling": {"max_new_tokens": 6},
        },
        "data": {
            split: {"class_path": "FileSource", "init_args": {"path": str(path), "columns": {"answer": "gold"}}}
            for split in ("train", "val", "test")
        }
        | {"batch_size": 2, "eval_batch_size": 4},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    config["data"]["train"]["init_args"]["split"] = "train[4:]"
    config["data"]["val"]["init_args"]["split"] = config["data"]["test"]["init_args"]["split"] = "train[:4]"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    return [f"--config={tmp_path / 'base.yaml'}"]


def test_every_subcommand(base: list[str], tmp_path: Path) -> None:
    fit = main(["fit", *base])
    assert fit.trainer.global_step == 2
    checkpoint = f"--ckpt_path={fit.trainer.checkpoint_callback.best_model_path}"
    for command in ("validate", "test"):
        cli = main([command, *base, checkpoint, "--model.eval_sampling.n=3", "--model.evaluate_teacher=true"])
        prefix = {"validate": "val"}.get(command, command)
        names = {
            f"{prefix}/{role}{m}@3{se}"
            for role in ("", "teacher_")
            for m in ("avg", "pass", "maj")
            for se in ("", "_se", "_se_samples")
        }
        names |= {f"{prefix}/{role}{m}" for role in ("", "teacher_") for m in ("completion_tokens", "truncated_fraction")}
        assert names <= set(cli.trainer.callback_metrics)
    lines = [json.loads(line) for line in (tmp_path / "test.jsonl").read_text().splitlines()]
    assert len(lines) == 2 * 4 * 3 and {line["role"] for line in lines} == {"student", "teacher"}
    main(["predict", *base, checkpoint, "--model.eval_sampling.n=2"])
    lines = [json.loads(line) for line in (tmp_path / "predict.jsonl").read_text().splitlines()]
    assert len(lines) == 8
    assert set(lines[0]) == {
        "role", "index", "sample", "vote", "question", "reference", "completion", "answer", "correct", "completion_tokens", "truncated",
    }  # fmt: skip


def test_printed_config_runs(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *base, "--model.teacher=EMATeacher", "--print_config"])
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    cli = main(["fit", f"--config={printed}"])
    assert cli.trainer.global_step == 2 and type(cli.model.teacher).__name__ == "EMATeacher"


def test_a_bare_printed_config_runs(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Its model is on the hub, which tests cannot reach, and its lengths are for a GPU; all else is as printed."""
    with pytest.raises(SystemExit):
        main(["fit", "--print_config"])
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    assert "HuggingFaceTB/SmolLM2-135M-Instruct" in printed.read_text()
    short = [
        "--data.prompts.teacher_template={question} {context}",
        f"--model.policy.model={folders['llama']}",
        "--model.sampling.max_new_tokens=4",
        "--trainer.max_steps=1",
    ]
    cli = main(["fit", f"--config={printed}", *short, "--data.batch_size=2", f"--trainer.default_root_dir={tmp_path}"])
    assert cli.trainer.global_step == 1


def test_layers_of_config_and_the_last_word_of_the_command_line(base: list[str], tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("model: {objective: {init_args: {divergence: ReverseKL, temperature: 1.3}}, max_grad_norm: 2.0}\n")
    cli = main(["fit", *base, f"--config={layer}", "--model.max_grad_norm=0.5", "--model.objective.logits_memory_mib=7"])
    objective = cli.model.objective
    assert type(objective.divergence).__name__ == "ReverseKL" and objective.temperature == 1.3
    assert objective.logits_memory_mib == 7 and cli.model.max_grad_norm == 0.5


def test_a_part_of_ones_own(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One class and one line: no registration."""
    (tmp_path / "own_parts.py").write_text(
        "from opsd_lightning import Divergence\n"
        "class SquaredDistance(Divergence):\n"
        "    '''Squared distance of probabilities.'''\n"
        "    def entries(self, student_logprobs, teacher_logprobs):\n"
        "        return (student_logprobs.exp() - teacher_logprobs.exp()) ** 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cli = main(["fit", *base, "--model.objective.init_args.divergence=own_parts.SquaredDistance"])
    assert type(cli.model.objective.divergence).__name__ == "SquaredDistance" and cli.trainer.global_step == 2


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*args: str) -> str:
        with pytest.raises(SystemExit):
            main(list(args))
        return " ".join(capsys.readouterr().out.split())

    text, method = shown("fit", "--help"), shown("fit", "--model.help=OPSDModule")
    ours = method + text[text.index("Reads questions with verified traces") :]
    for phrase in (
        "Longest completion in tokens",
        "from 0 to 1",
        "OpenThoughts" and "verified",
    ):
        assert phrase in ours
    assert "Weight of the past in each update, from 0 to 1" in shown("fit", "--model.teacher.help=EMATeacher")
    assert "Upper bound of one token's divergence, in nats" in shown("fit", "--model.objective.clip.help=TokenClip")
    found = re.findall(r"--((?:model|data)\.[\w.]+) (?:\{[^}]*\}|[A-Z_]+) ((?:(?! --).)*?)\((?:required, )?type:", ours)
    names = {name for name, _ in found}
    assert {"model.policy.dtype", "model.sampling.top_p", "model.token_budget", "data.prompts.system"} <= names
    assert not [name for name, text in found if len(text.split()) < 3]


def test_version_and_both_doors() -> None:
    for command in (
        [sys.executable, "cli.py", "--version"],
        [sys.executable, "-c", "from opsd_lightning.__main__ import entry; entry()", "--version"],
    ):
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True).stdout
        assert __version__ in out


# -- mistakes ------------------------------------------------------------------------------------------------------------


def folder(tmp_path: Path, **changes: object) -> str:
    """A model folder whose tokenizer lacks something."""
    path = tmp_path / "broken"
    make_model("llama").save_pretrained(path)
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(path)
    return str(path)


def foreign_adapter(tmp_path: Path, folders: dict[str, str]) -> str:
    return str(write_adapter(Policy(folders["gpt2"], lora=LoRA(r=2, alpha=2)).build(), tmp_path / "foreign"))


def overlay(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "overlay.yaml"
    path.write_text(text)
    return path


def rows(tmp_path: Path, *extra: dict[str, str]) -> str:
    good = [{"problem": f"{n}?", "solution": f"The answer is {n}.", "gold": str(n)} for n in range(4)]
    return str(write_jsonl(tmp_path / "bad.jsonl", [*good, *extra]))


def row(problem: str = "q", solution: str = "The answer is 5.", gold: str = "5") -> dict[str, str]:
    return {"problem": problem, "solution": solution, "gold": gold}


def strict(path: str) -> list[str]:
    return [f"--data.train.path={path}", "--data.train.split=train", "--data.on_invalid=error"]


Mistake = tuple[Callable[[Path, dict[str, str]], list[str]], str]
MISTAKES: dict[str, Mistake] = {
    "missing column": (lambda p, f: ["--data.train.columns.trace=proof"], r"no column 'proof' \(columns.trace\); it has problem"),
    "empty trace": (lambda p, f: strict(rows(p, row(solution=""))), r"data\.train: row 4: empty trace"),
    "contradicting trace": (lambda p, f: strict(rows(p, row(gold="6"))), "row 4: trace contradicts the reference answer"),
    "trace without answer": (lambda p, f: strict(rows(p, row(solution="Hm."))), "row 4: trace has no final answer"),
    "prompt too long": (lambda p, f: strict(rows(p, row("q" * 600))), "do not fit the model's context of 512 tokens"),
    "completion too long": (lambda p, f: ["--model.sampling.max_new_tokens=600"], "no usable row of 4 .*do not fit"),
    "shards for one device": (lambda p, f: [f"--ckpt_path={p}"], "folder of shards, which only trainer.strategy fsdp2 reads"),
    "missing data file": (lambda p, f: ["--data.train.path=nowhere.jsonl"], "path: nowhere.jsonl does not exist"),
    "unknown file type": (lambda p, f: ["--data.train.path=rows.txt"], "does not end in one of .jsonl"),
    "unreadable data": (lambda p, f: [f"--data.train.path={(p / 'x.json').write_text('{') and p / 'x.json'}"], "x.json, line 1: no JSON"),
    "no training data": (lambda p, f: ["--data.train=null"], r"data\.train: .* not set"),
    "batch over the data": (lambda p, f: ["--data.batch_size=9"], r"data\.batch_size: .* 9 questions"),
    "context without its column": (
        lambda p, f: ["--data.context=ColumnContext", "--data.context.column=tip"], r"data\.context\.column: .* 'tip'",
    ),
    "template without placeholder": (lambda p, f: ["--data.prompts.student_template=hi"], r"data\.prompts\.student_template: "),
    "fsdp of the first kind": (lambda p, f: ["--trainer.strategy=fsdp"], "Use fsdp2"),
    "deepspeed": (lambda p, f: ["--trainer.strategy=deepspeed_stage_3"], "Use fsdp2"),
    "sharding left to the module": (lambda p, f: ["--trainer.strategy=ModelParallelStrategy"], "use fsdp2"),
    "neither trace nor answer": (
        lambda p, f: ['--data.val.columns={"trace": null, "answer": null}'], "no usable row of 4 .*neither trace nor answer",
    ),
    "no trace to train on": (lambda p, f: ['--data.train.columns={"trace": null, "answer": "gold"}'], "no usable row of 4 .*empty trace"),
    "no trace for a graded teacher": (
        lambda p, f: ['--data.val.columns={"trace": null, "answer": "gold"}', "--model.evaluate_teacher=true"],
        r"model\.evaluate_teacher: 4 of 4 questions of data\.val ",
    ),
    "broken answer pattern": (lambda p, f: ["--data.grader.answer_pattern=("], "is not a regular expression"),
    "unknown class": (lambda p, f: ["--model.teacher=NoSuchTeacher"], "NoSuchTeacher"),
    "unknown setting": (lambda p, f: ["--model.nonsense=1"], "nonsense"),
    "missing config": (lambda p, f: ["--config=nowhere.yaml"], "nowhere.yaml"),
    "missing model folder": (lambda p, f: ["--model.policy.model=./nowhere"], r"model\.policy\.model: ./nowhere does not exist"),
    "model not on the hub": (lambda p, f: ["--model.policy.model=nobody/nothing"], "cannot load 'nobody/nothing'"),
    "adapter of another model": (
        lambda p, f: [f"--model.policy.adapter={foreign_adapter(p, f)}", "--model.policy.lora.r=2", "--model.policy.lora.alpha=2"],
        "was made for another model",
    ),
    "adapter and other settings": (
        lambda p, f: [f"--model.policy.adapter={foreign_adapter(p, f)}"], r"brings r = 2 and alpha = 2; model\.policy\.lora says 4",
    ),
    "monitor of another k": (
        lambda p, f: ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/avg@4"],
        r"model\.eval_sampling\.n: ModelCheckpoint monitors val/avg@4, and validation samples 1 .*\. Set it to 4, or",
    ),
    "monitor of a teacher that is not graded": (
        lambda p, f: ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/teacher_avg@1"],
        r"model\.evaluate_teacher: .*the teacher is not graded\. Set it to true",
    ),
    "missing adapter": (lambda p, f: ["--model.policy.adapter=./nowhere"], "is not a LoRA adapter's folder or id"),
    "no chat template": (lambda p, f: [f"--model.policy.model={folder(p, chat_template=None)}"], "has no chat template"),
    "no pad token": (lambda p, f: [f"--model.policy.model={folder(p, pad_token=None)}"], r"set model\.policy\.pad_token"),
    "LoRA targets": (lambda p, f: ["--model.policy.lora.target_modules=[nope]"], r"model\.policy\.lora does not fit"),
    "EMA without an adapter": (
        lambda p, f: [f"--config={overlay(p, 'model: {policy: {lora: null}, teacher: EMATeacher}')}"],
        r"model\.teacher: .* model\.policy\.lora is null .*FixedTeacher",
    ),
    "rank zero": (lambda p, f: ["--model.policy.lora.r=0"], r"policy\.lora\.r"),
    "EMA decay": (lambda p, f: ["--model.teacher=EMATeacher", "--model.teacher.decay=1.5"], "decay"),
    "beta": (
        lambda p, f: ["--model.objective.divergence=GeneralizedJSD", "--model.objective.divergence.beta=-1"], "beta",
    ),
    "top-k over the vocabulary": (
        lambda p, f: ["--model.objective.support=TopKWithTail", "--model.objective.support.k=999"],
        r"model\.objective\.support\.k is 999, but the model's vocabulary has 107",
    ),
    "negative temperature": (lambda p, f: ["--model.sampling.temperature=-1"], "temperature"),
    "accumulate_grad_batches": (
        lambda p, f: ["--trainer.accumulate_grad_batches=4"], r"accumulate_grad_batches is 4.*set data\.batch_size",
    ),
    "gradient_clip_val": (lambda p, f: ["--trainer.gradient_clip_val=1"], r"set model\.max_grad_norm instead"),
    "missing checkpoint": (lambda p, f: ["--ckpt_path=nowhere.ckpt"], "ckpt_path: nowhere.ckpt does not exist"),
    "quantized GGUF": (
        lambda p, f: [
            f"--model.policy.model={(p / 'm.gguf').write_bytes(b'') or p}/m.gguf",
            "--model.policy.quantization=transformers.BitsAndBytesConfig",
        ],
        "quantization does not go with a .gguf",
    ),
    "schedule too short": (
        lambda p, f: ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.1", "--model.lr_scheduler.total_steps=1"],
        r"ends after total_steps = 1, before trainer\.max_steps = 2",
    ),
    "schedule by a metric": (lambda p, f: ["--model.lr_scheduler=ReduceLROnPlateau"], "ReduceLROnPlateau"),
    "a step budget in the data": (lambda p, f: ["--trainer.max_steps=two"], "max_steps"),
}  # fmt: skip


@pytest.mark.parametrize(
    ("arguments", "sentence"),
    [
        (["--model=GRPOModule"], "model.sampling.n is 1, and GRPO compares"),
        (
            ["--model.context=MajorityContext"],
            "model.sampling.n: it is 1, and MajorityContext",
        ),
        (["--model.context=ReasonFirst", "--model.context.template=hi"], "model.context.init_args.template: "),
        (["--data.train=WordProblems", "--data.train.size=1", "--data.train.largest=4"], "WordProblems.largest: it is 4"),
    ],
)
def test_a_parts_own_sentence_stands_alone(
    arguments: list[str], sentence: str, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *base, *arguments])
    error = capsys.readouterr().err
    (line,) = error[error.index("error:") :].splitlines()
    assert line.startswith(f"error: {sentence}") and len(line) < 300, line


@pytest.mark.parametrize("mistake", MISTAKES)
def test_one_clear_message(
    mistake: str,
    base: list[str],
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    make, message = MISTAKES[mistake]
    arguments = make(tmp_path, folders)
    before = sorted(tmp_path.rglob("*.ckpt")) + sorted(tmp_path.rglob("adapter_model*"))
    capsys.readouterr()

    def begun(*args: object, **kwargs: object) -> None:
        raise AssertionError("a rollout was sampled: training had begun")

    monkeypatch.setattr(TransformersEngine, "generate", begun)
    with pytest.raises(SystemExit) as stop:
        main(["fit", *base, *arguments])
    assert stop.value.code not in (0, None)
    error = capsys.readouterr().err
    last = " ".join(error[error.rindex("error:") :].split())
    assert re.search(message, last), last
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*.ckpt")) + sorted(tmp_path.rglob("adapter_model*")) == before, "training had begun"


def test_checkpoint_of_other_settings(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit = main(["fit", *base])
    checkpoint = f"--ckpt_path={fit.trainer.checkpoint_callback.best_model_path}"
    for change in (["--model.policy.lora.r=8"], ["--model.teacher=EMATeacher"]):
        with pytest.raises(SystemExit):
            main(["test", *base, checkpoint, *change])
        assert "the checkpoint does not fit this configuration" in capsys.readouterr().err


def test_without_a_subcommand(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "subcommand" in capsys.readouterr().err


def test_the_seed_is_one_setting(base: list[str]) -> None:
    cli = main(["fit", *base, "--seed_everything=7"])
    assert cli.model.seed == 7 and cli.datamodule.seed == 7
