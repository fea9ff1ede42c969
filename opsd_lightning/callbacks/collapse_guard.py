"""Guard against collapse: rules on logged metrics, and a warning or the end of training when a rule is broken.

Self-distillation collapses slowly and in known ways: completions become too short or reach the length limit, the entropy
explodes or vanishes, or the divergence grows. Each shows as a drift of a logged metric from its values at the start.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch import Tensor

from opsd_lightning.callbacks.schedule import newly_logged
from opsd_lightning.types import ConfigError, NonNegativeFloat, PositiveFloat, PositiveInt, checked

_RULES = "trainer.callbacks.rules"
#: Values that a rule averages by default, and the fewest of them in a short run.
_WINDOW, _SHORTEST_WINDOW = 10, 3


@checked
class CollapseRule(ABC):
    """Base class of rules on a logged metric.

    Args:
        metric: Name of the metric, as training steps log it.
        window: Number of values to average, at least 1. Defaults to the window of `CollapseGuard`.
    """

    def __init__(self, metric: str, window: PositiveInt | None = None) -> None:
        self.metric, self.window = metric, window

    @abstractmethod
    def broken(self, start: float, now: float) -> str | None:
        """Return the rule in words if it is broken, else None.

        Args:
            start: Mean of the metric's first values.
            now: Mean of the metric's latest values.
        """


@checked
class Drift(CollapseRule):
    """Rule that the metric stays within a range relative to its mean at the start.

    Args:
        metric: Name of the metric, as training steps log it.
        lowest: Lower bound as a multiple of the mean at the start, 0 or more. 0 means no lower bound.
        highest: Upper bound as a multiple of the mean at the start, above 0. Defaults to no upper bound.
        window: Number of values to average, at least 1. Defaults to the window of `CollapseGuard`.
        smallest_start: Smallest mean at the start, in the metric's unit. The rule does not apply to a run that starts below
            it. For rates of rare events, whose mean at the start is a few events and so mostly chance.
    """

    def __init__(
        self,
        metric: str,
        lowest: NonNegativeFloat = 0.0,
        highest: PositiveFloat | None = None,
        window: PositiveInt | None = None,
        smallest_start: NonNegativeFloat = 0.0,
    ) -> None:
        super().__init__(metric, window)
        self.lowest, self.highest, self.smallest_start = lowest, highest, smallest_start
        if highest is None and not lowest:
            raise ConfigError(f"Drift of {metric} has no bound", _RULES, "Set lowest, highest or both")
        if highest is not None and lowest >= highest:
            problem = f"Drift of {metric} has lowest {lowest}, which is not below highest {highest}"
            raise ConfigError(problem, _RULES, "Set lowest below highest")

    def broken(self, start: float, now: float) -> str | None:
        if start <= 0 or start < self.smallest_start:  # multiples of 0 are no bounds
            return None
        if now < self.lowest * start:
            return f"it should stay above {self.lowest:g} times its value at the start"
        if self.highest is not None and now > self.highest * start:
            return f"it should stay below {self.highest:g} times its value at the start"
        return None


@checked
class Ceiling(CollapseRule):
    """Rule that the metric stays at or below a limit.

    Args:
        metric: Name of the metric, as training steps log it.
        limit: Largest allowed value.
        from_start: If True, the rule also applies to a run that starts above the limit.
        window: Number of values to average, at least 1. Defaults to the window of `CollapseGuard`.
    """

    def __init__(self, metric: str, limit: float, from_start: bool = False, window: PositiveInt | None = None) -> None:
        super().__init__(metric, window)
        self.limit, self.from_start = limit, from_start

    def broken(self, start: float, now: float) -> str | None:
        applies = self.from_start or start <= self.limit
        return f"it should not exceed {self.limit:g}" if applies and now > self.limit else None


@checked
class CollapseGuard(Callback):
    """Callback that warns or stops training when a rule on a logged metric is broken.

    A rule compares the mean of a metric's latest values with the mean of its first values in the run, and is reported once.
    Checkpoints store both. A stopped run ends like any other run, with the last checkpoint and the end of ``fit``.
    `RunReport` shows the warnings.

    Whatever the rules, the guard also reports 10 steps in a row (50 in GRPO) that taught nothing: all completions were
    empty, all tokens were left out of the loss, or the gradient was zero.

    Args:
        action: ``warn``, or ``stop`` training after the step.
        rules: Rules on logged metrics. The defaults bound, relative to the start of the run, the completion length (0.5 to 2
            times), the student's entropy (0.25 to 3 times) and the forward KL (3 times), and allow at most half of the
            completions to be truncated. With `Health`, they also allow a leak in at most 5 % of the completions and a rate
            of hedging words of at least 0.25 times that at the start, as means over 3 measurements. The last rule applies
            to runs that start with at least 5 hedging words per 1,000 tokens.
        window: Number of values to average, at least 1. A rule applies once twice as many values were logged. Defaults to
            10, or to a quarter of the run's steps if that is less, but at least 3. A message before training names the rules
            that a run is too short for.

    Example::

        >>> from opsd_lightning import CollapseGuard, Drift
        >>> rule = Drift("train/forward_kl", highest=3.0)
        >>> rule.broken(start=0.2, now=0.9)
        'it should stay below 3 times its value at the start'
        >>> guard = CollapseGuard("stop", rules=[rule], window=20)
    """

    #: True for callbacks that need logged metrics.
    reads_metrics = True

    def __init__(
        self,
        action: Literal["warn", "stop"] = "warn",
        rules: list[CollapseRule] | None = None,
        window: PositiveInt | None = None,
    ) -> None:
        if action not in ("warn", "stop"):
            problem = f"CollapseGuard has no action {action!r}"
            raise ConfigError(problem, "trainer.callbacks.action", "Choose warn or stop")
        self.action, self.window = action, window
        self._usual = window or _WINDOW  # the window of rules without their own
        self._has_own_rules = rules is not None
        self.rules: Sequence[CollapseRule] = rules or [
            Drift("train/completion_tokens", 0.5, 2.0),
            Ceiling("train/truncated_fraction", 0.5),
            Drift("train/student_entropy", 0.25, 3.0),
            Drift("train/forward_kl", highest=3.0),
            # Health measures every 10 steps by default.
            Ceiling("health/leak_fraction", 0.05, from_start=True, window=3),
            Drift("health/hedges_per_1k_tokens", lowest=0.25, window=3, smallest_start=5.0),
        ]
        self._reset()

    @property
    def watched_metrics(self) -> list[str]:
        """Metrics of the rules that were passed. Default rules are not listed, since not every method logs their metrics."""
        return [rule.metric for rule in self.rules] if self._has_own_rules else []

    def _reset(self) -> None:
        # The first and the latest values of each rule's metric, in the order of the rules.
        self._start: list[list[float]] = [[] for _ in self.rules]
        self._latest: list[list[float]] = [[] for _ in self.rules]
        self._reported: list[str] = []
        self._seen: dict[str, Tensor] = {}
        self._told_short = False
        #: Warnings of this run, in the order of the steps.
        self.messages: list[str] = []
        #: True if the guard stopped the run.
        self.stopped = False

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.stopped = False  # a resumed run starts over
        if not trainer.global_step:
            self._reset()
            steps = _planned_steps(trainer, pl_module)
            if self.window is None:
                self._usual = _WINDOW if steps is None else max(min(_WINDOW, steps // 4), _SHORTEST_WINDOW)
            self._tell_of_a_short_run(steps)

    def _tell_of_a_short_run(self, steps: int | None) -> None:
        """Tell which rules on metrics of every step cannot apply. Others are measured at another rate."""
        if steps is None:
            return
        late = [rule for rule in self.rules if rule.metric.startswith("train/") and 2 * self._window(rule) > steps]
        self._told_short = bool(late)
        if late:
            names, needed = ", ".join(rule.metric for rule in late), min(2 * self._window(rule) for rule in late)
            rank_zero_info(
                f"CollapseGuard cannot apply its rules on {names}: they need {needed} steps, and the run has {steps}. Set "
                "trainer.callbacks.window lower, or train longer"
            )

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        if self._has_own_rules and not self._seen:
            self._warn_of_missing_metrics(trainer)
        idle = getattr(pl_module, "idle", None)
        if idle is not None and idle.streak == idle.limit:
            self._report(trainer, f"CollapseGuard at step {trainer.global_step}: {idle.problem}. {self._consequence}.")
        new = newly_logged(trainer.callback_metrics, self._seen)
        for rule, first, latest in zip(self.rules, self._start, self._latest, strict=True):
            if rule.metric not in new:  # such as the divergence in SFT
                continue
            window = self._window(rule)
            (first if len(first) < window else latest).append(float(new[rule.metric]))
            del latest[:-window]
            if len(latest) == window:
                self._apply(rule, first, latest, trainer, pl_module, outputs)

    def _warn_of_missing_metrics(self, trainer: Trainer) -> None:
        """Warn of rules on metrics that the first step did not log, which are probably misspelled."""
        logged = trainer.callback_metrics
        missing = [rule.metric for rule in self.rules if rule.metric not in logged and not rule.metric.startswith("val/")]
        if missing:
            names = ", ".join(sorted(name for name in logged if not name.startswith("time/")))
            rank_zero_warn(
                f"{_RULES}: CollapseGuard has rules on {', '.join(missing)}, which the first step did not log. It logged "
                f"{names}. Metrics under health/ need the callback Health before CollapseGuard"
            )

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        compared = any(len(values) == self._window(rule) for rule, values in zip(self.rules, self._latest, strict=True))
        if self._seen and not compared and not self._told_short:
            rank_zero_info(
                f"CollapseGuard compared no metric, since it needs {2 * self._usual} values of one and the run was shorter. "
                "Set trainer.callbacks.window lower"
            )

    def _window(self, rule: CollapseRule) -> int:
        return rule.window or self._usual

    def _apply(
        self, rule: CollapseRule, first: list[float], latest: list[float], trainer: Trainer, module: Any, outputs: Any
    ) -> None:
        start, now = sum(first) / len(first), sum(latest) / len(latest)
        reason = rule.broken(start, now)
        if reason is None or (key := f"{rule.metric}: {reason}") in self._reported:
            return
        self._reported.append(key)
        numbers = ", ".join(f"{value:.4g}" for value in latest)
        example = str(module.tokenizer.decode(outputs["rollouts"].completions[0]))[:300]
        text = (
            f"CollapseGuard at step {trainer.global_step}: {rule.metric} is {now:.4g} over its last {len(latest)} values "
            f"({numbers}), and was {start:.4g} over its first {len(first)}: {reason}. {self._consequence}. Look at the "
            "completions (RolloutTable). Possible fixes: resume from an earlier checkpoint, lower the learning rate, or "
            f"clip the divergence (model.objective.clip). A completion of this step: {example!r}"
        )
        self._report(trainer, text)

    @property
    def _consequence(self) -> str:
        return "Training stops" if self.action == "stop" else "Training continues"

    def _report(self, trainer: Trainer, text: str) -> None:
        self.messages.append(text)
        rank_zero_warn(text)
        if self.action == "stop":
            self.stopped = trainer.should_stop = True  # on every rank, since logged metrics are the same on all

    def state_dict(self) -> dict[str, Any]:
        return {
            "start": self._start,
            "latest": self._latest,
            "spoken": self._reported,
            "said": self.messages,
            "window": self._usual,
        }

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        if len(state_dict["start"]) == len(self.rules):  # with other rules, collect values anew
            self._start, self._latest = state_dict["start"], state_dict["latest"]
            self._usual = self.window or state_dict.get("window", _WINDOW)
        self._reported, self.messages = state_dict["spoken"], state_dict["said"]


def _planned_steps(trainer: Trainer, module: LightningModule) -> int | None:
    """Return the number of batches of the run, each of which logs its metrics once, or None if it is unknown."""
    updates = getattr(module, "updates_per_batch", 1)
    limits = [-(-trainer.max_steps // updates)] if trainer.max_steps >= 0 else []
    if trainer.max_epochs is not None and trainer.max_epochs >= 0 and trainer.num_training_batches < float("inf"):
        limits.append(int(trainer.max_epochs * trainer.num_training_batches))
    return min(limits, default=None)
