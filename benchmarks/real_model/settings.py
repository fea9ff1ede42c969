"""Arms of the comparison, and the settings that all of them share."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Literal

#: Recipe of the first task, and of the second task in the continual-learning runs.
CONFIG = "configs/quickstart.yaml"
SECOND_CONFIG = "configs/tasks/code.yaml"

#: Prompts on which the divergence from the base model is measured.
GENERAL_PROMPTS = "benchmarks/real_model/general_prompts.jsonl"

#: Seeds of the generated questions. The quick start, whose settings are used here, was developed on others.
DATA_SEEDS = {"train": 11, "val": 12, "test": 13}

#: Seed of the questions in other words, and the largest number in them. Those of the target task have numbers up to 10.
TRANSFER_SEED, TRANSFER_LARGEST = 14, 30

#: Learning rates that an arm tries on seed 0. If the best one is at an end, `choose_rate` tries one beyond it.
RATES = (4e-4, 8e-4, 1.6e-3)


def all_rates() -> tuple[float, ...]:
    """Return all learning rates that an arm may try, with those beyond both ends."""
    return (RATES[0] / 2, *RATES, RATES[-1] * 2)


def choose_rate(validate: Callable[[float], float]) -> float:
    """Return the learning rate with the best validation, the lower one in a tie.

    Args:
        validate: Trains with a learning rate and returns its validation accuracy.
    """
    found: dict[float, float] = {}

    def best(rates: Iterable[float]) -> float:
        found.update({rate: validate(rate) for rate in rates})
        return max(found, key=lambda rate: (found[rate], -rate))

    first = best(RATES)
    lowest, *_, highest = all_rates()
    return best([lowest] * (first == RATES[0]) + [highest] * (first == RATES[-1]))


@dataclass(frozen=True)
class Arm:
    """A method with the style of its references.

    Args:
        method: The method.
        style: Style of the references (see `WordProblems`). None for a method that reads none.
    """

    method: Literal["opsd", "sft", "grpo"]
    style: str | None = None

    @property
    def tuned(self) -> Arm:
        """Arm whose learning rate is used. References in a foreign style are tuned once, with the terse ones."""
        return Arm(self.method, "terse") if self.style == "formal" else self

    @property
    def name(self) -> str:
        return self.method if self.style is None else f"{self.method}-{self.style}"


ARMS = {
    arm.name: arm
    for arm in (
        Arm("opsd", "own"),
        Arm("sft", "own"),
        Arm("grpo"),
        Arm("opsd", "terse"),
        Arm("sft", "terse"),
        Arm("opsd", "formal"),
        Arm("sft", "formal"),
    )
}

#: Arms that go on to the second task.
SEQUENCE_ARMS = ("opsd-own", "sft-own", "grpo")


@dataclass(frozen=True)
class Scale:
    """Sizes of all runs of a results folder. Results with other sizes are not mixed.

    Args:
        steps: Optimizer steps of a run.
        completions: Completions per step. OPSD and SFT read as many references per step, one for each question.
        group: Completions per question in GRPO.
        max_new_tokens: Length limit of completions on the first task in training.
        eval_max_new_tokens: Length limit of completions on the first task in evaluation.
        validation: Number of validation questions.
        questions: Number of held-out questions of the target task and of its transfer.
        items: Number of items of each set of kept skills.
        second_steps: Optimizer steps on the second task.
        second_completions: Completions per step on the second task.
        second_questions: Number of held-out questions of the second task.
    """

    steps: int = 12
    completions: int = 24
    group: int = 8
    max_new_tokens: int = 64
    eval_max_new_tokens: int = 96
    validation: int = 64
    questions: int = 192
    items: int = 300
    second_steps: int = 8
    second_completions: int = 16
    second_questions: int = 96


#: Sizes for a check of the whole chain on a tiny model.
SMALL = Scale(
    steps=2,
    completions=4,
    group=2,
    max_new_tokens=6,
    eval_max_new_tokens=6,
    validation=4,
    questions=6,
    items=8,
    second_steps=1,
    second_completions=4,
    second_questions=4,
)
