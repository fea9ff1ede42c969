"""Padding and packing of token ids, and grouping of rows into micro-batches.

Rows for scoring are padded on the right and need no attention mask: in a causal model a token does not attend to later
tokens, so padding after the last completion token has no effect. Prompt and completion are contiguous and positions start at
0, so the scores of a row do not depend on the other rows of its batch.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of prompt and completion, ready for scoring. The last completion token is omitted: it predicts no other token.

    Args:
        input_ids: Prompt, completion and right padding. Shape [B, L], or [1, sum of row lengths] if packed.
        position_ids: Positions 0, 1, 2, ... in every row. Same shape.
        predictors: Indices, into the flattened positions, of the tokens before each completion token: their hidden states
            predict the completion tokens. Shape [T].
        targets: The completion tokens. Shape [T].
        row_lengths: Tokens of each row if the rows are packed, else None.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    row_lengths: list[int] | None = None


def join(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device, packed: bool = False
) -> Rows:
    """Append each completion to its prompt, and pad the rows on the right or pack them.

    Args:
        prompts: B prompts of at least one token each.
        completions: B completions, possibly empty.
        device: Device of the tensors.
        packed: If True, concatenate the rows without padding, for attention kernels that take the rows' lengths.
    """
    rows = [[*prompt, *completion[:-1]] for prompt, completion in zip(prompts, completions, strict=True)]
    lengths = [len(row) for row in rows]
    width = max(lengths, default=0)
    starts = list(itertools.accumulate(lengths, initial=0)) if packed else [index * width for index in range(len(rows))]
    predictors = [
        starts[index] + len(prompt) - 1 + n
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        for n in range(len(completion))
    ]
    targets = [token for completion in completions for token in completion]
    if packed:
        input_ids = to_device([[token for row in rows for token in row]], device)
        position_ids = to_device([[position for length in lengths for position in range(length)]], device)
    else:
        # No result depends on the padding token: any id of the vocabulary works.
        padded = [row + [0] * (width - len(row)) for row in rows]
        input_ids = to_device(padded, device).reshape(len(rows), width)
        position_ids = torch.arange(width, device=device).expand(len(rows), width)
    return Rows(
        input_ids, position_ids, to_device(predictors, device), to_device(targets, device), lengths if packed else None
    )


def to_device(values: Sequence[Any], device: torch.device) -> Tensor:
    """Return integers as a tensor on a device, without waiting for the work that the device has not finished."""
    return torch.tensor(values, dtype=torch.long).to(device, non_blocking=True)


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Pad prompts on the left for generation.

    Returns:
        Token ids, attention mask and positions, each of shape [B, P]. The padding and the first token of every row have
        position 0.
    """
    width = max(map(len, prompts))
    pads = to_device([width - len(prompt) for prompt in prompts], device)
    input_ids = to_device([[0] * (width - len(p)) + list(p) for p in prompts], device)
    columns = torch.arange(width, device=device)
    positions = columns - pads[:, None]
    return input_ids, (positions >= 0).long(), positions.clamp(min=0)


def cut_at_eos(row: Sequence[int], eos_ids: frozenset[int]) -> tuple[list[int], bool]:
    """Return a sampled row up to and including its first EOS token, and True if it has one."""
    for n, token in enumerate(row):
        if token in eos_ids:
            return list(row[: n + 1]), True
    return list(row), False


def micro_batches(lengths: Sequence[int], token_budget: int, pass_tokens: int, packed: bool = False) -> list[list[int]]:
    """Split rows into micro-batches within a token budget, at the lowest total cost of tokens, padding and passes.

    Rows are sorted by length, and dynamic programming finds the optimal split. A row longer than the budget forms a
    micro-batch by itself.

    Args:
        lengths: Tokens of each row.
        token_budget: Maximum number of tokens of a micro-batch, including padding.
        pass_tokens: Fixed cost of a forward pass (reading the weights, launching kernels), in tokens.
        packed: If True, rows are packed without padding.

    Returns:
        Lists of row indices, the longest rows first. Every row occurs once.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best: list[tuple[float, int]] = [(0, 0)]  # for the first k rows: cost, and start of the last micro-batch
    for end in range(1, len(order) + 1):
        choices, total = [], 0
        for start in range(end - 1, -1, -1):
            total += lengths[order[start]]
            size = total if packed else (end - start) * lengths[order[start]]
            if size > token_budget and start < end - 1:
                break
            choices.append((best[start][0] + size + pass_tokens, start))
        best.append(min(choices))
    batches: list[list[int]] = []
    end = len(order)
    while end:
        start = best[end][1]
        batches.insert(0, order[start:end])
        end = start
    return batches


def repeated(prompts: Sequence[Sequence[int]]) -> list[list[int]]:
    """Return the row indices of each prompt that occurs more than once, in the order of first occurrence."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(index)
    return [group for group in rows.values() if len(group) > 1]
