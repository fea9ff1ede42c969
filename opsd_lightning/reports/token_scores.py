"""Most probable tokens of student and teacher at each token of some completions, and the objective's measurements.

    log p(v | n) = log_softmax(z_n / T)_v        T: the objective's temperature, as in the loss

For completions of a step (`score_tokens`), the student is scored once more, without dropout and before the step's update,
and the teacher's states are those of the step. `measure_completions` is for completions outside of a step.
Logits are computed in chunks of tokens, so that no tensor of shape [all tokens, vocabulary] exists.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from opsd_lightning.losses.objectives import Term, logit_chunks
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.step import StepRecord
from opsd_lightning.models.policy import evaluating
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.models.sharding import reshard_on_exit
from opsd_lightning.types import TokenStates


class Predictions(NamedTuple):
    """Predictions of one role at C completion tokens, on the CPU.

    Args:
        logprob: Log-probability of the completion token, in nats. Shape [C].
        rank: Rank of the completion token by probability, 1 for the most probable token. Shape [C].
        top: Ids of the k most probable tokens in descending order. Shape [C, k].
        top_logprobs: Log-probabilities of the tokens ``top``, in nats. Shape [C, k].
    """

    logprob: Tensor
    rank: Tensor
    top: Tensor
    top_logprobs: Tensor

    def split(self, sizes: Sequence[int]) -> list[Predictions]:
        """Split the predictions by completion, given the lengths of the completions."""
        return [Predictions(*parts) for parts in zip(*(column.split(list(sizes)) for column in self), strict=True)]


class TokenScores(NamedTuple):
    """Predictions of both roles for one completion.

    Args:
        student: Predictions of the student.
        teacher: Predictions of the teacher. None for a method without a teacher.
    """

    student: Predictions
    teacher: Predictions | None


@torch.no_grad()
def predictions(states: TokenStates, targets: Tensor, temperature: float, top: int, logits_memory_mib: int) -> Predictions:
    """Compute the predictions of one role at T tokens.

    Args:
        states: States of the T tokens.
        targets: Completion tokens. Shape [T].
        temperature: Temperature that divides the logits.
        top: Number of most probable tokens to return, at least 1.
        logits_memory_mib: Approximate memory for logits, in MiB.
    """
    parts: list[Predictions] = []
    for rows, logits in logit_chunks(states, logits_memory_mib, temperature):
        logprobs = torch.log_softmax(logits, dim=-1)
        own = logprobs.gather(-1, targets[rows, None])
        best = logprobs.topk(min(top, logprobs.shape[-1]), dim=-1)
        rank = (logprobs > own).sum(-1) + 1
        parts.append(Predictions(own[:, 0].cpu(), rank.cpu(), best.indices.cpu(), best.values.cpu()))
    if not parts:
        empty = torch.zeros(0, top, dtype=torch.float32)
        return Predictions(empty[:, 0], empty[:, 0].long(), empty.long(), empty)
    return Predictions(*(torch.cat(column) for column in zip(*parts, strict=True)))


def score_tokens(
    module: PolicyModule, record: StepRecord, rows: Sequence[int], max_tokens: int, top: int = 5
) -> list[TokenScores]:
    """Compute the predictions of both roles for some completions of the current step. Call it on every rank.

    Args:
        module: Module of the run, before the step's update.
        record: Contents of the step.
        rows: Indices of the completions, at least one.
        max_tokens: Number of first tokens of each completion, at least 1.
        top: Number of most probable tokens to return, at least 1.
    """
    objective, teacher = record.terms[0].objective, record.terms[0].teacher
    completions = [record.rollouts.completions[row][:max_tokens] for row in rows]
    sizes = [len(completion) for completion in completions]
    settings = (objective.temperature, top, objective.logits_memory_mib)
    # With a sharded model, the head stays gathered from the pass to the end of the block, for both roles.
    with torch.no_grad(), evaluating(module.model), reshard_on_exit(module.model):
        prompts = [record.student_prompts[row] for row in rows]
        states = module.scorer.score(prompts, completions)
        flat = [token for completion in completions for token in completion]
        targets = torch.tensor(flat, dtype=torch.long, device=states.hidden.device)
        found = predictions(states, targets, *settings).split(sizes)
        if teacher is None:
            return [TokenScores(student, None) for student in found]
        read = teacher.hidden.split([len(completion) for completion in record.rollouts.completions])
        hidden = torch.cat([read[row][:size] for row, size in zip(rows, sizes, strict=True)])
        theirs = predictions(TokenStates(hidden, teacher.head), targets, *settings).split(sizes)
    return [TokenScores(*both) for both in zip(found, theirs, strict=True)]


@torch.no_grad()
def measure_completions(
    scorer: Scorer, term: Term, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], top: int = 5
) -> tuple[list[dict[str, Tensor]], list[TokenScores]]:
    """Measure completions outside of a training step, without dropout. Call it on every rank.

    Args:
        scorer: Scorer of the student.
        term: The method's term of the loss, with the teacher's states if it has a teacher.
        prompts: The student's prompt of each completion.
        completions: At least one.
        top: Number of most probable tokens to return, at least 1.

    Returns:
        For each completion, the objective's measurements by name, each of shape [C] on the CPU, and the predictions of both
        roles.
    """
    objective, sizes = term.objective, [len(completion) for completion in completions]
    settings = (objective.temperature, top, objective.logits_memory_mib)
    with evaluating(scorer.model), reshard_on_exit(scorer.model):
        states = scorer.score(prompts, completions)
        flat = [token for completion in completions for token in completion]
        targets = torch.tensor(flat, dtype=torch.long, device=states.hidden.device)
        _, measured = term.loss(states, targets, range(len(sizes)), sizes)
        columns = {name: values.float().cpu().split(sizes) for name, values in measured.items()}
        students = predictions(states, targets, *settings).split(sizes)
        teachers: Sequence[Predictions | None] = [None] * len(sizes)
        if term.teacher is not None:
            teachers = predictions(term.teacher, targets, *settings).split(sizes)
    scores = [TokenScores(*both) for both in zip(students, teachers, strict=True)]
    return [{name: values[row] for name, values in columns.items()} for row in range(len(sizes))], scores
