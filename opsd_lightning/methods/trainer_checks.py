"""Refusals, before training, of the trainer's settings and callbacks that would not do here what they are called.

Optimization is manual, data loaders are this package's own, and an optimizer step is a whole batch: some of Lightning's
settings and callbacks then have no effect, or another one. A callback that chooses by a metric is checked for its name and
for the direction in which it is better.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterator
from typing import Any

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
    WeightAveraging,
)
from lightning.pytorch.utilities import rank_zero_warn

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.evaluation.accuracy import pass_sizes
from opsd_lightning.evaluation.evaluator import EvaluatedModule
from opsd_lightning.evaluation.metric_directions import better
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import is_remote

# Packages whose modules and callbacks log nothing but what is known here.
_KNOWN_PACKAGES = {
    "opsd_lightning",
    "lightning",
    "lightning_fabric",
    "pytorch_lightning",
    "torch",
    "builtins",
    "abc",
    "typing",
}

_UNFIT: dict[type[Any], tuple[str, str]] = {
    StochasticWeightAveraging: (
        "sets the rate by the epoch and adds a last epoch without backward passes, which manual optimization overrules",
        "Leave it out. EMATeacher averages the adapter, and AdapterExport writes the best of the checkpoints",
    ),
    WeightAveraging: (
        "puts the averaged weights, the base model's included, in the place of the adapter in checkpoints",
        "Leave it out. EMATeacher averages the adapter",
    ),
    GradientAccumulationScheduler: (
        "has no effect: one training step is one optimizer step",
        "Leave it out, and set data.batch_size to the questions of an optimizer step",
    ),
    LearningRateFinder: ("needs automatic optimization", "Leave it out, and set model.optimizer.init_args.lr"),
    BatchSizeFinder: (
        "changes data.batch_size, the questions of an optimizer step, and so the result",
        "Leave it out, and lower model.token_budget where memory runs out",
    ),
    ModelPruning: ("renames the weights that a checkpoint holds", "Leave it out"),
    BackboneFinetuning: ("needs a module with a backbone", "Leave it out: the base model is frozen unless lora is null"),
}


def check_trainer(trainer: Trainer, module: EvaluatedModule, data: Any = None) -> None:
    """Refuse a fit whose trainer or callbacks would not do what they say.

    Args:
        trainer: With its callbacks.
        module: The method.
        data: The data module. Defaults to the one attached to the trainer, if any.

    Raises:
        ConfigError: The first problem.
    """
    data = data or getattr(trainer, "datamodule", None)
    for problem in trainer_problems(trainer, module, data):
        raise problem
    for problem in late_validations(trainer, module, data):
        rank_zero_warn(str(problem))


def trainer_problems(trainer: Trainer, module: EvaluatedModule, data: Any) -> Iterator[ConfigError]:
    """Yield every problem that `check_trainer` would raise."""
    if trainer.gradient_clip_algorithm == "value":
        yield ConfigError(
            "gradients are clipped by their norm alone here",
            "trainer.gradient_clip_algorithm",
            "Leave it out, and set model.max_grad_norm",
        )
    if trainer.reload_dataloaders_every_n_epochs and isinstance(data, OPSDDataModule):  # type: ignore[attr-defined]
        yield ConfigError(
            "data are read once, and a loader that is made anew begins with the order of the first epoch again",
            "trainer.reload_dataloaders_every_n_epochs",
            "Leave it out",
        )
    if trainer.max_steps == 0:
        yield ConfigError("nothing would train", "trainer.max_steps", "Set it to 1 or more, or to -1 for no limit")
    if trainer.limit_train_batches == 0:
        yield ConfigError("nothing would train", "trainer.limit_train_batches", "Set it above 0")
    validates = _validates(trainer, data)
    if validates and (found := _interval_problem(trainer, data)) is not None:
        yield found
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for kind, (problem, fix) in _UNFIT.items():
            if isinstance(callback, kind):
                yield ConfigError(f"{name} {problem}", "trainer.callbacks", fix)
        if trainer.barebones and getattr(callback, "reads_metrics", False):
            text = f"nothing is logged, and {name} reads what is logged"
            yield ConfigError(text, "trainer.barebones", "Set it to false, or leave the callback out")
        for metric in getattr(callback, "watched_metrics", ()):
            if metric not in logged_names(trainer, module) and not _may_log_more(trainer, module, callback, metric):
                text = f"{name} has a rule on {metric}, which nothing in this run logs"
                yield ConfigError(text, "trainer.callbacks.rules", _nearest(metric, logged_names(trainer, module)))
        saves = isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False)
        if saves and trainer.world_size > 1:
            yield ConfigError(
                f"{name} saves where an exception is raised, and one that a single rank raises would leave the save waiting "
                "for the others",
                "trainer.callbacks.save_on_exception" if isinstance(callback, ModelCheckpoint) else "trainer.callbacks",
                "Leave it out. A run that a signal ends saves by itself",
            )
        if isinstance(callback, ModelCheckpoint):
            yield from _checkpoint_problems(callback, trainer, module)
        found = monitor_problem(callback, trainer, module, validates)
        if found is None and _is_of_validation(callback):
            found = _every_batch_problem(callback, trainer)
        if found is not None:
            yield found


def late_validations(trainer: Trainer, module: EvaluatedModule, data: Any) -> Iterator[ConfigError]:
    """Yield callbacks that wait for a validation beyond the run's end. A short trial of a recipe has some."""
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if _is_of_validation(callback) and (found := _timing_problem(callback, trainer, module, data)) is not None:
            yield found


def monitor_problem(callback: Any, trainer: Trainer, module: EvaluatedModule, validates: bool) -> ConfigError | None:
    """Return what is wrong with the metric that a callback chooses by, or with its mode; None where nothing is.

    Args:
        callback: Any callback; one with an attribute ``monitor`` is looked at, and its ``mode``, if any.
        trainer: Its other callbacks may log the metric.
        module: The method.
        validates: Whether there is anything to validate on.
    """
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str):
        return None
    name, n = type(callback).__name__, module.evaluator.sampling.n
    if monitor.startswith("val/") and not validates:
        return ConfigError(f"{name} monitors {monitor}, and there is no validation", "data.val", "Give it a source")
    found = re.fullmatch(r"val/(teacher_)?(avg|pass|maj)@(\d+)(_se|_se_samples)?", monitor)
    if found:
        sizes = pass_sizes(n) if found[2] == "pass" else [n]
        if int(found[3]) not in sizes:
            text = f"{name} monitors {monitor}, and validation samples {n} completions of a question"
            fix = f"Set it to {found[3]}, or monitor val/{found[1] or ''}{found[2]}@{n}"
            return ConfigError(text, "model.eval_sampling.n", fix)
        if found[1] and module.evaluator.teacher is None:
            text = f"{name} monitors {monitor}, and the teacher is not graded"
            return ConfigError(text, "model.evaluate_teacher", "Set it to true")
    names = logged_names(trainer, module) | ({"step", "epoch"} if isinstance(callback, ModelCheckpoint) else set())
    if monitor not in names and not _may_log_more(trainer, module, callback, monitor):
        text = f"{name} monitors {monitor}, which nothing in this run logs"
        return ConfigError(text, "trainer.callbacks.monitor", _nearest(monitor, names))
    mode, direction = getattr(callback, "mode", None), better(monitor)
    if mode in ("min", "max") and direction is not None and mode != direction:
        worse = "keeps and exports the worst" if isinstance(callback, ModelCheckpoint) else "takes the worst for the best"
        more = "more" if direction == "max" else "less"
        text = f"{name} monitors {monitor}, of which {more} is better, with mode {mode} (the default is min): it {worse}"
        return ConfigError(text, "trainer.callbacks.mode", f"Set it to {direction}")
    return None


def logged_names(trainer: Trainer, module: EvaluatedModule) -> set[str]:
    """Names of all metrics that a fit logs, by the module and by those callbacks that have a method ``logged_names``."""
    found = set(module.logged_names())
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (told := getattr(callback, "logged_names", None)) is not None:
            found |= set(told(module))
    return found


def _nearest(metric: str, names: set[str]) -> str:
    near = difflib.get_close_matches(metric, sorted(names), n=3, cutoff=0.4) or ["train/loss"]
    return f"Set it to one that is logged, such as {', '.join(near)}"


def _may_log_more(trainer: Trainer, module: EvaluatedModule, callback: Any, monitor: str) -> bool:
    """Return whether a module or a callback from outside these packages could log the metric: its names are not known."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(other, LearningRateMonitor) for other in callbacks) and monitor.startswith("lr-"):
        return True
    replaced = any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())
    if any(name.startswith("on_") for kind in _foreign(callback) for name in vars(kind)):
        return True  # in a hook of its own
    others = [other for other in callbacks if other is not callback]
    return replaced or any(isinstance(part, LambdaCallback) or _foreign(part) for part in (module, *others))


def _foreign(part: Any) -> list[type]:
    """The classes of an object that come from outside these packages."""
    return [kind for kind in type(part).__mro__ if kind.__module__.partition(".")[0] not in _KNOWN_PACKAGES]


def _is_of_validation(callback: Any) -> bool:
    return isinstance(monitor := getattr(callback, "monitor", None), str) and monitor.startswith("val/")


def _validates(trainer: Trainer, data: Any) -> bool:
    if trainer.limit_val_batches == 0:
        return False
    rows, sources = getattr(data, "rows", None), getattr(data, "sources", None)
    if not isinstance(rows, dict) or not isinstance(sources, dict):  # another data module: nobody knows
        return True
    return "val" in rows or sources.get("val") is not None


def _checkpoint_problems(callback: ModelCheckpoint, trainer: Trainer, module: EvaluatedModule) -> Iterator[ConfigError]:
    every, updates = int(callback._every_n_train_steps or 0), int(getattr(module, "updates_per_batch", 1))
    if is_remote(folder := callback.dirpath or trainer.default_root_dir):
        yield ConfigError(
            f"checkpoints are written to {folder}, and no command loads a checkpoint from a remote folder",
            "trainer.callbacks.dirpath" if callback.dirpath else "trainer.default_root_dir",
            "Write to a local or shared folder, and copy it",
        )
    if callback._train_time_interval is not None:
        yield ConfigError(
            "ModelCheckpoint never saves by time where optimization is manual, as it is here",
            "trainer.callbacks.train_time_interval",
            "Set every_n_train_steps instead",
        )
    if every and every % updates and updates % every:
        yield ConfigError(
            f"ModelCheckpoint would save every {every} optimizer steps, and they come {updates} at a time "
            "(model.updates_per_batch)",
            "trainer.callbacks.every_n_train_steps",
            f"Set it to a multiple of {updates}",
        )
    if not _is_of_validation(callback):
        return
    if every:
        yield ConfigError(
            f"ModelCheckpoint monitors {callback.monitor} and saves every {every} steps, before that step's validation: "
            "it would rate weights by the validation before",
            "trainer.callbacks.every_n_train_steps",
            "Leave it out: without it a checkpoint is saved after each validation (trainer.val_check_interval)",
        )
    at_epochs = trainer.check_val_every_n_epoch == 1 and _interval(trainer) == 1.0
    if callback._save_on_train_epoch_end and not at_epochs:
        yield ConfigError(
            f"ModelCheckpoint monitors {callback.monitor} and saves at the end of each epoch, where there may be no "
            "validation: it would rate weights by an earlier one",
            "trainer.callbacks.save_on_train_epoch_end",
            "Leave it out",
        )


def _every_batch_problem(callback: Any, trainer: Trainer) -> ConfigError | None:
    """Return why a callback sees only some validations; None where it sees all."""
    interval, every = _interval(trainer), trainer.check_val_every_n_epoch
    if not (isinstance(interval, int) and interval == 1 and every == 1) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return ConfigError(
        f"{type(callback).__name__} takes the validation after every batch (val_check_interval: 1) for one at the end of an "
        "epoch, and would see that one alone",
        "trainer.check_val_every_n_epoch",
        "Set it to null",
    )


def _timing_problem(callback: Any, trainer: Trainer, module: EvaluatedModule, data: Any) -> ConfigError | None:
    """Return why a callback never sees its validation metric; None where it does, or where the rows are not read yet."""
    if trainer.fast_dev_run or not isinstance(callback, (ModelCheckpoint, EarlyStopping)):  # type: ignore[attr-defined]
        return None
    name, interval, every = type(callback).__name__, _interval(trainer), trainer.check_val_every_n_epoch
    batches = _epoch_batches(trainer, data)
    steps, updates = trainer.max_steps, int(getattr(module, "updates_per_batch", 1))
    if batches is None or steps <= 0 or not isinstance(interval, (int, float)):
        return None
    if every is None:
        first = interval if isinstance(interval, int) else None
    else:
        within = interval if isinstance(interval, int) else max(int(batches * interval), 1)
        first = batches * (every - 1) + min(within, batches)
    made = -(-steps // updates)
    if first is not None and made < first:
        return ConfigError(
            f"{name} monitors {callback.monitor}, and the first validation would come after {first} batches, where the run "
            f"has only {made} (trainer.max_steps {steps})",
            "trainer.val_check_interval",
            f"Set it to {made} or less, and trainer.check_val_every_n_epoch to null",
        )
    return None


def _interval(trainer: Trainer) -> Any:
    """Batches, or share of an epoch, between validations; None where it is a time."""
    return getattr(trainer, "val_check_interval", None)


def _interval_problem(trainer: Trainer, data: Any) -> ConfigError | None:
    interval, batches = _interval(trainer), _epoch_batches(trainer, data)
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or batches is None or interval <= batches:
        return None
    return ConfigError(
        f"val_check_interval is {interval}, and an epoch has {batches} batches",
        "trainer.check_val_every_n_epoch",
        "Set it to null to count batches over epochs, or lower trainer.val_check_interval",
    )


def _epoch_batches(trainer: Trainer, data: Any) -> int | None:
    """Training batches of an epoch; None where the rows have not been read yet."""
    if not isinstance(data, OPSDDataModule) or "train" not in data.rows:
        return None
    batches = len(data.rows["train"].examples) // (data.batch_size * trainer.world_size)
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
