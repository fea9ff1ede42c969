"""Checks, before training, of the trainer's settings and callbacks.

Some of Lightning's settings and callbacks have no effect or another effect here, because optimization is manual, the data
module makes its own loaders, and one batch is one optimizer step or more. A callback that monitors a metric is checked for
the metric's name and for its mode.
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

# Packages in which `logged_names` covers every metric that a module or callback logs.
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

_UNSUPPORTED: dict[type[Any], tuple[str, str]] = {
    StochasticWeightAveraging: (
        "sets the learning rate by the epoch and adds an epoch without backward passes, which manual optimization ignores",
        "Leave it out. EMATeacher averages the adapter, and AdapterExport writes the best checkpoint",
    ),
    WeightAveraging: (
        "replaces the adapter in checkpoints by averages of all weights, including the base model",
        "Leave it out. EMATeacher averages the adapter",
    ),
    GradientAccumulationScheduler: (
        "has no effect: one training step is one optimizer step",
        "Leave it out, and set data.batch_size to the number of questions of an optimizer step",
    ),
    LearningRateFinder: ("needs automatic optimization", "Leave it out, and set model.optimizer.init_args.lr"),
    BatchSizeFinder: (
        "changes data.batch_size, the number of questions of an optimizer step, and so changes the result",
        "Leave it out, and lower model.token_budget if memory runs out",
    ),
    ModelPruning: ("renames the weights in checkpoints", "Leave it out"),
    BackboneFinetuning: (
        "needs a module with a backbone",
        "Leave it out. The base model is frozen unless model.policy.lora is null",
    ),
}


def check_trainer(trainer: Trainer, module: EvaluatedModule, data: Any = None) -> None:
    """Check that the trainer's settings and callbacks work with this package. Warn about validations that come too late.

    Args:
        trainer: The trainer with its callbacks.
        module: The method.
        data: The data module. Defaults to the trainer's data module, if any.

    Raises:
        ConfigError: A setting or a callback does not work. Only the first problem is raised.
    """
    data = data or getattr(trainer, "datamodule", None)
    for problem in trainer_problems(trainer, module, data):
        raise problem
    for problem in late_validations(trainer, module, data):
        rank_zero_warn(str(problem))


def trainer_problems(trainer: Trainer, module: EvaluatedModule, data: Any) -> Iterator[ConfigError]:
    """Yield the problems of which `check_trainer` raises the first."""
    if trainer.gradient_clip_algorithm == "value":
        yield ConfigError(
            "gradients can only be clipped by their norm",
            "trainer.gradient_clip_algorithm",
            "Leave it out, and set model.max_grad_norm",
        )
    if trainer.reload_dataloaders_every_n_epochs and isinstance(data, OPSDDataModule):  # type: ignore[attr-defined]
        yield ConfigError(
            "the data are read once, and a reloaded data loader would repeat the order of the first epoch",
            "trainer.reload_dataloaders_every_n_epochs",
            "Leave it out",
        )
    if trainer.max_steps == 0:
        yield ConfigError("nothing would be trained", "trainer.max_steps", "Set it to 1 or more, or to -1 for no limit")
    if trainer.limit_train_batches == 0:
        yield ConfigError("nothing would be trained", "trainer.limit_train_batches", "Set it above 0")
    try:
        module.rollouts.check(module.policy, str(trainer.precision), trainer.strategy.root_device)
    except ConfigError as error:
        yield error
    validates = _validates(trainer, data)
    if validates and (found := _interval_problem(trainer, data)) is not None:
        yield found
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        name = type(callback).__name__
        for kind, (problem, fix) in _UNSUPPORTED.items():
            if isinstance(callback, kind):
                yield ConfigError(f"{name} {problem}", "trainer.callbacks", fix)
        if trainer.barebones and getattr(callback, "reads_metrics", False):
            text = f"no metrics are logged, and {name} needs them"
            yield ConfigError(text, "trainer.barebones", f"Set it to false, or leave {name} out")
        for metric in getattr(callback, "watched_metrics", ()):
            if metric not in logged_names(trainer, module) and not _may_log_more(trainer, module, callback, metric):
                text = f"{name} has a rule on {metric}, which nothing in this run logs"
                yield ConfigError(text, "trainer.callbacks.rules", _similar_metrics(metric, logged_names(trainer, module)))
        saves = isinstance(callback, OnExceptionCheckpoint) or getattr(callback, "save_on_exception", False)
        if saves and trainer.world_size > 1:
            yield ConfigError(
                f"{name} saves a checkpoint when an exception is raised. If only one rank raises it, the save waits for the "
                "other ranks forever",
                "trainer.callbacks.save_on_exception" if isinstance(callback, ModelCheckpoint) else "trainer.callbacks",
                "Leave it out. A run that is ended by a signal saves a checkpoint without it",
            )
        if isinstance(callback, ModelCheckpoint):
            yield from _checkpoint_problems(callback, trainer, module)
        found = monitor_problem(callback, trainer, module, validates)
        if found is None and _monitors_validation(callback):
            found = _missed_validations_problem(callback, trainer)
        if found is not None:
            yield found


def late_validations(trainer: Trainer, module: EvaluatedModule, data: Any) -> Iterator[ConfigError]:
    """Yield a problem for each callback that monitors validation if the run ends before its first validation.

    `check_trainer` only warns about these, so that a recipe can be tried for a few steps.
    """
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (
            _monitors_validation(callback)
            and (found := _late_validation_problem(callback, trainer, module, data)) is not None
        ):
            yield found


def monitor_problem(callback: Any, trainer: Trainer, module: EvaluatedModule, validates: bool) -> ConfigError | None:
    """Return the problem of a callback with the metric that it monitors or with its mode, or None if there is none.

    Args:
        callback: A callback. It is checked if it has an attribute ``monitor``, and ``mode`` if it has that too.
        trainer: The trainer, whose other callbacks may log the metric.
        module: The method.
        validates: If True, the run has validations.
    """
    monitor = getattr(callback, "monitor", None)
    if not isinstance(monitor, str):
        return None
    name, n = type(callback).__name__, module.evaluator.sampling.n
    if monitor.startswith("val/") and not validates:
        return ConfigError(f"{name} monitors {monitor}, and the run has no validation", "data.val", "Set it to a source")
    found = re.fullmatch(r"val/(teacher_)?(avg|pass|maj)@(\d+)(_se|_se_samples)?", monitor)
    if found:
        sizes = pass_sizes(n) if found[2] == "pass" else [n]
        if int(found[3]) not in sizes:
            text = f"{name} monitors {monitor}, and validation samples {n} completions of each question"
            fix = f"Set it to {found[3]}, or monitor val/{found[1] or ''}{found[2]}@{n}"
            return ConfigError(text, "model.eval_sampling.n", fix)
        if found[1] and module.evaluator.teacher is None:
            text = f"{name} monitors {monitor}, and the teacher is not graded"
            return ConfigError(text, "model.evaluate_teacher", "Set it to true")
    names = logged_names(trainer, module) | ({"step", "epoch"} if isinstance(callback, ModelCheckpoint) else set())
    if monitor not in names and not _may_log_more(trainer, module, callback, monitor):
        text = f"{name} monitors {monitor}, which nothing in this run logs"
        return ConfigError(text, "trainer.callbacks.monitor", _similar_metrics(monitor, names))
    mode, direction = getattr(callback, "mode", None), better(monitor)
    for other in trainer.callbacks if direction is None else ():  # type: ignore[attr-defined]
        direction = direction or (other.better(monitor) if hasattr(other, "better") else None)
    if mode in ("min", "max") and direction is not None and mode != direction:
        effect = "keep and export the worst checkpoint" if isinstance(callback, ModelCheckpoint) else "prefer worse values"
        order = "higher" if direction == "max" else "lower"
        text = f"{name} with mode {mode} (the default is min) would {effect}, because {order} values of {monitor} are better"
        return ConfigError(text, "trainer.callbacks.mode", f"Set it to {direction}")
    return None


def logged_names(trainer: Trainer, module: EvaluatedModule) -> set[str]:
    """Return the names of all metrics that the module and the callbacks with a method ``logged_names`` log in a fit."""
    found = set(module.logged_names())
    for callback in trainer.callbacks:  # type: ignore[attr-defined]
        if (names := getattr(callback, "logged_names", None)) is not None:
            found |= set(names(module))
    return found


def _similar_metrics(metric: str, names: set[str]) -> str:
    similar = difflib.get_close_matches(metric, sorted(names), n=3, cutoff=0.4) or ["train/loss"]
    return f"Set it to a logged metric, such as {', '.join(similar)}"


def _may_log_more(trainer: Trainer, module: EvaluatedModule, callback: Any, monitor: str) -> bool:
    """Return True if a module or callback whose metrics are not known may log the metric."""
    callbacks = trainer.callbacks  # type: ignore[attr-defined]
    if any(isinstance(other, LearningRateMonitor) for other in callbacks) and monitor.startswith("lr-"):
        return True
    replaced = any(callable(value) and hasattr(type(module), name) for name, value in vars(module).items())
    if any(name.startswith("on_") for kind in _foreign(callback) for name in vars(kind)):
        return True  # the callback may log the metric itself
    others = [other for other in callbacks if other is not callback]
    return replaced or any(isinstance(part, LambdaCallback) or _foreign(part) for part in (module, *others))


def _foreign(part: Any) -> list[type]:
    """Return the classes of an object that are not defined in the known packages."""
    return [kind for kind in type(part).__mro__ if kind.__module__.partition(".")[0] not in _KNOWN_PACKAGES]


def _monitors_validation(callback: Any) -> bool:
    return isinstance(monitor := getattr(callback, "monitor", None), str) and monitor.startswith("val/")


def _validates(trainer: Trainer, data: Any) -> bool:
    if trainer.limit_val_batches == 0:
        return False
    rows, sources = getattr(data, "rows", None), getattr(data, "sources", None)
    if not isinstance(rows, dict) or not isinstance(sources, dict):  # an unknown data module may have validation data
        return True
    return "val" in rows or sources.get("val") is not None


def _checkpoint_problems(callback: ModelCheckpoint, trainer: Trainer, module: EvaluatedModule) -> Iterator[ConfigError]:
    every, updates = int(callback._every_n_train_steps or 0), int(getattr(module, "updates_per_batch", 1))
    if is_remote(folder := callback.dirpath or trainer.default_root_dir):
        yield ConfigError(
            f"checkpoints would be written to {folder}, and checkpoints cannot be loaded from a remote folder",
            "trainer.callbacks.dirpath" if callback.dirpath else "trainer.default_root_dir",
            "Set it to a local or shared folder, and copy the checkpoints from there",
        )
    if callback._train_time_interval is not None:
        yield ConfigError(
            "ModelCheckpoint does not save by time in manual optimization",
            "trainer.callbacks.train_time_interval",
            "Set every_n_train_steps instead",
        )
    if every and every % updates and updates % every:
        yield ConfigError(
            f"ModelCheckpoint would save every {every} optimizer steps, and a batch makes {updates} "
            "(model.updates_per_batch)",
            "trainer.callbacks.every_n_train_steps",
            f"Set it to a multiple of {updates}",
        )
    if not _monitors_validation(callback):
        return
    if every:
        yield ConfigError(
            f"ModelCheckpoint monitors {callback.monitor} and saves every {every} steps, before the validation of the step: "
            "it would rank checkpoints by an earlier validation",
            "trainer.callbacks.every_n_train_steps",
            "Leave it out. ModelCheckpoint then saves after each validation (trainer.val_check_interval)",
        )
    at_epochs = trainer.check_val_every_n_epoch == 1 and _interval(trainer) == 1.0
    if callback._save_on_train_epoch_end and not at_epochs:
        yield ConfigError(
            f"ModelCheckpoint monitors {callback.monitor} and saves at the end of each epoch, which may have no validation: "
            "it would rank checkpoints by an earlier validation",
            "trainer.callbacks.save_on_train_epoch_end",
            "Leave it out",
        )


def _missed_validations_problem(callback: Any, trainer: Trainer) -> ConfigError | None:
    """Return a problem if the callback does not receive every validation, otherwise None."""
    interval, every = _interval(trainer), trainer.check_val_every_n_epoch
    if not (isinstance(interval, int) and interval == 1 and every == 1) or trainer.fast_dev_run:  # type: ignore[attr-defined]
        return None
    return ConfigError(
        f"{type(callback).__name__} would receive only the validation at the end of an epoch, although there is one after "
        "every batch (trainer.val_check_interval is 1)",
        "trainer.check_val_every_n_epoch",
        "Set it to null",
    )


def _late_validation_problem(callback: Any, trainer: Trainer, module: EvaluatedModule, data: Any) -> ConfigError | None:
    """Return a problem if the run ends before the first validation that the callback monitors.

    Return None if it does not, or if the rows have not been read yet.
    """
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
    total = -(-steps // updates)
    if first is not None and total < first:
        return ConfigError(
            f"{name} monitors {callback.monitor}, the first validation comes after {first} batches, and the run has "
            f"{total} (trainer.max_steps is {steps})",
            "trainer.val_check_interval",
            f"Set it to {total} or less, and trainer.check_val_every_n_epoch to null",
        )
    return None


def _interval(trainer: Trainer) -> Any:
    """Return the number of batches between validations, or the share of an epoch as a float. None if it is a duration."""
    return getattr(trainer, "val_check_interval", None)


def _interval_problem(trainer: Trainer, data: Any) -> ConfigError | None:
    interval, batches = _interval(trainer), _epoch_batches(trainer, data)
    if not isinstance(interval, int) or trainer.check_val_every_n_epoch is None or batches is None or interval <= batches:
        return None
    return ConfigError(
        f"trainer.val_check_interval is {interval}, and an epoch has {batches} batches",
        "trainer.check_val_every_n_epoch",
        "Set it to null to count batches over epochs, or lower trainer.val_check_interval",
    )


def _epoch_batches(trainer: Trainer, data: Any) -> int | None:
    """Return the number of training batches of an epoch, or None if the rows have not been read yet."""
    if not isinstance(data, OPSDDataModule) or "train" not in data.rows:
        return None
    batches = len(data.rows["train"].examples) // (data.batch_size * trainer.world_size)
    limit = trainer.limit_train_batches
    return min(batches, limit) if isinstance(limit, int) else int(batches * limit)
