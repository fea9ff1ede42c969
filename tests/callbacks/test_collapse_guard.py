"""Tests of `CollapseGuard` on runs that collapse and runs that do not."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from helpers.messages import mentions
from helpers.models import EOS, make_tokenizer
from helpers.training import parts, trainer
from opsd_lightning.callbacks.collapse_guard import Ceiling, CollapseGuard, Drift
from opsd_lightning.callbacks.health import Health
from opsd_lightning.models.policy import Policy
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.runs.reader import read_run
from opsd_lightning.types import ConfigError, Rollouts, Sampling

pytestmark = pytest.mark.integration


def run(
    policy: Policy, folder: Path, guard: CollapseGuard, lr: float, steps: int = 12, **start: str
) -> tuple[int, list[str]]:
    """Steps made, and what the guard said."""
    module, data = parts(policy, optimizer=lambda p: torch.optim.SGD(p, lr=lr), max_grad_norm=None, lr_scheduler=None)
    fit = trainer(folder, guard, max_steps=steps)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        fit.fit(module, data, **start)
    fit.save_checkpoint(folder / "last.ckpt")
    return fit.global_step, [str(w.message) for w in caught if "CollapseGuard" in str(w.message)]


def test_collapse_is_reported_with_a_completion(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """A learning rate far too high: the divergence grows in place of falling."""
    for action in ("warn", "stop"):
        guard = CollapseGuard(action, [Drift("train/forward_kl", highest=1.05)], window=2)  # type: ignore[arg-type]
        steps, said = run(make_policy(), tmp_path / action, guard, lr=5.0)
        assert len(said) == 1 and "train/forward_kl" in said[0] and "1.05" in said[0]
        assert "A completion of this step:" in said[0]
        assert steps == 12 if action == "warn" else 4 <= steps < 12


class Writes(RolloutEngine):
    """The same text at every step, and another from some step on."""

    def __init__(self, first: str, then: str, change: int) -> None:
        self.texts, self.change, self.calls = (first, then), change, 0

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        self.calls += 1
        ids = make_tokenizer().encode(self.texts[self.calls > self.change], add_special_tokens=False)
        rows = len(prompts) * sampling.n
        return Rollouts([[*ids, EOS]] * rows, [True] * rows, sampling.n)


LEAK, PLAIN, HEDGED = "the reference solution", "we add the two numbers", "wait, hmm, maybe wait:"


@pytest.mark.parametrize(
    ("engine", "metric", "by"),
    [
        (Writes(PLAIN, LEAK, 1), "health/leak_fraction", 50),  # after the first step
        (Writes(PLAIN, LEAK, 55), "health/leak_fraction", 60),
        (Writes(HEDGED, PLAIN, 25), "health/hedges_per_1k_tokens", 50),
    ],
    ids=["leaks at once", "leaks later", "no more hedging"],
)
def test_default_rules_stop_a_run_at_the_next_check(
    engine: Writes, metric: str, by: int, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """With Health as it is unless told otherwise: in a run of the paper's hundred steps."""
    module, data = parts(
        make_policy(),
        rollouts=engine,
        sampling=Sampling(max_new_tokens=8),
        optimizer=lambda p: torch.optim.SGD(p, lr=1e-12),
    )
    data.batch_size = 1  # all rows are alike
    guard = CollapseGuard("stop")
    fit = trainer(tmp_path, Health(), guard, RunReport(), max_steps=100, limit_val_batches=0)
    with pytest.warns(UserWarning, match=mentions("CollapseGuard", by, metric)):
        fit.fit(module, data)
    assert fit.global_step == by and guard.stopped
    (said,) = read_run(tmp_path).info["warnings"]
    assert metric in said and read_run(tmp_path).info["status"] == "stopped"
    page = (tmp_path / "report.html").read_text()
    assert f"stopped by CollapseGuard after {by} steps" in page and f"{metric} is" in page


def test_unknown_metrics_are_refused_and_short_runs_get_a_notice(
    make_policy: Callable[..., Policy], tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    with pytest.raises(ConfigError) as error:
        run(make_policy(), tmp_path, CollapseGuard(rules=[Ceiling("train/forwardkl", 1.0)]), lr=0.0, steps=3)
    assert error.value.setting == "trainer.callbacks.rules" and "train/forward_kl" in error.value.fix
    guard = CollapseGuard(rules=[Ceiling("train/forward_kl", 1e9)])
    with caplog.at_level("INFO"):
        steps, said = run(make_policy(), tmp_path, guard, lr=0.0, steps=3)
    assert steps == 3 and not said
    assert "they need 6 steps, and the run has 3" in caplog.text and "trainer.callbacks.window" in caplog.text


@pytest.mark.parametrize(("steps", "window", "used"), [(12, None, 3), (28, None, 7), (40, None, 10), (12, 2, 2)])
def test_the_window_fits_the_run(
    steps: int, window: int | None, used: int, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """A rule that is broken from the start speaks as soon as it has two windows of values."""
    guard = CollapseGuard(rules=[Ceiling("train/completion_tokens", 0.1, from_start=True)], window=window)
    module, data = parts(make_policy())
    with pytest.warns(UserWarning, match=rf"CollapseGuard at step {2 * used}\b"):
        trainer(tmp_path, guard, max_steps=steps, max_epochs=-1).fit(module, data)
    assert guard.state_dict()["window"] == used


def test_a_resumed_run_keeps_its_window(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    first = CollapseGuard(rules=[Ceiling("train/completion_tokens", 1e9)])
    run(make_policy(), tmp_path, first, lr=0.0, steps=12)
    second = CollapseGuard(rules=[Ceiling("train/completion_tokens", 1e9)])
    run(make_policy(), tmp_path, second, lr=0.0, steps=40, ckpt_path=str(tmp_path / "last.ckpt"))
    assert first.state_dict()["window"] == second.state_dict()["window"] == 3
    assert second.state_dict()["start"] == first.state_dict()["start"]


def test_guard_starts_over_in_another_run(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    guard = CollapseGuard(rules=[Drift("train/forward_kl", highest=1.05)], window=2)
    for folder in ("first", "second"):
        _, said = run(make_policy(), tmp_path / folder, guard, lr=5.0)
        assert len(said) == 1 and guard.messages == said


def test_resumed_run_is_not_stopped_again(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """What was said stays, and is not said again."""
    guard = CollapseGuard("stop", [Drift("train/forward_kl", highest=1.05)], window=2)
    steps, said = run(make_policy(), tmp_path, guard, lr=5.0)
    assert guard.stopped and len(said) == 1
    after, more = run(make_policy(), tmp_path, guard, lr=5.0, steps=steps + 2, ckpt_path=str(tmp_path / "last.ckpt"))
    assert after == steps + 2 and not guard.stopped and more == [] and guard.messages == said


def test_stable_run_is_not_stopped(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    assert run(
        make_policy(), tmp_path, CollapseGuard("stop", [Drift("train/student_entropy", 0.5, 2.0)], window=3), lr=0.0
    ) == (
        12,
        [],
    )


def test_start_values_survive_a_resume(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    first = CollapseGuard(rules=[Drift("train/forward_kl", highest=1e9)], window=3)
    run(make_policy(), tmp_path, first, lr=0.01, steps=4)
    second = CollapseGuard(rules=[Drift("train/forward_kl", highest=1e9)], window=3)
    run(make_policy(), tmp_path, second, lr=0.01, steps=6, ckpt_path=str(tmp_path / "last.ckpt"))
    state = second.state_dict()
    assert state["start"] == first.state_dict()["start"] and len(state["latest"][0]) == 3


@pytest.mark.parametrize(
    ("rule", "start", "now", "broken"),
    [
        (Drift("m", 0.5, 2.0), 10.0, 4.9, True),
        (Drift("m", 0.5, 2.0), 10.0, 5.1, False),
        (Drift("m", 0.5, 2.0), 10.0, 20.1, True),
        (Drift("m", highest=2.0), 10.0, 0.0, False),
        (Drift("m", 0.5, smallest_start=5.0), 4.9, 0.0, False),
        (Drift("m", 0.5, smallest_start=5.0), 5.0, 0.0, True),
        (Drift("m", 0.5), 0.0, 9.0, False),
        (Ceiling("m", 0.5), 0.1, 0.6, True),
        (Ceiling("m", 0.5), 0.7, 0.9, False),
        (Ceiling("m", 0.5, from_start=True), 0.7, 0.9, True),
        (Ceiling("m", 0.5, from_start=True), 0.7, 0.4, False),
    ],
)
def test_rules_break_at_their_bounds(rule: Drift | Ceiling, start: float, now: float, broken: bool) -> None:
    assert (rule.broken(start, now) is not None) == broken


@pytest.mark.parametrize(
    ("make", "setting"),
    [
        (lambda: Drift("m", 2.0, 1.0), "trainer.callbacks.rules"),
        (lambda: Drift("m"), "trainer.callbacks.rules"),
        (lambda: CollapseGuard("halt"), "trainer.callbacks.action"),  # type: ignore[arg-type]
    ],
    ids=["lowest above highest", "no bound", "unknown action"],
)
def test_contradictory_settings_are_refused(make: Callable[[], object], setting: str) -> None:
    with pytest.raises(ConfigError) as refused:
        make()
    assert refused.value.setting == setting


def test_rarely_logged_metric_counts_once(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Lightning keeps the last value of a metric: one measurement must not fill a window by standing there."""

    class Rare(Callback):
        def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: object) -> None:
            if trainer.global_step % 3 == 0:
                pl_module.log("rare", float(trainer.global_step))

    module, data = parts(make_policy())
    guard = CollapseGuard(rules=[Ceiling("rare", 1e9), Ceiling("train/loss", 1e9)], window=2)
    trainer(tmp_path, Rare(), guard, max_steps=6).fit(module, data)
    assert guard.state_dict()["start"][0] == [0.0, 3.0] and guard.state_dict()["latest"][0] == []
    assert len(guard.state_dict()["latest"][1]) == 2
