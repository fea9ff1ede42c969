"""What travels between the rooms of the package.

Legend of the shape letters used in comments and docstrings everywhere:

    B  rows: one prompt with one completion       P  prompt tokens of a row
    C  completion tokens of a row                 L  P + C, padded to the longest row of a micro-batch
    T  completion tokens of a whole micro-batch   V  vocabulary          D  hidden size

Token ids stay ragged Python lists until the moment a model needs a tensor: lengths are then the only truth about
what is padding, and no mask is ever read off the pad id.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from jsonargparse.typing import ClosedUnitInterval, NonNegativeFloat, NonNegativeInt, PositiveInt

if TYPE_CHECKING:
    from torch import Tensor


class Example(NamedTuple):
    """A question with its verified reasoning trace, or, in evaluation, without one.

    Args:
        question: The problem, as the student sees it.
        trace: The worked reference solution, which only the teacher sees.
        answer: The reference answer that completions and the trace are graded against.
        columns: The source's row as it was read, for contexts that need another column.
    """

    question: str
    trace: str
    answer: str
    columns: Mapping[str, Any] = {}


class PromptBatch(NamedTuple):
    """The prompts of some questions, for both roles.

    Args:
        student: Token ids of the student's prompts, one list a question.
        teacher: Token ids of the teacher's prompts, with the privileged context inside; empty lists in evaluation where
            the teacher is not graded.
        examples: The examples they were made from, in the same order.
        counted: Whether a row enters the metrics: False for a repeat that only evens out the ranks.
        upcoming: Token ids of the student's prompts of the next training batch, for engines that sample ahead; empty
            where it is not known.
        traces: Token ids of the traces as completions of the student's prompts, an EOS last; empty where nothing
            trains on them.
        indices: The place of each question in its set, in evaluation; empty in training.
    """

    student: list[list[int]]
    teacher: list[list[int]]
    examples: list[Example]
    counted: list[bool]
    upcoming: Sequence[Sequence[int]] = ()
    traces: Sequence[list[int]] = ()
    indices: Sequence[int] = ()


class Rollouts(NamedTuple):
    """Completions sampled for some prompts; row ``i`` belongs to prompt ``i // n``.

    Args:
        completions: Token ids of each completion, its EOS included where it was sampled.
        terminated: Whether the row ended with an EOS. A row that did not was truncated at ``max_new_tokens``.
        n: Completions for each prompt.
        logprobs: Of each completion token the sampler's own log-probability, in nats, at temperature 1 and before top-k,
            top-p and min-p. None where the engine has none.
        sampled: Whether a model wrote them: False for traces of the data.
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


class TokenStates(NamedTuple):
    """One role's view of T completion tokens: what the language-model head turns into logits.

    Args:
        hidden: Hidden states that predict each completion token. Shape [T, D].
        head: Maps rows of hidden states, [rows, D], to logits [rows, V], with the role's own weights.
        head_parameters: The head's own parameters that train, if any.
    """

    hidden: Tensor
    head: Callable[[Tensor], Tensor]
    head_parameters: tuple[Tensor, ...] = ()


class UserError(ValueError):
    """A user's mistake: the message names the problem, the setting and the remedy, and needs no traceback."""


class ConfigError(UserError):
    """A setting that cannot work, refused before training with one message: ``setting: problem. Fix.``

    Args:
        problem: What is wrong, with its values, as a clause without a final period.
        setting: Name of the setting as the command line takes it, such as ``trainer.precision``.
        fix: What to do, as an imperative sentence without a final period.

    Example::

        raise ConfigError("bf16-true rounds LoRA weights to bfloat16", "trainer.precision", "Set it to bf16-mixed")
    """

    def __init__(self, problem: str, setting: str, fix: str) -> None:
        super().__init__(problem, setting, fix)
        self.problem, self.setting, self.fix = problem, setting, fix

    def __str__(self) -> str:
        return f"{self.setting}: {self.problem}. {self.fix}"


@dataclass(frozen=True)
class Sampling:
    """How completions are sampled.

    Args:
        max_new_tokens: Length limit of a completion in tokens, its EOS included, at least 1.
        temperature: Divides the logits before sampling, 0 or more. 0 is greedy decoding.
        top_p: Keep the most probable tokens that together reach this probability, from 0 to 1. 1 keeps all.
        top_k: Keep this many most probable tokens. 0 keeps all.
        min_p: Drop tokens below this fraction of the most probable token's probability, from 0 to 1. 0 keeps all.
        n: Completions for each question, at least 1.
    """

    max_new_tokens: PositiveInt = 1024
    temperature: NonNegativeFloat = 1.0
    top_p: ClosedUnitInterval = 1.0
    top_k: NonNegativeInt = 0
    min_p: ClosedUnitInterval = 0.0
    n: PositiveInt = 1
