"""Skills that a run does not train: the interface of skill sets, and their measurement over all ranks."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Hashable, Mapping, Sequence
from contextlib import nullcontext
from datetime import timedelta
from typing import Any, ClassVar, NamedTuple

from peft import PeftModel
from transformers import PreTrainedTokenizerBase

from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.distributed.collectives import (
    all_gather_object,
    rank_and_world_size,
    run_on_all_ranks,
    run_on_rank_zero,
)
from opsd_lightning.evaluation.evaluator import EvaluatedModule
from opsd_lightning.models.policy import ModelSettings
from opsd_lightning.prompts.contexts import text_of_column
from opsd_lightning.rollouts.base import Demand
from opsd_lightning.runs.signals import stop_if_signalled
from opsd_lightning.teachers import FixedTeacher
from opsd_lightning.types import ConfigError, Example, PositiveInt, checked
from opsd_lightning.utils.statistics import Z, paired_change, ratio_and_error, sums_by_group, wilson_interval

# The other ranks wait while rank zero reads, and perhaps downloads, a source.
_LONGEST_WAIT = timedelta(days=1)


class ItemScore(NamedTuple):
    """Result of one item.

    Args:
        score: Score from 0 to 1. In a set that is not ``graded``, the sum over the units of the item, such as nats.
        weight: Number of units of the item, such as tokens, above 0. 1 in a graded set.
        details: Further fields of the record, such as the completion. Values that JSON can hold.
        group: Name of the item's group. Items of different groups are independent. None if all items are.
    """

    score: float
    weight: float = 1.0
    details: Mapping[str, Any] = {}
    group: str | None = None


class SkillResult(NamedTuple):
    """Results of all items of a set, in the order of the source.

    Args:
        items: Result of each item.

    Example::

        >>> from opsd_lightning import ItemScore, SkillResult
        >>> before = SkillResult([ItemScore(1.0), ItemScore(0.0), ItemScore(1.0), ItemScore(1.0)])
        >>> after = SkillResult([ItemScore(1.0), ItemScore(0.0), ItemScore(0.0), ItemScore(1.0)])
        >>> before.value, after.value, after.change(before)[0]
        (0.75, 0.5, -0.25)
    """

    items: list[ItemScore]

    @property
    def value(self) -> float:
        """Mean score of the items, or the mean over all their units."""
        return self._value_and_error()[0]

    @property
    def error(self) -> float:
        """Standard error of `value` over items, or over groups of items."""
        return self._value_and_error()[1]

    def _value_and_error(self) -> tuple[float, float]:
        columns = ([item.score for item in self.items], [item.weight for item in self.items])
        return ratio_and_error(*(sums_by_group(column, self._groups) for column in columns))

    @property
    def _groups(self) -> list[Hashable]:
        """Group of each item. An item without one is a group of its own."""
        return [place if item.group is None else item.group for place, item in enumerate(self.items)]

    @property
    def interval(self) -> tuple[float, float]:
        """95 % interval of `value` over items: Wilson's for right and wrong answers, otherwise a normal one.

        With groups, Wilson's interval has the number of independent items that would give the same `error`, and the number
        of groups where all items are right or all are wrong.
        """
        value, error, groups = self.value, self.error, len(set(self._groups))
        if all(item.score in (0, 1) and item.weight == 1 for item in self.items):
            grouped = groups < len(self.items)
            n = len(self.items) if not grouped else min(value * (1 - value) / error**2, len(self.items)) if error else groups
            return wilson_interval(value, n)
        half = Z * error
        return max(value - half, 0.0), value + half

    @property
    def units(self) -> float:
        """Sum of the items' weights."""
        return sum(item.weight for item in self.items)

    def change(self, before: SkillResult) -> tuple[float, float]:
        """Return the mean change since an earlier result of the same items, and the half-width of its 95 % interval."""
        return paired_change([item.score for item in before.items], [item.score for item in self.items], self._groups)


@checked
class SkillSet(ABC):
    """Base class of sets of questions that measure a skill of the model. See `KeptSkills`.

    A set implements `measure`, and `prepare` if it needs to read its examples first.

    Attributes:
        graded: True if scores are from 0 to 1, more is better, and the base model is measured too. False for a divergence
            from the base model, which is a mean over tokens; less is better.
        examples: The examples of the source, once `setup` has read them.
        chat_template_kwargs: Further arguments of the chat template in the run's evaluations, given to `setup`.

    Args:
        source: Source of the questions. Traces are not read.
        batch_size: Number of questions that each device measures at a time, at least 1.
        group: Column that names the group of a question, such as its passage. Intervals then are those of a sample of
            groups, since questions of one group may be answered alike. Defaults to independent questions.

    Example::

        >>> from opsd_lightning import ItemScore, SkillSet
        >>> class Brevity(SkillSet):
        ...     "Measures the share of greedy completions that end within 20 tokens."
        ...     def measure(self, module, places):
        ...         prompts = [module.tokenizer.encode(self.examples[place].question) for place in places]
        ...         rollouts = module.rollouts.generate(module.model, prompts, Sampling(20, temperature=0.0), seed=0)
        ...         return [ItemScore(float(terminated)) for terminated in rollouts.terminated]
    """

    graded: ClassVar[bool] = True

    #: Column that names the group of a question. None if all questions are independent.
    group: str | None = None

    def __init__(self, source: ExampleSource, batch_size: PositiveInt = 32, group: str | None = None) -> None:
        self.source = source
        self.batch_size = batch_size
        self.group = group
        self.examples: list[Example] = []
        self.chat_template_kwargs: dict[str, Any] = {}

    def setup(self, policy: ModelSettings, chat_template_kwargs: Mapping[str, Any] | None = None) -> None:
        """Read and prepare the examples. Every rank must call.

        Args:
            policy: Settings of the model.
            chat_template_kwargs: Further arguments of the chat template in the run's evaluations. Defaults to none.

        Raises:
            ConfigError: The source has no examples, or one of them cannot be measured. Its ``setting`` is an argument of
                this class, such as ``source.init_args.path``.
        """

        def read() -> list[Example]:
            try:
                return self.source.examples()
            except ConfigError as error:
                raise ConfigError(error.problem, f"source.init_args.{error.setting}", error.fix) from None

        self.chat_template_kwargs = dict(chat_template_kwargs or {})
        self.examples = run_on_rank_zero(read, _LONGEST_WAIT)

        def prepare() -> None:
            if not self.examples:
                raise ConfigError("it has no examples", "source", "Give a source with examples")
            if self.group is not None:
                names = [self.group_of(example) for example in self.examples]
                if len(set(names)) < 2 <= len(names) and names[0] is not None:
                    raise ConfigError("all questions are of one group", "group", "Name a column with several groups")
            try:
                self.prepare(policy, policy.load_tokenizer())
            except ConfigError as error:
                raise ConfigError(error.problem, error.setting.removeprefix("data."), error.fix) from None

        run_on_all_ranks(prepare)

    def group_of(self, example: Example) -> str | None:
        """Return the name of an example's group, or None if it is independent of all others.

        Raises:
            ConfigError: The example has no such column, or one without a text.
        """
        return None if self.group is None else text_of_column(example, self.group, "group") or None

    def prepare(self, policy: ModelSettings, tokenizer: PreTrainedTokenizerBase) -> None:
        """Prepare ``examples`` before the model is built, for example by encoding their prompts. Does nothing by default.

        Raises:
            ConfigError: An example cannot be measured.
        """

    def demand(self) -> Demand | None:
        """Return the largest rollout of a measurement, once `prepare` was called. None if nothing is generated."""
        return None

    @abstractmethod
    def measure(self, module: EvaluatedModule, places: Sequence[int]) -> list[ItemScore]:
        """Measure some examples with the active weights. Every rank calls it equally often.

        Args:
            module: The module, with its model, tokenizer, scorer and rollout engine.
            places: Indices of at least one example.

        Returns:
            The result of each of them.
        """


def base_weights() -> FixedTeacher:
    """Return the role of the base model, whose weights are active inside ``base_weights().weights(model)``."""
    base = FixedTeacher()
    base.use_base_weights()
    return base


def has_base(model: object) -> bool:
    """Return True if the base model is there below an adapter, and False in full fine-tuning."""
    return isinstance(model, PeftModel)


def measure_skill(module: EvaluatedModule, skills: SkillSet, base: bool = False) -> SkillResult:
    """Measure all items of a set, divided over the ranks. Every rank must call.

    Call it inside a trainer's run, after ``skills.setup(module.policy)``. Neither the weights nor the states of random
    generators change.

    Args:
        module: The module of the run.
        skills: The set.
        base: If True, measure the base model, with all adapters disabled.

    Raises:
        ConfigError: The base model is not there, because all weights train.
    """
    if base and not has_base(module.model):
        problem = "the base model is not in memory, because all weights train (full fine-tuning)"
        raise ConfigError(problem, "model.policy.lora", "Measure it in a run of its own, without --ckpt_path")
    rank, world = rank_and_world_size(module.trainer)
    count = len(skills.examples)
    # Every rank makes the same number of passes, as sharding requires. Repeated items do not count.
    own = range(rank, -(-count // world) * world, world)
    found: dict[int, ItemScore] = {}
    weights = base_weights().weights(module.model) if base else nullcontext()
    with weights, module.trainer.precision_plugin.forward_context():
        for start in range(0, len(own), skills.batch_size):
            stop_if_signalled(module.trainer, module.command)
            places = own[start : start + skills.batch_size]
            scores = skills.measure(module, [place % count for place in places])
            found |= {place: score for place, score in zip(places, scores, strict=True) if place < count}
    gathered = {place: score for part in all_gather_object(found) for place, score in part.items()}
    groups = map(skills.group_of, skills.examples)
    return SkillResult([gathered[place]._replace(group=group) for place, group in enumerate(groups)])
