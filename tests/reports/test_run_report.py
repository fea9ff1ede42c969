"""Tests of the record of a run and of the page made from it."""

from __future__ import annotations

import csv
import html
import json
import math
import re
import shutil
import sys
from collections.abc import Callable
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from helpers.browser import browser, needs_browser
from helpers.distributed import ddp
from helpers.processes import on_ranks
from helpers.training import Recorder, adapters, parts, trainer
from opsd_lightning import __main__
from opsd_lightning.callbacks.baseline import BaselineEvaluation
from opsd_lightning.cli.command import main
from opsd_lightning.methods.grpo import AnswerReward, GRPOModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.reports.charts import charts_of
from opsd_lightning.reports.page import main as report, write_report
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.runs.reader import Run, differing_settings, flatten, read_run
from opsd_lightning.types import ConfigError, Sampling
from opsd_lightning.utils.redaction import redact, redact_arguments, redact_text
from opsd_lightning.utils.statistics import wilson_interval

pytestmark = pytest.mark.integration


VALIDATED = {"num_sanity_val_steps": -1, "val_check_interval": 2, "check_val_every_n_epoch": None}
CLI = [
    "--trainer.callbacks=RunReport",
    "--trainer.num_sanity_val_steps=-1",
    "--trainer.val_check_interval=1",
    "--trainer.check_val_every_n_epoch=null",
    "--trainer.log_every_n_steps=1",
]


class Page(HTMLParser):
    """What a browser makes of a page without running it: its text, scripts, rows of tables, and links."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.source = path.read_text(encoding="utf-8")
        self.text, self.scripts, self.rows, self.links = "", [], [], []  # type: ignore[var-annotated]
        self._script = self._row = self._cell = False
        self.feed(self.source)
        self.text = re.sub(r"\s+", " ", self.text)
        self.data = json.loads(self.scripts[self.data_script])

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self._script = tag in ("script", "style")
        if tag == "script":
            self.scripts.append("")
            if ("type", "application/json") in attrs:
                self.data_script = len(self.scripts) - 1
        if tag == "tr":
            self.rows.append([])
        if tag in ("td", "th"):
            self.rows[-1].append("")
        self._cell = tag in ("td", "th") or (self._cell and tag not in ("table", "section"))
        self.links += [value or "" for name, value in attrs if name in ("href", "src", "srcset", "action")]

    def handle_endtag(self, tag: str) -> None:
        self._script = self._script and tag not in ("script", "style")
        self._cell = self._cell and tag not in ("td", "th")

    def handle_data(self, data: str) -> None:
        if self._script:
            if self.scripts:
                self.scripts[-1] += data
            return
        self.text += f"{data} "
        if self._cell:
            self.rows[-1][-1] += data.strip()


class Seen(Callback):
    """What the module itself returned and logged."""

    def __init__(self) -> None:
        self.validations: list[list[dict[str, Any]]] = []

    def on_validation_start(self, *args: Any) -> None:
        self.validations.append([])

    def on_validation_batch_end(self, trainer: Any, module: Any, outputs: Any, *args: Any) -> None:
        self.validations[-1] += outputs["student"]


def log_of(folder: Path) -> list[dict[str, float]]:
    (path,) = folder.rglob("metrics.csv")
    with path.open() as file:
        return [{name: float(value) for name, value in row.items() if value} for row in csv.DictReader(file)]


def test_command_line_run_writes_its_page(
    base: list[str],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    cli = main(["fit", *base, *CLI, "--model.eval_sampling.n=2", "--trainer.max_steps=3"])
    run, page = read_run(tmp_path), Page(tmp_path / "report.html")
    # Every number against the CSV log and the trainer.
    log = log_of(tmp_path)
    steps = [row for row in log if "train/loss" in row]
    assert [point.step for point in run.train] == [1, 2, 3] == [int(row["step"]) + 1 for row in steps]
    for point, row in zip(run.train, steps, strict=True):
        assert point.values == pytest.approx({name: value for name, value in row.items() if "/" in name}, rel=1e-6)
        assert point.tokens == row["train/tokens_generated"]
    validations = [row for row in log if "val/avg@2" in row]
    assert [point.step for point in run.validations] == [0, 1, 2, 3] and len(validations) == 3
    for point, row in zip(run.validations[1:], validations, strict=True):
        expected = {name: value for name, value in row.items() if "/" in name} | {"val/questions": 4}
        assert point.values == pytest.approx(expected, rel=1e-6)
    last = float(cli.trainer.callback_metrics["val/avg@2"])
    assert run.accuracy == "val/avg@2" and run.validations[-1].values["val/avg@2"] == pytest.approx(last)
    curves = page.data["runs"][0]
    assert curves["train"]["step"] == [1, 2, 3]
    assert curves["train"]["tokens"] == [row["train/tokens_generated"] for row in steps]
    assert curves["train"]["values"]["train/reverse_kl"] == pytest.approx([row["train/reverse_kl"] for row in steps])
    assert curves["val"]["tokens"] == [0, *curves["train"]["tokens"]]
    assert curves["val"]["values"]["avg_se"][1:] == pytest.approx([row["val/avg@2_se"] for row in validations])
    # A completion of this model has always six tokens: its length is a number in a table, and no curve.
    titles = {chart["title"] for chart in page.data["charts"]} | {row["title"] for row in charts_of([run])[1]}
    for title in (
        "Validation accuracy, avg@2",
        "Loss",
        "Divergence",
        "Entropy",
        "Completion length: longest",
        "Gradient norm",
    ):
        assert title in titles
    assert "finished after 3 steps" in page.text and f"{100 * last:.1f} %" in page.text
    # The command, as it was typed, and the settings it stands for: parsed again they are the same.
    command = run.info["starts"][0]["command"]
    assert command[:2] == ["opsd", "fit"] and command[2:3] == base and "--trainer.max_steps=3" in command
    capsys.readouterr()
    for arguments in (command[1:], ["fit", f"--config={tmp_path / 'record' / 'config.yaml'}"]):
        with pytest.raises(SystemExit):
            main([*arguments, "--print_config"])
        printed = flatten(yaml.safe_load(capsys.readouterr().out))
        assert printed == run.settings and printed["trainer.max_steps"] == 3
    assert " ".join(command[2:4]) in html.unescape(page.source)
    start = run.info["starts"][0]
    assert start["versions"]["torch"] == torch.__version__ and start["seed"] == 0 and start["processes"] == 1
    # The page loads nothing and links only files of the run.
    links = {link.partition("#")[0] for link in page.links if link != "data:,"} - {""}  # the empty icon
    assert all(not re.match(r"(https?:)?//", link) and (tmp_path / link).exists() for link in links)
    assert "@import" not in page.source and "fetch(" not in page.source and "url(" not in page.source


def test_page_compares_completions_before_and_after(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    module, data = parts(make_policy())
    seen = Seen()
    trainer(tmp_path, RunReport(questions=3), seen, max_steps=4, **VALIDATED).fit(module, data)
    run, page = read_run(tmp_path), Page(tmp_path / "report.html")
    assert [line["step"] for line in run.samples] == [0, 2, 4] and len(seen.validations) == 3
    for line, records in zip(run.samples, seen.validations, strict=True):
        own = [record for record in records if record["sample"] == 0][:3]
        assert [r["completion"] for r in line["records"]] == [r["completion"] for r in own]
        for kept in line["records"]:
            group = [record for record in records if record["question"] == kept["question"]]
            assert kept["samples"] == len(group) == 2 and kept["right"] == sum(record["correct"] for record in group)
    shown = html.unescape(page.source)
    for records in (seen.validations[0], seen.validations[-1]):
        first = records[0]
        # CR and form feed aside, which HTML folds: the text as it is
        assert first["question"] in shown and (first["completion"] in shown or not first["completion"].isprintable())
    assert "started from Python" in page.text
    settings = run.settings
    assert settings["model"] == "OPSDModule" and settings["model.teacher"] == "FixedTeacher"
    assert settings["model.sampling.n"] == 2 and settings["trainer.max_steps"] == 4
    assert settings["model.policy.lora.r"] == 4 and settings["data.batch_size"] == 2


def test_without_validation_the_first_and_last_step_stand_in(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    module, data = parts(make_policy())
    data.val = None
    trainer(tmp_path, RunReport(questions=2), max_steps=3, limit_val_batches=0, logger=False).fit(module, data)
    run, page = read_run(tmp_path), Page(tmp_path / "report.html")
    assert [(line["kind"], line["step"], len(line["records"])) for line in run.samples] == [("train", 1, 2), ("train", 3, 2)]
    assert [point.step for point in run.train] == [1, 2, 3] and not run.validations
    assert "Completions of the first and the last training step" in page.text and "step 3" in page.text


def test_page_shows_other_methods_and_several_updates(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    settings = {"sampling": Sampling(max_new_tokens=6, n=4), "updates_per_batch": 2}
    grpo = GRPOModule(make_policy(), reward=AnswerReward(), optimizer=lambda p: torch.optim.SGD(p, lr=0.1), **settings)
    trainer(tmp_path / "grpo", RunReport(), max_steps=5).fit(grpo, parts(make_policy())[1])
    run = read_run(tmp_path / "grpo")
    assert [point.step for point in run.train] == [2, 4, 5] and "train/reward" in run.train[0].values
    sft = SFTModule(make_policy(), sampling=Sampling(max_new_tokens=6))
    trainer(tmp_path / "sft", RunReport(), max_steps=2, limit_val_batches=0).fit(sft, parts(make_policy())[1])
    assert [point.tokens for point in read_run(tmp_path / "sft").train] == [0, 0]
    page = Page(write_report([tmp_path / "grpo", tmp_path / "sft"], tmp_path / "both.html"))
    assert "Loss" in {chart["title"] for chart in page.data["charts"]}
    assert "Reward" in {row["title"] for row in charts_of([run])[1]}  # no completion is right


def test_page_compares_runs_and_their_settings(base: list[str], tmp_path: Path) -> None:
    folders = [tmp_path / name for name in ("one", "two", "three")]
    changes = [[], ["--model.teacher=EMATeacher", "--model.teacher.decay=0.5"], ["--model.token_budget=99"]]
    for folder, change in zip(folders, changes, strict=True):
        main(["fit", *base, *CLI, f"--trainer.default_root_dir={folder}", f"--trainer.logger.save_dir={folder}", *change])
    found = differing_settings([read_run(folder) for folder in folders])
    assert {name: found[name] for name in found if name.startswith("model")} == {
        "model.teacher": ["FixedTeacher", "EMATeacher", "FixedTeacher"],
        "model.teacher.decay": [None, 0.5, None],
        "model.teacher.update_every_steps": [None, 1, None],
        "model.token_budget": [8192, 8192, 99],
    }
    assert set(found) - {name for name in found if name.startswith("model")} == {
        "trainer.default_root_dir",
        "trainer.logger.save_dir",
    }
    output = tmp_path / "pages" / "all.html"
    report([*map(str, folders), "--output", str(output)])
    page = Page(output)
    assert [run["name"] for run in page.data["runs"]] == ["one", "two", "three"]
    for name, values in found.items():
        row = [name, *("\N{EN DASH}" if v is None else v if isinstance(v, str) else json.dumps(v) for v in values)]
        assert row in page.rows
    assert differing_settings([read_run(folders[0])] * 2) == {}
    # A log's folder leads to the record of its run.
    assert read_run(next((folders[0] / "lightning_logs").iterdir())).root == folders[0].resolve()


class Stops(Callback):
    """Raises in the middle of a run."""

    def __init__(self, error: BaseException, after: int) -> None:
        self.error, self.after = error, after

    def on_train_batch_start(self, trainer: Trainer, *args: Any) -> None:
        if trainer.global_step == self.after:
            raise self.error


@pytest.mark.parametrize(
    ("error", "raised", "status", "says"),
    [
        (
            RuntimeError("out of <memory>"),
            RuntimeError,
            "failed",
            "failed after step 3: RuntimeError: out of <memory>",
        ),
        (KeyboardInterrupt(), SystemExit, "interrupted", "interrupted by Ctrl-C after step 3"),
    ],
)
def test_a_run_that_ends_early_leaves_its_report(
    error: BaseException,
    raised: type[BaseException],
    status: str,
    says: str,
    make_policy: Callable[..., Policy],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("signal.signal", lambda *args: None)  # Lightning would leave Ctrl-C ignored
    with pytest.raises(raised):
        trainer(tmp_path, Stops(error, 3), RunReport(), **VALIDATED).fit(*parts(make_policy()))
    run, page = read_run(tmp_path), Page(tmp_path / "report.html")
    assert run.info["status"] == status and says in page.text
    assert [point.step for point in run.train] == [1, 2, 3] and [point.step for point in run.validations] == [0, 2]


def test_a_run_that_was_killed_is_read(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Half a line at the end, and no end."""
    trainer(tmp_path, RunReport(), max_steps=2).fit(*parts(make_policy()))
    record = tmp_path / "record"
    info = json.loads((record / "run.json").read_text()) | {"status": "running"}
    (record / "run.json").write_text(json.dumps(info))
    with (record / "metrics.jsonl").open("a") as file:
        file.write('{"kind": "train", "step": 3, "met')
    page = Page(write_report([tmp_path], tmp_path / "page.html"))
    assert "still running, or killed since" in page.text and page.data["runs"][0]["train"]["step"] == [1, 2]


def test_a_resumed_run_goes_on_in_its_record(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()

    def start() -> Any:
        torch.manual_seed(0)
        return parts(policy)

    trainer(tmp_path / "whole", RunReport(), **VALIDATED).fit(*start())
    folder = tmp_path / "broken"
    saved = ModelCheckpoint(tmp_path, filename="at{step}", every_n_train_steps=2, save_top_k=1)
    with pytest.raises(RuntimeError, match="crash"):
        trainer(folder, RunReport(), Recorder(crash_before=3), saved, **VALIDATED).fit(*start())
    crashed = read_run(folder)
    assert [point.step for point in crashed.train] == [1, 2, 3]
    trainer(folder, RunReport(), **VALIDATED).fit(*start(), ckpt_path=saved.best_model_path, weights_only=True)
    run, whole = read_run(folder), read_run(tmp_path / "whole")
    lines = [json.loads(line) for line in (folder / "record" / "metrics.jsonl").read_text().splitlines()]
    assert [line["step"] for line in lines if line["kind"] == "train"] == [1, 2, 3, 4, 5, 6]
    assert [point.step for point in run.validations] == [point.step for point in whole.validations] == [0, 2, 4, 6]
    for mine, other in zip(run.train, whole.train, strict=True):
        assert mine.tokens == other.tokens and mine.values["train/loss"] == other.values["train/loss"]
    seconds = [point.seconds or 0.0 for point in run.train]
    assert seconds == sorted(seconds)
    assert [start["step"] for start in run.info["starts"]] == [0, 2] and run.info["status"] == "finished"
    assert "Resumed at step 2" in Page(folder / "report.html").text

    # A run that begins anew in the same folder does not mix with it, and takes nothing away.
    trainer(folder, RunReport(), max_steps=1).fit(*start())
    assert [point.step for point in read_run(folder).train] == [1]
    assert [point.step for point in read_run(folder / "record-1").train] == [1, 2, 3, 4, 5, 6]


class Sometimes(Callback):
    """Logs a metric at every other step, after the report's own hook."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, *args: Any) -> None:
        if trainer.global_step % 2 == 0:
            pl_module.log("health/sometimes", float(trainer.global_step))


def test_metrics_stand_at_the_steps_that_logged_them(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    trainer(tmp_path, RunReport(), Sometimes(), max_steps=6).fit(*parts(make_policy()))
    run = read_run(tmp_path)
    seen = {point.step: point.values["health/sometimes"] for point in run.train if "health/sometimes" in point.values}
    assert seen == {2: 2.0, 4: 4.0, 6: 6.0}
    (chart,) = [c for c in Page(tmp_path / "report.html").data["charts"] if c["section"] == "Health"]
    assert chart["title"] == "Sometimes (health)"


def test_training_is_the_same_with_and_without(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy, found = make_policy(), []
    for name, callbacks in (("without", []), ("with", [RunReport()])):
        torch.manual_seed(0)
        module, data = parts(policy)
        recorder = Recorder()
        trainer(tmp_path / name, recorder, *callbacks, max_steps=4, **VALIDATED).fit(module, data)
        found.append((recorder.losses, adapters(module), torch.rand(3)))
    (losses, weights, drawn), (others, other, again) = found
    assert losses == others and torch.equal(drawn, again)
    assert all(torch.equal(value, other[name]) for name, value in weights.items())


def test_only_the_first_of_two_ranks_writes(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()

    def work(rank: int) -> list[str]:
        module, data = parts(policy)
        folder = tmp_path / f"rank{rank}"  # a place of its own shows who writes
        fit = trainer(folder, RunReport(), max_steps=2, logger=False, strategy=ddp(), devices=2, **VALIDATED)
        fit.fit(module, data)
        return sorted(str(path.relative_to(folder)) for path in folder.rglob("*") if "checkpoints" not in str(path))

    first, second = on_ranks(work, tmp_path)
    assert {"report.html", "record/run.json", "record/config.yaml"} <= set(first) and not second
    run = read_run(tmp_path / "rank0")
    assert [point.step for point in run.train] == [1, 2] and run.info["starts"][0]["processes"] == 2
    assert [point.step for point in run.validations] == [0, 2] and run.samples


def test_csv_log_is_read_without_a_record(base: list[str], tmp_path: Path) -> None:
    """An older run: a CSV log and the configuration that Lightning left beside it."""
    settings = [argument for argument in CLI if "callbacks" not in argument] + ["--trainer.callbacks=BaselineEvaluation"]
    main(["fit", *base, *settings])
    main(["test", *base])  # its log is newer, and no run's
    assert not (tmp_path / "record").exists()
    for place in (tmp_path, tmp_path / "lightning_logs" / "version_0"):
        run = read_run(place)
        assert [point.step for point in run.train] == [1, 2] and [point.step for point in run.validations] == [0, 1, 2]
        assert [point.tokens for point in run.validations] == [0, *[point.tokens for point in run.train]]
        assert run.settings["model.teacher"] == "FixedTeacher" and run.accuracy == "val/avg@1"
    text = Page(write_report([tmp_path], tmp_path / "old.html")).text
    assert "read from a CSV log" in text and "no record of its command" in text and "of rollouts and scoring" in text


@pytest.mark.parametrize("baseline", [[], [BaselineEvaluation()]], ids=["", "baseline"])
def test_a_sparse_log_has_the_records_steps(
    baseline: list[Callback], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Lightning's loggers are asked for every fiftieth step unless told otherwise; validations lie between."""
    module, data = parts(make_policy())
    Trainer(
        accelerator="cpu", callbacks=[RunReport(), *baseline], default_root_dir=tmp_path, logger=CSVLogger(tmp_path, "log"),
        max_steps=8, log_every_n_steps=4, val_check_interval=3, check_val_every_n_epoch=None,
        num_sanity_val_steps=-1 if baseline else 0, enable_progress_bar=False, enable_checkpointing=False,
    ).fit(module, data)  # fmt: skip
    (log,) = tmp_path.rglob("metrics.csv")
    (tmp_path / "elsewhere").mkdir()
    shutil.copy(log, tmp_path / "elsewhere")
    recorded, logged = read_run(tmp_path), read_run(tmp_path / "elsewhere")
    assert [p.step for p in recorded.train] == list(range(1, 9)) and [p.step for p in logged.train] == [4, 8]
    steps = [0, 3, 6] if baseline else [3, 6]
    assert [p.step for p in recorded.validations] == [p.step for p in logged.validations] == steps
    assert [p.values["val/avg@2"] for p in recorded.validations] == pytest.approx(
        [p.values["val/avg@2"] for p in logged.validations]
    )


def written(folder: Path, **changes: Any) -> Path:
    """The record of a run, by hand."""
    record = folder / "record"
    record.mkdir(parents=True)
    info = {"starts": [], "logs": [], "status": "finished", "reason": "", "ended": None} | changes.get("info", {})
    (record / "run.json").write_text(json.dumps(info))
    (record / "config.yaml").write_text(yaml.safe_dump(changes.get("config", {"model": {"token_budget": 1}})))
    for name in ("metrics", "samples"):
        (record / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in changes.get(name, [])))
    return folder


def line(kind: str, step: int, **values: float) -> dict[str, Any]:
    return {"kind": kind, "step": step, "tokens": 10 * step, "seconds": 1.0 * step, "metrics": values}


def test_headline_shows_accuracy_with_intervals(tmp_path: Path) -> None:
    def accuracy(step: int, right: int, n: int) -> dict[str, Any]:
        share = right / n
        error = math.sqrt(share * (1 - share) / (n - 1))
        return line("val", step, **{"val/avg@1": share, "val/avg@1_se": error, "val/questions": n})

    metrics = [accuracy(0, 0, 50), accuracy(5, 40, 50), accuracy(9, 30, 50)]
    folder = written(tmp_path / "run", metrics=metrics)
    text = Page(write_report([folder], tmp_path / "page.html")).text
    low, high = wilson_interval(0.0, 50)  # without a spread: of so many questions
    assert low == 0 and f"before 0.0 % 0.0 to {100 * high:.1f} % step 0" in text
    low, high = wilson_interval(0.8, 49)
    assert f"best 80.0 % {100 * low:.1f} to {100 * high:.1f} % step 5" in text
    assert "last 60.0 %" in text and "3 validations" in text


def test_quickstart_page_shows_held_out_questions(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", metrics=[line("train", 1, **{"train/loss": 1.0})])
    for when, right in (("before", {0, 1, 2}), ("after", {1, 2, 3, 4, 5, 6, 7})):
        (folder / when).mkdir()
        records = [
            {"role": "student", "index": i, "sample": 0, "question": "q", "correct": i in right, "answer": None if i > 7 else "1",
             "completion_tokens": 10 * i, "truncated": i == 0, "reference": "1", "vote": 0,
             "completion": "It is 1." if i in right or i in (3, 8) else "It is 2."}
            for i in range(10)
        ]  # fmt: skip
        (folder / when / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    page = Page(write_report([folder], tmp_path / "page.html"))
    (before,) = [row for row in page.rows if row[0] == "Student before"]
    (after,) = [row for row in page.rows if row[0] == "Student after"]
    low, high = wilson_interval(0.5, 10)
    by_number = ["50.0 %", f"{100 * low:.1f} % to {100 * high:.1f} %"]
    assert before[1:] == ["30.0 %", "10.8 % to 60.3 %", *by_number, "20.0 %", "10.0 %", "45.0", "10"]
    assert after[1] == "70.0 %"
    # Five more right, one fewer. Agresti and Min (2005) add one half to each discordant count and two questions.
    half = 1.96 * math.sqrt((5.5 + 1.5 - (5.5 - 1.5) ** 2 / 12) / 12**2)
    assert f"+40.0 ± {100 * half:.1f} percentage points" in page.text
    form = 1.96 * math.sqrt((1.5 + 0.5 - (1.5 - 0.5) ** 2 / 12) / 12**2)  # question 3: its number was right before its form
    assert f"10.0 ± {100 * form:.1f} are form" in page.text and "50.0% to 80.0%" in page.text


HOSTILE = "</script><script>alert(1)</script><!-- \u2028 \u2029 & <b>bold</b> {{ 7 * 7 }} ]]>"


def test_hostile_text_is_escaped(tmp_path: Path) -> None:
    record = {
        "index": 0,
        "question": HOSTILE,
        "reference": HOSTILE,
        "completion": HOSTILE,
        "answer": HOSTILE,
        "correct": True,
    }
    record |= {"completion_tokens": 3, "truncated": False, "samples": 1, "right": 1}
    folder = written(
        tmp_path / "<b>run",
        info={"status": "failed", "reason": HOSTILE, "starts": [{"command": ["opsd", "fit", HOSTILE], "step": 0}]},
        config={"model": {"prompt": HOSTILE, HOSTILE: 1}},
        metrics=[line("train", 1, **{HOSTILE: 1.0, "train/loss": math.nan}), line("train", 2, **{"train/loss": math.inf})],
        samples=[{"kind": "val", "step": step, "records": [record]} for step in (0, 2)],
    )
    page = Page(write_report([folder], tmp_path / "page.html"))
    assert len(page.scripts) == 3 and "<b>" not in page.source.replace("<b>' ~", "").replace("<b>{", "")
    assert "\u2028" not in page.scripts[page.data_script] and HOSTILE in page.data["runs"][0]["train"]["values"]
    assert page.data["runs"][0]["train"]["values"]["train/loss"] == [None, None]
    assert page.text.count("alert(1)") >= 6 and "49" not in page.text


def test_long_runs_are_thinned_without_changing_means(tmp_path: Path) -> None:
    folder = written(tmp_path / "run", metrics=[line("train", s, **{"train/loss": float(s)}) for s in range(1, 5001)])
    train = Page(write_report([folder], tmp_path / "page.html")).data["runs"][0]["train"]
    assert len(train["step"]) == 1000 and train["step"][:2] == [5, 10] and train["values"]["train/loss"][:2] == [3, 8]


# -- secrets -------------------------------------------------------------------------------------------------------------


def test_secrets_are_left_out(base: list[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """From settings by name, from URLs, and wherever a value of the environment turns up; what is harmless stays."""
    (tmp_path / "own_notifier.py").write_text(
        "from lightning.pytorch import Callback\n"
        "class Notifier(Callback):\n"
        "    def __init__(self, api_key: str, url: str, note: str): self.api_key, self.url, self.note = api_key, url, note\n"
        "    def on_train_end(self, trainer, pl_module): raise RuntimeError(f'no answer from {self.url}: {self.note}')\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    monkeypatch.setenv("MY_SERVICE_API_KEY", "topsecret-1-of-the-environment")
    settings = {
        "url": "https://me:topsecret-2@host/x",
        "note": "uses topsecret-1-of-the-environment",
        "api_key": "topsecret-3",
    }
    notifier = {"class_path": "own_notifier.Notifier", "init_args": settings}
    callbacks = f"--trainer.callbacks={json.dumps([{'class_path': 'RunReport'}, notifier])}"
    with pytest.raises(RuntimeError, match="no answer"):
        main(["fit", *base, callbacks, "--model.policy.pad_token=<pad>"])
    left = {path: path.read_text() for path in [*(tmp_path / "record").iterdir(), tmp_path / "report.html"]}
    assert len(left) == 5 and not [path for path, text in left.items() if "topsecret" in text]
    run = read_run(tmp_path)
    assert run.settings["trainer.callbacks.own_notifier.Notifier.api_key"] == "***"
    assert run.settings["trainer.callbacks.own_notifier.Notifier.url"] == "***"
    assert run.settings["model.policy.pad_token"] == "<pad>"
    assert run.info["reason"] == "RuntimeError: no answer from https://***@host/x: uses ***"
    assert run.info["starts"][0]["command"].count("--model.policy.pad_token=<pad>") == 1
    # A configuration that an earlier version left is shown without them too.
    older = next((tmp_path / "lightning_logs").iterdir())
    assert "topsecret" not in (older / "config.yaml").read_text()
    (older / "config.yaml").write_text(json.dumps({"trainer": {"callbacks": [notifier]}}))
    shutil.rmtree(tmp_path / "record")
    assert "topsecret" not in write_report([older], tmp_path / "older.html").read_text()


def test_secret_settings_are_recognized() -> None:
    settings = {"api_key": "x", "hub_token": "y", "pad_token": "<pad>", "token_budget": 5, "max_new_tokens": 6, "password": None,
                "api_key_env": "VLLM_API_KEY", "nested": [{"secret_key": "z"}], "tokens_generated": 7}  # fmt: skip
    assert redact(settings) == settings | {"api_key": "***", "hub_token": "***", "nested": [{"secret_key": "***"}]}
    assert redact_arguments(["fit", "--a.api_key", "x", "--b.token=y", "--c.max_new_tokens=8", "--d={eos_token: </s>, password: p}"]) == [
        "fit", "--a.api_key", "***", "--b.token=***", "--c.max_new_tokens=8", "--d={eos_token: </s>, password: ***}",
    ]  # fmt: skip
    assert redact_text("from https://me:pw@host/x with hf_abcdefghijklmnopqrst") == "from https://***@host/x with ***"


# -- mistakes ------------------------------------------------------------------------------------------------------------


def test_unusable_folders_are_refused(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "empty").mkdir()
    (tmp_path / "note.txt").write_text("")
    good = written(tmp_path / "good", metrics=[line("train", 1, **{"train/loss": 1.0})])
    damaged = written(tmp_path / "damaged")
    (damaged / "record" / "run.json").write_text('{"starts": [')
    blocked = tmp_path / "note.txt" / "page.html"
    for arguments, message in (
        (["nowhere"], "runs: nowhere"),
        ([str(tmp_path / "empty")], f"runs: {tmp_path / 'empty'}"),
        ([str(tmp_path / "note.txt")], f"runs: {tmp_path / 'note.txt'}"),
        ([str(damaged)], "run.json"),
        ([str(good), "--output", str(tmp_path)], "output: "),
        ([str(good), "--output", str(blocked)], "output: "),
    ):
        with pytest.raises(SystemExit) as stop:
            report(arguments)
        error = capsys.readouterr().err
        assert stop.value.code == 2 and error.startswith("error: ") and message in error and error.count("\n") == 1
    with pytest.raises(ConfigError) as refused:
        RunReport(path="report")
    assert refused.value.setting == "trainer.callbacks.path"
    with pytest.raises(ConfigError) as refused:
        write_report([])
    assert refused.value.setting == "runs"


GRADED = {"index": 0, "question": "1?", "correct": True, "answer": "1", "completion_tokens": 1, "truncated": False}
DAMAGED = {
    "record/metrics.jsonl": [
        *(b"half\n", b"[2]\n", b"null\n", b'{"kind": "val"}\n', b"\xff\n"),
        b'{"kind": "train", "step": 1, "tokens": 1, "seconds": 1, "metrics": {"train/loss": "low"}}\n',
    ],
    "record/samples.jsonl": [
        *(b'{"b": 2}\n', b"3\n", b'{"kind": "val", "step": 0, "records": [{}]}\n'),
        json.dumps({"kind": "val", "step": 0, "records": [GRADED]}).encode() + b"\n",
    ],
    "record/config.yaml": [b"model: \xe9", b"a: [", b"\0"],
    "record/run.json": [b'{"starts": 3}', b'{"starts": [4]}', b"\xfe"],
    "after/test.jsonl": [b"x\n", b"[]\n", b'{"role": "student"}\n'],
    "rollouts.csv": [b"step,question,completion,tokens,truncated\r\n" + row for row in (b"x,q,c,1,True\r\n", b"1,q\r\n")],
    "metrics.csv": [
        *(b"step,train/loss\n0,low\n", b"epoch,train/loss\n0,1.5\n", b"step,train/loss\n,1\n"),
        *(b"step,train/loss\n0,\xff\n", b"\xff,train/loss\n", b"step,train/loss\nnan,1\n", b"step,train/loss\n0,1,2\n"),
    ],
}


@pytest.mark.parametrize("name", DAMAGED)
def test_damaged_files_are_named(name: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for number, content in enumerate(DAMAGED[name]):
        folder = tmp_path / str(number)
        if name != "metrics.csv":
            written(folder, metrics=[line("train", 1, **{"train/loss": 1.0})])
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
        with pytest.raises(SystemExit) as stop:
            report([str(folder), "--output", str(tmp_path / "page.html")])
        error = capsys.readouterr().err
        assert stop.value.code == 2 and name in error and error.count("\n") == 1, content


def test_report_command_writes_a_page(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    folder = written(tmp_path / "run", metrics=[line("train", 1, **{"train/loss": 1.0})])
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    monkeypatch.setattr(sys, "argv", ["opsd", "report", str(folder)])
    __main__.entry()
    assert "report.html" in capsys.readouterr().out and Page(tmp_path / "report.html").data["runs"][0]["name"] == "run"


def test_runs_of_one_name_are_told_apart(tmp_path: Path) -> None:
    metrics = [line("train", 1, **{"train/loss": 1.0})]
    folders = [written(tmp_path / parent / "run", metrics=metrics) for parent in "ab"]
    page = Page(write_report(folders, tmp_path / "page.html"))
    assert [run["name"] for run in page.data["runs"]] == ["a/run", "b/run"]
    assert isinstance(read_run(folders[0]), Run)


# -- in a browser --------------------------------------------------------------------------------------------------------

MEASURE = """(() => {
  const svg = document.querySelector("figure.main > svg"), box = svg.getBoundingClientRect();
  svg.dispatchEvent(new PointerEvent("pointermove", {clientX: box.right - 10, clientY: box.top + 20, bubbles: true}));
  const tip = document.querySelector("figure.main .tip").textContent;
  document.querySelector('[data-axis=step]').click();
  return {
    wide: document.documentElement.scrollWidth, charts: document.querySelectorAll("figure").length, tip,
    drawn: [...document.querySelectorAll("figure > svg")].filter(s => s.querySelector("path")).length,
    axis: document.querySelector("figure.main > svg").textContent,
    band: !!svg.querySelector('path[d$="Z"]'), lines: document.querySelectorAll("figure.main path[stroke-dasharray]").length,
  };
})()"""


def graded(index: int, correct: bool, **more: Any) -> dict[str, Any]:
    found = {"index": index, "question": f"{index} + 1?", "reference": str(index + 1), "completion": f"It is {index}.",
             "answer": str(index), "correct": correct, "completion_tokens": 4 + index, "truncated": not correct}  # fmt: skip
    return found | {"samples": 1, "right": int(correct)} | more


@pytest.fixture
def full_run(tmp_path: Path) -> Path:
    """A run with curves, held-out questions, completions of three kinds, and a page of tokens."""
    metrics = [
        line(
            "train",
            s,
            **{"train/loss": (-1) ** s / s, "train/completion_tokens": 20 + s / 10, "train/truncated_fraction": 0.0},
        )
        for s in range(1, 101)
    ]
    metrics += [line("val", s, **{"val/avg@1": 0.4 + s / 200, "val/avg@1_se": 0.05}) for s in (0, 50, 100)]
    samples = [{"kind": "val", "step": s, "records": [graded(i, s > i) for i in range(8)]} for s in (0, 50, 100)]
    folder = written(tmp_path / "a run", metrics=metrics, samples=samples)
    for when in ("before", "after"):
        (folder / when).mkdir()
        records = [graded(i, i % 2 == 0 or when == "after", sample=0, role="student") for i in range(20)]
        (folder / when / "test.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    (folder / "rollouts.csv").write_bytes(
        b"step,question,completion,tokens,truncated,forward_kl\r\n"
        b'10,1?,\'=SUM(A1),3,False,0.1\r\n10,2?,"a ""quote"",\nand a line",4,True,\r\n20,cut o'
    )
    (folder / "tokens.html").write_text("<p>tokens")
    write_report([folder], folder / "report.html")
    return folder


TABLE = """(() => ({
  rows: [...document.querySelectorAll("#rows .row")].map(row => [...row.cells].map(cell => cell.innerText.trim().replace(/\\s+/g, " "))),
  count: document.getElementById("count").textContent, pager: !document.getElementById("pager").hidden,
}))()"""
SAVED = """(async button => {
  let kept; const made = URL.createObjectURL;
  URL.createObjectURL = blob => (kept = blob, "#kept");
  try { document.getElementById(button).click(); } finally { URL.createObjectURL = made; }
  return await kept.text();
})"""


@pytest.mark.browser
@needs_browser
def test_table_and_curves_are_browsed_and_saved(full_run: Path) -> None:
    with browser() as tab:
        tab.open(full_run / "report.html", width=1280, height=900)

        def table() -> dict[str, Any]:
            return tab.js(TABLE)

        def choose(name: str, value: str, event: str) -> dict[str, Any]:
            tab.js(
                f"(e => {{ e.value = {json.dumps(value)}; e.dispatchEvent(new Event('{event}')); }})(document.getElementById('{name}'))"
            )
            return table()

        first = table()
        assert (
            first["count"] == "66 of 66" and first["pager"] and len(first["rows"]) == 25
        )  # 40 held out, 24 validated, 2 trained
        assert first["rows"][0][0] == "held out, before" and first["rows"][0][3].startswith("✓ correct")
        tab.point("#next", click=True)
        tab.point("#next", click=True)
        assert len(table()["rows"]) == 16 and table()["rows"][-1][0] == "training, step 10"
        assert choose("when", "validation", "change")["count"] == "24 of 66"
        assert {row[3].split(" ")[1].rstrip(",") for row in choose("graded", "false", "change")["rows"]} == {"wrong"}
        assert choose("find", "IT IS 7", "input")["rows"] == [
            ["validation, step 0", "7 + 1?", "It is 7.", "✗ wrong, truncated answer 7", "11"]
        ]
        tab.point("#rows .row .c", click=True)
        assert tab.js("document.querySelector('.whole-text').innerText").split("\n")[-1] == "8"  # the reference
        link = tab.js("document.querySelector('#rows a').getAttribute('href')")
        assert link == "tokens.html#step=0"
        choose("find", "", "input"), choose("graded", "", "change"), choose("when", "", "change")
        tab.point("[data-sort=tokens]", click=True)
        tab.point("[data-sort=tokens]", click=True)
        assert [int(row[4]) for row in table()["rows"]][:3] == [23, 23, 22]
        choose("when", "training", "change")
        rows = list(csv.reader(tab.js(f"{SAVED}('completions-csv')").splitlines(keepends=True)))
        assert rows[0][:3] == ["run", "when", "step"] and [row[2] for row in rows[1:]] == ["10", "10"]
        assert sorted(row[5] for row in rows[1:]) == ["'=SUM(A1)", 'a "quote",\nand a line']
        curves = list(csv.DictReader(tab.js(f"{SAVED}('curves-csv')").splitlines()))
        kinds = [row["kind"] for row in curves]
        assert kinds == ["train"] * 100 + ["val"] * 3
        assert [float(row["train/loss"]) for row in curves[:2]] == [-1, 0.5] and float(curves[-1]["val/avg@1"]) == 0.9
        # Smoothing changes the curve, and none leaves the values themselves.
        tab.js("document.querySelectorAll('details').forEach(d => d.open = true)")
        lines = "[...document.querySelectorAll('figure:not(.main) > svg path:not(.healthy)')].map(p => p.getAttribute('d')).join()"
        paths = []
        for amount in ("2", "10", "0"):
            choose("smoothing", amount, "input")
            paths.append(tab.js(lines))
        assert len(set(paths)) == 3 and len(paths[2]) < len(paths[0])
        assert tab.js("[...document.querySelectorAll('.healthy')].length") == 1  # the completion length
        assert "healthy" in tab.js("document.querySelector('.range').textContent")
        assert tab.errors == [] and tab.requests == []


@pytest.mark.browser
@needs_browser
@pytest.mark.parametrize("width", [390, 1280])
def test_report_fits_the_screen_and_contents_lead_to_headings(width: int, full_run: Path) -> None:
    with browser() as tab:
        for dark in (False, True):
            tab.open(full_run / "report.html", width, 844, dark)
            assert tab.js("document.documentElement.scrollWidth") <= width
            tab.js("document.querySelectorAll('details').forEach(d => d.open = true)")
            assert tab.js("document.documentElement.scrollWidth") <= width
        empty = "[...document.querySelectorAll('figure > svg')].some(svg => !svg.querySelector('path'))"
        # Charts are drawn when the browser reports that their folds are open.
        tab.js(f"new Promise(done => {{ const look = () => {empty} ? setTimeout(look, 20) : done(); look(); }})")
        links = tab.js("[...document.querySelectorAll('.contents a')].map(a => a.getAttribute('href'))")
        assert {"#result", "#training", "#completions", "#settings"} <= set(links) and len(links) == len(set(links))
        for link in links:
            place = tab.js(
                f"(location.hash = {link!r}, new Promise(done => setTimeout(() => {{ const e = document.querySelector({link!r}),"
                "bar = document.getElementById('tools').getBoundingClientRect(), top = e.getBoundingClientRect().top;"
                "done([top, bar.top <= 1 && bar.bottom > 0 ? bar.bottom : 0, innerHeight]); }, 60)))"
            )
            assert place[1] <= place[0] < place[2], link  # below the bar, and on the screen
        # Both pages share the colours.
        tab.point("[data-colours=light]", click=True)
        tab.open(full_run / "report.html", width, 844, dark=True)
        assert tab.js("document.documentElement.dataset.theme") == "light"
        assert tab.errors == [] and tab.requests == []


def test_held_out_result_is_the_head_figure(full_run: Path) -> None:
    page = Page(full_run / "report.html")
    low, high = wilson_interval(0.5, 20)
    head = page.text[: page.text.index("Tokens generated")]
    assert f"Student before 50.0 % {100 * low:.1f} to {100 * high:.1f} %" in head and "Student after 100.0 %" in head
    assert "+50.0 points" in head
    assert page.links.count("tokens.html") == 2  # at the top, and among the run's files
    titles = [chart["title"] for chart in page.data["charts"]]
    assert "Truncated completions" not in titles and ["Truncated completions", "0.0 %"] in page.rows


@pytest.mark.browser
@needs_browser
def test_page_works_in_a_browser(tmp_path: Path) -> None:
    """On a phone's width: every chart is drawn, nothing is wider than the screen, and the read-out tells the value."""
    folders = []
    for name, gain in (("low", 0.1), ("high", 0.3)):
        metrics = [
            line("train", s, **{"train/loss": 1 / s, "train/forward_kl": 0.5 + s, "train/reverse_kl": 0.6})
            for s in range(1, 21)
        ]
        metrics += [line("val", s, **{"val/avg@1": 0.4 + gain * s / 20, "val/avg@1_se": 0.05}) for s in (0, 10, 20)]
        folders.append(written(tmp_path / name, metrics=metrics))
    page = write_report(folders, tmp_path / "page.html")
    with browser() as tab:
        tab.open(page, width=390, height=800)
        found = tab.js(MEASURE)
        assert tab.errors == [] and tab.requests == []
    assert found["wide"] <= 390 and found["charts"] == found["drawn"] == 3
    assert found["band"] and found["lines"] == 2
    assert "step 20, 200 tokens" in found["tip"] and "50 % ± 5 %" in found["tip"] and "70 % ± 5 %" in found["tip"]
    assert "optimizer steps" in found["axis"]
