"""Accuracy of several completions a question, with the standard errors that small test sets need.

Two questions, two errors. What would another set of such questions give? The error over questions answers: it holds the
luck of the questions and of the samples. What would other samples on these very questions give? The error over samples
answers, and is the one that tells two runs on the same questions from sampling noise.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from jsonargparse.typing import PositiveInt
from torch import Tensor
from torchmetrics import Metric

_RESAMPLES = 1000


class AccuracyAtK(Metric):
    """avg@k, pass@j and maj@k over Q questions with k graded completions each, c of them correct.

    - ``avg@k``: the mean over questions of c / k.
    - ``pass@j``, for j = 1, 2, 4, 8 below k and for k: the probability that one of j completions is correct, by the unbiased
      estimate 1 - C(k - c, j) / C(k, j) of each question (arXiv 2107.03374). ``pass@k`` is the share of questions with at
      least one correct completion; ``pass@1`` is ``avg@k``.
    - ``maj@k``: the share of questions whose most frequent vote is correct; where votes tie for the most frequent, the share
      of the tied ones that are correct, which is what a random choice among them would score. Completions without an
      answer do not vote.

    Each comes with two standard errors:

    - over questions (``..._se``): the sample standard deviation of the questions' scores / sqrt(Q); 0 for a single question.
    - over samples (``..._se_samples``, k > 1), the questions held fixed: sqrt(sum of V over questions) / Q. V is the
      variance of a question's score when its k completions are drawn again from these k with replacement (the bootstrap),
      times k / (k - 1): for avg that is s^2 / k with the unbiased s^2 = c (k - c) / (k (k - 1)). For avg and pass@j it is
      computed exactly, from c* ~ Binomial(k, c / k); for maj from 1000 resamples with a fixed seed. A question whose
      completions all agree adds nothing: for pass@k, which hangs on the questions with few correct completions, and for
      small k the error is too small.

    Args:
        k: Completions of each question, at least 1.
    """

    full_state_update = False
    votes: list[Tensor]

    def __init__(self, k: PositiveInt = 1, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.k = PositiveInt(k)
        self.add_state("votes", default=[], dist_reduce_fx="cat")

    def update(self, votes: Sequence[int | None], correct: Sequence[bool]) -> None:
        """Add one question; without any completion nothing, which keeps a rank that has no question in step with others.

        Args:
            votes: The vote of each of its k completions (`MathGrader.votes`), None where there is none.
            correct: Whether each is right. Correct completions share their vote with no wrong one.
        """
        if len(correct) not in (0, self.k):
            raise ValueError(f"AccuracyAtK(k={self.k}) got {len(correct)} completions of a question")
        rows = [[-1 if v is None else v, int(c)] for v, c in zip(votes, correct, strict=True)]
        shape = (1 if rows else 0, self.k, 2)
        self.votes.append(torch.tensor(rows, dtype=torch.int64, device=self.device).reshape(shape))

    def compute(self) -> dict[str, Tensor]:
        """Every value by its name, such as ``avg@12``, ``pass@4_se`` or ``maj@12_se_samples``."""
        data = (self.votes if isinstance(self.votes, Tensor) else torch.cat(self.votes)).cpu()  # [Q, k, 2]
        k, right = self.k, data[..., 1].sum(1)  # [Q]
        c = torch.arange(k + 1, dtype=torch.float64)
        ways = torch.tensor([math.comb(k, n) for n in range(k + 1)], dtype=torch.float64)
        chances = ways * (c[:, None] / k) ** c * (1 - c[:, None] / k) ** (k - c)  # [c, c*], of Binomial(k, c / k)
        scores, variances = {f"avg@{k}": right / k}, {f"avg@{k}": c * (k - c) / k**2 / max(k - 1, 1)}
        for j in pass_sizes(k):
            passed = torch.tensor([_pass_at(j, k, n) for n in range(k + 1)], dtype=torch.float64)
            scores[f"pass@{j}"] = passed[right]
            variances[f"pass@{j}"] = (chances @ passed**2 - (chances @ passed) ** 2) * k / max(k - 1, 1)
        spread = {name: table[right] for name, table in variances.items()}
        scores[f"maj@{k}"], spread[f"maj@{k}"] = _majority(data)
        found: dict[str, Tensor] = {}
        for name, score in scores.items():
            score = score.double()
            found[name] = score.mean()
            found[f"{name}_se"] = score.std() / len(score) ** 0.5 if len(score) > 1 else torch.zeros(())
            if k > 1:
                found[f"{name}_se_samples"] = spread[name].clamp(min=0).sum().sqrt() / len(score)
        return {name: value.float().to(self.device) for name, value in found.items()}


def pass_sizes(k: int) -> list[int]:
    """The j of every pass@j of k completions."""
    return sorted({j for j in (1, 2, 4, 8) if j < k} | {k})


def _pass_at(j: int, k: int, correct: int) -> float:
    """The share of the j-subsets of k completions that hold a correct one."""
    return 1 - math.comb(k - correct, j) / math.comb(k, j)


def _majority(data: Tensor) -> tuple[Tensor, Tensor]:
    """Each question's majority score, and its variance over resamples, corrected for their size. [Q, k, 2] -> [Q], [Q]."""
    count, k = data.shape[:2]
    draws = torch.randint(k, (_RESAMPLES, k), generator=torch.Generator().manual_seed(0))  # the same for every question
    scores, variances = torch.zeros(count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64)
    for index, (votes, correct) in enumerate(zip(data[..., 0], data[..., 1], strict=True)):
        chosen = torch.nn.functional.one_hot(votes + 1)[:, 1:]  # [k, votes]; a row of zeros where there is none
        right = torch.zeros(chosen.shape[1], dtype=torch.float64)
        right[votes[correct.bool() & (votes >= 0)]] = 1
        scores[index] = _winners(chosen.sum(0, keepdim=True), right)[0]
        variances[index] = _winners(chosen[draws].sum(1), right).var(correction=0) * k / max(k - 1, 1)
    return scores, variances


def _winners(counts: Tensor, right: Tensor) -> Tensor:
    """The share of the most frequent votes that are correct; 0 where there is no vote. [R, votes], [votes] -> [R]."""
    if not counts.shape[1]:
        return torch.zeros(len(counts), dtype=torch.float64)
    winners = (counts == counts.amax(1, keepdim=True)) & (counts > 0)
    return (winners * right).sum(1) / winners.sum(1).clamp(min=1)
