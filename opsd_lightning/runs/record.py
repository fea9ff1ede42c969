"""Write the record of a run: its files, and facts about settings, machine and versions. `reader` reads it."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import secrets
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Mapping
from contextlib import suppress
from datetime import UTC, datetime
from functools import partial
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_lightning import __version__
from opsd_lightning.runs.reader import read_complete_lines
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import append, atomic_write
from opsd_lightning.utils.folders import free_name

#: Key of the checkpoint identifier in a checkpoint.
CHECKPOINT_ID = "opsd_record"
_RUN, _METRICS, _SAMPLES, _CONFIG = "run.json", "metrics.jsonl", "samples.jsonl", "config.yaml"
_SKILLS = "skills.json"
_RESERVE = ".reserve"  # placeholder file, deleted at the end to leave room for the final status on a full disk
_RESERVED_BYTES = 1 << 16
_TRIES, _PAUSE_SECONDS = 3, 0.2  # for writing the final status


def is_newest_checkpoint(folder: Path, checkpoint: str | None) -> bool:
    """Return True if a checkpoint is the newest one that the recorded run wrote.

    Args:
        folder: Folder of the record.
        checkpoint: Checkpoint identifier (entry `CHECKPOINT_ID` of the checkpoint), or None.
    """
    return checkpoint is not None and _read_info(folder).get("checkpoint") == checkpoint


def belongs_to_another_run(folder: Path, checkpoint: str | None) -> bool:
    """Return True if a checkpoint is known to belong to another run than a record.

    Args:
        folder: Folder of the record.
        checkpoint: Checkpoint identifier (entry `CHECKPOINT_ID` of the checkpoint), or None. Identifiers of earlier
            versions do not contain a run.
    """
    run, dash, _ = str(checkpoint or "").partition("-")
    return bool(dash) and _read_info(folder).get("run") != run


def check_record(folder: Path) -> None:
    """Check that a folder is missing, empty or a record.

    Raises:
        ConfigError: The folder contains other files.
    """
    if not os.path.lexists(folder):
        return
    problem = f"{folder} is a link or a file" if folder.is_symlink() or not folder.is_dir() else None
    names = set() if problem else {path.name for path in folder.iterdir()}
    if names and not names & {_RUN, _METRICS, _SAMPLES, _CONFIG, _RESERVE}:
        problem = f"{folder} is not the record of a run: it contains {', '.join(sorted(names)[:3])}"
    if problem is not None:
        fix = "Choose another folder for the run or move this one away"
        raise ConfigError(f"{problem}, and RunReport writes its record there", "trainer.default_root_dir", fix)


class Record:
    """Writer of a run's record, which also measures the time of the run.

    The record of another run in the folder is renamed to ``record-1`` and so on. A resumed run removes the lines of the
    steps that it repeats. The new lines may differ if the run had finished, or if it resumes from another checkpoint than
    its newest one. In these cases a copy of the record is saved first.

    Lines that cannot be written to a full disk stay in memory and are written when there is room again.

    Args:
        folder: Folder of the files.
        step: Number of optimizer steps made before this start, above 0 for a resumed run.
        validates: If True, the resumed run begins with the validation of that step, which replaces an earlier one.
        checkpoint: Identifier (`CHECKPOINT_ID`) of the checkpoint that the run resumes from, or None.
        failed: Function that is called with the name of a file and the error if the file cannot be written.
    """

    def __init__(
        self,
        folder: Path,
        step: int,
        validates: bool = False,
        checkpoint: str | None = None,
        failed: Callable[[str, OSError], None] = lambda name, error: None,
    ) -> None:
        self.folder, self._started, self._failed = folder, time.monotonic(), failed
        self._info: dict[str, Any] = {}
        self._waiting: dict[str, list[str]] = {_METRICS: [], _SAMPLES: []}
        self._checkpoint: tuple[int, str] | None = None  # step and identifier of the newest checkpoint of this start
        lines, info = read_complete_lines(folder / _METRICS), _read_info(folder)
        newest = is_newest_checkpoint(folder, checkpoint)
        last = max((line["step"] for line in lines if line["kind"] == "train"), default=-1)
        self.resumed = step > 0 and (last >= step or newest) and not belongs_to_another_run(folder, checkpoint)
        if folder.exists() and not self.resumed:
            os.replace(folder, free_name(folder))
        elif self.resumed:
            dropped = any(line["step"] > step for line in lines)
            if info.get("status") in ("finished", "idle") or (dropped and not newest):
                self._copy()
        folder.mkdir(parents=True, exist_ok=True)
        self._reserve()

        def keep(line: dict[str, Any]) -> bool:
            return bool(line["step"] < step + (not validates or line["kind"] == "train"))

        kept = [line for line in lines if keep(line)] if self.resumed else []
        self._before = max((line["seconds"] for line in kept), default=0.0)
        if self.resumed:  # the run repeats the steps after the checkpoint
            samples = [line for line in read_complete_lines(folder / _SAMPLES) if keep(line)]
            ends = [line for line in samples if line["kind"] == "train"][1:]  # written when an earlier start stopped
            samples = [line for line in samples if line not in ends]
            atomic_write(folder / _SAMPLES, "".join(_line(line) for line in samples))
            atomic_write(folder / _METRICS, "".join(_line(line) for line in kept))

    def _copy(self) -> None:
        """Save a copy of the record, which gets its final name when it is complete."""
        aside = free_name(self.folder)
        with tempfile.TemporaryDirectory(prefix=f".{aside.name}.partial-", dir=aside.parent) as temporary:
            whole = Path(temporary) / aside.name
            shutil.copytree(self.folder, whole, ignore=shutil.ignore_patterns(_RESERVE, ".*.partial"))
            os.rename(whole, aside)

    def _reserve(self) -> None:
        with suppress(OSError):  # the disk is already full
            atomic_write(self.folder / _RESERVE, b"\0" * _RESERVED_BYTES)

    def seconds(self) -> float:
        """Return the seconds since the first start, without pauses before resumptions."""
        return round(self._before + time.monotonic() - self._started, 3)

    def start(self, start: dict[str, Any], logs: list[str], config: str) -> None:
        """Record a start of the run.

        Args:
            start: Facts about this start, such as its command and versions.
            logs: Folders of the loggers.
            config: All settings as YAML.
        """
        old = _read_info(self.folder) if self.resumed else {}
        self._info = {
            "run": old.get("run") or secrets.token_hex(8),
            "starts": [*old.get("starts", []), start],
            "logs": sorted({*old.get("logs", []), *logs}),
            "status": "running",
            "reason": "",
            "warnings": [],
            "unwritten": {},
            "checkpoint": old.get("checkpoint"),
            "ended": None,
        }
        self._try(_CONFIG, lambda: atomic_write(self.folder / _CONFIG, config))
        self._write()

    def checkpoint(self, step: int) -> str:
        """Record that a checkpoint is written after an optimizer step, and return its identifier."""
        if self._checkpoint is None or self._checkpoint[0] != step:
            self._checkpoint = step, f"{self._info['run']}-{secrets.token_hex(8)}"
            self._info["checkpoint"] = self._checkpoint[1]
            self._write()
        return self._checkpoint[1]

    def end(self, status: str, reason: str, warnings: list[str], unwritten: Mapping[str, str] | None = None) -> None:
        """Write the final status of the run. Space is reserved for it on a full disk.

        Args:
            status: ``finished``, ``stopped``, ``idle`` and so on.
            reason: Text for the report.
            warnings: Warnings of the run.
            unwritten: Reasons for other files that could not be written, by name.
        """
        self._flush()
        with suppress(OSError):
            (self.folder / _RESERVE).unlink(missing_ok=True)
        self._info |= {"status": status, "reason": reason, "warnings": warnings, "ended": timestamp()}
        lost = dict(unwritten or {})
        for last in (False, True):  # first the status, then the waiting lines if there is room
            lines = {name: f"{len(waiting)} lines" for name, waiting in self._waiting.items() if waiting}
            self._info["unwritten"] = lost | lines
            for _ in range(_TRIES):
                if self._write():
                    break
                time.sleep(_PAUSE_SECONDS)
            if last or not self._flush():
                break

    def metrics(self, kind: str, step: int, seconds: float, tokens: int, values: dict[str, float]) -> None:
        """Append the metrics of a training step (``train``) or validation (``val``)."""
        line = {"kind": kind, "step": step, "seconds": seconds, "tokens": tokens, "metrics": values}
        self._append(_METRICS, line)

    def samples(self, kind: str, step: int, records: list[dict[str, Any]]) -> None:
        """Append graded completions of training (``train``) or of a validation (``val``)."""
        self._append(_SAMPLES, {"kind": kind, "step": step, "records": records})

    def skills(self, history: list[dict[str, Any]]) -> None:
        """Write the values of skills that the run does not train, in place of earlier ones."""
        self._try(_SKILLS, lambda: atomic_write(self.folder / _SKILLS, json.dumps(history)))

    def drop_training_samples(self) -> None:
        """Remove the completions of training."""
        samples = [line for line in read_complete_lines(self.folder / _SAMPLES) if line["kind"] != "train"]
        atomic_write(self.folder / _SAMPLES, "".join(_line(line) for line in samples))

    def _append(self, name: str, line: dict[str, Any]) -> None:
        self._waiting[name].append(_line(line))
        self._flush()

    def _flush(self) -> bool:
        """Write the waiting lines, and return True if any were written."""
        written = False
        for name, waiting in self._waiting.items():
            count = len(waiting)
            while waiting:
                content = "".join(waiting[:count]).encode("utf-8", "backslashreplace")
                if self._try(name, partial(append, self.folder / name, content)):
                    del waiting[:count]
                    written = True
                elif count > 1:
                    count = 1  # write single lines as long as there is room
                else:
                    break
        return written

    def _try(self, name: str, write: Callable[[], None]) -> bool:
        try:
            write()
        except OSError as error:
            self._failed(name, error)
            return False
        return True

    def _write(self) -> bool:
        content = json.dumps(self._info, indent=2, ensure_ascii=False)
        return self._try(_RUN, lambda: atomic_write(self.folder / _RUN, content))


def _read_info(folder: Path) -> dict[str, Any]:
    try:
        found = json.loads((folder / _RUN).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return {}
    return found if isinstance(found, dict) else {}


def is_unfinished(folder: Path, step: int) -> bool:
    """Return True if a run has trained up to a step and its final status is missing."""
    info = _read_info(folder)
    steps = [line["step"] for line in read_complete_lines(folder / _METRICS) if line["kind"] == "train"]
    return bool(info) and info.get("status") not in ("finished", "stopped", "idle") and max(steps, default=-1) == step


def describe_object(value: Any, depth: int = 0) -> Any:
    """Return the plain settings of an object as a config would give them, with ``class_path`` and ``init_args``."""
    if isinstance(value, bool) or value is None or (isinstance(value, (int, float, str)) and depth < 8):
        plain = (bool, int, float, str)
        return next((kind(value) for kind in plain if isinstance(value, kind)), None)
    if isinstance(value, Mapping):
        return {str(key): describe_object(part, depth + 1) for key, part in list(value.items())[:200]}
    if isinstance(value, (list, tuple)):
        return [describe_object(part, depth + 1) for part in value] if len(value) <= 50 else f"{len(value)} values"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: describe_object(getattr(value, field.name), depth + 1) for field in dataclasses.fields(value)}
    settings = vars(value) if depth < 6 and hasattr(value, "__dict__") and not callable(value) else {}
    kept = {name: part for name, part in settings.items() if not name.startswith("_") and _is_setting(part)}
    return {"class_path": class_path_of(value)} | ({"init_args": describe_object(kept, depth + 1)} if kept else {})


def _is_setting(value: Any) -> bool:
    own = type(value).__module__.startswith("opsd_lightning.") and not isinstance(value, (Tensor, torch.nn.Module, tuple))
    return value is None or isinstance(value, (bool, int, float, str)) or own


def class_path_of(value: Any) -> str:
    """Return the import path of an object's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"


def launch_command() -> list[str]:
    """Return the command without its arguments: ``opsd``, or ``torchrun ... opsd`` if torchrun started the processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["opsd"]
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(world // local)] if world > local else []
    return ["torchrun", *nodes, "--nproc-per-node", str(local), "--no-python", "opsd"]


def device_summary(device: torch.device, count: int) -> str:
    """Return the number and name of the devices, such as ``8 x NVIDIA H100``."""
    if device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{count} x {device.type} ({name}, {threads} thread{'s' * (threads > 1)})"


def library_versions() -> dict[str, str]:
    """Return the versions of this package, of the libraries that affect its results, and of the system."""
    found = {"opsd_lightning": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "lightning", "transformers", "peft", "bitsandbytes", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"system": platform.platform(terse=True)}


def git_commit() -> str | None:
    """Return the Git commit of the current folder and mark uncommitted changes, or None outside a repository."""

    # The settings of a repository may run commands: a file monitor, hooks, and filters for changed files.
    safe = ["-c", "core.fsmonitor=false", "-c", f"core.hooksPath={os.devnull}", "--no-optional-locks"]

    def git(*arguments: str) -> str:
        command = ["git", *safe, *arguments]
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.strip()

    try:
        head = git("rev-parse", "HEAD")
        names = git("config", "--show-scope", "--name-only", "--list").splitlines()
        if any(not name.startswith(("system\t", "global\t", "command\t")) and "\tfilter." in name.lower() for name in names):
            return head
        changed = bool(git("status", "--porcelain", "--untracked-files=no", "--ignore-submodules=all"))
        return head + (" with uncommitted changes" if changed else "")
    except (OSError, subprocess.SubprocessError):
        return None


def timestamp() -> str:
    """Return the local time in ISO 8601, with seconds and time zone."""
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
