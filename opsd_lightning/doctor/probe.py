"""Checks that need the loaded model: teacher and student at the first tokens, and sampling against scoring."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch

from opsd_lightning.doctor.findings import Finding
from opsd_lightning.models.policy import device_of
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.teachers import Teacher

#: Tokens of a completion at which the divergence is measured.
LOOKED_AT = 16
#: Tokens that are sampled greedily, and compared with the likeliest tokens when they are scored.
AGREEMENT_TOKENS = 10
#: Divergence of a first token, in nats, above which the prompts probably contradict each other; and below which it is 0.
HUGE, NOTHING = 3.0, 1e-4


class Examples(NamedTuple):
    """A few prompts of both roles, with the first tokens of a completion.

    Args:
        students: Token ids of the student's prompts.
        teachers: Token ids of the teacher's prompts. The student's prompts if the teacher has none of its own.
        completions: Token ids of completions, at least one each.
    """

    students: list[list[int]]
    teachers: list[list[int]]
    completions: list[list[int]]


# -- divergence --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def divergence_facts(module: Any, teacher: Teacher, found: Examples) -> list[dict[str, Any]]:
    """Measure the divergence at the first tokens after both roles' prompts, and find the likeliest first token of each role.

    Args:
        module: A `PolicyModule` with its model.
        teacher: The teacher of the module.
        found: Prompts and completions.
    """
    model = module.model
    scorer = Scorer(model, module.scoring_budget)
    student = scorer.score(found.students, found.completions)
    states = teacher.score(scorer, found.teachers, found.completions)
    targets = torch.tensor([t for row in found.completions for t in row], device=device_of(model))
    _, measured = module.objective(
        student, states, targets, torch.zeros(len(targets), dtype=torch.float32, device=targets.device)
    )
    facts, start = [], 0
    for row in found.completions:
        values = measured["forward_kl"][start : start + len(row)].tolist()
        line: dict[str, Any] = {"first_forward_kl": values[0]}
        line["next_forward_kl"] = sum(values[1:]) / len(values[1:]) if values[1:] else None
        for name, role in (("student", student), ("teacher", states)):
            logprobs = role.head(role.hidden[start : start + 1]).float().log_softmax(-1)[0]
            token = int(logprobs.argmax())
            line[f"{name}_first"] = str(module.tokenizer.decode([token]))
            line[f"{name}_probability"] = float(logprobs[token].exp())
        facts.append(line)
        start += len(row)
    return facts


def divergence_findings(facts: Sequence[dict[str, Any]], skipped: int) -> Iterator[Finding]:
    """Find prompts that contradict each other at the first token, and a teacher that knows no more than the student.

    Args:
        facts: The result of `divergence_facts`.
        skipped: ``skip_first_tokens`` of the objective.
    """
    first = [line["first_forward_kl"] for line in facts]
    rest = [line["next_forward_kl"] for line in facts if line["next_forward_kl"] is not None]
    mean = sum(first) / len(first)
    if max([*first, *rest]) < NOTHING:
        text = "teacher and student predict the same: their divergence is 0 on all examples, and nothing would be learned"
        fix = "if the teacher's context is empty, use TraceContext and a data.prompts.teacher_template that contains it"
        yield Finding("warning", "divergence", text, "data.context", fix)
    elif mean > HUGE:
        line = max(facts, key=lambda line: line["first_forward_kl"])
        text = (
            f"at the first token of a completion the divergence is {mean:.1f} nats: the teacher begins with "
            f"{line['teacher_first']!r} ({line['teacher_probability']:.0%}), the student with {line['student_first']!r} "
            f"({line['student_probability']:.0%})"
        )
        if skipped:
            yield Finding("note", "divergence", f"{text}; skip_first_tokens leaves {skipped} out")
            return
        fix = (
            "end both prompts alike, also with data.prompts.teacher_response_prefix, or set "
            "model.objective.init_args.skip_first_tokens to 1"
        )
        yield Finding("warning", "divergence", text, "data.prompts.teacher_template", fix)


# -- sampling and scoring agree ----------------------------------------------------------------------------------------


def agreement_findings(agreed: int, total: int) -> Iterator[Finding]:
    """Find sampling that disagrees with scoring."""
    if agreed < 0.95 * total:
        text = f"of {total} greedily sampled tokens {total - agreed} are not the likeliest when scored"
        fix = "try sdpa or eager: training would learn from another distribution than it samples from"
        yield Finding("error", "template", text, "model.policy.attn_implementation", fix)
