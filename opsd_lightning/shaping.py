"""What bounds a token's contribution to the loss, and what weighs it by its place."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from jsonargparse.typing import NonNegativeFloat, PositiveFloat, PositiveInt
from torch import Tensor


class Clip(ABC):
    """How large contributions to the loss are held back."""

    @abstractmethod
    def apply(self, entries: Tensor) -> Tensor:
        """The loss of each token, [rows], from the contributions of the vocabulary entries, [rows, K]."""


class NoClip(Clip):
    """The divergence as it is (default)."""

    def apply(self, entries: Tensor) -> Tensor:
        return entries.sum(-1)


class _ClipAt(Clip):
    def __init__(self, tau: PositiveFloat) -> None:
        self.tau = PositiveFloat(tau)


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


class PositionWeight(ABC):
    """Weight of a completion's tokens by their place, before the division by the sum of all weights."""

    @abstractmethod
    def weights(self, length: int) -> Tensor:
        """Weights, not negative, of a completion of that many tokens. Shape [length]."""


class DecayingPositions(PositionWeight):
    """2^(-n / half_life_tokens) for token n = 0, 1, ...: early tokens, on which the rest depends, weigh most.

    Args:
        half_life_tokens: Tokens over which the weight halves, above 0.
    """

    def __init__(self, half_life_tokens: PositiveFloat = 256.0) -> None:
        self.half_life_tokens = PositiveFloat(half_life_tokens)

    def weights(self, length: int) -> Tensor:
        return torch.exp2(-torch.arange(length, dtype=torch.float32) / self.half_life_tokens)


class FirstPositions(PositionWeight):
    """1 for the first tokens of a completion, and another weight for the rest.

    Args:
        tokens: How many are the first, at least 1.
        rest: Weight of the others, 0 or more.
    """

    def __init__(self, tokens: PositiveInt, rest: NonNegativeFloat = 0.0) -> None:
        self.tokens, self.rest = PositiveInt(tokens), NonNegativeFloat(rest)

    def weights(self, length: int) -> Tensor:
        weights = torch.full((length,), float(self.rest), dtype=torch.float32)
        weights[: self.tokens] = 1.0
        return weights
