"""On-policy self-distillation: rollouts, two conditioned forward passes, the divergence, one optimizer step.

Source: arXiv 2601.18734, algorithm 1.
"""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import replace
from typing import ClassVar, NamedTuple

import torch
from lightning.pytorch.cli import LRSchedulerCallable, OptimizerCallable
from torch import Tensor

from opsd_lightning.distributed.replicas import replica
from opsd_lightning.evaluation.evaluator import Evaluator
from opsd_lightning.grading.math_grader import PROBLEMS, MathGrader
from opsd_lightning.losses.objectives import DivergenceObjective, Objective, Term
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.online_contexts import OnlineContext, ReasonFirst, read_attempts
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.base import RolloutEngine, seed_for
from opsd_lightning.teachers import FixedTeacher, Teacher
from opsd_lightning.types import (
    DataRequirements,
    PositiveFloat,
    PositiveInt,
    PromptBatch,
    Rollouts,
    Sampling,
    TokenStates,
    UserError,
    checked,
)


class _Scored(NamedTuple):
    teacher: TokenStates
    anchor: TokenStates | None
    has_context: list[bool]
    prompts: list[list[int]]


@checked
class OPSDModule(PolicyModule):
    """On-policy self-distillation: one LoRA-adapted model learns from itself, reading the solution.

    Args:
        policy: The model that plays both roles.
        teacher: Whose weights the teacher scores with: `FixedTeacher` unless given.
        objective: What is minimised at every completion token: a `DivergenceObjective` (forward KL over the full
            vocabulary, not clipped) unless given.
        context: What the teacher reads, where it is made anew at each step from the completions or by the teacher.
            ``data.context`` unless given.
        prompts: The wording of both roles' prompts, for ``context``. On the command line taken from ``data.prompts``.
        anchor: A second term that holds the student near a reference on its own prompt. None unless given.
        max_importance_ratio: From the second update on a batch of rollouts, tokens' losses are weighted by the ratio of
            their probability now to that before the first, at most this, above 0: 2 unless given.
        rollouts: How completions are sampled: `TransformersEngine` unless given.
        sampling: What is sampled to train on.
        eval_sampling: What is sampled in validation, test and predict; as in training unless given.
        evaluate_teacher: Also sample and grade the privileged teacher in validation and test: the upper bound.
        grader: How completions are graded. On the command line taken from ``data.grader``.
        optimizer: Makes the optimizer of the adapter's parameters.
        lr_scheduler: Makes its learning-rate schedule, stepped after every optimizer step. Constant unless given.
        max_grad_norm: Gradients with a larger norm are scaled down to it, above 0. Not clipped unless given.
        token_budget: The most tokens, padding included, that one scoring pass works on, at least 1. It decides memory,
            not the result (but for which inputs LoRA dropout drops).
        updates_per_batch: Optimizer steps on one batch of rollouts, at least 1. The paper's is 1. Make a `ModelCheckpoint`'s
            ``every_n_train_steps`` a multiple of it.
        seed: Of rollouts and dropout. On the command line taken from ``seed_everything``.
        allow_checkpoint_changes: Load a checkpoint although it was made with another base model, LoRA settings, teacher,
            kind of optimizer or schedule, batch size times devices, seed or data than this run's. All are listed.
    """

    measured: ClassVar[tuple[str, ...]] = (
        "clipped",
        "clipped_mass",
        "forward_kl",
        "reverse_kl",
        "student_entropy",
        "teacher_entropy",
    )
    idle_reason: ClassVar[str] = (
        "the teacher gives every token the student's own probability: it reads no more than the student (NoContext), no "
        "context was found, or it is the student itself"
    )

    def __init__(
        self,
        policy: Policy,
        teacher: Teacher | None = None,
        objective: Objective | None = None,
        context: OnlineContext | None = None,
        prompts: Prompts = Prompts(),
        anchor: Anchor | None = None,
        max_importance_ratio: PositiveFloat | None = None,
        rollouts: RolloutEngine | None = None,
        sampling: Sampling = Sampling(),
        eval_sampling: Sampling | None = None,
        evaluate_teacher: bool = False,
        grader: MathGrader | None = None,
        optimizer: OptimizerCallable = lambda p: torch.optim.AdamW(p, lr=5e-6, weight_decay=0.0),
        lr_scheduler: LRSchedulerCallable | None = None,
        max_grad_norm: PositiveFloat | None = None,
        token_budget: PositiveInt = 8192,
        updates_per_batch: PositiveInt = 1,
        seed: int = 0,
        allow_checkpoint_changes: bool = False,
    ) -> None:
        super().__init__(
            policy,
            rollouts,
            sampling,
            eval_sampling,
            grader,
            optimizer,
            lr_scheduler,
            max_grad_norm,
            token_budget,
            updates_per_batch,
            seed,
            allow_checkpoint_changes,
        )
        self.teacher = teacher or FixedTeacher()
        self.teacher.keeps_head = updates_per_batch > 1
        self._objective = objective or DivergenceObjective()
        self.context, self.prompts, self.anchor = context, prompts, anchor
        if not self._objective.uses_teacher:
            raise UserError(
                f"model.objective is {type(self._objective).__name__}, which leaves the teacher out: choose another, such "
                "as DivergenceObjective, or SFTModule as the model"
            )
        if max_importance_ratio is not None and updates_per_batch == 1:
            raise UserError(
                "model.max_importance_ratio has no effect with one update on a batch: leave it out, or set "
                "model.updates_per_batch to 2 or more"
            )
        self.max_importance_ratio = 2.0 if max_importance_ratio is None else max_importance_ratio
        if context is not None:
            context.check(sampling)
            if not self.teacher.privileged:
                raise UserError(
                    f"model.context is {type(context).__name__}, for a teacher that reads more than the student, and "
                    f"model.teacher is {type(self.teacher).__name__} with privileged false: set it to true, or leave "
                    "model.context out"
                )
        if (evaluate_teacher or isinstance(context, ReasonFirst)) and not self.teacher.writes:
            raise UserError(
                f"model.teacher is {type(self.teacher).__name__}, which scores but cannot write: leave out "
                "model.evaluate_teacher, and a model.context that has the teacher write"
            )
        if evaluate_teacher:
            self.evaluator = Evaluator(eval_sampling or sampling, grader or MathGrader(), self.teacher)

    @property
    def objective(self) -> Objective:
        return self._objective

    @property
    def data_requirements(self) -> DataRequirements:
        needs = replace(super().data_requirements, privileged=self.teacher.privileged)
        if self.context is None:
            return needs
        traces, answers = self.context.needs_traces, self.context.needs_answers
        return replace(needs, teacher_prompts=traces, traces=traces, answers=answers)

    @property
    def teachers(self) -> list[Teacher]:
        """All that score the completions."""
        return [self.teacher] if self.anchor is None else [self.teacher, self.anchor.teacher]

    def logged_names(self) -> set[str]:
        found = super().logged_names()
        if self.updates_per_batch > 1:
            found |= {"train/update_ratio", "train/update_ratio_max", "train/update_ratio_clipped"}
        if self.context is not None:
            found |= {"train/context_missing_fraction", *(f"train/{name}" for name in PROBLEMS)}
        return found

    def attach(self) -> None:
        limit = self.policy.context_length()
        if isinstance(self.context, ReasonFirst) and limit is not None and self.context.sampling.max_new_tokens >= limit:
            raise UserError(
                f"model.context.init_args.sampling.max_new_tokens is {self.context.sampling.max_new_tokens}, as long as the "
                f"model's whole context of {limit} tokens: lower it"
            )
        self.teacher.check(self.tokenizer)
        self.teacher.attach(self.model)
        if self.anchor is not None:
            self.anchor.attach(self.model, self.tokenizer, self.teacher)

    def prepare(self, batch: PromptBatch, rollouts: Rollouts) -> _Scored:
        prompts, has_context = self._teacher_prompts(batch, rollouts)
        budget, agree = self.token_budget, self.most_over_ranks
        teacher = self.teacher.score(self.model, prompts, rollouts.completions, budget, agree)
        anchor = None
        if self.anchor is not None:
            anchor = self.anchor.score(self.model, batch.student, rollouts, budget, agree)
        return _Scored(teacher, anchor, has_context, prompts)

    def terms(self, prepared: _Scored, rollouts: Rollouts, ratios: list[Tensor] | None) -> list[Term]:
        weights = self.objective.token_weights(rollouts)
        # A completion that its context has nothing to say of is not learned from.
        weights = [w * known for w, known in zip(weights, prepared.has_context, strict=True)]
        weights = self._weighted(self.shares(weights), ratios)
        found = [Term(self.objective, weights, prepared.teacher, prepared.prompts)]
        if self.anchor is not None:
            own = self.shares(self.anchor.objective.token_weights(rollouts))
            own = [weight * self.anchor.weight for weight in self._weighted(own, ratios)]
            found.append(Term(self.anchor.objective, own, prepared.anchor))
        return found

    def after_update(self) -> None:
        self.teacher.after_step(self.model, self.global_step)

    def _weighted(self, weights: list[Tensor], ratios: list[Tensor] | None) -> list[Tensor]:
        """Truncated importance sampling."""
        if ratios is None:
            return weights
        ratios = self.cut_off(ratios, self.max_importance_ratio, "update_ratio")
        return [weight * ratio for weight, ratio in zip(weights, ratios, strict=True)]

    def _teacher_prompts(self, batch: PromptBatch, rollouts: Rollouts) -> tuple[list[list[int]], list[bool]]:
        """The teacher's prompt of every completion, and whether it holds a context."""
        source = batch.teacher if self.teacher.privileged and self.data_requirements.teacher_prompts else batch.student
        prompts = [prompt for prompt in source for _ in range(rollouts.n)]
        known = [True] * len(prompts)
        if self.context is None or not rollouts.sampled:  # beside the data's own trace the data's own context
            return prompts, known
        limit = min(length or sys.maxsize for length in (self.policy.context_length(), self.teacher.context_length()))
        attempts = read_attempts(self.tokenizer, self.evaluator.grader, batch, rollouts)
        self.log_grading(attempts.problems)
        # What is made of traces is made of them cut, and then whole: an analysis below a long trace must not fall off.
        cut = [example._replace(trace=self.prompts.cut(self.tokenizer, example.trace)) for example in batch.examples]
        for row, text in enumerate(self.context.texts(attempts._replace(examples=cut), self._write)):
            if text is not None:
                example, whole = batch.examples[row // rollouts.n], self.context.needs_traces
                prompts[row] = self.prompts.teacher(self.tokenizer, example, text, whole)
            known[row] = text is not None and len(prompts[row]) + len(rollouts.completions[row]) <= limit
            if not known[row]:
                prompts[row] = batch.student[row // rollouts.n]
        missing, rows = self.over_ranks([known.count(False), len(known)], "sum")
        self.log("train/context_missing_fraction", missing / rows, batch_size=1)
        return prompts, known

    def _write(self, messages: Sequence[str], sampling: Sampling) -> list[str | None]:
        """What the teacher's weights answer, each message on its own; counts as generated. None where it does not fit."""
        prompts = [self.prompts.chat(self.tokenizer, message) for message in messages]
        limit = self.policy.context_length() or sys.maxsize
        fits = [len(prompt) + sampling.max_new_tokens <= limit for prompt in prompts]
        # Every rank must sample: one token stands for a message that is too long.
        asked = [prompt if fit else prompt[:1] for prompt, fit in zip(prompts, fits, strict=True)]
        seed = seed_for(self.seed, "context", self.global_step, replica(self.trainer)[0])
        with self.teacher.weights(self.model):
            written = self.rollouts.generate(self.model, asked, sampling, seed)
        self.tokens_generated += int(self.over_ranks([written.tokens], "sum")[0])
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in written.completions]
        return [text if fit else None for text, fit in zip(texts, fits, strict=True)]
