"""Callback `RunReport`, which keeps the record of a run and writes its report as an HTML page.

`runs.reader` reads the record, and `reports.page` renders the page.
"""

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
from opsd_lightning.callbacks.kept_skills import KeptSkills
from opsd_lightning.callbacks.schedule import newly_logged
from opsd_lightning.distributed.collectives import run_on_all_ranks
from opsd_lightning.evaluation.evaluator import Records
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.prompts.online_contexts import read_attempts
from opsd_lightning.reports.html import check_extension
from opsd_lightning.reports.page import write_report
from opsd_lightning.runs.reader import RECORD_FOLDER, read_complete_lines
from opsd_lightning.runs.record import (
    CHECKPOINT_ID,
    Record,
    check_record,
    class_path_of,
    describe_object,
    device_summary,
    git_commit,
    is_unfinished,
    launch_command,
    library_versions,
    timestamp,
)
from opsd_lightning.runs.resuming import starts_with_validation
from opsd_lightning.runs.signals import Stopped
from opsd_lightning.types import PositiveInt, PromptBatch, Rollouts, checked
from opsd_lightning.utils.disk_errors import record_failure, record_success, write_failures
from opsd_lightning.utils.folders import check_page
from opsd_lightning.utils.loggers import log_page
from opsd_lightning.utils.redaction import redact, redact_arguments
from opsd_lightning.utils.terminal import safe_text, say

_MAX_CHARACTERS = 20_000  # of a completion in the record


@checked
class RunReport(Callback):
    """Callback that keeps a record of the run and writes its report as one HTML page.

    The report shows curves, accuracy against generated tokens, the skills of `KeptSkills`, completions before and after
    training, settings, versions and the command that repeats the run. It is written at validations, which takes at most 1 %
    of the run's time, and at the end, also of a run that failed or was interrupted. ``opsd report`` writes a report of
    several runs.

    The record is the folder ``record`` in the trainer's ``default_root_dir``. It holds ``run.json``, ``config.yaml``,
    ``metrics.jsonl`` (all steps and validations, independent of loggers), ``samples.jsonl`` and, with `KeptSkills`,
    ``skills.json``, without the secrets of settings and messages (see `redaction`). A resumed run continues its record. A
    record of another run is renamed to ``record-1``, ``record-2``, ... first. A run that resumes from an earlier checkpoint
    than the newest leaves a copy of the record under such a name. If the disk is full, training continues, and ``run.json``
    lists the files that could not be written. With ``fast_dev_run`` nothing is written.

    Args:
        path: Path of the page, relative to the trainer's ``default_root_dir``. W&B, MLflow, Comet and LitLogger also get the
            page at the end.
        questions: Number of validation questions whose completions are kept at each validation, at least 1. They are the
            first ones of the validation set. Without validation, completions of the first and the last training step are
            kept.

    Example::

        >>> from opsd_lightning import CollapseGuard, RunReport, write_report
        >>> callbacks = [CollapseGuard(), RunReport(path="report.html", questions=4)]  # RunReport last

        After two runs, compare them with ``write_report(["runs/a", "runs/b"], "both.html")``.
    """

    #: True for callbacks that write to ``default_root_dir`` in ``fit``. `runs.lock` allows one such run at a time.
    writes_to_root = True

    #: True for callbacks that need logged metrics.
    reads_metrics = True

    def __init__(self, path: str = "report.html", questions: PositiveInt = 8) -> None:
        check_extension(path, "RunReport")
        self.path, self.questions = path, questions
        #: Command line of the run, set by `cli.command.OPSDCLI`. None for a run that was started from Python.
        self.arguments: list[str] | None = None
        self._record: Record | None = None
        self._loaded: str | None = None  # identifier of the record in the checkpoint that the run resumes from
        self._start: int | None = None  # optimizer steps before this start
        self._ended: tuple[str, str, list[str]] | None = None
        # The last step, which is written once all hooks have logged their metrics.
        self._pending: tuple[int, float, int, dict[str, Tensor]] | None = None
        self._seen: dict[str, Tensor] = {}
        self._samples: list[dict[str, Any]] = []
        self._graded = 0
        self._next_page = 0.0
        self._first: tuple[int, PromptBatch, Rollouts] | None = None
        self._last: tuple[int, PromptBatch, Rollouts] | None = None

    # -- hooks. All ranks read metrics, since reading can reduce them over ranks. Only the first rank writes. ------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._loaded = None
        if stage == "fit":
            run_on_all_ranks(lambda: self._check(trainer) if trainer.is_global_zero else None)

    def _check(self, trainer: Trainer) -> None:
        root = Path(trainer.default_root_dir)
        check_record(root / RECORD_FOLDER)
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
        self._begin(trainer, pl_module)  # try again if the disk was full
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
        found = _first_completions(outputs)
        self._graded += len(found)
        self._samples += found[: self.questions - len(self._samples)]

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "fit" and not trainer.sanity_checking:
            self._validated(trainer, pl_module, dict(trainer.callback_metrics))

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Metrics of some batches are not comparable with later validations, but completions are.
        is_complete = trainer.num_sanity_val_steps == float("inf")
        metrics = dict(trainer.callback_metrics)
        self._validated(trainer, pl_module, metrics if is_complete else {})

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # The record must contain all steps of the checkpoint, from which the run can resume.
        self._flush(trainer.callback_metrics)
        if self._record is not None:
            checkpoint[CHECKPOINT_ID] = self._record.checkpoint(trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._flush(trainer.callback_metrics)

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        # After all on_fit_end hooks, so that the page can link the files of other callbacks.
        if stage == "fit" and self._record is not None:
            stopped = any(isinstance(callback, CollapseGuard) and callback.stopped for callback in _callbacks(trainer))
            idle = pl_module.idle.verdict if isinstance(pl_module, PolicyModule) else None
            self._end(trainer, pl_module, "stopped" if stopped else "idle" if idle else "finished", idle or "")

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # The earlier run ended after its last checkpoint but before it closed its record. Close it now: no step is left.
        if (
            self._record is None
            and trainer.global_step
            and is_unfinished(Path(trainer.default_root_dir) / RECORD_FOLDER, trainer.global_step)
        ):
            self._begin(trainer, pl_module)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        if self._record is None:
            return
        self._flush(None)
        interrupted = isinstance(exception, (KeyboardInterrupt, Stopped))
        reason = safe_text(f"{type(exception).__name__}: {exception}")[:600]
        if interrupted:
            reason = exception.signal_name if isinstance(exception, Stopped) else "SIGINT"
        self._end(trainer, pl_module, "interrupted" if interrupted else "failed", reason)

    # -- the record --------------------------------------------------------------------------------------------------------

    def _begin(self, trainer: Trainer, module: LightningModule) -> None:
        if self._record is not None or not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        if self._start is None:
            self._start = trainer.global_step
        folder = Path(trainer.default_root_dir) / RECORD_FOLDER
        try:
            self._record = Record(
                folder,
                self._start,
                starts_with_validation(trainer),
                self._loaded,
                lambda name, error: record_failure(trainer, str(folder / name), error),
            )
        except OSError as error:
            record_failure(trainer, str(folder), error)
            return
        saved = next((c for c in _callbacks(trainer) if isinstance(c, SaveConfigCallback)), None)
        start = {
            "command": None if self.arguments is None else launch_command() + redact_arguments(self.arguments),
            "time": timestamp(),
            "step": trainer.global_step,
            "seed": getattr(module, "seed", None),
            "folder": _current_folder(),
            "devices": device_summary(trainer.strategy.root_device, trainer.world_size),
            "processes": trainer.world_size,
            "versions": library_versions(),
            "git": git_commit(),
        }
        logs = [str(Path(log.log_dir).resolve()) for log in trainer.loggers if log.log_dir]
        self._record.start(start, logs, _settings(trainer, module, saved))

    def _flush(self, metrics: Mapping[str, Tensor] | None) -> None:
        """Write the last step.

        Args:
            metrics: Metrics logged until now. None for those that were logged when the step ended.
        """
        if self._record is None or self._pending is None:
            return
        (step, seconds, tokens, known), self._pending = self._pending, None
        values = self._fresh(known if metrics is None else metrics)
        values = {name: value for name, value in values.items() if not name.startswith("val/")}
        self._record.metrics("train", step, seconds, tokens, values)

    def _fresh(self, metrics: Mapping[str, Tensor]) -> dict[str, float]:
        """Return the values that were logged since the previous call."""
        new = newly_logged(metrics, self._seen)
        if not new:
            return {}
        # One synchronization with the device instead of one per metric.
        numbers = torch.stack([value.detach().double().reshape(()).cpu() for value in new.values()]).tolist()
        return dict(zip(new, numbers, strict=True))

    def _validated(self, trainer: Trainer, module: LightningModule, metrics: Mapping[str, Tensor]) -> None:
        if self._record is None:
            return
        if values := self._fresh(metrics):
            if self._graded and trainer.world_size == 1:  # with several processes, each counts only its own questions
                values["val/questions"] = self._graded
            tokens = int(getattr(module, "tokens_generated", 0))
            self._record.metrics("val", trainer.global_step, self._record.seconds(), tokens, values)
        if self._samples:
            self._record.samples("val", trainer.global_step, self._samples)
        self._keep_skills(trainer)
        if time.monotonic() >= self._next_page:
            self._page(trainer)

    def _end(self, trainer: Trainer, module: Any, status: str, reason: str) -> None:
        assert self._record is not None
        unwritten_files: dict[str, str] = {}
        try:
            kinds = {line["kind"] for line in read_complete_lines(self._record.folder / "samples.jsonl")}
            if "val" not in kinds:
                self._keep_training_samples(module, "train" not in kinds)
            elif "train" in kinds:  # from an earlier start that ended before its first validation
                self._record.drop_training_samples()
            guards = [callback for callback in _callbacks(trainer) if isinstance(callback, CollapseGuard)]
            self._ended = status, reason, [safe_text(text) for guard in guards for text in guard.messages]
            self._keep_skills(trainer)
            unwritten_files = self._unwritten(trainer)
            self._record.end(*self._ended, unwritten_files)
        except Exception as error:  # must not hide the error that ended the run
            warnings.warn(f"RunReport could not record the end of the run: {safe_text(repr(error))}", stacklevel=2)
        page = self._page(trainer)
        if self._ended is not None and unwritten_files != self._unwritten(trainer):  # the page was or was not written
            self._record.end(*self._ended, self._unwritten(trainer))
        if page is not None:
            say(f"The report of the run is in {page}")
            try:
                log_page(trainer.loggers, "run_report", page, trainer.global_step)
            except Exception as error:
                warnings.warn(f"RunReport could not log {page} to a logger: {safe_text(repr(error))}", stacklevel=2)
        self._record = None

    def _keep_skills(self, trainer: Trainer) -> None:
        """Write the history of `KeptSkills` to the record."""
        assert self._record is not None
        history = [entry for c in _callbacks(trainer) if isinstance(c, KeptSkills) for entry in c.history]
        if history:
            self._record.skills(history)

    def _unwritten(self, trainer: Trainer) -> dict[str, str]:
        assert self._record is not None
        found = write_failures([trainer, *trainer.loggers])  # the record itself keeps track of its own files
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
                    "reference": attempts.grader.shown_reference(batch.examples[row // n]),
                    "completion": attempts.texts[row],
                    "answer": attempts.answers[row],
                    "correct": attempts.correct[row] if attempts.grader.grades_completions else None,
                    "score": attempts.grades[row].score if attempts.grader.grades_completions else None,
                    "completion_tokens": len(completion),
                    "truncated": not shown.terminated[row],
                }
                for row, completion in enumerate(shown.completions)
            ]
            self._record.samples("train", step, _first_completions({"student": records}))

    def _page(self, trainer: Trainer) -> Path | None:
        assert self._record is not None
        start = time.monotonic()
        try:
            page = write_report([self._record.folder], Path(trainer.default_root_dir) / self.path)
            self._next_page = start + 100 * (time.monotonic() - start)  # at most 1 % of the run's time
            record_success(trainer, self.path)
            return page
        except Exception as error:  # a full disk must not end a run
            record_failure(trainer, self.path, error)
            self._next_page = start + 100 * (time.monotonic() - start)
            return None


def _current_folder() -> str | None:
    try:
        return os.getcwd()
    except FileNotFoundError:  # the folder was removed
        return None


def _callbacks(trainer: Trainer) -> list[Callback]:
    return trainer.callbacks  # type: ignore[attr-defined,no-any-return]


def _first_completions(records: Records | Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return the student's first completion of each question, with the number of correct completions."""
    questions: list[dict[str, Any]] = []
    for record in records.get("student", []):
        if record["sample"] == 0:
            kept = {key: value for key, value in record.items() if key not in ("sample", "vote")}
            kept["completion"] = kept["completion"][:_MAX_CHARACTERS]
            questions.append(kept | {"samples": 0, "right": 0})
        questions[-1]["samples"] += 1
        questions[-1]["right"] += bool(record["correct"])
    return questions


def _settings(trainer: Trainer, module: Any, saved: SaveConfigCallback | None) -> str:
    """Return the settings as YAML, without secrets.

    Args:
        trainer: Trainer of the run.
        module: Module of the run.
        saved: Lightning's callback with the parsed command line. None for a run that was started from Python, whose settings
            are read from the attributes of its parts.
    """
    import yaml

    if saved is not None:
        found = yaml.safe_load(saved.parser.dump(saved.config, skip_none=False, skip_validation=True))
    else:
        parts = ("policy", "teacher", "objective", "context", "rollouts", "sampling", "max_grad_norm", "token_budget")
        model = {name: getattr(module, name, None) for name in (*parts, "updates_per_batch", "seed")}
        evaluator = getattr(module, "evaluator", None)
        model |= {"eval_sampling": getattr(evaluator, "sampling", None), "grader": getattr(evaluator, "grader", None)}
        names = ("max_steps", "max_epochs", "precision", "num_nodes", "num_devices", "default_root_dir")
        found = {
            "model": {"class_path": class_path_of(module), "init_args": describe_object(model)},
            "data": describe_object(getattr(trainer, "datamodule", None)),
            "trainer": describe_object({name: getattr(trainer, name, None) for name in names})
            | {"strategy": type(trainer.strategy).__name__, "callbacks": [type(c).__name__ for c in _callbacks(trainer)]},
        }
    return str(yaml.safe_dump(redact(found, whole=True), sort_keys=False, allow_unicode=True))
