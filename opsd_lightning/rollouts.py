"""Sampling completions from the policy: token ids in, token ids out, never text in between.

`Sampling` says what to sample, a `RolloutEngine` how. An engine takes the weights as they are when it is called, so the
same one serves the student, the privileged teacher (inside ``teacher.weights``) and validation.
"""

from __future__ import annotations

import hashlib
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt
from peft import PeftModel
from transformers import GenerationConfig

from opsd_lightning.policy import base_of, eos_ids, evaluating
from opsd_lightning.tokens import cut_at_eos, pad_left
from opsd_lightning.types import Rollouts


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Args:
        max_new_tokens: Length limit of a completion in tokens, its EOS included, at least 1.
        temperature: Divides the logits before sampling, 0 or more. 0 is greedy decoding.
        top_p: Keep the most probable tokens that together reach this probability, from 0 to 1. 1 keeps all.
        top_k: Keep this many most probable tokens. 0 keeps all.
        min_p: Drop tokens below this fraction of the most probable token's probability, from 0 to 1. 0 keeps all.
        n: Completions for each question, at least 1.
    """

    max_new_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 1.0
    top_p: ClosedUnitInterval = 1.0
    top_k: NonNegativeInt = 0
    min_p: ClosedUnitInterval = 0.0
    n: PositiveInt = 1


class RolloutEngine(ABC):
    """Samples completions from the policy's active weights."""

    @abstractmethod
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        """Sample ``sampling.n`` completions of every prompt.

        Args:
            model: The policy. Its mode, weights and settings are the same after as before.
            prompts: Token ids of at least one prompt.
            sampling: What to sample.
            seed: Of the random numbers. Same seed, prompts and weights: same completions.

        Returns:
            ``len(prompts) * n`` completions, those of one prompt next to each other.
        """


class TransformersEngine(RolloutEngine):
    """transformers' ``generate`` on prompts padded on the left, with explicit positions.

    Args:
        max_rows: The most completions that one call of ``generate`` works on, at least 1; more go in several calls. All
            at once unless given. Decoding is bound by memory bandwidth, so the more fit, the better.
    """

    def __init__(self, max_rows: PositiveInt | None = None) -> None:
        self.max_rows = max_rows

    @torch.no_grad()
    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        stop = eos_ids(model)
        rows = [prompt for prompt in prompts for _ in range(sampling.n)]
        # Prompts of like length share a call: less padding.
        order = sorted(range(len(rows)), key=lambda i: (len(rows[i]), i))
        size = self.max_rows or len(rows)
        config = _generation_config(sampling, model)
        device = next(model.parameters()).device
        found: list[tuple[list[int], bool]] = [([], False)] * len(rows)
        devices = [device] if device.type == "cuda" else []
        with evaluating(model), torch.random.fork_rng(devices=devices):
            torch.manual_seed(seed)
            for start in range(0, len(order), size):
                part = order[start : start + size]
                input_ids, attention_mask, position_ids = pad_left([rows[i] for i in part], device)
                output = model.generate(
                    input_ids=input_ids,
                    attention_mask=attention_mask,
                    position_ids=position_ids,
                    generation_config=config,
                )
                for index, row in zip(part, output[:, input_ids.shape[1] :].tolist(), strict=True):
                    found[index] = cut_at_eos(row, stop)
        return Rollouts([row for row, _ in found], [ended for _, ended in found], sampling.n)


def _generation_config(sampling: Sampling, model: PeftModel) -> GenerationConfig:
    own = base_of(model).generation_config
    common = {
        "max_new_tokens": sampling.max_new_tokens,
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


def seed_for(*parts: int | str) -> int:
    """A seed that depends on all its parts, such as (seed, step, rank), and on nothing else."""
    digest = hashlib.sha256(repr(parts).encode()).digest()
    return int.from_bytes(digest[:7], "little")
