"""Runs that diverge or learn nothing: no checkpoint of broken weights, a warning, and another end than "finished"."""

from __future__ import annotations

import math
import warnings
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint

from helpers.models import EOS
from opsd_lightning.callbacks.collapse_guard import CollapseGuard
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.distributed.collectives import TrainerRanks
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.grpo import GRPOModule, Reward
from opsd_lightning.methods.idle_steps import IdleSteps
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.contexts import NoContext
from opsd_lightning.prompts.online_contexts import FeedbackContext
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.runs.reader import read_run
from opsd_lightning.teachers import EMATeacher, Teacher
from opsd_lightning.types import Rollouts, Sampling


class Writes(RolloutEngine):
    """The same completion at every step."""

    def __init__(self, completion: list[int], terminated: bool = True) -> None:
        self.completion, self.terminated = completion, terminated

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = len(prompts) * sampling.n
        return Rollouts([list(self.completion)] * rows, [self.terminated] * rows, sampling.n)


@pytest.fixture(scope="module")
def policy(folders: dict[str, str]) -> Policy:
    return Policy(model=folders["llama"], dtype="float32", lora=LoRA(r=2, alpha=4, dropout=0.0))


def fit(module: PolicyModule, folder: Path, *callbacks: Any, steps: int = 12, context: Any = None) -> Trainer:
    data = OPSDDataModule(
        module.policy, train=WordProblems(size=8, seed=1), prompts=Prompts("{question}", "{question} {context}"), batch_size=2,
        max_new_tokens=4, context=context,
    )  # fmt: skip
    run = Trainer(
        accelerator="cpu", callbacks=list(callbacks), max_steps=steps, logger=False, default_root_dir=folder,
        enable_progress_bar=False, enable_model_summary=False, enable_checkpointing=bool(callbacks),
    )  # fmt: skip
    run.fit(module, data)
    return run


def opsd(policy: Policy, **settings: Any) -> OPSDModule:
    settings = {"sampling": Sampling(max_new_tokens=4, n=2), "optimizer": lambda p: torch.optim.AdamW(p, lr=1e-3)} | settings
    return OPSDModule(policy, **settings)


@pytest.mark.parametrize("lr", [math.inf, math.nan, 1e38], ids=str)
@pytest.mark.parametrize("teacher", [None, EMATeacher(0.5)], ids=["fixed", "ema"])
def test_non_finite_weights_are_not_saved(lr: float, teacher: Teacher | None, policy: Policy, tmp_path: Path) -> None:
    """Nor a teacher that follows the student. Callbacks that save on exceptions do not write them either."""
    module = opsd(policy, teacher=teacher, optimizer=lambda p: Breaks(p, lr, after=2))
    saved = [
        ModelCheckpoint(
            tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1, save_last=True, save_on_exception=True
        ),
        OnExceptionCheckpoint(tmp_path),
    ]
    with pytest.raises(RuntimeError, match="norm") as error:
        fit(module, tmp_path, RunReport(), *saved)
    assert "step 3" in str(error.value)
    with pytest.raises(RuntimeError):
        module.trainer.save_checkpoint(tmp_path / "by hand.ckpt")
    assert sorted(path.name for path in tmp_path.glob("*.ckpt")) == ["last.ckpt", "step=1.ckpt", "step=2.ckpt"]
    for path in tmp_path.glob("*.ckpt"):
        assert all(torch.isfinite(v).all() for v in torch.load(path, weights_only=True)["state_dict"].values())
    kept = {name: p for name, p in module.model.named_parameters() if ".teacher." in name}
    assert len(kept) == (0 if teacher is None else len(kept)) and all(torch.isfinite(p).all() for p in kept.values())
    assert read_run(tmp_path).info["status"] == "failed"


class Breaks(torch.optim.SGD):
    """Sound for some steps, then with a broken learning rate."""

    def __init__(self, parameters: Any, lr: float, after: int) -> None:
        super().__init__(parameters, lr=1e-3)
        self.broken, self.sound = lr, after

    def step(self, closure: Any = None) -> Any:  # type: ignore[override]
        if not self.sound:
            self.param_groups[0]["lr"] = self.broken
        self.sound -= 1
        return super().step(closure)


class Infinite(DivergenceObjective):
    """A loss that is not finite, whose gradient is."""

    def per_token(self, *args: Any) -> Any:
        loss, clipped = super().per_token(*args)
        return loss + self.offset, clipped

    offset = math.inf


@pytest.mark.parametrize("offset", [math.inf, math.nan, -math.inf, 1e25])
def test_non_finite_loss_makes_no_step(offset: float, policy: Policy, tmp_path: Path) -> None:
    objective = Infinite()
    objective.offset = offset
    module = opsd(policy, objective=objective)
    with pytest.raises(RuntimeError, match="loss"):
        fit(module, tmp_path, ModelCheckpoint(tmp_path, every_n_train_steps=1, save_on_exception=True))
    assert module.global_step == 0 and not list(tmp_path.glob("*.ckpt"))
    assert not any(bool(p.any()) for name, p in module.model.named_parameters() if "lora_B" in name)


class Same(Reward):
    def __call__(self, attempts: Any) -> list[float]:
        return [1.0] * len(attempts.texts)


class Nothing(FeedbackContext):
    def texts(self, attempts: Any, write: Any) -> list[str | None]:
        return [None] * len(attempts.texts)


LONG, EMPTY = [20, 21, 22], [EOS]
DEAD: dict[str, tuple[dict[str, Any], str]] = {
    "teacher is the student": ({"context": NoContext()}, "NoContext"),
    "empty": ({"rollouts": Writes(EMPTY)}, "EOS"),
    "no token at all": ({"rollouts": Writes([])}, "EOS"),
    "skipped": ({"rollouts": Writes(LONG), "objective": DivergenceObjective(skip_first_tokens=3)}, "skip_first_tokens"),
    "truncated": (
        {"rollouts": Writes(LONG, False), "objective": DivergenceObjective(include_truncated=False)}, "include_truncated",
    ),
    "no context found": ({"rollouts": Writes(LONG), "online": Nothing()}, "context"),
    "all rewards alike": ({"grpo": True}, "reward"),
}  # fmt: skip


def dead(name: str, policy: Policy) -> tuple[PolicyModule, Any, str]:
    """Such a run's module and context, and a word of the cause."""
    settings, cause = DEAD[name]
    own = dict(settings)
    context, online = own.pop("context", None), own.pop("online", None)
    grpo = GRPOModule(policy, Same(), sampling=Sampling(max_new_tokens=4, n=2)) if own.pop("grpo", False) else None
    module: PolicyModule = grpo or opsd(policy, context=online, **own)
    module.idle_limit = 3  # type: ignore[misc]
    return module, context, cause


@pytest.mark.parametrize("name", DEAD)
def test_run_without_gradients_is_noticed(name: str, policy: Policy, tmp_path: Path) -> None:
    """It warns once and goes on, and the guard says the same."""
    module, context, cause = dead(name, policy)
    guard = CollapseGuard()
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit(module, tmp_path, guard, steps=4, context=context)
    told = [str(w.message) for w in caught if "nothing was learned" in str(w.message) and "Guard" not in str(w.message)]
    assert len(told) == 1 and cause in told[0] and len(guard.messages) == 1 and cause in guard.messages[0]
    assert module.global_step == 4 and module.idle.verdict
    if name != "empty":  # there the roles may differ in how likely they find the EOS
        moved = [p for n, p in module.model.named_parameters() if "lora_B" in n]
        assert not any(bool(p.any()) for p in moved)  # rounding is not scaled up to steps


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.base")
@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.callbacks.collapse_guard")
@pytest.mark.parametrize("guarded", [False, True], ids=["alone", "guarded"])
def test_run_without_gradients_does_not_end_as_finished(guarded: bool, policy: Policy, tmp_path: Path) -> None:
    module, context, cause = dead("skipped", policy)
    fit(module, tmp_path, *([CollapseGuard("stop")] if guarded else []), RunReport(), steps=5, context=context)
    info = read_run(tmp_path).info
    assert module.global_step == (3 if guarded else 5)
    assert info["status"] == ("stopped" if guarded else "idle") and cause in (info["warnings"] or [info["reason"]])[0]
    assert "finished after" not in (tmp_path / "report.html").read_text()


def test_learning_run_ends_as_finished(policy: Policy, tmp_path: Path) -> None:
    module = opsd(policy)
    module.idle_limit = 2  # type: ignore[misc]
    fit(module, tmp_path, CollapseGuard("stop"), RunReport(), steps=4)
    assert module.idle.verdict is None and read_run(tmp_path).info["status"] == "finished"


def test_one_learning_rank_is_enough(policy: Policy, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Counts are summed over ranks before anything is decided, so that all decide alike."""
    module = opsd(policy, rollouts=Writes(EMPTY))
    # A second rank, which always has a little of everything.
    monkeypatch.setattr(TrainerRanks, "sum", lambda self, values: [value + 1 for value in values])
    monkeypatch.setattr(TrainerRanks, "max", lambda self, values: [max(value, 1.0) for value in values])
    fit(module, tmp_path, steps=3)
    assert module.idle.verdict is None


def test_idle_steps_are_counted_in_a_row() -> None:
    idle = IdleSteps(3)
    assert [idle.add(reason) for reason in ("a", "a", None, "b", "b", "b", "b")] == [False] * 5 + [True, False]
    assert idle.problem is not None and idle.problem == idle.verdict and "last 4 steps" in idle.problem
    idle.add(None)
    assert idle.problem is None and idle.verdict is None
    short = IdleSteps(10)
    short.add("a")
    assert short.problem is None and short.verdict is not None


def test_patience_depends_on_the_method() -> None:
    assert GRPOModule.idle_limit > OPSDModule.idle_limit >= 5


def test_zero_learning_rate_is_noticed(policy: Policy, tmp_path: Path) -> None:
    def never(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.ConstantLR(optimizer, factor=0.0, total_iters=100)

    with pytest.warns(UserWarning, match="rate"):
        fit(module := opsd(policy, lr_scheduler=never), tmp_path, steps=10)
    assert module.idle.verdict is not None

    def last(optimizer: torch.optim.Optimizer) -> Any:
        return torch.optim.lr_scheduler.LinearLR(optimizer, 1.0, 0.0, total_iters=1)

    fit(module := opsd(policy, lr_scheduler=last), tmp_path, steps=1)  # 0 only after the last step
    assert module.idle.verdict is None
