"""Read the files of a run: metrics by step, settings, and graded completions.

    ROOT/record/run.json        command, versions and devices of each start; status at the end (RunReport callback)
    ROOT/record/config.yaml     all settings
    ROOT/record/metrics.jsonl   one line for each training step and each validation
    ROOT/record/samples.jsonl   graded completions of the same few questions at every validation
    ROOT/record/skills.json     values of skills that the run does not train (KeptSkills callback)
    ROOT/before, ROOT/after     held-out questions in test.jsonl, written by the quick start
    ROOT/rollouts.csv           some completions of training (RolloutTable callback)

A run without a record is read from ``metrics.csv`` (CSVLogger) and the ``config.yaml`` next to it.
"""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from types import UnionType
from typing import Any, NamedTuple

from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.csv_tables import read_table
from opsd_lightning.utils.redaction import redact
from opsd_lightning.utils.yaml_limits import check_yaml

RECORD_FOLDER = "record"
_HEIGHT = 4  # folders from RUN/lightning_logs/version_0/checkpoints/NAME.ckpt to RUN
# Entries of a graded completion that the report reads.
_GRADED: dict[str, type | UnionType] = {
    "question": str,
    "correct": int | None,
    "answer": object,
    "completion_tokens": int,
    "truncated": int,
}
_SAMPLE: dict[str, type | UnionType] = _GRADED | {"completion": str, "samples": int, "right": int}
_SKILL: dict[str, type | UnionType] = {
    "step": int,
    "set": str,
    "graded": bool,
    "items": int,
    "value": float | int,
    "interval": list,
    "base": float | int | None,
    "change": list | None,
}
_FIX = "Give the folder of a run (trainer.default_root_dir or a CSVLogger version)"
_FILES = ("run.json", "metrics.jsonl", "metrics.csv", "config.yaml", "samples.jsonl", "skills.json")


class Point(NamedTuple):
    """Metrics at one step of a run.

    Args:
        step: Optimizer steps made.
        tokens: Completion tokens generated in training so far, or None if unknown.
        seconds: Seconds since the first start, without pauses before resumptions, or None if unknown.
        values: Metrics by their logged names.
    """

    step: int
    tokens: float | None
    seconds: float | None
    values: dict[str, float]


@dataclass
class Run:
    """Contents of a run's folder, as `read_run` returns them.

    Args:
        root: Output folder of the run.
        name: Name of the folder.
        train: Training steps, in order.
        validations: Validations, in order. The validation before training has step 0.
        info: Contents of ``run.json``. Empty without a record.
        config: Settings as nested mappings, without secrets. Empty if the run saved none.
        samples: Graded completions of a few questions, as ``{"kind": "val" or "train", "step": ..., "records": [...]}``.
        skills: Values of skills that the run does not train, one entry for each step and set of `KeptSkills`.
        held_out: Records of held-out questions, by time and role, such as ``before: student``.
        rollouts: Completions of training from the file of `RolloutTable`, with ``step``, ``question``, ``completion``,
            ``completion_tokens`` and ``truncated``.
    """

    root: Path
    name: str
    train: list[Point] = field(default_factory=list)
    validations: list[Point] = field(default_factory=list)
    info: dict[str, Any] = field(default_factory=dict)
    config: dict[str, Any] = field(default_factory=dict)
    samples: list[dict[str, Any]] = field(default_factory=list)
    skills: list[dict[str, Any]] = field(default_factory=list)
    held_out: dict[str, list[dict[str, Any]]] = field(default_factory=dict)
    rollouts: list[dict[str, Any]] = field(default_factory=list)

    @property
    def accuracy(self) -> str | None:
        """Name of the avg@k validation metric, if there is one."""
        names = {name for point in self.validations for name in point.values}
        return next((name for name in sorted(names) if re.fullmatch(r"val/avg@\d+", name)), None)

    @property
    def settings(self) -> dict[str, Any]:
        """All settings by dotted name (see `flatten`)."""
        return flatten(self.config)


def read_run(path: str | Path) -> Run:
    """Read the files of a run.

    Args:
        path: The run's folder (``trainer.default_root_dir``), the folder of its record, or a version folder of CSVLogger.

    Raises:
        ConfigError: The folder contains no run.
        UserError: A file is damaged.
    """
    given = Path(path)
    if not given.exists():
        raise ConfigError(f"{given} does not exist", "runs", _FIX)
    folder = given.resolve()
    if folder.is_file():
        if folder.name not in _FILES:
            raise ConfigError(f"{given} is not a file of a run", "runs", _FIX)
        folder = folder.parent
    record = _find_record(folder)
    if record is not None:
        run = _from_record(record)
    else:
        log = _find_csv_log(folder)
        if log is None:
            problem = (
                f"{given} contains no run: it has neither {RECORD_FOLDER}/run.json (written by the RunReport callback) nor "
                "a metrics.csv of training (written by CSVLogger)"
            )
            raise ConfigError(problem, "runs", _FIX)
        run = _from_log(log, folder)
    if not run.train and not run.validations and not run.info:
        raise ConfigError(f"{given} contains no training step or validation yet", "runs", "Wait for the first step")
    run.held_out = read_held_out(run.root)
    run.rollouts = _rollouts(run.root, run.settings.get("trainer.callbacks.RolloutTable.path", "rollouts.csv"))
    return run


class RecordedSettings(NamedTuple):
    """Settings of a run, from its record.

    Args:
        config: Settings as nested mappings, without secrets. Empty if the run saved none.
        folder: Folder in which the run was last started, to which its relative paths refer. None if it is unknown.
    """

    config: dict[str, Any]
    folder: str | None

    def part(self, *names: str) -> dict[str, Any]:
        """Return the settings of a part, such as ``part("data", "prompts")``. Empty if the run has none.

        Args:
            names: Names of the part and of the parts that it is in. ``class_path`` and ``init_args`` are left out.
        """
        found: Any = self.config
        for name in names:
            found = found.get(name) if isinstance(found, Mapping) else None
            if isinstance(found, Mapping) and isinstance(found.get("init_args"), Mapping):
                found = found["init_args"]
        return dict(found) if isinstance(found, Mapping) else {}


def settings_of_run_around(path: str | Path) -> RecordedSettings:
    """Read the settings of the run whose folder contains a file or folder, such as a checkpoint or an exported adapter.

    Args:
        path: The file or folder.

    Returns:
        The settings. They are empty if no folder above it, up to the fourth, contains the record of a run.

    Raises:
        UserError: A file of the record is damaged, or is a symbolic link.
    """
    for root in list(Path(path).resolve().parents)[:_HEIGHT]:
        record = root / RECORD_FOLDER
        if _exists(record / "run.json"):
            starts = _json(record / "run.json").get("starts") or [{}]
            folder = starts[-1].get("folder")
            return RecordedSettings(_config(record / "config.yaml"), folder if isinstance(folder, str) else None)
    return RecordedSettings({}, None)


def _exists(path: Path) -> bool:
    """Return True if a file of a run exists.

    Raises:
        ConfigError: The path contains a symbolic link. The report of a downloaded run could show any file of this machine.
    """
    if not path.is_file():
        return False
    if path.resolve() != path:
        problem = f"{path} is or is inside a symbolic link, which is not followed"
        raise ConfigError(problem, "runs", "Give the folder that the link points to")
    return True


def _find_record(folder: Path) -> Path | None:
    for candidate in (folder, folder / RECORD_FOLDER):
        if _exists(candidate / "run.json") and "starts" in _json(candidate / "run.json"):
            return candidate
    for parent in list(folder.parents)[:3]:  # the folder of a logger whose run has a record
        path = parent / RECORD_FOLDER / "run.json"
        if _exists(path) and str(folder) in _json(path).get("logs", []):
            return path.parent
    return None


def _from_record(record: Path) -> Run:
    for name in ("metrics.jsonl", "samples.jsonl", "skills.json"):
        _exists(record / name)
    info = _json(record / "run.json")
    run = Run(record.parent if record.name == RECORD_FOLDER else record, "", info=info)
    run.name = run.root.name if record.name == RECORD_FOLDER else f"{run.root.name}/{record.name}"
    points: dict[tuple[str, int], Point] = {}
    for line in read_complete_lines(record / "metrics.jsonl"):
        with _damage_as_error(record / "metrics.jsonl"):
            # A validation that a resumed run repeats replaces the first one.
            points[line["kind"], line["step"]] = _point(line)
    run.train = sorted((p for (kind, _), p in points.items() if kind == "train"), key=lambda point: point.step)
    run.validations = sorted((p for (kind, _), p in points.items() if kind == "val"), key=lambda point: point.step)
    run.config = _config(record / "config.yaml")
    run.samples = read_complete_lines(record / "samples.jsonl")
    with _damage_as_error(record / "samples.jsonl"):
        for line in run.samples:
            _check(line, {"kind": str, "step": int, "records": list})
            for sample in line["records"]:
                _check(sample, _SAMPLE | ({"index": int} if line["kind"] == "val" else {}))
    run.skills = _skills(record / "skills.json")
    return run


def _skills(path: Path) -> list[dict[str, Any]]:
    if not path.is_file():
        return []
    with _damage_as_error(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(found, list):
            raise TypeError("it is not a list")
        for entry in found:
            _check(entry, _SKILL)
            for name in ("interval", "change"):
                pair = [0, 0] if entry[name] is None else entry[name]
                if len(pair) != 2 or not all(isinstance(value, float | int) for value in pair):
                    raise TypeError(f"{name} is {pair!r:.60}")
    return found


@contextmanager
def _damage_as_error(path: Path) -> Iterator[None]:
    """Convert errors while a file is read and parsed into a `UserError` that the file is damaged."""
    try:
        yield
    except UserError:
        raise
    except (OSError, ValueError, TypeError, KeyError, AttributeError, ArithmeticError, RecursionError, csv.Error) as error:
        reason = " ".join(str(error).split())
        raise UserError(f"{path} is damaged: {f'{reason} is missing' if isinstance(error, KeyError) else reason}") from None


def _check(value: Any, kinds: Mapping[str, type | UnionType]) -> None:
    """Raise unless a value is a JSON object whose entries have the given types."""
    if not isinstance(value, dict):
        raise TypeError(f"{value!r:.60} is not an object")
    for name, kind in kinds.items():
        if not isinstance(value[name], kind):
            raise TypeError(f"{name} is {value[name]!r:.60}")


def _point(line: Mapping[str, Any]) -> Point:
    _check(line, {"kind": str, "step": int, "metrics": dict})
    for name, value in {"tokens": line["tokens"] or 0, "seconds": line["seconds"] or 0, **line["metrics"]}.items():
        if not isinstance(value, int | float):
            raise TypeError(f"{name} is {value!r:.60}")
    return Point(line["step"], line["tokens"], line["seconds"], line["metrics"])


def _find_csv_log(folder: Path) -> Path | None:
    """Return the newest metrics.csv of training in or below a folder. Test runs write one as well, which is skipped."""
    found = [path for depth in ("", "*/", "*/*/") for path in folder.glob(f"{depth}metrics.csv")]
    found = [path for path in found if _exists(path)]
    for path in sorted(found, key=lambda path: path.stat().st_mtime, reverse=True):
        with _damage_as_error(path), path.open(encoding="utf-8") as file:
            if any(name.startswith(("train/", "val/")) for name in next(csv.reader(file), [])):
                return path
    return None


def _from_log(path: Path, folder: Path) -> Run:
    run = Run(folder, folder.name, config=_config(path.parent / "config.yaml"))
    with _damage_as_error(path.parent / "config.yaml"):
        updates = int(run.settings.get("model.updates_per_batch") or 1)  # the log counts batches, not optimizer steps
        last = int(run.settings.get("trainer.max_steps") or -1)
    baseline = not run.config or "BaselineEvaluation" in str(run.config)
    tokens = 0.0
    for row in _rows(path):
        with _damage_as_error(path):
            step = (int(row["step"]) + 1) * updates
        step = min(step, last) if last > 0 else step
        if any(name.startswith("train/") for name in row):
            tokens = row.get("train/tokens_generated", tokens)
            run.train.append(Point(step, tokens, None, _metrics(row)))
        elif any(name.startswith("val/") for name in row):
            if baseline and not row["step"] and not run.train and not run.validations:
                step = 0  # the evaluation of BaselineEvaluation before the first step
            run.validations.append(Point(step, tokens, None, _metrics(row)))
    return run


def _metrics(row: Mapping[str, float]) -> dict[str, float]:
    return {name: value for name, value in row.items() if name not in ("step", "epoch")}


def read_held_out(root: Path) -> dict[str, list[dict[str, Any]]]:
    """Read the graded completions of held-out questions in a run's folder, by time and role, such as ``before: student``.

    Raises:
        UserError: A file is damaged.
    """
    found: dict[str, list[dict[str, Any]]] = {}
    for when in ("before", "after"):
        path = root / when / "test.jsonl"
        with _damage_as_error(path):
            for record in read_records(path) if _exists(path) else []:
                _check(record, _GRADED)
                found.setdefault(f"{when}: {record.get('role', 'student')}", []).append(record)
    return found


def _rollouts(root: Path, name: Any) -> list[dict[str, Any]]:
    """Read the table of `RolloutTable`. Another file, also one outside the run, is not read."""
    if not isinstance(name, str) or Path(name).is_absolute() or ".." in Path(name).parts or not _exists(root / name):
        return []
    with _damage_as_error(root / name):
        columns, rows = read_table(root / name)
        if not {"step", "question", "completion", "tokens", "truncated"} <= set(columns):
            return []
        return [
            {
                "step": int(row["step"]),
                "question": row["question"],
                "completion": row["completion"],
                "completion_tokens": int(row["tokens"]),
                "truncated": row["truncated"] == "True",
            }
            for row in (dict(zip(columns, cells, strict=True)) for cells in rows)
        ]


def _config(path: Path) -> dict[str, Any]:
    if not _exists(path):
        return {}
    import yaml

    with _damage_as_error(path):
        try:
            text = path.read_text(encoding="utf-8")
            check_yaml(text)
            found = yaml.safe_load(text)
        except yaml.YAMLError as error:
            raise ValueError(str(error)) from None
    return redact(found) if isinstance(found, dict) else {}


def _json(path: Path) -> dict[str, Any]:
    with _damage_as_error(path):
        found = json.loads(path.read_text(encoding="utf-8"))
        if isinstance(found, dict):
            _check({"starts": [], "logs": [], "warnings": []} | found, {"starts": list, "logs": list, "warnings": list})
            for start in found.get("starts", []):
                _check({"versions": {}, "command": None} | start, {"versions": dict, "command": list | None})
    return found if isinstance(found, dict) else {}


def flatten(config: Mapping[str, Any]) -> dict[str, Any]:
    """Flatten nested settings to dotted names. A class path gets the name of its part. Unset settings are omitted."""
    found: dict[str, Any] = {}

    def walk(value: Any, name: str) -> None:
        if isinstance(value, Mapping):
            if isinstance(path := value.get("class_path"), str):
                found[name] = short_class(path)
                arguments = value.get("init_args")
                others = {key: part for key, part in value.items() if key not in ("class_path", "init_args")}
                value = {**(arguments if isinstance(arguments, Mapping) else {}), **others}
            elif not value:
                found[name] = {}
            for key, part in value.items():
                walk(part, f"{name}.{key}" if name else str(key))
        elif isinstance(value, list) and any(isinstance(part, Mapping) for part in value):
            paths = [part.get("class_path") if isinstance(part, Mapping) else None for part in value]
            names = [short_class(path) if isinstance(path, str) else "" for path in paths]
            for place, (part, own) in enumerate(zip(value, names, strict=True)):
                label = own if own and names.count(own) == 1 else f"{own}{place}"
                walk(part, f"{name}.{label}")
        elif value is not None:
            found[name] = value

    walk(config, "")
    return found


def short_class(path: str) -> str:
    """Return the class name for classes of this package and Lightning, and the full path for others."""
    return path.rpartition(".")[2] if path.startswith(("opsd_lightning.", "lightning.pytorch.")) else path


def differing_settings(runs: Iterable[Run]) -> dict[str, list[Any]]:
    """Return the settings in which runs differ: by name, the value of each run, or None if it is not set."""
    all_settings = [run.settings for run in runs]
    order = ("model", "data", "trainer")
    names = {name for settings in all_settings for name in settings}
    tops = {name: name.partition(".")[0] for name in names}
    ordered = sorted(names, key=lambda name: (order.index(tops[name]) if tops[name] in order else len(order), name))
    values = {name: [settings.get(name) for settings in all_settings] for name in ordered}
    return {name: row for name, row in values.items() if any(value != row[0] for value in row[1:])}


def read_complete_lines(path: Path) -> list[dict[str, Any]]:
    """Read the objects of a JSON Lines file. An incomplete last line, left by an interrupted run, is skipped.

    Raises:
        UserError: A line is not a JSON object.
    """
    if not path.is_file():
        return []
    with _damage_as_error(path):
        lines = path.read_bytes().splitlines(keepends=True)
        found = [json.loads(line) for line in lines if line.endswith(b"\n") and line.strip()]
        for value in found:
            _check(value, {})
    return found


def read_records(path: Path) -> list[dict[str, Any]]:
    """Read a JSON Lines file. Only newlines end a line: completions may contain separators such as U+2028."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").split("\n") if line]


def _rows(path: Path) -> list[dict[str, float]]:
    with _damage_as_error(path):
        lines = path.read_bytes().splitlines(keepends=True)
        whole = [line.decode() for line in lines if line.endswith(b"\n")]  # skip a line that was not completed
        return [{key: float(value) for key, value in row.items() if value} for row in csv.DictReader(whole)]


def read_metrics(path: Path) -> tuple[list[dict[str, float]], list[tuple[int, float]]]:
    """Read a CSV log: its rows of training steps, and its validations as (optimizer steps made, accuracy)."""
    steps: list[dict[str, float]] = []
    validations: list[tuple[int, float]] = []
    for row in _rows(path):
        if "train/loss" in row:
            steps.append(row)
        if "val/avg@1" in row:
            validations.append((int(steps[-1]["step"]) + 1 if steps else int(row["step"]), row["val/avg@1"]))
    return steps, validations
