"""Supports: the vocabulary entries over which a divergence is summed."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opsd_lightning.types import ConfigError, PositiveInt, checked


class Support(ABC):
    """Base class of supports, the vocabulary entries over which a divergence is summed.

    `restrict` returns normalized distributions. Without normalization, a divergence over the top k entries could be
    negative.
    """

    def check(self, vocabulary: int, setting: str) -> None:
        """Check that the support fits a vocabulary.

        Args:
            vocabulary: Number of entries in the model's vocabulary.
            setting: Name of the setting that holds this support, for the error.

        Raises:
            ConfigError: The vocabulary is too small for this support.
        """

    @abstractmethod
    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        """Return both roles' log-probabilities on the support.

        Args:
            student_logprobs: Log-probabilities of the student. Shape [rows, V].
            teacher_logprobs: Log-probabilities of the teacher. Shape [rows, V].

        Returns:
            Log-probabilities of student and teacher. Shape [rows, K] each.
        """


class FullVocabulary(Support):
    """Support of all vocabulary entries."""

    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        return student_logprobs, teacher_logprobs


@checked
class _TopK(Support):
    def __init__(self, k: PositiveInt) -> None:
        self.k = k

    def check(self, vocabulary: int, setting: str) -> None:
        if self.k >= vocabulary:
            raise ConfigError(
                f"k is {self.k}, but the model's vocabulary has only {vocabulary} entries",
                f"{setting}.k",
                "Choose a smaller k or the support FullVocabulary",
            )


class TopKRenormalized(_TopK):
    """Support of the teacher's k most probable tokens. Both distributions are renormalised over them.

    Args:
        k: Number of tokens, at least 1 and below the vocabulary's size.
    """

    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        teacher, top = teacher_logprobs.topk(self.k, dim=-1)
        return student_logprobs.gather(-1, top).log_softmax(-1), teacher.log_softmax(-1)


class TopKWithTail(_TopK):
    """Support of the teacher's k most probable tokens and one tail entry.

    The tail entry holds the probability of all other tokens, for each role: log(1 - sum of the k probabilities).

    Args:
        k: Number of tokens, at least 1 and below the vocabulary's size.

    Example::

        >>> import torch
        >>> from opsd_lightning import TopKWithTail
        >>> student = torch.tensor([[0.25, 0.25, 0.25, 0.25]]).log()
        >>> teacher = torch.tensor([[0.125, 0.5, 0.25, 0.125]]).log()
        >>> for logprobs in TopKWithTail(k=2).restrict(student, teacher):
        ...     print(logprobs.exp())
        tensor([[0.2500, 0.2500, 0.5000]])
        tensor([[0.5000, 0.2500, 0.2500]])
    """

    def restrict(self, student_logprobs: Tensor, teacher_logprobs: Tensor) -> tuple[Tensor, Tensor]:
        top = teacher_logprobs.topk(self.k, dim=-1).indices

        def with_tail(logprobs: Tensor) -> Tensor:
            # Sum over the other entries: 1 - sum(top) loses all digits where the top holds nearly all probability.
            rest = logprobs.scatter(-1, top, -torch.inf).logsumexp(-1, keepdim=True)
            return torch.cat([logprobs.gather(-1, top), rest], dim=-1)

        return with_tail(student_logprobs), with_tail(teacher_logprobs)
