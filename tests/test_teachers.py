"""What each teacher promises, over every subclass."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel

from helpers.classes import subclasses
from helpers.messages import mentions
from helpers.models import COMPLETIONS, PROMPTS, TEACHER_PROMPTS, perturb
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.models.export import write_adapter
from opsd_lightning.models.policy import STUDENT, TEACHER, LoRA, Policy
from opsd_lightning.models.scoring import Scorer, has_adapted_head, score
from opsd_lightning.teachers import (
    EMATeacher,
    FixedTeacher,
    LiveTeacher,
    ModelTeacher,
    SyncTeacher,
    Teacher,
    TrustRegionTeacher,
)
from opsd_lightning.types import ConfigError, UserError

TEACHERS = [FixedTeacher(), LiveTeacher(), EMATeacher(0.5), SyncTeacher(1), TrustRegionTeacher(0.3)]
NAMED = {"ids": lambda teacher: type(teacher).__name__}


def test_every_teacher_is_under_test() -> None:
    assert {
        cls for cls in subclasses(Teacher) if cls.__module__.startswith("opsd_lightning") and not inspect.isabstract(cls)
    } == {type(t) for t in [*TEACHERS, ModelTeacher(), Anchor().teacher]}


def logits(model: PeftModel, teacher: Teacher) -> torch.Tensor:
    states = teacher.score(Scorer(model), TEACHER_PROMPTS, COMPLETIONS)
    return states.head(states.hidden).detach().clone()


def train(model: PeftModel, teacher: Teacher, steps: int) -> list[dict[str, torch.Tensor]]:
    """Real optimizer steps on the student's own log-likelihood; the student's adapter after each."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.05)
    trace = []
    for step in range(1, steps + 1):
        states, targets = score(model, PROMPTS, COMPLETIONS)
        torch.nn.functional.cross_entropy(states.head(states.hidden), targets).backward()
        optimizer.step()
        optimizer.zero_grad()
        teacher.after_step(model, step)
        trace.append({n: p.detach().clone() for n, p in model.named_parameters() if STUDENT in n.split(".")})
    return trace


@pytest.mark.parametrize("teacher", TEACHERS, **NAMED)
@pytest.mark.parametrize("head", [False, True], ids=["", "adapted head"])
def test_teachers_start_as_the_student_and_leave_it_unchanged(
    teacher: Teacher, head: bool, make_policy: Callable[..., Policy]
) -> None:
    """Starts as the student, takes no gradient, has no dropout, and scoring with it leaves the student unchanged."""
    targets = ["q_proj", "v_proj", "lm_head"] if head else "all-linear"
    model = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.5, target_modules=targets)).build()
    assert has_adapted_head(model) == head
    perturb(model)
    teacher.attach(model)
    model.eval()
    with torch.no_grad():
        states, _ = score(model, TEACHER_PROMPTS, COMPLETIONS)
        start = states.head(states.hidden)
    torch.testing.assert_close(logits(model, teacher), start, atol=1e-6, rtol=1e-5)
    model.train()
    assert torch.equal(logits(model, teacher), logits(model, teacher)), "dropout is on in the teacher"
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    flags = {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()}
    found = teacher.score(Scorer(model), TEACHER_PROMPTS, COMPLETIONS)
    assert not found.hidden.requires_grad
    assert model.training and model.active_adapter == STUDENT
    assert {name: (p.requires_grad, p.grad) for name, p in model.named_parameters()} == flags
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
    train(model, teacher, 1)
    assert all(p.grad is None for name, p in model.named_parameters() if STUDENT not in name.split("."))
    changed = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    allowed = {STUDENT, TEACHER} if isinstance(teacher, (EMATeacher, SyncTeacher)) else {STUDENT}
    assert changed and all(allowed & set(name.split(".")) for name in changed)


@pytest.mark.parametrize("start", ["fresh", "trained", "random"])
def test_fixed_teacher_is_bit_identical_after_training(
    start: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Also where training starts from an adapter that already does something: adapter-off would be the wrong model."""
    if start == "fresh":
        model = make_policy().build()
        expected = _plain(make_policy)
    elif start == "trained":
        first = make_policy().build()
        perturb(first)
        model = make_policy(adapter=str(write_adapter(first, tmp_path / "adapter"))).build()
        expected = logits(first.eval(), LiveTeacher())
        assert not torch.allclose(expected, _plain(make_policy))
    else:  # an adapter that does something from the start
        model = make_policy(lora=LoRA(r=4, alpha=4, dropout=0.0, options={"init_lora_weights": False})).build()
        expected = logits(model.eval(), LiveTeacher())
        assert not torch.allclose(expected, _plain(make_policy))
    teacher = FixedTeacher()
    teacher.attach(model)
    at_start = logits(model, teacher)
    torch.testing.assert_close(at_start, expected, atol=1e-4, rtol=1e-4)
    train(model, teacher, 3)
    assert not torch.allclose(logits(model, LiveTeacher()), at_start)
    assert torch.equal(logits(model, teacher), at_start)


def _plain(make_policy: Callable[..., Policy]) -> torch.Tensor:
    """The base model's logits, with no adapter anywhere near."""
    model = make_policy().build()
    return logits(model, FixedTeacher())


@pytest.mark.parametrize(("decay", "every"), [(0.5, 1), (0.9, 2), (0.0, 1), (1.0, 1)])
def test_ema_equals_an_independent_recursion(decay: float, every: int, make_policy: Callable[..., Policy]) -> None:
    model, teacher = make_policy().build(), EMATeacher(decay, every)
    start = {n: p.detach().clone() for n, p in model.named_parameters() if STUDENT in n.split(".")}
    assert any(p.any() for p in start.values()), "an EMA that starts at zeros would go unseen"
    teacher.attach(model)
    expected = {name: p.double() for name, p in start.items()}
    for step, adapter in enumerate(train(model, teacher, 5), start=1):
        if step % every == 0:
            expected = {n: decay * p + (1 - decay) * adapter[n].double() for n, p in expected.items()}
    kept = dict(model.named_parameters())
    for name, value in expected.items():
        ours = kept[name.replace(f".{STUDENT}", f".{TEACHER}")]
        torch.testing.assert_close(ours.detach().double(), value, atol=1e-6, rtol=1e-5)


def test_live_teacher_follows_the_student(make_policy: Callable[..., Policy]) -> None:
    model, teacher = make_policy().build(), LiveTeacher()
    before = logits(model, teacher)
    train(model, teacher, 1)
    states, _ = score(model.eval(), TEACHER_PROMPTS, COMPLETIONS)
    assert torch.equal(logits(model, teacher), states.head(states.hidden)) and not torch.equal(
        before, logits(model, teacher)
    )


def test_sync_teacher_copies_every_some_steps(make_policy: Callable[..., Policy]) -> None:
    model, teacher = make_policy().build(), SyncTeacher(3)
    teacher.attach(model)
    start = logits(model, teacher)
    train(model, teacher, 2)
    assert torch.equal(logits(model, teacher), start)
    train(model, teacher, 3)
    assert torch.equal(logits(model, teacher), logits(model, LiveTeacher())) and not torch.equal(
        logits(model, teacher), start
    )


def test_trust_region_teacher_lies_between(make_policy: Callable[..., Policy]) -> None:
    model, teacher = make_policy().build(), TrustRegionTeacher(0.3)
    teacher.attach(model)
    train(model, teacher, 2)
    fixed, live = logits(model, FixedTeacher()), logits(model, LiveTeacher())
    assert not torch.allclose(fixed, live)
    torch.testing.assert_close(logits(model, teacher), 0.7 * fixed + 0.3 * live, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("kind", [ModelTeacher, FixedTeacher])
@pytest.mark.parametrize("architecture", ["llama", "qwen3"])  # the second ties its head to the embeddings
def test_full_fine_tuning_keeps_a_frozen_copy(kind: Any, architecture: str, make_policy: Callable[..., Policy]) -> None:
    model, teacher = make_policy(architecture, lora=None).build(), kind()
    assert all(p.requires_grad for p in model.parameters())
    teacher.attach(model)
    start = logits(model, teacher)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    states, targets = score(model, PROMPTS, COMPLETIONS)
    torch.nn.functional.cross_entropy(states.head(states.hidden), targets).backward()
    optimizer.step()
    live = logits(model, LiveTeacher())
    assert torch.equal(logits(model, teacher), start) and not torch.allclose(live, start)
    assert torch.equal(logits(model, LiveTeacher()), live)  # the student's weights are back
    with pytest.raises(ConfigError):
        EMATeacher().attach(model)


def test_model_teacher_scores_with_its_own_model(make_policy: Callable[..., Policy], folders: dict[str, str]) -> None:
    policy = make_policy()
    model, teacher = policy.build(), ModelTeacher(folders["qwen3"], dtype="float32")
    teacher.check(policy.load_tokenizer())
    teacher.attach(model)
    other = make_policy("qwen3").build()
    torch.testing.assert_close(logits(model, teacher), logits(other, FixedTeacher()), atol=1e-5, rtol=1e-5)
    with pytest.raises(UserError, match=mentions("ModelTeacher")):
        ModelTeacher().attach(model)
