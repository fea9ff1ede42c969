"""Weights of completion tokens by position."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opsd_lightning.types import NonNegativeFloat, PositiveFloat, PositiveInt, checked


class PositionWeight(ABC):
    """Weight of a completion's tokens by their place, before the division by the sum of all weights."""

    @abstractmethod
    def weights(self, length: int) -> Tensor:
        """Weights, not negative, of a completion of that many tokens. Shape [length]."""


@checked
class DecayingPositions(PositionWeight):
    """2^(-n / half_life_tokens) for token n = 0, 1, ...: early tokens, on which the rest depends, weigh most.

    Args:
        half_life_tokens: Tokens over which the weight halves, above 0.
    """

    def __init__(self, half_life_tokens: PositiveFloat = 256.0) -> None:
        self.half_life_tokens = half_life_tokens

    def weights(self, length: int) -> Tensor:
        return torch.exp2(-torch.arange(length, dtype=torch.float32) / self.half_life_tokens)


@checked
class FirstPositions(PositionWeight):
    """1 for the first tokens of a completion, and another weight for the rest.

    Args:
        tokens: How many are the first, at least 1.
        rest: Weight of the others, 0 or more.
    """

    def __init__(self, tokens: PositiveInt, rest: NonNegativeFloat = 0.0) -> None:
        self.tokens, self.rest = tokens, rest

    def weights(self, length: int) -> Tensor:
        weights = torch.full((length,), float(self.rest), dtype=torch.float32)
        weights[: self.tokens] = 1.0
        return weights
