"""Tests of the command line: what runs, what is printed, and one message for each mistake."""

from __future__ import annotations

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.commands import MISTAKES
from helpers.paths import ROOT
from opsd_lightning import __version__
from opsd_lightning.cli.command import main
from opsd_lightning.rollouts.transformers_engine import TransformersEngine

pytestmark = pytest.mark.integration


def test_every_subcommand_runs(base: list[str], tmp_path: Path) -> None:
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
        "role", "index", "sample", "vote", "question", "reference", "completion", "answer", "correct", "score", "completion_tokens", "truncated",
    }  # fmt: skip


def test_printed_config_runs(base: list[str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as stop:
        main(["fit", *base, "--model.teacher=EMATeacher", "--print_config"])
    assert stop.value.code == 0
    printed = tmp_path / "printed.yaml"
    printed.write_text(capsys.readouterr().out)
    cli = main(["fit", f"--config={printed}"])
    assert cli.trainer.global_step == 2 and type(cli.model.teacher).__name__ == "EMATeacher"


def test_default_printed_config_runs(folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
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


def test_command_line_overrides_configs_in_order(base: list[str], tmp_path: Path) -> None:
    layer = tmp_path / "layer.yaml"
    layer.write_text("model: {objective: {init_args: {divergence: ReverseKL, temperature: 1.3}}, max_grad_norm: 2.0}\n")
    cli = main(["fit", *base, f"--config={layer}", "--model.max_grad_norm=0.5", "--model.objective.logits_memory_mib=7"])
    objective = cli.model.objective
    assert type(objective.divergence).__name__ == "ReverseKL" and objective.temperature == 1.3
    assert objective.logits_memory_mib == 7 and cli.model.max_grad_norm == 0.5


def test_user_defined_part_is_named_in_yaml(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """One class and one line: no registration."""
    (tmp_path / "own_divergence.py").write_text(
        "from opsd_lightning import Divergence\n"
        "class SquaredDistance(Divergence):\n"
        "    '''Squared distance of probabilities.'''\n"
        "    def entries(self, student_logprobs, teacher_logprobs):\n"
        "        return (student_logprobs.exp() - teacher_logprobs.exp()) ** 2\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    cli = main(["fit", *base, "--model.objective.init_args.divergence=own_divergence.SquaredDistance"])
    assert type(cli.model.objective.divergence).__name__ == "SquaredDistance" and cli.trainer.global_step == 2


def test_help_explains_every_setting(capsys: pytest.CaptureFixture[str]) -> None:
    def shown(*args: str) -> str:
        with pytest.raises(SystemExit):
            main(list(args))
        return " ".join(capsys.readouterr().out.split())

    ours = shown("fit", "--help") + shown("fit", "--model.help=OPSDModule")
    setting = r"--((?:model|data)\.[\w.]+) (?:\{[^}]*\}|[A-Z_]+) ((?:(?! --).)*?)\((?:required, )?type:"
    found = re.findall(setting, ours)
    names = {name for name, _ in found}
    assert {"model.policy.dtype", "model.sampling.top_p", "model.token_budget", "data.prompts.system"} <= names
    assert not [name for name, text in found if len(text.split()) < 3]
    for part, name in (("teacher.help=EMATeacher", "decay"), ("objective.clip.help=TokenClip", "tau")):
        (text,) = re.findall(rf"--[\w.]*\b{name} [A-Z_]+ (.*?)\((?:required, )?type:", shown("fit", f"--model.{part}"))
        assert len(text.split()) >= 3


def test_both_entry_points_print_the_version() -> None:
    for command in (
        [sys.executable, "cli.py", "--version"],
        [sys.executable, "-c", "from opsd_lightning.__main__ import entry; entry()", "--version"],
    ):
        out = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=240, check=True).stdout
        assert __version__ in out


# -- mistakes ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("arguments", "setting"),
    [
        (["--model=GRPOModule"], "model.sampling.n"),
        (["--model.context=MajorityContext"], "model.sampling.n"),
        (["--model.context=ReasonFirst", "--model.context.template=hi"], "model.context.init_args.template"),
        (["--data.train=WordProblems", "--data.train.size=1", "--data.train.largest=4"], "largest"),
        (["--model.anchor.weight=0.1", "--model.anchor.teacher=EMATeacher"], "model.anchor.teacher: "),
    ],
)
def test_errors_of_parts_are_one_short_line(
    arguments: list[str], setting: str, base: list[str], capsys: pytest.CaptureFixture[str]
) -> None:
    capsys.readouterr()
    with pytest.raises(SystemExit):
        main(["fit", *base, *arguments])
    error = capsys.readouterr().err
    (line,) = error[error.index("error:") :].splitlines()
    assert setting in line and len(line) < 300, line


@pytest.mark.parametrize(
    "mistake", [pytest.param(name, marks=[pytest.mark.slow] * each.repeats) for name, each in MISTAKES.items()]
)
def test_mistakes_are_refused_before_training_with_one_message(
    mistake: str,
    base: list[str],
    folders: dict[str, str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    arguments = MISTAKES[mistake].arguments(tmp_path, folders)
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
    assert [word for word in MISTAKES[mistake].words if word not in last] == [], last
    assert "Traceback" not in error
    assert sorted(tmp_path.rglob("*.ckpt")) + sorted(tmp_path.rglob("adapter_model*")) == before, "training had begun"


def test_checkpoint_of_other_settings_is_refused(base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    fit = main(["fit", *base])
    checkpoint = f"--ckpt_path={fit.trainer.checkpoint_callback.best_model_path}"
    for change in (["--model.policy.lora.r=8"], ["--model.teacher=EMATeacher"]):
        with pytest.raises(SystemExit):
            main(["test", *base, checkpoint, *change])
        assert "the checkpoint does not fit this configuration" in capsys.readouterr().err


def test_missing_subcommand_is_an_error(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit):
        main([])
    assert "subcommand" in capsys.readouterr().err


def test_one_seed_setting_reaches_model_and_data(base: list[str]) -> None:
    cli = main(["fit", *base, "--seed_everything=7"])
    assert cli.model.seed == 7 and cli.datamodule.seed == 7
