"""Tests of the messages for typos and other mistakes: a few lines that name the setting and the nearest right name."""

from __future__ import annotations

import sys
from importlib import import_module
from pathlib import Path
from typing import Any

import pytest

from helpers.typos import TYPOS
from opsd_lightning.cli import command
from opsd_lightning.cli.commands import find_command
from opsd_lightning.cli.help import MOST_USED
from opsd_lightning.cli.mistakes import _all_settings
from opsd_lightning.utils.near_names import near_names

pytestmark = pytest.mark.integration

_MOST_LINES = 5


class OneParser(command.OPSDCLI):
    """A command line that makes its parsers once for all tests, and runs nothing."""

    made: tuple[Any, ...] = ()

    def setup_parser(self, *args: Any, **kwargs: Any) -> None:
        if not self.made:
            super().setup_parser(*args, **kwargs)
            OneParser.made = (self.parser, self._subcommand_parsers, self._subcommand_method_arguments)
        self.parser, self._subcommand_parsers, self._subcommand_method_arguments = self.made

    def _run_subcommand(self, subcommand: str) -> None:
        raise AssertionError("the command line was accepted")


@pytest.fixture
def one_parser(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(command, "OPSDCLI", OneParser)
    monkeypatch.setattr(sys, "argv", ["opsd"])


def run(arguments: list[str]) -> None:
    found = find_command(arguments)
    module = import_module(found.module)
    module.main(arguments[1:] if found.own_arguments else arguments)


def test_there_are_enough_mistakes() -> None:
    assert len(TYPOS) >= 60


@pytest.mark.parametrize("name", TYPOS)
def test_a_mistake_prints_a_few_lines(
    name: str, one_parser: None, tmp_path: Path, capfd: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments, words, text = TYPOS[name]
    folder = tmp_path / "configs"
    folder.mkdir()
    file = folder / "config.yaml"
    file.write_text(text)
    monkeypatch.chdir(tmp_path)
    capfd.readouterr()
    with pytest.raises(SystemExit) as stopped:
        run([each.replace("{file}", str(file)).replace("{folder}", str(folder)) for each in arguments])
    out, error = capfd.readouterr()
    assert stopped.value.code == 2
    assert out == ""
    assert 1 <= len(error.splitlines()) <= _MOST_LINES, error
    assert max(map(len, error.splitlines())) < 400, error
    assert "Traceback" not in error and "usage:" not in error and "Union" not in error
    assert [word for word in words if word not in error] == [], error


def test_most_used_settings_exist(one_parser: None) -> None:
    with pytest.raises(SystemExit):
        command.main(["fit", "--help"])
    parsers = OneParser.made[1]
    assert set(MOST_USED) == set(parsers)
    for name, parser in parsers.items():
        known = {setting.replace(".init_args", "") for setting in _all_settings(parser)}
        for option, _ in MOST_USED[name]:
            setting = option.split()[-2].lstrip("-") if " " in option else option.lstrip("-")
            if setting.endswith(".help") or setting == "print_config":
                continue
            if setting.endswith(".path"):  # of the sources that read files
                setting = setting.removesuffix(".path")
            # `model.eval_sampling` is null by default, and then the same as `model.sampling`.
            assert setting.replace(".eval_sampling.", ".sampling.") in known, f"{name}: {option}"


@pytest.mark.parametrize(
    ("name", "known", "near"),
    [
        ("EMATeachr", ["FixedTeacher", "EMATeacher"], ["EMATeacher"]),
        ("ema-teacher", ["EMATeacher", "LiveTeacher"], ["EMATeacher"]),
        ("maxsteps", ["min_steps", "max_steps"], ["max_steps"]),
        ("seed", ["data", "seed_everything"], ["seed_everything"]),
        ("zzz", ["data", "model"], []),
        ("zzz", [], []),
    ],
)
def test_near_names(name: str, known: list[str], near: list[str]) -> None:
    assert near_names(name, known) == near
