"""Sampling whose draws belong to a row, and log-probabilities of sampled tokens.

A completion's tokens are drawn with uniform numbers that are a function of the seed, the row and the token's position alone.
How rows are divided into batches then changes the samples through rounding only.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor
from transformers import (
    LogitsProcessor,
    LogitsProcessorList,
    MinPLogitsWarper,
    StoppingCriteria,
    TemperatureLogitsWarper,
    TopKLogitsWarper,
)

from opsd_lightning.rollouts.cumulative import TopP, cumulative_sums
from opsd_lightning.types import Sampling

# Number of tokens whose uniform numbers go to the device together.
_BLOCK = 256


class RowDraws:
    """Uniform numbers for the tokens of all rows of a rollout.

    Args:
        seed: Seed of the rollout.
        rows: Number of rows.
        tokens: Largest number of tokens of a row.
    """

    def __init__(self, seed: int, rows: int, tokens: int) -> None:
        self._uniform = np.stack([_uniform(seed, row, tokens) for row in range(rows)])

    def of(self, rows: Sequence[int], starts: Sequence[int], count: int) -> np.ndarray:
        """Return the numbers for the next tokens of some rows.

        Args:
            rows: Index of each row.
            starts: Position of each row's next token.
            count: Number of tokens. Rows that end before get zeros.

        Returns:
            Shape [B, count], float64.
        """
        found = np.zeros((len(rows), count))
        for place, (row, start) in enumerate(zip(rows, starts, strict=True)):
            values = self._uniform[row, start : start + count]
            found[place, : len(values)] = values
        return found


def _uniform(seed: int, row: int, tokens: int) -> np.ndarray:
    """Return numbers in [0, 1) from a counter-based generator, whose key is the seed and the row."""
    key = int.from_bytes(hashlib.sha256(repr((seed, row)).encode()).digest()[:16], "little")
    bits = np.random.Philox(key=key).random_raw(tokens)
    return (bits >> np.uint64(16)).astype(np.float64) / 2.0**48


class RowSampler(LogitsProcessor):
    """Draws tokens by inverting the cumulative distribution at a given uniform number, without waiting for the device.

    ``generate`` must decode greedily: the scores that it gets are 1 for the drawn token and 0 for the others.

    Args:
        sampling: Sampling settings. Temperature, top-k, top-p and min-p apply in this order, as in transformers.
        uniform: Numbers for the tokens to come. Shape [B, T].
    """

    def __init__(self, sampling: Sampling, uniform: np.ndarray) -> None:
        self.warpers = warpers(sampling)
        self.uniform, self.step = uniform, 0
        self.block: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        place = self.step % _BLOCK
        if place == 0:
            block = np.ascontiguousarray(self.uniform[:, self.step : self.step + _BLOCK])
            self.block = torch.from_numpy(block).to(scores.device, non_blocking=True)
        assert self.block is not None
        self.step += 1
        for warper in self.warpers:
            scores = warper(input_ids, scores)
        # In float64, since sums of 150,000 float32 probabilities are wrong in the sixth digit.
        mass = cumulative_sums(scores.softmax(-1), torch.float64)
        drawn = torch.searchsorted(mass, self.block[:, place : place + 1] * mass[:, -1:], right=True)
        return torch.zeros_like(scores).scatter_(1, drawn, 1.0)


def warpers(sampling: Sampling) -> LogitsProcessorList:
    """Return transformers' processors for the temperature, top-k, top-p and min-p."""
    found = LogitsProcessorList()
    if sampling.temperature != 1:
        found.append(TemperatureLogitsWarper(float(sampling.temperature)))
    if sampling.top_k:
        found.append(TopKLogitsWarper(int(sampling.top_k)))
    if sampling.top_p < 1:
        found.append(TopP(float(sampling.top_p)))
    if sampling.min_p:
        found.append(MinPLogitsWarper(float(sampling.min_p)))
    return found


class TokenLogprobs(LogitsProcessor, StoppingCriteria):
    """Log-probabilities of sampled tokens at temperature 1. Pass it to ``generate`` as first processor and as criterion."""

    def __init__(self) -> None:
        self._logits: Tensor | None = None
        self._found: list[Tensor] = []

    def __call__(self, input_ids: Tensor, scores: Tensor | None) -> Tensor:  # type: ignore[override]
        if self._logits is None:  # before the token is chosen
            assert scores is not None
            self._logits = scores.float()
            return scores
        chosen = self._logits.gather(1, input_ids[:, -1:])[:, 0]
        self._found.append(chosen - self._logits.logsumexp(-1))
        self._logits = None
        return torch.zeros(len(input_ids), dtype=torch.bool, device=input_ids.device)

    def rows(self) -> list[list[float]]:
        """Return the log-probabilities of the tokens of each row."""
        return torch.stack(self._found, dim=1).tolist()
