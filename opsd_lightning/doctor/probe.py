"""What only the loaded model can tell: how far teacher and student are apart at first, and how long a step takes.

Nothing is trained: the gradient of one small pass is made, timed and thrown away.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Trainer

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.doctor.findings import Finding
from opsd_lightning.doctor.memory import Step
from opsd_lightning.models.policy import device_of
from opsd_lightning.models.scoring import Scorer, score
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.teachers import Teacher
from opsd_lightning.types import Sampling, TokenStates

#: Tokens of a completion that are looked at.
LOOKED_AT = 16
#: A first token's divergence, in nats, from which on the prompts are likely not to go together; and none at all.
HUGE, NOTHING = 3.0, 1e-4

_SHORT, _LONG = 2, 10  # tokens of the timed rollouts
# A decoding step reads all weights whatever the rows: on two CPU cores 32 rows take 2.1 times as long as 4
# (docs/performance.md), which is this power of their ratio.
_DECODING_GROWTH = 0.36


class Examples(NamedTuple):
    """A few prompts of both roles, with tokens that may follow them.

    Args:
        students: Token ids.
        teachers: Token ids; those of the student where the teacher reads no more.
        completions: Token ids of at least one token.
    """

    students: list[list[int]]
    teachers: list[list[int]]
    completions: list[list[int]]


# -- divergence --------------------------------------------------------------------------------------------------------


@torch.no_grad()
def divergence_facts(module: Any, teacher: Teacher, found: Examples) -> list[dict[str, Any]]:
    """At the first tokens behind both roles' prompts: the divergence, and what each role would write first.

    Args:
        module: A `PolicyModule` with its model.
        teacher: Its teacher.
        found: The prompts.
    """
    model = module.model
    scorer = Scorer(model, module.token_budget)
    student = scorer.score(found.students, found.completions)
    states = teacher.score(scorer, found.teachers, found.completions)
    targets = torch.tensor([t for row in found.completions for t in row], device=device_of(model))
    _, measured = module.objective(student, states, targets, torch.zeros(len(targets), device=targets.device))
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
    """Whether the first token shows that the prompts do not go together, or that the teacher knows nothing more.

    Args:
        facts: Of `divergence_facts`.
        skipped: ``skip_first_tokens`` of the objective.
    """
    first = [line["first_forward_kl"] for line in facts]
    rest = [line["next_forward_kl"] for line in facts if line["next_forward_kl"] is not None]
    mean = sum(first) / len(first)
    if max([*first, *rest]) < NOTHING:
        text = "teacher and student say the same: their divergence is 0 on all examples, and nothing would be learned"
        fix = "is the teacher's context empty? Take TraceContext, and a data.prompts.teacher_template that shows it"
        yield Finding("warning", "divergence", text, "data.context", fix)
    elif mean > HUGE:
        line = max(facts, key=lambda line: line["first_forward_kl"])
        text = (
            f"at a completion's first token the teacher is {mean:.1f} nats from the student: it would begin with "
            f"{line['teacher_first']!r} ({line['teacher_probability']:.0%}), the student with {line['student_first']!r} "
            f"({line['student_probability']:.0%})"
        )
        if skipped:
            yield Finding("note", "divergence", f"{text}; skip_first_tokens leaves {skipped} out")
            return
        fix = (
            "word both prompts alike at their end and give both the same chat_template_kwargs, or set "
            "model.objective.init_args.skip_first_tokens to 1"
        )
        yield Finding("warning", "divergence", text, "data.prompts.teacher_template", fix)


# -- sampling and scoring agree ----------------------------------------------------------------------------------------


def agreement_findings(agreed: int, total: int) -> Iterator[Finding]:
    """Whether what is sampled is what is scored."""
    if agreed < 0.95 * total:
        text = f"of {total} greedily sampled tokens {total - agreed} are not the likeliest when scored"
        fix = "training would learn from another distribution than it samples: try sdpa or eager"
        yield Finding("error", "template", text, "model.policy.attn_implementation", fix)


# -- time --------------------------------------------------------------------------------------------------------------


def time_facts(
    module: Any, teacher: Teacher | None, found: Examples, precision: Callable[[], AbstractContextManager[Any]]
) -> tuple[dict[str, Any], list[list[int]]]:
    """Seconds of a short rollout, a pass of the student forward and backward, and a teacher's, on these few examples.

    Args:
        module: A `PolicyModule` with its model.
        teacher: What scores, if anything does.
        found: What is worked on.
        precision: Makes the context that passes run in.

    Returns:
        Plain numbers, and the greedy completions; none where the engine samples elsewhere.
    """
    rows = len(found.students)
    facts: dict[str, Any] = {"rows": rows, "engine": type(module.rollouts).__name__}
    completions: list[list[int]] = []
    if isinstance(module.rollouts, LocalEngine):
        # The quicker of two each: the first warms up, and other processes may come in between.
        times: dict[int, tuple[float, int]] = {}
        for length in (_SHORT, _LONG, _SHORT, _LONG):
            sampling = Sampling(max_new_tokens=length, temperature=0.0)
            with _Stopwatch() as watch:
                completions = module.rollouts.generate(module.model, found.students, sampling, 0).completions
            took = watch.seconds, max(map(len, completions))
            times[length] = min(times.get(length, took), took)
        (short, few), (long, many) = times[_SHORT], times[_LONG]
        each = (long - short) / (many - few) if many > few and long > short else long / max(many, 1)
        facts |= {"decoding_step_seconds": each, "prompt_seconds": max(short - few * each, 0.0)}
    facts["student_tokens"] = sum(map(len, found.students)) + sum(map(len, found.completions))
    with precision():
        passes = []
        for _ in range(2):
            with _Stopwatch() as watch:
                _forward_backward(module, found)
            passes.append(watch.seconds)
        facts["student_seconds"] = min(passes)
        if teacher is not None:
            with _Stopwatch() as watch:
                teacher.score(Scorer(module.model, module.token_budget), found.teachers, found.completions)
            facts["teacher_seconds"] = watch.seconds
            facts["teacher_tokens"] = sum(map(len, found.teachers)) + sum(map(len, found.completions))
    return facts, completions


def step_seconds(
    facts: dict[str, Any], step: Step, teacher_prompt: float, completion: float, updates: int
) -> dict[str, float]:
    """Seconds of each phase of a step, from measured ones, in proportion to tokens and rows.

    Args:
        facts: Of `time_facts`.
        step: Sizes of the step.
        teacher_prompt: Tokens of a teacher's prompt.
        completion: Tokens of a completion.
        updates: Optimizer steps on a batch.
    """
    found = {}
    if step.rows_at_once and "decoding_step_seconds" in facts:
        found["rollouts"] = decoding_seconds(facts, step.rows, step.rows_at_once, completion)
    tokens = step.rows * (step.prompt + completion)
    found["student"] = updates * facts["student_seconds"] * tokens / facts["student_tokens"]
    if "teacher_seconds" in facts:
        tokens = step.rows * (teacher_prompt + completion)
        found["teacher"] = facts["teacher_seconds"] * tokens / facts["teacher_tokens"]
    return found


def run_facts(
    module: Any, data: OPSDDataModule, trainer: Trainer, step: Step, measured: dict[str, Any], traces: Sequence[int]
) -> dict[str, Any]:
    """Seconds of a step, of all steps and of a validation, from what was measured.

    Args:
        module: A `PolicyModule`.
        data: Set up.
        trainer: As configured.
        step: Sizes of a step.
        measured: Of `time_facts`.
        traces: Their tokens, as an estimate of completions.
    """
    lengths, updates = data.lengths["train"], module.updates_per_batch
    teacher = sum(teacher for _, teacher in lengths) / len(lengths)
    usual = min(sum(traces) / len(traces) if traces else step.completion, step.completion)
    lowest, highest = (step_seconds(measured, step, teacher, length, updates) for length in (usual, step.completion))
    found: dict[str, Any] = {
        "measured": measured,
        "step_seconds": [sum(lowest.values()), sum(highest.values())],
        "phases": highest,
        "usual_completion": usual,
        "longest_completion": step.completion,
    }
    steps = trainer.max_steps
    if steps < 0 and trainer.max_epochs is not None and 0 <= trainer.max_epochs < 1000:
        steps = trainer.max_epochs * (len(data.rows["train"].examples) // (data.batch_size * trainer.world_size)) * updates
    if steps >= 0:
        found |= {"steps": steps, "run_seconds": [seconds * steps / updates for seconds in found["step_seconds"]]}
    if step.eval_rows and "decoding_step_seconds" in measured and "val" in data.rows:
        rows = -(-len(data.rows["val"].examples) // trainer.world_size) * module.evaluator.sampling.n
        roles = 2 if module.evaluator.teacher is not None else 1
        at_once = min(step.rows_at_once or step.eval_rows, step.eval_rows)
        found["validation_seconds"] = roles * decoding_seconds(measured, rows, at_once, step.eval_completion)
    return found


def decoding_seconds(facts: dict[str, Any], rows: int, rows_at_once: int, completion: float) -> float:
    """Seconds of sampling so many completions of that length."""
    at_once = min(rows, rows_at_once)
    growth = max(at_once / facts["rows"], 1.0) ** _DECODING_GROWTH
    decoding = rows / at_once * completion * facts["decoding_step_seconds"] * growth
    return decoding + facts["prompt_seconds"] * rows / facts["rows"]


def _forward_backward(module: Any, found: Examples) -> None:
    student, targets = score(module.model, found.students, found.completions)
    teacher = None
    if module.objective.uses_teacher:  # any states do for a timing: the head's work is the same
        teacher = TokenStates(student.hidden.detach(), student.head)
    weights = torch.full((len(targets),), 1 / max(len(targets), 1), device=targets.device)
    loss, _ = module.objective(student, teacher, targets, weights)
    loss.backward()
    for parameter in module.model.parameters():
        parameter.grad = None


class _Stopwatch:
    """Seconds of what is done inside, the device's work included."""

    seconds = 0.0

    def __enter__(self) -> _Stopwatch:
        self._wait()
        self._start = time.perf_counter()
        return self

    def __exit__(self, *error: object) -> None:
        self._wait()
        self.seconds = time.perf_counter() - self._start

    def _wait(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
