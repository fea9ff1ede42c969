"""Callback `Health`, which logs the metrics of `health_metrics` during training."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from torch import Tensor

from opsd_lightning.callbacks.health_metrics import (
    CLASSES,
    HEDGES,
    LEAKS,
    ClassDivergence,
    CorrectnessGap,
    Distinct,
    MeanLength,
    PhraseRate,
    PositionDivergence,
    TraceOverlap,
    token_class,
)
from opsd_lightning.callbacks.schedule import is_due
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.step import StepCallback, StepRecord
from opsd_lightning.types import ConfigError, Example, PositiveInt, checked
from opsd_lightning.utils.messages import prompt_text
from opsd_lightning.utils.token_text import Pieces


@checked
class Health(StepCallback):
    """Callback that logs early signs of the known failures of self-distillation under ``health/``.

    docs/seeing.md lists all metrics. They cover all completions of a step on all ranks: forward KL of the first tokens, by
    quarter of the completion and by class of token; rates of hedging words and leak phrases; overlap with the trace;
    diversity; length relative to the start of the run; accuracy; and the log-probability of teacher minus student for
    correct and wrong completions. Metrics that need a teacher are left out without one.

    The first step is always measured. Steps on the traces of the data (in `SFTModule` and `MixedOPSDModule`) are not
    measured, since the student did not write those completions. The callback does not change training.

    Args:
        every_n_steps: Number of optimizer steps between measurements, at least 1. With ``updates_per_batch`` above 1, a
            batch is measured at its first update if its updates reach or pass a multiple of this number.
        hedges: Hedging words. Defaults to ``health_metrics.HEDGES``.
        leaks: Phrases that refer to the teacher's privileged context. Defaults to ``health_metrics.LEAKS``.
        overlap_n: Length n of the n-grams that are compared with the trace, at least 1.
        grade: If True, completions are graded, which takes a few milliseconds each.
        window: Number of measurements at the start of the run that later lengths are compared with, at least 1.

    Example::

        >>> from opsd_lightning import CollapseGuard, Health
        >>> health = Health(every_n_steps=5, hedges=["wait", "hmm", "let me check"])
        >>> callbacks = [health, CollapseGuard()]  # Health first, since CollapseGuard reads its metrics
    """

    #: True for callbacks that need logged metrics.
    reads_metrics = True

    def __init__(
        self,
        every_n_steps: PositiveInt = 10,
        hedges: Sequence[str] | None = None,
        leaks: Sequence[str] | None = None,
        overlap_n: PositiveInt = 4,
        grade: bool = True,
        window: PositiveInt = 3,
    ) -> None:
        self.every_n_steps, self.window = every_n_steps, window
        self.overlap_n = overlap_n
        self.hedges = HEDGES if hedges is None else tuple(hedges)
        self.leaks = LEAKS if leaks is None else tuple(leaks)
        self.grade = grade
        for name, phrases in (("hedges", self.hedges), ("leaks", self.leaks)):
            try:
                PhraseRate(phrases)
            except ConfigError as error:
                raise ConfigError(f"Health: {error.problem}", f"trainer.callbacks.{name}", error.fix) from None
        self._lengths: list[float] = []  # mean lengths of the first measurements
        self._pieces: Pieces | None = None
        self._classes: dict[int, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._pieces, self._classes = Pieces(pl_module.tokenizer), {}
        if not trainer.global_step:
            self._lengths = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Without a reset, Lightning logs the same value again at each later step of the epoch.
        if trainer.fit_loop.epoch_loop._batches_that_stepped % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            for logged in (trainer._results or {}).values():
                if logged.meta.name.startswith("health/"):
                    logged.reset()

    def on_step_scored(self, trainer: Trainer, pl_module: PolicyModule, record: StepRecord) -> None:
        # Decided by what is equal on every rank, because all ranks take part in the sums.
        if record.rollouts.sampled and is_due(trainer, pl_module, self.every_n_steps):
            values = {f"health/{name}": value for name, value in self.measure(pl_module, record).items()}
            pl_module.log_dict(values, batch_size=1)

    def logged_names(self, module: PolicyModule) -> set[str]:
        """Return the names of all metrics that `measure` can return for a method."""
        names = {"hedges_per_1k_tokens", "leak_fraction", "trace_overlap", "distinct_3", "length_drift", "terminated_tokens"}
        divergence = "forward_kl" in module.measured
        if divergence:
            names |= {f"forward_kl_{name}" for name in PositionDivergence().groups}
            names |= {f"forward_kl_{name}{ending}" for name in CLASSES for ending in ("", "_share")}
            names.add("forward_kl_style_over_math")
        if self.grade and module.evaluator.grader.grades_completions:
            names |= {"accuracy"} | ({"teacher_gap_correct", "teacher_gap_wrong"} if divergence else set())
        return {f"health/{name}" for name in names}

    def measure(self, module: PolicyModule, record: StepRecord) -> dict[str, Tensor | float]:
        """Compute all metrics over all ranks, by name without ``health/``. Call it on every rank."""
        batch, rollouts, measured = record.batch, record.rollouts, record.measured
        texts = module.tokenizer.batch_decode(rollouts.completions, skip_special_tokens=True)
        examples = [batch.examples[row // rollouts.n] for row in range(len(texts))]
        lengths = [len(completion) for completion in rollouts.completions]
        values: dict[str, Tensor | float] = {}

        hedging, leaking = PhraseRate(self.hedges).to(module.device), PhraseRate(self.leaks).to(module.device)
        hedging.update(texts, lengths)
        leaking.update(texts, lengths)
        values["hedges_per_1k_tokens"] = hedging.compute()["per_1k"]
        values["leak_fraction"] = leaking.compute()["fraction"]

        overlap = TraceOverlap(self.overlap_n).to(module.device)
        overlap.update(texts, [e.trace or "" for e in examples], [prompt_text(e) for e in examples])
        values["trace_overlap"] = overlap.compute()

        distinct = Distinct().to(module.device)
        for start in range(0, len(texts), rollouts.n):
            distinct.update(texts[start : start + rollouts.n])
        values["distinct_3"] = distinct.compute()

        length = MeanLength().to(module.device)
        length.update(lengths, rollouts.terminated)
        found = length.compute()
        if len(self._lengths) < self.window:
            self._lengths.append(float(found["all"]))
        values["length_drift"] = found["all"] * len(self._lengths) / max(sum(self._lengths), 1e-9)
        if "terminated" in found:
            values["terminated_tokens"] = found["terminated"]

        if "forward_kl" in measured:
            position, classes = PositionDivergence().to(module.device), ClassDivergence().to(module.device)
            position.update(measured["forward_kl"])
            classes.update(measured["forward_kl"], [[self._class(t) for t in row] for row in rollouts.completions])
            for metric in (position, classes):
                values |= {f"forward_kl_{name}": value for name, value in metric.compute().items()}
        if self.grade and module.evaluator.grader.grades_completions:
            values |= self._graded(module, record, texts, examples)
        return values

    def _graded(
        self, module: PolicyModule, record: StepRecord, texts: list[str], examples: list[Example]
    ) -> dict[str, Tensor]:
        grader, measured = module.evaluator.grader, record.measured
        rows = [row for row, example in enumerate(examples) if grader.can_grade(example)]
        gaps = None
        if "teacher_logprob" in measured:
            gaps = [measured["teacher_logprob"][row] - measured["student_logprob"][row] for row in rows]
        split = CorrectnessGap().to(module.device)
        graded = grader.grades([texts[row] for row in rows], [examples[row] for row in rows])
        split.update(gaps, [grader.is_right(grade.score) for grade in graded])
        names = {"accuracy": "accuracy", "correct": "teacher_gap_correct", "wrong": "teacher_gap_wrong"}
        return {names[name]: value for name, value in split.compute().items()}

    def _class(self, token: int) -> str:
        if token not in self._classes:
            assert self._pieces is not None
            self._classes[token] = token_class(self._pieces[token])
        return self._classes[token]

    def state_dict(self) -> dict[str, Any]:
        return {"lengths": self._lengths}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self._lengths = list(state_dict["lengths"])
