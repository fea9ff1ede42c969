"""Group-relative policy optimization (arXiv 2402.03300): the reinforcement-learning baseline.

    A_i = (r_i - mean r) / (std r + 1e-4)          over the n completions of one question, std with n - 1
    L = -mean over tokens of min(rho A, clip(rho, 1 - eps, 1 + eps) A),   rho = p_now(y_n) / p_old(y_n)

Differs from OPSD in that a verifier's reward of the whole completion takes the teacher's place. Where rho is clipped a token
has no gradient, and elsewhere the gradient is that of -rho A log p(y_n) with rho detached: so the loss here is a likelihood
weighted by rho A. p_old is the student's before the first update on a batch, in which rho is 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor

from opsd_lightning.grading.math_grader import PROBLEMS
from opsd_lightning.losses.objectives import NegativeLogLikelihood, Objective, Term
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.online_contexts import Attempts, read_attempts
from opsd_lightning.teachers import Teacher
from opsd_lightning.types import (
    DataRequirements,
    PositiveFloat,
    PromptBatch,
    Rollouts,
    Sampling,
    TokenStates,
    UserError,
    checked,
)


class Reward(ABC):
    """What a completion is worth."""

    @abstractmethod
    def __call__(self, attempts: Attempts) -> Sequence[float]:
        """The reward of every completion."""


class AnswerReward(Reward):
    """1 for a right final answer, 0 otherwise (default)."""

    def __call__(self, attempts: Attempts) -> Sequence[float]:
        return [float(correct) for correct in attempts.correct]


class _Prepared(NamedTuple):
    advantages: Tensor
    anchor: TokenStates | None


@checked
class GRPOModule(PolicyModule):
    """GRPO: several completions of each question, graded, the better ones made likelier than the worse.

    Args:
        policy: The model.
        reward: What a completion is worth: `AnswerReward` unless given.
        likelihood: Which tokens count and how; `NegativeLogLikelihood` at the sampling temperature unless given, and at no
            other. ``sequence_mean`` is the paper's reduction, ``token_mean`` (the default) that of DAPO.
        clip_ratio: eps: how far a token's probability may move before its gradient is cut off, above 0.
        anchor: A KL term against a reference. None unless given, as in the comparison of arXiv 2601.18734.
        sampling: What is sampled to train on: 8 completions of each question unless given.
        common: What every method has; see `PolicyModule`.
    """

    # Hard questions, few of them a step: some steps in a row without a right answer among wrong ones are no sign yet.
    idle_limit = 50
    idle_reason = "the completions of each question have the same reward (train/groups_without_signal is 1)"

    def __init__(
        self,
        policy: Policy,
        reward: Reward | None = None,
        likelihood: NegativeLogLikelihood | None = None,
        clip_ratio: PositiveFloat = 0.2,
        anchor: Anchor | None = None,
        sampling: Sampling = Sampling(n=8),
        **common: Any,
    ) -> None:
        super().__init__(policy, sampling=sampling, **common)
        if sampling.n < 2:
            raise UserError(
                f"model.sampling.n is {sampling.n}, and GRPO compares the completions of one question: set it to 8, say, "
                "and divide data.batch_size by as much"
            )
        if sampling.temperature == 0:
            raise UserError(
                "model.sampling.temperature is 0, so that all completions of a question are the same, and GRPO compares "
                "them: set it to 1, say (model.eval_sampling has its own)"
            )
        self.reward = reward or AnswerReward()
        self.likelihood = likelihood or NegativeLogLikelihood(temperature=sampling.temperature)
        if self.likelihood.temperature != sampling.temperature:
            raise UserError(
                f"model.likelihood.temperature is {self.likelihood.temperature:g} and model.sampling.temperature "
                f"{sampling.temperature:g}: a policy gradient is of the distribution that was sampled from. Make them equal"
            )
        self.clip_ratio = clip_ratio
        self.anchor = anchor

    @property
    def objective(self) -> Objective:
        return self.likelihood

    @property
    def data_requirements(self) -> DataRequirements:
        return replace(super().data_requirements, teacher_prompts=False)

    @property
    def teachers(self) -> list[Teacher]:
        """All that score the completions."""
        return [] if self.anchor is None else [self.anchor.teacher]

    def logged_names(self) -> set[str]:
        own = {"train/reward", "train/groups_without_signal", "train/clipped_fraction"}
        return super().logged_names() | own | {f"train/{name}" for name in PROBLEMS}

    def attach(self) -> None:
        if self.anchor is not None:
            self.anchor.attach(self.model, self.tokenizer)

    def prepare(self, batch: PromptBatch, rollouts: Rollouts) -> _Prepared:
        attempts = read_attempts(self.tokenizer, self.evaluator.grader, batch, rollouts)
        self.log_grading(attempts.problems)
        rewards = torch.tensor(self.reward(attempts), dtype=torch.float32).view(-1, rollouts.n)
        spread = rewards.std(dim=1, keepdim=True)
        advantages = (rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)
        total, same, rows, groups = self.over_ranks(
            [float(rewards.sum()), float((spread == 0).sum()), rewards.numel(), len(rewards)], "sum"
        )
        self.log("train/reward", total / rows, prog_bar=True, batch_size=1)
        self.log("train/groups_without_signal", same / groups, batch_size=1)
        anchor = None
        if self.anchor is not None:
            anchor = self.anchor.score(self.model, batch.student, rollouts, self.token_budget, self.most_over_ranks)
        return _Prepared(advantages.flatten(), anchor)

    def terms(self, prepared: _Prepared, rollouts: Rollouts, ratios: list[Tensor] | None) -> list[Term]:
        shares = self.shares(self.likelihood.token_weights(rollouts))
        weights = []
        cut = 0
        for row, (share, advantage) in enumerate(zip(shares, prepared.advantages, strict=True)):
            factor = torch.ones_like(share) if ratios is None else ratios[row]
            too_far = factor > 1 + self.clip_ratio if advantage > 0 else factor < 1 - self.clip_ratio
            cut += int(too_far.sum())
            weights.append(share * advantage * factor.masked_fill(too_far, 0.0))
        clipped, tokens = self.over_ranks([cut, rollouts.tokens], "sum")
        self.log("train/clipped_fraction", clipped / max(tokens, 1), batch_size=1)
        found = [Term(self.likelihood, weights)]
        if self.anchor is not None:
            own = self.shares(self.anchor.objective.token_weights(rollouts))
            found.append(Term(self.anchor.objective, [weight * self.anchor.weight for weight in own], prepared.anchor))
        return found
