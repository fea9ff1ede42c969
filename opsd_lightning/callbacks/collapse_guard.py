"""A guard against collapse: rules on logged metrics, and what happens when one is broken.

Self-distillation collapses slowly and in known ways: completions that shrink or run into the limit, entropy that explodes
or dies, a divergence that grows in place of falling. Each is a drift of a logged number from where the run began.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from opsd_lightning.callbacks.schedule import newly_logged
from opsd_lightning.types import NonNegativeFloat, PositiveFloat, PositiveInt, UserError, checked


@checked
class CollapseRule(ABC):
    """What must hold of one logged metric.

    Args:
        metric: Its name, as training steps log it.
        window: Of how many of its values a mean is taken, at least 1. As the guard's unless given.
    """

    def __init__(self, metric: str, window: PositiveInt | None = None) -> None:
        self.metric, self.window = metric, window

    @abstractmethod
    def broken(self, start: float, now: float) -> str | None:
        """The rule in words if it is broken, else None.

        Args:
            start: The mean of the metric's first values.
            now: Of its latest.
        """


@checked
class Drift(CollapseRule):
    """The metric stays within a range around its start.

    Args:
        metric: Its name, as training steps log it.
        lowest: Least share of the start, 0 or more. No lower bound at 0.
        highest: Largest multiple of the start, above 0. No upper bound unless given.
        window: Of how many of its values a mean is taken, at least 1. As the guard's unless given.
    """

    def __init__(
        self,
        metric: str,
        lowest: NonNegativeFloat = 0.0,
        highest: PositiveFloat | None = None,
        window: PositiveInt | None = None,
    ) -> None:
        super().__init__(metric, window)
        self.lowest, self.highest = lowest, highest
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


@checked
class Ceiling(CollapseRule):
    """The metric stays below a limit.

    Args:
        metric: Its name, as training steps log it.
        limit: The most it may be.
        from_start: Whether that is also asked of a run that began above it.
        window: Of how many of its values a mean is taken, at least 1. As the guard's unless given.
    """

    def __init__(self, metric: str, limit: float, from_start: bool = False, window: PositiveInt | None = None) -> None:
        super().__init__(metric, window)
        self.limit, self.from_start = limit, from_start

    def broken(self, start: float, now: float) -> str | None:
        asked = self.from_start or start <= self.limit
        return f"it should stay below {self.limit:g}" if asked and now > self.limit else None


@checked
class CollapseGuard(Callback):
    """Warns, or stops training, when a rule on a logged metric is broken, and says by what numbers.

    The mean of a metric's latest values is compared with that of the run's first. A rule speaks once. What the run began
    with is kept in checkpoints. When it stops, the last checkpoint and the end of ``fit`` are as in any run. `RunReport`
    shows what was said. Whatever the rules, it also speaks of steps in a row that taught nothing: all completions empty, all
    tokens left out of the loss, or no gradient (10 steps; 50 of GRPO).

    Args:
        action: ``warn`` and go on, or ``stop`` after the step.
        rules: What must hold. Unless given: completions of half to twice their first length, at most half of them
            truncated; the student's entropy between a quarter and three times its start; forward KL below three times;
            and, with `Health`, at most a twentieth that leak, and hedging words above a quarter of their start, both over
            three of its measurements.
        window: Values that a mean is taken over, at least 1: of a metric that every step logs, so many steps. No rule speaks
            before twice as many are there.
    """

    #: Whether it has no use without logged metrics.
    reads_metrics = True

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        rules: list[CollapseRule] | None = None,
        window: PositiveInt = 10,
    ) -> None:
        if action not in ("warn", "stop"):
            raise UserError(f"CollapseGuard.action is {action}: choose warn or stop")
        self.action, self.window = action, window
        self._own = rules is not None
        self.rules: Sequence[CollapseRule] = rules or [
            Drift("train/completion_tokens", 0.5, 2.0),
            Ceiling("train/truncated_fraction", 0.5),
            Drift("train/student_entropy", 0.25, 3.0),
            Drift("train/forward_kl", highest=3.0),
            # Measured every tenth step unless told otherwise.
            Ceiling("health/leak_fraction", 0.05, from_start=True, window=3),
            Drift("health/hedges_per_1k_tokens", lowest=0.25, window=3),
        ]
        self._begin()

    @property
    def watched_metrics(self) -> list[str]:
        """Metrics of the rules that were given. The default ones are for more methods than each run has."""
        return [rule.metric for rule in self.rules] if self._own else []

    def _begin(self) -> None:
        # By place of the rule: its first values, and its latest.
        self._start: list[list[float]] = [[] for _ in self.rules]
        self._latest: list[list[float]] = [[] for _ in self.rules]
        self._spoken: list[str] = []
        self._seen: dict[str, Tensor] = {}
        #: What was said, in the order of the steps.
        self.said: list[str] = []
        #: Whether it ended the run.
        self.stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stopped = False  # of an earlier part of the run
        if not trainer.global_step:
            self._begin()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._own and not self._seen:
            self._look_for_names(trainer)
        idle = getattr(pl_module, "idle", None)
        if idle is not None and idle.streak == idle.limit:
            self._say(trainer, f"CollapseGuard at step {trainer.global_step}: {idle.problem}. {self._ending}.")
        new = newly_logged(trainer.callback_metrics, self._seen)
        for rule, first, latest in zip(self.rules, self._start, self._latest, strict=True):
            if rule.metric not in new:  # SFT has no divergence
                continue
            window = self._window(rule)
            (first if len(first) < window else latest).append(float(new[rule.metric]))
            del latest[:-window]
            if len(latest) == window:
                self._judge(rule, first, latest, trainer, pl_module, outputs)

    def _look_for_names(self, trainer: Trainer) -> None:
        """A rule of one's own on a metric that the first step does not log is likely a slip of the pen."""
        there = trainer.callback_metrics
        missing = [rule.metric for rule in self.rules if rule.metric not in there and not rule.metric.startswith("val/")]
        if missing:
            names = ", ".join(sorted(name for name in there if not name.startswith("time/")))
            rank_zero_warn(
                f"CollapseGuard.rules: the first step did not log {', '.join(missing)}. It logged {names}. (health/... "
                "needs the callback Health, named before CollapseGuard.)"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        spoke = any(len(values) == self._window(rule) for rule, values in zip(self.rules, self._latest, strict=True))
        if self._seen and not spoke:
            rank_zero_info(
                f"CollapseGuard compared nothing: it needs {2 * self.window} values of a metric, its first {self.window} "
                "and its latest, and the run was shorter. Set CollapseGuard.window lower"
            )

    def _window(self, rule: CollapseRule) -> int:
        return rule.window or self.window

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
        text = (
            f"CollapseGuard at step {trainer.global_step}: {rule.metric} is {now:.4g} over its last {len(latest)} values "
            f"({numbers}), and was {start:.4g} over the first {len(first)}: {reason}. {self._ending}: look at the "
            "completions (RolloutTable), go back to an earlier checkpoint, lower the learning rate or clip the divergence "
            f"(model.objective.init_args.clip). A completion of this step: {example!r}"
        )
        self._say(trainer, text)

    @property
    def _ending(self) -> str:
        return "Training stops here" if self.action == "stop" else "Training goes on"

    def _say(self, trainer: Trainer, text: str) -> None:
        self.said.append(text)
        rank_zero_warn(text)
        if self.action == "stop":
            self.stopped = trainer.should_stop = True  # logged metrics are the same on every rank, so all stop

    def state_dict(self) -> dict[str, Any]:
        return {"start": self._start, "latest": self._latest, "spoken": self._spoken, "said": self.said}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["start"]) == len(self.rules):  # else it was told other rules, and begins anew
            self._start, self._latest = state_dict["start"], state_dict["latest"]
        self._spoken, self.said = state_dict["spoken"], state_dict["said"]
