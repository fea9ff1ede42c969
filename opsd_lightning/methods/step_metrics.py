"""Metrics of a training step: means over the completion tokens of all ranks."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

from opsd_lightning.methods.step import StepRecord
from opsd_lightning.models.scoring import Ranks


class StepMetrics(NamedTuple):
    """Metrics of a step over all ranks.

    Args:
        values: Metrics by name, without the prefix ``train/``.
        tokens: Number of completion tokens.
    """

    values: dict[str, float]
    tokens: float


def step_metrics(record: StepRecord, names: Sequence[str], ranks: Ranks) -> StepMetrics:
    """Compute the metrics of a step. Every rank must call.

    Args:
        record: Contents of the step on this rank.
        names: Measurements to average over tokens.
        ranks: The ranks to sum over.
    """
    rollouts = record.rollouts
    nothing = [torch.zeros(0, dtype=torch.float32)] * len(rollouts.completions)
    columns = [record.measured.get(name, nothing) for name in names]
    first = [row[0] for row in record.measured.get("forward_kl", nothing) if len(row)]
    lengths = [len(completion) for completion in rollouts.completions]
    counts = (rollouts.tokens, sum(first), len(first), len(lengths), rollouts.terminated.count(False))
    sums = [float(torch.cat(column).sum()) for column in columns] + [float(count) for count in counts]
    *token_sums, tokens, first_sum, first_count, rows, truncated = ranks.sum(sums)
    shortest, longest = ranks.max([-min(lengths), max(lengths)])
    means = {name: value / max(tokens, 1) for name, value in zip(names, token_sums, strict=True)}
    if "clipped" in means:
        means["clipped_fraction"] = means.pop("clipped")
    if "forward_kl" in means:
        means["first_token_forward_kl"] = first_sum / max(first_count, 1)
    values = means | {
        "loss": record.loss,
        "completion_tokens": tokens / rows,
        "completion_tokens_min": -shortest,
        "completion_tokens_max": longest,
        "truncated_fraction": truncated / rows,
        "eos_rate": 1 - truncated / rows,
    }
    return StepMetrics(values, tokens)
