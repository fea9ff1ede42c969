"""Types that all subpackages share: batches, settings and errors.

Letters of tensor shapes in comments and docstrings:

    B  rows: one prompt with one completion       P  prompt tokens of a row
    C  completion tokens of a row                 L  P + C, padded to the longest row of a micro-batch
    T  completion tokens of a whole micro-batch   V  vocabulary          D  hidden size

Token ids are ragged Python lists until a model needs a tensor. Masks are made from the lengths of these lists, never from
the pad id.
"""

from __future__ import annotations

import functools
import inspect
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from types import NoneType, SimpleNamespace, UnionType
from typing import (
    TYPE_CHECKING,
    Any,
    NamedTuple,
    Protocol,
    TypeVar,
    Union,
    get_args,
    get_origin,
    get_type_hints,
    runtime_checkable,
)

if TYPE_CHECKING:
    from torch import Tensor

_Class = TypeVar("_Class")

# Restricted numbers, which `checked` and the command line check. jsonargparse would execute a block `if TYPE_CHECKING`.
if not TYPE_CHECKING:
    from jsonargparse.typing import (
        ClosedUnitInterval as ClosedUnitInterval,
        NonNegativeFloat as NonNegativeFloat,
        NonNegativeInt as NonNegativeInt,
        OpenUnitInterval as OpenUnitInterval,
        PositiveFloat as PositiveFloat,
        PositiveInt as PositiveInt,
        restricted_number_type,
    )

    Probability = restricted_number_type(
        "Probability", float, [(">=", 0), ("<", 1)], docstring="float restricted to be ≥0 and <1"
    )
else:
    NonNegativeInt = int
    PositiveInt = int
    ClosedUnitInterval = float
    NonNegativeFloat = float
    OpenUnitInterval = float
    PositiveFloat = float
    Probability = float


#: A message of a conversation, or a tool schema, as chat templates read it.
Message = Mapping[str, Any]


class Example(NamedTuple):
    """A question or a conversation with its reference solution. In evaluation the solution may be empty.

    Args:
        question: The problem, which both roles read. In a conversation, the text of the last user turn.
        trace: The worked reference solution, which only the teacher reads. In a conversation, the text of the demonstration.
        answer: The reference answer for grading completions and the trace.
        columns: The row of the source, for contexts that read another column.
        messages: All messages of a conversation before the demonstration, which both roles read. Each has a ``role``, and
            ``content`` that is a text or a list of text parts. Empty for a question alone.
        tools: JSON schemas of the tools that the chat template describes.
        demonstration: The assistant's message behind ``messages``, if the data have one.

    Example::

        >>> from opsd_lightning import Example
        >>> turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}]
        >>> Example("1 + 1?", "2", "", messages=turns, demonstration={"role": "assistant", "content": "2"}).contents
        ('1 + 1?', '2', '', '[[{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 + 1?"}], [], \
{"role": "assistant", "content": "2"}]')
    """

    question: str
    trace: str
    answer: str
    columns: Mapping[str, Any] = {}
    messages: Sequence[Message] = ()
    tools: Sequence[Message] = ()
    demonstration: Message | None = None

    @property
    def contents(self) -> tuple[str, ...]:
        """Question, trace and answer, and the conversation as JSON if there is one. Rows with equal contents are equal."""
        texts = (self.question, self.trace, self.answer)
        if not (self.messages or self.tools or self.demonstration):
            return texts
        return (*texts, json.dumps([list(self.messages), list(self.tools), self.demonstration], ensure_ascii=False))


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
        answers: If True, every training question needs an answer that completions can be graded with, or a trace that ends
            with one. Without ``data.verify``, only if ``grades`` is True.
        grades: If True, training grades completions.
        scores_demonstrations: If True, evaluation scores the traces as demonstrations instead of grading completions. Every
            question then needs one.
        trace_completions: If True, the method trains on traces instead of completions. Every training question then needs a
            trace that fits the model's context after the student's prompt.
        privileged: If True, training uses the teacher's prompts, which are checked before it starts.
        graded_teacher: If True, evaluation samples completions of the teacher too, and needs its prompts.
        max_new_tokens: Longest completion that is sampled in training, in tokens.
        teachers: Teachers that score completions. Each must have room for a prompt and its completion.
    """

    teacher_prompts: bool = True
    traces: bool = False
    answers: bool = True
    grades: bool = False
    scores_demonstrations: bool = False
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


def checked(cls: type[_Class]) -> type[_Class]:
    """Check arguments of a class in Python as the command line checks them.

    This class decorator converts arguments with a restricted number type of jsonargparse, such as ``PositiveInt`` or
    ``PositiveFloat | None``, to ``int`` or ``float``. Write it above ``@dataclass``.

    Raises:
        ConfigError: On construction, for a value that the type does not allow. The setting is ``Class.argument``.

    Example::

        >>> from opsd_lightning import Sampling
        >>> Sampling(n=0)
        Traceback (most recent call last):
        opsd_lightning.types.ConfigError: Sampling.n: it is 0. Give an int restricted to be >0
    """
    init = cls.__init__
    parameters = list(inspect.signature(init).parameters.values())[1:]
    positional = [each.name for each in parameters if each.kind in (each.POSITIONAL_ONLY, each.POSITIONAL_OR_KEYWORD)]
    numbers: dict[str, _Number] = {}

    def convert(owner: object, name: str, value: Any) -> Any:
        return numbers[name].convert(owner, name, value) if name in numbers else value

    @functools.wraps(init)
    def checked_init(self: Any, *args: Any, **kwargs: Any) -> None:
        if not numbers:  # on first use: annotations may name classes that are defined later
            numbers.update(_numbers_of(init))
        known = zip(positional, args, strict=False)
        args = (*(convert(self, name, value) for name, value in known), *args[len(positional) :])
        init(self, *args, **{name: convert(self, name, value) for name, value in kwargs.items()})

    cls.__init__ = checked_init  # type: ignore[method-assign]
    return cls


class _Number(NamedTuple):
    kind: type[int] | type[float]
    optional: bool

    def convert(self, owner: object, name: str, value: Any) -> int | float | None:
        if value is None and self.optional:
            return None
        base = int if issubclass(self.kind, int) else float
        try:
            return base(self.kind(value))
        except (TypeError, ValueError):
            fix = f"Give {'an' if base is int else 'a'} {self.kind.__doc__}"
            raise ConfigError(f"it is {value!r}", f"{type(owner).__name__}.{name}", fix) from None


def _numbers_of(function: Callable[..., Any]) -> dict[str, _Number]:
    """Return the arguments of a function that are restricted numbers."""
    found: dict[str, _Number] = {}
    names = function.__globals__  # type: ignore[attr-defined]
    for name, annotation in function.__annotations__.items():
        try:
            hint = get_type_hints(SimpleNamespace(__annotations__={name: annotation}), names)[name]
        except NameError:  # a name for type checkers only is no restricted number
            continue
        kinds = get_args(hint) if get_origin(hint) in (Union, UnionType) else (hint,)
        numbers = [kind for kind in kinds if kind is not NoneType]
        kind = numbers[0] if len(numbers) == 1 else None
        if isinstance(kind, type) and issubclass(kind, (int, float)) and kind not in (int, float, bool):
            found[name] = _Number(kind, NoneType in kinds)
    return found


@checked
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
