"""Supports: the tokens of the vocabulary over which a divergence is summed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opsd_lightning.types import PositiveInt, checked


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


@checked
class _TopK(Support):
    def __init__(self, k: PositiveInt) -> None:
        self.k = k

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
