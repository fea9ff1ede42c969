"""A batch of N rows gives what N batches of one row give, and the rollout is what plain greedy decoding gives."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from peft import PeftModel

from helpers.models import ARCHITECTURES, COMPLETIONS, EOS, PROMPTS, SECOND_EOS, TEACHER_PROMPTS, perturb
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.models.scoring import Scorer, check_head, score
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher, LiveTeacher, Teacher
from opsd_lightning.types import Sampling

TOLERANCE = {"atol": 1e-5, "rtol": 1e-5}


def plain_logits(model: PeftModel, prompt: list[int], completion: list[int]) -> torch.Tensor:
    """Logits that predict a completion, from one unpadded call of the model itself."""
    logits = model(input_ids=torch.tensor([prompt + completion])).logits[0]
    return logits[len(prompt) - 1 : len(prompt) + len(completion) - 1]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_student_scores_are_independent_of_the_batch(architecture: str, built: Callable[..., PeftModel]) -> None:
    model = built(architecture)
    check_head(model)
    states, targets = score(model, PROMPTS, COMPLETIONS)
    expected = torch.cat([plain_logits(model, p, c) for p, c in zip(PROMPTS, COMPLETIONS, strict=True)])
    torch.testing.assert_close(states.head(states.hidden), expected, **TOLERANCE)
    assert targets.tolist() == [token for completion in COMPLETIONS for token in completion]


@pytest.mark.parametrize("teacher", [FixedTeacher(), LiveTeacher(), EMATeacher()], ids=lambda t: type(t).__name__)
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_teacher_scores_are_independent_of_the_batch(
    architecture: str, teacher: Teacher, make_policy: Callable[..., object]
) -> None:
    model = make_policy(architecture).build()  # type: ignore[attr-defined]
    perturb(model, seed=3)
    teacher.attach(model)
    perturb(model, seed=4)
    states = teacher.score(Scorer(model), TEACHER_PROMPTS, COMPLETIONS)
    with torch.no_grad(), teacher.weights(model):
        expected = [plain_logits(model, p, c) for p, c in zip(TEACHER_PROMPTS, COMPLETIONS, strict=True)]
    torch.testing.assert_close(states.head(states.hidden), torch.cat(expected), **TOLERANCE)
    assert not states.hidden.requires_grad


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_loss_and_gradients_are_independent_of_the_batch(architecture: str, built: Callable[..., PeftModel]) -> None:
    model, teacher, objective = built(architecture), FixedTeacher(), DivergenceObjective()
    weights = torch.full((sum(map(len, COMPLETIONS)),), 1 / 9)

    def gradient(rows: list[list[int]]) -> tuple[float, list[torch.Tensor]]:
        model.zero_grad()
        total, position = 0.0, 0
        for picked in rows:
            prompts, teachers, completions = ([x[i] for i in picked] for x in (PROMPTS, TEACHER_PROMPTS, COMPLETIONS))
            tokens = sum(map(len, completions))
            target_states = teacher.score(Scorer(model), teachers, completions)
            states, targets = score(model, prompts, completions)
            loss, _ = objective(states, target_states, targets, weights[position : position + tokens])
            loss.backward()
            total, position = total + float(loss.detach()), position + tokens
        return total, [p.grad.clone() for p in model.parameters() if p.requires_grad and p.grad is not None]

    (one, gradients), (many, expected) = gradient([[0, 1, 2]]), gradient([[0], [1], [2]])
    assert one == pytest.approx(many, rel=1e-5)
    assert len(gradients) == len(expected) > 0
    for ours, theirs in zip(gradients, expected, strict=True):
        torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_rollouts_are_independent_of_the_batch(architecture: str, built: Callable[..., PeftModel]) -> None:
    model, engine, sampling = built(architecture), TransformersEngine(), Sampling(max_new_tokens=20, temperature=0)
    together = engine.generate(model, PROMPTS, sampling, seed=0)
    alone = [engine.generate(model, [prompt], sampling, seed=0) for prompt in PROMPTS]
    two_calls = TransformersEngine(max_rows=2).generate(model, PROMPTS, sampling, seed=0)
    assert together.completions == [rollouts.completions[0] for rollouts in alone] == two_calls.completions
    model.eval()
    for prompt, completion, terminated in zip(PROMPTS, together.completions, together.terminated, strict=True):
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 20 and (len(ids) == len(prompt) or ids[-1] not in (EOS, SECOND_EOS)):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        assert completion == ids[len(prompt) :]
        assert terminated == (ids[-1] in (EOS, SECOND_EOS))
