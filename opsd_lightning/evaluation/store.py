"""Store of graded completions on disk, so that an interrupted evaluation resumes.

The name of a folder has a digest of everything that determines the completions. An evaluation with other weights, prompts,
questions, sampling settings or graders has another folder. Each rank appends its batches to its own file. A finished run
merges these files.
"""

from __future__ import annotations

import inspect
import json
import os
import re
import shutil
import sys
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from functools import partial
from importlib.metadata import version
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from opsd_lightning import __version__
from opsd_lightning.distributed.collectives import all_gather_object
from opsd_lightning.evaluation.evaluator import Evaluator, Records
from opsd_lightning.models.fingerprint import digest, plain
from opsd_lightning.models.policy import base_of, device_of, eos_ids
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.types import ConfigError, PromptBatch
from opsd_lightning.utils.files import append, atomic_write
from opsd_lightning.utils.redaction import redact

_SETTINGS, _JOINED, _METRICS = "settings.json", "completions.jsonl", "metrics.json"
# Names of all files that are written into an evaluation's folder.
_OWN = re.compile(r"settings\.json|completions\.jsonl|metrics\.json|rank\d+\.jsonl|\.[a-z0-9]+\.jsonl?\.partial")
_DEEPEST = 6  # parts of parts of a grader
# Keys that every line of completions has.
_RECORD = {"role", "index", "sample", "question", "completion", "correct"}


def identity(module: Any, batches: Sequence[PromptBatch], precision: str) -> dict[str, Any]:
    """Return everything that determines the completions of an evaluation and their grades. Every rank must call it.

    Args:
        module: An `EvaluatedModule` with loaded weights.
        batches: This rank's batches.
        precision: The trainer's precision.
    """
    evaluator: Evaluator = module.evaluator
    engine: RolloutEngine = module.rollouts
    settings = {name: value for name, value in _public(engine).items() if name not in engine.neutral_settings}
    questions = digest(
        repr((batch.student, batch.teacher, [row.contents for row in batch.examples], list(batch.indices), batch.counted))
        for batch in batches
    )
    return {
        "weights": all_gather_object(digest(_contents(module.model))),
        "model": _architecture(module.model),
        "questions": all_gather_object(questions),  # also depends on how they are split into batches and over ranks
        "sampling": asdict(evaluator.sampling),
        "seed": module.seed,
        "engine": {"class": type(engine).__name__} | settings,
        "grader": described(evaluator.grader),
        "teacher": None if evaluator.teacher is None else type(evaluator.teacher).__name__,
        "eos_ids": sorted(eos_ids(module.model)),
        "device": device_of(module.model).type,
        "precision": precision,
        "version": {"opsd_lightning": __version__} | {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _public(part: object) -> dict[str, Any]:
    return {name: value for name, value in vars(part).items() if not name.startswith("_")}


def described(value: Any, depth: int = 0) -> Any:
    """Return an object, such as a grader, as its class and its settings, with a digest of code outside this package.

    Settings are public attributes. A class outside this package may also keep the arguments ``name`` of its ``__init__`` as
    ``_name``.
    """
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if isinstance(value, Mapping):
        return {str(key): described(each, depth + 1) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [described(each, depth + 1) for each in value]
    if isinstance(value, (set, frozenset)):
        return sorted((described(each, depth + 1) for each in value), key=repr)
    if isinstance(value, (re.Pattern, range, Path, bytes)):
        return repr(value)
    if isinstance(value, partial):
        return described({"partial": value.func, "args": value.args} | value.keywords, depth + 1)
    kind = value if isinstance(value, (type, FunctionType)) else type(value)
    name = f"{kind.__module__}.{kind.__qualname__}"
    code = {} if name.startswith("opsd_lightning.") else {"code": _code(kind)}
    if kind is value or isinstance(value, (Tensor, nn.Module)) or not hasattr(value, "__dict__") or depth > _DEEPEST:
        return {"class": name} | code
    found = _public(value)
    if code:
        parameters = inspect.signature(kind).parameters
        found |= {key[1:]: each for key, each in vars(value).items() if key.startswith("_") and key[1:] in parameters}
    short = {"class": name if code else kind.__name__}
    return short | code | {key: described(each, depth + 1) for key, each in found.items()}


def _code(kind: Any) -> str:
    """Return a digest of the modules that define a class and its base classes outside this package, or a function.

    Of modules without a source, such as notebooks, it is a digest of the compiled functions.
    """
    parts: list[str] = []
    for each in getattr(kind, "__mro__", [kind]):
        top = each.__module__.partition(".")[0]
        if top == "opsd_lightning" or top in sys.stdlib_module_names - {"__main__"}:
            continue
        try:
            parts.append(inspect.getsource(sys.modules[each.__module__]))
        except (KeyError, OSError, TypeError):
            functions = (
                [each] if isinstance(each, FunctionType) else [f for f in vars(each).values() if hasattr(f, "__code__")]
            )
            parts += [repr(_compiled(function.__code__)) for function in functions]
    return digest(parts)[:12]


def _compiled(code: CodeType) -> tuple[Any, ...]:
    """Return what a code object does, without its place in a file and addresses in memory."""
    constants = [_compiled(each) if isinstance(each, CodeType) else repr(each) for each in code.co_consts]
    return code.co_code, code.co_names, code.co_varnames, constants


def _architecture(model: nn.Module) -> dict[str, Any]:
    """Return the configurations of the model and of its adapters, without paths."""
    base = base_of(model)  # type: ignore[arg-type]
    found = {"attention": base.config._attn_implementation, "config": base.config.to_dict()}
    found |= {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    paths = {"_name_or_path", "base_model_name_or_path", "revision"}
    return {name: plain(value, paths) for name, value in found.items()}


def _contents(model: nn.Module) -> Iterable[str | bytes | memoryview]:
    """Yield names and bytes of all weights: base model, quantization, adapters. Of sharded weights, this rank's shards."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            local = (value.to_local() if isinstance(value, DTensor) else value).detach().cpu().contiguous()
            yield f"{name} {local.dtype} {tuple(local.shape)}"
            yield local.reshape(-1).view(torch.uint8).numpy().data


class Results:
    """The files of one evaluation, in ``<root>/results/<stage>-<key>/``.

    ``settings.json`` has the settings behind the key. During a run each rank appends one line per completion to
    ``rank0.jsonl``, ``rank1.jsonl`` and so on. A finished run replaces these by ``completions.jsonl``, in the order of the
    questions, and writes ``metrics.json``.

    Args:
        root: Folder of ``results``. With several machines, in a file system that all machines share.
        stage: ``test`` or ``predict``.
        settings: Everything that determines the results (`identity`).
    """

    def __init__(self, root: Path, stage: str, settings: Mapping[str, Any]) -> None:
        self.root, self.stage = root, stage
        plain_settings = json.loads(json.dumps(settings, default=lambda value: type(value).__name__))
        key = digest([json.dumps(plain_settings, sort_keys=True)])[:12]
        self.settings: dict[str, Any] = redact(plain_settings)
        self.folder = root / "results" / f"{stage}-{key}"

    def create(self, resume: bool) -> list[str]:
        """Create the folder. Only the first rank calls it, before other ranks read.

        Args:
            resume: If False, delete completions of an earlier run with the same settings.

        Returns:
            Messages for the user about unfinished evaluations with other settings.

        Raises:
            ConfigError: The folder is a link, or ``<root>/<stage>.jsonl`` is not from an evaluation.
        """
        if self.folder.is_symlink():
            raise ConfigError(
                f"{self.folder} is a symbolic link", "writer.folder", "Choose another folder, or remove the link"
            )
        newest = self.root / f"{self.stage}.jsonl"
        if not _is_of_evaluation(newest):
            problem = f"{newest} is not from an evaluation and would be overwritten"
            raise ConfigError(
                problem, "writer.folder", "Choose another folder (or trainer.default_root_dir), or move the file"
            )
        if not resume and self.folder.exists():
            for path in self.folder.iterdir():
                if _OWN.fullmatch(path.name) and not path.is_dir():
                    path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        atomic_write(self.folder / _SETTINGS, json.dumps(self.settings, indent=2), durable=True)
        told = []
        for other in sorted(self.folder.parent.glob(f"{self.stage}-*/{_SETTINGS}")):
            if other.parent != self.folder and not (other.parent / _JOINED).exists():
                theirs = json.loads(other.read_text(encoding="utf-8"))
                differ = [name for name in self.settings if theirs.get(name) != self.settings[name]]
                told.append(
                    f"Unfinished results in {other.parent} are of another evaluation, with other {', '.join(differ)}"
                )
        return told

    def read(self) -> Records:
        """Return all records of each role, in the order of questions and samples. Incomplete lines are ignored.

        Raises:
            ConfigError: This machine does not see the folder.
        """
        if not (self.folder / _SETTINGS).exists():
            raise ConfigError(
                f"the first rank made {self.folder}, and other ranks do not see it",
                "trainer.default_root_dir",
                "Set it to a folder in a file system that all machines share",
            )
        found: dict[tuple[str, int, int], dict[str, Any]] = {}
        for path in self._files():
            for line in path.read_bytes().splitlines(keepends=True):
                if line.endswith(b"\n"):
                    record = json.loads(line)
                    found[record["role"], record["index"], record["sample"]] = record
        roles: Records = {}
        for key in sorted(found):
            roles.setdefault(key[0], []).append(found[key])
        return roles

    def finished(self, batches: Sequence[PromptBatch], roles: Sequence[str], n: int) -> dict[int, Records]:
        """Return the records of this rank's finished batches, by number of the batch. Every rank must call it.

        A batch counts as finished if the batch with its number is finished on every rank.
        """
        records = self.read()
        by_question: dict[tuple[str, int], list[dict[str, Any]]] = {}
        for role in roles:
            for record in records.get(role, []):
                by_question.setdefault((role, record["index"]), []).append(record)
        here: dict[int, Records] = {}
        for number, batch in enumerate(batches):
            own = [index for index, counted in zip(batch.indices, batch.counted, strict=True) if counted]
            groups = {role: [by_question.get((role, index), []) for index in own] for role in roles}
            if all(len(group) == n for role in roles for group in groups[role]):
                here[number] = {role: [r for group in groups[role] for r in group] for role in roles}
        everywhere = set.intersection(*all_gather_object(set(here)))
        return {number: here[number] for number in sorted(everywhere)}

    def remove_incomplete_line(self, rank: int) -> None:
        """Remove an incomplete last line, which an interrupted run left, from a rank's file."""
        path = self.folder / f"rank{rank}.jsonl"
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def append(self, rank: int, records: Records) -> None:
        """Append a batch's records to a rank's file, and wait until they are on disk."""
        lines = [json.dumps({"role": role} | r, ensure_ascii=False) + "\n" for role, rows in records.items() for r in rows]
        append(self.folder / f"rank{rank}.jsonl", "".join(lines).encode("utf-8", "backslashreplace"), durable=True)

    def join(self, metrics: Mapping[str, float] | None = None) -> Path:
        """Merge all ranks' records into one file. Only one rank calls it, after all ranks have finished.

        Args:
            metrics: Metrics for ``metrics.json``.

        Returns:
            ``<root>/<stage>.jsonl``, a link to the file or a copy of it.
        """
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for records in self.read().values() for record in records]
        old = [path for path in self._files() if path.name != _JOINED]
        atomic_write(self.folder / _JOINED, "".join(lines), durable=True)
        for path in old:
            path.unlink()
        if metrics is not None:
            atomic_write(self.folder / _METRICS, json.dumps(metrics, indent=2), durable=True)
        newest = self.root / f"{self.stage}.jsonl"
        with tempfile.TemporaryDirectory(prefix=f".{newest.name}.partial-", dir=self.root) as folder:
            temporary = Path(folder) / newest.name
            try:
                os.link(self.folder / _JOINED, temporary)
            except OSError:  # a file system without hard links
                shutil.copyfile(self.folder / _JOINED, temporary)
            os.replace(temporary, newest)
        return newest

    def _files(self) -> list[Path]:
        return sorted(path for path in self.folder.glob("*.jsonl") if _OWN.fullmatch(path.name))


def _is_of_evaluation(path: Path) -> bool:
    """Return True if a file has completions of an evaluation, is empty or does not exist."""
    if not os.path.lexists(path):
        return True
    try:
        with path.open("rb") as file:
            line = file.readline(10**8)
        found = json.loads(line) if line else dict.fromkeys(_RECORD)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= _RECORD
