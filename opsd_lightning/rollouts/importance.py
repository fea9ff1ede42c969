"""Importance ratios between the student and the sampler of its rollouts.

    ratio_n = p_student(y_n) / p_sampler(y_n)

Both probabilities are at temperature 1. Between several updates on one batch they are at the temperature of the loss. If a
ratio differs from 1, the sampler has other weights: another model, a stale adapter, another precision, or rollouts sampled
one step ahead. Truncated importance sampling weights the loss of each token by its ratio, up to a limit that bounds the
variance. The ratio corrects for the choice of the token, but not for the choice of the tokens before it. It ignores top-k,
top-p, min-p and any other temperature of the sampler.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from opsd_lightning.losses.objectives import Objective, token_logprobs
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.types import ConfigError, Rollouts


def log_ratios(
    scorer: Scorer,
    prompts: Sequence[Sequence[int]],
    rollouts: Rollouts,
    objective: Objective,
    temperature: float = 1.0,
) -> list[Tensor]:
    """Return log p_student - log p_sampler of every completion token, in nats.

    Every rank must call.

    Args:
        scorer: Scores with the student's adapter.
        prompts: The prompt of each row.
        rollouts: Completions with the sampler's log-probabilities.
        objective: The objective. Its ``logits_memory_mib`` limits the memory for logits.
        temperature: Temperature of the rollouts' log-probabilities.

    Returns:
        For each row a tensor of shape [C] on the CPU.
    """
    assert rollouts.logprobs is not None
    ours = _logprobs(scorer, prompts, rollouts, objective, temperature)
    theirs = torch.tensor([value for row in rollouts.logprobs for value in row], dtype=torch.float64)
    return list((ours - theirs).float().split([len(completion) for completion in rollouts.completions]))


def with_logprobs(scorer: Scorer, prompts: Sequence[Sequence[int]], rollouts: Rollouts, objective: Objective) -> Rollouts:
    """Return the rollouts with the student's log-probabilities at the objective's temperature.

    Takes the arguments of `log_ratios`. Every rank must call.
    """
    flat = _logprobs(scorer, prompts, rollouts, objective, objective.temperature)
    rows = flat.split([len(completion) for completion in rollouts.completions])
    return rollouts._replace(logprobs=[row.tolist() for row in rows])


@torch.no_grad()
def _logprobs(
    scorer: Scorer, prompts: Sequence[Sequence[int]], rollouts: Rollouts, objective: Objective, temperature: float
) -> Tensor:
    """Return the log-probability of every completion token, float64 on the CPU. Shape [T]."""
    states = scorer.score(prompts, rollouts.completions)
    flat = [token for completion in rollouts.completions for token in completion]
    targets = torch.tensor(flat, dtype=torch.long, device=states.hidden.device)
    return token_logprobs(states, targets, objective.logits_memory_mib, temperature).double().cpu()


def check_difference(mean: float, tolerance: float | None) -> None:
    """Refuse rollouts whose sampler does not have the student's weights.

    Args:
        mean: Mean absolute difference of log-probabilities, in nats.
        tolerance: The engine's ``logprob_tolerance``. None allows any difference.

    Raises:
        ConfigError: The mean is above the tolerance.
    """
    if tolerance is not None and not mean <= tolerance:
        raise ConfigError(
            f"the sampler's log-probabilities differ from the trainer's by {mean:.3g} nats a token on average, more than "
            f"{tolerance:g}: the sampler has other weights. Likely causes are another base model than model.policy.model, "
            "an adapter of an earlier step, or another precision (model.policy.dtype or quantization against the server's "
            "--dtype or --quantization)",
            "model.rollouts.init_args.logprob_tolerance",
            "Make the sampler's weights those of the policy, or raise the tolerance if the difference is intended",
        )
