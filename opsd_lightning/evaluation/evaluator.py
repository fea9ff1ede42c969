"""Validation, test and predict: sample completions, grade them and compute metrics."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from typing import Any

import torch
from lightning.pytorch import Callback, LightningModule
from lightning.pytorch.strategies import DDPStrategy
from lightning.pytorch.trainer.states import TrainerFn
from peft import PeftModel
from torch import Tensor, nn
from torchmetrics import MeanMetric, MetricCollection, SumMetric
from transformers import PreTrainedTokenizerBase

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.distributed.collectives import TrainerRanks, rank_and_world_size
from opsd_lightning.evaluation.accuracy import AccuracyAtK, pass_sizes
from opsd_lightning.evaluation.demonstrations import DemonstrationScores
from opsd_lightning.grading.base import PROBLEMS, Grader
from opsd_lightning.models.policy import Policy
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.models.token_budget import TokenBudget
from opsd_lightning.rollouts.base import Demand, RolloutEngine, seed_for
from opsd_lightning.rollouts.importance import check_difference, log_ratios
from opsd_lightning.rollouts.self_checks import Agreement, check_policy
from opsd_lightning.runs.resuming import batches_trained
from opsd_lightning.runs.signals import disconnect, stop_if_signalled, watch_signals
from opsd_lightning.teachers import GenerativeTeacher, Teacher
from opsd_lightning.types import ConfigError, PromptBatch, Rollouts, Sampling

#: Raises if completions were not sampled from the policy. Takes the prompt of each completion, and the completions.
Check = Callable[[list[list[int]], Rollouts], None]

Records = dict[str, list[dict[str, Any]]]  # by role, one record per completion


class Evaluator(nn.Module):
    """Samples and grades completions of each role, and accumulates their metrics over an epoch.

    With a grader that grades no completions (`Grader.grades_completions`), it scores the demonstrations instead.

    Args:
        sampling: Settings of the sampler.
        grader: Grader of the completions.
        teacher: Teacher to grade too, on its privileged prompts. Defaults to none.
        divergence: If True, and no completions are graded, also measure the divergence of student and teacher on the
            demonstrations.

    Attributes:
        finished: Records that an earlier run sampled, by number of the batch. They are not sampled again. All ranks have the
            same numbers, since sampling may need all ranks.
        intervals: 95 % intervals of metrics that `compute` returned last, by logged name (see `AccuracyAtK`).
    """

    def __init__(
        self, sampling: Sampling, grader: Grader, teacher: GenerativeTeacher | None = None, divergence: bool = False
    ) -> None:
        super().__init__()
        self.sampling, self.grader, self.teacher = sampling, grader, teacher
        roles = ["student", "teacher"] if teacher is not None else ["student"]
        self.accuracy = nn.ModuleDict({role: AccuracyAtK(sampling.n) for role in roles})
        self.lengths = nn.ModuleDict(
            {
                role: MetricCollection({"completion_tokens": MeanMetric(), "truncated_fraction": MeanMetric()})
                for role in roles
            }
        )
        self.problems = nn.ModuleDict({role: MetricCollection({name: SumMetric() for name in PROBLEMS}) for role in roles})
        self.demonstrations = None if grader.grades_completions else DemonstrationScores(divergence)
        self.finished: Mapping[int, Records] = {}
        self.intervals: dict[str, tuple[float, float]] = {}

    @property
    def roles(self) -> list[str]:
        """Roles with graded completions."""
        return list(self.accuracy)

    def grade(
        self,
        engine: RolloutEngine,
        model: PeftModel,
        tokenizer: PreTrainedTokenizerBase,
        batch: PromptBatch,
        seed: int,
        roles: Sequence[str],
        check: Check | None = None,
    ) -> Records:
        """Sample and grade a batch.

        Args:
            engine: Engine that samples.
            model: The policy.
            tokenizer: Its tokenizer.
            batch: The questions.
            seed: Seed for sampling.
            roles: ``student``, ``teacher`` or both.
            check: Called with the student's completions.

        Returns:
            Records of all completions that count, by role. Completions of a question are adjacent.
        """
        found: Records = {}
        for role in roles:
            prompts = batch.student
            if role == "teacher":
                prompts = batch.teacher
                if not all(prompts):
                    problem = "the batch has no prompts for the teacher"
                    fix = "Make them in the data module, or set it to false"
                    raise ConfigError(problem, "model.evaluate_teacher", fix)
            with self.teacher.weights(model) if self.teacher and role == "teacher" else nullcontext():
                rollouts = engine.generate(model, prompts, self.sampling, seed)
            if check is not None and role == "student":
                check([prompt for prompt in prompts for _ in range(rollouts.n)], rollouts)
            found[role] = self._records(tokenizer, batch, rollouts)
        return found

    def _records(self, tokenizer: PreTrainedTokenizerBase, batch: PromptBatch, rollouts: Rollouts) -> list[dict[str, Any]]:
        n = rollouts.n
        places = [place for place, counted in enumerate(batch.counted) if counted]
        rows = [row for place in places for row in range(place * n, (place + 1) * n)]
        texts = [str(tokenizer.decode(rollouts.completions[row], skip_special_tokens=True)) for row in rows]
        grades = self.grader.grades(texts, [batch.examples[row // n] for row in rows])
        votes = self.grader.votes_of([grades[start : start + n] for start in range(0, len(grades), n)])
        cast = [vote for question in votes for vote in question]
        records: list[dict[str, Any]] = []
        graded = self.grader.grades_completions
        for row, text, grade, vote in zip(rows, texts, grades, cast, strict=True):
            place, sample = divmod(row, n)
            records.append(
                {
                    "index": batch.indices[place] if batch.indices else None,
                    "sample": sample,
                    "question": batch.examples[place].question,
                    "reference": self.grader.shown_reference(batch.examples[place]),
                    "completion": text,
                    "answer": grade.answer,
                    "correct": self.grader.is_right(grade.score) if graded else None,
                    "score": grade.score if graded else None,
                    "vote": vote,
                    "completion_tokens": len(rollouts.completions[row]),
                    "truncated": not rollouts.terminated[row],
                }
                | ({"grading_problem": grade.problem} if grade.problem else {})
            )
        return records

    def count(self, found: Records) -> None:
        """Add the records of a batch to the metrics."""
        n = self.sampling.n
        for role, records in found.items():
            # A rank without a question updates its metrics too, with no completions.
            for group in [records[start : start + n] for start in range(0, len(records), n)] or [[]]:
                votes, right = [r["vote"] for r in group], [r["correct"] for r in group]
                self.accuracy[role].update(votes, right, [r["score"] for r in group])  # type: ignore[operator]
                for record in group:
                    self.lengths[role]["completion_tokens"].update(record["completion_tokens"])  # type: ignore[index]
                    self.lengths[role]["truncated_fraction"].update(float(record["truncated"]))  # type: ignore[index]
                    for name, problem in PROBLEMS.items():
                        self.problems[role][name].update(float(record.get("grading_problem") == problem))  # type: ignore[index]

    def names(self, stage: str) -> set[str]:
        """Return the names of all metrics of `compute`."""
        if self.demonstrations is not None:
            return {f"{stage}/{name}" for name in self.demonstrations}
        n, found = self.sampling.n, set()
        for role in self.roles:
            prefix = f"{stage}/{'teacher_' if role == 'teacher' else ''}"
            for score in (f"avg@{n}", f"maj@{n}", *(f"pass@{j}" for j in pass_sizes(n))):
                found |= {f"{prefix}{score}{ending}" for ending in ("", "_se", *(["_se_samples"] if n > 1 else []))}
            found |= {f"{prefix}{name}" for name in (*self.lengths[role], *self.problems[role])}  # type: ignore[misc]
        return found

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Return the metrics of the epoch over all ranks, by logged name, and reset them."""
        values: dict[str, Tensor] = {}
        self.intervals = {}
        if self.demonstrations is not None:
            values = {f"{stage}/{name}": value for name, value in self.demonstrations.compute().items()}
            self.demonstrations.reset()
            return values
        for role, accuracy in self.accuracy.items():
            prefix = f"{stage}/{'teacher_' if role == 'teacher' else ''}"
            for metric in (accuracy, self.lengths[role], self.problems[role]):
                values |= {f"{prefix}{name}": value for name, value in metric.compute().items()}  # type: ignore[operator]
                if metric is accuracy:
                    self.intervals |= {f"{prefix}{name}": ends for name, ends in accuracy.intervals.items()}  # type: ignore[operator, union-attr]
                metric.reset()  # type: ignore[operator]
        return values


class _CloseRollouts(Callback):
    """Closes the rollout engine after an error or a signal. Lightning does not call ``teardown`` then."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pl_module.rollouts.close()


class EvaluatedModule(LightningModule):
    """Base class with validation, test and predict: samples and grades completions.

    Attributes:
        policy: Recipe of the model.
        model: The policy's network.
        tokenizer: Its tokenizer.
        rollouts: Engine that samples completions.
        evaluator: Grades completions and computes metrics.
        objective: The method's objective. Its ``logits_memory_mib`` limits the memory of logits.
        scoring_budget: Tokens of one scoring pass.
        seed: Seed for rollouts.
        command: Command line of the run, for the message on how to resume. None for a run from Python.
        validated: Number of training batches before the last validation of a fit.
    """

    policy: Policy
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    rollouts: RolloutEngine
    evaluator: Evaluator
    objective: Any
    scoring_budget: TokenBudget
    seed: int
    command: str | None = None
    validated: int = 0
    # True if all ranks evaluate the same number of batches.
    _even: bool = False

    @property
    def teachers(self) -> Sequence[Teacher]:
        """Teachers that score completions in training."""
        return ()

    @property
    def demonstration_teacher(self) -> Teacher | None:
        """The teacher whose divergence from the student is measured on demonstrations, if no completions are graded."""
        return None

    def setup(self, stage: str) -> None:
        watch_signals(self.trainer)
        self.rollouts.prepare(self.policy, self.demand(stage))

    def sampled(self, stage: str) -> dict[str, Sampling]:
        """Return the sampling settings of each split of the data that a stage samples from."""
        if self.evaluator.demonstrations is not None and stage != "predict":
            return {}
        return {{"fit": "val", "validate": "val"}.get(stage, "test"): self.evaluator.sampling}

    def demand(self, stage: str) -> Demand | None:
        """Return the largest rollout of a stage on this device, or None without an `OPSDDataModule`."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, OPSDDataModule):
            return None
        tokens, rows = [], []
        for split, sampling in self.sampled(stage).items():
            if (batch := data.rows.get(split)) is not None:
                prompts = [
                    *batch.student,
                    *(batch.teacher if split != "train" and self.evaluator.teacher is not None else []),
                ]
                tokens.append(max(map(len, prompts)) + sampling.max_new_tokens)
                rows.append((data.batch_size if split == "train" else data.eval_batch_size) * sampling.n)
        for callback in self.trainer.callbacks:  # type: ignore[attr-defined]
            for demand in callback.demand(stage) if hasattr(callback, "demand") else ():
                tokens.append(demand.tokens)
                rows.append(demand.rows)
        return Demand(max(tokens), max(rows)) if tokens else None

    def logged_names(self) -> set[str]:
        """Return the names of all metrics that a fit logs, to check callbacks. Subclasses add their own metrics."""
        return self.evaluator.names("val")

    def on_validation_start(self) -> None:
        self._compare_batches(self.trainer.num_val_batches)
        if self.trainer.state.fn != TrainerFn.FITTING:  # a fit checks it at its start
            self.check_policy()

    def on_test_start(self) -> None:
        self._compare_batches(self.trainer.num_test_batches)
        self.check_policy()

    def on_predict_start(self) -> None:
        self._compare_batches(self.trainer.num_predict_batches)
        self.check_policy()

    def check_policy(self) -> Agreement:
        """Check the built policy and its teachers' own networks (see `rollouts.self_checks`). Every rank must call it.

        Raises:
            ConfigError: Logits of a row depend on other rows of its batch, or rollouts and scoring disagree.
        """
        strategy = self.trainer.strategy
        waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters", False)
        training = self.trainer.state.fn in (TrainerFn.FITTING, None)  # None in the doctor, before a fit
        with self.trainer.precision_plugin.forward_context():
            for teacher in self.teachers if training else ():
                if (network := teacher.network(self.model)) is not None:
                    check_policy(network, setting=teacher.setting)
            return check_policy(self.model, self.rollouts, every_adapter=waits and training and self.trainer.world_size > 1)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> Records:
        return self._graded(batch, batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> Records:
        return self._graded(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Return one record per completion of a batch."""
        return self._sampled(batch, batch_idx, ["student"])["student"]

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._stop_if_asked()

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._stop_if_asked()

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Stop after a batch if a signal asks for it and all ranks have the same number of batches."""
        if self._even:
            stop_if_signalled(self.trainer, self.command)

    def _compare_batches(self, batches: Sequence[int | float]) -> None:
        """Compare the ranks' numbers of batches. Every rank must call it."""
        if self.trainer.world_size == 1:
            self._even = True
            return
        counts = torch.tensor([sum(batches), -sum(batches)], dtype=torch.float64, device=self.trainer.strategy.root_device)
        most, least = self.trainer.strategy.reduce(counts, None, "max").tolist()  # type: ignore[union-attr]
        self._even = most == -least < math.inf

    def on_predict_epoch_end(self) -> None:
        stop_if_signalled(self.trainer, self.command)

    def on_validation_epoch_end(self) -> None:
        stop_if_signalled(self.trainer, self.command)
        self._log_evaluation("val")
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.validated = batches_trained(self.trainer)

    def on_test_epoch_end(self) -> None:
        stop_if_signalled(self.trainer, self.command)
        self._log_evaluation("test")

    def configure_callbacks(self) -> list[Callback]:
        found = super().configure_callbacks()
        return [*(found if isinstance(found, Sequence) else [found]), _CloseRollouts()]

    def teardown(self, stage: str) -> None:
        self.rollouts.close()
        disconnect(self.trainer)

    @property
    def ranks(self) -> TrainerRanks:
        """Sums and maxima over all ranks. Every rank must call them."""
        return TrainerRanks(self.trainer)

    @property
    def scorer(self) -> Scorer:
        """Scores completions with the policy, within the token budget."""
        return Scorer(self.model, self.scoring_budget, self.ranks)

    def _graded(self, batch: PromptBatch, batch_idx: int) -> Records:
        if self.evaluator.demonstrations is not None:
            memory = self.objective.logits_memory_mib
            self.evaluator.demonstrations.measure(self.scorer, batch, self.demonstration_teacher, memory)
            return {role: [] for role in self.evaluator.roles}
        records = self._sampled(batch, batch_idx, self.evaluator.roles)
        self.evaluator.count(records)
        return records

    def _sampled(self, batch: PromptBatch, batch_idx: int, roles: Sequence[str]) -> Records:
        """Return the records of a batch. For the first sampled batch, check that the sampler has the policy's weights."""
        finished = self.evaluator.finished
        if batch_idx in finished:
            return finished[batch_idx]
        seed = seed_for(self.seed, "evaluation", batch_idx, rank_and_world_size(self._trainer)[0])
        check = self._check_sampler if all(number in finished for number in range(batch_idx)) else None
        return self.evaluator.grade(self.rollouts, self.model, self.tokenizer, batch, seed, roles, check)

    def _check_sampler(self, students: list[list[int]], rollouts: Rollouts) -> None:
        if rollouts.logprobs is None or self.rollouts.logprob_tolerance is None:
            return
        found = log_ratios(self.scorer, students, rollouts, self.objective)
        values = torch.cat([*found, torch.zeros(0, dtype=torch.float32)])
        difference, count = self.ranks.sum([float(values.abs().sum()), values.numel()])
        check_difference(difference / max(count, 1), self.rollouts.logprob_tolerance)

    def _log_evaluation(self, stage: str) -> None:
        for name, value in self.evaluator.compute(stage).items():
            self.log(name, value, prog_bar=name.startswith(f"{stage}/avg@") and "_se" not in name)
