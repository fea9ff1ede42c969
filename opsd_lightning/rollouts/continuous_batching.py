"""Rollouts with transformers' continuous batching."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from typing import Any

import torch
from peft import PeftModel
from transformers.generation.configuration_utils import ContinuousBatchingConfig

from opsd_lightning.models.packing import cut_at_eos
from opsd_lightning.models.policy import base_of, device_of, eos_ids, evaluating
from opsd_lightning.models.sharding import gathered
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.fast_weights import merged_adapter
from opsd_lightning.rollouts.transformers_engine import _generation_config
from opsd_lightning.types import OpenUnitInterval, Rollouts, Sampling, UserError, checked


@checked
class ContinuousBatchingEngine(RolloutEngine):
    """transformers' ``generate_batch``: continuous batching over a paged cache, for GPUs.

    On two CPU cores it is less than half as fast as `TransformersEngine` (benchmarks/rollout.py --continuous).

    Args:
        max_memory_percent: Share of the free GPU memory that the cache may take, above 0 to 1. Scoring needs the rest.
        merge_adapter: As in `TransformersEngine`.
        options: Further fields of transformers' ``ContinuousBatchingConfig``, by name, such as
            ``{use_cuda_graph: true}``.
    """

    def __init__(
        self,
        max_memory_percent: OpenUnitInterval = 0.5,
        merge_adapter: bool = True,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.max_memory_percent = max_memory_percent
        self.merge_adapter = merge_adapter
        self.options = options or {}
        if own := {"max_memory_percent", "seed"} & set(self.options):
            raise UserError(
                f"model.rollouts.init_args.options: {sorted(own)} is decided elsewhere (max_memory_percent; seeds)"
            )
        try:
            ContinuousBatchingConfig(**self.options)
        except TypeError as error:
            raise UserError(f"model.rollouts.init_args.options: not a ContinuousBatchingConfig ({error})") from None

    @torch.no_grad()
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = [list(prompt) for prompt in prompts for _ in range(sampling.n)]
        settings = {"max_memory_percent": self.max_memory_percent, "seed": seed % 2**32} | self.options
        device = device_of(model)
        merging = merged_adapter(model) if self.merge_adapter else nullcontext()
        with (
            evaluating(model),
            gathered(model),
            merging,
            torch.random.fork_rng(devices=[device] if device.type == "cuda" else []),
        ):
            outputs = base_of(model).generate_batch(
                inputs=rows,
                generation_config=_generation_config(sampling, model, sampling.max_new_tokens),
                continuous_batching_config=ContinuousBatchingConfig(**settings),
            )
        failed = [output.error for output in outputs.values() if output.error is not None]
        if failed or len(outputs) != len(rows):
            raise RuntimeError(
                f"{len(rows) - len(outputs) + len(failed)} of {len(rows)} rollouts failed in continuous batching "
                f"({failed[0] if failed else 'see the messages above'}): lower model.rollouts.init_args.max_memory_percent, "
                "or use TransformersEngine"
            )
        cut = [cut_at_eos(output.generated_tokens, eos_ids(model)) for output in outputs.values()]
        return Rollouts([row for row, _ in cut], [ended for _, ended in cut], sampling.n)
