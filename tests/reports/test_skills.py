"""Tests of the panel of kept skills in the run report."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint

from helpers.messages import mentions
from helpers.skills import skill_sets
from helpers.training import Recorder, parts, trainer
from opsd_lightning.callbacks.kept_skills import KeptSkills
from opsd_lightning.models.policy import Policy
from opsd_lightning.reports.page import write_report
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.skills import HEIGHT, WIDTH, skill_rows
from opsd_lightning.runs.reader import Run, read_run
from opsd_lightning.types import UserError

pytestmark = pytest.mark.integration

MakePolicy = Callable[..., Policy]


def fit(policy: Policy, folder: Path, *callbacks: Any, checkpoint: Path | None = None) -> KeptSkills:
    torch.manual_seed(0)
    skills = KeptSkills(skill_sets(4))
    settings = {"max_steps": 4, "val_check_interval": 2, "check_val_every_n_epoch": None}
    saves = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    run = trainer(folder, *callbacks, skills, RunReport(), enable_checkpointing=saves, **settings)
    run.fit(*parts(policy), ckpt_path=checkpoint, weights_only=True)
    return skills


def entry(step: int, value: float, change: float | None, half: float = 0.02, **more: Any) -> dict[str, Any]:
    base = None if change is None else value - change
    found = {
        "step": step,
        "set": "facts",
        "graded": True,
        "items": 9,
        "value": value,
        "interval": [value - 0.1, value + 0.1],
    }
    return found | {"base": base, "change": None if change is None else [change, half]} | more


def test_the_report_shows_every_set(make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = fit(make_policy(), tmp_path)
    run = read_run(tmp_path)
    assert [(each["set"], each["step"]) for each in run.skills] == [
        (name, step) for step in (0, 2, 4) for name in ("facts", "digits", "drift")
    ]
    page = (tmp_path / "report.html").read_text()
    for name, result in skills.of_run.items():
        shown = f"{100 * result.value:.1f} %" if skills.sets[name].graded else f"{result.value:.4f}"
        (row,) = [part for part in page.split("<tr>") if f'class="name">{name}' in part]
        assert shown in row and row.count("<circle") == 3
    assert "skills/" not in json.dumps([each["values"] for each in json.loads(_data(page))["charts"] if "values" in each])


def _data(page: str) -> str:
    return page.partition('<script type="application/json" id="data">')[2].partition("</script>")[0]


def test_a_resumed_run_has_the_history_of_a_whole_one(make_policy: MakePolicy, tmp_path: Path) -> None:
    fit(make_policy(), tmp_path / "whole")
    folder = tmp_path / "resumed"
    keep = ModelCheckpoint(folder / "saved", filename="run", every_n_train_steps=2)
    with pytest.raises(RuntimeError, match="crash"):
        fit(make_policy(), folder, keep, Recorder(crash_before=3))
    fit(make_policy(), folder, checkpoint=folder / "saved" / "run.ckpt")
    assert read_run(folder).skills == read_run(tmp_path / "whole").skills


def test_runs_without_skills_have_no_panel(make_policy: MakePolicy, tmp_path: Path) -> None:
    settings = {"max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer(tmp_path, RunReport(), **settings).fit(*parts(make_policy()))
    assert 'class="skills"' not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize(("change", "verdict"), [(0.1, "good"), (-0.1, "bad"), (0.01, ""), (-0.01, ""), (None, "")])
def test_a_change_counts_if_its_interval_excludes_zero(change: float | None, verdict: str) -> None:
    (row,) = skill_rows(Run(Path(), "", skills=[entry(3, 0.5, change)]))
    assert row["verdict"] == verdict


@pytest.mark.parametrize(
    "values",
    [[0.5], [0.0, 1.0, 0.5], [0.2, 0.2, 0.2], [float("nan"), 0.4]],
)
@pytest.mark.parametrize("graded", [True, False])
def test_curves_stay_inside_their_drawing(values: list[float], graded: bool) -> None:
    history = [entry(step, value, 0.0 if graded else None, graded=graded) for step, value in enumerate(values)]
    (row,) = skill_rows(Run(Path(), "", skills=history))
    points = row["curve"]["points"]
    assert len(points) == sum(value == value for value in values)
    for point in points:
        assert 0 <= point["x"] <= WIDTH
        assert 0 <= point["high"] <= point["y"] <= point["low"] <= HEIGHT
    finite = sorted((value, point["y"]) for value, point in zip([v for v in values if v == v], points, strict=True))
    assert [y for _, y in finite] == sorted((y for _, y in finite), reverse=True)


@pytest.mark.parametrize("graded", [True, False])
@pytest.mark.parametrize("values", [[0.4, float("nan")], [float("nan")], [float("inf"), float("nan")]])
def test_a_value_that_is_not_finite_is_the_last_one(
    values: list[float], graded: bool, make_policy: MakePolicy, tmp_path: Path
) -> None:
    history = [entry(step, value, 0.0 if graded else None, graded=graded) for step, value in enumerate(values, 3)]
    (row,) = skill_rows(Run(Path(), "", skills=history))
    assert (row["step"], row["value"], row["change"]) == (2 + len(values), None, None)
    settings = {"max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer(tmp_path, RunReport(), **settings).fit(*parts(make_policy()))
    (tmp_path / "record" / "skills.json").write_text(json.dumps(history))
    page = write_report([tmp_path], tmp_path / "other.html").read_text()
    (shown,) = [part for part in page.split("<tr>") if 'class="name">facts' in part]
    assert "finite" in shown and "nan" not in shown and "40.0" not in shown.partition("<svg")[0].partition("trained")[2]


@pytest.mark.parametrize(
    "content",
    [
        "{",
        "{}",
        "[1]",
        json.dumps([entry(0, 0.5, 0.0) | {"interval": [1]}]),
        json.dumps([entry(0, 0.5, 0.0) | {"value": "<b>"}]),
    ],
)
def test_a_damaged_file_is_an_error(content: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    settings = {"max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer(tmp_path, RunReport(), **settings).fit(*parts(make_policy()))
    (tmp_path / "record" / "skills.json").write_text(content)
    with pytest.raises(UserError, match=mentions("skills.json")):
        write_report([tmp_path], tmp_path / "other.html")


def test_names_are_escaped(tmp_path: Path, make_policy: MakePolicy) -> None:
    settings = {"max_steps": 1, "limit_val_batches": 0, "enable_checkpointing": False}
    trainer(tmp_path, RunReport(), **settings).fit(*parts(make_policy()))
    (tmp_path / "record" / "skills.json").write_text(json.dumps([entry(0, 0.5, 0.0, set='<img src="x">')]))
    page = write_report([tmp_path], tmp_path / "other.html").read_text()
    assert "<img" not in page
