"""Help of ``opsd fit``, ``validate``, ``test`` and ``predict``: the most used settings, then all settings in groups."""

from __future__ import annotations

from argparse import RawDescriptionHelpFormatter
from collections.abc import Sequence
from typing import Any

from jsonargparse import DefaultHelpFormatter

_WIDTH = 36  # of the first column of the most used settings

_FIRST = (
    ("-c, --config FILE", "YAML file of settings; later files and options override earlier ones"),
    ("--model.policy.model MODEL", "Hugging Face id, folder or .gguf file of the model"),
)
_LAST = (
    ("--trainer.default_root_dir FOLDER", "folder of everything that is written"),
    ("--print_config", "print all settings as YAML that runs, and exit"),
    ("--model.help CLASS", "settings of a method, such as OPSDModule"),
    ("--model.teacher.help CLASS", "settings of a part, such as EMATeacher; so for every part"),
)
_EVALUATION = (
    ("--ckpt_path FILE", "checkpoint to evaluate; the untrained model without it"),
    ("--model.policy.adapter FOLDER", "exported adapter to evaluate, instead of a checkpoint"),
    ("--model.eval_sampling.n N", "completions a question"),
    ("--model.eval_sampling.temperature T", "0 for greedy decoding"),
    ("--data.grader GRADER", "MathGrader (default), ChoiceGrader, ExactMatch, JudgeGrader, ..."),
    ("--data.eval_batch_size N", "questions in a batch"),
)
_DATA = (
    ("--data.{split} SOURCE", "HubSource, FileSource, WordProblems, ... of the questions"),
    ("--data.{split}.path PATH", "file of FileSource, or data set of HubSource"),
)

#: The most used settings of each command and their meaning.
MOST_USED: dict[str, Sequence[tuple[str, str]]] = {
    "fit": (
        *_FIRST,
        ("--model METHOD", "OPSDModule (default), SFTModule, GRPOModule, MixedOPSDModule"),
        ("--model.teacher TEACHER", "FixedTeacher (default), EMATeacher, LiveTeacher, ..."),
        ("--model.optimizer.lr RATE", "learning rate"),
        ("--model.sampling.max_new_tokens N", "longest completion in training, in tokens"),
        *((name.format(split="train"), text) for name, text in _DATA),
        ("--data.batch_size N", "questions of an optimizer step"),
        ("--trainer.max_steps N", "number of optimizer steps"),
        ("--trainer.precision PRECISION", "bf16-mixed on a GPU, 32-true on a CPU"),
        ("--trainer.devices N", "number of GPUs, with --trainer.strategy ddp or fsdp2"),
        ("--ckpt_path FILE", "checkpoint to resume from"),
        *_LAST,
    ),
    "validate": (*_FIRST, *((name.format(split="val"), text) for name, text in _DATA), *_EVALUATION, *_LAST),
    "test": (
        *_FIRST,
        *((name.format(split="test"), text) for name, text in _DATA),
        *_EVALUATION,
        ("--model.evaluate_teacher true", "also grade the teacher's own completions"),
        *_LAST,
    ),
    "predict": (*_FIRST, *((name.format(split="test"), text) for name, text in _DATA), *_EVALUATION, *_LAST),
}

# Headings of the groups, in order. The key is the beginning of the names of a group's settings.
_HEADINGS = {
    "": "general options",
    "ckpt_path": "checkpoint",
    "model": "method, model, teacher, objective, rollouts, optimizer (--model)",
    "data": "questions, context and grader (--data)",
    "data.prompts": "prompts of both roles (--data.prompts)",
    "writer": "files of test and predict (--writer)",
    "trainer": "steps, devices, precision, logs, callbacks (--trainer, of PyTorch Lightning)",
    "linked": "settings that follow others",
}


class HelpFormatter(RawDescriptionHelpFormatter, DefaultHelpFormatter):
    """The formatter of jsonargparse, which also keeps the line breaks of descriptions."""


def arrange(parser: Any, command: str, summary: str) -> None:
    """Set the usage of a command's parser, add its most used settings, and put all settings in groups with headings.

    Args:
        parser: The parser, with all its settings.
        command: The command.
        summary: Description of the command.
    """
    parser.usage = f"opsd {command} [-c FILE ...] [--SETTING VALUE ...]"
    parser.description = summary
    lines = [f"{name:{_WIDTH}} {text}" for name, text in MOST_USED[command]]
    most_used = parser.add_argument_group("most used settings", "\n".join(lines))
    groups = [group for group in parser._action_groups if group is not most_used]
    order = list(_HEADINGS)
    for group in groups:
        if (key := _key(group)) is not None:
            group.title, group.description = _HEADINGS[key], None
    groups.sort(key=lambda group: order.index(_key(group) or ""))
    parser._action_groups[:] = [most_used, *groups]


def _key(group: Any) -> str | None:
    """Return the key of a group's heading. None for a group without settings."""
    names = [str(action.dest) for action in group._group_actions]
    if not names:
        return None
    if "ckpt_path" in names:
        return "ckpt_path"
    if (group.title or "").startswith("Linked") or group.title == _HEADINGS["linked"]:
        return "linked"
    if all(name.startswith("data.prompts") for name in names):
        return "data.prompts"
    first = names[-1].partition(".")[0]
    return first if first in _HEADINGS else ""
