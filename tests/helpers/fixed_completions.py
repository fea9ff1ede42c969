"""Optimizer steps on fixed completions, and the same quantities computed row by row."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from helpers.models import COMPLETIONS as RAGGED, PROMPTS, TEACHER_PROMPTS
from helpers.steps import adapter, fit
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.grpo import Reward
from opsd_lightning.models.policy import base_of
from opsd_lightning.prompts.online_contexts import Attempts
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.types import Example, PromptBatch, Rollouts, Sampling

# An empty completion has no mean of its own in the flat formulas.
COMPLETIONS = [row or [7, 8, 9] for row in RAGGED]
EXAMPLES = [Example("q", "t", "1")] * len(PROMPTS)
BATCH = PromptBatch(PROMPTS, TEACHER_PROMPTS, EXAMPLES, [True] * len(PROMPTS), traces=COMPLETIONS)
REWARDS = [1.0, 0.0, 0.5, 0.0, 0.0, 0.25]


class Fixed(RolloutEngine):
    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = [COMPLETIONS[(i + copy) % len(COMPLETIONS)] for i in range(len(prompts)) for copy in range(sampling.n)]
        return Rollouts([list(row) for row in rows], [True] * len(rows), sampling.n)


class Fixing(Reward):
    def __call__(self, attempts: Attempts) -> Sequence[float]:
        return REWARDS


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.2)


def logprobs(
    model: Any, rows: Sequence[tuple[Sequence[int], Sequence[int]]], temperature: float = 1.0
) -> list[torch.Tensor]:
    """Return the log-probabilities of each row, scored alone by the model's own forward."""
    found = []
    for prompt, completion in rows:
        logits = base_of(model)(input_ids=torch.tensor([[*prompt, *completion]])).logits[0, len(prompt) - 1 : -1]
        found.append((logits / temperature).log_softmax(-1).gather(-1, torch.tensor(completion)[:, None])[:, 0])
    return found


def losses(module: PolicyModule, steps: int, folder: Path) -> list[float]:
    seen: list[float] = []
    original = module.training_step

    def recorded(*arguments: Any) -> Any:
        out: Any = original(*arguments)
        seen.append(float(out["loss"]))
        return out

    module.training_step = recorded  # type: ignore[method-assign]
    fit(module, steps, folder, BATCH)  # type: ignore[arg-type]
    return seen


def same_weights(module: PolicyModule, flat: Any) -> None:
    theirs = dict(flat.named_parameters())
    for name, value in adapter(module).items():  # type: ignore[arg-type]
        if ".teacher." not in name:  # a copy that a teacher keeps
            torch.testing.assert_close(value, theirs[name], atol=1e-5, rtol=1e-4)
