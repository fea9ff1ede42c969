"""Tests of skill sets: values against plain transformers, division of texts into tokens, and refused items."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback

from helpers.classes import subclasses
from helpers.models import EOS, SECOND_EOS, perturb
from helpers.skills import Digits, Rows, skill_sets, sum_logprob, token_logprobs
from helpers.training import parts, trainer
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.data.task_sources import CategoryQuestions
from opsd_lightning.evaluation.skill_sets import BaseDivergence, ChoicesByLikelihood, GradedCompletions
from opsd_lightning.evaluation.skills import SkillResult, SkillSet, measure_skill
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import Example

MakePolicy = Callable[..., Policy]
FOUR = Example("Which is a fruit?", "", "C", {"options": ["a horse", "red", "a fig", "fig trees"]})


class _Measure(Callback):
    """Callback that runs a function in a test, where a trainer is there."""

    def __init__(self, work: Callable[[Any], Any]) -> None:
        self.work = work
        self.found: Any = None

    def on_test_start(self, trainer: Any, pl_module: Any) -> None:
        perturb(pl_module.model)
        self.found = self.work(pl_module)


def in_a_test(policy: Policy, folder: Path, work: Callable[[Any], Any], **settings: Any) -> Any:
    """Run a function on a module whose adapter is not at its start, inside a test."""
    torch.manual_seed(0)
    callback = _Measure(work)
    module, data = parts(policy, **settings)
    trainer(folder, callback, logger=False).test(module, data, verbose=False)
    return callback.found


def measured(policy: Policy, folder: Path, skills: SkillSet, base: bool = False, **settings: Any) -> tuple[SkillResult, Any]:
    skills.setup(policy)
    return in_a_test(policy, folder, lambda module: (measure_skill(module, skills, base), module), **settings)


@contextmanager
def weights(module: Any, base: bool) -> Iterator[Any]:
    if base:
        with module.model.disable_adapter():
            yield module.model
    else:
        yield module.model


def test_every_set_is_in_the_helpers() -> None:
    own = {cls for cls in subclasses(SkillSet) if cls.__module__.startswith("opsd_lightning.")}
    assert own == {type(skills) for skills in skill_sets().values()}


@pytest.mark.parametrize("normalization", ["none", "tokens", "characters", "bytes"])
@pytest.mark.parametrize("base", [False, True])
def test_choices_have_the_highest_log_probability(
    normalization: Any, base: bool, make_policy: MakePolicy, tmp_path: Path
) -> None:
    policy = make_policy()
    rows = [*CategoryQuestions(size=5, seed=7).examples(), FOUR, FOUR._replace(columns={"options": ["é" * 9, "ab", "abc"]})]
    skills = ChoicesByLikelihood(Rows(rows), normalization=normalization, batch_size=3)
    result, module = measured(policy, tmp_path, skills, base, token_budget=400)
    prompts = Prompts("{question}")
    for example, item in zip(rows, result.items, strict=True):
        options = item.details["options"]
        with weights(module, base) as model:
            sums = {
                label: sum_logprob(
                    model,
                    prompts.student(module.tokenizer, example),
                    module.tokenizer.encode(text, add_special_tokens=False),
                )
                for label, text in options.items()
            }
        assert item.details["logprobs"] == pytest.approx(sums, rel=1e-4)
        length = {"none": lambda text: 1, "bytes": lambda text: len(text.encode())}.get(normalization, len)  # type: ignore[arg-type]
        chosen = max(options, key=lambda label: sums[label] / length(options[label]))
        assert item.details["choice"] == chosen
        assert item.score == float(chosen == example.answer)
    assert result.value == sum(item.score for item in result.items) / len(rows)


def test_labels_can_be_scored(make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = ChoicesByLikelihood(CategoryQuestions(size=2, seed=7), scored="label")
    result, module = measured(make_policy(), tmp_path, skills)
    prompt = Prompts("{question}").student(module.tokenizer, skills.examples[0])
    expected = {label: sum_logprob(module.model, prompt, module.tokenizer.encode(label)) for label in "ABCD"}
    assert result.items[0].details["logprobs"] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("base", [False, True])
def test_completions_are_greedy_and_graded(base: bool, make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = GradedCompletions(WordProblems(size=5, seed=8), Digits(), max_new_tokens=6, batch_size=2)
    result, module = measured(make_policy(), tmp_path, skills, base)
    for example, item in zip(skills.examples, result.items, strict=True):
        prompt = list(Prompts("{question}").student(module.tokenizer, example))
        completion: list[int] = []
        with weights(module, base) as model:
            while len(completion) < 6 and not {EOS, SECOND_EOS} & set(completion):
                completion.append(int(model(torch.tensor([[*prompt, *completion]])).logits[0, -1].argmax()))
        text = module.tokenizer.decode(completion, skip_special_tokens=True)
        assert item.details["completion"] == text
        assert item.score == Digits().grade(text, example).score


@pytest.mark.parametrize("architecture", ["llama", "gpt2"])
def test_divergence_is_that_of_base_from_run(architecture: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    skills = BaseDivergence(WordProblems(size=5, seed=9), max_new_tokens=6, batch_size=2)
    answers = GradedCompletions(WordProblems(size=5, seed=9), Digits(), max_new_tokens=6)
    policy = make_policy(architecture)
    skills.setup(policy)
    answers.setup(policy)
    (result, again, of_base), module = in_a_test(
        policy,
        tmp_path,
        lambda module: (
            (measure_skill(module, skills), measure_skill(module, skills), measure_skill(module, answers, base=True)),
            module,
        ),
    )
    assert result == again
    texts = [[item.details["completion"] for item in each.items] for each in (result, of_base)]
    assert texts[0] == texts[1]
    expected = 0.0
    for place, example in enumerate(skills.examples):
        prompt = Prompts("{question}").student(module.tokenizer, example)
        completion = skills._answers[place][0]
        ours = token_logprobs(module.model, prompt, completion)
        with weights(module, base=True) as model:
            theirs = token_logprobs(model, prompt, completion)
        kl = float((theirs.exp() * (theirs - ours)).sum())
        assert result.items[place].score == pytest.approx(kl, rel=1e-3)
        expected += kl
    tokens = sum(len(answer) for answer, _ in skills._answers.values())
    assert result.units == tokens
    assert result.value == pytest.approx(expected / tokens, rel=1e-3)
    assert result.value > 1e-3
