"""Data of the token page: the numbers of a completion, and the texts of its tokens, as JSON values."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch

from opsd_lightning.reports.token_scores import Predictions, TokenScores
from opsd_lightning.types import Example
from opsd_lightning.utils.token_text import Pieces

TOP = 5  # most probable tokens of each role to keep
#: Measurements of the objective that the page shows.
MEASURED = ("loss", "forward_kl", "reverse_kl", "student_entropy", "teacher_entropy", "clipped", "clipped_mass")


class MeasuredCompletion(NamedTuple):
    """A completion of C tokens with the measurements that the page shows.

    Args:
        row: Index of the completion in its step, or of the repeated question.
        example: Its question.
        completion: Its token ids.
        terminated: True if it ends with an EOS token.
        student_prompt: Token ids that the student reads.
        teacher_prompt: Token ids that the teacher reads. None for a method without a teacher.
        weights: Weight of each token in the loss. Shape [C].
        measured: Measurements of the objective by name, each of shape [C] on the CPU.
        scores: Predictions of both roles, at the tokens to show or at all.
        sampled: False for a trace of the data.
        repeated: True for a question that is sampled at each shown step.
    """

    row: int
    example: Example
    completion: list[int]
    terminated: bool
    student_prompt: list[int]
    teacher_prompt: list[int] | None
    weights: torch.Tensor
    measured: Mapping[str, torch.Tensor]
    scores: TokenScores
    sampled: bool = True
    repeated: bool = False


def completion_data(
    pieces: Pieces,
    completion: Sequence[int],
    max_tokens: int,
    weights: torch.Tensor,
    measured: Mapping[str, torch.Tensor],
    scores: TokenScores,
) -> dict[str, Any]:
    """Return the tokens of a completion and their numbers.

    Args:
        pieces: Texts of the tokens.
        completion: The completion. C tokens.
        max_tokens: Number of first tokens to show.
        weights: Weight of each token in the loss. Shape [C].
        measured: Measurements of the objective by name, each of shape [C].
        scores: Predictions of both roles at the tokens to show, or at all tokens.
    """
    shown = completion[:max_tokens]
    return {
        "length": len(completion),
        "tokens": list(shown),
        "joined": pieces.joined(shown),
        "unweighted": (weights[: len(shown)] == 0).nonzero()[:, 0].tolist(),
        **{name: _numbers(measured[name][: len(shown)]) for name in MEASURED if name in measured},
        "student": _predictions(scores.student, len(shown)),
        "teacher": None if scores.teacher is None else _predictions(scores.teacher, len(shown)),
    }


def pieces_of(pieces: Pieces, rollouts: Sequence[Mapping[str, Any]]) -> dict[int, Any]:
    """Return the text of each token that occurs, or text and kind for tokens of other kinds than text."""
    seen = {token for rollout in rollouts for token in rollout["tokens"]}
    for rollout in rollouts:
        for role in (rollout["student"], rollout["teacher"]):
            seen |= {token for top in (role["top"] if role else ()) for token in top}
    found = {token: pieces[token] for token in sorted(seen)}
    return {token: p.text if p.kind == "text" else [p.text, p.kind] for token, p in found.items()}


def _predictions(found: Predictions, count: int) -> dict[str, Any]:
    found = Predictions(*(column[:count] for column in found))
    return {
        "logprob": _numbers(found.logprob),
        "rank": found.rank.tolist(),
        "top": found.top.tolist(),
        "top_millinats": (found.top_logprobs * 1000).nan_to_num(0, 0, -999999).round().long().tolist(),
    }


def _numbers(values: torch.Tensor) -> list[float | None]:
    """Round values to four significant digits. Values that are not finite become None."""
    return [float(f"{value:.4g}") if math.isfinite(value) else None for value in values.tolist()]
