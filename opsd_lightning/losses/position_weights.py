"""Weights of completion tokens by position."""

from __future__ import annotations

from abc import ABC, abstractmethod

import torch
from torch import Tensor

from opsd_lightning.types import NonNegativeFloat, PositiveFloat, PositiveInt, checked


class PositionWeight(ABC):
    """Base class of token weights that depend on the position in the completion.

    The objective later divides the weights by their sum over the optimizer step.
    """

    @abstractmethod
    def weights(self, length: int) -> Tensor:
        """Return the weights of a completion's tokens.

        Args:
            length: Number of tokens in the completion.

        Returns:
            Weights, 0 or more. Shape [length].
        """


@checked
class DecayingPositions(PositionWeight):
    """Exponentially decaying weights, 2^(-n / half_life_tokens) for token n = 0, 1, ...

    Early tokens weigh most, since all later tokens depend on them.

    Args:
        half_life_tokens: Number of tokens after which the weight halves, above 0.
    """

    def __init__(self, half_life_tokens: PositiveFloat = 256.0) -> None:
        self.half_life_tokens = half_life_tokens

    def weights(self, length: int) -> Tensor:
        return torch.exp2(-torch.arange(length, dtype=torch.float32) / self.half_life_tokens)


@checked
class FirstPositions(PositionWeight):
    """Weight 1 for the first tokens of a completion and another weight for the rest.

    Args:
        tokens: Number of first tokens, at least 1.
        rest: Weight of all later tokens, 0 or more.
    """

    def __init__(self, tokens: PositiveInt, rest: NonNegativeFloat = 0.0) -> None:
        self.tokens, self.rest = tokens, rest

    def weights(self, length: int) -> Tensor:
        weights = torch.full((length,), float(self.rest), dtype=torch.float32)
        weights[: self.tokens] = 1.0
        return weights
