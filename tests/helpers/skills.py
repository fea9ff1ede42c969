"""Small skill sets on the tiny models, and their values computed with plain transformers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from opsd_lightning.data.sources import ExampleSource, WordProblems
from opsd_lightning.data.task_sources import CategoryQuestions
from opsd_lightning.evaluation.skill_sets import BaseDivergence, ChoicesByLikelihood, GradedCompletions
from opsd_lightning.evaluation.skills import SkillSet
from opsd_lightning.grading.base import Grade, Grader
from opsd_lightning.types import Example


class Rows(ExampleSource):
    def __init__(self, rows: Sequence[Example]) -> None:
        self.rows = rows

    def examples(self) -> list[Example]:
        return list(self.rows)


class Digits(Grader):
    """Scores the share of digits in a completion, which differs between the completions of random models."""

    def grade(self, completion: str, example: Example) -> Grade:
        return Grade(sum(map(str.isdigit, completion)) / max(len(completion), 1), answer=completion)


def skill_sets(items: int = 5) -> dict[str, SkillSet]:
    """Return one set of each class of the package."""
    return {
        "facts": ChoicesByLikelihood(CategoryQuestions(size=items, seed=7), batch_size=2),
        "digits": GradedCompletions(WordProblems(size=items, seed=8), Digits(), max_new_tokens=6, batch_size=2),
        "drift": BaseDivergence(WordProblems(size=items, seed=9), max_new_tokens=6, batch_size=2),
    }


@torch.no_grad()
def token_logprobs(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> Tensor:
    """Return the log-probabilities over the vocabulary at each completion token, of shape [C, V]."""
    logits = model.eval()(torch.tensor([[*prompt, *completion]])).logits[0]
    return torch.log_softmax(logits[len(prompt) - 1 : -1].double(), dim=-1)


def sum_logprob(model: Any, prompt: Sequence[int], completion: Sequence[int]) -> float:
    found = token_logprobs(model, prompt, completion)
    return float(found[torch.arange(len(completion)), torch.tensor(completion)].sum())


def records(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
