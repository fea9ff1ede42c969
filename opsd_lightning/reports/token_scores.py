"""Of some of a step's completions, what both roles would have written at every token: the likeliest tokens of each.

    log p(v | n) = log_softmax(z_n / T)_v        T: the objective's temperature, as in the loss

The student's states are scored anew, without dropout and with the weights before the step's update; the teacher's are those
of the step. Logits are made a chunk of tokens at a time, so that no tensor of [all tokens, vocabulary] ever exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_lightning.losses.objectives import Update
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.policy import evaluating
from opsd_lightning.models.scoring import score_all
from opsd_lightning.models.sharding import reshard_on_exit
from opsd_lightning.types import TokenStates


class Predictions(NamedTuple):
    """One role's distribution at C completion tokens, on the CPU.

    Args:
        logprob: Log-probability of the completion's token, in nats. Shape [C].
        rank: Its place among all tokens, 1 for the likeliest. Shape [C].
        top: Ids of the likeliest tokens, the likeliest first. Shape [C, k].
        top_logprobs: Their log-probabilities, in nats. Shape [C, k].
    """

    logprob: Tensor
    rank: Tensor
    top: Tensor
    top_logprobs: Tensor

    def split(self, sizes: Sequence[int]) -> list[Predictions]:
        """Of each completion, given their lengths."""
        return [Predictions(*parts) for parts in zip(*(column.split(list(sizes)) for column in self), strict=True)]


class TokenScores(NamedTuple):
    """Of one completion.

    Args:
        student: The student's predictions.
        teacher: The teacher's; None in a method without one.
    """

    student: Predictions
    teacher: Predictions | None


@torch.no_grad()
def predictions(states: TokenStates, targets: Tensor, temperature: float, top: int, logits_memory_mib: int) -> Predictions:
    """What one role predicts at T tokens.

    Args:
        states: Of the T tokens.
        targets: The completions' tokens. Shape [T].
        temperature: Divides the logits.
        top: How many of the likeliest tokens, at least 1.
        logits_memory_mib: About how much memory, in MiB, logits may take at one time.
    """
    parts: list[Predictions] = []
    start, chunk = 0, 8  # the first, small chunk tells the size of the vocabulary
    while start < targets.numel():
        rows = slice(start, start + chunk)
        logprobs = torch.log_softmax(states.head(states.hidden[rows]).float() / temperature, dim=-1)
        own = logprobs.gather(-1, targets[rows, None])
        best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        rank = (logprobs > own).sum(-1) + 1
        parts.append(Predictions(own[:, 0].cpu(), rank.cpu(), best.indices.cpu(), best.values.cpu()))
        start += chunk
        chunk = max(logits_memory_mib * 2**20 // (3 * 4 * logprobs.shape[-1]), 1)  # as made, in float32, and one more
    if not parts:
        nothing = torch.zeros(0, dtype=torch.long)
        return Predictions(torch.zeros(0), nothing, torch.zeros(0, top, dtype=torch.long), torch.zeros(0, top))
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def score_tokens(
    module: PolicyModule, update: Update, rows: Sequence[int], max_tokens: int, top: int = 5
) -> list[TokenScores]:
    """The predictions of both roles for some completions of the step that runs. Every rank must call.

    Args:
        module: The policy, its weights not updated yet.
        update: What the step is made of (``module.current``).
        rows: Which completions, at least one.
        max_tokens: Only the first so many tokens of each, at least 1.
        top: How many of the likeliest tokens, at least 1.
    """
    objective, teacher = update.terms[0].objective, update.terms[0].teacher
    completions = [update.rollouts.completions[row][:max_tokens] for row in rows]
    sizes = [len(completion) for completion in completions]
    settings = (objective.temperature, top, objective.logits_memory_mib)
    # Under sharding the head is whole from the pass to the end of the block, for both roles.
    with torch.no_grad(), evaluating(module.model), reshard_on_exit(module.model):
        prompts = [update.students[row] for row in rows]
        states = score_all(module.model, prompts, completions, module.token_budget, module.most_over_ranks)
        flat = [token for completion in completions for token in completion]
        targets = torch.tensor(flat, dtype=torch.long, device=states.hidden.device)
        found = predictions(states, targets, *settings).split(sizes)
        if teacher is None:
            return [TokenScores(student, None) for student in found]
        read = teacher.hidden.split([len(completion) for completion in update.rollouts.completions])
        hidden = torch.cat([read[row][:size] for row, size in zip(rows, sizes, strict=True)])
        theirs = predictions(TokenStates(hidden, teacher.head), targets, *settings).split(sizes)
    return [TokenScores(*both) for both in zip(found, theirs, strict=True)]
