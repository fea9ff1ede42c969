"""Number of completions that fit into a GPU's free memory at one time."""

from __future__ import annotations

from typing import Any, NamedTuple

import torch

from opsd_lightning.models.cache_size import cache_bytes

# Part of the free memory that rows may fill. The rest is for the allocator's fragments.
_SHARE = 0.9
# Numbers of 4 bytes a row and token of the vocabulary: logits, their copies in top-k and top-p with a sort's indices, and
# the cumulative distribution in float64.
_LOGITS = 14


def free_bytes(device: torch.device) -> int:
    """Return the bytes of a GPU that are free, with those that PyTorch's allocator holds unused."""
    unused = torch.cuda.memory_reserved(device) - torch.cuda.memory_allocated(device)
    return int(torch.cuda.mem_get_info(device)[0]) + unused


def row_bytes(config: Any, prompt: int, completion: int, element_size: int) -> int:
    """Return the bytes that a row needs at most in a rollout.

    Args:
        config: Configuration of the model.
        prompt: Tokens of the longest prompt.
        completion: Largest number of new tokens.
        element_size: Bytes of a number of keys and values.
    """
    text = config.get_text_config()
    layers = int(getattr(text, "num_hidden_layers", None) or 1)
    # While a cache grows or loses rows, one layer's old and new keys and values exist together.
    cache = cache_bytes(config, prompt + completion, element_size) * (layers + 2) // layers
    hidden = int(getattr(text, "hidden_size", 0))
    inner = int(getattr(text, "intermediate_size", None) or 4 * hidden)
    inputs = prompt * (6 * hidden + 4 * inner) * element_size  # a layer's activations while the prompt is computed
    return int(cache + inputs + 4 * _LOGITS * int(text.vocab_size))


def rows_that_fit(free: int, each: int) -> int:
    """Return the number of rows of ``each`` bytes that fit into ``free`` bytes, at least 1."""
    return max(int(free * _SHARE) // max(each, 1), 1)


class Placement(NamedTuple):
    """A copy of the policy in 16 bits, and the rows that fit beside it.

    Args:
        dequantize: True if the copy has dequantized weights.
        size: Bytes of the copy.
        rows: Number of rows.
    """

    dequantize: bool
    size: int
    rows: int


def place_copy(free: int, each: int, light: int, full: int, rows: int) -> Placement | None:
    """Choose the copy of the policy for a rollout, or None where no copy fits beside a row.

    Args:
        free: Free bytes.
        each: Bytes of a row.
        light: Bytes of a copy that shares quantized weights with the policy.
        full: Bytes of a copy with dequantized weights.
        rows: Number of rows of the rollout.
    """
    quantized, dequantized = (min(rows_that_fit(free - size, each), rows) for size in (light, full))
    # Decoding is bound by launches: fewer rows at one time cost more than quantized weights.
    if full > light and full + each < free and 2 * dequantized >= quantized:
        return Placement(True, full, dequantized)
    return Placement(False, light, quantized) if light + each < free else None
