"""Rollouts with transformers' ``generate``.

The engine uses the weights that are active when it is called: the student's, or the teacher's inside ``teacher.weights``.
Inputs and outputs are token ids.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from contextlib import ExitStack, suppress
from typing import Any

import torch
from peft import PeftModel
from torch.distributed.tensor import DTensor

from opsd_lightning.distributed.collectives import all_gather_object
from opsd_lightning.models.policy import ModelSettings, base_of, device_of, evaluating
from opsd_lightning.models.precision import stored_dtype
from opsd_lightning.models.scoring import selectable_cache
from opsd_lightning.models.sharding import unsharded
from opsd_lightning.rollouts.attention import rollout_attention
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.rollouts.capacity import free_bytes, place_copy, row_bytes, rows_that_fit
from opsd_lightning.rollouts.decoding import Decoder
from opsd_lightning.rollouts.draws import RowDraws
from opsd_lightning.rollouts.fast_weights import merged_adapter, merged_bytes, packed_linears
from opsd_lightning.rollouts.rollout_copy import can_copy, copied_bytes, rollout_copy
from opsd_lightning.types import ConfigError, PositiveFloat, PositiveInt, Rollouts, Sampling, checked


@checked
class TransformersEngine(LocalEngine):
    """Rollouts by transformers' ``generate``, in segments: finished rows leave the batch, and waiting rows join it.

    A prompt with several completions is computed once. Rows stay in their batch until its last row ends if the cache is
    static, or if the model's cache does not consist of keys and values (linear attention).

    On CUDA, the number of rows at one time is bounded by the free memory. If memory runs out nevertheless, half of the rows
    continue and the others wait. The random numbers of a row depend on the seed, the row and the token's position only, so
    that dividing rows in another way changes samples through rounding only. On a CPU with ``max_rows`` unset, all rows are
    one batch, which draws from PyTorch's generator.

    Args:
        max_rows: Maximum number of completions in a batch, at least 1. Defaults to all on a CPU, and to the number that fits
            into the free memory on CUDA. Decoding is limited by memory bandwidth and kernel launches, so larger batches are
            more efficient.
        rollout_copy: If True, sample on CUDA with a copy of the policy in bfloat16 where training computes in bfloat16: with
            dequantized weights if they fit beside the keys and values, and with the quantized ones otherwise. Weights that
            are bfloat16 already are not copied. If False, sample with the policy's own modules under autocast.
        merge_adapter: If True, sample with the adapter merged into the base weights, which are restored bit by bit. Applies
            only where merging is exact (unquantized float32 weights, and computation in float32). Needs memory for a second
            copy of the weights, and on a CPU for a third one, which is packed for faster products.
        static_cache: If True, allocate keys and values once, for the longest completion.
        compile: If True, compile the decoding step (by transformers, on CUDA). Requires ``static_cache``. The policy's own
            modules are compiled, without ``rollout_copy``.
        gather_weights: If True, hold all weights on every device during a rollout under FSDP2. If False, each layer is
            gathered for each token, which is slow but works for models that do not fit one device.
        logprob_tolerance: Largest accepted difference between the rollout's log-probabilities and the trainer's own, in nats
            and averaged over the tokens of a step. The difference is logged. Costs a further scoring pass. Defaults to no
            comparison.
        max_importance_ratio: Upper limit, above 0, of the ratio of a token's probability under the student to that under
            the sampler, which then weights the token's loss. Defaults to no weighting.

    Example::

        >>> from opsd_lightning import Sampling, TransformersEngine
        >>> engine = TransformersEngine(max_rows=64)
        >>> rollouts = engine.generate(
        ...     model, prompts=[[1, 2, 3]], sampling=Sampling(max_new_tokens=32, n=4), seed=0
        ... )  # doctest: +SKIP
    """

    # Rows times tokens that ran out of memory, halved.
    _token_limit: int | None = None

    def __init__(
        self,
        max_rows: PositiveInt | None = None,
        merge_adapter: bool = True,
        static_cache: bool = False,
        compile: bool = False,
        gather_weights: bool = True,
        rollout_copy: bool = True,
        logprob_tolerance: PositiveFloat | None = None,
        max_importance_ratio: PositiveFloat | None = None,
    ) -> None:
        if compile and not static_cache:
            raise ConfigError(
                "compilation needs a cache of constant shape",
                "model.rollouts.init_args.compile",
                "Set static_cache to true, or compile to false",
            )
        self.max_rows = max_rows
        self.merge_adapter = merge_adapter
        self.static_cache = static_cache
        self.compile = compile
        self.gather_weights = gather_weights
        self.rollout_copy = rollout_copy
        self.logprob_tolerance = logprob_tolerance
        self.max_importance_ratio = max_importance_ratio

    def check(self, policy: ModelSettings, precision: str, device: torch.device) -> None:
        if self.compile and device.type == "cpu":
            raise ConfigError(
                "transformers does not compile on a CPU", "model.rollouts.init_args.compile", "Set it to false"
            )
        if self.compile and policy.quantization is not None:
            raise ConfigError(
                "transformers does not compile models that bitsandbytes quantizes",
                "model.rollouts.init_args.compile",
                "Set it to false, or remove model.policy.quantization",
            )
        copies = self.rollout_copy and not self.compile and device.type == "cuda"
        if self.static_cache and precision.endswith("-mixed") and not copies and stored_dtype(policy) == torch.float32:
            raise ConfigError(
                f"with float32 weights under trainer.precision {precision}, keys are float32 and values are not, and a "
                "static cache has one type",
                "model.rollouts.init_args.static_cache",
                "Set it to false, or model.policy.dtype to bfloat16, or trainer.precision to 32-true",
            )

    @torch.no_grad()
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = [prompt for prompt in prompts for _ in range(sampling.n)]
        device = device_of(model)
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            if self.gather_weights:
                stack.enter_context(unsharded(model))
            # Ranks that gather each layer must make the same passes, and segments end at different times.
            sharded = any(isinstance(parameter, DTensor) for parameter in model.parameters())
            sampler, size = self._on_gpu(stack, model, rows, sampling) if device.type == "cuda" else (model, len(rows))
            if device.type != "cuda":
                if self.merge_adapter:
                    stack.enter_context(merged_adapter(model))
                stack.enter_context(packed_linears(model))
            size = min(self.max_rows or size, len(rows))
            longest = max(map(len, rows)) + sampling.max_new_tokens
            if self._token_limit is not None:
                size = min(size, max(self._token_limit // longest, 1))
            stack.enter_context(torch.random.fork_rng(devices=[device] if device.type == "cuda" else []))
            torch.manual_seed(seed)
            divides = device.type == "cuda" or self.max_rows is not None
            decoder = Decoder(
                sampler,
                rows,
                sampling,
                min(all_gather_object(size)) if sharded else size,
                RowDraws(seed, len(rows), sampling.max_new_tokens) if divides and sampling.temperature > 0 else None,
                self.logprob_tolerance is not None or self.max_importance_ratio is not None,
                backs_off=divides and not sharded,
            )
            if selectable_cache(model) and not self.static_cache and not sharded:
                found = decoder.in_segments()
            else:
                found = decoder.in_batches(self.static_cache, self.compile, synced_gpus=sharded)
        if decoder.max_rows < size and not sharded:
            self._remember(decoder.max_rows, longest, size)
        return Rollouts(
            [completion.tokens for completion in found],
            [completion.terminated for completion in found],
            sampling.n,
            [completion.logprobs for completion in found] if decoder.with_logprobs else None,
        )

    def _on_gpu(
        self, stack: ExitStack, model: PeftModel, rows: Sequence[Sequence[int]], sampling: Sampling
    ) -> tuple[Any, int]:
        """Choose the modules to sample with, and enter their contexts.

        Returns:
            The policy or its copy, and the number of rows that fit beside it.
        """
        device, base, prompt = device_of(model), base_of(model), max(map(len, rows))
        autocast = torch.is_autocast_enabled(device.type)
        dtype = torch.get_autocast_dtype(device.type) if autocast else base.dtype
        stack.enter_context(rollout_attention(model))

        def each(element_size: int) -> int:
            return row_bytes(base.config, prompt, sampling.max_new_tokens, element_size)

        sampler: Any = model
        element_size = base.dtype.itemsize
        copies = self.rollout_copy and not self.compile and dtype == torch.bfloat16
        if copies and can_copy(model):
            light, full = (copied_bytes(model, dtype, dequantize) for dequantize in (False, True))
            wanted = min(self.max_rows or len(rows), len(rows))
            placement = place_copy(free_bytes(device), each(dtype.itemsize), light, full, wanted)
            if placement is not None:
                # Fragmented memory may not hold a copy, though enough is free. Sampling without it is slower.
                with suppress(torch.OutOfMemoryError):
                    sampler, element_size = rollout_copy(model, dtype, placement.dequantize), dtype.itemsize
                    stack.enter_context(torch.autocast(device.type, enabled=False))
        if sampler is model and self.merge_adapter and 2 * merged_bytes(model) < free_bytes(device):
            stack.enter_context(merged_adapter(model))
        return sampler, rows_that_fit(free_bytes(device), each(element_size))

    def _remember(self, rows: int, tokens: int, size: int) -> None:
        """Remember the size of a batch that fits, and warn once."""
        first, self._token_limit = self._token_limit is None, rows * tokens
        if first:
            warnings.warn(
                f"memory ran out in a rollout of {size} completions of up to {tokens} tokens, prompt included, which "
                f"continued with {rows} at one time. Later rollouts start with as many tokens. Set "
                f"model.rollouts.init_args.max_rows to {rows} to start with them in another run",
                stacklevel=3,
            )
