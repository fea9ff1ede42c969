"""Objectives: loss and per-token measurements from the hidden states of both roles, computed in chunks of tokens.

    L = sum_n w_n D(p_T(. | n) || p_S(. | n)) / sum_n w_n        n: completion tokens of the whole optimizer step

Source: arXiv 2601.18734, equation of the training objective. Only the student's hidden states get a gradient, and its
head if the head trains. The forward pass computes the gradient chunk by chunk, and the backward pass only scales it.
Logits are therefore computed once, and no tensor of shape [all tokens, vocabulary] exists. A chunk has enough rows for
efficient matrix products in the head. It is processed in blocks of fewer rows, which fit the CPU's cache.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar, Literal, NamedTuple

import torch
from torch import Tensor

from opsd_lightning.losses.clips import Clip, NoClip
from opsd_lightning.losses.divergences import Divergence, ForwardKL
from opsd_lightning.losses.position_weights import PositionWeight
from opsd_lightning.losses.supports import FullVocabulary, Support
from opsd_lightning.types import ConfigError, NonNegativeInt, PositiveFloat, PositiveInt, Rollouts, TokenStates, checked

# Most elements of one tensor of a block on a CPU: 4 MiB in float32, a few of which fit the last-level cache.
_BLOCK_ELEMENTS = 2**20
# Stands for log(0), so that products with probabilities stay finite. If only one role gives a token the probability 0, the
# divergence is so large that training stops (`methods.base`).
_LOG_ZERO = -1e30


@checked
class Objective(ABC):
    """Base class of the losses that the student minimizes on completion tokens.

    An objective returns values and never logs.

    Attributes:
        uses_teacher: True if the loss depends on the teacher's distribution.

    Args:
        temperature: Temperature T of the loss, above 0. It divides the logits of both roles before the softmax. The loss
            is not multiplied by T^2. Rollouts are sampled with their own temperature; the authors set both to 1.1.
        reduction: ``token_mean`` gives each completion token of the optimizer step the same weight. ``sequence_mean``
            gives each completion the same weight.
        skip_first_tokens: Number of leading tokens of each completion to leave out of the loss, 0 or more. Useful for a
            student without thinking and a teacher with thinking, which expects ``<think>`` as the first token.
        include_truncated: If True, completions that reached the length limit are part of the loss.
        logits_memory_mib: Approximate memory for the logits of both roles and tensors of that size, in MiB. It sets the
            number of tokens in a chunk and does not change the result. A head with a soft cap or an adapter needs more.
        position_weight: Weight of a token by its position in the completion. Defaults to equal weights.
    """

    uses_teacher: ClassVar[bool] = True

    def __init__(
        self,
        *,
        temperature: PositiveFloat = 1.0,
        reduction: Literal["token_mean", "sequence_mean"] = "token_mean",
        skip_first_tokens: NonNegativeInt = 0,
        include_truncated: bool = True,
        logits_memory_mib: PositiveInt = 384,
        position_weight: PositionWeight | None = None,
    ) -> None:
        if reduction not in ("token_mean", "sequence_mean"):
            raise ConfigError(
                f"the reduction {reduction!r} does not exist",
                f"{type(self).__name__}.reduction",
                "Choose token_mean or sequence_mean",
            )
        self.temperature = temperature
        self.reduction = reduction
        self.skip_first_tokens = skip_first_tokens
        self.include_truncated = include_truncated
        self.logits_memory_mib = logits_memory_mib
        self.position_weight = position_weight

    def check(self, vocabulary: int, setting: str) -> None:
        """Check that the objective fits a vocabulary.

        Args:
            vocabulary: Number of entries in the model's vocabulary.
            setting: Name of the setting that holds this objective, for the error.

        Raises:
            ConfigError: A part of the objective does not fit the vocabulary.
        """

    @abstractmethod
    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the loss of each token.

        Args:
            student_logprobs: Log-probabilities of the student at the loss temperature, with gradient. Shape [rows, V].
            teacher_logprobs: Log-probabilities of the teacher at the loss temperature, without gradient. Shape [rows, V].
                None for a loss without a teacher.
            targets: Completion tokens. Shape [rows].

        Returns:
            The losses, and the nats that the clip removed from each. Shape [rows] each.
        """

    def token_weights(self, rollouts: Rollouts) -> list[Tensor]:
        """Return the weight of each completion token before normalization, one tensor of shape [C] per completion.

        The caller divides the weights by their sum over the whole optimizer step and all ranks. Both reductions are
        therefore independent of micro-batches and ranks.
        """
        weights = []
        for completion, terminated in zip(rollouts.completions, rollouts.terminated, strict=True):
            weight = torch.zeros(len(completion), dtype=torch.float32)  # not the default dtype
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
        """Compute the weighted sum of the token losses, and measurements of each token.

        Args:
            student: States of the student's scoring pass, with gradient.
            teacher: States of the teacher's scoring pass, without gradient. None for a loss without a teacher.
            targets: Completion tokens. Shape [T].
            weights: Weight of each token, already divided by the sum over the step. Negative weights, such as advantages,
                are allowed. Shape [T].

        Returns:
            The loss, a scalar, and measurements by name, each of shape [T]: ``loss``, ``clipped`` (0 or 1),
            ``clipped_mass`` (nats that the clip removed), ``student_entropy`` (nats) and ``student_logprob`` of the target.
            With a teacher also ``forward_kl``, ``reverse_kl``, ``teacher_entropy`` and ``teacher_logprob``. Entropies,
            divergences and log-probabilities are over the full vocabulary, at the loss temperature and before any clip.
        """
        inputs = [student.hidden, *(p for p in student.head_parameters if p.requires_grad)]
        train = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in inputs)
        gradients = [torch.zeros_like(tensor) for tensor in inputs] if train else []
        measured: dict[str, Tensor] = {}
        start, chunk, block = 0, 8, 8  # a small first chunk, since only its logits show the size of the vocabulary
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
                gradient_rows = None if gradient is None else gradient[here]
                # Autocast would round products to half precision.
                with torch.autocast(targets.device.type, enabled=False):
                    for name, values in self._block(*logits, targets[part], weights[part], gradient_rows).items():
                        if name not in measured:
                            # One tensor for all tokens: many small tensors between the large ones would fragment memory.
                            measured[name] = values.new_empty(targets.shape)
                        measured[name][part] = values
            if train:
                parts = torch.autograd.grad(student_logits, [hidden, *inputs[1:]], gradient)
                gradients[0][rows] = parts[0]
                for collected, more in zip(gradients[1:], parts[1:], strict=True):
                    collected += more
            chunk, block = self._sizes(student_logits)
            if train and teacher_logits is not None and gradient is not teacher_logits:  # a third tensor of this size
                own, other = student_logits.element_size(), teacher_logits.element_size()
                chunk = max(chunk * 2 * own // (2 * own + other), block)
            del logits, gradient_rows, student_logits, teacher_logits, gradient  # free memory for the next chunk
            start = stop
        zero = torch.zeros((), dtype=torch.float32, device=student.hidden.device)
        total = _weighted(measured["loss"], weights) if measured else zero
        if train:
            total = _PrecomputedGradient.apply(total, len(inputs), *inputs, *gradients)
        return total, measured

    def _block(
        self,
        student_logits: Tensor,
        teacher_logits: Tensor | None,
        targets: Tensor,
        weights: Tensor,
        gradient: Tensor | None,
    ) -> dict[str, Tensor]:
        """Return the measurements of a block of rows, and in training write the gradient at the student's logits.

        Args:
            student_logits: Shape [rows, V].
            teacher_logits: Shape [rows, V].
            targets: Shape [rows].
            weights: Shape [rows].
            gradient: Buffer for the gradient, None outside training. It can share the memory of ``teacher_logits``, which
                are read before the gradient is written. Shape [rows, V].
        """
        teacher = None if teacher_logits is None else self._logprobs(teacher_logits)
        with torch.set_grad_enabled(gradient is not None):
            leaf = student_logits.requires_grad_(gradient is not None)
            student = self._logprobs(leaf)
            teacher = None if teacher is None else teacher.to(student.dtype)
            token_loss, clipped_mass = self.per_token(student, teacher, targets)
            if gradient is not None:
                gradient.copy_(torch.autograd.grad(_weighted(token_loss, weights), leaf)[0])
        own = {"loss": token_loss.detach(), "clipped": (clipped_mass != 0).to(student.dtype), "clipped_mass": clipped_mass}
        return own | _measure(student.detach(), teacher, targets)

    def _sizes(self, logits: Tensor) -> tuple[int, int]:
        """Return the number of rows of a chunk and of a block that fit ``logits_memory_mib``."""
        budget, vocabulary = self.logits_memory_mib * 2**20, logits.shape[-1]
        # A block needs about 12 tensors in full precision: log-probabilities and all that is computed from them. A chunk
        # needs the logits of both roles, in the dtype of the head.
        block_row = 12 * vocabulary * max(4, logits.element_size())
        block = budget // 2 // block_row
        if logits.device.type == "cpu":
            block = min(block, _BLOCK_ELEMENTS // vocabulary)
        block = max(block, 1)
        chunk = (budget - block * block_row) // (2 * vocabulary * logits.element_size())
        return max(chunk, block), block

    def _logprobs(self, logits: Tensor) -> Tensor:
        full = logits if logits.dtype == torch.float64 else logits.float()
        return log_softmax(full if self.temperature == 1 else full / self.temperature)


class DivergenceObjective(Objective):
    """Divergence between the distributions of teacher and student at each completion token.

    loss_n = clip(D(p_T(. | n) || p_S(. | n))), with D summed over the support. Source: arXiv 2601.18734.

    Args:
        divergence: Divergence D. Defaults to forward KL.
        support: Vocabulary entries over which the divergence is summed. Defaults to the full vocabulary.
        clip: Upper bound on the divergence of a token. Defaults to no clip.
        **common: Arguments of `Objective`.

    Example::

        >>> import torch
        >>> from opsd_lightning import DivergenceObjective, GeneralizedJSD, TokenClip
        >>> from opsd_lightning.types import TokenStates
        >>> objective = DivergenceObjective(GeneralizedJSD(0.5), clip=TokenClip(1.0), temperature=1.1)
        >>> _ = torch.manual_seed(0)
        >>> states, teacher_states = torch.randn(3, 8, requires_grad=True), torch.randn(3, 8)
        >>> head = torch.nn.Linear(8, 20, bias=False).requires_grad_(False)
        >>> student, teacher = TokenStates(states, head), TokenStates(teacher_states, head)
        >>> loss, measured = objective(student, teacher, torch.tensor([4, 0, 19]), weights=torch.full((3,), 1 / 3))
        >>> loss.backward()
        >>> states.grad.shape, measured["forward_kl"].shape
        (torch.Size([3, 8]), torch.Size([3]))
    """

    def __init__(
        self,
        divergence: Divergence | None = None,
        support: Support | None = None,
        clip: Clip | None = None,
        **common: Any,
    ) -> None:
        super().__init__(**common)
        self.divergence = divergence or ForwardKL()
        self.support = support or FullVocabulary()
        self.clip = clip or NoClip()

    def check(self, vocabulary: int, setting: str) -> None:
        self.support.check(vocabulary, f"{setting}.support")

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        assert teacher_logprobs is not None
        entries = self.divergence.entries(*self.support.restrict(student_logprobs, teacher_logprobs))
        loss = self.clip.apply(entries)
        return loss, entries.detach().sum(-1) - loss.detach()


class SampledTokenObjective(Objective):
    """Policy-gradient form of the reverse KL, from the log-probabilities of the sampled token y_n alone.

    loss_n = -A_n log p_S(y_n),  A_n = stopgrad(log p_T(y_n) - log p_S(y_n)). The gradient is an unbiased estimate of the
    gradient of a token's reverse KL, with more variance than `ReverseKL` over the full vocabulary. The loss itself is not a
    divergence and can be negative. Source: arXiv 2601.18734.
    """

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        student, teacher = _gather_targets(student_logprobs, targets), _gather_targets(teacher_logprobs, targets)
        advantage = teacher - student.detach()
        return -advantage * student, torch.zeros_like(advantage)


class SampledKLObjective(Objective):
    """Estimate of the reverse KL from the sampled token y_n alone, known as k3.

    loss_n = exp(d) - d - 1,  d = log p_T(y_n) - log p_S(y_n). The value is never negative and is an unbiased estimate of the
    reverse KL. The gradient is not an unbiased estimate of its gradient. Other GRPO implementations use k3 as their KL
    term. Source: J. Schulman, "Approximating KL Divergence", 2020.
    """

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        difference = _gather_targets(teacher_logprobs, targets) - _gather_targets(student_logprobs, targets)
        return difference.exp() - difference - 1, torch.zeros_like(difference)


class NegativeLogLikelihood(Objective):
    """Negative log-likelihood of the completion tokens, loss_n = -log p_S(y_n), without a teacher.

    This is the loss of supervised fine-tuning. With advantages as weights it is a policy-gradient loss.
    """

    uses_teacher = False

    def per_token(self, student_logprobs: Tensor, teacher_logprobs: Tensor | None, targets: Tensor) -> tuple[Tensor, Tensor]:
        logprob = _gather_targets(student_logprobs, targets)
        return -logprob, torch.zeros_like(logprob)


@torch.no_grad()
def token_logprobs(states: TokenStates, targets: Tensor, logits_memory_mib: int = 384, temperature: float = 1.0) -> Tensor:
    """Compute the log-probability of each target in chunks of tokens.

    Args:
        states: States of T tokens.
        targets: Tokens. Shape [T].
        logits_memory_mib: Approximate memory for logits, in MiB.
        temperature: Temperature that divides the logits.

    Returns:
        Log-probabilities in nats. Shape [T].
    """
    found = torch.zeros(targets.shape, dtype=torch.float32, device=targets.device)
    for rows, logits in logit_chunks(states, logits_memory_mib, temperature):
        found[rows] = logits.gather(-1, targets[rows, None])[:, 0] - logits.logsumexp(-1)
    return found


def logit_chunks(states: TokenStates, logits_memory_mib: int, temperature: float) -> Iterator[tuple[slice, Tensor]]:
    """Compute logits in chunks of tokens.

    Args:
        states: States of T tokens.
        logits_memory_mib: Approximate memory for logits, in MiB.
        temperature: Temperature that divides the logits.

    Yields:
        The rows of a chunk, and their logits in float32. Shape [rows, V].
    """
    start, chunk = 0, 8  # a small first chunk, since only its logits show the size of the vocabulary
    while start < len(states.hidden):
        rows = slice(start, start + chunk)
        logits = states.head(states.hidden[rows]).float() / temperature
        yield rows, logits
        start += chunk
        chunk = max(logits_memory_mib * 2**20 // (3 * 4 * logits.shape[-1]), 1)  # three tensors of logits


class _LogSoftmax(torch.autograd.Function):
    """Log-softmax over the last dimension that returns a large negative number instead of -inf.

    Differences and products of infinities would be NaN. An entry whose logit is -inf, or becomes -inf by the division by
    the temperature, keeps a probability of exactly 0.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor) -> Tensor:
        logprobs = torch.log_softmax(logits, dim=-1).clamp_(min=_LOG_ZERO)
        ctx.save_for_backward(logprobs)
        return logprobs

    @staticmethod
    def backward(ctx: Any, *grad_outputs: Tensor) -> Tensor:
        (logprobs,) = ctx.saved_tensors
        return torch._log_softmax_backward_data(grad_outputs[0], logprobs, -1, logprobs.dtype)


def log_softmax(logits: Tensor) -> Tensor:
    """Compute log-probabilities over the last dimension, all of them finite."""
    return _LogSoftmax.apply(logits)


def _gradient_buffer(student_logits: Tensor, teacher_logits: Tensor | None, teacher: TokenStates | None) -> Tensor:
    """Return a buffer for the gradient at the student's logits.

    The buffer is the teacher's logits if the dtypes agree: each block of them is read before its gradient is written.
    Logits from an identity head are the teacher's hidden states themselves and must not be overwritten.
    """
    if teacher is None or teacher_logits is None or teacher_logits.dtype != student_logits.dtype:
        return torch.empty_like(student_logits)
    return torch.empty_like(student_logits) if _share_memory(teacher_logits, teacher.hidden) else teacher_logits


def _gather_targets(logprobs: Tensor | None, targets: Tensor) -> Tensor:
    """Return the log-probabilities, [rows, V], at the targets, [rows]."""
    assert logprobs is not None
    return logprobs.gather(-1, targets[:, None])[:, 0]


def _share_memory(one: Tensor, other: Tensor) -> bool:
    return one.untyped_storage().data_ptr() == other.untyped_storage().data_ptr()


def _weighted(token_loss: Tensor, weights: Tensor) -> Tensor:
    # torch.where, since 0 * inf of an overflow at a token without weight would be NaN
    return torch.where(weights != 0, token_loss * weights, 0.0).sum()


def _measure(student: Tensor, teacher: Tensor | None, targets: Tensor) -> dict[str, Tensor]:
    """Compute the measurements that all objectives share.

    Args:
        student: Log-probabilities of the student. Shape [rows, V].
        teacher: Log-probabilities of the teacher. Shape [rows, V]. None for a loss without a teacher.
        targets: Completion tokens. Shape [rows].
    """
    p_student = student.exp()
    own = {
        "student_entropy": -torch.linalg.vecdot(p_student, student),
        "student_logprob": _gather_targets(student, targets),
    }
    if teacher is None:
        return own
    p_teacher, difference = teacher.exp(), teacher - student
    return own | {
        "forward_kl": torch.linalg.vecdot(p_teacher, difference),
        "reverse_kl": -torch.linalg.vecdot(p_student, difference),
        "teacher_entropy": -torch.linalg.vecdot(p_teacher, teacher),
        "teacher_logprob": _gather_targets(teacher, targets),
    }


class _PrecomputedGradient(torch.autograd.Function):
    """Loss with precomputed gradients at its inputs: the backward pass only scales them."""

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
    """One term of a step's loss: an objective and the weights of all completion tokens.

    Args:
        objective: Loss of each token.
        weights: Token weights, already divided by their sum over the step and all ranks. One tensor of shape [C] per
            completion.
        teacher: Teacher states at all completion tokens, in the order of the completions. None for an objective without a
            teacher.
        teacher_prompts: Token ids of the teacher's prompt for each completion. None without a teacher.
    """

    objective: Objective
    weights: list[Tensor]
    teacher: TokenStates | None = None
    teacher_prompts: list[list[int]] | None = None

    def weighted(self, factors: list[Tensor]) -> Term:
        """Return the term with its weights multiplied by factors, one tensor of shape [C] per completion."""
        return self._replace(weights=[weight * factor for weight, factor in zip(self.weights, factors, strict=True)])

    def loss(
        self, student: TokenStates, targets: Tensor, rows: Sequence[int], sizes: Sequence[int]
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Compute the term for some completions of the step.

        Args:
            student: Student states at the tokens of these completions.
            targets: Tokens of these completions. Shape [T].
            rows: Indices of these completions in the step. Empty for a pass without completions.
            sizes: Number of tokens of each completion of the step.

        Returns:
            The loss and the measurements of each token, as in `Objective.__call__`.
        """
        weights = torch.cat([self.weights[row] for row in rows] or [torch.zeros(0, dtype=torch.float32)])
        weights = weights.to(targets.device, non_blocking=True)
        teacher = self.teacher
        if teacher is not None:
            states = teacher.hidden.split(list(sizes))
            teacher = TokenStates(torch.cat([states[row] for row in rows] or [teacher.hidden[:0]]), teacher.head)
        return self.objective(student, teacher, targets, weights)
