"""Checks of the data, of lengths, and of settings that contradict each other. They need no model."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

from lightning.pytorch import Trainer
from transformers import PreTrainedTokenizerBase

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.doctor.findings import Finding, at_share, histogram, percent
from opsd_lightning.losses.objectives import Objective
from opsd_lightning.methods.trainer_checks import late_validations, trainer_problems
from opsd_lightning.types import Example, Sampling, UserError
from opsd_lightning.utils.messages import question_key

#: Largest number of traces that are tokenized to estimate the length of completions.
TRACES = 1000

# Setting and fix for each reason for dropping a row. Rows that are too long: see `_to_fit`.
_REMEDIES: dict[DropReason, tuple[str, str]] = {
    DropReason.EMPTY_QUESTION: ("data.{split}.init_args.columns.question", "name the column that holds the problem"),
    DropReason.EMPTY_TRACE: (
        "data.{split}.init_args.columns.trace",
        "name the column that holds the worked solution, or fix the rows",
    ),
    DropReason.EMPTY_CONTEXT: ("data.context", "name a column that is filled, or leave these rows out"),
    DropReason.NO_ANSWER: (
        "data.{split}.init_args.columns.answer",
        "name the column of the reference answer, or that of the trace",
    ),
    DropReason.NO_FINAL_ANSWER: (
        "data.grader",
        "choose the grader of this task, with a pattern that finds the answer, or set data.verify to false for "
        "demonstrations",
    ),
    DropReason.WRONG_ANSWER: (
        "data.{split}.init_args.columns.answer",
        "check that it is the answer's column and data.grader fits it; wrong traces teach wrong steps, so let the rest go",
    ),
    DropReason.HELD_OUT: ("", ""),
    DropReason.TRACE_TOO_LONG: (
        "data.train",
        "leave out the longest traces, or take a model with a longer context: traces that are trained on are not cut",
    ),
}
_TOO_LONG = {DropReason.PROMPT_TOO_LONG, DropReason.TEACHER_TOO_LONG}


class Room(NamedTuple):
    """A context length that prompts and completions must fit.

    Args:
        limit: Context length in tokens.
        completion: Tokens of the longest completion.
        reads_teacher: If True, the teacher's prompts must fit, too.
        owner: The model with this context, for messages.
    """

    limit: int
    completion: int
    reads_teacher: bool = True
    owner: str = "a model"


Rooms = Mapping[str, Sequence[Room]]


def data_facts(data: OPSDDataModule, split: str) -> dict[str, Any]:
    """Count the rows of a split: all, kept, and left out by reason."""
    kept = [question_key(e) for e in data.rows[split].examples] if split in data.rows else []
    dropped: Counter[DropReason] = data.dropped.get(split, Counter())
    repeats = sum(count - 1 for count in Counter(kept).values())
    return {
        "rows": len(kept) + sum(dropped.values()),
        "kept": len(kept),
        "left_out": data.limits[split].texts(dropped) if dropped else {},
        "repeated_questions": repeats,
        "traces_cut": data.traces_cut.get(split, 0),
    }


def data_findings(
    data: OPSDDataModule, split: str, facts: dict[str, Any], refuses: bool, rooms: Rooms, overhead: int
) -> Iterator[Finding]:
    """Find problems in the rows of a split.

    Args:
        data: The data module after ``setup``.
        split: ``train`` or ``val``.
        facts: The result of `data_facts`.
        refuses: If True, an invalid row is an error (``data.on_invalid: error``).
        rooms: Context lengths that prompts and completions of each split must fit.
        overhead: Tokens of the teacher's prompt in addition to the student's prompt and the context.
    """
    total = facts["rows"]
    for reason, count in data.dropped.get(split, Counter()).items():
        if reason in _TOO_LONG and split == "train" and not refuses:
            continue  # see `length_findings`
        setting, fix = _REMEDIES[reason] if reason in _REMEDIES else _to_fit(data, split, rooms, overhead)
        overlap = reason is DropReason.HELD_OUT
        level: Any = "note" if count <= total / 100 or overlap else "warning" if count <= total / 2 else "error"
        if refuses:
            level, fix = "error", f"fix these rows ({fix}), or set data.on_invalid to drop"
        share = f"{count} of {total} rows of data.{split} ({percent(count, total)})"
        text = f"{share} are left out: {data.limits[split].text(reason)}"
        yield Finding(level, "data", text, setting.format(split=split), fix)
    if split in data.rows and data.asks_for_unread_boxes(data.rows[split].examples):
        text = f"the questions of data.{split} ask for a final answer in \\boxed{{}}, and data.grader does not read it"
        fix = "set it to the request that fits the task, or to '{question}'"
        yield Finding("warning", "template", text, "data.prompts.student_template", fix)
    repeats, kept = facts["repeated_questions"], facts["kept"]
    if repeats:
        text = f"{repeats} of {kept} rows of data.{split} ({percent(repeats, kept)}) repeat the question of another"
        fix = "remove the repeats from the source, or keep them if they should weigh more"
        yield Finding("warning" if repeats > kept / 10 else "note", "data", text, f"data.{split}", fix)
    if facts["traces_cut"] > kept / 100:
        cut = facts["traces_cut"]
        text = f"{cut} of {kept} contexts of data.{split} ({percent(cut, kept)}) are cut, and lose the end of the solution"
        fix = "raise it, or use a shorter context, such as AnswerContext"
        yield Finding("warning", "data", text, "data.prompts.max_trace_tokens", fix)


def overlap_findings(data: OPSDDataModule) -> Iterator[Finding]:
    """Find validation questions that are also in the test set."""
    if data.sources["val"] is None or data.sources["test"] is None or "val" not in data.rows:
        return
    try:
        tested = {question_key(example) for example in data.sources["test"].examples()}
    except UserError:  # already found where the training questions were compared with them
        return
    shared = sum(question_key(example) in tested for example in data.rows["val"].examples)
    if shared:
        total = len(data.rows["val"].examples)
        text = f"{shared} of {total} questions of data.val ({percent(shared, total)}) are also in data.test"
        fix = "use separate questions: otherwise validation selects the checkpoint by test questions"
        yield Finding("warning" if shared > total / 10 else "note", "data", text, "data.val", fix)


# -- lengths -----------------------------------------------------------------------------------------------------------


def trace_lengths(tokenizer: PreTrainedTokenizerBase, examples: Sequence[Example]) -> list[int]:
    """Return the lengths of up to `TRACES` evenly spaced traces in tokens, with the token that ends them."""
    step = max(-(-len(examples) // TRACES), 1)
    texts = [example.trace for example in examples[::step] if example.trace]
    return [len(ids) + 1 for ids in tokenizer(texts, add_special_tokens=False)["input_ids"]] if texts else []  # type: ignore[arg-type,misc]


def length_facts(data: OPSDDataModule, limit: int | None, traces: list[int], max_new_tokens: int) -> dict[str, Any]:
    """Summarize the lengths of prompts, including those that are too long, and of traces."""
    pairs = data.lengths.get("train", [])
    room = None if limit is None else limit - data.longest_completion("train")
    return {
        "context": limit,
        "max_new_tokens": max_new_tokens,
        "student_prompts": histogram([student for student, _ in pairs], room),
        "teacher_prompts": histogram([teacher for _, teacher in pairs if teacher], room),
        "traces": histogram(traces, max_new_tokens),
    }


def length_findings(
    data: OPSDDataModule,
    rooms: Rooms,
    overhead: int,
    traces: list[int],
    sampling: Sampling,
    objective: Objective,
    sampled: bool,
) -> Iterator[Finding]:
    """Find prompts and completions that are too long, and settings with which less than 1 % of them are too long.

    Args:
        data: The data module after ``setup``.
        rooms: Context lengths that prompts and completions of each split must fit.
        overhead: Tokens of the teacher's prompt in addition to the student's prompt and the context.
        traces: Tokens of traces (see `trace_lengths`), as an estimate of completions.
        sampling: Sampling in training.
        objective: Objective of the method.
        sampled: If False, the method trains on traces and samples no completions.
    """
    total = len(data.lengths.get("train", []))
    dropped = data.dropped.get("train", Counter())
    unfit = sum(dropped[reason] for reason in _TOO_LONG)
    if unfit:
        text = f"{unfit} of {total} training prompts ({percent(unfit, total)}) do not fit with their completions"
        level: Any = "note" if unfit <= total / 100 else "warning" if unfit <= total / 2 else "error"
        yield Finding(level, "lengths", text, *_to_fit(data, "train", rooms, overhead))
    over = sum(length > sampling.max_new_tokens for length in traces)
    if sampled and over > len(traces) / 100:
        text = (
            f"{percent(over, len(traces))} of the traces are longer than {sampling.max_new_tokens} tokens: if the student's "
            "completions are as long, that many are truncated"
        )
        fix = f"with {at_share(traces, 0.99)} less than 1 % are truncated"
        if objective.include_truncated:
            fix += "; or leave it: truncated completions are trained on, too, as in the paper with its 1024 tokens"
        else:
            fix += ", or set model.objective.init_args.include_truncated to true to train on truncated completions, too"
        yield Finding("warning", "lengths", text, "model.sampling.max_new_tokens", fix)


def _to_fit(data: OPSDDataModule, split: str, rooms: Rooms, overhead: int) -> tuple[str, str]:
    """Return the setting to change, and a fix after which 99 % of a split's prompts fit. Values in the fix are computed from
    the data."""

    def longest(each: Room, of: str) -> int:
        pairs = data.lengths.get(of, [])
        return at_share([max(student, teacher if each.reads_teacher else 0) for student, teacher in pairs], 0.99)

    tight = [each for each in rooms[split] if longest(each, split) + each.completion > each.limit]
    choices: list[tuple[str, str]] = []
    # One value has to serve all splits.
    shorter = min((each.limit - longest(each, of) for of, room in rooms.items() for each in room), default=0)
    if tight and shorter >= min(256, min(each.completion for each in tight) // 2):
        fix = f"lower model.sampling.max_new_tokens (and model.eval_sampling's) to {shorter}"
        choices.append(("model.sampling.max_new_tokens", fix))
    cuts = [_cut_that_fits(student, teacher, rooms[split], overhead) for student, teacher in data.lengths.get(split, [])]
    cut = sorted(cuts)[len(cuts) // 100] - 8 if cuts else 0  # a text may be split into a few more tokens inside a prompt
    if tight and 32 <= cut < math.inf:
        choices.append(("data.prompts.max_trace_tokens", f"set data.prompts.max_trace_tokens to about {cut:.0f}"))
    needed: dict[str, int] = {}
    for each in tight:
        needed[each.owner] = max(needed.get(each.owner, 0), longest(each, split) + each.completion)
    choices += [
        ("model.policy.model", f"take {owner} with a context of {tokens} tokens") for owner, tokens in needed.items()
    ]
    if not choices:
        return f"data.{split}", "shorten or leave out the longest of these rows"
    return choices[0][0], ", or ".join(fix for _, fix in choices) + " to lose less than 1 %"


def _cut_that_fits(student: int, teacher: int, room: Sequence[Room], overhead: int) -> float:
    """Return the largest number of context tokens with which a row fits: inf if no cut is needed, -inf if no cut is
    enough."""
    context = teacher - student - overhead
    cuts = []
    for each in room:
        free = each.limit - each.completion
        reads = each.reads_teacher and teacher > 0
        if student > free:
            cuts.append(-math.inf)
        elif reads and teacher > free:
            cuts.append(free - student - overhead if context > 0 else -math.inf)
    return min(cuts, default=math.inf)


# -- settings ----------------------------------------------------------------------------------------------------------


def setting_findings(module: Any, data: OPSDDataModule, trainer: Trainer, usable: int) -> Iterator[Finding]:
    """Find settings that contradict each other or the data, which Lightning notices late or never.

    Args:
        module: A `PolicyModule`.
        data: The data module after ``setup``.
        trainer: Trainer of the run.
        usable: Number of training rows.
    """
    batches = usable // (data.batch_size * trainer.world_size)
    updates = module.updates_per_batch
    evaluation = module.evaluator.sampling
    validates = data.sources["val"] is not None
    if trainer.max_steps == 0 or trainer.max_epochs == 0:
        yield Finding("error", "settings", "nothing is trained", "trainer.max_steps", "set it above 0, for example to 100")
    if trainer.max_steps > 0 and batches:
        epochs = trainer.max_steps / updates / batches
        if epochs > 10:
            text = f"{trainer.max_steps} steps pass {epochs:.0f} times over the {usable} training questions"
            fix = "lower it, or use more data; OPSD often collapses after a few hundred steps"
            yield Finding("warning", "settings", text, "trainer.max_steps", fix)
    if trainer.max_steps < 0 and (trainer.max_epochs is None or trainer.max_epochs < 0 or trainer.max_epochs >= 1000):
        text, fix = "the run never ends", "set it, for example to 100 as in the paper"
        yield Finding("warning", "settings", text, "trainer.max_steps", fix)
    interval = trainer.val_check_interval
    if validates and isinstance(interval, int) and trainer.check_val_every_n_epoch is not None and 0 < batches < interval:
        text = f"trainer.val_check_interval is {interval}, and an epoch has {batches} batches: Lightning refuses that"
        fix = "set it to null, so that the interval counts batches across epochs"
        yield Finding("error", "settings", text, "trainer.check_val_every_n_epoch", fix)
    for problem in trainer_problems(trainer, module, data):
        yield Finding("error", "settings", problem.problem, problem.setting, problem.fix[:1].lower() + problem.fix[1:])
    for problem in late_validations(trainer, module, data):
        yield Finding("warning", "settings", problem.problem, problem.setting, problem.fix[:1].lower() + problem.fix[1:])
    if module.sampling.temperature == 0 and module.sampling.n > 1:
        text = f"the {module.sampling.n} completions of a question are all the same at temperature 0"
        yield Finding("error", "settings", text, "model.sampling.temperature", "set it to 1, or model.sampling.n to 1")
    samples = validates and module.evaluator.demonstrations is None
    if samples and evaluation.max_new_tokens < module.sampling.max_new_tokens:
        text = (
            f"validation stops a completion at {evaluation.max_new_tokens} tokens, training at "
            f"{module.sampling.max_new_tokens}: answers that come later count as wrong"
        )
        yield Finding("warning", "settings", text, "model.eval_sampling.max_new_tokens", "set it at least as high")


def rate_findings(optimizer: Any) -> Iterator[Finding]:
    """Find a learning rate of 0 and an unusually high one."""
    rates = [group.get("initial_lr", group.get("lr", math.nan)) for group in optimizer.param_groups]
    rates = [float(rate) for rate in rates]
    setting = "model.optimizer.init_args.lr"
    text = f"the learning rate is {max(rates):g}"
    if all(rate == 0 for rate in rates):
        yield Finding("error", "settings", f"{text}: nothing is learned", setting, "raise it, for example to 5e-6")
    elif max(rates) > 5e-3:
        fix = "lower it: the paper uses 5e-6, and small models rarely more than 1e-3"
        yield Finding("warning", "settings", text, setting, fix)
