"""Supervised fine-tuning on the traces: the off-policy baseline.

    L = mean over the trace's tokens n of -log p_S(y*_n | x, y*_<n)

Nothing is sampled in training and no teacher scores: the completions are the data's traces.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from opsd_lightning.losses.objectives import NegativeLogLikelihood, Objective, Term
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.step import StepOutput
from opsd_lightning.models.policy import Policy
from opsd_lightning.types import DataRequirements, PromptBatch, Rollouts, Sampling


def traces_as_rollouts(batch: PromptBatch) -> Rollouts:
    """Return the data's traces as completions that were not sampled."""
    return Rollouts([list(trace) for trace in batch.traces], [True] * len(batch.traces), sampled=False)


class SFTModule(PolicyModule):
    """Supervised fine-tuning on the verified traces. Only the completion counts in the loss.

    Args:
        policy: The model.
        likelihood: Loss of a token. Defaults to `NegativeLogLikelihood` over all tokens of a step.
        common: Arguments of `PolicyModule`.

    Example::

        >>> from opsd_lightning import LoRA, Policy, SFTModule
        >>> SFTModule(Policy("HuggingFaceTB/SmolLM2-135M-Instruct", LoRA(r=8)), token_budget=4096).token_budget
        4096
    """

    idle_reason = "the gradient is 0: the model gives the traces a probability of 1 already, or no trace is left"

    def __init__(self, policy: Policy, likelihood: NegativeLogLikelihood | None = None, **common: Any) -> None:
        super().__init__(policy, **common)
        self.likelihood = likelihood or NegativeLogLikelihood()

    @property
    def objective(self) -> Objective:
        return self.likelihood

    @property
    def data_requirements(self) -> DataRequirements:
        return replace(super().data_requirements, trace_completions=True)

    def sampled(self, stage: str) -> dict[str, Sampling]:
        found = super().sampled(stage)
        found.pop("train", None)  # training samples no completions
        return found

    def training_step(self, batch: PromptBatch, batch_idx: int) -> StepOutput:
        """Train on the traces of one batch."""
        step = self.begin_step(batch, traces_as_rollouts(batch))
        for _ in self.updates(step):
            weights = self.normalized(self.likelihood.token_weights(step.rollouts))
            self.update(step, [Term(self.likelihood, weights)])
        return self.finish_step(step)
