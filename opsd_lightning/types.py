"""Types that all subpackages share: batches, settings and errors.

Letters of tensor shapes in comments and docstrings:

    B  rows: one prompt with one completion       P  prompt tokens of a row
    C  completion tokens of a row                 L  P + C, padded to the longest row of a micro-batch
    T  completion tokens of a whole micro-batch   V  vocabulary          D  hidden size

Token ids are ragged Python lists until a model needs a tensor. Masks are made from the lengths of these lists, never from
the pad id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol, runtime_checkable

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor


class Example(NamedTuple):
    """A question with its reasoning trace. In evaluation the trace may be empty.

    Args:
        question: The problem, which both roles read.
        trace: The worked reference solution, which only the teacher reads.
        answer: The reference answer for grading completions and the trace.
        columns: The row of the source, for contexts that read another column.
    """

    question: str
    trace: str
    answer: str
    columns: Mapping[str, Any] = {}


class PromptBatch(NamedTuple):
    """The prompts of a batch of questions, for both roles.

    Args:
        student: Token ids of the student's prompts, one list per question.
        teacher: Token ids of the teacher's prompts, with the privileged context. Empty lists if they are not read.
        examples: The examples behind the prompts, in the same order.
        counted: True for each row that counts in the metrics. False for a repeated row that evens out the ranks.
        upcoming: Token ids of the student's prompts of the next training batch, for engines that sample ahead. Empty if
            unknown.
        traces: Token ids of the traces as completions of the student's prompts, with an EOS token. Empty if the method does
            not train on traces.
        indices: Index of each question in its split, in evaluation. Empty in training.
    """

    student: list[list[int]]
    teacher: list[list[int]]
    examples: list[Example]
    counted: list[bool]
    upcoming: Sequence[Sequence[int]] = ()
    traces: Sequence[list[int]] = ()
    indices: Sequence[int] = ()


class Rollouts(NamedTuple):
    """Completions of a batch of prompts. Row ``i`` belongs to prompt ``i // n``.

    Args:
        completions: Token ids of each completion, with its EOS token if it has one.
        terminated: True for each row that ends with an EOS token. Other rows are truncated at ``max_new_tokens``.
        n: Number of completions of each prompt.
        logprobs: The sampler's log-probability of each completion token, in nats, at temperature 1 and before top-k, top-p
            and min-p. None if the engine does not return them.
        sampled: True for sampled completions, False for traces of the data.
    """

    completions: list[list[int]]
    terminated: list[bool]
    n: int = 1
    logprobs: list[list[float]] | None = None
    sampled: bool = True

    @property
    def tokens(self) -> int:
        """Number of completion tokens of all rows."""
        return sum(map(len, self.completions))


class LimitedTeacher(Protocol):
    """A teacher that scores completions, as the data module sees it.

    Attributes:
        setting: Name of the teacher's setting, such as ``model.teacher``.
        privileged: If True, it reads the teacher's prompts, otherwise the student's.
    """

    @property
    def setting(self) -> str: ...

    @property
    def privileged(self) -> bool: ...

    def context_length(self) -> int | None:
        """Return its longest prompt and completion in tokens. None for the policy's own limit."""


@dataclass(frozen=True)
class DataRequirements:
    """The data that a training method needs. The data module drops training questions that do not meet them.

    Args:
        teacher_prompts: If True, make the teacher's prompts of training questions with ``data.context``. A question without
            the trace that this context is made of is dropped.
        traces: If True, every training question needs a trace, whatever ``data.context`` is.
        answers: If True, every training question needs an answer or a trace that ends with one.
        trace_completions: If True, traces are trained on in the place of completions: every training question needs one,
            and it must fit the model's context behind the student's prompt.
        privileged: If True, training reads the teacher's prompts, and they are checked before it starts.
        graded_teacher: If True, evaluation samples completions of the teacher too, and needs its prompts.
        max_new_tokens: Longest completion that is sampled in training, in tokens.
        teachers: Teachers that score completions. Each must have room for a prompt and its completion.
    """

    teacher_prompts: bool = True
    traces: bool = False
    answers: bool = True
    trace_completions: bool = False
    privileged: bool = True
    graded_teacher: bool = False
    max_new_tokens: int = 0
    teachers: Sequence[LimitedTeacher] = ()


@runtime_checkable
class DeclaresData(Protocol):
    """A Lightning module that states its `DataRequirements`, such as every `PolicyModule`."""

    @property
    def data_requirements(self) -> DataRequirements: ...


class TokenStates(NamedTuple):
    """Hidden states of one role at T completion tokens, and the head that turns them into logits.

    Args:
        hidden: Hidden states that predict each completion token. Shape [T, D].
        head: Maps rows of hidden states, [rows, D], to logits [rows, V], with the role's weights.
        head_parameters: Trainable parameters of the head, if any.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    head_parameters: tuple[Tensor, ...] = ()


class UserError(ValueError):
    """A mistake of the user. Commands print its message without a traceback."""


class ConfigError(UserError):
    """A setting that cannot work. Its message is ``setting: problem. Fix``.

    Args:
        problem: What is wrong, with its values, as a clause without a final period.
        setting: Name of the setting on the command line, such as ``trainer.precision``.
        fix: What to do, as an imperative sentence without a final period.

    Example::

        >>> from opsd_lightning import ConfigError
        >>> raise ConfigError("bf16-true rounds LoRA weights to bfloat16", "trainer.precision", "Set it to bf16-mixed")
        Traceback (most recent call last):
        opsd_lightning.types.ConfigError: trainer.precision: bf16-true rounds LoRA weights to bfloat16. Set it to bf16-mixed
    """

    def __init__(self, problem: str, setting: str, fix: str) -> None:
        super().__init__(problem, setting, fix)
        self.problem, self.setting, self.fix = problem, setting, fix

    def __str__(self) -> str:
        return f"{self.setting}: {self.problem}. {self.fix}"


@dataclass(frozen=True)
class Sampling:
    """Settings of the sampler of completions.

    Args:
        max_new_tokens: Longest completion in tokens, with its EOS token, at least 1.
        temperature: Divisor of the logits before sampling, 0 or more. 0 is greedy decoding.
        top_p: Keep the most probable tokens that together reach this probability, from 0 to 1. 1 keeps all.
        top_k: Keep this many most probable tokens. 0 keeps all.
        min_p: Drop tokens below this fraction of the most probable token's probability, from 0 to 1. 0 keeps all.
        n: Number of completions of each question, at least 1.

    Example::

        >>> from opsd_lightning import Sampling
        >>> Sampling(max_new_tokens=256, temperature=0.7, n=4)
        Sampling(max_new_tokens=256, temperature=0.7, top_p=1.0, top_k=0, min_p=0.0, n=4)
    """

    max_new_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 1.0
    top_p: ClosedUnitInterval = 1.0
    top_k: NonNegativeInt = 0
    min_p: ClosedUnitInterval = 0.0
    n: PositiveInt = 1
