"""Decoding with transformers' ``generate``: rows leave and join a batch, and a batch that is too large is divided."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor
from torch.nn import functional
from transformers import DynamicCache, GenerationConfig, LogitsProcessorList, StoppingCriteria, StoppingCriteriaList
from transformers.cache_utils import DynamicLayer

from opsd_lightning.models.packing import cut_at_eos, pad_left
from opsd_lightning.models.policy import base_of, device_of, eos_ids
from opsd_lightning.models.scoring import hidden_states
from opsd_lightning.rollouts.draws import RowDraws, RowSampler, TokenLogprobs
from opsd_lightning.types import ConfigError, Sampling


@dataclass
class Completion:
    """A completion that grows.

    Args:
        tokens: Token ids so far.
        logprobs: Log-probabilities of the tokens, empty if they are not recorded.
        terminated: True if the last token is an EOS.
    """

    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    terminated: bool = False


@dataclass
class Decoder:
    """Samples one completion of each row.

    Args:
        model: The policy, or a copy of its base model for rollouts.
        rows: The prompt of each row.
        sampling: Sampling settings.
        max_rows: Maximum number of rows at one time. Halved when memory runs out.
        draws: Random numbers of each row. If None, a batch draws from PyTorch's generator.
        with_logprobs: If True, record the log-probabilities of the tokens.
        backs_off: If True, continue with half the rows when memory runs out.
    """

    model: Any
    rows: Sequence[Sequence[int]]
    sampling: Sampling
    max_rows: int
    draws: RowDraws | None = None
    with_logprobs: bool = False
    backs_off: bool = False

    def __post_init__(self) -> None:
        self.stop = eos_ids(self.model)
        self.found = [Completion() for _ in self.rows]

    def in_batches(self, static_cache: bool, compile: bool, synced_gpus: bool) -> list[Completion]:
        """Call ``generate`` once for each ``max_rows`` rows."""
        waiting = self._by_length(range(len(self.rows)))
        settings: dict[str, Any] = {"disable_compile": not compile}
        if static_cache:
            settings["cache_implementation"] = "static"
        while waiting:
            part = waiting[: self.max_rows]
            try:
                input_ids, mask, position_ids = pad_left([self.rows[i] for i in part], device_of(self.model))
                self._generate(
                    part,
                    self.sampling.max_new_tokens,
                    settings,
                    input_ids=input_ids,
                    attention_mask=mask,
                    position_ids=position_ids,
                    synced_gpus=synced_gpus,  # finished ranks make empty passes until all ranks have finished
                )
            except torch.OutOfMemoryError as error:
                self._halve(len(part), error)
            else:
                waiting = waiting[len(part) :]
                continue
            self._release()
        return self.found

    def in_segments(self) -> list[Completion]:
        """Call ``generate`` until some rows end, replace them by waiting rows, and repeat.

        When memory runs out, the running rows wait, and fewer of them continue from their last segment's tokens.
        """
        waiting = self._by_length(range(len(self.rows)))
        batch: Batch | None = None
        while batch is not None or waiting:
            running = [] if batch is None else batch.rows
            taken: list[int] = []
            if batch is None or batch.can_grow():
                taken, waiting = waiting[: self.max_rows - len(running)], waiting[self.max_rows - len(running) :]
            running = [*running, *taken]
            try:
                batch = self._segment(batch, taken)
            except torch.OutOfMemoryError as error:
                self._halve(len(running), error)
            else:
                continue
            batch = None
            self._release()
            waiting = self._by_length([*(row for row in running if not self._has_ended(row)), *waiting])
        return self.found

    def _segment(self, batch: Batch | None, taken: list[int]) -> Batch | None:
        """Add rows to a batch and decode until some rows end. Return the batch of the unfinished rows, or None."""
        if taken:
            new = Batch.start(self.model, {i: [*self.rows[i], *self.found[i].tokens] for i in taken})
            batch = new if batch is None else batch.joined(new)
        assert batch is not None
        output = self._generate(
            batch.rows,
            self.sampling.max_new_tokens - max(len(self.found[i].tokens) for i in batch.rows),
            {},
            input_ids=batch.input_ids,
            attention_mask=batch.mask,
            past_key_values=batch.cache,
            synced_gpus=False,
            stopping_criteria=[_SomeEnded(self.stop, max(len(batch.rows) // 8, 1))],
        )
        unfinished = [place for place, row in enumerate(batch.rows) if not self._has_ended(row)]
        return batch.selected(output, unfinished) if unfinished else None

    def _generate(
        self,
        rows: Sequence[int],
        count: int,
        settings: Mapping[str, Any],
        stopping_criteria: Sequence[StoppingCriteria] = (),
        **inputs: Any,
    ) -> Tensor:
        """Call ``generate`` for at most ``count`` tokens, add the new tokens to the rows, and return its output."""
        processors, criteria = LogitsProcessorList(), StoppingCriteriaList(stopping_criteria)
        recorder = TokenLogprobs() if self.with_logprobs else None
        if recorder is not None:
            processors.append(recorder)
            criteria.append(recorder)
        config = generation_config_for(self.sampling, self.model, count, draws=self.draws is None)
        for name, value in settings.items():
            setattr(config, name, value)
        if self.draws is not None and self.sampling.temperature > 0:
            starts = [len(self.found[row].tokens) for row in rows]
            processors.append(RowSampler(self.sampling, self.draws.of(rows, starts, count)))
        output: Tensor = self.model.generate(
            generation_config=config, logits_processor=processors, stopping_criteria=criteria, **inputs
        )
        logprobs = recorder.rows() if recorder is not None else [[] for _ in rows]
        new = output[:, inputs["input_ids"].shape[1] :].tolist()
        for row, tokens, values in zip(rows, new, logprobs, strict=True):
            kept, ended = cut_at_eos(tokens, self.stop)
            found = self.found[row]
            found.tokens, found.logprobs = found.tokens + kept, found.logprobs + values[: len(kept)]
            found.terminated = ended
        return output

    def _halve(self, rows: int, error: torch.OutOfMemoryError) -> None:
        """Lower ``max_rows`` after an error with this many rows.

        Raises:
            ConfigError: A single row does not fit.
            OutOfMemoryError: Rows are not divided here.
        """
        if not self.backs_off:
            raise error
        if rows == 1:
            reason = (str(error).strip() or "out of memory").splitlines()[0]
            raise ConfigError(
                f"a single completion of up to {self.sampling.max_new_tokens} tokens does not fit into the memory of "
                f"{device_of(self.model)} ({reason})",
                "model.sampling.max_new_tokens",
                "Lower it (in an evaluation: model.eval_sampling.max_new_tokens), quantize the base weights to 4 bits, or "
                "free memory of the device (opsd doctor shows what needs it)",
            ) from error
        self.max_rows = rows // 2

    def _release(self) -> None:
        """Free the memory of a failed batch. Call it after the exception, whose traceback holds the batch."""
        if device_of(self.model).type == "cuda":
            torch.cuda.empty_cache()

    def _has_ended(self, row: int) -> bool:
        return self.found[row].terminated or len(self.found[row].tokens) >= self.sampling.max_new_tokens

    def _by_length(self, rows: Sequence[int]) -> list[int]:
        """Return row indices in order of length, so that batches need little padding."""
        return sorted(rows, key=lambda i: (len(self.rows[i]) + len(self.found[i].tokens), i))


@dataclass
class Batch:
    """Batch of unfinished rows. The cache holds all columns except the last, with which ``generate`` continues."""

    rows: list[int]
    input_ids: Tensor  # [B, P + C], padded on the left
    mask: Tensor
    cache: DynamicCache

    @classmethod
    def start(cls, model: PeftModel, prompts: Mapping[int, Sequence[int]]) -> Batch:
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

    def joined(self, other: Batch) -> Batch:
        """Concatenate two batches, with the shorter one padded on the left."""
        width = max(self.input_ids.shape[1], other.input_ids.shape[1])
        for batch in (self, other):
            batch._shift(width - batch.input_ids.shape[1])
        layers: Any = zip(self.cache.layers, other.cache.layers, strict=True)
        for ours, theirs in layers:
            ours.keys, ours.values = torch.cat([ours.keys, theirs.keys]), torch.cat([ours.values, theirs.values])
        return Batch(
            self.rows + other.rows,
            torch.cat([self.input_ids, other.input_ids]),
            torch.cat([self.mask, other.mask]),
            self.cache,
        )

    def selected(self, output: Tensor, places: list[int]) -> Batch:
        """Return the batch of the rows that continue after a segment.

        Args:
            output: Token ids after the segment. Shape [B, P + C].
            places: Indices of the rows that continue.
        """
        grown = output.shape[1] - self.input_ids.shape[1]
        mask = torch.cat([self.mask, self.mask.new_ones(len(self.rows), grown)], dim=1)
        batch = Batch(self.rows, output, mask, self.cache)
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
        self.eos_ids = self.eos_ids.to(input_ids.device, non_blocking=True)
        ended = torch.isin(input_ids[:, -1], self.eos_ids)
        self.ended = ended if self.ended is None else self.ended | ended
        return (self.ended.sum() >= self.enough).expand(len(input_ids))


def generation_config_for(sampling: Sampling, model: PeftModel, max_new_tokens: int, draws: bool = True) -> GenerationConfig:
    """Return transformers' generation settings for some sampling settings and the model's EOS and padding tokens.

    Args:
        sampling: Sampling settings.
        model: The policy.
        max_new_tokens: Maximum number of tokens.
        draws: If True, ``generate`` draws the tokens. If False, it takes the largest score.
    """
    own = base_of(model).generation_config
    common = {
        "max_new_tokens": max_new_tokens,
        "use_cache": True,
        "eos_token_id": own.eos_token_id,
        "pad_token_id": own.pad_token_id,
    }
    if sampling.temperature == 0 or not draws:
        return GenerationConfig(do_sample=False, **common)
    return GenerationConfig(
        do_sample=True,
        temperature=float(sampling.temperature),
        top_p=float(sampling.top_p),
        top_k=int(sampling.top_k),
        min_p=float(sampling.min_p) or None,
        **common,
    )
