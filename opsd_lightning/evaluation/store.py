"""Graded completions on disk, batch by batch, so that an interrupted evaluation goes on where it stopped.

A folder is named by everything that decides the completions: other weights, prompts, questions, sampling or graders make
another folder, and never mix. Each rank appends to a file of its own; a finished run joins them.
"""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict
from importlib.metadata import version
from pathlib import Path
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
from opsd_lightning.types import ConfigError, PromptBatch, UserError
from opsd_lightning.utils.files import append, replace
from opsd_lightning.utils.redaction import redact

_SETTINGS, _JOINED, _METRICS = "settings.json", "completions.jsonl", "metrics.json"
# Every file that is written into an evaluation's folder; others in it are not ours.
_OWN = re.compile(r"settings\.json|completions\.jsonl|metrics\.json|rank\d+\.jsonl|\.[a-z0-9]+\.jsonl?\.partial")
# Keys of a line of completions.
_RECORD = {"role", "index", "sample", "question", "completion", "correct"}


def identity(module: Any, batches: Sequence[PromptBatch], precision: str) -> dict[str, Any]:
    """Everything that decides the completions of an evaluation and their grades. Every rank must ask.

    Args:
        module: An `OPSDModule` or one like it, its weights loaded.
        batches: This rank's batches.
        precision: The trainer's.
    """
    evaluator: Evaluator = module.evaluator
    engine: RolloutEngine = module.rollouts
    settings = {k: v for k, v in vars(engine).items() if not (k.startswith("_") or k in engine.neutral_settings)}
    questions = digest(
        repr((batch.student, batch.teacher, [example[:3] for example in batch.examples], list(batch.indices), batch.counted))
        for batch in batches
    )
    return {
        "weights": all_gather_object(digest(_contents(module.model))),
        "model": _architecture(module.model),
        "questions": all_gather_object(questions),  # texts, prompts, references, and their order over batches and ranks
        "sampling": asdict(evaluator.sampling),
        "seed": module.seed,
        "engine": {"class": type(engine).__name__} | settings,
        "grader": {"class": type(evaluator.grader).__name__} | asdict(evaluator.grader),
        "teacher": None if evaluator.teacher is None else type(evaluator.teacher).__name__,
        "eos_ids": sorted(eos_ids(module.model)),
        "device": device_of(module.model).type,
        "precision": precision,
        "version": {"opsd_lightning": __version__} | {name: version(name) for name in ("torch", "transformers", "peft")},
    }


def _architecture(model: nn.Module) -> dict[str, Any]:
    """What decides the logits beside the weights: the configurations of the model and of its adapters, without paths."""
    base = base_of(model)  # type: ignore[arg-type]
    found = {"attention": base.config._attn_implementation, "config": base.config.to_dict()}
    found |= {name: config.to_dict() for name, config in getattr(model, "peft_config", {}).items()}
    paths = {"_name_or_path", "base_model_name_or_path", "revision"}
    return {name: plain(value, paths) for name, value in found.items()}


def _contents(model: nn.Module) -> Iterable[str | bytes | memoryview]:
    """Names and bytes of all weights: base model, quantization and adapters; of a sharded one, this rank's part."""
    for name, value in sorted(model.state_dict().items()):
        if isinstance(value, Tensor):
            local = (value.to_local() if isinstance(value, DTensor) else value).detach().cpu().contiguous()
            yield f"{name} {local.dtype} {tuple(local.shape)}"
            yield local.reshape(-1).view(torch.uint8).numpy().data


class Results:
    """The files of one evaluation.

    ``<root>/results/<stage>-<key>/`` holds ``settings.json``, what the key stands for; ``rank0.jsonl`` ..., one completion a
    line, appended batch by batch; and in their place, when the run has finished, ``completions.jsonl`` in the order of the
    questions, and ``metrics.json``.

    Args:
        root: Where ``results`` is. With several machines, a file system that all of them share.
        stage: ``test`` or ``predict``.
        settings: What decides the results (`identity`).
    """

    def __init__(self, root: Path, stage: str, settings: Mapping[str, Any]) -> None:
        self.root, self.stage = root, stage
        plain_settings = json.loads(json.dumps(settings, default=lambda value: type(value).__name__))
        key = digest([json.dumps(plain_settings, sort_keys=True)])[:12]
        self.settings: dict[str, Any] = redact(plain_settings)
        self.folder = root / "results" / f"{stage}-{key}"

    def create(self, resume: bool) -> list[str]:
        """Make the folder; returns what to tell the user. For one rank alone, before the others read.

        Raises:
            ConfigError: The folder is a link, or ``<root>/<stage>.jsonl`` is not from an evaluation.
        """
        if self.folder.is_symlink():
            raise ConfigError(
                f"{self.folder} is a symbolic link", "writer.folder", "Choose another folder, or remove the link"
            )
        newest = self.root / f"{self.stage}.jsonl"
        if not _is_of_evaluation(newest):
            problem = f"{newest} is not from an evaluation, and would be overwritten"
            raise ConfigError(
                problem, "writer.folder", "Choose another folder (or trainer.default_root_dir), or move the file"
            )
        if not resume and self.folder.exists():
            for path in self.folder.iterdir():
                if _OWN.fullmatch(path.name) and not path.is_dir():
                    path.unlink()
        self.folder.mkdir(parents=True, exist_ok=True)
        replace(self.folder / _SETTINGS, json.dumps(self.settings, indent=2), lasting=True)
        told = []
        for other in sorted(self.folder.parent.glob(f"{self.stage}-*/{_SETTINGS}")):
            if other.parent != self.folder and not (other.parent / _JOINED).exists():
                theirs = json.loads(other.read_text(encoding="utf-8"))
                differ = [name for name in self.settings if theirs.get(name) != self.settings[name]]
                told.append(f"Unfinished results in {other.parent} are of another evaluation ({', '.join(differ)} differ)")
        return told

    def read(self) -> Records:
        """All records of each role, in the order of questions and samples. Lines that were not written to the end do not
        count.

        Raises:
            UserError: The folder cannot be seen from here.
        """
        if not (self.folder / _SETTINGS).exists():
            raise UserError(
                f"{self.folder} was made by the first rank but cannot be seen by all: set trainer.default_root_dir to a "
                "file system that all machines share"
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
        """The records of this rank's batches, by number, that are finished on every rank. Every rank must ask."""
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

    def mend(self, rank: int) -> None:
        """Take away the line that an interrupted run left half-written at the end of a rank's file."""
        path = self.folder / f"rank{rank}.jsonl"
        if path.exists():
            os.truncate(path, path.read_bytes().rfind(b"\n") + 1)

    def append(self, rank: int, records: Records) -> None:
        """Add a batch's records to a rank's file; they are on disk when this returns."""
        lines = [json.dumps({"role": role} | r, ensure_ascii=False) + "\n" for role, rows in records.items() for r in rows]
        append(self.folder / f"rank{rank}.jsonl", "".join(lines).encode("utf-8", "backslashreplace"), lasting=True)

    def join(self, metrics: Mapping[str, float] | None = None) -> Path:
        """Put all ranks' records into one file, also as ``<root>/<stage>.jsonl``, which it returns. For one rank alone, when
        all have ended."""
        lines = [json.dumps(record, ensure_ascii=False) + "\n" for records in self.read().values() for record in records]
        old = [path for path in self._files() if path.name != _JOINED]
        replace(self.folder / _JOINED, "".join(lines), lasting=True)
        for path in old:
            path.unlink()
        if metrics is not None:
            replace(self.folder / _METRICS, json.dumps(metrics, indent=2), lasting=True)
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
    """Return True for completions that an evaluation wrote, and where there is nothing that could be lost."""
    if not os.path.lexists(path):
        return True
    try:
        with path.open("rb") as file:
            line = file.readline(10**8)
        found = json.loads(line) if line else dict.fromkeys(_RECORD)
    except (OSError, ValueError, RecursionError):
        return False
    return isinstance(found, dict) and found.keys() >= _RECORD
