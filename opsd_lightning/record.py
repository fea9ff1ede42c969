"""Writing down a run: its record's files, and the facts of the machine and the settings that belong in it. See `runs`."""

from __future__ import annotations

import dataclasses
import json
import os
import platform
import shutil
import subprocess
import sys
import time
from collections.abc import Mapping
from datetime import UTC, datetime
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_lightning import __version__
from opsd_lightning.files import replace
from opsd_lightning.runs import read_lines


class Record:
    """The files of a record, and the clock of its run.

    Args:
        folder: Where they are. A record of another run in it is moved aside.
        step: Optimizer steps made when this start begins: above 0 for a resumed run.
    """

    def __init__(self, folder: Path, step: int) -> None:
        self.folder, self._started = folder, time.monotonic()
        lines = read_lines(folder / "metrics.jsonl")
        self.resumed = step > 0 and max((line["step"] for line in lines if line["kind"] == "train"), default=-1) >= step
        aside = next(path for n in range(1, 10**6) if not (path := folder.with_name(f"{folder.name}-{n}")).exists())
        if folder.exists() and not self.resumed:
            os.replace(folder, aside)
        elif self.resumed and self._read().get("status") in ("finished", "idle"):
            shutil.copytree(folder, aside)  # a branch off a finished run, whose own end is not thrown away
        folder.mkdir(parents=True, exist_ok=True)
        kept = [line for line in lines if line["step"] <= step] if self.resumed else []
        self._before = max((line["seconds"] for line in kept), default=0.0)
        if self.resumed:  # steps after the checkpoint are made again
            replace(folder / "metrics.jsonl", "".join(_line(line) for line in kept))
            samples = [line for line in read_lines(folder / "samples.jsonl") if line["step"] <= step]
            replace(folder / "samples.jsonl", "".join(_line(line) for line in samples))

    def seconds(self) -> float:
        """Since the first start, without pauses."""
        return round(self._before + time.monotonic() - self._started, 3)

    def start(self, start: dict[str, Any], logs: list[str], config: str) -> None:
        old = self._read() if self.resumed else {}
        self._info = {
            "starts": [*old.get("starts", []), start],
            "logs": sorted({*old.get("logs", []), *logs}),
            "status": "running",
            "reason": "",
            "warnings": [],
            "ended": None,
        }
        replace(self.folder / "config.yaml", config)
        self._write()

    def end(self, status: str, reason: str, warnings: list[str]) -> None:
        self._info |= {"status": status, "reason": reason, "warnings": warnings, "ended": now()}
        self._write()

    def metrics(self, kind: str, step: int, seconds: float, tokens: int, values: dict[str, float]) -> None:
        line = {"kind": kind, "step": step, "seconds": seconds, "tokens": tokens, "metrics": values}
        self._append("metrics.jsonl", line)

    def samples(self, kind: str, step: int, records: list[dict[str, Any]]) -> None:
        self._append("samples.jsonl", {"kind": kind, "step": step, "records": records})

    def _append(self, name: str, line: dict[str, Any]) -> None:
        with (self.folder / name).open("a", encoding="utf-8", errors="backslashreplace") as file:
            file.write(_line(line))

    def _read(self) -> dict[str, Any]:
        path = self.folder / "run.json"
        return dict(json.loads(path.read_text(encoding="utf-8"))) if path.exists() else {}

    def _write(self) -> None:
        replace(self.folder / "run.json", json.dumps(self._info, indent=2, ensure_ascii=False))


def described(value: Any, depth: int = 0) -> Any:
    """An object's plain settings, as the command line would write them."""
    if isinstance(value, bool) or value is None or (isinstance(value, (int, float, str)) and depth < 8):
        plain = (bool, int, float, str)
        return next((kind(value) for kind in plain if isinstance(value, kind)), None)
    if isinstance(value, Mapping):
        return {str(key): described(part, depth + 1) for key, part in list(value.items())[:200]}
    if isinstance(value, (list, tuple)):
        return [described(part, depth + 1) for part in value] if len(value) <= 50 else f"{len(value)} values"
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {field.name: described(getattr(value, field.name), depth + 1) for field in dataclasses.fields(value)}
    settings = vars(value) if depth < 6 and hasattr(value, "__dict__") and not callable(value) else {}
    kept = {name: part for name, part in settings.items() if not name.startswith("_") and _is_setting(part)}
    return {"class_path": path_of(value)} | ({"init_args": described(kept, depth + 1)} if kept else {})


def _is_setting(value: Any) -> bool:
    own = type(value).__module__.startswith("opsd_lightning.") and not isinstance(value, (Tensor, torch.nn.Module, tuple))
    return value is None or isinstance(value, (bool, int, float, str)) or own


def path_of(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def launcher() -> list[str]:
    """What stands before the arguments: `opsd`, under torchrun where that started the processes."""
    if "TORCHELASTIC_RUN_ID" not in os.environ:
        return ["opsd"]
    world, local = (int(os.environ.get(name, "1")) for name in ("WORLD_SIZE", "LOCAL_WORLD_SIZE"))
    nodes = ["--nnodes", str(world // local)] if world > local else []
    return ["torchrun", *nodes, "--nproc-per-node", str(local), "--no-python", "opsd"]


def devices(device: torch.device, count: int) -> str:
    """How many of which device."""
    if device.type == "cuda":
        return f"{count} x {torch.cuda.get_device_name(device)}"
    name = platform.processor() or platform.machine()
    threads = torch.get_num_threads()
    return f"{count} x {device.type} ({name}, {threads} thread{'s' * (threads > 1)})"


def versions() -> dict[str, str]:
    """Of this package, of those that decide its numbers, and of the system."""
    found = {"opsd_lightning": __version__, "python": sys.version.split()[0]}
    for name in ("torch", "lightning", "transformers", "peft", "bitsandbytes", "vllm"):
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found | {"system": platform.platform(terse=True)}


def commit() -> str | None:
    """The Git commit of the current folder, and whether files that it holds were changed since."""

    # A repository's own settings may name commands: its monitor, its hooks, and filters of files that changed.
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


def now() -> str:
    return datetime.now(UTC).astimezone().isoformat(timespec="seconds")


def _line(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False) + "\n"
