"""Memory of a vLLM instance beside the trainer: its need, and the share of the device that it gets."""

from __future__ import annotations

import os

import torch

from opsd_lightning.types import ConfigError

GIB = 2**30
#: vLLM's activations and CUDA graphs, and the temporary logits of its sampler. vLLM measures them when it starts.
WORK_BYTES = 2 * GIB
#: A second CUDA context, and the rounding of allocations.
MARGIN_BYTES = GIB


def needed_bytes(weights: int, row: int, rows: int) -> int:
    """Return the memory that vLLM needs to sample some completions at once, in bytes.

    Args:
        weights: Bytes of vLLM's copy of the weights.
        row: Bytes of the keys and values of the longest prompt and completion.
        rows: Number of completions.
    """
    return weights + WORK_BYTES + rows * row


def memory_share(weights: int, row: int, rows: int, free: int, total: int, kept: int = 0) -> float:
    """Return the share of a device's memory for vLLM (its ``gpu_memory_utilization``): its need, or less if less is free.

    With less memory than needed, vLLM samples fewer completions at once.

    Args:
        weights: Bytes of vLLM's copy of the weights.
        row: Bytes of the keys and values of the longest prompt and completion.
        rows: Number of completions that are sampled in one call.
        free: Free bytes, with the trainer's weights loaded.
        total: All bytes of the device.
        kept: Bytes that the trainer still allocates and keeps during rollouts, such as the optimizer's state.

    Raises:
        ConfigError: Not even one completion fits.
    """
    room = free - kept - MARGIN_BYTES
    if room < (least := needed_bytes(weights, row, 1)):
        raise ConfigError(
            f"vLLM needs at least {_gib(least)} GiB for its weights, its activations and one completion, and beside the "
            f"trainer {_gib(max(room, 0))} of {_gib(total)} GiB are free",
            "model.rollouts",
            "Use a larger GPU, shorter completions, or TransformersEngine, which needs no second copy of the weights",
        )
    # Rounded down to a share that vLLM's start check accepts.
    return int(1000 * min(needed_bytes(weights, row, rows), room) / total) / 1000


def memory_of(device: torch.device) -> tuple[int, int]:
    """Return the free and the total bytes of a device. On a CPU those of the host (Linux)."""
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        return int(free), int(total)
    page = os.sysconf("SC_PAGE_SIZE")
    return os.sysconf("SC_AVPHYS_PAGES") * page, os.sysconf("SC_PHYS_PAGES") * page


def _gib(number: int) -> str:
    return f"{number / GIB:.1f}"
