"""Clips: upper bounds on the divergence of single tokens.

Notation: l_v is the contribution of vocabulary entry v at one token, D = sum_v l_v the token's divergence and tau the
bound, all in nats.
"""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from opsd_lightning.types import PositiveFloat, checked


class Clip(ABC):
    """Base class of clips, which turn the contributions of vocabulary entries into the loss of each token."""

    @abstractmethod
    def apply(self, entries: Tensor) -> Tensor:
        """Return the loss of each token.

        Args:
            entries: Contributions of the vocabulary entries, in nats. Shape [rows, K].

        Returns:
            Losses in nats. Shape [rows].
        """


class NoClip(Clip):
    """No clip: the loss of a token is its divergence, sum_v l_v."""

    def apply(self, entries: Tensor) -> Tensor:
        return entries.sum(-1)


@checked
class _ClipAt(Clip):
    def __init__(self, tau: PositiveFloat) -> None:
        self.tau = tau


class PointwiseClip(_ClipAt):
    """Pointwise clip of each vocabulary entry: sum_v min(l_v, tau).

    This is the clip of the recipe that the authors of arXiv 2601.18734 released. The loss can be negative. Where the clip
    cuts the entry that the teacher most wants to raise, the gradient can lower that entry. Watch ``clipped_fraction`` and
    the unclipped ``forward_kl`` and ``reverse_kl``.

    Args:
        tau: Upper bound of one entry's contribution, in nats, above 0. The authors use 0.05 to 0.06.
    """

    def apply(self, entries: Tensor) -> Tensor:
        return entries.clamp(max=self.tau).sum(-1)


class TokenClip(_ClipAt):
    """Clip of each token's divergence: min(D, tau). A token above the bound has no gradient.

    Args:
        tau: Upper bound of one token's divergence, in nats, above 0.

    Example::

        >>> import torch
        >>> from opsd_lightning import TokenClip
        >>> TokenClip(tau=0.5).apply(torch.tensor([[0.25, 0.125], [0.5, 0.25]]))
        tensor([0.3750, 0.5000])
    """

    def apply(self, entries: Tensor) -> Tensor:
        return entries.sum(-1).clamp(max=self.tau)


class RescaleClip(_ClipAt):
    """Rescaling clip: D * stopgrad(min(1, tau / D)). The gradient of a token above the bound keeps its direction.

    Args:
        tau: Upper bound of one token's divergence, in nats, above 0.
    """

    def apply(self, entries: Tensor) -> Tensor:
        value = entries.sum(-1)
        return value * (self.tau / value.detach().clamp(min=self.tau))
