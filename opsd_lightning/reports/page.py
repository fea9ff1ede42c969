"""Report of one or more runs as a self-contained HTML page, and the command ``opsd report``."""

from __future__ import annotations

import re
import shlex
from collections.abc import Mapping, Sequence
from datetime import datetime
from itertools import pairwise
from pathlib import Path
from typing import Any
from urllib.parse import quote

from opsd_lightning import __version__
from opsd_lightning.evaluation.held_out import HeldOut, held_out_scores
from opsd_lightning.reports.charts import charts_of, curves_of
from opsd_lightning.reports.completions import completion_rows
from opsd_lightning.reports.html import count, relative_path, render_template
from opsd_lightning.reports.skills import skill_rows
from opsd_lightning.runs.reader import RECORD_FOLDER, Point, Run, differing_settings, read_run
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.files import atomic_write, script_json
from opsd_lightning.utils.folders import check_page
from opsd_lightning.utils.statistics import wilson_interval
from opsd_lightning.utils.terminal import SafeArgumentParser, say


def write_report(runs: Sequence[str | Path | Run], output: str | Path = "report.html") -> Path:
    """Write a report of runs side by side as one HTML page, which needs no network and no other file.

    Args:
        runs: Folders of runs, or runs from `runs.reader.read_run`.
        output: Path of the page. An earlier page there is replaced.

    Returns:
        Path of the page.

    Raises:
        UserError: A folder holds no run, or its files are damaged.
        ConfigError: There is no run, or the page cannot be written.
    """
    found = [run if isinstance(run, Run) else read_run(run) for run in runs]
    if not found:
        raise ConfigError("there is no run to report", "runs", "Give the folder of at least one run")
    output = Path(output)
    if output.is_dir():
        fix = f"Give the path of a file, such as {output / 'report.html'}"
        raise ConfigError(f"{output} is a folder", "output", fix)
    check_page(output, "output")
    try:
        html = render(found, output)
    except (ValueError, TypeError, LookupError, AttributeError, ArithmeticError, RecursionError) as error:
        reason = " ".join(str(error).split())[:200]
        raise UserError(f"cannot make a report of these runs, since a file of them is damaged ({reason})") from error
    try:
        atomic_write(output, html)
    except OSError as error:
        fix = "Choose a file that can be written"
        raise ConfigError(f"cannot write to {output} ({error})", "output", fix) from None
    return output


def main(argv: list[str] | None = None) -> None:
    """Run ``opsd report``."""
    parser = SafeArgumentParser(prog="opsd report", description="Write a report of one or more runs as one HTML page.")
    parser.add_argument(
        "runs",
        nargs="+",
        metavar="RUN",
        help="folder of a run (its trainer.default_root_dir) or version folder of a CSV log",
    )
    parser.add_argument("--output", default="report.html", help="path of the page (default: %(default)s)")
    options = parser.parse_args(argv)
    try:
        say(f"The report is in {write_report(options.runs, options.output)}")
    except UserError as error:
        say(f"error: {error}", error=True)
        raise SystemExit(2) from error


def render(runs: Sequence[Run], output: Path) -> str:
    """Render the report as HTML.

    Args:
        runs: Runs to show.
        output: Path of the page. Links to files of a run are relative to it.
    """
    names = _names(runs)
    pages = [_run_values(run, name, output) for run, name in zip(runs, names, strict=True)]
    charts, constant = charts_of(runs)
    data = {
        "runs": [curves_of(run, name) for run, name in zip(runs, names, strict=True)],
        "charts": charts,
        "completions": [
            {"run": number} | row for number, page in enumerate(pages) for row in page["completions"].pop("rows")
        ],
        "token_pages": [page["token_page"] for page in pages],
    }
    versions = [page["start"].get("versions", {}) for page in pages]
    return render_template(
        "report.html",
        script_json(data),
        title=names[0] if len(runs) == 1 else f"{len(runs)} runs",
        runs=pages,
        sections=list(dict.fromkeys(chart["section"] for chart in charts)),
        charts=charts,
        constant=constant,
        completions=bool(data["completions"]),
        differing=list(differing_settings(runs).items()) if len(runs) > 1 else [],
        versions={name: [found.get(name) for found in versions] for name in dict.fromkeys(n for v in versions for n in v)},
        made=datetime.now().astimezone().isoformat(timespec="minutes"),
        version=__version__,
    )


# -- one run -----------------------------------------------------------------------------------------------------------


def _run_values(run: Run, name: str, output: Path) -> dict[str, Any]:
    """Return the values that the template shows of a run."""
    blank = dict.fromkeys(("command", "time", "step", "seed", "folder", "devices", "git"))
    starts = [blank | start for start in run.info.get("starts", [])]
    start: dict[str, Any] = starts[-1] if starts else {}
    last = (run.train or run.validations or [Point(0, None, None, {})])[-1]
    settings = run.settings
    groups: dict[str, list[tuple[str, Any]]] = {}
    for setting, value in settings.items():
        top, _, rest = setting.partition(".")
        groups.setdefault(top if rest else "run", []).append((setting, value))
    command = starts[0].get("command") if starts else None
    config = run.root / RECORD_FOLDER / "config.yaml"
    # Times of steps add up to the time of the run only if every step was logged. A CSV log may have every tenth only.
    steps = [point.step for point in run.train]
    is_complete = len(steps) > 1 and all(b - a == steps[0] for a, b in pairwise(steps))
    step_seconds = [
        value for point in run.train for key, value in point.values.items() if re.fullmatch(r"time/\w+_seconds", key)
    ]
    accuracy, held_out, completions = _accuracy(run), held_out_scores(run.held_out), completion_rows(run)
    links = _links(run, output)
    seconds = max((p.seconds for p in (*run.train, *run.validations) if p.seconds is not None), default=None)
    return {
        "name": name,
        "status": _status(run, last.step),
        "warnings": run.info.get("warnings", []),
        "accuracy": accuracy,
        "result": _result(accuracy, held_out),
        "first_last": _first_last(run),
        "steps": last.step,
        "max_steps": settings.get("trainer.max_steps"),
        "tokens": last.tokens,
        "seconds": seconds if seconds is not None else (sum(step_seconds) if is_complete and step_seconds else None),
        "clock": "since the start" if seconds is not None else "of rollouts and scoring",
        "about": _about(settings, start),
        "start": start,
        "starts": starts,
        "command": shlex.join(command) if command else None,
        "by_python": bool(starts) and not command,
        "config_command": _from_config(config) if command and config.is_file() else None,
        "groups": groups,
        "samples": _samples(run),
        "held_out": held_out,
        "completions": completions | {"shown": len(completions["rows"])},
        "skills": skill_rows(run),
        "links": links,
        "token_page": dict(links).get("Token report"),
    }


def _from_config(path: Path) -> str:
    return f"opsd fit --config {shlex.quote(relative_path(path, Path.cwd()))}"


def _status(run: Run, step: int) -> dict[str, str]:
    if not run.info:
        return {"kind": "", "text": "read from a CSV log"}
    status, reason = run.info.get("status"), run.info.get("reason", "")
    if status == "finished":
        return {"kind": "good", "text": f"finished after {count(step)} steps"}
    if status == "stopped":
        return {"kind": "warn", "text": f"stopped by CollapseGuard after {count(step)} steps"}
    if status == "idle":
        return {"kind": "bad", "text": f"made {count(step)} steps, but {reason}"}
    if status == "failed":
        return {"kind": "bad", "text": f"failed after step {step}: {reason}"}
    if status == "interrupted":
        cause = "Ctrl-C" if reason in ("", "SIGINT") else reason
        return {"kind": "warn", "text": f"interrupted by {cause} after step {step}"}
    return {"kind": "warn", "text": f"at step {step} when this page was made: still running, or killed since"}


def _accuracy(run: Run) -> dict[str, Any] | None:
    name = run.accuracy
    points = [point for point in run.validations if name in point.values]
    if name is None or not points:
        return None

    def shown(point: Point) -> dict[str, Any]:
        value = point.values[name]
        error, questions = point.values.get(f"{name}_se"), point.values.get("val/questions")
        return {"value": value, "step": point.step, "interval": _interval(value, error, questions)}

    best = max(points, key=lambda point: point.values[name])
    before = points[0] if points[0].step == 0 else None
    teacher = name.replace("val/", "val/teacher_")
    return {
        "name": name.removeprefix("val/"),
        "before": before and shown(before),
        "best": shown(best),
        "last": shown(points[-1]),
        "validations": len(points),
        "questions": points[-1].values.get("val/questions"),
        "teacher": points[-1].values.get(teacher),
    }


def _result(accuracy: Mapping[str, Any] | None, held_out: HeldOut | None) -> dict[str, Any] | None:
    """Return the accuracy after training: that of held-out questions, or else that of the last validation."""
    after = held_out and held_out.row("after: student")
    if after:
        return {"value": after.strict.value, "interval": (after.strict.low, after.strict.high), "note": "held out"}
    if accuracy is None:
        return None
    return accuracy["last"] | {"note": f"validation, step {count(accuracy['last']['step'])}"}


def _interval(share: float, error: float | None, questions: float | None) -> tuple[float, float] | None:
    """Return Wilson's 95 % interval of an accuracy.

    Args:
        share: The accuracy.
        error: Its standard error over questions. It determines the effective number of independent answers.
        questions: Number of questions. It is used if ``error`` is missing or 0.
    """
    if error:
        return wilson_interval(share, max(share * (1 - share) / error**2, 1.0))
    return wilson_interval(share, questions) if questions else None


def _first_last(run: Run) -> list[dict[str, Any]]:
    """Return the first and last values of up to two metrics, shown for a run without graded validation."""
    found = []
    for name, label in (("val/nll", "negative log-likelihood"), ("val/divergence", "divergence of student and teacher")):
        values = [point.values[name] for point in run.validations if name in point.values]
        if values:
            found.append({"label": f"Validation {label}", "first": values[0], "last": values[-1]})
    for name in ("reward", "reverse_kl", "forward_kl", "loss"):
        label, name = name.replace("_kl", " KL"), f"train/{name}"
        values = [point.values[name] for point in run.train if name in point.values]
        if values:
            found.append({"label": label, "first": values[0], "last": values[-1]})
    return found[:2]


def _about(settings: Mapping[str, Any], start: Mapping[str, Any]) -> list[tuple[str, str]]:
    """Return the main settings of a run with their labels."""

    def part(name: str, *inner: str) -> str:
        found = [str(settings[name])] + [f"{i.rpartition('.')[2]} {settings[i]}" for i in inner if i in settings]
        return ", ".join(found)

    rows = [
        ("Model", "model.policy.model"),
        ("Method", "model"),
        ("Teacher", "model.teacher"),
        ("Divergence", "model.objective.divergence"),
        ("Clip", "model.objective.clip"),
        ("Context", "model.context"),
        ("Teacher reads", "data.context"),
        ("Data", "data.train"),
        ("Optimizer", "model.optimizer"),
    ]
    inner = {"Teacher": ("model.teacher.decay",), "Optimizer": ("model.optimizer.lr",), "Data": ("data.train.path",)}
    found = [(label, part(name, *inner.get(label, ()))) for label, name in rows if name in settings]
    return found + [(label.capitalize(), str(start[label])) for label in ("devices",) if start.get(label)]


# -- completions -------------------------------------------------------------------------------------------------------


def _samples(run: Run) -> dict[str, Any] | None:
    """Return the first and the last completions of the same questions. Questions whose grade changed come first."""
    kind = "val" if any(line["kind"] == "val" for line in run.samples) else "train"
    kept = {line["step"]: line for line in run.samples if line["kind"] == kind}
    if not kept:
        return None
    first, last = kept[min(kept)], kept[max(kept)]
    if first is last:
        pairs = [(record, None) for record in first["records"]]
    elif kind == "val":
        after = {(record["index"], record["question"]): record for record in last["records"]}
        pairs = [(record, after.get((record["index"], record["question"]))) for record in first["records"]]
    else:  # training steps have different questions
        pairs = [(record, None) for record in first["records"]] + [(None, record) for record in last["records"]]
    changed = {(False, True): 0, (True, False): 1}
    if kind == "val":
        pairs.sort(key=lambda p: changed.get((p[0]["correct"], p[1]["correct"]), 2) if p[1] else 3)
    return {"kind": kind, "first": first["step"], "last": last["step"], "pairs": pairs}


def _links(run: Run, output: Path) -> list[tuple[str, str]]:
    def path(setting: str, default: str) -> str:
        return str(run.settings.get(f"trainer.callbacks.{setting}") or default)

    beside = [
        ("Token report", path("TokenReport.path", "tokens.html")),
        ("Adapter", path("AdapterExport.folder", "adapter")),
        ("Merged model", path("AdapterExport.merged_folder", "merged")),
        ("Rollouts (CSV)", path("RolloutTable.path", "rollouts.csv")),
        ("Kept skills, item by item", "skills.jsonl"),
        ("Record", RECORD_FOLDER),
        ("Held-out completions before training", "before/test.jsonl"),
        ("Held-out completions after training", "after/test.jsonl"),
    ]
    return [
        (label, quote(relative_path(run.root / name, output.resolve().parent)))
        for label, name in beside
        if (run.root / name).exists()
    ]


def _names(runs: Sequence[Run]) -> list[str]:
    """Return the folder names of runs, with as many parent folders as make them unique."""
    for depth in range(1, 6):
        names = ["/".join((*run.root.parts[-depth:][:-1], run.name)) for run in runs]
        if len(set(names)) == len(names):
            return names
    return [f"{run.name} ({number})" for number, run in enumerate(runs, 1)]
