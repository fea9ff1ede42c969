"""Group-relative policy optimization (GRPO, arXiv 2402.03300): the reinforcement-learning baseline.

    A_i = (r_i - mean r) / (std r + 1e-4)          over the n completions of one question, std with n - 1
    L = -mean over tokens of min(rho A, clip(rho, 1 - eps, 1 + eps) A),   rho = p_now(y_n) / p_old(y_n)

The reward of a verifier for the whole completion replaces OPSD's teacher. A token whose rho is clipped has no gradient.
Elsewhere the gradient is that of -rho A log p(y_n) with rho detached, so that the loss here is a likelihood weighted by rho
A. p_old is the student before the first update on a batch, in which rho is 1.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from opsd_lightning.grading.base import PROBLEMS
from opsd_lightning.losses.objectives import NegativeLogLikelihood, Objective, Term
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.step import StepOutput
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.online_contexts import Attempts, read_attempts
from opsd_lightning.teachers import Teacher
from opsd_lightning.types import ConfigError, DataRequirements, PositiveFloat, PromptBatch, Rollouts, Sampling, checked


class Reward(ABC):
    """Base class of rewards of completions."""

    @abstractmethod
    def __call__(self, attempts: Attempts) -> Sequence[float]:
        """Return the reward of every completion."""


class AnswerReward(Reward):
    """The score of ``data.grader``, from 0 to 1. The default."""

    def __call__(self, attempts: Attempts) -> Sequence[float]:
        return [grade.score for grade in attempts.grades]


@checked
class GRPOModule(PolicyModule):
    """GRPO: sample several completions of each question, grade them, and raise the likelihood of the better ones.

    Args:
        policy: The model.
        reward: Reward of a completion. Defaults to `AnswerReward`.
        likelihood: Tokens that count and their weights. Defaults to `NegativeLogLikelihood` at the sampling temperature, the
            only one allowed. ``sequence_mean`` is the paper's reduction, ``token_mean`` (the default) that of DAPO.
        clip_ratio: Largest relative change eps of a token's probability, above 0. Tokens beyond it have no gradient.
        anchor: A KL term against a reference. Defaults to none, as in the comparison of arXiv 2601.18734.
        sampling: Sampling of the training completions. Defaults to 8 completions of each question.
        common: Arguments of `PolicyModule`.

    Example::

        >>> from opsd_lightning import GRPOModule, Policy, Sampling
        >>> GRPOModule(Policy("HuggingFaceTB/SmolLM2-135M-Instruct"), sampling=Sampling(n=4)).clip_ratio
        0.2
    """

    # With few and hard questions, several steps in a row have no right completion beside wrong ones.
    idle_limit = 50
    idle_reason = "the completions of each question have the same reward (train/groups_without_signal is 1)"

    def __init__(
        self,
        policy: Policy,
        reward: Reward | None = None,
        *,
        likelihood: NegativeLogLikelihood | None = None,
        clip_ratio: PositiveFloat = 0.2,
        anchor: Anchor | None = None,
        sampling: Sampling = Sampling(n=8),
        **common: Any,
    ) -> None:
        super().__init__(policy, sampling=sampling, **common)
        if sampling.n < 2:
            raise ConfigError(
                f"GRPO compares the completions of one question, and n is {sampling.n}",
                "model.sampling.n",
                "Set it to 8, for example, and divide data.batch_size by as much",
            )
        if sampling.temperature == 0:
            raise ConfigError(
                "GRPO compares the completions of one question, and at temperature 0 all are the same",
                "model.sampling.temperature",
                "Set it to 1, for example (model.eval_sampling has its own)",
            )
        self.reward = reward or AnswerReward()
        self.likelihood = likelihood or NegativeLogLikelihood(temperature=sampling.temperature)
        if self.likelihood.temperature != sampling.temperature:
            raise ConfigError(
                f"a policy gradient is of the distribution sampled from, and the temperature is "
                f"{self.likelihood.temperature:g} here and {sampling.temperature:g} in model.sampling.temperature",
                "model.likelihood.temperature",
                "Set both to the same value",
            )
        self.require_grades("model (GRPOModule)")
        self.clip_ratio = clip_ratio
        self.anchor = anchor

    @property
    def objective(self) -> Objective:
        return self.likelihood

    @property
    def data_requirements(self) -> DataRequirements:
        return replace(super().data_requirements, teacher_prompts=False, grades=True)

    @property
    def teachers(self) -> list[Teacher]:
        """All teachers that score the completions."""
        return [] if self.anchor is None else [self.anchor.teacher]

    def logged_names(self) -> set[str]:
        own = {"train/reward", "train/groups_without_signal", "train/clipped_fraction"}
        return super().logged_names() | own | {f"train/{name}" for name in PROBLEMS}

    def attach(self) -> None:
        if self.anchor is not None:
            self.anchor.attach(self.model, self.tokenizer)

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Sample and grade the completions of one batch, and make its optimizer steps."""
        step = self.begin_step(batch, self.sample(batch))
        advantages = self.advantages(batch, step.rollouts)
        anchor = None
        if self.anchor is not None:
            anchor = self.anchor.score(self.scorer, step.student_prompts, step.rollouts)
        for ratios in self.updates(step):
            shares = self.normalized(self.likelihood.token_weights(step.rollouts))
            terms = [Term(self.likelihood, self._clipped(shares, advantages, ratios))]
            if self.anchor is not None:
                weights = self.normalized(self.anchor.objective.token_weights(step.rollouts))
                terms.append(Term(self.anchor.objective, [self.anchor.weight * weight for weight in weights], anchor))
            self.update(step, terms)
        return self.finish_step(step)

    def advantages(self, batch: PromptBatch, rollouts: Rollouts) -> Tensor:
        """Grade completions, and return the advantage of each. Shape [completions]. Every rank must call."""
        attempts = read_attempts(self.tokenizer, self.evaluator.grader, batch, rollouts)
        self.log_grading(attempts)
        rewards = torch.tensor(self.reward(attempts), dtype=torch.float32).view(-1, rollouts.n)
        # Equal scores such as 0.85 have a spread of rounding errors, which an optimizer such as Adam would follow.
        equal = (rewards == rewards[:, :1]).all(dim=1, keepdim=True)
        spread = rewards.std(dim=1, keepdim=True).masked_fill(equal, 0.0)
        total, same, rows, groups = self.ranks.sum(
            [float(rewards.sum()), float((spread == 0).sum()), rewards.numel(), len(rewards)]
        )
        self.log("train/reward", total / rows, prog_bar=True, batch_size=1)
        self.log("train/groups_without_signal", same / groups, batch_size=1)
        return ((rewards - rewards.mean(dim=1, keepdim=True)) / (spread + 1e-4)).masked_fill(equal, 0.0).flatten()

    def _clipped(self, shares: list[Tensor], advantages: Tensor, ratios: list[Tensor] | None) -> list[Tensor]:
        """Weight tokens by rho A, or 0 where rho is clipped. Logs the clipped share. Every rank must call."""
        weights = []
        cut = 0
        for row, (share, advantage) in enumerate(zip(shares, advantages, strict=True)):
            rho = torch.ones_like(share) if ratios is None else ratios[row]
            too_far = rho > 1 + self.clip_ratio if advantage > 0 else rho < 1 - self.clip_ratio
            cut += int(too_far.sum())
            weights.append(share * advantage * rho.masked_fill(too_far, 0.0))
        clipped, tokens = self.ranks.sum([cut, sum(map(len, shares))])
        self.log("train/clipped_fraction", clipped / max(tokens, 1), batch_size=1)
        return weights
