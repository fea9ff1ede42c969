"""Divergences between the teacher's and the student's next-token distributions.

p_T and p_S are the distributions of teacher and student at one position, and v runs over the vocabulary:

    forward KL       sum_v p_T (log p_T - log p_S)
    reverse KL       sum_v p_S (log p_S - log p_T)
    generalized JSD  beta KL(p_T || m) + (1 - beta) KL(p_S || m),  m = beta p_T + (1 - beta) p_S

Source: arXiv 2601.18734, section 3. The convention for beta (it weights the teacher; 0 is forward KL and 1 is reverse KL)
follows GKD, arXiv 2306.13649. Inputs are log-probabilities in full precision. `Objective` applies temperature, clip and
reduction.
"""

from __future__ import annotations

import math
import warnings
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opsd_lightning.types import ClosedUnitInterval, checked


class Divergence(ABC):
    """Base class of divergences between the student's and the teacher's distribution."""

    @abstractmethod
    def entries(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        """Return the contribution of each vocabulary entry to the divergence.

        Args:
            student_logprobs: Log-probabilities of the student, with gradient. Shape [rows, V].
            teacher_logprobs: Log-probabilities of the teacher, without gradient. Shape [rows, V].

        Returns:
            Contributions in nats. Their sum over the last dimension is the divergence. Shape [rows, V].
        """


class ForwardKL(Divergence):
    """Forward KL divergence, KL(p_T || p_S) = sum_v p_T (log p_T - log p_S).

    The recipe that the authors of arXiv 2601.18734 released uses it. The gradient at the student's logits is p_S - p_T.

    Example::

        >>> import torch
        >>> from opsd_lightning import ForwardKL
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> ForwardKL().entries(student, teacher).sum(-1)
        tensor([0.1308])
    """

    def entries(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return teacher_logprobs.exp() * (teacher_logprobs - student_logprobs)


class ReverseKL(Divergence):
    """Reverse KL divergence, KL(p_S || p_T) = sum_v p_S (log p_S - log p_T). It is mode-seeking.

    The gradient at the student's logits is p_S (d - sum_v p_S d) with d = log p_S - log p_T.
    """

    def entries(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> Tensor:
        return student_logprobs.exp() * (student_logprobs - teacher_logprobs)


@checked
class GeneralizedJSD(Divergence):
    """Generalized Jensen-Shannon divergence, beta KL(p_T || m) + (1 - beta) KL(p_S || m), m = beta p_T + (1 - beta) p_S.

    Defined in GKD, arXiv 2306.13649. The first version of arXiv 2601.18734 uses it with beta 0.5.

    Args:
        beta: Weight of the teacher in the mixture, from 0 to 1. 0 is exactly forward KL and 1 is exactly reverse KL.
            Between them, the divergence vanishes as beta nears 0 or 1: useful values are 0.02 to 0.98.

    Example::

        >>> import torch
        >>> from opsd_lightning import GeneralizedJSD
        >>> student, teacher = torch.tensor([[0.5, 0.5]]).log(), torch.tensor([[0.75, 0.25]]).log()
        >>> GeneralizedJSD(beta=0.5).entries(student, teacher).sum(-1)
        tensor([0.0338])
    """

    def __init__(self, beta: ClosedUnitInterval = 0.5) -> None:
        self.beta = beta
        if 0 < beta < 0.02 or 0.98 < beta < 1:
            warnings.warn(
                f"GeneralizedJSD with beta={beta} is close to zero for all distributions. Choose beta from 0.02 to 0.98, "
                "0 for forward KL, or 1 for reverse KL.",
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
