"""The callback that logs the metrics of `health_metrics` as training goes: `Health`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
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
from opsd_lightning.callbacks.schedule import due
from opsd_lightning.losses.objectives import Update
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.types import PositiveInt, UserError, checked
from opsd_lightning.utils.token_text import Pieces


@checked
class Health(Callback):
    """Logs, under ``health/``, what goes wrong in self-distillation before accuracy tells (docs/seeing.md has every name).

    Of all completions of a step, on all ranks: forward KL of the first tokens, by quarter and by class of token; hedging
    words and leak phrases; n-grams shared with the trace; diversity; lengths against the run's first; the completions'
    accuracy, and by it the teacher's log-probability above the student's. What needs a teacher is left out where there is
    none. The first step is always measured; a step on the data's traces (`SFTModule`, some of `MixedOPSDModule`'s) is not,
    since the student wrote nothing there. Training does not change.

    Args:
        every_n_steps: Optimizer steps from one measurement to the next, at least 1. With ``updates_per_batch`` a batch is
            measured that ends at a multiple or passes one, by its first update.
        hedges: Words whose rate is logged. Those of ``health_metrics.HEDGES`` unless given.
        leaks: Phrases that speak of what only the teacher read. Those of ``health_metrics.LEAKS`` unless given.
        overlap_n: Words of the n-grams that are looked for in the trace, at least 1.
        grade: Whether completions are graded, which takes some milliseconds each.
        window: Measurements at the start of the run that lengths are compared with, at least 1.
    """

    #: Whether it has no use without logged metrics.
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
            except UserError as error:
                raise UserError(f"Health.{name}: {error}") from None
        self._lengths: list[float] = []  # of the first measurements
        self._pieces: Pieces | None = None
        self._classes: dict[int, str] = {}

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        assert isinstance(pl_module, PolicyModule)
        self._pieces, self._classes = Pieces(pl_module.tokenizer), {}
        if not trainer.global_step:
            self._lengths = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        # Lightning would give a value to the loggers again at each later step of the epoch.
        if trainer.fit_loop.epoch_loop._batches_that_stepped % max(trainer.log_every_n_steps, 1) == 0:  # type: ignore[attr-defined]
            for logged in (trainer._results or {}).values():
                if logged.meta.name.startswith("health/"):
                    logged.reset()

    def on_before_optimizer_step(self, trainer: Trainer, pl_module: LightningModule, optimizer: Any) -> None:
        assert isinstance(pl_module, PolicyModule)
        # By what is the same on every rank, since all take part in the sums.
        update = pl_module.current
        if update is not None and update.rollouts.sampled and due(trainer, pl_module, self.every_n_steps):
            values = {f"health/{name}": value for name, value in self.measure(pl_module, update).items()}
            pl_module.log_dict(values, batch_size=1)

    def logged_names(self, module: PolicyModule) -> set[str]:
        """Names of all that `measure` may give of this method."""
        names = {"hedges_per_1k_tokens", "leak_fraction", "trace_overlap", "distinct_3", "length_drift", "terminated_tokens"}
        divergence = "forward_kl" in module.measured
        if divergence:
            names |= {f"forward_kl_{name}" for name in PositionDivergence().groups}
            names |= {f"forward_kl_{name}{ending}" for name in CLASSES for ending in ("", "_share")}
            names.add("forward_kl_style_over_math")
        if self.grade:
            names |= {"accuracy"} | ({"teacher_gap_correct", "teacher_gap_wrong"} if divergence else set())
        return {f"health/{name}" for name in names}

    def measure(self, module: PolicyModule, update: Update) -> dict[str, Tensor | float]:
        """Every value by its name, over all ranks. Every rank must call."""
        batch, rollouts, measured = update.batch, update.rollouts, update.measured
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
        overlap.update(texts, [e.trace or "" for e in examples], [e.question for e in examples])
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
        if self.grade:
            values |= self._graded(module, update, texts, [e.answer for e in examples])
        return values

    def _graded(self, module: PolicyModule, update: Update, texts: list[str], answers: list[str]) -> dict[str, Tensor]:
        grader, measured = module.evaluator.grader, update.measured
        rows = [row for row, answer in enumerate(answers) if answer]  # some contexts need no reference answer
        gaps = None
        if "teacher_logprob" in measured:
            gaps = [measured["teacher_logprob"][row] - measured["student_logprob"][row] for row in rows]
        split = CorrectnessGap().to(module.device)
        graded = grader.grades([texts[row] for row in rows], [answers[row] for row in rows])
        split.update(gaps, [grade.correct for grade in graded])
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
