"""Rollouts with transformers' ``generate``.

The engine uses the weights that are active when it is called: the student's, or the teacher's inside ``teacher.weights``.
Inputs and outputs are token ids.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from opsd_lightning.models.packing import cut_at_eos, pad_left
from opsd_lightning.models.policy import base_of, device_of, eos_ids, evaluating
from opsd_lightning.models.scoring import hidden_states, selectable_cache
from opsd_lightning.models.sharding import unsharded
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.rollouts.fast_weights import merged_adapter, packed_linears
from opsd_lightning.types import ConfigError, PositiveInt, Rollouts, Sampling, checked


@checked
class TransformersEngine(LocalEngine):
    """Rollouts by transformers' ``generate``, in segments: finished rows leave the batch, and waiting rows join it.

    A prompt with several completions is computed once. Rows stay in their batch until its last row ends if the cache is
    static, or if the model's cache does not consist of keys and values (linear attention).

    Args:
        max_rows: Maximum number of completions in a batch, at least 1. Defaults to all. Decoding is limited by memory
            bandwidth, so larger batches are more efficient.
        merge_adapter: If True, sample with the adapter merged into the base weights, which are restored bit by bit. Applies
            only where merging is exact (unquantized float32 weights). Needs memory for a second copy of the weights, and on
            a CPU for a third one, which is packed for faster products.
        static_cache: If True, allocate keys and values once, for the longest completion.
        compile: If True, compile the decoding step (by transformers, on CUDA). Requires ``static_cache``.
        gather_weights: If True, hold all weights on every device during a rollout under FSDP2. If False, each layer is
            gathered for each token, which is slow but works for models that do not fit one device.

    Example::

        >>> from opsd_lightning import Sampling, TransformersEngine
        >>> engine = TransformersEngine(max_rows=64)
        >>> rollouts = engine.generate(
        ...     model, prompts=[[1, 2, 3]], sampling=Sampling(max_new_tokens=32, n=4), seed=0
        ... )  # doctest: +SKIP
    """

    def __init__(
        self,
        max_rows: PositiveInt | None = None,
        merge_adapter: bool = True,
        static_cache: bool = False,
        compile: bool = False,
        gather_weights: bool = True,
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

    @torch.no_grad()
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = [prompt for prompt in prompts for _ in range(sampling.n)]
        device = device_of(model)
        devices = [device] if device.type == "cuda" else []
        with ExitStack() as stack:
            stack.enter_context(evaluating(model))
            if self.gather_weights:
                stack.enter_context(unsharded(model))
            if self.merge_adapter:
                stack.enter_context(merged_adapter(model))
            stack.enter_context(packed_linears(model))
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.manual_seed(seed)
            # Segments end at different times on different ranks, but ranks that gather layers must make the same passes.
            segments = selectable_cache(model) and not self.static_cache and not _sharded(model)
            found = (self._in_segments if segments else self._in_batches)(model, rows, sampling)
        return Rollouts([found[i][0] for i in range(len(rows))], [found[i][1] for i in range(len(rows))], sampling.n)

    def _in_batches(
        self, model: PeftModel, rows: Sequence[Sequence[int]], sampling: Sampling
    ) -> dict[int, tuple[list[int], bool]]:
        """Call ``generate`` once for each ``max_rows`` rows."""
        config = generation_config_for(sampling, model, sampling.max_new_tokens)
        if self.static_cache:
            config.cache_implementation = "static"
        config.disable_compile = not self.compile
        order, found = _by_length(rows), {}
        for start in range(0, len(order), self.max_rows or len(order)):
            part = order[start : start + (self.max_rows or len(order))]
            input_ids, mask, position_ids = pad_left([rows[i] for i in part], device_of(model))
            output = model.generate(
                input_ids=input_ids,
                attention_mask=mask,
                position_ids=position_ids,
                generation_config=config,
                synced_gpus=_sharded(model),  # finished ranks make empty passes until all ranks have finished
            )
            for index, row in zip(part, output[:, input_ids.shape[1] :].tolist(), strict=True):
                found[index] = cut_at_eos(row, eos_ids(model))
        return found

    def _in_segments(
        self, model: PeftModel, rows: Sequence[Sequence[int]], sampling: Sampling
    ) -> dict[int, tuple[list[int], bool]]:
        """Call ``generate`` until some rows end, replace them by waiting rows, and repeat."""
        stop = eos_ids(model)
        waiting = _by_length(rows)
        size = self.max_rows or len(rows)
        found: dict[int, tuple[list[int], bool]] = {index: ([], False) for index in waiting}
        batch: _Batch | None = None
        while batch is not None or waiting:
            if waiting and (batch is None or batch.can_grow()):
                room = size - (0 if batch is None else len(batch.rows))
                taken, waiting = waiting[:room], waiting[room:]
                new = _Batch.start(model, {index: rows[index] for index in taken})
                batch = new if batch is None else batch.joined(new)
            assert batch is not None
            left = sampling.max_new_tokens - max(len(found[index][0]) for index in batch.rows)
            output = model.generate(
                input_ids=batch.input_ids,
                attention_mask=batch.mask,
                past_key_values=batch.cache,
                generation_config=generation_config_for(sampling, model, left),
                synced_gpus=False,
                stopping_criteria=StoppingCriteriaList([_SomeEnded(stop, max(len(batch.rows) // 8, 1))]),
            )
            unfinished = []
            for place, (index, row) in enumerate(
                zip(batch.rows, output[:, batch.input_ids.shape[1] :].tolist(), strict=True)
            ):
                more, ended = cut_at_eos(row, stop)
                found[index] = (found[index][0] + more, ended)
                if not ended and len(found[index][0]) < sampling.max_new_tokens:
                    unfinished.append(place)
            batch = batch.selected(output, unfinished) if unfinished else None
        return found


@dataclass
class _Batch:
    """Batch of unfinished rows. The cache holds all columns except the last, with which ``generate`` continues."""

    rows: list[int]
    input_ids: Tensor  # [B, P + C], padded on the left
    mask: Tensor
    cache: DynamicCache

    @classmethod
    def start(cls, model: PeftModel, prompts: Mapping[int, Sequence[int]]) -> _Batch:
        """Fill the cache with the prompts except for their last tokens. Equal prompts are computed once."""
        distinct = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts.values())))}
        which = [distinct[tuple(prompt)] for prompt in prompts.values()]
        input_ids, mask, position_ids = pad_left(list(distinct), device_of(model))
        if input_ids.shape[1] == 1:  # the cache needs at least one column, here of padding
            input_ids, mask, position_ids = (functional.pad(x, (1, 0)) for x in (input_ids, mask, position_ids))
        cache = DynamicCache(config=base_of(model).config)
        hidden_states(
            model,
            input_ids=input_ids[:, :-1],
            attention_mask=mask[:, :-1],
            position_ids=position_ids[:, :-1],
            past_key_values=cache,
            use_cache=True,
        )
        batch = cls(list(prompts), input_ids, mask, cache)
        batch._select(which)
        return batch

    def can_grow(self) -> bool:
        """Return True if rows of another length can join. The cache of a sliding window cannot be padded."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def joined(self, other: _Batch) -> _Batch:
        """Concatenate two batches, with the shorter one padded on the left."""
        width = max(self.input_ids.shape[1], other.input_ids.shape[1])
        for batch in (self, other):
            batch._shift(width - batch.input_ids.shape[1])
        layers: Any = zip(self.cache.layers, other.cache.layers, strict=True)
        for ours, theirs in layers:
            ours.keys, ours.values = torch.cat([ours.keys, theirs.keys]), torch.cat([ours.values, theirs.values])
        return _Batch(
            self.rows + other.rows,
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.mask, other.mask]),
            self.cache,
        )

    def selected(self, output: Tensor, places: list[int]) -> _Batch:
        """Return the batch of the rows that continue after a segment.

        Args:
            output: Token ids after the segment. Shape [B, P + C].
            places: Indices of the rows that continue.
        """
        grown = output.shape[1] - self.input_ids.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), grown)], dim=1)
        batch = _Batch(self.rows, output, mask, self.cache)
        if len(places) < len(self.rows):
            batch.rows = [self.rows[place] for place in places]
            batch._select(places)
            if self.can_grow():
                batch._shift(-int(batch.mask.argmax(dim=1).min()))
        return batch

    def _select(self, places: list[int]) -> None:
        index = torch.tensor(places, device=self.input_ids.device)
        self.input_ids, self.mask = self.input_ids[index], self.mask[index]
        self.cache.batch_select_indices(index)

    def _shift(self, columns: int) -> None:
        """Add columns of padding on the left, or remove them if ``columns`` is negative."""
        if columns:
            self.input_ids, self.mask = (functional.pad(x, (columns, 0)) for x in (self.input_ids, self.mask))
            layers: list[Any] = self.cache.layers
            for layer in layers:
                layer.keys = functional.pad(layer.keys, (0, 0, columns, 0))
                layer.values = functional.pad(layer.values, (0, 0, columns, 0))


class _SomeEnded(StoppingCriteria):
    """Criterion that stops the batch when at least ``enough`` of its rows have ended."""

    def __init__(self, eos_ids: frozenset[int], enough: int) -> None:
        self.eos_ids, self.enough = torch.tensor(sorted(eos_ids)), enough
        self.ended: Tensor | None = None

    def __call__(self, input_ids: Tensor, scores: Any, **kwargs: Any) -> Tensor:
        self.eos_ids = self.eos_ids.to(input_ids.device)
        ended = torch.isin(input_ids[:, -1], self.eos_ids)
        self.ended = ended if self.ended is None else self.ended | ended
        return (self.ended.sum() >= self.enough).expand(len(input_ids))


def _sharded(model: PeftModel) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in model.parameters())


def _by_length(rows: Sequence[Sequence[int]]) -> list[int]:
    """Return the row indices in order of length, so that batches need little padding."""
    return sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))


def generation_config_for(sampling: Sampling, model: PeftModel, max_new_tokens: int) -> GenerationConfig:
    """Return transformers' generation settings for some sampling settings and the model's EOS and padding tokens."""
    own = base_of(model).generation_config
    common = {
        "max_new_tokens": max_new_tokens,
        "use_cache": True,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
    }
    if sampling.temperature == 0:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(
        do_sample=True,
        temperature=float(sampling.temperature),
        top_p=float(sampling.top_p),
        top_k=int(sampling.top_k),
        min_p=float(sampling.min_p) or None,
        **common,
    )
