"""Completions of the same few training questions at each shown step of the token page.

A question is sampled with the same random numbers at each step, so that only the change of the weights changes its
completion. Random generators, weights, logged values and counters of the run stay as they are.
"""

from __future__ import annotations

import random
from dataclasses import replace

import torch
from lightning.pytorch import LightningModule, Trainer

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.reports.token_data import TOP, MeasuredCompletion
from opsd_lightning.reports.token_scores import measure_completions
from opsd_lightning.rollouts.base import Demand, seed_for
from opsd_lightning.types import ConfigError, PromptBatch

_SETTING = "trainer.callbacks.repeated_questions"


class RepeatedQuestions:
    """A few training questions, and their completions at any step.

    Args:
        trainer: The trainer, once its data is read.
        module: Module of the run. Its seed chooses the questions.
        count: Number of questions, at least 1. All if there are fewer.

    Raises:
        ConfigError: The run has no data module with training questions, the module has a teacher of its own and no
            ``term_of``, or a completion does not fit the model's context.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, count: int) -> None:
        data = getattr(trainer, "datamodule", None)
        rows = data.rows.get("train") if isinstance(data, OPSDDataModule) else None
        if not isinstance(module, PolicyModule) or rows is None:
            raise ConfigError(
                f"it is {count}, and the questions are those of an OPSDDataModule, which this run does not have",
                _SETTING,
                "Pass one as datamodule, or set it to 0",
            )
        if module.objective.uses_teacher and type(module).term_of is PolicyModule.term_of:
            raise ConfigError(
                f"it is {count}, and {type(module).__name__} does not define how its teacher scores such completions",
                _SETTING,
                f"Define {type(module).__name__}.term_of, or set it to 0",
            )
        self.questions = choose_questions(rows, count, module.seed)
        self.sampling = replace(module.sampling, n=module.completions_per_context)
        needed, limit = self.demand().tokens, module.policy.context_length()
        if limit is not None and needed > limit:  # for methods that do not sample in training
            raise ConfigError(
                f"a question and its completion need {needed} tokens, and the model reads {limit}",
                _SETTING,
                "Lower model.sampling.max_new_tokens, or set it to 0",
            )

    def demand(self) -> Demand:
        """Return the largest rollout of the questions."""
        longest = max(map(len, self.questions.student))
        return Demand(longest + self.sampling.max_new_tokens, len(self.questions.student) * self.sampling.n)

    @torch.no_grad()
    def measure(self, trainer: Trainer, module: PolicyModule) -> list[MeasuredCompletion]:
        """Sample each question with the current weights, and score it with both roles. Call it on every rank.

        Of several completions of a question, from which the teacher's context is made, the first one is returned.
        """
        batch = self.questions
        with trainer.precision_plugin.forward_context():
            rollouts = module.rollouts.generate(
                module.model, batch.student, self.sampling, seed_for(module.seed, "repeated questions")
            )
            term = module.term_of(batch, rollouts)
            prompts = [prompt for prompt in batch.student for _ in range(rollouts.n)]
            measured, scores = measure_completions(module.scorer, term, prompts, rollouts.completions, TOP)
        return [
            MeasuredCompletion(
                number,
                example,
                rollouts.completions[row],
                rollouts.terminated[row],
                prompts[row],
                None if term.teacher_prompts is None else term.teacher_prompts[row],
                term.weights[row],
                measured[row],
                scores[row],
                repeated=True,
            )
            for number, (row, example) in enumerate(zip(range(0, len(prompts), rollouts.n), batch.examples, strict=True))
        ]


def choose_questions(rows: PromptBatch, count: int, seed: int) -> PromptBatch:
    """Return different questions, the same for the same rows and seed. A larger count adds questions.

    Args:
        rows: All training questions.
        count: Number of questions to return. All if there are fewer.
        seed: Seed of the choice.
    """
    order = list(range(len(rows.examples)))
    random.Random(f"repeated questions {seed}").shuffle(order)
    first: dict[str, int] = {}  # a question may have several traces
    for i in order:
        first.setdefault(rows.examples[i].question, i)
    chosen = list(first.values())[:count]
    return PromptBatch(
        [rows.student[i] for i in chosen],
        [rows.teacher[i] for i in chosen],
        [rows.examples[i] for i in chosen],
        [True] * len(chosen),
    )
