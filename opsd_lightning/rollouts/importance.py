"""How far the sampler of some rollouts is from the student that trains on them, by the log-probabilities of both.

    ratio_n = p_student(y_n) / p_sampler(y_n)        both at temperature 1, or, between updates on one batch, the loss's

Away from 1 it tells of a sampler with other weights: another model, a stale adapter, another precision, or, where rollouts
are sampled a step ahead, of that step. There a token's loss is weighted by it, cut off above (truncated importance
sampling), which bounds the variance. It corrects a token given those before it, not how likely those were; and where
rollouts are sampled at another temperature or with top-k, top-p or min-p, it is not the ratio of what was sampled from.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from peft import PeftModel
from torch import Tensor

from opsd_lightning.losses.objectives import Objective, token_logprobs
from opsd_lightning.models.scoring import score_all
from opsd_lightning.types import Rollouts, UserError


def log_ratios(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    token_budget: int,
    objective: Objective,
    agree: Callable[[int], int] = lambda passes: passes,
    temperature: float = 1.0,
) -> list[Tensor]:
    """log p_student - log p_sampler of every completion token, in nats: a tensor of shape [C] on the CPU for each row.

    Args:
        model: The policy, with the student's adapter active; dropout is off for the time.
        prompts: The prompt of each row.
        rollouts: With log-probabilities.
        token_budget, agree: As of `scoring.score_all`.
        objective: For how much memory logits may take at one time.
        temperature: That the rollouts' log-probabilities are at.
    """
    assert rollouts.logprobs is not None
    ours = _logprobs(model, prompts, rollouts, token_budget, objective, agree, temperature)
    theirs = torch.tensor([value for row in rollouts.logprobs for value in row], dtype=torch.float64)
    return list((ours - theirs).float().split([len(completion) for completion in rollouts.completions]))


def with_logprobs(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    token_budget: int,
    objective: Objective,
    agree: Callable[[int], int] = lambda passes: passes,
) -> Rollouts:
    """The same completions with the student's own log-probabilities at the objective's temperature, for the updates that
    follow. Arguments as of `log_ratios`."""
    flat = _logprobs(model, prompts, rollouts, token_budget, objective, agree, objective.temperature)
    rows = flat.split([len(completion) for completion in rollouts.completions])
    return rollouts._replace(logprobs=[row.tolist() for row in rows])


@torch.no_grad()
def _logprobs(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    token_budget: int,
    objective: Objective,
    agree: Callable[[int], int],
    temperature: float,
) -> Tensor:
    """Of all completion tokens, in double precision on the CPU. Shape [T]."""
    states = score_all(model, prompts, rollouts.completions, token_budget, agree)
    flat = [token for completion in rollouts.completions for token in completion]
    targets = torch.tensor(flat, dtype=torch.long, device=states.hidden.device)
    return token_logprobs(states, targets, objective.logits_memory_mib, temperature).double().cpu()


def check_difference(mean: float, tolerance: float | None) -> None:
    """Raise where the sampler is not the student.

    Args:
        mean: Mean absolute difference of log-probabilities, in nats.
        tolerance: The engine's ``logprob_tolerance``.

    Raises:
        UserError: The mean is above it.
    """
    if tolerance is not None and not mean <= tolerance:
        raise UserError(
            f"the rollouts' log-probabilities differ from the trainer's own by {mean:.3g} nats a token on average, more "
            f"than model.rollouts.init_args.logprob_tolerance = {tolerance:g}: the sampler has other weights. "
            "Likely it serves another base model than model.policy.model, an adapter of an earlier step, or computes in "
            "another precision (model.policy.dtype or quantization against the server's --dtype or --quantization). Only if "
            "that is meant, raise the tolerance"
        )
