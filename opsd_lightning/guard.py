"""A guard against collapse: rules on logged metrics, and what happens when one is broken.

Self-distillation collapses slowly and in known ways: completions that shrink or run into the limit, entropy that explodes
or dies, a divergence that grows in place of falling. Each is a drift of a logged number from where the run began.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_warn
from torch import Tensor

from opsd_lightning.callbacks import newly_logged
from opsd_lightning.types import UserError


class CollapseRule(ABC):
    """What must hold of one logged metric.

    Args:
        metric: Its name, as training steps log it.
    """

    def __init__(self, metric: str) -> None:
        self.metric = metric

    @abstractmethod
    def broken(self, start: float, now: float) -> str | None:
        """The rule in words if it is broken, else None.

        Args:
            start: The metric's mean over the run's first steps.
            now: Its mean over the latest.
        """


class Drift(CollapseRule):
    """The metric stays within a range around its start.

    Args:
        metric: Its name, as training steps log it.
        lowest: Least share of the start, 0 or more. No lower bound at 0.
        highest: Largest multiple of the start, above 0. No upper bound unless given.
    """

    def __init__(self, metric: str, lowest: NonNegativeFloat = 0.0, highest: PositiveFloat | None = None) -> None:
        super().__init__(metric)
        self.lowest, self.highest = NonNegativeFloat(lowest), None if highest is None else PositiveFloat(highest)
        if highest is None and not lowest:
            raise UserError(f"Drift of {metric} has no bound: set lowest, highest or both")
        if highest is not None and lowest >= highest:
            raise UserError(f"Drift of {metric}: lowest {lowest} is not below highest {highest}")

    def broken(self, start: float, now: float) -> str | None:
        if start <= 0:  # no multiple of it means anything
            return None
        if now < self.lowest * start:
            return f"it should stay above {self.lowest:g} times its start"
        if self.highest is not None and now > self.highest * start:
            return f"it should stay below {self.highest:g} times its start"
        return None


class Ceiling(CollapseRule):
    """The metric stays below a limit, unless it began above it.

    Args:
        metric: Its name, as training steps log it.
        limit: The most it may be.
    """

    def __init__(self, metric: str, limit: float) -> None:
        super().__init__(metric)
        self.limit = limit

    def broken(self, start: float, now: float) -> str | None:
        return f"it should stay below {self.limit:g}" if start <= self.limit < now else None


class CollapseGuard(Callback):
    """Warns, or stops training, when a rule on a logged metric is broken, and says by what numbers.

    The mean of the latest steps is compared with that of the run's first. A rule speaks once. What the run began with is
    kept in checkpoints. When it stops, the last checkpoint and the end of ``fit`` are as in any run.

    Args:
        action: ``warn`` and go on, or ``stop`` after the step.
        rules: What must hold. Unless given: completions of half to twice their first length, at most half of them
            truncated; the student's entropy between a quarter and three times its start; forward KL below three times;
            and, with `Health`, at most a twentieth that leak, and hedging words above a quarter of their start.
        window: Values that a mean is taken over, at least 1: of a metric that every step logs, so many steps. No rule speaks
            before twice as many are there.
    """

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        rules: list[CollapseRule] | None = None,
        window: PositiveInt = 10,
    ) -> None:
        if action not in ("warn", "stop"):
            raise UserError(f"CollapseGuard.action is {action}: choose warn or stop")
        self.action, self.window = action, PositiveInt(window)
        self.rules: Sequence[CollapseRule] = rules or [
            Drift("train/completion_tokens", 0.5, 2.0),
            Ceiling("train/truncated_fraction", 0.5),
            Drift("train/student_entropy", 0.25, 3.0),
            Drift("train/forward_kl", highest=3.0),
            Ceiling("health/leak_fraction", 0.05),
            Drift("health/hedges_per_1k_tokens", lowest=0.25),
        ]
        self._start: dict[str, list[float]] = {}
        self._latest: dict[str, list[float]] = {}
        self._spoken: list[str] = []
        self._seen: dict[str, Tensor] = {}

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        new = newly_logged(trainer.callback_metrics, self._seen)
        for metric in {rule.metric for rule in self.rules} & new.keys():  # SFT has no divergence
            first, latest = self._start.setdefault(metric, []), self._latest.setdefault(metric, [])
            (first if len(first) < self.window else latest).append(float(new[metric]))
            del latest[: -self.window]
        for rule in self.rules:
            if len(latest := self._latest.get(rule.metric, [])) == self.window:
                self._judge(rule, self._start[rule.metric], latest, trainer, pl_module, outputs)

    def _judge(
        self, rule: CollapseRule, first: list[float], latest: list[float], trainer: Trainer, module: Any, outputs: Any
    ) -> None:
        start, now = sum(first) / len(first), sum(latest) / len(latest)
        reason = rule.broken(start, now)
        if reason is None or (key := f"{rule.metric}: {reason}") in self._spoken:
            return
        self._spoken.append(key)
        numbers = ", ".join(f"{value:.4g}" for value in latest)
        example = str(module.tokenizer.decode(outputs["rollouts"].completions[0]))[:300]
        ending = "Training stops here" if self.action == "stop" else "Training goes on"
        rank_zero_warn(
            f"CollapseGuard at step {trainer.global_step}: {rule.metric} is {now:.4g} over its last {len(latest)} values "
            f"({numbers}), and was {start:.4g} over the first {len(first)}: {reason}. {ending}: look at the completions "
            "(RolloutTable), go back to an earlier checkpoint, lower the learning rate or clip the divergence "
            f"(model.objective.init_args.clip). A completion of this step: {example!r}"
        )
        if self.action == "stop":
            trainer.should_stop = True  # logged metrics are the same on every rank, so all stop

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "latest": self._latest, "spoken": self._spoken}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._start, self._latest, self._spoken = state_dict["start"], state_dict["latest"], state_dict["spoken"]
