"""Several optimizer steps on one batch: a teacher's states keep the head that they were scored with."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from helpers.models import COMPLETIONS, PROMPTS, TEACHER_PROMPTS
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import Scorer, score
from opsd_lightning.teachers import EMATeacher, FixedTeacher, LiveTeacher, SyncTeacher, Teacher, TrustRegionTeacher
from opsd_lightning.types import Sampling, TokenStates

ADAPTED = LoRA(r=4, alpha=8, dropout=0.3, target_modules=["q_proj", "up_proj", "lm_head"])


def logits(states: TokenStates) -> Tensor:
    with torch.no_grad():
        return states.head(states.hidden).clone()


@pytest.mark.parametrize(
    ("make", "lora"),
    [
        (FixedTeacher, ADAPTED),
        (LiveTeacher, ADAPTED),
        (lambda: EMATeacher(0.5), ADAPTED),
        (lambda: SyncTeacher(1), ADAPTED),
        (lambda: TrustRegionTeacher(0.4), ADAPTED),
        (LiveTeacher, None),
        (FixedTeacher, None),
        (lambda: TrustRegionTeacher(0.4), None),
    ],
    ids=["fixed", "live", "ema", "sync", "trust region", "live, all", "fixed, all", "trust region, all"],
)
def test_teacher_logits_keep_the_head_of_scoring_time(
    make: Callable[[], Teacher], lora: LoRA | None, make_policy: Callable[..., Policy]
) -> None:
    for keeps in (True, False):
        torch.manual_seed(0)
        model, teacher = make_policy(lora=lora).build(), make()
        teacher.keeps_head = keeps
        teacher.attach(model)
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.3)
        states = teacher.score(Scorer(model), TEACHER_PROMPTS, COMPLETIONS)
        before, trained = logits(states), {n for n, p in model.named_parameters() if p.requires_grad}
        for step in (1, 2):
            student, targets = score(model, PROMPTS, COMPLETIONS)
            torch.nn.functional.cross_entropy(student.head(student.hidden), targets).backward()
            optimizer.step()
            optimizer.zero_grad()
            teacher.after_step(model, step)
        after = logits(states)
        assert torch.equal(before, after) == (keeps or (isinstance(teacher, FixedTeacher) and type(teacher) is FixedTeacher))
        now = logits(teacher.score(Scorer(model), TEACHER_PROMPTS, COMPLETIONS))  # scored again, the teacher has moved
        teacher.keeps_head = not keeps  # at one and the same time, keeping the head changes nothing
        torch.testing.assert_close(logits(teacher.score(Scorer(model), TEACHER_PROMPTS, COMPLETIONS)), now)
        assert torch.equal(now, before) == (type(teacher) is FixedTeacher)
        assert {n for n, p in model.named_parameters() if p.requires_grad} == trained


def test_heads_are_kept_for_several_updates(make_policy: Callable[..., Policy]) -> None:
    sampling = Sampling(max_new_tokens=4)
    for updates in (1, 3):
        teacher = LiveTeacher()
        OPSDModule(make_policy(), teacher=teacher, sampling=sampling, updates_per_batch=updates)
        assert teacher.keeps_head == (updates > 1)
