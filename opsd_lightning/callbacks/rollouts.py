"""Callbacks that write rollouts to loggers and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.trainer.states import TrainerFn
from lightning.pytorch.utilities import rank_zero_info

from opsd_lightning.callbacks.progress import print_metrics
from opsd_lightning.distributed.collectives import all_gather_object, run_on_all_ranks, run_on_rank_zero
from opsd_lightning.evaluation.evaluator import Records
from opsd_lightning.evaluation.store import Results, identity
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.runs import lock as run_lock
from opsd_lightning.runs.reader import RECORD_FOLDER
from opsd_lightning.runs.record import CHECKPOINT_ID, belongs_to_another_run, is_newest_checkpoint
from opsd_lightning.types import ConfigError, PositiveInt, PromptBatch, checked
from opsd_lightning.utils.csv_tables import append_rows, check_table, prepare_table
from opsd_lightning.utils.disk_errors import warn_on_write_error
from opsd_lightning.utils.loggers import log_table
from opsd_lightning.utils.terminal import say


@checked
class RolloutTable(Callback):
    """Callback that writes some rollouts of a step to ``rollouts.csv`` and to all loggers.

    ``utils/loggers.py`` describes the table of each logger. With ``fast_dev_run`` no file is written.

    A resumed run appends to the file and removes the rows of steps that it repeats. If it resumes from an earlier checkpoint
    than the newest one, it first copies the file to ``rollouts-1.csv``, ``rollouts-2.csv``, ... A new run renames the file
    of an earlier run in the same way, and so does a run that starts from a checkpoint of another run.

    Args:
        every_n_steps: Number of optimizer steps between tables, at least 1. With ``updates_per_batch`` above 1, the table is
            of the first batch whose updates reach or pass a multiple of this number.
        rows: Number of completions in a table, at least 1.
        path: Path of the file, relative to the trainer's ``default_root_dir``. Texts that a spreadsheet would read as
            formulas start with an apostrophe (see `csv_tables`).
    """

    #: True for callbacks that write to ``default_root_dir`` in ``fit``. `runs.lock` allows one such run at a time.
    writes_to_root = True

    COLUMNS = ("step", "question", "completion", "tokens", "truncated", "forward_kl", "first_token_forward_kl")

    def __init__(self, every_n_steps: PositiveInt = 10, rows: PositiveInt = 4, path: str = "rollouts.csv") -> None:
        self.every_n_steps, self.rows, self.path = every_n_steps, rows, path
        self._multiples = 0  # multiples of every_n_steps so far
        self._unwritten: list[list[Any]] = []  # rows that could not be written yet
        self._is_branch = True  # True if the run does not resume from the newest checkpoint
        self._is_new = False  # True if the checkpoint is of another run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._unwritten, self._is_branch, self._is_new = [], True, False
        if stage == "fit":
            path = Path(trainer.default_root_dir) / self.path
            run_on_all_ranks(
                lambda: check_table(path, self.COLUMNS, "trainer.callbacks.path") if trainer.is_global_zero else None
            )

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # In this hook, since RunReport changes the record later.
        record, identifier = Path(trainer.default_root_dir) / RECORD_FOLDER, checkpoint.get(CHECKPOINT_ID)
        self._is_branch, self._is_new = (
            not is_newest_checkpoint(record, identifier),
            belongs_to_another_run(record, identifier),
        )

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._multiples = trainer.global_step // self.every_n_steps
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        paths = [Path(trainer.default_root_dir) / self.path]
        paths += [Path(logger.log_dir) / "rollouts.csv" for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        for path in paths:
            with warn_on_write_error(trainer, str(path)):
                prepare_table(path, self.COLUMNS, 0 if self._is_new else trainer.global_step, self._is_branch)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        before, self._multiples = self._multiples, trainer.global_step // self.every_n_steps
        if not trainer.is_global_zero or self._multiples == before or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rollouts, divergence = outputs["rollouts"], outputs["measured"].get("forward_kl", [])
        table: list[list[Any]] = []
        for index in range(min(self.rows, len(rollouts.completions))):
            completion = rollouts.completions[index]
            kl = divergence[index] if divergence else torch.zeros(0, dtype=torch.float32)
            table.append(
                [
                    trainer.global_step,
                    batch.examples[index // rollouts.n].question,
                    pl_module.tokenizer.decode(completion),
                    len(completion),
                    not rollouts.terminated[index],
                    round(float(kl.mean()), 4) if len(kl) else "",
                    round(float(kl[0]), 4) if len(kl) else "",
                ]
            )
        self._unwritten += table
        self._write(trainer)
        log_table(trainer.loggers, "rollouts", self.COLUMNS, table, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        path = Path(trainer.default_root_dir) / self.path
        if self._unwritten:
            with warn_on_write_error(trainer, str(path)):
                append_rows(path, self.COLUMNS, self._unwritten)
                self._unwritten = []


class RolloutWriter(Callback):
    """Callback that writes graded completions of ``predict`` and ``test`` to JSON Lines files, one completion per line.

    Each batch is written as soon as it is finished. An interrupted evaluation resumes and does not sample finished batches
    again. This requires the same weights, questions, prompts, sampling, seed, engine, grader and number of ranks. Otherwise
    the evaluation starts in a new folder beside the old one. The code of a grader outside this package counts as well: the
    modules that define its class, its base classes and the objects that it holds. At the end of ``validate`` and
    ``test``, the metrics are printed. With ``fast_dev_run`` nothing is written.

    Args:
        folder: Folder for ``predict.jsonl`` or ``test.jsonl`` of the last finished evaluation and for ``results/``, which
            has a folder for each evaluation. Relative to the trainer's ``default_root_dir``.
        resume: If True, use the batches of an interrupted run of the same evaluation. If False, delete them.
    """

    def __init__(self, folder: str = ".", resume: bool = True) -> None:
        self.folder, self.resume = folder, resume
        self.results: Results | None = None
        self._lock: Path | None = None

    def on_test_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module, "test", trainer.test_dataloaders)

    def on_predict_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._begin(trainer, pl_module, "predict", trainer.predict_dataloaders)

    def on_test_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._append(trainer, pl_module, outputs, batch_idx)

    def on_predict_batch_end(
        self, trainer: Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        self._append(trainer, pl_module, {"student": outputs}, batch_idx)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.VALIDATING:
            self._print(trainer, pl_module, "val/")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, self._print(trainer, pl_module, "test/"))

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, None)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.results is not None:
            self.results, pl_module.evaluator.finished = None, {}
            self._release(trainer)

    def _print(self, trainer: Trainer, module: Any, prefix: str) -> dict[str, float]:
        """Print the metrics of a stage on the first rank, and return them. `KeptSkills` prints its own."""
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith(prefix)}
        if trainer.is_global_zero:
            shown = {name.removeprefix(prefix): value for name, value in values.items()}
            intervals = {name.removeprefix(prefix): ends for name, ends in module.evaluator.intervals.items()}
            print_metrics({name: value for name, value in shown.items() if not name.startswith("skills/")}, intervals)
        return values

    def _begin(self, trainer: Trainer, module: Any, stage: str, loader: Any) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        batches = list(loader)
        if not all(isinstance(batch, PromptBatch) and len(batch.indices) == len(batch.examples) for batch in batches):
            problem = "RolloutWriter needs the index of each question, and the batches have none"
            raise ConfigError(problem, "data", "Use OPSDDataModule")
        evaluator = module.evaluator
        roles = ["student", "teacher"] if stage == "test" and evaluator.teacher is not None else ["student"]
        root = Path(trainer.default_root_dir) / self.folder
        results = self.results = Results(root, stage, identity(module, batches, str(trainer.precision)))
        lock = results.folder.with_name(f".{results.folder.name}.lock")

        def create() -> list[str]:
            run_lock.lock_file(lock, results.folder, "writer.folder", trainer)
            return results.create(self.resume)

        self._lock = lock
        for line in run_on_rank_zero(create):
            rank_zero_info(line)
        results.remove_incomplete_line(trainer.global_rank)
        evaluator.finished = results.finished(batches, roles, evaluator.sampling.n)
        finished = f"{len(evaluator.finished)} of {len(batches)} batches are finished"
        rank_zero_info(f"Results are in {results.folder}: {finished}")

    def _append(self, trainer: Trainer, module: Any, records: Records, batch_idx: int) -> None:
        if self.results is not None and batch_idx not in module.evaluator.finished:
            self.results.append(trainer.global_rank, records)

    def _end(self, trainer: Trainer, module: Any, metrics: dict[str, float] | None) -> None:
        results, self.results, module.evaluator.finished = self.results, None, {}
        if results is None:
            return
        all_gather_object(None)  # wait until all ranks have written
        path = run_on_rank_zero(lambda: results.join(metrics))
        self._release(trainer)
        if trainer.is_global_zero:
            unsampled = metrics is not None and module.evaluator.demonstrations is not None
            say(f"{'Metrics are in' if unsampled else f'Graded completions are in {path} and'} {results.folder}")

    def _release(self, trainer: Trainer) -> None:
        if self._lock is not None:
            run_lock.release(trainer, self._lock)
