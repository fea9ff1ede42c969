"""Tests of benchmarks/real_model: every part runs once, finished parts are not repeated, and tables hold known values."""

from __future__ import annotations

import json
import re
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any

import pytest

from benchmarks.learning.run import write
from benchmarks.real_model import runs, settings
from benchmarks.real_model.__main__ import main
from benchmarks.real_model.report import KEPT, TRAINED, Report
from helpers.paths import ROOT
from opsd_lightning.utils.statistics import paired_change


@pytest.mark.slow
def test_every_part_runs_once(
    folders: dict[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setattr(settings, "RATES", (1e-3, 2e-3))
    results = tmp_path / "results"
    asked = ["--model", folders["llama"], "--output", str(tmp_path / "runs"), "--results", str(results), "--small"]
    asked += ["--arms", "opsd-own", "sft-own", "sft-terse", "grpo", "--seeds", "1"]
    main(asked)
    printed = capsys.readouterr().out
    found = {path.stem: json.loads(path.read_text()) for path in results.glob("*.json")}
    for arm in ("opsd-own", "sft-own", "sft-terse", "grpo"):
        trained = [run for name, run in found.items() if re.fullmatch(rf"{arm}-lr[\d.e-]+-seed0", name)]
        assert len(trained) == 3  # the best of two rates is at an end
        assert all(run["optimizer_steps"] == 2 for run in trained)
        assert all((run["tokens_generated"] > 0) == (not arm.startswith("sft")) for run in trained)
        chosen = max(trained, key=lambda run: (run["validation"], -run["learning_rate"]))["run"]
        measured = found[f"{chosen}-measured"]
        assert {len(measured[name]) for name in ("facts", "stories", "formats")} == {8}
        assert len(measured["target"]["strict"]) == len(measured["transfer"]["last_number"]) == 6
        assert (measured["base_divergence"] > 0) == (arm != "grpo")  # no completion of the tiny model has a reward
        assert re.search(rf"^\| {arm} +\|", printed, re.MULTILINE)
        assert any(name.startswith(f"second-{arm}-") for name in found) == (arm in settings.SEQUENCE_ARMS)
    assert found["base-measured"]["base_divergence"] == pytest.approx(0, abs=1e-6)
    style = "--data.train.init_args.style=terse"
    assert (
        style in found["sft-terse-lr0.001-seed0"]["arguments"] and style not in found["sft-own-lr0.001-seed0"]["arguments"]
    )
    # A measurement that is missing is made again, also where the trained weights are gone.
    lost = next(name for name in found if name.startswith("sft-terse-") and name.endswith("-measured"))
    (results / f"{lost}.json").unlink()
    shutil.rmtree(tmp_path / "runs" / lost.removesuffix("-measured"))
    main(asked)
    again = json.loads((results / f"{lost}.json").read_text())
    assert {key: again[key] for key in ("target", "facts")} == {key: found[lost][key] for key in ("target", "facts")}
    monkeypatch.setattr("opsd_lightning.quickstart.run", lambda args: pytest.fail(f"ran {args}"))
    main(asked)
    main(["--results", str(results), "--report"])


def finished(validation: float) -> dict[str, Any]:
    return {"validation": validation, "scale": asdict(settings.SMALL), "made_with": {"model_sha256": "no-model"}}


def test_the_rate_that_validates_best_is_chosen(tmp_path: Path) -> None:
    comparison = runs.Comparison("no-model", tmp_path, tmp_path, settings.SMALL)
    arm = settings.ARMS["grpo"]
    for rate, validation in zip(settings.RATES, (0.5, 0.75, 0.75), strict=True):
        write(tmp_path / f"grpo-lr{rate:g}-seed0.json", finished(validation))
    assert comparison.chosen_rate(arm) == settings.RATES[1]  # the lower one of two equal ones


@pytest.mark.parametrize(
    ("validation", "tried", "chosen"),
    [((1, 3, 2), 0, 1), ((3, 3, 2), -1, 0), ((1, 2, 3), +1, 2), ((1, 2, 2), 0, 1)],
    ids=["middle", "tie at the lower end", "upper end", "tie in the middle"],
)
def test_a_rate_beyond_the_end_is_tried_where_the_best_is_at_it(
    validation: tuple[int, ...], tried: int, chosen: int
) -> None:
    beyond = {-1: settings.RATES[0] / 2, +1: settings.RATES[-1] * 2}.get(tried)
    known = dict(zip(settings.RATES, validation, strict=True))
    for value, expected in ((0, settings.RATES[chosen]), (4, beyond or settings.RATES[chosen])):
        values = known | ({beyond: value} if beyond else {})
        asked = []
        assert settings.choose_rate(lambda rate, all=values: asked.append(rate) or all[rate]) == expected  # noqa: B023
        assert sorted(asked) == sorted(values)


def test_foreign_styles_share_a_rate(tmp_path: Path) -> None:
    comparison = runs.Comparison("no-model", tmp_path, tmp_path, settings.SMALL)
    for rate, validation in zip(settings.RATES, (0.25, 0.5, 0.25), strict=True):
        write(tmp_path / f"sft-terse-lr{rate:g}-seed0.json", finished(validation))
    assert comparison.chosen_rate(settings.ARMS["sft-formal"]) == settings.RATES[1]


def measured(run: str, target: str, transfer: str, drift: float, facts: str = "1111") -> dict[str, Any]:
    found = {
        part: {"strict": digits, "last_number": digits} for part, digits in (("target", target), ("transfer", transfer))
    }
    return {"run": run, **found, "facts": facts, "stories": "1010", "formats": "1100", "base_divergence": drift}


def cells(table: str) -> dict[str, list[str]]:
    """Return the cells of each row by its first one."""
    rows = [[cell.strip() for cell in line.split("|")[1:-1]] for line in table.splitlines()[2:]]
    return {first: rest for first, *rest in rows}


def test_tables_hold_means_over_seeds_and_paired_intervals(tmp_path: Path) -> None:
    rate = f"{settings.RATES[0]:g}"
    files: dict[str, Any] = {
        "base-measured": measured("base", "0000", "0000", 0.0),
        "base-second": {"second": {"strict": "0011"}},
    }
    for method, targets in {"opsd": ("1110", "1111"), "sft": ("1000", "1000", "1111")}.items():
        for seed, target in enumerate(targets):
            run = f"{method}-own-lr{rate}-seed{seed}"
            sizes = {"questions_read": 8, "tokens_generated": 100 + 2 * seed, "validation": 0.5, "training_seconds": 60}
            files[run] = {"run": run, "seed": seed, "learning_rate": settings.RATES[0], **sizes}
            files[f"{run}-measured"] = measured(run, target, "0000", 0.25 * seed, "1011")
            files[f"{run}-second"] = {"run": run, "second": {"strict": "0001"}}
    second = f"second-opsd-own-lr{rate}-seed1"
    files[second] = {"run": second, "seed": 1, "learning_rate": settings.RATES[0], "validation": 0.25}
    files[f"{second}-measured"] = measured(second, "0111", "0000", 0.0)
    files[f"{second}-second"] = {"run": second, "second": {"strict": "1111"}}
    files["teacher-terse-measured"] = {"run": "teacher-terse", "target": {"strict": "1110", "last_number": "1111"}}
    for name, content in files.items():
        write(tmp_path / f"{name}.json", content)
    report = Report(tmp_path)
    scores = cells(report.scores(TRAINED))
    assert scores["opsd-own"][:2] == ["2", rate] and scores["opsd-own"][2].startswith("87.5 (")
    assert scores["before"][2] == "0.0 (0.0 to 49.0)"  # Wilson's interval of 0 of 4
    assert scores["teacher, terse reference"][2].startswith("75.0 (")
    assert cells(report.scores(KEPT, drift=True))["opsd-own"][-1] == "0.125"
    each = cells(report.runs())
    assert each["opsd-own, seed 1"][:4] == ["8", "102", "60", "100.0"] and each["opsd-own, seed 1"][-1] == "0.250"
    assert each["sft-own, seed 0"][3] == "25.0" and len(each) == 5
    # Differences of the seeds that both have: 0, 1, 1, 0 and 0, 1, 1, 1.
    differences = cells(report.differences())["opsd-own minus sft-own"]
    mean, half = paired_change([1, 0, 0, 0], [1, 1, 1, 0.5])
    assert differences[0] == f"{100 * mean:+.1f} ± {100 * half:.1f}"
    assert cells(report.changes())["sft-own"][0].startswith("+50.0 ±")
    sequence = cells(report.sequence())  # only seed 1 went on
    starts = {name.partition(", ")[2]: [cell.split(" ")[0] for cell in row] for name, row in sequence.items()}
    assert starts["before"] == ["0.0", "0.0", "50.0", "100.0", "50.0", "50.0"]
    assert starts["after task one"] == ["100.0", "100.0", "25.0", "75.0", "50.0", "50.0"]
    assert starts["change by task two, points"] == ["-25.0", "-25.0", "+75.0", "+25.0", "+0.0", "+0.0"]


def test_results_of_other_sizes_or_models_are_refused(tmp_path: Path) -> None:
    comparison = runs.Comparison("no-model", tmp_path, tmp_path, settings.SMALL)
    path, arm = tmp_path / "grpo-lr0.5-seed0.json", settings.ARMS["grpo"]
    write(path, held := finished(0.5))
    assert comparison.train(arm, 0.5, 0)["validation"] == 0.5
    for key, other in (("scale", asdict(settings.Scale())), ("made_with", {"model_sha256": "another"})):
        write(path, held | {key: other})
        with pytest.raises(SystemExit, match="--results"):
            comparison.train(arm, 0.5, 0)


def test_findings_have_the_tables_of_the_results() -> None:
    page = (ROOT / "docs" / "findings.md").read_text(encoding="utf-8")
    tables = Report(ROOT / "docs" / "results" / "real_model").tables()
    assert tables and [title for title, table in tables.items() if table not in page] == []
