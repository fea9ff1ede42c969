"""Validation, test and predict: completions sampled, graded and counted."""

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

from opsd_lightning.distributed.collectives import rank_and_world_size
from opsd_lightning.evaluation.accuracy import AccuracyAtK, pass_sizes
from opsd_lightning.grading.math_grader import PROBLEMS, MathGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.rollouts.base import RolloutEngine, seed_for
from opsd_lightning.rollouts.importance import check_difference, log_ratios
from opsd_lightning.rollouts.self_checks import Agreement, check_policy
from opsd_lightning.runs.resuming import batches_trained
from opsd_lightning.runs.signals import release, stop_if_asked, watch
from opsd_lightning.teachers import Teacher
from opsd_lightning.types import PromptBatch, Rollouts, Sampling, UserError

#: Called on the prompt of each completion, and the completions; raises where they are not the policy's.
Check = Callable[[list[list[int]], Rollouts], None]

Records = dict[str, list[dict[str, Any]]]  # of each role, one a completion


class Evaluator(nn.Module):
    """Samples and grades completions of each role, and keeps their metrics until the end of an epoch.

    Args:
        sampling: What is sampled.
        grader: How completions are graded.
        teacher: Whose privileged completions are graded as well. The student's alone unless given.

    Attributes:
        finished: Records of batches, by their number, that an earlier run already sampled: taken as they are. Under several
            ranks the same batches on each, since sampling may need them all.
    """

    def __init__(self, sampling: Sampling, grader: MathGrader, teacher: Teacher | None = None) -> None:
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
        self.finished: Mapping[int, Records] = {}

    @property
    def roles(self) -> list[str]:
        """Whose completions are graded."""
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
        """Sample and grade a batch: for each role a record of each completion that counts, those of a question together.

        Args:
            engine: What samples.
            model: The policy.
            tokenizer: Its tokenizer.
            batch: The questions.
            seed: Of the sampling.
            roles: ``student``, ``teacher`` or both.
            check: Called on the student's completions.
        """
        found: Records = {}
        for role in roles:
            prompts = batch.student
            if role == "teacher":
                prompts = batch.teacher
                if not all(prompts):
                    raise UserError("the teacher is graded, but has no prompts: give the questions traces")
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
        grades = self.grader.grades(texts, [batch.examples[row // n].answer for row in rows])
        votes = self.grader.votes_of([grades[start : start + n] for start in range(0, len(grades), n)])
        cast = [vote for question in votes for vote in question]
        records: list[dict[str, Any]] = []
        for row, text, grade, vote in zip(rows, texts, grades, cast, strict=True):
            place, sample = divmod(row, n)
            records.append(
                {
                    "index": batch.indices[place] if batch.indices else None,
                    "sample": sample,
                    "question": batch.examples[place].question,
                    "reference": batch.examples[place].answer,
                    "completion": text,
                    "answer": grade.answer,
                    "correct": grade.correct,
                    "vote": vote,
                    "completion_tokens": len(rollouts.completions[row]),
                    "truncated": not rollouts.terminated[row],
                }
                | ({"grading_problem": grade.problem} if grade.problem else {})
            )
        return records

    def count(self, found: Records) -> None:
        """Enter the records of a batch into the metrics."""
        n = self.sampling.n
        for role, records in found.items():
            # Without a question nothing is added, which keeps the rank in step with others.
            for group in [records[start : start + n] for start in range(0, len(records), n)] or [[]]:
                self.accuracy[role].update([r["vote"] for r in group], [r["correct"] for r in group])  # type: ignore[operator]
                for record in group:
                    self.lengths[role]["completion_tokens"].update(record["completion_tokens"])  # type: ignore[index]
                    self.lengths[role]["truncated_fraction"].update(float(record["truncated"]))  # type: ignore[index]
                    for name, problem in PROBLEMS.items():
                        self.problems[role][name].update(float(record.get("grading_problem") == problem))  # type: ignore[index]

    def names(self, stage: str) -> set[str]:
        """Names of all that `compute` gives."""
        n, found = self.sampling.n, set()
        for role in self.roles:
            prefix = f"{stage}/{'teacher_' if role == 'teacher' else ''}"
            for score in (f"avg@{n}", f"maj@{n}", *(f"pass@{j}" for j in pass_sizes(n))):
                found |= {f"{prefix}{score}{ending}" for ending in ("", "_se", *(["_se_samples"] if n > 1 else []))}
            found |= {f"{prefix}{name}" for name in (*self.lengths[role], *self.problems[role])}  # type: ignore[misc]
        return found

    def compute(self, stage: str) -> dict[str, Tensor]:
        """Every metric of the epoch, over all ranks, by the name it is logged under; then starts anew."""
        values: dict[str, Tensor] = {}
        for role, accuracy in self.accuracy.items():
            prefix = f"{stage}/{'teacher_' if role == 'teacher' else ''}"
            for metric in (accuracy, self.lengths[role], self.problems[role]):
                values |= {f"{prefix}{name}": value for name, value in metric.compute().items()}  # type: ignore[operator]
                metric.reset()  # type: ignore[operator]
        return values


class _CloseRollouts(Callback):
    """Lets go of what rollouts took where a run ends by an error or a signal: Lightning then calls no ``teardown``."""

    def on_exception(self, trainer: Any, pl_module: Any, exception: BaseException) -> None:
        pl_module.rollouts.close()


class EvaluatedModule(LightningModule):
    """The part of a module that samples and grades: validation, test, predict.

    Attributes:
        policy: What the model was made of.
        model: The policy's network.
        tokenizer: Its tokenizer.
        rollouts: How completions are sampled.
        evaluator: What is done with them.
        objective: The method's, for how much memory logits may take.
        token_budget: Of a scoring pass.
        seed: Of rollouts.
        command: The command line of the run, for the message that says how to go on; None for a run that Python started.
        validated: Batches trained on when a fit's last validation ended.
    """

    policy: Policy
    model: PeftModel
    tokenizer: PreTrainedTokenizerBase
    rollouts: RolloutEngine
    evaluator: Evaluator
    objective: Any
    token_budget: int
    seed: int
    command: str | None = None
    validated: int = 0
    # Every rank evaluates as many batches.
    _even: bool = False

    def setup(self, stage: str) -> None:
        watch(self.trainer)

    def logged_names(self) -> set[str]:
        """Names of all metrics that a fit logs, for the check of callbacks. A subclass that logs more adds its own."""
        return self.evaluator.names("val")

    def on_validation_start(self) -> None:
        self._compare_batches(self.trainer.num_val_batches)
        if self.trainer.state.fn != TrainerFn.FITTING:  # in training it was checked at the start
            self.check_policy()

    def on_test_start(self) -> None:
        self._compare_batches(self.trainer.num_test_batches)
        self.check_policy()

    def on_predict_start(self) -> None:
        self._compare_batches(self.trainer.num_predict_batches)
        self.check_policy()

    def check_policy(self) -> Agreement:
        """Check the built policy and its teachers' own networks (see `rollouts.self_checks`). Every rank must call.

        Raises:
            ConfigError: Rows depend on their batch, or rollouts are not what is scored.
        """
        strategy = self.trainer.strategy
        waits = isinstance(strategy, DDPStrategy) and not strategy._ddp_kwargs.get("find_unused_parameters", False)
        training = self.trainer.state.fn in (TrainerFn.FITTING, None)  # None: examined by the doctor, before a fit
        with self.trainer.precision_plugin.forward_context():
            for teacher in getattr(self, "teachers", ()) if training else ():
                if (network := teacher.network(self.model)) is not None:
                    check_policy(network, setting=teacher.setting)
            return check_policy(self.model, self.rollouts, every_adapter=waits and training and self.trainer.world_size > 1)

    def validation_step(self, batch: PromptBatch, batch_idx: int) -> Records:
        return self._graded(batch, batch_idx)

    def test_step(self, batch: PromptBatch, batch_idx: int) -> Records:
        return self._graded(batch, batch_idx)

    def predict_step(self, batch: PromptBatch, batch_idx: int) -> list[dict[str, Any]]:
        """Graded completions of a batch, one record a completion."""
        return self._sampled(batch, batch_idx, ["student"])["student"]

    def on_validation_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._stop_if_asked()

    def on_test_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._stop_if_asked()

    def on_predict_batch_end(self, outputs: Any, batch: Any, batch_idx: int, dataloader_idx: int = 0) -> None:
        self._stop_if_asked()

    def _stop_if_asked(self) -> None:
        """Leave after a batch, if every rank has as many of them."""
        if self._even:
            stop_if_asked(self.trainer, self.command)

    def _compare_batches(self, batches: Sequence[int | float]) -> None:
        """Find out whether every rank has as many batches. Every rank must call."""
        if self.trainer.world_size == 1:
            self._even = True
            return
        counts = torch.tensor([sum(batches), -sum(batches)], dtype=torch.float64, device=self.trainer.strategy.root_device)
        most, least = self.trainer.strategy.reduce(counts, None, "max").tolist()  # type: ignore[union-attr]
        self._even = most == -least < math.inf

    def on_predict_epoch_end(self) -> None:
        stop_if_asked(self.trainer, self.command)

    def on_validation_epoch_end(self) -> None:
        stop_if_asked(self.trainer, self.command)
        self._log_evaluation("val")
        if self.trainer.state.fn == TrainerFn.FITTING and not self.trainer.sanity_checking:
            self.validated = batches_trained(self.trainer)

    def on_test_epoch_end(self) -> None:
        stop_if_asked(self.trainer, self.command)
        self._log_evaluation("test")

    def configure_callbacks(self) -> list[Callback]:
        found = super().configure_callbacks()
        return [*(found if isinstance(found, Sequence) else [found]), _CloseRollouts()]

    def teardown(self, stage: str) -> None:
        self.rollouts.close()
        release(self.trainer)

    def over_ranks(self, values: Sequence[float], operation: str) -> list[float]:
        """Each value reduced (``sum``, ``max``) over all ranks. Every rank must call."""
        if self.trainer.world_size == 1:
            return [float(value) for value in values]
        tensor = torch.tensor(values, dtype=torch.float64, device=self.trainer.strategy.root_device)
        return self.trainer.strategy.reduce(tensor, reduce_op=operation).tolist()  # type: ignore[union-attr]

    def most_over_ranks(self, count: int) -> int:
        """The largest of the ranks' counts. Every rank must call."""
        return int(self.over_ranks([count], "max")[0])

    def _graded(self, batch: PromptBatch, batch_idx: int) -> Records:
        records = self._sampled(batch, batch_idx, self.evaluator.roles)
        self.evaluator.count(records)
        return records

    def _sampled(self, batch: PromptBatch, batch_idx: int, roles: Sequence[str]) -> Records:
        """The records of a batch; at the first one sampled, check that the sampler has the policy's weights."""
        finished = self.evaluator.finished
        if batch_idx in finished:
            return finished[batch_idx]
        seed = seed_for(self.seed, "evaluation", batch_idx, rank_and_world_size(self._trainer)[0])
        check = self._check_sampler if all(number in finished for number in range(batch_idx)) else None
        return self.evaluator.grade(self.rollouts, self.model, self.tokenizer, batch, seed, roles, check)

    def _check_sampler(self, students: list[list[int]], rollouts: Rollouts) -> None:
        if rollouts.logprobs is None or self.rollouts.logprob_tolerance is None:
            return
        found = log_ratios(self.model, students, rollouts, self.token_budget, self.objective, self.most_over_ranks)
        values = torch.cat([*found, torch.zeros(0)])
        difference, count = self.over_ranks([float(values.abs().sum()), values.numel()], "sum")
        check_difference(difference / max(count, 1), self.rollouts.logprob_tolerance)

    def _log_evaluation(self, stage: str) -> None:
        for name, value in self.evaluator.compute(stage).items():
            self.log(name, value, prog_bar=name.startswith(f"{stage}/avg@") and "_se" not in name)
