"""Sampling completions from the policy: token ids in, token ids out, never text in between.

`Sampling` says what to sample, a `RolloutEngine` how. An engine takes the weights as they are when it is called, so the
same one serves the student, the privileged teacher (inside ``teacher.weights``) and validation.
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
from opsd_lightning.models.sharding import gathered
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.fast_weights import merged_adapter, packed_linears
from opsd_lightning.types import PositiveInt, Rollouts, Sampling, UserError, checked


@checked
class TransformersEngine(RolloutEngine):
    """transformers' ``generate``, in segments: rows that have ended leave the batch, and waiting ones take their place.

    A prompt that several completions follow is run once. For models whose cache is no keys and values (linear
    attention), and with a static cache, rows stay until the last of their batch has ended.

    Args:
        max_rows: The most completions that are worked on at one time, at least 1; more wait. All at once unless given.
            Decoding is bound by memory bandwidth, so the more fit, the better.
        merge_adapter: Sample with the adapter merged into the base weights, which are put back bit by bit after. Only
            done where that is exact (unquantized float32 weights); takes a second copy of them for the time, and a
            third on a CPU, where products of few rows are faster on packed weights.
        static_cache: Allocate keys and values once, for the longest completion.
        compile: Compile the decoding step (transformers does so on CUDA). Needs ``static_cache``.
        gather_weights: Under FSDP2, hold all weights on every device for the time of a rollout. Without it they are
            gathered layer by layer for every single token: slow, for models that do not fit one device.
    """

    splits_layers = True

    def __init__(
        self,
        max_rows: PositiveInt | None = None,
        merge_adapter: bool = True,
        static_cache: bool = False,
        compile: bool = False,
        gather_weights: bool = True,
    ) -> None:
        if compile and not static_cache:
            raise UserError("model.rollouts.init_args.compile needs static_cache: true, a cache whose shape does not change")
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
                stack.enter_context(gathered(model))
            if self.merge_adapter:
                stack.enter_context(merged_adapter(model))
            stack.enter_context(packed_linears(model))
            stack.enter_context(torch.random.fork_rng(devices=devices))
            torch.manual_seed(seed)
            # Segments end when rows do, which ranks that share their weights could not do at the same time.
            segments = selectable_cache(model) and not self.static_cache and not _sharded(model)
            found = (self._in_segments if segments else self._in_batches)(model, rows, sampling)
        return Rollouts([found[i][0] for i in range(len(rows))], [found[i][1] for i in range(len(rows))], sampling.n)

    def _in_batches(
        self, model: PeftModel, rows: Sequence[Sequence[int]], sampling: Sampling
    ) -> dict[int, tuple[list[int], bool]]:
        """One call of ``generate`` for each ``max_rows`` rows."""
        config = _generation_config(sampling, model, sampling.max_new_tokens)
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
                synced_gpus=_sharded(model),  # ranks that have ended go on with empty steps until all have
            )
            for index, row in zip(part, output[:, input_ids.shape[1] :].tolist(), strict=True):
                found[index] = cut_at_eos(row, eos_ids(model))
        return found

    def _in_segments(
        self, model: PeftModel, rows: Sequence[Sequence[int]], sampling: Sampling
    ) -> dict[int, tuple[list[int], bool]]:
        """``generate`` until some rows have ended; then the batch goes on without them."""
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
                generation_config=_generation_config(sampling, model, left),
                synced_gpus=False,
                stopping_criteria=StoppingCriteriaList([_SomeEnded(stop, max(len(batch.rows) // 8, 1))]),
            )
            going_on = []
            for place, (index, row) in enumerate(
                zip(batch.rows, output[:, batch.input_ids.shape[1] :].tolist(), strict=True)
            ):
                more, ended = cut_at_eos(row, stop)
                found[index] = (found[index][0] + more, ended)
                if not ended and len(found[index][0]) < sampling.max_new_tokens:
                    going_on.append(place)
            batch = batch.selected(output, going_on) if going_on else None
        return found


@dataclass
class _Batch:
    """Rows that are being sampled. The cache holds all columns but the last, which ``generate`` feeds first."""

    rows: list[int]
    input_ids: Tensor  # [B, P + C], padded on the left
    mask: Tensor
    cache: DynamicCache

    @classmethod
    def start(cls, model: PeftModel, prompts: Mapping[int, Sequence[int]]) -> _Batch:
        """Run the prompts but for their last token, each different one once."""
        different = {tuple(prompt): place for place, prompt in enumerate(dict.fromkeys(map(tuple, prompts.values())))}
        which = [different[tuple(prompt)] for prompt in prompts.values()]
        input_ids, mask, position_ids = pad_left(list(different), device_of(model))
        if input_ids.shape[1] == 1:  # at least one column for the cache, if only of padding
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
        """Whether rows of another length can join: a sliding window's cache has no columns to pad."""
        return all(type(layer) is DynamicLayer for layer in self.cache.layers)

    def joined(self, other: _Batch) -> _Batch:
        """Both batches as one, the shorter padded on the left."""
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
        """What goes on after a segment, ``output`` being its rows of [B, P + C] tokens."""
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
        """Add columns of padding on the left, or take some away."""
        if columns:
            self.input_ids, self.mask = (functional.pad(x, (columns, 0)) for x in (self.input_ids, self.mask))
            layers: list[Any] = self.cache.layers
            for layer in layers:
                layer.keys = functional.pad(layer.keys, (0, 0, columns, 0))
                layer.values = functional.pad(layer.values, (0, 0, columns, 0))


class _SomeEnded(StoppingCriteria):
    """Stops the whole batch once that many of its rows have ended."""

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
    """Rows of like length next to each other: less padding."""
    return sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))


def _generation_config(sampling: Sampling, model: PeftModel, max_new_tokens: int) -> GenerationConfig:
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
