"""Tests of checkpoints whose validation was pending: the resumed run validates first."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint

from helpers.training import adapters, parts, trainer
from opsd_lightning.callbacks.collapse_guard import Ceiling, CollapseGuard
from opsd_lightning.models.policy import Policy

pytestmark = pytest.mark.integration


class Seen(Callback):
    """Record the events of a run, and raise at a chosen one."""

    def __init__(self, die_at: tuple[str, int] | None = None) -> None:
        self.die_at = die_at
        self.happened: list[tuple[Any, ...]] = []

    def _note(self, what: str, trainer: Trainer, *more: Any) -> None:
        self.happened.append((what, trainer.global_step, *more))
        if self.die_at == (what, trainer.global_step):
            raise RuntimeError("killed")

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self._note("step", trainer, float(outputs["loss"]))

    def on_validation_start(self, trainer: Trainer, module: Any) -> None:
        self._note("validation starts", trainer)

    def on_validation_batch_end(
        self, trainer: Trainer, module: Any, outputs: Any, batch: Any, batch_idx: int, *a: Any
    ) -> None:
        self._note(f"batch {batch_idx}", trainer)

    def on_validation_end(self, trainer: Trainer, module: Any) -> None:
        values = {name: float(value) for name, value in trainer.callback_metrics.items() if name.startswith("val/")}
        self._note("validation", trainer, values)

    def on_train_epoch_start(self, trainer: Trainer, module: Any) -> None:
        self._note("epoch", trainer, trainer.current_epoch)

    def on_train_epoch_end(self, trainer: Trainer, module: Any) -> None:
        self._note("epoch end", trainer, trainer.current_epoch)


# An epoch has four steps.
VALIDATIONS: dict[str, dict[str, Any]] = {
    "within": {"val_check_interval": 3, "check_val_every_n_epoch": None},
    "frequent": {"val_check_interval": 0.5},
    "at epochs": {},
    "never": {"limit_val_batches": 0},
}


@pytest.fixture(scope="module")
def never_killed() -> dict[str, Any]:
    """Runs to the end, by when they validate: what happened, the adapters, the best checkpoint, the trainer."""
    return {}


@pytest.mark.parametrize(
    ("when", "die_at"),
    [
        ("within", ("batch 1", 3)),
        ("within", ("validation starts", 6)),  # the last step of the run
        ("frequent", ("batch 1", 4)),
        ("at epochs", ("epoch end", 4)),
        ("never", ("epoch end", 4)),
        ("never", ("epoch end", 6)),
    ],
    ids=str,
)
def test_pending_validation_runs_after_a_resume(
    when: str, die_at: tuple[str, int], never_killed: dict[str, Any], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Within an epoch, at its end, at the run's end: steps, validations, hooks, the best checkpoint."""
    policy = make_policy()

    def run(folder: Path, seen: Seen, path: str | None = None) -> tuple[Any, ModelCheckpoint | None, Trainer]:
        torch.manual_seed(0)
        module, data = parts(policy)
        validates = when != "never"
        best = ModelCheckpoint(tmp_path / "best" / folder.name, monitor="val/completion_tokens") if validates else None
        last = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        # The callback that dies comes behind the one that saves.
        callbacks = [seen, *([best] if best else []), last]
        fit = trainer(folder, *callbacks, logger=False, **VALIDATIONS[when])
        fit.fit(module, data, ckpt_path=path, weights_only=True)
        return module, best, fit

    dies, rest = Seen(die_at), Seen()
    if when not in never_killed:
        whole = Seen()
        module, best, ended = run(tmp_path / "whole", whole)
        weights = adapters(module)
        never_killed[when] = whole, weights, best, ended
    whole, expected, best, ended = never_killed[when]
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", dies)
    module, again, fit = run(tmp_path / "killed", rest, str(tmp_path / "killed" / "last.ckpt"))
    # The record of what happened after the checkpoint's step is that of the run that never stopped.
    saved_at = whole.happened.index(next(h for h in whole.happened if h[:2] == ("step", die_at[1])))
    assert rest.happened == whole.happened[saved_at + 1 :]
    assert all(torch.equal(value, expected[key]) for key, value in adapters(module).items())
    assert (fit.current_epoch, fit.global_step) == (ended.current_epoch, ended.global_step)
    if best is not None and again is not None:
        assert again.best_model_score == best.best_model_score
        weights = [torch.load(c.best_model_path, weights_only=True)["state_dict"] for c in (best, again)]
        assert all(torch.equal(value, weights[1][key]) for key, value in weights[0].items())


def test_a_validation_is_not_repeated(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """A checkpoint of its end, and one of a longer run's last step, which was that of a shorter one."""
    policy = make_policy()

    def run(path: str | None, steps: int, *callbacks: Callback) -> list[tuple[Any, ...]]:
        torch.manual_seed(0)
        seen = Seen()
        fit = trainer(tmp_path, seen, *callbacks, logger=False, max_steps=steps, **VALIDATIONS["within"])
        fit.fit(*parts(policy), ckpt_path=path, weights_only=True)
        return [(what, step) for what, step, *_ in seen.happened]

    end = ModelCheckpoint(tmp_path, filename="end", monitor="val/completion_tokens")
    run(None, 3, end)
    assert run(end.best_model_path, 4) == [("step", 4), ("epoch end", 4)]
    step = ModelCheckpoint(tmp_path, filename="step", every_n_train_steps=5)
    run(None, 5, step)
    happened = run(str(tmp_path / "step.ckpt"), 7)
    assert [h for h in happened if h[0] in ("step", "validation")] == [("step", 6), ("validation", 6), ("step", 7)]


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.callbacks.collapse_guard")
@pytest.mark.parametrize("kind", ["EarlyStopping", "CollapseGuard"])
def test_pending_stop_happens_after_a_resume(kind: str, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Killed in the validation at which it ends early."""
    policy = make_policy()

    def run(folder: Path, path: str | None, die_at: tuple[str, int] | None = None) -> list[tuple[Any, ...]]:
        torch.manual_seed(0)
        seen = Seen(die_at)
        stops: Callback = EarlyStopping("val/avg@2", patience=1, mode="max")
        if kind == "CollapseGuard":
            stops = CollapseGuard("stop", [Ceiling("train/completion_tokens", 0.1, from_start=True)], window=2)
        last = ModelCheckpoint(folder, every_n_train_steps=1, save_last=True, save_top_k=0)
        interval = {"EarlyStopping": 2, "CollapseGuard": 3}[kind]
        fit = trainer(folder, stops, seen, last, logger=False, val_check_interval=interval, check_val_every_n_epoch=None)
        fit.fit(*parts(policy), ckpt_path=path, weights_only=True)
        return seen.happened

    whole = run(tmp_path / "whole", None)
    (*_, last_step) = (step for what, step, *_ in whole if what == "step")
    assert last_step == 4
    with pytest.raises(RuntimeError, match="killed"):
        run(tmp_path / "killed", None, ("validation starts", 4))
    rest = run(tmp_path / "killed", str(tmp_path / "killed" / "last.ckpt"))
    assert rest == whole[-len(rest) :] and rest[0] == ("validation starts", 4)
