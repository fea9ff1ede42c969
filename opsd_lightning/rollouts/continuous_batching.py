"""Rollouts with transformers' continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any, final

import torch
from peft import PeftModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from opsd_lightning.models.packing import cut_at_eos
from opsd_lightning.models.policy import base_of, device_of, eos_ids, evaluating
from opsd_lightning.models.sharding import unsharded
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.rollouts.decoding import generation_config_for
from opsd_lightning.rollouts.fast_weights import merged_adapter
from opsd_lightning.rollouts.rollout_copy import can_copy, rollout_copy
from opsd_lightning.types import ConfigError, OpenUnitInterval, Rollouts, Sampling, checked


@checked
@final
class ContinuousBatchingEngine(LocalEngine):
    """Rollouts by transformers' ``generate_batch``, with continuous batching over a paged cache. For GPUs.

    Under ``bf16-mixed`` it samples with a copy of the policy in bfloat16, because transformers samples in a thread that
    autocast does not reach.

    On two CPU cores it is less than half as fast as `TransformersEngine` (benchmarks/rollout.py --continuous).

    Args:
        max_memory_percent: Fraction of the free GPU memory for the cache, above 0 and below 1. Scoring needs the rest.
        merge_adapter: If True, sample with the adapter merged into the base weights, as in `TransformersEngine`.
        options: Further fields of transformers' ``ContinuousBatchingConfig``, by name, such as
            ``{use_cuda_graph: true}``.
    """

    neutral_settings = LocalEngine.neutral_settings | {"max_memory_percent"}

    def __init__(
        self,
        max_memory_percent: OpenUnitInterval = 0.5,
        merge_adapter: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.max_memory_percent = max_memory_percent
        self.merge_adapter = merge_adapter
        self.options = options or {}
        if reserved := {"max_memory_percent", "seed"} & set(self.options):
            raise ConfigError(
                f"{sorted(reserved)} cannot be set here",
                "model.rollouts.init_args.options",
                "Set max_memory_percent and model.seed instead",
            )
        try:
            ContinuousBatchingConfig(**self.options)
        except TypeError as error:
            raise ConfigError(
                f"not a ContinuousBatchingConfig ({error})",
                "model.rollouts.init_args.options",
                "Use fields of transformers' ContinuousBatchingConfig",
            ) from None

    @torch.no_grad()
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = [list(prompt) for prompt in prompts for _ in range(sampling.n)]
        settings = {"max_memory_percent": self.max_memory_percent, "seed": seed % 2**32} | self.options
        device = device_of(model)
        merging = merged_adapter(model) if self.merge_adapter else nullcontext()
        with (
            evaluating(model),
            unsharded(model),
            merging,
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            # transformers samples in a thread of its own, which autocast does not reach.
            sampler = base_of(model)
            if torch.is_autocast_enabled(device.type):
                if not can_copy(model):
                    raise ConfigError(
                        "continuous batching samples in a thread that autocast does not reach, and sharded weights "
                        "cannot be copied for it",
                        "model.rollouts",
                        "Use TransformersEngine, or set trainer.precision to 32-true",
                    )
                sampler = rollout_copy(model, torch.get_autocast_dtype(device.type))
            outputs = sampler.generate_batch(
                inputs=rows,
                generation_config=generation_config_for(sampling, model, sampling.max_new_tokens),
                continuous_batching_config=ContinuousBatchingConfig(**settings),
            )
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) != len(rows):
            raise RuntimeError(
                f"{len(rows) - len(outputs) + len(failed)} of {len(rows)} rollouts failed in continuous batching "
                f"({failed[0] if failed else 'see the messages above'}). Lower model.rollouts.init_args.max_memory_percent, "
                "or use TransformersEngine"
            )
        rows_and_ends = [cut_at_eos(output.generated_tokens, eos_ids(model)) for output in outputs.values()]
        return Rollouts([row for row, _ in rows_and_ends], [ended for _, ended in rows_and_ends], sampling.n)
