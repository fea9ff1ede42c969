"""OPSD with some off-policy steps: a seeded share of steps trains on the data's traces instead of the student's completions.

Differs from OPSD in nothing but what is sampled; the loss stays the divergence between both roles, on the trace's tokens.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import traces_as_rollouts
from opsd_lightning.models.policy import Policy
from opsd_lightning.types import ClosedUnitInterval, DataRequirements, PromptBatch, Rollouts, checked


@checked
class MixedOPSDModule(OPSDModule):
    """OPSD with a share of steps on the traces.

    Args:
        policy: The model that plays both roles.
        trace_share: Share of steps on the traces, from 0 (OPSD) to 1 (off-policy distillation).
        common: What `OPSDModule` takes.
    """

    def __init__(self, policy: Policy, trace_share: ClosedUnitInterval = 0.25, **common: Any) -> None:
        super().__init__(policy, **common)
        self.trace_share = trace_share

    @property
    def data_requirements(self) -> DataRequirements:
        return replace(super().data_requirements, teacher_prompts=True, traces=True, trace_completions=True)

    def sample(self, batch: PromptBatch) -> Rollouts:
        # By seed and step alone: every rank draws the same.
        drawn = random.Random(f"traces {self.seed} {self.global_step}").random()
        return traces_as_rollouts(batch) if drawn < self.trace_share else super().sample(batch)
