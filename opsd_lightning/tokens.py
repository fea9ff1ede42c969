"""Pure index work: ragged token ids to padded tensors, and rows to micro-batches. No model, no tokenizer.

Scoring rows are padded on the right and need no attention mask: in a causal model nothing that follows a token can
reach it, so pads after the last completion token change nothing. Prompt and completion are contiguous and positions
count from 0, which is why a row's score does not depend on its neighbours, for rotary and for learned positions alike.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor


class PaddedRows(NamedTuple):
    """Rows of prompt and completion, ready to be scored.

    Args:
        input_ids: Prompt, completion and right padding. Shape [B, L].
        position_ids: 0, 1, 2, ... in every row. Shape [B, L].
        predictors: Indices into the flattened [B * L] positions whose hidden state predicts a completion token: the
            token before it. Row by row, T in all.
        targets: The completion tokens that they predict. Shape [T].
    """

    input_ids: Tensor
    position_ids: Tensor
    predictors: Tensor
    targets: Tensor


def join(prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], device: torch.device) -> PaddedRows:
    """Append each completion to its prompt and pad on the right.

    Args:
        prompts: B prompts of at least one token each.
        completions: B completions, possibly empty.
        device: Where the tensors go.
    """
    rows = [[*prompt, *completion] for prompt, completion in zip(prompts, completions, strict=True)]
    width = max(map(len, rows), default=0)
    # The value of a pad is never read: any id of the vocabulary will do.
    input_ids = torch.tensor([row + [0] * (width - len(row)) for row in rows], dtype=torch.long)
    predictors = [
        index * width + len(prompt) - 1 + n
        for index, (prompt, completion) in enumerate(zip(prompts, completions, strict=True))
        for n in range(len(completion))
    ]
    targets = [token for completion in completions for token in completion]
    return PaddedRows(
        input_ids.reshape(len(rows), width).to(device),
        torch.arange(width, device=device).expand(len(rows), width),
        torch.tensor(predictors, dtype=torch.long, device=device),
        torch.tensor(targets, dtype=torch.long, device=device),
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


def micro_batches(lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split rows into micro-batches whose padded size stays within a budget.

    Rows of like length go together, so that little is spent on padding. A single row over the budget still makes a
    micro-batch of its own.

    Args:
        lengths: Tokens of each row (prompt and completion; the longer role where two share the split).
        token_budget: The most tokens, padding included, that one micro-batch may hold.

    Returns:
        Lists of row indices that together hold every row once, the longest rows first.
    """
    batches: list[list[int]] = []
    longest = 0
    for index in sorted(range(len(lengths)), key=lambda i: (-lengths[i], i)):
        if batches and (len(batches[-1]) + 1) * longest <= token_budget:
            batches[-1].append(index)
        else:
            batches.append([index])
            longest = lengths[index]
    return batches
