"""Supervised fine-tuning on the traces: the off-policy baseline.

    L = mean over the trace's tokens n of -log p_S(y*_n | x, y*_<n)

Differs from OPSD in that nothing is sampled in training and no teacher scores: the completions are the data's own traces.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from torch import Tensor

from opsd_lightning.losses.objectives import NegativeLogLikelihood, Objective, Term
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.types import DataRequirements, PromptBatch, Rollouts


def traces_as_rollouts(batch: PromptBatch) -> Rollouts:
    """The data's own traces in the place of completions."""
    return Rollouts([list(trace) for trace in batch.traces], [True] * len(batch.traces), sampled=False)


class SFTModule(PolicyModule):
    """Supervised fine-tuning on the verified traces, loss on the completion alone.

    Args:
        policy: The model.
        likelihood: The loss of a token; `NegativeLogLikelihood` over all tokens of a step unless given.
        common: What every method has; see `PolicyModule`.
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

    def sample(self, batch: PromptBatch) -> Rollouts:
        return traces_as_rollouts(batch)

    def prepare(self, batch: PromptBatch, rollouts: Rollouts) -> None:
        return None

    def terms(self, prepared: None, rollouts: Rollouts, ratios: list[Tensor] | None) -> list[Term]:
        return [Term(self.likelihood, self.shares(self.likelihood.token_weights(rollouts)))]
