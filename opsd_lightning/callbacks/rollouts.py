"""Rollouts written to loggers and files."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info

from opsd_lightning.callbacks.progress import print_metrics
from opsd_lightning.distributed.collectives import from_rank_zero, of_every_rank, together
from opsd_lightning.distributed.replicas import replica
from opsd_lightning.evaluation.evaluator import Records
from opsd_lightning.evaluation.store import Results, identity
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.runs import lock as run_lock
from opsd_lightning.runs.reader import RECORD
from opsd_lightning.runs.record import CHECKPOINT_ID, is_newest, is_of_another_run
from opsd_lightning.types import PositiveInt, PromptBatch, UserError, checked
from opsd_lightning.utils.csv_tables import append_rows, begin, check_table
from opsd_lightning.utils.disk_errors import survived
from opsd_lightning.utils.loggers import log_table
from opsd_lightning.utils.terminal import say


@checked
class RolloutTable(Callback):
    """Writes some of a step's rollouts to ``rollouts.csv`` and to whatever loggers there are.

    How each logger shows it stands in ``utils/loggers.py``. With ``fast_dev_run`` no file is written.

    Args:
        every_n_steps: Optimizer steps from one table to the next, at least 1. With ``updates_per_batch`` a table is of the
            first batch that ends at a multiple or has passed one.
        rows: Completions in a table, at least 1.
        path: The file, relative to the trainer's ``default_root_dir``. A run that goes on appends to it, without rows of
            steps that it makes again. A new run moves the table of an earlier one to ``rollouts-1.csv`` and so on, as does
            one that goes on from a checkpoint of another run; one that goes on from an earlier checkpoint keeps a copy
            there. Texts that a spreadsheet would take for formulas have an apostrophe in front (see `csv_tables`).
    """

    #: Whether it writes to ``default_root_dir`` in a fit, of which `runs.lock` lets one write there at a time.
    writes_to_root = True

    COLUMNS = ("step", "question", "completion", "tokens", "truncated", "forward_kl", "first_token_forward_kl")

    def __init__(self, every_n_steps: PositiveInt = 10, rows: PositiveInt = 4, path: str = "rollouts.csv") -> None:
        self.every_n_steps, self.rows, self.path = every_n_steps, rows, path
        self._passed = 0  # multiples of every_n_steps so far
        self._waiting: list[list[Any]] = []  # rows that could not be written yet
        self._branches = True  # whether the run goes on from another checkpoint than the newest
        self._begins = False  # whether that is of another run

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self._waiting, self._branches, self._begins = [], True, False
        if stage == "fit":
            path = Path(trainer.default_root_dir) / self.path
            together(lambda: check_table(path, self.COLUMNS, "trainer.callbacks.path") if trainer.is_global_zero else None)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Before the record of the earlier start is touched.
        record, identifier = Path(trainer.default_root_dir) / RECORD, checkpoint.get(CHECKPOINT_ID)
        self._branches, self._begins = not is_newest(record, identifier), is_of_another_run(record, identifier)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._passed = trainer.global_step // self.every_n_steps
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        paths = [Path(trainer.default_root_dir) / self.path]
        paths += [Path(logger.log_dir) / "rollouts.csv" for logger in trainer.loggers if isinstance(logger, CSVLogger)]
        for path in paths:
            with survived(trainer, str(path)):
                begin(path, self.COLUMNS, 0 if self._begins else trainer.global_step, self._branches)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: PromptBatch, batch_idx: int
    ) -> None:
        assert isinstance(pl_module, PolicyModule)
        before, self._passed = self._passed, trainer.global_step // self.every_n_steps
        if not trainer.is_global_zero or self._passed == before or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        rollouts, divergence = outputs["rollouts"], outputs["measured"].get("forward_kl", [])
        table: list[list[Any]] = []
        for index in range(min(self.rows, len(rollouts.completions))):
            completion = rollouts.completions[index]
            kl = divergence[index] if divergence else torch.zeros(0)
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
        self._waiting += table
        self._write(trainer)
        log_table(trainer.loggers, "rollouts", self.COLUMNS, table, trainer.global_step)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._write(trainer)

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        self._write(trainer)

    def _write(self, trainer: Trainer) -> None:
        path = Path(trainer.default_root_dir) / self.path
        if self._waiting:
            with survived(trainer, str(path)):
                append_rows(path, self.COLUMNS, self._waiting)
                self._waiting = []


class RolloutWriter(Callback):
    """Writes the graded completions of ``predict`` and ``test`` to JSON Lines files, one completion a line, as they come.

    A run that was interrupted goes on where it stopped: batches that are on disk are not sampled again. They are found by
    what decides them (weights, questions, prompts, sampling, seed, engine, grader, number of ranks): with anything else a
    new folder is begun, beside the old one. At the end of ``test`` it prints the metrics. With ``fast_dev_run`` nothing is
    written.

    Args:
        folder: Where ``predict.jsonl`` or ``test.jsonl`` of the last finished run goes, and ``results/`` with a folder for
            each evaluation, relative to the trainer's ``default_root_dir``.
        resume: Take what an earlier run of the same evaluation left. If not, it is thrown away.
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

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("test/")}
        if trainer.is_global_zero:
            print_metrics({name.removeprefix("test/"): value for name, value in values.items()})
        self._end(trainer, pl_module, values)

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._end(trainer, pl_module, None)

    def on_exception(self, trainer: Trainer, pl_module: Any, exception: BaseException) -> None:
        if self.results is not None:
            self.results, pl_module.evaluator.finished = None, {}
            self._release(trainer)

    def _begin(self, trainer: Trainer, module: Any, stage: str, loader: Any) -> None:
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        batches = list(loader)
        if not all(isinstance(batch, PromptBatch) and len(batch.indices) == len(batch.examples) for batch in batches):
            raise UserError("RolloutWriter needs batches that know their questions' places: use OPSDDataModule")
        evaluator = module.evaluator
        roles = ["student", "teacher"] if stage == "test" and evaluator.teacher is not None else ["student"]
        root = Path(trainer.default_root_dir) / self.folder
        results = self.results = Results(root, stage, identity(module, batches, str(trainer.precision)))
        lock = results.folder.with_name(f".{results.folder.name}.lock")

        def create() -> list[str]:
            run_lock.hold_file(lock, results.folder, "writer.folder", trainer)
            return results.create(self.resume)

        self._lock = lock
        for line in from_rank_zero(create):
            rank_zero_info(line)
        results.remove_incomplete_line(replica(trainer)[0])
        evaluator.finished = results.finished(batches, roles, evaluator.sampling.n)
        rank_zero_info(f"Results are in {results.folder}: {len(evaluator.finished)} of {len(batches)} batches are finished")

    def _append(self, trainer: Trainer, module: Any, records: Records, batch_idx: int) -> None:
        rank, replicas = replica(trainer)
        # Ranks that split the layers among them have the same completions: the first of them writes.
        writes = trainer.global_rank % (trainer.world_size // replicas) == 0
        if writes and self.results is not None and batch_idx not in module.evaluator.finished:
            self.results.append(rank, records)

    def _end(self, trainer: Trainer, module: Any, metrics: dict[str, float] | None) -> None:
        results, self.results, module.evaluator.finished = self.results, None, {}
        if results is None:
            return
        of_every_rank(None)  # all have written
        path = from_rank_zero(lambda: results.join(metrics))
        self._release(trainer)
        if trainer.is_global_zero:
            say(f"Graded completions are in {path} and {results.folder}")

    def _release(self, trainer: Trainer) -> None:
        if self._lock is not None:
            run_lock.release(trainer, self._lock)
