"""Pure index work: ragged token ids to padded tensors, and rows to micro-batches. No model, no tokenizer.

Scoring rows are padded on the right and need no attention mask: in a causal model nothing that follows a token can
reach it, so pads after the last completion token change nothing. Prompt and completion are contiguous and positions
count from 0, which is why a row's score does not depend on its neighbours, for rotary and for learned positions alike.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class Rows(NamedTuple):
    """Rows of prompt and completion, ready to be scored. The last completion token predicts nothing and is left out.

    Args:
        input_ids: Prompt, completion and right padding, shape [B, L]; or all rows one after the other, [1, sum of L].
        position_ids: 0, 1, 2, ... in every row. Same shape.
        predictors: Indices into the flattened positions whose hidden state predicts a completion token: the token
            before it. Row by row, T in all.
        targets: The completion tokens that they predict. Shape [T].
        row_lengths: Tokens of each row where they were packed into one, else None.
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor
    row_lengths: list[int] | None = None


def join(
    prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device, packed: bool = False
) -> Rows:
    """Append each completion to its prompt, and pad on the right or pack.

    Args:
        prompts: B prompts of at least one token each.
        completions: B completions, possibly empty.
        device: Where the tensors go.
        packed: One row after the other instead of padding, for attention that takes the rows' lengths.
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
        input_ids = torch.tensor([[token for row in rows for token in row]], dtype=torch.long, device=device)
        position_ids = torch.cat([torch.arange(length) for length in lengths])[None].to(device)
    else:
        # The value of a pad is never read: any id of the vocabulary will do.
        padded = [row + [0] * (width - len(row)) for row in rows]
        input_ids = torch.tensor(padded, dtype=torch.long, device=device).reshape(len(rows), width)
        position_ids = torch.arange(width, device=device).expand(len(rows), width)
    return Rows(
        input_ids,
        position_ids,
        torch.tensor(predictors, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
        lengths if packed else None,
    )


def pad_left(prompts: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor, Tensor]:
    """Prompts padded on the left for generation: ids, attention mask and explicit positions, each [B, P].

    Pads get position 0; they are masked, and the first real token of every row has position 0 as well.
    """
    width = max(map(len, prompts))
    pads = torch.tensor([width - len(prompt) for prompt in prompts], device=device)
    input_ids = torch.tensor([[0] * (width - len(p)) + list(p) for p in prompts], dtype=torch.long, device=device)
    columns = torch.arange(width, device=device)
    positions = columns - pads[:, None]
    return input_ids, (positions >= 0).long(), positions.clamp(min=0)


def cut_at_eos(row: Sequence[int], eos_ids: frozenset[int]) -> tuple[list[int], bool]:
    """A sampled row up to and with its first EOS, and whether there was one."""
    for n, token in enumerate(row):
        if token in eos_ids:
            return list(row[: n + 1]), True
    return list(row), False


def micro_batches(lengths: Sequence[int], token_budget: int, pass_tokens: int, packed: bool = False) -> list[list[int]]:
    """Split rows into micro-batches within a budget, for the least work on padding and on passes together.

    Rows of like length go together. Where they are split is decided exactly, by dynamic programming over the rows in
    order of length. A single row over the budget still makes a micro-batch of its own.

    Args:
        lengths: Tokens of each row.
        token_budget: The most tokens, padding included, that one micro-batch may hold.
        pass_tokens: What one more pass costs (reading the weights, launching kernels), in tokens.
        packed: Rows are packed, without padding.

    Returns:
        Lists of row indices that together hold every row once, the longest rows first.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    best: list[tuple[float, int]] = [(0, 0)]  # of the first rows: their cost, and where their last micro-batch starts
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
    """The rows of each prompt that occurs more than once, by the order of its first row."""
    rows: dict[tuple[int, ...], list[int]] = {}
    for index, prompt in enumerate(prompts):
        rows.setdefault(tuple(prompt), []).append(index)
    return [group for group in rows.values() if len(group) > 1]
