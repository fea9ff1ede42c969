"""Settings of PyTorch's CUDA allocator for a run from the command line."""

from __future__ import annotations

import os
import sys

# torch reads the first of these that is set, when CUDA is first used.
_NAMES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_HIP_ALLOC_CONF", "PYTORCH_ALLOC_CONF")


def use_expandable_segments(rollouts: str | None) -> None:
    """Let the allocator grow its segments instead of adding new ones, unless the environment has settings of its own.

    Rollouts grow their keys and values at every segment, and scoring passes differ in length: blocks of the sizes of earlier
    ones are left over and do not fit later ones. Segments that grow leave fewer gaps. The setting must be made before CUDA
    is used. The name ``PYTORCH_CUDA_ALLOC_CONF`` is taken since torch 2.9 to 2.11 ignore this setting under the newer one
    (https://github.com/pytorch/pytorch/issues/183387).

    Args:
        rollouts: Class path of the rollout engine. vLLM in this process (`VLLMEngine`) frees memory by a pool, which is not
            compatible with it (https://github.com/pytorch/pytorch/issues/147851). Nothing is set then.
    """
    vllm = (rollouts or "").rpartition(".")[2] == "VLLMEngine"
    if sys.platform == "linux" and not vllm and not any(name in os.environ for name in _NAMES):
        os.environ[_NAMES[0]] = "expandable_segments:True"
