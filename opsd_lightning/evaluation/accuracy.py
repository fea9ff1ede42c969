"""Accuracy of several completions per question, with standard errors.

The standard error over questions estimates the change of a value with another set of similar questions. It includes the
variance of questions and of samples. The standard error over samples estimates the change with other samples for the same
questions. Use the latter to compare two runs on the same questions.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor
from torchmetrics import Metric

from opsd_lightning.types import PositiveInt, checked
from opsd_lightning.utils.statistics import wilson_interval

_RESAMPLES = 1000


@checked
class AccuracyAtK(Metric):
    """avg@k, pass@j and maj@k over Q questions with k graded completions each, c of them correct.

    - ``avg@k``: the mean over questions of the mean score s. Without partial scores, it is c / k.
    - ``pass@j``, for j = 1, 2, 4, 8 below k and for k: the probability that one of j completions is correct. The unbiased
      estimate for a question is 1 - C(k - c, j) / C(k, j) (arXiv 2107.03374). ``pass@k`` is the share of questions with at
      least one correct completion; ``pass@1`` is ``avg@k``
      without partial scores.
    - ``maj@k``: the share of questions with a correct most frequent vote. If several votes are the most frequent, the
      question scores the share of correct ones among them. Completions without an answer do not vote.

    Each value has two standard errors:

    - over questions (``..._se``): the sample standard deviation of the questions' scores / sqrt(Q); 0 for one question.
    - over samples (``..._se_samples``, k > 1): sqrt(sum of V over questions) / Q, with fixed questions. V is the variance
      of a question's score when k completions are drawn from its k with replacement (bootstrap), times k / (k - 1).
      For avg that is the unbiased variance of the k scores / k. V is exact for avg and pass@j, for the latter from
      c* ~ Binomial(k, c / k). For maj it is estimated from 1000 resamples with a fixed seed. A question with equal
      completions has V = 0. So the error is too small for small k, and for pass@k, which depends on questions with few
      correct completions.

    Args:
        k: Completions of each question, at least 1.

    Attributes:
        intervals: Wilson's 95 % intervals of the values that `compute` returned last, by name: those of single right or
            wrong outcomes (k = 1), for which the standard error over questions is too small near 0 and 1.

    Example::

        >>> from opsd_lightning import AccuracyAtK
        >>> metric = AccuracyAtK(k=2)
        >>> metric.update(votes=[0, 1], correct=[True, False])
        >>> metric.update(votes=[0, 0], correct=[True, True])
        >>> values = metric.compute()
        >>> values["avg@2"].item(), values["pass@2"].item()
        (0.75, 1.0)
    """

    full_state_update = False
    votes: list[Tensor]

    def __init__(self, k: PositiveInt = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = k
        self.intervals: dict[str, tuple[float, float]] = {}
        self.add_state("votes", default=[], dist_reduce_fx="cat")

    def update(self, votes: Sequence[int | None], correct: Sequence[bool], scores: Sequence[float] | None = None) -> None:
        """Add one question. Without completions nothing is added, for ranks without a question.

        Args:
            votes: The vote of each of its k completions (`Grader.votes`). None for a completion without an answer.
            correct: True for each correct completion. A vote is never shared by correct and wrong completions.
            scores: Score of each completion from 0 to 1. Defaults to 1 for correct completions and 0 for others.

        Raises:
            ValueError: The number of completions is neither k nor 0.
        """
        if len(correct) not in (0, self.k):
            raise ValueError(f"AccuracyAtK(k={self.k}) got {len(correct)} completions of a question")
        scores = [float(c) for c in correct] if scores is None else scores
        rows = [[-1 if v is None else v, int(c), s] for v, c, s in zip(votes, correct, scores, strict=True)]
        shape = (1 if rows else 0, self.k, 3)
        self.votes.append(torch.tensor(rows, dtype=torch.float32, device=self.device).reshape(shape))

    def compute(self) -> dict[str, Tensor]:
        """Return all values by name, such as ``avg@12``, ``pass@4_se`` or ``maj@12_se_samples``."""
        state = (self.votes if isinstance(self.votes, Tensor) else torch.cat(self.votes)).cpu()  # [Q, k, 3]
        data, graded = state[..., :2].long(), state[..., 2].double()
        k, right = self.k, data[..., 1].sum(1)  # [Q]
        c = torch.arange(k + 1, dtype=torch.float64)
        ways = torch.tensor([math.comb(k, n) for n in range(k + 1)], dtype=torch.float64)
        chances = ways * (c[:, None] / k) ** c * (1 - c[:, None] / k) ** (k - c)  # [c, c*], of Binomial(k, c / k)
        scores, variances = {f"avg@{k}": graded.mean(1)}, dict[str, Tensor]()
        for j in pass_sizes(k):
            passed = torch.tensor([_pass_at(j, k, n) for n in range(k + 1)], dtype=torch.float64)
            scores[f"pass@{j}"] = passed[right]
            variances[f"pass@{j}"] = (chances @ passed**2 - (chances @ passed) ** 2) * k / max(k - 1, 1)
        spread = {name: table[right] for name, table in variances.items()}
        spread[f"avg@{k}"] = graded.var(1, correction=0) / max(k - 1, 1)
        scores[f"maj@{k}"], spread[f"maj@{k}"] = _majority(data)
        found: dict[str, Tensor] = {}
        self.intervals = {}
        for name, score in scores.items():
            score = score.double()
            found[name] = score.mean()
            found[f"{name}_se"] = score.std() / len(score) ** 0.5 if len(score) > 1 else torch.zeros((), dtype=torch.float32)
            if k == 1 and len(score) and bool(((score == 0) | (score == 1)).all()):
                self.intervals[name] = wilson_interval(float(score.mean()), len(score))
            if k > 1:
                found[f"{name}_se_samples"] = spread[name].clamp(min=0).sum().sqrt() / len(score)
        return {name: value.float().to(self.device) for name, value in found.items()}


def pass_sizes(k: int) -> list[int]:
    """Return the j of every pass@j for k completions."""
    return sorted({j for j in (1, 2, 4, 8) if j < k} | {k})


def _pass_at(j: int, k: int, correct: int) -> float:
    """Return the share of the j-subsets of k completions that contain a correct one."""
    return 1 - math.comb(k - correct, j) / math.comb(k, j)


def _majority(data: Tensor) -> tuple[Tensor, Tensor]:
    """Return each question's majority score and its bootstrap variance times k / (k - 1). [Q, k, 2] -> [Q], [Q]."""
    count, k = data.shape[:2]
    draws = torch.randint(k, (_RESAMPLES, k), generator=torch.Generator().manual_seed(0))  # the same for every question
    scores, variances = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for index, (votes, correct) in enumerate(zip(data[..., 0], data[..., 1], strict=True)):
        chosen = torch.nn.functional.one_hot(votes + 1)[:, 1:]  # [k, votes]; zeros for a completion without a vote
        right = torch.zeros(chosen.shape[1], dtype=torch.float64)
        right[votes[correct.bool() & (votes >= 0)]] = 1
        scores[index] = _winners(chosen.sum(0, keepdim=True), right)[0]
        variances[index] = _winners(chosen[draws].sum(1), right).var(correction=0) * k / max(k - 1, 1)
    return scores, variances


def _winners(counts: Tensor, right: Tensor) -> Tensor:
    """Return the share of correct votes among the most frequent ones; 0 without votes. [R, votes], [votes] -> [R]."""
    if not counts.shape[1]:
        return torch.zeros(len(counts), dtype=torch.float64)
    winners = (counts == counts.amax(1, keepdim=True)) & (counts > 0)
    return (winners * right).sum(1) / winners.sum(1).clamp(min=1)
