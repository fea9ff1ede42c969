"""Tests that values below a class reach it as they were typed."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import yaml

from opsd_lightning.cli.command import OPSDCLI, cli_settings
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.types import ConfigError

pytestmark = pytest.mark.integration


BASE = ["fit", "--model.policy.model", "x", "--data.train", "FileSource", "--data.train.init_args.path", "d.jsonl"]


@pytest.fixture(autouse=True)
def without_arguments(monkeypatch: pytest.MonkeyPatch) -> None:
    """Lightning warns where the process has arguments of its own."""
    monkeypatch.setattr("sys.argv", ["opsd"])


class ParseOnly(OPSDCLI):
    def before_instantiate_classes(self) -> None: ...

    def instantiate_classes(self) -> None: ...

    def _run_subcommand(self, subcommand: str) -> None: ...


def parsed(*arguments: str) -> Any:
    return ParseOnly(PolicyModule, OPSDDataModule, args=[*BASE, *arguments], **cli_settings()).config.fit


def at(config: Any, path: str) -> Any:
    for key in path.split("."):
        config = config[key]
    return config


POLICY = "model.init_args.policy"


# Each command line gives several settings: option, text, path in the configuration, value there.
COMMAND_LINES: dict[str, list[tuple[str, str, str, object]]] = {
    "null": [
        ("model.policy.lora", "null", f"{POLICY}.lora", None),
        ("model.policy.attn_implementation", "null", f"{POLICY}.attn_implementation", None),
        ("model.init_args.policy.adapter", "null", f"{POLICY}.adapter", None),
        ("model.teacher", "null", "model.init_args.teacher", None),
        ("model.objective.init_args.position_weight", "null", "model.init_args.objective.init_args.position_weight", None),
        ("data.train.init_args.columns.trace", "null", "data.train.init_args.columns.trace", None),
        ("data.prompts.max_trace_tokens", "null", "data.prompts.max_trace_tokens", None),
    ],
    "text": [
        ("model.policy.revision", "None", f"{POLICY}.revision", "None"),
        ("model.policy.pad_token", "no", f"{POLICY}.pad_token", "no"),
        ("data.train.init_args.path", "0x10", "data.train.init_args.path", "0x10"),
        ("data.train.init_args.columns.answer", "12:30", "data.train.init_args.columns.answer", "12:30"),
    ],
    "text of digits": [("model.policy.revision", "007", f"{POLICY}.revision", "007")],
    "text of digits with an exponent": [("model.policy.revision", "1234e56", f"{POLICY}.revision", "1234e56")],
    "values": [
        ("model.policy.lora.r", "8", f"{POLICY}.lora.r", 8),
        ("model.policy.lora.dropout", "1e-2", f"{POLICY}.lora.dropout", 0.01),
        ("model.policy.trust_remote_code", "true", f"{POLICY}.trust_remote_code", True),
        ("model.policy.lora.options", "{a: null, b: true}", f"{POLICY}.lora.options", {"a": None, "b": True}),
    ],
}


@pytest.mark.parametrize("name", COMMAND_LINES)
@pytest.mark.parametrize("joined", [True, False])
def test_values_below_a_class_keep_their_text(name: str, joined: bool) -> None:
    options = [(f"--{option}", text) for option, text, _, _ in COMMAND_LINES[name]]
    config = parsed(*(["=".join(pair) for pair in options] if joined else [word for pair in options for word in pair]))
    for option, _, path, value in COMMAND_LINES[name]:
        found = at(config, path)
        assert found == value and isinstance(found, type(value)), option


def test_options_of_the_same_name_keep_their_own_values() -> None:
    found = parsed(
        "--data.train.init_args.path=7", "--data.val=FileSource", "--data.val.init_args.path=007",
        "--model.policy.revision=null", "--data.test=HubSource", "--data.test.init_args.path=x",
        "--data.test.init_args.revision=None",
    )  # fmt: skip
    assert (at(found, "data.train.init_args.path"), at(found, "data.val.init_args.path")) == ("7", "007")
    assert at(found, f"{POLICY}.revision") is None


def test_null_is_none_in_a_list_of_classes() -> None:
    found = parsed("--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitor=null")
    assert found.trainer.callbacks[0].init_args.monitor is None


HEADINGS = ["# You are a tutor.", "#### (\\d+)", "# One\n# Two\n"]


@pytest.mark.parametrize("text", HEADINGS)
def test_text_like_a_yaml_comment_is_kept(text: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(
        yaml.safe_dump({"data": {"prompts": {"system": text}}, "model": {"init_args": {"policy": {"revision": text}}}})
    )
    for found in (
        parsed("--config", str(tmp_path / "c.yaml")),
        parsed("--data.prompts.system", text, "--model.policy.revision", text),
    ):
        assert at(found, "data.prompts.system") == text and at(found, f"{POLICY}.revision") == text


def test_null_for_a_text_is_refused(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed("--data.prompts.teacher_response_prefix", "null")
    assert caught.value.setting == "data.prompts.teacher_response_prefix"
    assert at(parsed("--data.prompts.teacher_response_prefix", ""), "data.prompts.teacher_response_prefix") == ""


@pytest.mark.parametrize("seed", [-1, 2**32])
def test_seed_out_of_range_is_refused(seed: int) -> None:
    with pytest.raises(ConfigError) as caught:
        parsed(f"--seed_everything={seed}")
    assert caught.value.setting == "seed_everything"


@pytest.mark.parametrize(
    ("name", "form"),
    [
        *(("AdamW", form) for form in ("option", "joined", "config", "class_path")),
        ("SGD", "option"),
        ("torch.optim.AdamW", "config"),
    ],
)
def test_short_optimizer_names_mean_torchs(name: str, form: str, tmp_path: Path) -> None:
    given: dict[str, list[str]] = {"option": ["--model.optimizer", name], "joined": [f"--model.optimizer={name}"]}
    for each, value in (("config", name), ("class_path", {"class_path": name, "init_args": {"lr": 0.5}})):
        path = tmp_path / f"{each}.yaml"
        path.write_text(yaml.safe_dump({"model": {"init_args": {"optimizer": value}}}))
        given[each] = ["--config", str(path)]
    found = at(parsed(*given[form], "--model.optimizer.init_args.lr=0.25"), "model.init_args.optimizer")
    assert (found.class_path, found.init_args.lr) == (f"torch.optim.{name.rpartition('.')[2]}", 0.25)


def test_duplicate_yaml_key_is_refused(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text("data:\n  batch_size: 4\n  seed: 1\n  batch_size: 2\n")
    with pytest.raises(SystemExit) as stopped:
        parsed("--config", str(tmp_path / "c.yaml"))
    assert stopped.value.code == 2


@pytest.mark.parametrize("given", ["option", "file"])
def test_another_class_has_its_own_defaults(given: str, tmp_path: Path) -> None:
    """``answer_pattern`` and ``timeout_seconds`` of `MathGrader`, the default, have other defaults in other graders."""
    path = tmp_path / "grader.yaml"
    path.write_text("data:\n  grader: {class_path: ReasoningGymGrader}\n")
    arguments = ["--data.grader=ReasoningGymGrader"] if given == "option" else [f"--config={path}"]
    settings = parsed(*arguments).data.grader.init_args
    assert (settings.answer_pattern, settings.timeout_seconds) == (None, 10.0)


def test_another_class_keeps_settings_that_were_given() -> None:
    arguments = ["--data.grader=MathGrader", "--data.grader.init_args.timeout_seconds=3", "--data.grader=ExactMatch"]
    assert parsed(*arguments).data.grader.init_args.timeout_seconds == 3
