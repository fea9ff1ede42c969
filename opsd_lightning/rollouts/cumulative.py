"""Cumulative sums, and top-p sampling with them, that give equal bits each time where torch is asked for it.

``torch.cumsum`` has no deterministic kernel for floating-point numbers on CUDA: it raises an error under
``torch.use_deterministic_algorithms(True)`` (Lightning's ``trainer.deterministic: true``).
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional
from transformers import TopPLogitsWarper

_BLOCK = 64


def cumulative_sums(x: Tensor, dtype: torch.dtype) -> Tensor:
    """Return the cumulative sums over the last dimension. On CUDA they are products if kernels must be deterministic.

    Args:
        x: Shape [..., N].
        dtype: Data type of the sums, float32 or float64.

    Returns:
        Same shape.
    """
    if x.is_cuda and torch.are_deterministic_algorithms_enabled():
        with torch.autocast(x.device.type, enabled=False):
            return _by_products(x.to(dtype)).contiguous()
    return x.cumsum(-1, dtype=dtype)


def _by_products(x: Tensor) -> Tensor:
    """Add up blocks of numbers by a product with a triangular matrix, and the sums of blocks in the same way."""
    size = x.shape[-1]
    if size <= _BLOCK:
        return x @ torch.ones(size, size, dtype=x.dtype, device=x.device).triu()
    blocks = functional.pad(x, (0, -size % _BLOCK)).unflatten(-1, (-1, _BLOCK))
    within = _by_products(blocks)
    before = functional.pad(_by_products(within[..., -1]), (1, -1))  # the sum of all earlier blocks
    return (within + before[..., None]).flatten(-2)[..., :size]


class TopP(TopPLogitsWarper):
    """Transformers' top-p, with `cumulative_sums`."""

    def __call__(self, input_ids: Tensor, scores: Tensor) -> Tensor:  # type: ignore[override]
        ascending, order = torch.sort(scores, descending=False)
        removed = cumulative_sums(ascending.softmax(dim=-1), ascending.dtype) <= 1 - self.top_p
        removed[..., -self.min_tokens_to_keep :] = False
        return scores.masked_fill(removed.scatter(1, order, removed), self.filter_value)
