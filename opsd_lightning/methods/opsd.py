"""On-policy self-distillation (OPSD, arXiv 2601.18734).

    L = sum_n w_n D(p_T(. | context, y_<n) || p_S(. | question, y_<n)) / sum_n w_n        y ~ p_S(. | question)

n runs over all completion tokens of an optimizer step. D is the objective's divergence, and p_T has no gradient. One
LoRA-adapted model plays both roles: the student reads the question, the teacher reads the question and a verified trace.
`DistillationModule.training_step` is algorithm 1 of the paper.
"""

from __future__ import annotations

import math
import sys
from abc import abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, ClassVar, Literal, NamedTuple

from torch import Tensor

from opsd_lightning.evaluation.evaluator import Evaluator
from opsd_lightning.grading.base import PROBLEMS
from opsd_lightning.losses.objectives import DivergenceObjective, Objective, Term
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.step import StepOutput
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.online_contexts import Attempts, OnlineContext, WrittenContext, read_attempts
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.base import seed_for
from opsd_lightning.teachers import FixedTeacher, GenerativeTeacher, Teacher
from opsd_lightning.types import (
    ConfigError,
    DataRequirements,
    Example,
    PositiveFloat,
    PromptBatch,
    Rollouts,
    Sampling,
    checked,
)


class TeacherPrompts(NamedTuple):
    """The teacher's prompts of a step.

    Args:
        tokens: Token ids that the teacher reads before each completion.
        learned: Number of leading tokens of each completion that are learned from. 0 for a completion without a context.
        attempts: The graded completions. None if they need no grades.
        missing: Number of completions without a context.
        written: Number of tokens that the teacher generated for the contexts.
    """

    tokens: list[list[int]]
    learned: list[int]
    attempts: Attempts | None = None
    missing: int = 0
    written: int = 0


@checked
class DistillationModule(PolicyModule):
    """Distillation of a teacher's distributions at every token of a completion.

    Subclasses choose the completions.

    Args:
        policy: The model that plays both roles.
        teacher: Weights that score as the teacher. Defaults to `FixedTeacher`.
        objective: Loss of a completion token. Defaults to `DivergenceObjective`: forward KL over the full vocabulary,
            without clipping.
        context: Context that is made anew in each step, from the completions or by the teacher. Defaults to
            ``data.context``.
        prompts: Prompts of both roles, for ``context``. On the command line linked to ``data.prompts``.
        learn_from: Completions that are learned from: ``all``, or only those that ``data.grader`` grades as ``wrong`` or as
            ``right``. Defaults to ``all``.
        anchor: A second term, which holds the student near a reference on its own prompt. Defaults to none.
        max_importance_ratio: From the second update on a batch, limit on the ratio of a token's probability to that before
            the first update, which weights its loss. Above 0. Defaults to 2.
        evaluate_teacher: If True, validation and test also sample and grade the teacher, as an upper bound.
        common: Arguments of `PolicyModule`.
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
        "context was found, it is the student itself, or model.learn_from leaves out every completion"
    )

    def __init__(
        self,
        policy: Policy,
        teacher: Teacher | None = None,
        objective: Objective | None = None,
        *,
        context: OnlineContext | None = None,
        prompts: Prompts = Prompts(),
        learn_from: Literal["all", "wrong", "right"] = "all",
        anchor: Anchor | None = None,
        max_importance_ratio: PositiveFloat | None = None,
        evaluate_teacher: bool = False,
        **common: Any,
    ) -> None:
        super().__init__(policy, **common)
        self.teacher = teacher or FixedTeacher()
        self.teacher.keeps_head = self.updates_per_batch > 1
        self._objective = objective or DivergenceObjective()
        self.context, self.prompts, self.anchor = context, prompts, anchor
        self.learn_from = learn_from
        if learn_from not in ("all", "wrong", "right"):
            raise ConfigError(f"it is {learn_from!r}", "model.learn_from", "Choose all, wrong or right")
        if learn_from != "all":
            self.require_grades(f"model.learn_from ({learn_from})")
        if not self._objective.uses_teacher:
            raise ConfigError(
                f"{type(self._objective).__name__} does not use the teacher",
                "model.objective",
                "Choose another objective, such as DivergenceObjective, or SFTModule as the model",
            )
        if max_importance_ratio is not None and self.updates_per_batch == 1:
            raise ConfigError(
                "the ratio has no effect with one update on a batch",
                "model.max_importance_ratio",
                "Leave it out, or set model.updates_per_batch to 2 or more",
            )
        self.max_importance_ratio = 2.0 if max_importance_ratio is None else max_importance_ratio
        if context is not None:
            context.check(self.sampling)
            if context.needs_grades:
                self.require_grades(f"model.context ({type(context).__name__})")
            if not self.teacher.privileged:
                raise ConfigError(
                    f"{type(context).__name__} is for a teacher that reads a context, and model.teacher "
                    f"({type(self.teacher).__name__}) reads the student's prompt",
                    "model.context",
                    "Set model.teacher.init_args.privileged to true, or leave model.context out",
                )
        if not isinstance(self.teacher, GenerativeTeacher):
            if evaluate_teacher or isinstance(context, WrittenContext):
                raise ConfigError(
                    f"{type(self.teacher).__name__} scores completions but cannot generate text, which "
                    f"{'model.evaluate_teacher' if evaluate_teacher else f'model.context {type(context).__name__}'} needs",
                    "model.teacher",
                    "Choose a teacher that can generate, such as FixedTeacher, or leave that setting out",
                )
        elif evaluate_teacher:
            self.require_grades("model.evaluate_teacher")
            self.evaluator = Evaluator(self.evaluator.sampling, self.evaluator.grader, self.teacher)
        if self.demonstration_teacher is not None:
            self.evaluator = Evaluator(self.evaluator.sampling, self.evaluator.grader, divergence=True)

    def on_fit_start(self) -> None:
        super().on_fit_start()
        rows = getattr(getattr(self.trainer, "datamodule", None), "rows", {}).get("train")
        if self.context is not None and rows is not None:
            self.context.check_examples(rows.examples)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Run algorithm 1 of arXiv 2601.18734 on one batch: one optimizer step, or ``updates_per_batch`` of them."""
        step = self.begin_step(batch, self.completions(batch))
        prompts = self.teacher_prompts(batch, step.rollouts)
        self._log_prompts(prompts)
        teacher = self.teacher.score(self.scorer, prompts.tokens, step.rollouts.completions)
        anchor = None
        if self.anchor is not None:
            anchor = self.anchor.score(self.scorer, step.student_prompts, step.rollouts)
        for ratios in self.updates(step):
            weights = self._reweighted(self.normalized(self._token_weights(step.rollouts, prompts)), ratios)
            terms = [Term(self.objective, weights, teacher, prompts.tokens)]
            if self.anchor is not None:
                weights = self.normalized(self.anchor.objective.token_weights(step.rollouts))
                weights = [self.anchor.weight * weight for weight in self._reweighted(weights, ratios)]
                terms.append(Term(self.anchor.objective, weights, anchor))
            self.update(step, terms)  # micro-batches: student's pass, objective, backward; then the optimizer
            self.teacher.after_step(self.model, self.global_step)
        return self.finish_step(step)

    @abstractmethod
    def completions(self, batch: PromptBatch) -> Rollouts:
        """Return the completions of a step."""

    def term_of(self, batch: PromptBatch, rollouts: Rollouts) -> Term:
        prompts = self.teacher_prompts(batch, rollouts)
        teacher = self.teacher.score(self.scorer, prompts.tokens, rollouts.completions)
        return Term(self.objective, self._token_weights(rollouts, prompts), teacher, prompts.tokens)

    @property
    def objective(self) -> Objective:
        return self._objective

    @property
    def data_requirements(self) -> DataRequirements:
        selects = self.learn_from != "all"
        needs = replace(super().data_requirements, privileged=self.teacher.privileged, grades=selects)
        if self.context is None:
            return needs
        traces, answers = self.context.needs_traces, self.context.needs_answers
        grades = selects or (self.context.needs_grades and answers)
        return replace(needs, teacher_prompts=traces, traces=traces, answers=answers or selects, grades=grades)

    @property
    def teachers(self) -> list[Teacher]:
        """All teachers that score the completions."""
        return [self.teacher] if self.anchor is None else [self.teacher, self.anchor.teacher]

    @property
    def demonstration_teacher(self) -> Teacher | None:
        # A context that is made in each step needs completions.
        return self.teacher if self.context is None and self.evaluator.demonstrations is not None else None

    def logged_names(self) -> set[str]:
        found = super().logged_names()
        if self.updates_per_batch > 1:
            found |= {"train/update_ratio", "train/update_ratio_max", "train/update_ratio_clipped"}
        if self.context is not None:
            found.add("train/context_missing_fraction")
        if self.learn_from != "all":
            found.add("train/selected_fraction")
        if self.context is not None or self.learn_from != "all":
            found |= {f"train/{name}" for name in PROBLEMS}
        return found

    def attach(self) -> None:
        limit = self.policy.context_length()
        if isinstance(self.context, WrittenContext) and limit is not None and self.context.sampling.max_new_tokens >= limit:
            raise ConfigError(
                f"{self.context.sampling.max_new_tokens} tokens fill the model's whole context of {limit} tokens",
                "model.context.init_args.sampling.max_new_tokens",
                "Lower it",
            )
        self.teacher.check(self.tokenizer)
        self.teacher.attach(self.model)
        if self.anchor is not None:
            self.anchor.attach(self.model, self.tokenizer, self.teacher)

    @property
    def completions_per_context(self) -> int:
        return 1 if self.context is None else self.sampling.n

    def teacher_prompts(self, batch: PromptBatch, rollouts: Rollouts) -> TeacherPrompts:
        """Return the teacher's prompt of every completion. Nothing is logged or counted. Every rank must call."""
        source = batch.teacher if self.teacher.privileged and self.data_requirements.teacher_prompts else batch.student
        prompts = [prompt for prompt in source for _ in range(rollouts.n)]
        learned = [len(completion) for completion in rollouts.completions]
        grades = self.context is not None or self.learn_from != "all"
        if not grades or not rollouts.sampled:  # traces in place of completions take data.context
            return TeacherPrompts(prompts, learned)
        attempts = read_attempts(self.tokenizer, self.evaluator.grader, batch, rollouts)
        found = TeacherPrompts(prompts, learned, attempts)
        if self.context is not None:
            found = self._online_prompts(self.context, attempts, batch, rollouts)
        if self.learn_from != "all":
            right = self.learn_from == "right"
            kept = [tokens * (correct == right) for tokens, correct in zip(found.learned, attempts.correct, strict=True)]
            found = found._replace(learned=kept)
        return found

    def _log_prompts(self, prompts: TeacherPrompts) -> None:
        """Log the contexts of a step, and count the tokens that the teacher generated. Every rank must call."""
        if prompts.attempts is None:
            return
        self.log_grading(prompts.attempts)
        correct = prompts.attempts.correct
        selected = correct.count(self.learn_from == "right")
        missing, selected_rows, rows, written = self.ranks.sum([prompts.missing, selected, len(correct), prompts.written])
        self.tokens_generated += int(written)
        if self.context is not None:
            self.log("train/context_missing_fraction", missing / rows, batch_size=1)
        if self.learn_from != "all":
            self.log("train/selected_fraction", selected_rows / rows, batch_size=1)

    def _token_weights(self, rollouts: Rollouts, prompts: TeacherPrompts) -> list[Tensor]:
        """Return the weight of each token before normalization. Tokens that are not learned from have 0."""
        weights = self.objective.token_weights(rollouts)
        for weight, learned in zip(weights, prompts.learned, strict=True):
            weight[learned:] = 0
        return weights

    def _online_prompts(
        self, context: OnlineContext, attempts: Attempts, batch: PromptBatch, rollouts: Rollouts
    ) -> TeacherPrompts:
        """Return the teacher's prompts with the contexts of a step. Every rank must call."""
        prompts, learned, missing, written = list[list[int]](), list[int](), 0, 0

        def write(examples: Sequence[Example], messages: Sequence[str], sampling: Sampling) -> list[str | None]:
            nonlocal written
            texts, tokens = self._generate(examples, messages, sampling)
            written += tokens
            return texts

        limit = min(length or sys.maxsize for length in (self.policy.context_length(), self.teacher.context_length()))
        # Contexts made from traces get them cut, and the result is not cut again: an analysis after a long trace must stay.
        cut = [example._replace(trace=self.prompts.cut(self.tokenizer, example.trace)) for example in batch.examples]
        for row, text in enumerate(context.texts(attempts._replace(examples=cut), write)):
            completion, prompt = rollouts.completions[row], None
            if text is not None:
                example, attempt = batch.examples[row // rollouts.n], context.shows_attempt
                whole = attempt or isinstance(context, WrittenContext)
                prompt = self.prompts.teacher(self.tokenizer, example, text, whole, attempt)
            if prompt is None or len(prompt) + len(completion) > limit:
                missing += 1
                prompts.append(batch.student[row // rollouts.n])
                learned.append(0)
            else:
                prompts.append(prompt)
                learned.append(math.ceil(len(completion) * context.prefix_share))
        return TeacherPrompts(prompts, learned, attempts, missing, written)

    def _reweighted(self, weights: list[Tensor], ratios: list[Tensor] | None) -> list[Tensor]:
        """Apply truncated importance sampling, if there are ratios."""
        if ratios is None:
            return weights
        ratios = self.truncated(ratios, self.max_importance_ratio, "update_ratio")
        return [weight * ratio for weight, ratio in zip(weights, ratios, strict=True)]

    def _generate(
        self, examples: Sequence[Example], messages: Sequence[str], sampling: Sampling
    ) -> tuple[list[str | None], int]:
        """Generate the teacher's answer to each message, and return their tokens too. Every rank must call.

        An answer is None for a message that does not fit.
        """
        assert isinstance(self.teacher, GenerativeTeacher)  # checked with the context
        prompts = [self.prompts.ask(self.tokenizer, *pair) for pair in zip(examples, messages, strict=True)]
        limit = self.policy.context_length() or sys.maxsize
        fits = [len(prompt) + sampling.max_new_tokens <= limit for prompt in prompts]
        # Every rank must sample: one token replaces a message that is too long.
        asked = [prompt if fit else prompt[:1] for prompt, fit in zip(prompts, fits, strict=True)]
        seed = seed_for(self.seed, "context", self.global_step, self.trainer.global_rank)
        with self.teacher.weights(self.model):
            written = self.rollouts.generate(self.model, asked, sampling, seed)
        texts = [str(self.tokenizer.decode(row, skip_special_tokens=True)) for row in written.completions]
        return [text if fit else None for text, fit in zip(texts, fits, strict=True)], written.tokens


class OPSDModule(DistillationModule):
    """On-policy self-distillation: the student samples, and learns to match the teacher on its own completions.

    Example::

        >>> from opsd_lightning import EMATeacher, OPSDModule, Policy
        >>> module = OPSDModule(Policy("HuggingFaceTB/SmolLM2-135M-Instruct"), teacher=EMATeacher(0.99), max_grad_norm=0.1)
        >>> module.token_budget
        8192
    """

    def completions(self, batch: PromptBatch) -> Rollouts:
        return self.sample(batch)
