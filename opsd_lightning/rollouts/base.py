"""The interface of rollout engines, and their seeds."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar

from peft import PeftModel

from opsd_lightning.types import Rollouts, Sampling


class RolloutEngine(ABC):
    """Samples completions from the policy's active weights.

    Attributes:
        logprob_tolerance: How far, in nats and on average over a step's tokens, the log-probabilities that come with
            rollouts may be from the trainer's own; training stops beyond. None: not checked.
        max_importance_ratio: Tokens' losses are weighted by the probability under the student over that under the
            sampler, at most this. None: not weighted. Needs rollouts with log-probabilities.
        without_effect: Settings that leave the completions as they are: where they are sampled, and what is done after.
    """

    logprob_tolerance: float | None = None
    max_importance_ratio: float | None = None
    without_effect: ClassVar[frozenset[str]] = frozenset(
        {"urls", "adapter_folder", "adapter_name", "timeout_seconds", "retries", "max_concurrency", "overlap", "api_key_env"}
        | {"logprob_tolerance", "max_importance_ratio", "gpu_memory_utilization", "max_memory_percent", "sleep"}
    )

    @abstractmethod
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        """Sample ``sampling.n`` completions of every prompt.

        Args:
            model: The policy. Its mode, weights and settings are the same after as before.
            prompts: Token ids of at least one prompt.
            sampling: What to sample.
            seed: Of the random numbers. Same seed, prompts and weights: same completions.

        Returns:
            ``len(prompts) * n`` completions, those of one prompt next to each other.
        """

    def prefetch(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> None:
        """Told, before a training step, what the next one will ask of `generate`. An engine that samples elsewhere may
        begin, with the weights as they are now. Every rank must call. Nothing unless overridden."""

    def close(self) -> None:
        """Let go of what was taken for sampling. Called when a run ends; the next `generate` starts anew."""


def seed_for(*parts: int | str) -> int:
    """A seed that depends on all its parts, such as (seed, step, rank), and on nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")
