"""From the states of both roles to a loss and per-token measurements, a chunk of tokens at a time.

    L = sum_n w_n D(p_T(. | n) || p_S(. | n)) / sum_n w_n        n: completion tokens of the whole optimizer step

Source: arXiv 2601.18734, equation of the training objective. Only the student's hidden states (and its head, where that
trains) get a gradient. It is made in the forward pass, chunk by chunk, and handed over when backward comes: no tensor
of [all tokens, vocabulary] ever exists, and logits are computed once.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, Literal

import torch
from jsonargparse.typing import NonNegativeInt, PositiveFloat, PositiveInt
from torch import Tensor

from opsd_lightning.divergences import Divergence, ForwardKL, FullVocabulary, Support
from opsd_lightning.types import Rollouts, TokenStates


class Clip(ABC):
    """How large contributions to the loss are held back."""

    @abstractmethod
    def apply(self, entries: Tensor) -> Tensor:
        """The loss of each token, [rows], from the contributions of the vocabulary entries, [rows, K]."""


class NoClip(Clip):
    """The divergence as it is (default)."""

    def apply(self, entries: Tensor) -> Tensor:
        return entries.sum(-1)


class _ClipAt(Clip):
    def __init__(self, tau: PositiveFloat) -> None:
        self.tau = PositiveFloat(tau)


class PointwiseClip(_ClipAt):
    """The released recipe's clip: every vocabulary entry's contribution at most tau, before the sum.

    Beware: the loss may go below zero, and where the entry that the teacher most wants raised is clipped, the gradient
    can turn against it. Watch ``clipped_fraction`` and the unclipped ``forward_kl`` and ``reverse_kl``.

    Args:
        tau: Upper bound of one entry's contribution, in nats, above 0. The authors use 0.05 to 0.06.
    """

    def apply(self, entries: Tensor) -> Tensor:
        return entries.clamp(max=self.tau).sum(-1)


class TokenClip(_ClipAt):
    """Every token's divergence at most tau: a token above it has no gradient.

    Args:
        tau: Upper bound of one token's divergence, in nats, above 0.
    """

    def apply(self, entries: Tensor) -> Tensor:
        return entries.sum(-1).clamp(max=self.tau)


class RescaleClip(_ClipAt):
    """A token above tau is scaled down to tau by a detached factor: its gradient keeps its direction.

    Args:
        tau: Upper bound of one token's divergence, in nats, above 0.
    """

    def apply(self, entries: Tensor) -> Tensor:
        value = entries.sum(-1)
        return value * (self.tau / value.detach().clamp(min=self.tau))


class Objective(ABC):
    """What the student is trained to minimise on its own completions.

    Args:
        temperature: Divides the logits of both roles before the softmax, above 0. Independent of the temperature that
            rollouts are sampled at; the authors set both to 1.1. No T^2 factor.
        reduction: ``token_mean``: every completion token of the optimizer step weighs the same. ``sequence_mean``:
            every completion weighs the same.
        skip_first_tokens: Leading tokens of every completion that stay out of the loss, 0 or more. For a student that
            does not think under a teacher that does, whose first token would be ``<think>``.
        include_truncated: Whether completions that ran into the length limit count.
        chunk_tokens: Tokens whose logits exist at one time. The memory in use is about 10 chunk_tokens x vocabulary
            numbers of 4 bytes.
    """

    def __init__(
        self,
        temperature: PositiveFloat = 1.0,
        reduction: Literal["token_mean", "sequence_mean"] = "token_mean",
        skip_first_tokens: NonNegativeInt = 0,
        include_truncated: bool = True,
        chunk_tokens: PositiveInt = 256,
    ) -> None:
        if reduction not in ("token_mean", "sequence_mean"):
            raise ValueError(f"objective.reduction is {reduction!r}: choose token_mean or sequence_mean")
        self.temperature = PositiveFloat(temperature)
        self.reduction = reduction
        self.skip_first_tokens = NonNegativeInt(skip_first_tokens)
        self.include_truncated = include_truncated
        self.chunk_tokens = PositiveInt(chunk_tokens)

    def check(self, vocabulary: int) -> None:
        """Raise ``ValueError`` where the settings cannot work for a vocabulary of that size."""

    @abstractmethod
    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token and whether clipping changed it, both [rows].

        Args:
            student_logprobs: With gradient, at the loss temperature. Shape [rows, V].
            teacher_logprobs: Without. Shape [rows, V].
            targets: The sampled tokens. Shape [rows].
        """

    def token_weights(self, rollouts: Rollouts) -> list[Tensor]:
        """Weight of every completion token, one tensor of shape [C] a row, before the division by their sum.

        That sum runs over the whole optimizer step and all ranks, which makes both reductions exact for any split.
        """
        weights = []
        for completion, terminated in zip(rollouts.completions, rollouts.terminated, strict=True):
            weight = torch.zeros(len(completion))
            if terminated or self.include_truncated:
                weight[self.skip_first_tokens :] = 1.0
                if self.reduction == "sequence_mean":
                    weight /= weight.sum().clamp(min=1.0)
            weights.append(weight)
        return weights

    def __call__(
        self, student: TokenStates, teacher: TokenStates, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the tokens' losses, and measurements of each token.

        Args:
            student: States of the student's scoring pass, with gradient.
            teacher: States of the teacher's, without.
            targets: Completion tokens. Shape [T].
            weights: Weight of each token, already divided by the step's sum. Shape [T].

        Returns:
            The loss, a scalar, and by name one tensor of shape [T] each: ``loss``, ``clipped`` (0 or 1), and, over the
            full vocabulary at the loss temperature and before any clip, ``forward_kl``, ``reverse_kl``,
            ``student_entropy``, ``teacher_entropy`` (nats) and ``student_logprob``, ``teacher_logprob`` of the target.
        """
        inputs = [student.hidden, *(p for p in student.head_parameters if p.requires_grad)]
        train = torch.is_grad_enabled() and student.hidden.requires_grad
        gradients = [torch.zeros_like(tensor) for tensor in inputs] if train else []
        chunks: list[dict[str, Tensor]] = []
        total = student.hidden.new_zeros((), dtype=torch.float64 if student.hidden.dtype == torch.float64 else torch.float32)
        for start in range(0, targets.numel(), self.chunk_tokens):
            rows = slice(start, start + self.chunk_tokens)
            hidden = student.hidden[rows].detach().requires_grad_(train)
            with torch.no_grad():
                teacher_logprobs = self._logprobs(teacher.head(teacher.hidden[rows]))
            with torch.set_grad_enabled(train):
                student_logprobs = self._logprobs(student.head(hidden))
                token_loss, clipped = self.per_token(student_logprobs, teacher_logprobs, targets[rows])
                # where: a token without weight must not turn an overflow into 0 * inf
                weighted = torch.where(weights[rows] > 0, token_loss * weights[rows], 0.0).sum()
            if train:
                found = torch.autograd.grad(weighted, [hidden, *inputs[1:]])
                gradients[0][rows] = found[0]
                for gradient, more in zip(gradients[1:], found[1:], strict=True):
                    gradient += more
            total = total + weighted.detach()
            chunks.append(
                {"loss": token_loss.detach(), "clipped": clipped}
                | _measure(student_logprobs.detach(), teacher_logprobs, targets[rows])
            )
        measured = {name: torch.cat([chunk[name] for chunk in chunks]) for name in (chunks[0] if chunks else ())}
        if train:
            total = _HandOver.apply(total, len(inputs), *inputs, *gradients)
        return total, measured

    def _logprobs(self, logits: Tensor) -> Tensor:
        full = logits if logits.dtype == torch.float64 else logits.float()
        return torch.log_softmax(full / self.temperature, dim=-1)


class DivergenceObjective(Objective):
    """A divergence between both roles' distributions at every completion token, over a support, clipped.

    Args:
        divergence: Forward KL unless given.
        support: The full vocabulary unless given.
        clip: No clipping unless given.
        temperature: Divides the logits of both roles before the softmax, above 0. Independent of the temperature that
            rollouts are sampled at; the authors set both to 1.1. No T^2 factor.
        reduction: ``token_mean``: every completion token of the optimizer step weighs the same. ``sequence_mean``:
            every completion weighs the same.
        skip_first_tokens: Leading tokens of every completion that stay out of the loss, 0 or more.
        include_truncated: Whether completions that ran into the length limit count.
        chunk_tokens: Tokens whose logits exist at one time.
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        support: Support | None = None,
        clip: Clip | None = None,
        temperature: PositiveFloat = 1.0,
        reduction: Literal["token_mean", "sequence_mean"] = "token_mean",
        skip_first_tokens: NonNegativeInt = 0,
        include_truncated: bool = True,
        chunk_tokens: PositiveInt = 256,
    ) -> None:
        super().__init__(temperature, reduction, skip_first_tokens, include_truncated, chunk_tokens)
        self.divergence = divergence or ForwardKL()
        self.support = support or FullVocabulary()
        self.clip = clip or NoClip()

    def check(self, vocabulary: int) -> None:
        self.support.check(vocabulary)

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        entries = self.divergence.entries(*self.support.restrict(student_logprobs, teacher_logprobs))
        loss = self.clip.apply(entries)
        return loss, (loss.detach() != entries.detach().sum(-1)).to(loss.dtype)


class SampledTokenObjective(Objective):
    """The policy-gradient form of reverse KL: only the sampled token's log-probabilities are used.

    loss_n = -A_n log p_S(y_n),  A_n = stopgrad(log p_T(y_n) - log p_S(y_n)). Unbiased for the reverse KL's gradient of a
    token, with more variance than the full vocabulary. Its value is not a divergence and may be negative.
    """

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
        student = student_logprobs.gather(-1, targets[:, None])[:, 0]
        teacher = teacher_logprobs.gather(-1, targets[:, None])[:, 0]
        advantage = teacher - student.detach()
        return -advantage * student, torch.zeros_like(advantage)


def _measure(student: Tensor, teacher: Tensor, targets: Tensor) -> dict[str, Tensor]:
    """What is logged of each token whatever the loss is: from log-probabilities over the full vocabulary, [rows, V]."""
    p_student, p_teacher = student.exp(), teacher.exp()
    difference = teacher - student
    return {
        "forward_kl": (p_teacher * difference).sum(-1),
        "reverse_kl": -(p_student * difference).sum(-1),
        "student_entropy": -(p_student * student).sum(-1),
        "teacher_entropy": -(p_teacher * teacher).sum(-1),
        "student_logprob": student.gather(-1, targets[:, None])[:, 0],
        "teacher_logprob": teacher.gather(-1, targets[:, None])[:, 0],
    }


class _HandOver(torch.autograd.Function):
    """A loss whose gradients at its inputs are already known: backward only scales and returns them."""

    @staticmethod
    def forward(ctx: Any, loss: Tensor, n: int, *inputs_and_gradients: Tensor) -> Tensor:
        ctx.save_for_backward(*inputs_and_gradients[n:])
        return loss.clone()

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        gradients: Sequence[Tensor] = ctx.saved_tensors
        scaled = [(grad_outputs[0] * gradient).to(gradient.dtype) for gradient in gradients]
        return None, None, *scaled, *(None for _ in gradients)
