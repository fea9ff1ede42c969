"""Divergences between the teacher's and the student's next-token distributions, and the supports they are taken on.

With p_T the teacher's and p_S the student's distribution over the vocabulary (v runs over it), per position:

    forward KL       sum_v p_T (log p_T - log p_S)
    reverse KL       sum_v p_S (log p_S - log p_T)
    generalized JSD  beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S

Source: arXiv 2601.18734, section 3; the mixture's convention (beta weighs the teacher, 0 is forward KL and 1 reverse KL)
is that of GKD, arXiv 2306.13649. Everything here works on log-probabilities in full precision, one chunk of rows at a
time; temperature, clipping and reduction are the objective's.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opsd_lightning.types import ClosedUnitInterval, checked


class Divergence(ABC):
    """How far the student's distribution is from the teacher's."""

    @abstractmethod
    def entries(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """The contribution of every vocabulary entry; their sum over the last dimension is the divergence in nats.

        Args:
            student_logprobs: Log-probabilities of the student, with gradient. Shape [rows, V].
            teacher_logprobs: Log-probabilities of the teacher, without. Shape [rows, V].
        """


class ForwardKL(Divergence):
    """KL(teacher || student), the released recipe's. Its gradient at the student's logits is p_S - p_T."""

    def entries(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)


class ReverseKL(Divergence):
    """KL(student || teacher), mode-seeking. Its gradient is p_S (d - sum(p_S d)) with d = log p_S - log p_T."""

    def entries(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return student_logprobs.exp() * (student_logprobs - teacher_logprobs)


@checked
class GeneralizedJSD(Divergence):
    """Generalized Jensen-Shannon divergence between teacher and student, the paper's first recipe at beta 0.5.

    Args:
        beta: Weight of the teacher in the mixture, from 0 to 1. 0 is forward KL and 1 is reverse KL exactly, but just
            inside the ends the divergence itself goes to 0: useful values lie in 0.02 to 0.98.
    """

    def __init__(self, beta: ClosedUnitInterval = 0.5) -> None:
        self.beta = beta
        if 0 < beta < 0.02 or 0.98 < beta < 1:
            warnings.warn(
                f"GeneralizedJSD(beta={beta}) is almost zero everywhere, unlike the forward or reverse KL that beta = 0 "
                "or 1 gives exactly: choose beta from 0.02 to 0.98, or an end.",
                stacklevel=2,
            )

    def entries(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        if self.beta == 0:
            return ForwardKL().entries(student_logprobs, teacher_logprobs)
        if self.beta == 1:
            return ReverseKL().entries(student_logprobs, teacher_logprobs)
        mixture = torch.logaddexp(teacher_logprobs + math.log(self.beta), student_logprobs + math.log1p(-self.beta))
        teacher = teacher_logprobs.exp() * (teacher_logprobs - mixture)
        student = student_logprobs.exp() * (student_logprobs - mixture)
        return self.beta * teacher + (1 - self.beta) * student
