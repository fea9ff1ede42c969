"""From the states of both roles to a loss and per-token measurements, a chunk of tokens at a time.

    L = sum_n w_n D(p_T(. | n) || p_S(. | n)) / sum_n w_n        n: completion tokens of the whole optimizer step

Source: arXiv 2601.18734, equation of the training objective. Only the student's hidden states (and its head, where that
trains) get a gradient. It is made in the forward pass, chunk by chunk, and handed over when backward comes: no tensor
of [all tokens, vocabulary] ever exists, and logits are computed once. Within a chunk, whose rows are many enough for
the head's matrix products, the divergence is taken of a block of few rows at a time, which stay in the CPU's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from opsd_lightning.losses.clips import Clip, NoClip
from opsd_lightning.losses.divergences import Divergence, ForwardKL
from opsd_lightning.losses.position_weights import PositionWeight
from opsd_lightning.losses.supports import FullVocabulary, Support
from opsd_lightning.types import NonNegativeInt, PositiveFloat, PositiveInt, PromptBatch, Rollouts, TokenStates, checked

# Numbers of one tensor of a block on a CPU: a few of them fit the last-level cache (4 MiB each in float32).
_CACHED_NUMBERS = 2**20
# Stands for the logarithm of 0. Products with probabilities stay finite, unless only one role rules a token out: their
# divergence is then beyond any that training goes on with (`methods.base`).
_LOWEST = -1e30


@checked
class Objective(ABC):
    """What the student is trained to minimise on its own completions.

    Attributes:
        uses_teacher: Whether the loss looks at the teacher.

    Args:
        temperature: Divides the logits of both roles before the softmax, above 0. Independent of the temperature that
            rollouts are sampled at; the authors set both to 1.1. No T^2 factor.
        reduction: ``token_mean``: every completion token of the optimizer step weighs the same. ``sequence_mean``:
            every completion weighs the same.
        skip_first_tokens: Leading tokens of every completion that stay out of the loss, 0 or more. For a student that
            does not think under a teacher that does, whose first token would be ``<think>``.
        include_truncated: Whether completions that ran into the length limit count.
        logits_memory_mib: About how much memory, in MiB, both roles' logits and what is made of them may take at one
            time, whatever the number of tokens; a head with a soft cap or an adapter takes more. It decides how many
            tokens make a chunk, not the result.
        position_weight: Weight of a token by its place in the completion. All alike unless given.
    """

    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        temperature: PositiveFloat = 1.0,
        reduction: Literal["token_mean", "sequence_mean"] = "token_mean",
        skip_first_tokens: NonNegativeInt = 0,
        include_truncated: bool = True,
        logits_memory_mib: PositiveInt = 384,
        position_weight: PositionWeight | None = None,
    ) -> None:
        if reduction not in ("token_mean", "sequence_mean"):
            raise ValueError(f"objective.reduction is {reduction!r}: choose token_mean or sequence_mean")
        self.temperature = temperature
        self.reduction = reduction
        self.skip_first_tokens = skip_first_tokens
        self.include_truncated = include_truncated
        self.logits_memory_mib = logits_memory_mib
        self.position_weight = position_weight

    def check(self, vocabulary: int) -> None:
        """Raise ``ValueError`` where the settings cannot work for a vocabulary of that size."""

    @abstractmethod
    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Loss of each token, and how much of its divergence (nats) clipping took away, both [rows].

        Args:
            student_logprobs: With gradient, at the loss temperature. Shape [rows, V].
            teacher_logprobs: Without. Shape [rows, V]. None in a loss without a teacher.
            targets: The sampled tokens. Shape [rows].
        """

    def token_weights(self, rollouts: Rollouts) -> list[Tensor]:
        """Weight of every completion token, one tensor of shape [C] a row, before the division by their sum.

        That sum runs over the whole optimizer step and all ranks, which makes both reductions exact for any split.
        """
        weights = []
        for completion, terminated in zip(rollouts.completions, rollouts.terminated, strict=True):
            weight = torch.zeros(len(completion), dtype=torch.float32)  # whatever the default dtype is
            if terminated or self.include_truncated:
                weight[self.skip_first_tokens :] = 1.0
                if self.position_weight is not None:
                    weight *= self.position_weight.weights(len(completion)).to(weight.dtype)
                if self.reduction == "sequence_mean":
                    weight /= weight.sum().clamp(min=1e-12)
            weights.append(weight)
        return weights

    def __call__(
        self, student: TokenStates, teacher: TokenStates | None, targets: Tensor, weights: Tensor
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """The weighted sum of the tokens' losses, and measurements of each token.

        Args:
            student: States of the student's scoring pass, with gradient.
            teacher: States of the teacher's, without; None in a loss without a teacher.
            targets: Completion tokens. Shape [T].
            weights: Weight of each token, already divided by the step's sum; may be negative (an advantage). Shape [T].

        Returns:
            The loss, a scalar, and by name one tensor of shape [T] each: ``loss``, ``clipped`` (0 or 1),
            ``clipped_mass`` (nats that clipping took away), and, over the full vocabulary at the loss temperature and
            before any clip, ``student_entropy`` (nats) and ``student_logprob`` of the target; with a teacher also
            ``forward_kl``, ``reverse_kl``, ``teacher_entropy`` and ``teacher_logprob``.
        """
        inputs = [student.hidden, *(p for p in student.head_parameters if p.requires_grad)]
        train = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        gradients = [torch.zeros_like(tensor) for tensor in inputs] if train else []
        measured: dict[str, Tensor] = {}
        start, chunk, block = 0, 8, 8  # the first, small chunk tells the size of the vocabulary
        while start < targets.numel():
            rows = slice(start, start + chunk)
            hidden = student.hidden[rows].detach().requires_grad_(train)
            with torch.set_grad_enabled(train):
                student_logits = student.head(hidden)
            with torch.no_grad():
                teacher_logits = None if teacher is None else teacher.head(teacher.hidden[rows])
                gradient = _gradient_buffer(student_logits, teacher_logits, teacher) if train else None
            stop = start + len(hidden)
            for first in range(start, stop, block):
                part = slice(first, min(first + block, stop))
                here = slice(part.start - start, part.stop - start)
                logits = student_logits.detach()[here], None if teacher_logits is None else teacher_logits[here]
                into = None if gradient is None else gradient[here]
                with torch.autocast(targets.device.type, enabled=False):  # which would round products to half precision
                    for name, values in self._block(*logits, targets[part], weights[part], into).items():
                        if name not in measured:
                            # Kept in one tensor for all tokens: small ones between the large would leave holes in the heap.
                            measured[name] = values.new_empty(targets.shape)
                        measured[name][part] = values
            if train:
                parts = torch.autograd.grad(student_logits, [hidden, *inputs[1:]], gradient)
                gradients[0][rows] = parts[0]
                for collected, more in zip(gradients[1:], parts[1:], strict=True):
                    collected += more
            chunk, block = self._sizes(student_logits)
            if train and teacher_logits is not None and gradient is not teacher_logits:  # a third tensor of logits
                own, other = student_logits.element_size(), teacher_logits.element_size()
                chunk = max(chunk * 2 * own // (2 * own + other), block)
            del logits, into, student_logits, teacher_logits, gradient  # before the next chunk's are made
            start = stop
        zero = torch.zeros((), dtype=torch.float32, device=student.hidden.device)
        total = _weighted(measured["loss"], weights) if measured else zero
        if train:
            total = _HandOver.apply(total, len(inputs), *inputs, *gradients)
        return total, measured

    def _block(
        self, student_logits: Tensor, teacher_logits: Tensor | None, targets: Tensor, weights: Tensor, into: Tensor | None
    ) -> dict[str, Tensor]:
        """Measurements of a few rows. In training, the gradient at the student's logits is written into ``into``, which may
        be ``teacher_logits``: nothing reads those any more."""
        teacher = None if teacher_logits is None else self._logprobs(teacher_logits)
        with torch.set_grad_enabled(into is not None):
            leaf = student_logits.requires_grad_(into is not None)
            student = self._logprobs(leaf)
            teacher = None if teacher is None else teacher.to(student.dtype)
            token_loss, clipped_mass = self.per_token(student, teacher, targets)
            if into is not None:
                into.copy_(torch.autograd.grad(_weighted(token_loss, weights), leaf)[0])
        own = {"loss": token_loss.detach(), "clipped": (clipped_mass != 0).to(student.dtype), "clipped_mass": clipped_mass}
        return own | _measure(student.detach(), teacher, targets)

    def _sizes(self, logits: Tensor) -> tuple[int, int]:
        """Rows of a chunk and of a block, from the memory that may be used."""
        budget, vocabulary = self.logits_memory_mib * 2**20, logits.shape[-1]
        # A block's log-probabilities and all that is made of them are about 12 tensors in full precision; a chunk's
        # logits of both roles are two as the head makes them.
        block_row = 12 * vocabulary * max(4, logits.element_size())
        block = budget // 2 // block_row
        if logits.device.type == "cpu":
            block = min(block, _CACHED_NUMBERS // vocabulary)
        block = max(block, 1)
        chunk = (budget - block * block_row) // (2 * vocabulary * logits.element_size())
        return max(chunk, block), block

    def _logprobs(self, logits: Tensor) -> Tensor:
        full = logits if logits.dtype == torch.float64 else logits.float()
        return log_softmax(full if self.temperature == 1 else full / self.temperature)


@checked
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
        logits_memory_mib: About how much memory, in MiB, both roles' logits and what is made of them may take at one
            time, whatever the number of tokens; a head with a soft cap or an adapter takes more. It decides how many
            tokens make a chunk, not the result.
        position_weight: Weight of a token by its place in the completion. All alike unless given.
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
        logits_memory_mib: PositiveInt = 384,
        position_weight: PositionWeight | None = None,
    ) -> None:
        super().__init__(temperature, reduction, skip_first_tokens, include_truncated, logits_memory_mib, position_weight)
        self.divergence = divergence or ForwardKL()
        self.support = support or FullVocabulary()
        self.clip = clip or NoClip()

    def check(self, vocabulary: int) -> None:
        self.support.check(vocabulary)

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert teacher_logprobs is not None
        entries = self.divergence.entries(*self.support.restrict(student_logprobs, teacher_logprobs))
        loss = self.clip.apply(entries)
        return loss, entries.detach().sum(-1) - loss.detach()


class SampledTokenObjective(Objective):
    """The policy-gradient form of reverse KL: only the sampled token's log-probabilities are used.

    loss_n = -A_n log p_S(y_n),  A_n = stopgrad(log p_T(y_n) - log p_S(y_n)). Unbiased for the reverse KL's gradient of a
    token, with more variance than the full vocabulary. Its value is not a divergence and may be negative.
    """

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = _of_targets(student_logprobs, targets), _of_targets(teacher_logprobs, targets)
        advantage = teacher - student.detach()
        return -advantage * student, torch.zeros_like(advantage)


class SampledKLObjective(Objective):
    """The usual estimate of the reverse KL from the sampled token alone ("k3"): never negative, unbiased in value.

    loss_n = exp(d) - d - 1,  d = log p_T(y_n) - log p_S(y_n). Its gradient is that of the estimate, not an unbiased one of
    the reverse KL; other GRPO implementations use it for their KL term.
    """

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        difference = _of_targets(teacher_logprobs, targets) - _of_targets(student_logprobs, targets)
        return difference.exp() - difference - 1, torch.zeros_like(difference)


class NegativeLogLikelihood(Objective):
    """-log p_S(y_n), without a teacher: supervised fine-tuning, and by weights that are advantages a policy gradient."""

    uses_teacher = False

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprob = _of_targets(student_logprobs, targets)
        return -logprob, torch.zeros_like(logprob)


@torch.no_grad()
def token_logprobs(states: TokenStates, targets: Tensor, logits_memory_mib: int = 384, temperature: float = 1.0) -> Tensor:
    """Log-probability of each target, in nats, a chunk of tokens at a time. Shape [T].

    Args:
        states: Of T tokens.
        targets: Shape [T].
        logits_memory_mib: About how much memory, in MiB, logits may take at one time.
        temperature: Divides the logits.
    """
    found = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    start, chunk = 0, 8  # the first, small chunk tells the size of the vocabulary
    while start < targets.numel():
        rows = slice(start, start + chunk)
        logits = states.head(states.hidden[rows]).float() / temperature
        found[rows] = logits.gather(-1, targets[rows, None])[:, 0] - logits.logsumexp(-1)
        start += chunk
        chunk = max(logits_memory_mib * 2**20 // (3 * 4 * logits.shape[-1]), 1)  # as made, in float32, and one more
    return found


class _LogSoftmax(torch.autograd.Function):
    """Log-softmax over the last dimension without -inf, whose differences and products are NaN.

    An entry masked with -inf, or with a number that a temperature below 1 makes -inf, keeps a probability of exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        logprobs = torch.log_softmax(logits, dim=-1).clamp_(min=_LOWEST)
        ctx.save_for_backward(logprobs)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (logprobs,) = ctx.saved_tensors
        return torch._log_softmax_backward_data(grad_outputs[0], logprobs, -1, logprobs.dtype)


def log_softmax(logits: Tensor) -> Tensor:
    """Log-probabilities over the last dimension, all finite."""
    return _LogSoftmax.apply(logits)


def _gradient_buffer(student_logits: Tensor, teacher_logits: Tensor | None, teacher: TokenStates | None) -> Tensor:
    """Memory for the gradient at the student's logits: the teacher's logits, where they are of the same dtype, since each
    block's are read before its gradient is written."""
    if teacher is None or teacher_logits is None or teacher_logits.dtype != student_logits.dtype:
        return torch.empty_like(student_logits)
    return teacher_logits.clone() if _share_memory(teacher_logits, teacher.hidden) else teacher_logits  # an identity head


def _of_targets(logprobs: Tensor | None, targets: Tensor) -> Tensor:
    assert logprobs is not None
    return logprobs.gather(-1, targets[:, None])[:, 0]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _weighted(token_loss: Tensor, weights: Tensor) -> Tensor:
    # where: a token without weight must not turn an overflow into 0 * inf
    return torch.where(weights != 0, token_loss * weights, 0.0).sum()


def _measure(student: Tensor, teacher: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """What is logged of each token whatever the loss is: from log-probabilities over the full vocabulary, [rows, V]."""
    p_student = student.exp()
    own = {
        "student_entropy": -torch.linalg.vecdot(p_student, student),  # of full precision where autocast is off
        "student_logprob": _of_targets(student, targets),
    }
    if teacher is None:
        return own
    p_teacher, difference = teacher.exp(), teacher - student
    return own | {
        "forward_kl": torch.linalg.vecdot(p_teacher, difference),
        "reverse_kl": -torch.linalg.vecdot(p_student, difference),
        "teacher_entropy": -torch.linalg.vecdot(p_teacher, teacher),
        "teacher_logprob": _of_targets(teacher, targets),
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


class Term(NamedTuple):
    """One term of a step's loss: an objective of every completion token, weighted.

    Args:
        objective: What is taken of each token.
        weights: Of each token, already divided by the step's sum over all ranks; one tensor of shape [C] a completion.
        teacher: States to compare with at all completion tokens, row by row; None for an objective without a teacher.
        teacher_prompts: Token ids that the teacher read before each completion; None where there is no teacher.
    """

    objective: Objective
    weights: list[Tensor]
    teacher: TokenStates | None = None
    teacher_prompts: list[list[int]] | None = None


class Update(NamedTuple):
    """What one optimizer step is made of.

    Args:
        batch: The questions.
        students: Token ids that the student read before each completion.
        rollouts: The completions.
        terms: The terms of the loss, the method's own first.
        measured: Of the first term, by name, one tensor of shape [C] a completion, on the CPU (see `Objective.__call__`).
    """

    batch: PromptBatch
    students: list[list[int]]
    rollouts: Rollouts
    terms: list[Term]
    measured: dict[str, list[Tensor]]
