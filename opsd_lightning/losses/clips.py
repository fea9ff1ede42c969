"""Clips of a token's divergence."""

from __future__ import annotations

from abc import ABC, abstractmethod

from torch import Tensor

from opsd_lightning.types import PositiveFloat, checked


class Clip(ABC):
    """How large contributions to the loss are held back."""

    @abstractmethod
    def apply(self, entries: Tensor) -> Tensor:
        """The loss of each token, [rows], from the contributions of the vocabulary entries, [rows, K]."""


class NoClip(Clip):
    """The divergence as it is (default)."""

    def apply(self, entries: Tensor) -> Tensor:
        return entries.sum(-1)


@checked
class _ClipAt(Clip):
    def __init__(self, tau: PositiveFloat) -> None:
        self.tau = tau


class PointwiseClip(_ClipAt):
    """The released recipe's clip: every vocabulary entry's contribution at most tau, before the sum.

    Beware: the loss may go below zero, and where the entry that the teacher most wants raised is clipped, the gradient
    can turn against it. Watch ``clipped_fraction`` and the unclipped ``forward_kl`` and ``reverse_kl``.

    Args:
        tau: Upper bound of one entry's contribution, in nats, above 0. The authors use 0.05 to 0.06.
    """

    def apply(self, entries: Tensor) -> Tensor:
        return entries.clamp(max=self.tau).sum(-1)


class TokenClip(_ClipAt):
    """Every token's divergence at most tau: a token above it has no gradient.

    Args:
        tau: Upper bound of one token's divergence, in nats, above 0.
    """

    def apply(self, entries: Tensor) -> Tensor:
        return entries.sum(-1).clamp(max=self.tau)


class RescaleClip(_ClipAt):
    """A token above tau is scaled down to tau by a detached factor: its gradient keeps its direction.

    Args:
        tau: Upper bound of one token's divergence, in nats, above 0.
    """

    def apply(self, entries: Tensor) -> Tensor:
        value = entries.sum(-1)
        return value * (self.tau / value.detach().clamp(min=self.tau))
