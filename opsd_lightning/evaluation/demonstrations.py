"""Measures of demonstrations, for data without answers: likelihood under the student, divergence from the teacher."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from torchmetrics import MeanMetric, MetricCollection

from opsd_lightning.losses.objectives import NegativeLogLikelihood
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.types import PromptBatch, TokenStates

if TYPE_CHECKING:
    from opsd_lightning.teachers import Teacher


class DemonstrationScores(MetricCollection):
    """Means over all tokens of the demonstrations, their EOS tokens included.

    - ``nll``: -log p_S(y*_n | question, y*_<n), in nats a token.
    - ``divergence``: KL(p_T(. | context, y*_<n) || p_S(. | question, y*_<n)) over the full vocabulary at temperature 1, in
      nats a token. Only with a teacher.

    Args:
        divergence: If True, also measure the divergence.
    """

    def __init__(self, divergence: bool) -> None:
        super().__init__({name: MeanMetric() for name in (["nll", "divergence"] if divergence else ["nll"])})

    def measure(self, scorer: Scorer, batch: PromptBatch, teacher: Teacher | None, logits_memory_mib: int) -> None:
        """Score a batch of demonstrations. Every rank must call.

        Args:
            scorer: A scorer of the policy.
            batch: Questions with ``traces``, and with ``teacher`` prompts if there is a teacher.
            teacher: The teacher. None measures the likelihood only.
            logits_memory_mib: Approximate memory for logits, in MiB.
        """
        student = scorer.score(batch.student, batch.traces)
        states = None
        if teacher is not None:
            prompts = batch.teacher if teacher.privileged else batch.student
            states = teacher.score(scorer, prompts, batch.traces)
        measured = _measured(student, states, batch.traces, logits_memory_mib)
        repeated = [not counts for counts, trace in zip(batch.counted, batch.traces, strict=True) for _ in trace]
        kept = ~torch.tensor(repeated, dtype=torch.bool)
        for name, values in measured.items():
            self[name].update(values.cpu()[kept].to(self[name].device))


@torch.no_grad()
def _measured(
    student: TokenStates, teacher: TokenStates | None, traces: Sequence[Sequence[int]], logits_memory_mib: int
) -> dict[str, Tensor]:
    flat = [token for trace in traces for token in trace]
    targets = torch.tensor(flat, dtype=torch.long, device=student.hidden.device)
    objective = NegativeLogLikelihood(logits_memory_mib=logits_memory_mib)
    measured: dict[str, Any] = objective(
        student, teacher, targets, torch.zeros(len(flat), dtype=torch.float32, device=targets.device)
    )[1]
    found = {"nll": -measured["student_logprob"]}
    return found if teacher is None else found | {"divergence": measured["forward_kl"]}
