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
from jsonargparse.typing import ClosedUnitInterval, PositiveInt
from torch import Tensor


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


class GeneralizedJSD(Divergence):
    """Generalized Jensen-Shannon divergence between teacher and student, the paper's first recipe at beta 0.5.

    Args:
        beta: Weight of the teacher in the mixture, from 0 to 1. 0 is forward KL and 1 is reverse KL exactly, but just
            inside the ends the divergence itself goes to 0: useful values lie in 0.02 to 0.98.
    """

    def __init__(self, beta: ClosedUnitInterval = 0.5) -> None:
        self.beta = ClosedUnitInterval(beta)
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


class Support(ABC):
    """The entries of the vocabulary that a divergence is taken over.

    ``restrict`` returns two proper distributions again: a raw, un-normalised top-k gives "divergences" below zero and
    does not exist here.
    """

    def check(self, vocabulary: int) -> None:
        """Raise ``ValueError`` where this support cannot be taken of a vocabulary of that size."""

    @abstractmethod
    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Log-probabilities of student and teacher, [rows, V] each, on the support, [rows, K] each."""


class FullVocabulary(Support):
    """Every entry of the vocabulary (default)."""

    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        return student_logprobs, teacher_logprobs


class _TopK(Support):
    def __init__(self, k: PositiveInt) -> None:
        self.k = PositiveInt(k)

    def check(self, vocabulary: int) -> None:
        if self.k >= vocabulary:
            raise ValueError(
                f"objective.support.k is {self.k}, but the model's vocabulary has {vocabulary} entries: choose a smaller "
                "k, or the FullVocabulary support"
            )


class TopKRenormalized(_TopK):
    """The teacher's k most probable tokens, both distributions renormalised over them.

    Args:
        k: Number of tokens, at least 1 and below the vocabulary's size.
    """

    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        teacher, top = teacher_logprobs.topk(self.k, dim=-1)
        return student_logprobs.gather(-1, top).log_softmax(-1), teacher.log_softmax(-1)


class TopKWithTail(_TopK):
    """The teacher's k most probable tokens and one more entry, for each role, that holds all the rest's probability.

    Args:
        k: Number of tokens, at least 1 and below the vocabulary's size.
    """

    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        top = teacher_logprobs.topk(self.k, dim=-1).indices

        def with_tail(logprobs: Tensor) -> Tensor:
            # Summed over the rest rather than taken as 1 - sum(top), which has no digits left where the top is all.
            rest = logprobs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([logprobs.gather(-1, top), rest], dim=-1)

        return with_tail(student_logprobs), with_tail(teacher_logprobs)
