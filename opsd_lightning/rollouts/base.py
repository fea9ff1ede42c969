"""Interfaces of rollout engines, and their seeds."""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
from peft import PeftModel

from opsd_lightning.models.policy import ModelSettings
from opsd_lightning.types import Rollouts, Sampling


class Demand(NamedTuple):
    """Largest rollout of a run, on one device.

    Args:
        tokens: Tokens of the longest prompt and its longest completion.
        rows: Largest number of completions in one call of `RolloutEngine.generate`.
    """

    tokens: int
    rows: int


class RolloutEngine(ABC):
    """Abstract base class of engines that sample completions from the policy's active weights.

    Attributes:
        logprob_tolerance: Largest accepted difference, in nats and averaged over the tokens of a step, between the
            log-probabilities that come with the rollouts and the trainer's own. Training stops beyond it. None disables the
            check.
        max_importance_ratio: If set, the loss of each token is weighted by the ratio of its probability under the student to
            that under the sampler, truncated at this value. Requires rollouts with log-probabilities. None disables the
            weighting.
        neutral_settings: Names of settings that do not change the completions. An interrupted evaluation may be continued
            with other values of them.
    """

    logprob_tolerance: float | None = None
    max_importance_ratio: float | None = None
    neutral_settings: ClassVar[frozenset[str]] = frozenset({"logprob_tolerance", "max_importance_ratio"})

    def prepare(self, policy: ModelSettings, demand: Demand | None = None) -> None:
        """Announce the policy and the largest rollout of a run, before the model is built. Does nothing by default.

        Args:
            policy: Settings of the policy.
            demand: Largest rollout, or None if it is unknown.

        Raises:
            ConfigError: The engine cannot sample from the policy, or has no room for the rollout.
        """

    @abstractmethod
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        """Sample ``sampling.n`` completions of every prompt.

        Args:
            model: The policy. Its weights, settings and training mode are unchanged afterwards.
            prompts: Token ids of at least one prompt.
            sampling: Sampling settings.
            seed: Seed for the sampling. Calls with the same seed, prompts and weights return the same completions.

        Returns:
            ``len(prompts) * sampling.n`` completions. Those of the same prompt are adjacent.
        """

    def check(self, policy: ModelSettings, precision: str, device: torch.device) -> None:
        """Check the engine's settings with those of the policy and the trainer, before the model is loaded.

        Args:
            policy: Settings of the policy.
            precision: The trainer's precision, such as ``bf16-mixed``.
            device: Device of this process.

        Raises:
            ConfigError: A setting would fail or have no effect.
        """

    def prefetch(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> None:
        """Announce the arguments of the next call of `generate`, before the current training step. Every rank must call.

        An engine that samples elsewhere may start to sample, with the current weights. Does nothing by default.
        """

    def close(self) -> None:
        """Release the resources of sampling at the end of a run. A later call of `generate` acquires them again."""


class LocalEngine(RolloutEngine):
    """Abstract base class of engines that run the policy's own modules in this process.

    Their rollouts are checked against scoring at the start of a run.
    """


def seed_for(*parts: int | str) -> int:
    """Return a seed that is a function of all parts, such as (seed, step, rank)."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")
