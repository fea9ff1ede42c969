"""The callback that keeps a run's record and makes a page of it: `RunReport`. Reading: `runs.reader`. The page: `page`."""

from __future__ import annotations

import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback
from torch import Tensor

from opsd_lightning.callbacks.collapse_guard import CollapseGuard
from opsd_lightning.callbacks.schedule import newly_logged
from opsd_lightning.distributed.collectives import together
from opsd_lightning.evaluation.evaluator import Records
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.prompts.online_contexts import read_attempts
from opsd_lightning.reports.page import write_report
from opsd_lightning.runs.reader import RECORD, read_lines
from opsd_lightning.runs.record import (
    CHECKPOINT_ID,
    Record,
    check_record,
    commit,
    described,
    devices,
    is_open,
    launcher,
    now,
    path_of,
    versions,
)
from opsd_lightning.runs.resuming import validates_first
from opsd_lightning.runs.signals import Stopped
from opsd_lightning.types import PositiveInt, PromptBatch, Rollouts, UserError, checked
from opsd_lightning.utils.disk_errors import clear, note, unwritten
from opsd_lightning.utils.folders import check_page
from opsd_lightning.utils.loggers import log_page
from opsd_lightning.utils.redaction import redact, redact_arguments
from opsd_lightning.utils.terminal import message, say

_LONGEST_TEXT = 20_000  # characters of a completion that are kept


@checked
class RunReport(Callback):
    """Keeps a record of the run and makes one HTML page of it: curves, accuracy against generated tokens, completions before
    and after, settings, versions and the command to repeat it.

    The record is the folder ``record`` in the trainer's ``default_root_dir``: ``run.json``, ``config.yaml``,
    ``metrics.jsonl`` (every step and validation, whatever loggers there are) and ``samples.jsonl``. A resumed run goes on in
    it; the record of another run that is there already is moved to ``record-1`` and so on, and a run that goes on from an
    earlier checkpoint than the newest leaves a copy of the record there. Where the disk is full, training goes on, and
    ``run.json`` names at the end the files that could not be written. The page is made at
    the end, also of a run that failed or was interrupted, and at validations, for a hundredth of the run's time at most.
    ``opsd report`` makes one of several runs. With ``fast_dev_run`` nothing is written. Secrets of
    settings and messages are left out (`redaction`).

    Args:
        path: The page, relative to the trainer's ``default_root_dir``; W&B and MLflow get it as well at the end.
        questions: How many validation questions' completions are kept at every validation, at least 1: the first of the
            validation set. Without validation, completions of the first and of the last training step.
    """

    #: Whether it writes to ``default_root_dir`` in a fit, of which `runs.lock` lets one write there at a time.
    writes_to_root = True

    #: Whether it has no use without logged metrics.
    reads_metrics = True

    def __init__(self, path: str = "report.html", questions: PositiveInt = 8) -> None:
        if not path.endswith((".html", ".htm")):
            raise UserError(f"RunReport: path is {path!r}, which is no page: let it end in .html")
        self.path, self.questions = path, questions
        #: The command line of the run, set by `cli.command.OPSDCLI`; None for a run that Python started.
        self.arguments: list[str] | None = None
        self._record: Record | None = None
        self._loaded: str | None = None  # the record's identifier in the checkpoint that the run goes on from
        self._start: int | None = None  # optimizer steps made before this start
        self._ended: tuple[str, str, list[str]] | None = None
        self._pending: tuple[int, float, int, dict[str, Tensor]] | None = (
            None  # the last step: until later hooks have logged
        )
        self._seen: dict[str, Tensor] = {}
        self._samples: list[dict[str, Any]] = []
        self._graded = 0
        self._next_page = 0.0
        self._first: tuple[int, PromptBatch, Rollouts] | None = None
        self._last: tuple[int, PromptBatch, Rollouts] | None = None

    # -- hooks: metrics are read on every rank, since reading may reduce them; only global zero writes ------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None
        if stage == "fit":
            together(lambda: self._check(trainer) if trainer.is_global_zero else None)

    def _check(self, trainer: Trainer) -> None:
        root = Path(trainer.default_root_dir)
        check_record(root / RECORD)
        check_page(root / self.path, "trainer.callbacks.path")

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._loaded = checkpoint.get(CHECKPOINT_ID)

    def on_fit_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._record = self._pending = self._first = self._last = None
        self._seen, self._samples, self._graded = {}, [], 0
        self._next_page, self._ended, self._start = 0.0, None, None

    def on_sanity_check_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module)

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self._begin(trainer, pl_module)  # again, where the disk was full
        self._flush(trainer.callback_metrics)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        metrics = dict(trainer.callback_metrics)
        if self._record is None:
            return
        tokens = int(getattr(pl_module, "tokens_generated", 0))
        self._pending = trainer.global_step, self._record.seconds(), tokens, metrics
        rollouts = outputs["rollouts"] if isinstance(outputs, Mapping) and "rollouts" in outputs else None
        if rollouts is not None and rollouts.sampled:
            self._last = trainer.global_step, batch, rollouts
            self._first = self._first or self._last

    def on_validation_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit":
            self._flush(trainer.callback_metrics)
            self._samples, self._graded = [], 0

    def on_validation_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if self._record is None or trainer.state.fn != "fit" or not isinstance(outputs, Mapping):
            return
        found = _of_questions(outputs)
        self._graded += len(found)
        self._samples += found[: self.questions - len(self._samples)]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated(trainer, pl_module, dict(trainer.callback_metrics))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Of some batches only, its metrics would not compare with later ones; its completions do.
        whole = trainer.num_sanity_val_steps == float("inf")
        metrics = dict(trainer.callback_metrics)
        self._validated(trainer, pl_module, metrics if whole else {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The record never knows less than a checkpoint, from which the run may go on.
        self._flush(trainer.callback_metrics)
        if self._record is not None:
            checkpoint[CHECKPOINT_ID] = self._record.checkpoint(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer.callback_metrics)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # After every on_fit_end: what other callbacks leave there can be linked.
        if stage == "fit" and self._record is not None:
            stopped = any(isinstance(callback, CollapseGuard) and callback.stopped for callback in _callbacks(trainer))
            idle = pl_module.idle.verdict if isinstance(pl_module, PolicyModule) else None
            self._end(trainer, pl_module, "stopped" if stopped else "idle" if idle else "finished", idle or "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that ended after its last checkpoint, before its record did: there was nothing left to train.
        if (
            self._record is None
            and trainer.global_step
            and is_open(Path(trainer.default_root_dir) / RECORD, trainer.global_step)
        ):
            self._begin(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._record is None:
            return
        self._flush(None)
        interrupted = isinstance(exception, (KeyboardInterrupt, Stopped))
        reason = message(f"{type(exception).__name__}: {exception}")[:600]
        if interrupted:
            reason = exception.signal_name if isinstance(exception, Stopped) else "SIGINT"
        self._end(trainer, pl_module, "interrupted" if interrupted else "failed", reason)

    # -- the record --------------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        if self._record is not None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._start is None:
            self._start = trainer.global_step
        folder = Path(trainer.default_root_dir) / RECORD
        try:
            self._record = Record(
                folder,
                self._start,
                validates_first(trainer),
                self._loaded,
                lambda name, error: note(trainer, str(folder / name), error),
            )
        except OSError as error:
            note(trainer, str(folder), error)
            return
        saved = next((c for c in _callbacks(trainer) if isinstance(c, SaveConfigCallback)), None)
        start = {
            "command": None if self.arguments is None else launcher() + redact_arguments(self.arguments),
            "time": now(),
            "step": trainer.global_step,
            "seed": getattr(module, "seed", None),
            "folder": _current_folder(),
            "devices": devices(trainer.strategy.root_device, trainer.world_size),
            "processes": trainer.world_size,
            "versions": versions(),
            "git": commit(),
        }
        logs = [str(Path(log.log_dir).resolve()) for log in trainer.loggers if log.log_dir]
        self._record.start(start, logs, _settings(trainer, module, saved))

    def _flush(self, metrics: Mapping[str, Tensor] | None) -> None:
        """Write the last step, with what was logged of it until now; with what was known at its end where None."""
        if self._record is None or self._pending is None:
            return
        (step, seconds, tokens, known), self._pending = self._pending, None
        values = self._fresh(known if metrics is None else metrics)
        values = {name: value for name, value in values.items() if not name.startswith("val/")}
        self._record.metrics("train", step, seconds, tokens, values)

    def _fresh(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """What was logged since the last time."""
        new = newly_logged(metrics, self._seen)
        if not new:
            return {}
        # One wait for the device, not one a metric.
        numbers = torch.stack([value.detach().double().reshape(()).cpu() for value in new.values()]).tolist()
        return dict(zip(new, numbers, strict=True))

    def _validated(self, trainer: Trainer, module: LightningModule, metrics: Mapping[str, Tensor]) -> None:
        if self._record is None:
            return
        if values := self._fresh(metrics):
            if self._graded and trainer.world_size == 1:  # of several processes, each knows its own questions alone
                values["val/questions"] = self._graded
            tokens = int(getattr(module, "tokens_generated", 0))
            self._record.metrics("val", trainer.global_step, self._record.seconds(), tokens, values)
        if self._samples:
            self._record.samples("val", trainer.global_step, self._samples)
        if time.monotonic() >= self._next_page:
            self._page(trainer)

    def _end(self, trainer: Trainer, module: Any, status: str, reason: str) -> None:
        assert self._record is not None
        told: dict[str, str] = {}
        try:
            kinds = {line["kind"] for line in read_lines(self._record.folder / "samples.jsonl")}
            if "val" not in kinds:
                self._keep_training_samples(module, "train" not in kinds)
            elif "train" in kinds:  # of a run that was stopped before its first validation
                self._record.drop_training_samples()
            guards = [callback for callback in _callbacks(trainer) if isinstance(callback, CollapseGuard)]
            self._ended = status, reason, [message(text) for guard in guards for text in guard.said]
            told = self._unwritten(trainer)
            self._record.end(*self._ended, told)
        except Exception as error:  # what ended the run is more important
            warnings.warn(f"RunReport: the end of the run could not be recorded ({message(repr(error))})", stacklevel=2)
        page = self._page(trainer)
        if self._ended is not None and told != self._unwritten(trainer):  # the page came late, or did not
            self._record.end(*self._ended, self._unwritten(trainer))
        if page is not None:
            say(f"The report of the run is in {page}")
            try:
                log_page(trainer.loggers, "run_report", page, trainer.global_step)
            except Exception as error:
                warnings.warn(f"RunReport: a logger did not take {page} ({message(repr(error))})", stacklevel=2)
        self._record = None

    def _unwritten(self, trainer: Trainer) -> dict[str, str]:
        assert self._record is not None
        found = unwritten([trainer, *trainer.loggers])  # of the record's own files it knows better itself
        return {name: reason for name, reason in found.items() if Path(name).parent != self._record.folder}

    def _keep_training_samples(self, module: Any, with_first: bool) -> None:
        if not isinstance(module, PolicyModule) or self._first is None or self._last is None or self._record is None:
            return
        several = with_first and self._first[0] != self._last[0]
        for step, batch, rollouts in [self._first, self._last] if several else [self._last]:
            n, count = rollouts.n, self.questions
            shown = rollouts._replace(
                completions=rollouts.completions[: count * n], terminated=rollouts.terminated[: count * n]
            )
            attempts = read_attempts(module.tokenizer, module.evaluator.grader, batch, shown)
            records = [
                {
                    "index": None,
                    "sample": row % n,
                    "question": batch.examples[row // n].question,
                    "reference": batch.examples[row // n].answer,
                    "completion": attempts.texts[row],
                    "answer": attempts.answers[row],
                    "correct": attempts.correct[row],
                    "completion_tokens": len(completion),
                    "truncated": not shown.terminated[row],
                }
                for row, completion in enumerate(shown.completions)
            ]
            self._record.samples("train", step, _of_questions({"student": records}))

    def _page(self, trainer: Trainer) -> Path | None:
        assert self._record is not None
        start = time.monotonic()
        try:
            page = write_report([self._record.folder], Path(trainer.default_root_dir) / self.path)
            self._next_page = start + 100 * (time.monotonic() - start)  # a hundredth of the run's time at most
            clear(trainer, self.path)
            return page
        except Exception as error:  # a full disk must not end a run
            note(trainer, self.path, error)
            self._next_page = start + 100 * (time.monotonic() - start)
            return None


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # it was removed
        return None


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def _of_questions(records: Records | Mapping[str, Any]) -> list[dict[str, Any]]:
    """The student's first completion of each question, and how many of the question's are right."""
    questions: list[dict[str, Any]] = []
    for record in records.get("student", []):
        if record["sample"] == 0:
            kept = {key: value for key, value in record.items() if key not in ("sample", "vote")}
            kept["completion"] = kept["completion"][:_LONGEST_TEXT]
            questions.append(kept | {"samples": 0, "right": 0})
        questions[-1]["samples"] += 1
        questions[-1]["right"] += bool(record["correct"])
    return questions


def _settings(trainer: Trainer, module: Any, saved: SaveConfigCallback | None) -> str:
    """The settings as YAML, without secrets: what the command line was parsed to; else what the parts say of themselves."""
    import yaml

    if saved is not None:
        found = yaml.safe_load(saved.parser.dump(saved.config, skip_none=False))
    else:
        parts = ("policy", "teacher", "objective", "context", "rollouts", "sampling", "max_grad_norm", "token_budget")
        model = {name: getattr(module, name, None) for name in (*parts, "updates_per_batch", "seed")}
        evaluator = getattr(module, "evaluator", None)
        model |= {"eval_sampling": getattr(evaluator, "sampling", None), "grader": getattr(evaluator, "grader", None)}
        names = ("max_steps", "max_epochs", "precision", "num_nodes", "num_devices", "default_root_dir")
        found = {
            "model": {"class_path": path_of(module), "init_args": described(model)},
            "data": described(getattr(trainer, "datamodule", None)),
            "trainer": described({name: getattr(trainer, name, None) for name in names})
            | {"strategy": type(trainer.strategy).__name__, "callbacks": [type(c).__name__ for c in _callbacks(trainer)]},
        }
    return str(yaml.safe_dump(redact(found, whole=True), sort_keys=False, allow_unicode=True))
