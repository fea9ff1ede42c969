"""Tests of printed metrics: each number once, with its interval or its standard error."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

from opsd_lightning.callbacks.progress import print_metrics
from opsd_lightning.cli.command import main
from opsd_lightning.utils.statistics import wilson_interval


def rows(printed: str) -> dict[str, list[str]]:
    """Return the cells of a printed table by the name in the first one."""
    lines = [re.split("[│┃]", line)[1:-1] for line in printed.splitlines()]
    return {row[0].strip(): [cell.strip() for cell in row[1:]] for row in lines if row}


def test_one_right_or_wrong_completion_has_its_interval(capsys: pytest.CaptureFixture[str]) -> None:
    values = {f"{role}{name}@1": 0.75 for role in ("", "teacher_") for name in ("avg", "pass", "maj")}
    values |= {f"{name}_se": 0.125 for name in values} | {"completion_tokens": 21.5}
    print_metrics(values, dict.fromkeys(values, (0.5, 0.9)))
    table = rows(capsys.readouterr().out)
    assert table["avg@1"] == table["teacher avg@1"] == ["75.0%", "50.0% to 90.0%"]
    assert table["completion tokens"][0] == "21.5"
    assert not any("maj" in name or "pass" in name for name in table)


def test_partial_scores_have_their_error(capsys: pytest.CaptureFixture[str]) -> None:
    """Only the share of right completions is one of right or wrong outcomes."""
    values = {"avg@1": 0.6, "avg@1_se": 0.05, "pass@1": 0.5, "pass@1_se": 0.1, "maj@1": 0.5, "maj@1_se": 0.1}
    print_metrics(values, {"pass@1": (0.3, 0.7), "maj@1": (0.3, 0.7)})
    table = rows(capsys.readouterr().out)
    assert table["avg@1"] == ["60.0%", "", "5.0%"] and table["pass@1"] == ["50.0%", "30.0% to 70.0%", ""]
    assert "maj@1" not in table


def test_several_completions_have_both_errors(capsys: pytest.CaptureFixture[str]) -> None:
    values = {"avg@2": 0.6, "avg@2_se": 0.05, "avg@2_se_samples": 0.02, "pass@1": 0.6, "pass@1_se": 0.04}
    print_metrics(values)
    table = rows(capsys.readouterr().out)
    assert table["avg@2"] == ["60.0%", "5.0%", "2.0%"] and table["pass@1"] == ["60.0%", "4.0%", ""]


@pytest.mark.integration
@pytest.mark.parametrize("command", ["test", "validate"])
def test_a_command_prints_its_numbers_once(
    command: str, base: list[str], tmp_path: Path, capfd: pytest.CaptureFixture[str]
) -> None:
    cli = main([command, *base, "--trainer.enable_progress_bar=true", "--trainer.callbacks+=ProgressLines"])
    printed = "".join(capfd.readouterr())
    stage = {"test": "test", "validate": "val"}[command]
    metrics = cli.trainer.callback_metrics
    assert printed.count("avg@1") == printed.count("completion tokens") == 1, printed
    assert f"{stage}/" not in printed and "maj@1" not in printed
    low, high = wilson_interval(float(metrics[f"{stage}/avg@1"]), 4)
    assert f"{low:.1%} to {high:.1%}" in printed
