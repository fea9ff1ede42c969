"""Callbacks and trainer settings that would not do what they say are refused before training."""

from __future__ import annotations

import datetime
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import (
    BackboneFinetuning,
    BatchSizeFinder,
    EarlyStopping,
    EMAWeightAveraging,
    GradientAccumulationScheduler,
    LambdaCallback,
    LearningRateFinder,
    LearningRateMonitor,
    ModelCheckpoint,
    ModelPruning,
    OnExceptionCheckpoint,
    StochasticWeightAveraging,
)

from opsd_lightning.callbacks.collapse_guard import Ceiling, CollapseGuard
from opsd_lightning.callbacks.health import Health
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.evaluation.evaluator import Evaluator
from opsd_lightning.evaluation.metric_directions import better
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.methods.trainer_checks import check_trainer, late_validations, trainer_problems
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.teachers import FixedTeacher
from opsd_lightning.types import ConfigError, Sampling


@pytest.fixture(scope="module")
def policy(folders: dict[str, str]) -> Policy:
    return Policy(model=folders["llama"], dtype="float32", lora=LoRA(r=4, alpha=8, dropout=0.0))


def data_of(policy: Policy) -> OPSDDataModule:
    return OPSDDataModule(
        policy, train=WordProblems(size=8, seed=1), val=WordProblems(size=2, seed=2),
        prompts=Prompts("{question}", "{question} {context}"), batch_size=2, max_new_tokens=6,
    )  # fmt: skip


def trainer(*callbacks: Any, **settings: Any) -> Trainer:
    settings = {"max_steps": 4, "logger": False, "num_sanity_val_steps": 0} | settings
    if not settings.get("barebones"):
        settings |= {"enable_progress_bar": False, "enable_model_summary": False}
    return Trainer(accelerator="cpu", devices=1, callbacks=list(callbacks), **settings)


def settings_of(
    policy: Policy, *callbacks: Any, module: PolicyModule | None = None, data: Any = None, **settings: Any
) -> list[str]:
    """Which settings are refused."""
    module = module or OPSDModule(policy, sampling=Sampling(max_new_tokens=6, n=2))
    return [p.setting for p in trainer_problems(trainer(*callbacks, **settings), module, data or data_of(policy))]


ACCURACIES = ["val/avg@2", "val/pass@1", "val/pass@2", "val/maj@2"]


@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
def test_a_mode_against_the_metrics_direction(kind: type, policy: Policy) -> None:
    """Over all that a run with Health logs, in both modes; Lightning's own default among them."""
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=6, n=2))
    names = sorted(module.logged_names() | Health().logged_names(module))
    assert set(ACCURACIES) <= {name for name in names if better(name) == "max"}
    assert {"train/loss", "train/forward_kl"} <= {name for name in names if better(name) == "min"}
    assert {"train/student_entropy", "val/completion_tokens", "val/avg@2_se"} <= {n for n in names if better(n) is None}
    run, data = trainer(), data_of(policy)
    for name in names:
        for mode in ("min", "max"):
            run.callbacks = [Health(), kind(monitor=name, mode=mode)]  # type: ignore[attr-defined]
            refused = [problem.setting for problem in trainer_problems(run, module, data)]
            assert refused == (["trainer.callbacks.mode"] if better(name) not in (None, mode) else []), (name, mode)
    assert kind(monitor="val/avg@2").mode == "min"
    assert settings_of(policy, kind(monitor="val/avg@2", **({"save_top_k": -1} if kind is ModelCheckpoint else {})))


def test_what_checkpoints_keep_the_latest_by(policy: Policy) -> None:
    assert settings_of(policy, ModelCheckpoint(monitor="step", mode="max", save_top_k=3)) == []
    assert settings_of(policy, ModelCheckpoint(monitor="epoch", mode="min")) == ["trainer.callbacks.mode"]


@pytest.mark.parametrize(
    "monitor",
    ["val_loss", "val/accuracy", "val/loss", "train/los", "loss", "test/avg@2", "health/leak_fraction", "train/reward",
     "train/update_ratio", "time/rollout", "avg@2", "val/avg@2 ", "train/completions_tokens", "lr-AdamW"],
)  # fmt: skip
@pytest.mark.parametrize("kind", [ModelCheckpoint, EarlyStopping])
def test_a_name_that_nothing_logs(kind: type, monitor: str, policy: Policy) -> None:
    assert settings_of(policy, kind(monitor=monitor, mode="max")) == ["trainer.callbacks.monitor"]


def test_a_guards_rule_on_what_nothing_logs(policy: Policy) -> None:
    for metric in ("health/leak_fraction", "train/forwardkl", "val/avg@4"):
        assert settings_of(policy, CollapseGuard(rules=[Ceiling(metric, 1.0)])) == ["trainer.callbacks.rules"]
    assert settings_of(policy, Health(), CollapseGuard(rules=[Ceiling("health/leak_fraction", 1.0)])) == []
    assert settings_of(policy, Logs(), CollapseGuard(rules=[Ceiling("mine", 1.0)])) == []
    assert settings_of(policy, CollapseGuard()) == []


class Logs(Callback):
    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        pl_module.log("mine", 1.0)


class OwnModule(OPSDModule):
    def on_validation_epoch_end(self) -> None:
        super().on_validation_epoch_end()
        self.log("val/mine", 1.0)


class OwnCheckpoint(ModelCheckpoint):
    """A user's subclass: it chooses, and logs nothing."""


def test_metrics_of_the_users_own_code_may_be_monitored(policy: Policy) -> None:
    """Their direction is not known; those of this package keep theirs, whoever chooses by them."""
    assert settings_of(policy, Logs(), EarlyStopping(monitor="mine")) == []
    assert settings_of(policy, LambdaCallback(), EarlyStopping(monitor="mine")) == []
    assert settings_of(policy, ModelCheckpoint(monitor="val/mine"), module=OwnModule(policy)) == []
    assert settings_of(policy, LearningRateMonitor(), ModelCheckpoint(monitor="lr-AdamW")) == []
    assert settings_of(policy, OwnCheckpoint(monitor="mine")) == ["trainer.callbacks.monitor"]
    assert settings_of(policy, Logs(), OwnCheckpoint(monitor="val/avg@2")) == ["trainer.callbacks.mode"]


def test_a_metric_of_another_configuration_of_validation(policy: Policy) -> None:
    """The setting that would bring it is named."""
    best = ModelCheckpoint(monitor="val/teacher_avg@2", mode="max")
    assert settings_of(policy, best) == ["model.evaluate_teacher"]
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=6, n=2))
    module.evaluator = Evaluator(Sampling(n=2), MathGrader(), FixedTeacher())
    assert settings_of(policy, best, module=module) == []
    assert settings_of(policy, ModelCheckpoint(monitor="val/maj@8", mode="max")) == ["model.eval_sampling.n"]
    assert settings_of(policy, ModelCheckpoint(monitor="val/avg@2", mode="max"), limit_val_batches=0) == ["data.val"]


@pytest.mark.parametrize(
    ("settings", "refused"),
    [
        ({"max_steps": 4}, None),  # an epoch is four batches
        ({"max_steps": 3}, "trainer.val_check_interval"),
        ({"max_steps": 4, "check_val_every_n_epoch": 2}, "trainer.val_check_interval"),
        ({"max_steps": 2, "val_check_interval": 0.5}, None),
        ({"max_steps": 1, "val_check_interval": 0.5}, "trainer.val_check_interval"),
        ({"max_steps": 9, "val_check_interval": 10, "check_val_every_n_epoch": None}, "trainer.val_check_interval"),
        ({"max_steps": 10, "val_check_interval": 10, "check_val_every_n_epoch": None}, None),
        ({"max_steps": 2, "limit_train_batches": 2}, None),
        ({"max_steps": 8, "val_check_interval": 1, "check_val_every_n_epoch": None}, None),
        ({"max_steps": -1, "max_epochs": 1}, None),
    ],
)
def test_a_validation_that_never_comes_is_told_of(settings: dict[str, Any], refused: str | None, policy: Policy) -> None:
    data = data_of(policy)
    data.setup("fit")
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=6, n=2))
    for callback in (ModelCheckpoint(monitor="val/avg@2", mode="max"), EarlyStopping(monitor="val/avg@2", mode="max")):
        run = trainer(callback, **settings)
        found = [problem.setting for problem in late_validations(run, module, data)]
        assert found == ([refused] if refused else []) and not list(trainer_problems(run, module, data))
    assert not list(late_validations(trainer(ModelCheckpoint(monitor="train/loss"), **settings), module, data))


def test_a_validation_after_every_batch_is_not_one_after_every_epoch(policy: Policy) -> None:
    """Lightning compares the interval with 1.0, a whole epoch."""
    best = ModelCheckpoint(monitor="val/avg@2", mode="max")
    assert settings_of(policy, best, val_check_interval=1) == ["trainer.check_val_every_n_epoch"]
    assert settings_of(policy, best, val_check_interval=1, check_val_every_n_epoch=None) == []
    assert settings_of(policy, best, val_check_interval=1.0) == []


def test_checkpoints_in_a_remote_folder(policy: Policy) -> None:
    remote = ModelCheckpoint(dirpath="memory://bucket/ck")
    assert settings_of(policy, remote) == ["trainer.callbacks.dirpath"]
    found = settings_of(policy, ModelCheckpoint(), default_root_dir="memory://bucket")
    assert found == ["trainer.default_root_dir"]


@pytest.mark.parametrize(
    ("saved", "refused"),
    [
        ({"train_time_interval": datetime.timedelta(minutes=5)}, "trainer.callbacks.train_time_interval"),
        ({"every_n_train_steps": 3}, "trainer.callbacks.every_n_train_steps"),  # two updates a batch
        ({"every_n_train_steps": 4}, None),
        ({"every_n_train_steps": 1}, None),
        ({"monitor": "train/loss", "every_n_train_steps": 2}, None),
        ({"monitor": "val/avg@2", "mode": "max", "every_n_train_steps": 2}, "trainer.callbacks.every_n_train_steps"),
        ({"monitor": "val/avg@2", "mode": "max", "save_on_train_epoch_end": True}, None),
    ],
)
def test_checkpoints_that_lightning_would_not_save_as_asked(
    saved: dict[str, Any], refused: str | None, policy: Policy
) -> None:
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=6, n=2), updates_per_batch=2)
    found = settings_of(policy, ModelCheckpoint(**saved), module=module)
    assert found == ([refused] if refused else [])
    if saved.get("save_on_train_epoch_end"):
        found = settings_of(policy, ModelCheckpoint(**saved), module=module, check_val_every_n_epoch=2)
        assert found == ["trainer.callbacks.save_on_train_epoch_end"]


@pytest.mark.parametrize(
    "callback",
    [
        StochasticWeightAveraging(1e-3), EMAWeightAveraging(), GradientAccumulationScheduler({0: 2}), LearningRateFinder(),
        BatchSizeFinder(), ModelPruning("l1_unstructured", amount=0.5), BackboneFinetuning(),
    ],
    ids=lambda callback: type(callback).__name__,
)  # fmt: skip
def test_callbacks_that_need_automatic_optimization(callback: Callback, policy: Policy) -> None:
    assert settings_of(policy, callback) == ["trainer.callbacks"]


def test_settings_without_the_effect_that_they_name(policy: Policy) -> None:
    assert settings_of(policy, gradient_clip_algorithm="value") == ["trainer.gradient_clip_algorithm"]
    assert settings_of(policy, gradient_clip_algorithm="norm") == []
    assert settings_of(policy, reload_dataloaders_every_n_epochs=1) == ["trainer.reload_dataloaders_every_n_epochs"]
    bare = {"barebones": True, "logger": None, "num_sanity_val_steps": None}
    assert settings_of(policy, CollapseGuard(), **bare) == ["trainer.barebones"]
    assert settings_of(policy, Health(), **bare) == ["trainer.barebones"]
    assert settings_of(policy, Logs(), **bare) == []
    assert settings_of(policy, detect_anomaly=True, sync_batchnorm=True, inference_mode=False) == []


def test_the_names_that_are_told_are_those_that_are_logged(policy: Policy, tmp_path: Path) -> None:
    """By each method; those of Health depend on what is written, and SFT writes nothing."""
    two = Sampling(max_new_tokens=6, n=2)
    common: dict[str, Any] = {"sampling": two, "optimizer": lambda p: torch.optim.SGD(p, lr=1e-3)}
    for module in (
        OPSDModule(policy, updates_per_batch=2, evaluate_teacher=True, **common),
        GRPOModule(policy, **common),
        SFTModule(policy, **common),
    ):
        run = trainer(
            Health(every_n_steps=1), default_root_dir=tmp_path, enable_checkpointing=False, max_steps=-1, max_epochs=1,
            limit_train_batches=2,
        )  # fmt: skip
        run.fit(module, data_of(policy))
        logged = set(run.callback_metrics)
        health = Health().logged_names(module)
        assert logged <= module.logged_names() | health, logged - module.logged_names() - health
        assert module.logged_names() <= logged, module.logged_names() - logged


def test_python_and_the_command_line_refuse_before_the_model_is_loaded(
    policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    loaded: list[str] = []
    monkeypatch.setattr(Policy, "build", lambda self, *args: loaded.append("model"))
    recipe = Policy(policy.model, policy.lora, dtype="float32")
    run = trainer(EarlyStopping(monitor="val/avg@1"), default_root_dir=tmp_path)
    with pytest.raises(ConfigError) as error:
        run.fit(OPSDModule(recipe, sampling=Sampling(max_new_tokens=6)), data_of(recipe))
    assert error.value.setting == "trainer.callbacks.mode" and not loaded
    with pytest.raises(ConfigError):
        check_trainer(run, OPSDModule(recipe), data_of(recipe))


class LogsItself(EarlyStopping):
    """A user's callback that monitors what it logs."""

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        pl_module.log("val/gap", 0.0)


def test_a_callback_may_monitor_what_it_logs_itself(policy: Policy) -> None:
    assert settings_of(policy, LogsItself(monitor="val/gap")) == []


def test_checkpoints_of_exceptions_on_several_ranks(policy: Policy) -> None:
    """One rank's exception would leave the save waiting for the others."""
    callbacks = [ModelCheckpoint(save_on_exception=True), OnExceptionCheckpoint("here")]
    assert settings_of(policy, *callbacks) == []
    two, module = Trainer(accelerator="cpu", devices=2, strategy="ddp", logger=False, max_steps=4), OPSDModule(policy)
    for callback, setting in zip(callbacks, ("trainer.callbacks.save_on_exception", "trainer.callbacks"), strict=True):
        two.callbacks = [callback]  # type: ignore[attr-defined]
        assert [problem.setting for problem in trainer_problems(two, module, data_of(policy))] == [setting]


def test_runs_without_a_step(policy: Policy) -> None:
    assert settings_of(policy, max_steps=0) == ["trainer.max_steps"]
    assert settings_of(policy, limit_train_batches=0) == ["trainer.limit_train_batches"]


def test_an_interval_beyond_the_epoch(policy: Policy) -> None:
    data = data_of(policy)
    data.setup("fit")  # four batches
    assert settings_of(policy, data=data, val_check_interval=5) == ["trainer.check_val_every_n_epoch"]
    for settings in ({"val_check_interval": 4}, {"val_check_interval": 5, "check_val_every_n_epoch": None}):
        assert settings_of(policy, data=data, **settings) == []


def test_validation_by_the_clock(policy: Policy) -> None:
    callback = ModelCheckpoint(monitor="val/avg@2", mode="max")
    assert settings_of(policy, callback, val_check_interval="00:00:10:00") == []
