"""What happens beside training: the adapter's export, the table of rollouts, predictions on disk.

Each reads the outputs of the module's steps and the trainer's public state; none changes training.
"""

from __future__ import annotations

import os
import warnings
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities import rank_zero_info
from rich.console import Console
from rich.table import Table
from safetensors import SafetensorError
from torch import Tensor

from opsd_lightning import run_lock
from opsd_lightning.csv_tables import append_rows, begin, check_table
from opsd_lightning.disk_errors import survived
from opsd_lightning.evaluation import Records
from opsd_lightning.export import ADAPTER, MERGED, inputs_of, merge_adapter, write_adapter
from opsd_lightning.folders import Kept, check, free_name, place_of
from opsd_lightning.loggers import log_table
from opsd_lightning.record import CHECKPOINT_ID, is_newest, is_of_another_run
from opsd_lightning.results import Results, identity
from opsd_lightning.run_checks import outputs_of
from opsd_lightning.runs import RECORD
from opsd_lightning.serving import from_rank_zero, of_every_rank, together
from opsd_lightning.strategies import read_adapters, replica, whole
from opsd_lightning.terminal import marked, say
from opsd_lightning.training import PolicyModule
from opsd_lightning.types import ConfigError, PromptBatch, UserError


class AdapterExport(Callback):
    """At the end of ``fit``, writes the best adapter as a peft folder; in full fine-tuning the whole model and tokenizer.

    Best is what the first `ModelCheckpoint` with a ``monitor`` says; without one, the last.

    A folder that exists is replaced if it is empty or holds an earlier export and nothing else; another one is refused
    before training. A folder that can no longer be replaced at the end stays, and the export goes to ``NAME-1`` and so on
    beside it. With ``fast_dev_run`` nothing is written.

    Args:
        folder: Folder for the export, relative to the trainer's ``default_root_dir``.
        merged_folder: Folder for a full model with the adapter merged in. Defaults to none.
    """

    #: Whether it writes to ``default_root_dir`` in a fit, of which `run_lock` lets one write there at a time.
    writes_to_root = True

    def __init__(self, folder: str = "adapter", merged_folder: str | None = None) -> None:
        self.folder, self.merged_folder = folder, merged_folder

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage == "fit" and isinstance(pl_module, PolicyModule):
            together(lambda: self._check(trainer, pl_module) if trainer.is_global_zero else None)

    def _check(self, trainer: Trainer, module: PolicyModule) -> None:
        root, kept = Path(trainer.default_root_dir), self._kept(trainer, module)
        folder = check(root / self.folder, _SETTING, ADAPTER, kept)
        if self.merged_folder is not None and not module.policy.trains_all:
            setting = "trainer.callbacks.merged_folder"
            merged = check(root / self.merged_folder, setting, MERGED, [*kept, ("the adapter's folder", folder)])
            if merged in folder.parents or folder in merged.parents:
                raise ConfigError(f"{merged} and {folder} are inside each other", setting, "Choose another folder")

    def _kept(self, trainer: Trainer, module: PolicyModule) -> list[Kept]:
        checkpoint = trainer.ckpt_path
        given = [("the checkpoint", str(checkpoint))] if checkpoint is not None and Path(str(checkpoint)).exists() else []
        return [*outputs_of(trainer), *inputs_of(module.policy), *given]

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        if trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        best = next(
            (getattr(c, "best_model_path", "") for c in trainer.checkpoint_callbacks if getattr(c, "monitor", None)), ""
        )
        if best and not trainer.is_global_zero:
            return  # the file may lie on the first node alone
        # Every rank takes part in putting sharded weights together.
        found = read_adapters(best) if best else {key: whole(value) for key, value in pl_module.state_dict().items()}
        if not trainer.is_global_zero:
            return
        weights = {key.removeprefix("model."): value for key, value in found.items()}
        root = Path(trainer.default_root_dir)
        kept, policy = self._kept(trainer, pl_module), pl_module.policy
        tokenizer = pl_module.tokenizer if policy.trains_all else None
        folder = _written(
            root / self.folder,
            root,
            _SETTING,
            best,
            lambda folder: write_adapter(pl_module.model, folder, weights, tokenizer, _SETTING, kept),
        )
        what = "model" if policy.trains_all else "adapter"
        say(f"The {what} of {best or 'the last step'} is in {folder}")
        if self.merged_folder is not None and not policy.trains_all:
            setting, adapter = "trainer.callbacks.merged_folder", folder
            merged = _written(
                root / self.merged_folder,
                root,
                setting,
                best,
                lambda folder: merge_adapter(policy, adapter, folder, setting=setting, kept=kept),
            )
            say(f"The merged model is in {merged}")


_SETTING = "trainer.callbacks.folder"


def _written(folder: Path, root: Path, setting: str, checkpoint: str, write: Callable[[Path], Path]) -> Path:
    """Write an export; under another name where its folder cannot be replaced.

    Raises:
        UserError: The disk is full, or fails.
    """
    try:
        try:
            return write(folder)
        except (ConfigError, PermissionError) as error:
            if isinstance(error, ConfigError) and error.setting != setting:
                raise
            place = place_of(folder)
            inside = (
                place.parent.is_dir()
                and os.access(place.parent, os.W_OK)
                and place not in (root.resolve(), *root.resolve().parents)
            )
            other = free_name(place if inside else root.resolve() / "adapter")
            warnings.warn(f"AdapterExport: {error}. It is written to {other} instead", stacklevel=3)
            return write(other)
    except (OSError, SafetensorError) as error:
        where = checkpoint or "the run's checkpoints, if it wrote any"
        raise UserError(
            f"{setting}: {folder} could not be written ({error}). The earlier one stays; the trained weights are in {where}"
        ) from error


def due(trainer: Trainer, module: PolicyModule, every_n_steps: int) -> bool:
    """Before a batch's first update: whether its updates end at a multiple of so many optimizer steps or pass one.

    True for the first batch. By the step alone, so that every rank comes to the same.
    """
    before, after = trainer.global_step, trainer.global_step + module.updates_per_batch
    after = min(after, trainer.max_steps) if trainer.max_steps >= 0 else after
    return before == 0 or after // every_n_steps > before // every_n_steps


def newly_logged(metrics: Mapping[str, Any], seen: dict[str, Tensor]) -> dict[str, Tensor]:
    """The scalars that were logged since the last time: Lightning keeps the values of those that are logged now and then.

    Args:
        metrics: The trainer's ``callback_metrics``.
        seen: What was there the last time; held, so that the memory of a value is not used for another. Brought up to date.
    """
    new = {
        name: value
        for name, value in metrics.items()
        if isinstance(value, Tensor)
        and value.numel() == 1
        and (name not in seen or seen[name].data_ptr() != value.data_ptr())
    }
    seen |= new
    return new


class RolloutTable(Callback):
    """Writes some of a step's rollouts to ``rollouts.csv`` and to whatever loggers there are.

    How each logger shows it stands in ``loggers.py``. With ``fast_dev_run`` no file is written.

    Args:
        every_n_steps: Optimizer steps from one table to the next, at least 1. With ``updates_per_batch`` a table is of the
            first batch that ends at a multiple or has passed one.
        rows: Completions in a table, at least 1.
        path: The file, relative to the trainer's ``default_root_dir``. A run that goes on appends to it, without rows of
            steps that it makes again. A new run moves the table of an earlier one to ``rollouts-1.csv`` and so on, as does
            one that goes on from a checkpoint of another run; one that goes on from an earlier checkpoint keeps a copy
            there. Texts that a spreadsheet would take for formulas have an apostrophe in front (see `csv_tables`).
    """

    #: Whether it writes to ``default_root_dir`` in a fit, of which `run_lock` lets one write there at a time.
    writes_to_root = True

    COLUMNS = ("step", "question", "completion", "tokens", "truncated", "forward_kl", "first_token_forward_kl")

    def __init__(self, every_n_steps: PositiveInt = 10, rows: PositiveInt = 4, path: str = "rollouts.csv") -> None:
        self.every_n_steps, self.rows, self.path = PositiveInt(every_n_steps), PositiveInt(rows), path
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
        results.mend(replica(trainer)[0])
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


def print_metrics(values: Mapping[str, float]) -> None:
    """A table of an evaluation's metrics, by their names without the stage."""
    table = Table("", "value", "± over questions", "± over samples", title="One standard error each", title_justify="left")
    for name, value in values.items():
        if "_se" in name:
            continue
        label = marked(name.replace("_", " "))
        if "@" in name:
            errors = [values.get(f"{name}{error}") for error in ("_se", "_se_samples")]
            table.add_row(label, f"{value:.1%}", *("" if error is None else f"{error:.1%}" for error in errors))
        else:
            table.add_row(label, f"{value:.1%}" if name.endswith("fraction") else f"{value:.1f}", "", "")
    Console(width=100, emoji=False).print(table)


class ProgressLines(ProgressBar):
    """A progress bar in lines: one for each training step and each batch of an evaluation. For slow steps and for logs."""

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = {name: float(value) for name, value in trainer.callback_metrics.items()}
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        # What a method has of its own: OPSD the divergence, GRPO the reward, SFT neither.
        shown = {"forward KL": "forward_kl", "reward": "reward"}
        own = [f"{label} {now[f'train/{name}']:.4f}  " for label, name in shown.items() if f"train/{name}" in now]
        self._print(
            trainer,
            f"step {trainer.global_step}{of}  loss {now['train/loss']:.4f}  {''.join(own)}"
            f"{now['train/completion_tokens']:.1f} tokens a completion, {now['train/truncated_fraction']:.0%} truncated  "
            f"rollouts {now['time/rollout_seconds']:.0f} s, scoring {now['time/scoring_seconds']:.0f} s",
        )

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._batch(trainer, "validation", args[2], batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._batch(trainer, "test", args[2], trainer.num_test_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scores(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scores(trainer, "test")

    def _batch(self, trainer: Trainer, stage: str, index: int, batches: Sequence[float]) -> None:
        self._print(trainer, f"  {stage}: batch {index + 1}/{int(sum(batches))}")

    def _scores(self, trainer: Trainer, stage: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name.startswith(f"{stage}/") and "avg@" in name and "_se" not in name:
                error = float(trainer.callback_metrics[f"{name}_se"])
                self._print(trainer, f"  {name}: {float(value):.1%} ± {error:.1%} (standard error)")

    def _print(self, trainer: Trainer, line: str) -> None:
        if self.is_enabled and trainer.is_global_zero:
            say(line)

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        self.is_enabled = False


class BaselineEvaluation(Callback):
    """Logs the validation metrics of the untrained model as step 0.

    Lightning's sanity check already validates before training and then throws the numbers away; with
    ``num_sanity_val_steps: -1`` it sees the whole validation set, and this callback keeps what it found.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.val_dataloaders
        if loader is None or trainer.num_sanity_val_steps != float("inf"):
            warnings.warn(
                "BaselineEvaluation needs the whole validation set before training: set trainer.num_sanity_val_steps to -1",
                stacklevel=2,
            )
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=0)
