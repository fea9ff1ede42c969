"""OPSD with off-policy steps: a seeded share of steps trains on the data's traces instead of sampled completions.

The loss is that of `opsd`: the divergence between both roles, on the tokens of the trace.
"""

from __future__ import annotations

import random
from dataclasses import replace
from typing import Any

from opsd_lightning.methods.opsd import DistillationModule
from opsd_lightning.methods.sft import traces_as_rollouts
from opsd_lightning.models.policy import Policy
from opsd_lightning.types import ClosedUnitInterval, DataRequirements, PromptBatch, Rollouts, checked


@checked
class MixedOPSDModule(DistillationModule):
    """OPSD with a share of steps on the data's traces.

    Args:
        policy: The model that plays both roles.
        trace_share: Share of steps on the traces, from 0 (OPSD) to 1 (off-policy distillation).
        common: Arguments of `DistillationModule`.
    """

    def __init__(self, policy: Policy, trace_share: ClosedUnitInterval = 0.25, **common: Any) -> None:
        super().__init__(policy, **common)
        self.trace_share = trace_share

    @property
    def data_requirements(self) -> DataRequirements:
        return replace(super().data_requirements, teacher_prompts=True, traces=True, trace_completions=True)

    def completions(self, batch: PromptBatch) -> Rollouts:
        # Drawn from seed and step alone, so that all ranks agree.
        drawn = random.Random(f"traces {self.seed} {self.global_step}").random()
        return traces_as_rollouts(batch) if drawn < self.trace_share else self.sample(batch)
