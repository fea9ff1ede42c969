"""Arguments of commands: mistakes that a user makes, and the files they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

from helpers.files import write_jsonl
from helpers.models import make_model, make_tokenizer
from opsd_lightning.models.export import write_adapter
from opsd_lightning.models.policy import LoRA, Policy


def folder(tmp_path: Path, **changes: object) -> str:
    """Save a model folder with changed tokenizer attributes, and return its path."""
    path = tmp_path / "broken"
    make_model("llama").save_pretrained(path)
    tokenizer = make_tokenizer()
    for name, value in changes.items():
        setattr(tokenizer, name, value)
    tokenizer.save_pretrained(path)
    return str(path)


def foreign_adapter(tmp_path: Path, folders: dict[str, str]) -> str:
    return str(write_adapter(Policy(folders["gpt2"], lora=LoRA(r=2, alpha=2)).build(), tmp_path / "foreign"))


def overlay(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "overlay.yaml"
    path.write_text(text)
    return path


def rows(tmp_path: Path, *extra: dict[str, str]) -> str:
    good = [{"problem": f"{n}?", "solution": f"The answer is {n}.", "gold": str(n)} for n in range(4)]
    return str(write_jsonl(tmp_path / "bad.jsonl", [*good, *extra]))


def row(problem: str = "q", solution: str = "The answer is 5.", gold: str = "5") -> dict[str, str]:
    return {"problem": problem, "solution": solution, "gold": gold}


def strict(path: str) -> list[str]:
    return [f"--data.train.path={path}", "--data.train.split=train", "--data.on_invalid=error"]


class Mistake(NamedTuple):
    """A command line that `opsd fit` refuses.

    Attributes:
        arguments: Returns the arguments, given a folder to write to and the model folders.
        words: Names and numbers that the message must hold, the setting's name first.
        repeats: True if another mistake is refused at the same place and the values are tested in that place's own tests.
    """

    arguments: Callable[[Path, dict[str, str]], list[str]]
    words: list[str]
    repeats: bool = False


MISTAKES = {
    "missing column": Mistake(
        lambda p, f: ["--data.train.columns.trace=proof"],
        ["data.train.init_args.columns.trace", "'proof'", "problem, solution, gold"],
    ),
    "empty trace": Mistake(lambda p, f: strict(rows(p, row(solution=""))), ["data.train", "row 4", "data.on_invalid"]),
    "contradicting trace": Mistake(
        lambda p, f: strict(rows(p, row(gold="6"))), ["data.train", "row 4", "data.on_invalid"], repeats=True
    ),
    "trace without answer": Mistake(
        lambda p, f: strict(rows(p, row(solution="Hm."))),
        ["data.train", "row 4", "data.grader", "data.verify"],
        repeats=True,
    ),
    "prompt too long": Mistake(lambda p, f: strict(rows(p, row("q" * 600))), ["data.train", "row 4", " 512 "], repeats=True),
    "completion too long": Mistake(lambda p, f: ["--model.sampling.max_new_tokens=600"], ["data.val", " 600 ", " 512 "]),
    "shards for one device": Mistake(lambda p, f: [f"--ckpt_path={p}"], ["ckpt_path", "fsdp2"]),
    "missing data file": Mistake(
        lambda p, f: ["--data.train.path=nowhere.jsonl"], ["data.train.init_args.path", "nowhere.jsonl"]
    ),
    "unknown file type": Mistake(
        lambda p, f: ["--data.train.path=rows.txt"],
        ["data.train.init_args.path", "rows.txt", ".jsonl, .json, .parquet, .csv"],
        repeats=True,
    ),
    "unreadable data": Mistake(
        lambda p, f: [f"--data.train.path={(p / 'x.json').write_text('{') and p / 'x.json'}"],
        ["data.train.init_args.path", "x.json", "line 1"],
    ),
    "no training data": Mistake(lambda p, f: ["--data.train=null"], ["data.train"]),
    "batch over the data": Mistake(lambda p, f: ["--data.batch_size=9"], ["data.train", "data.batch_size", " 4 ", " 9 "]),
    "context without its column": Mistake(
        lambda p, f: ["--data.context=ColumnContext", "--data.context.column=tip"],
        ["data.context.column", "'tip'", "problem, solution, gold"],
    ),
    "template without placeholder": Mistake(
        lambda p, f: ["--data.prompts.student_template=hi"], ["data.prompts.student_template", "{question}"]
    ),
    "fsdp of the first kind": Mistake(lambda p, f: ["--trainer.strategy=fsdp"], ["trainer.strategy", "fsdp2"]),
    "deepspeed": Mistake(
        lambda p, f: ["--trainer.strategy=deepspeed_stage_3"],
        ["trainer.strategy", "deepspeed_stage_3", "fsdp2"],
        repeats=True,
    ),
    "sharding left to the module": Mistake(
        lambda p, f: ["--trainer.strategy=ModelParallelStrategy"],
        ["trainer.strategy", "ModelParallelStrategy", "fsdp2"],
        repeats=True,
    ),
    "neither trace nor answer": Mistake(
        lambda p, f: ['--data.val.columns={"trace": null, "answer": null}'], ["data.val", " 4 "]
    ),
    "no trace to train on": Mistake(
        lambda p, f: ['--data.train.columns={"trace": null, "answer": "gold"}'], ["data.train", " 4 "], repeats=True
    ),
    "no trace for a graded teacher": Mistake(
        lambda p, f: ['--data.val.columns={"trace": null, "answer": "gold"}', "--model.evaluate_teacher=true"],
        ["model.evaluate_teacher", "4 of 4", "data.val"],
    ),
    "broken answer pattern": Mistake(
        lambda p, f: ["--data.grader.answer_pattern=("], ["data.grader.init_args.answer_pattern", "'('"]
    ),
    "unknown class": Mistake(lambda p, f: ["--model.teacher=NoSuchTeacher"], ["NoSuchTeacher"]),
    "grader without its settings": Mistake(
        lambda p, f: ["--data.grader=JudgeGrader", "--data.grader.model=judge"],
        ["data.grader.base_url", "JudgeGrader"],
    ),
    "context without its settings": Mistake(
        lambda p, f: ["--data.context=ColumnContext"], ["data.context.init_args.column", "ColumnContext"], repeats=True
    ),
    "unknown setting": Mistake(lambda p, f: ["--model.nonsense=1"], ["nonsense"]),
    "missing config": Mistake(lambda p, f: ["--config=nowhere.yaml"], ["config", "nowhere.yaml"]),
    "missing model folder": Mistake(lambda p, f: ["--model.policy.model=./nowhere"], ["model.policy.model", "./nowhere"]),
    "model not on the hub": Mistake(
        lambda p, f: ["--model.policy.model=nobody/nothing"], ["model.policy.model", "'nobody/nothing'"]
    ),
    "adapter of another model": Mistake(
        lambda p, f: [
            f"--model.policy.adapter={foreign_adapter(p, f)}",
            "--model.policy.lora.r=2",
            "--model.policy.lora.alpha=2",
        ],
        ["model.policy.adapter", "foreign"],
        repeats=True,
    ),
    "adapter and other settings": Mistake(
        lambda p, f: [f"--model.policy.adapter={foreign_adapter(p, f)}"],
        ["model.policy.adapter", "model.policy.lora", " 2 ", " 4 "],
    ),
    "monitor of another k": Mistake(
        lambda p, f: ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/avg@4"],
        ["model.eval_sampling.n", "val/avg@4", "val/avg@1"],
    ),
    "monitor of a teacher that is not graded": Mistake(
        lambda p, f: ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/teacher_avg@1"],
        ["model.evaluate_teacher", "val/teacher_avg@1"],
    ),
    "missing adapter": Mistake(lambda p, f: ["--model.policy.adapter=./nowhere"], ["model.policy.adapter", "./nowhere"]),
    "no chat template": Mistake(
        lambda p, f: [f"--model.policy.model={folder(p, chat_template=None)}"], ["model.policy.chat_template", "broken"]
    ),
    "no pad token": Mistake(
        lambda p, f: [f"--model.policy.model={folder(p, pad_token=None)}"],
        ["model.policy.pad_token", "'<|im_end|>'"],
        repeats=True,
    ),
    "LoRA targets": Mistake(lambda p, f: ["--model.policy.lora.target_modules=[nope]"], ["model.policy.lora", "nope"]),
    "EMA without an adapter": Mistake(
        lambda p, f: [f"--config={overlay(p, 'model: {policy: {lora: null}, teacher: EMATeacher}')}"],
        ["model.teacher", "model.policy.lora", "FixedTeacher"],
    ),
    "rank zero": Mistake(lambda p, f: ["--model.policy.lora.r=0"], ["policy.lora", "r"], repeats=True),
    "EMA decay": Mistake(lambda p, f: ["--model.teacher=EMATeacher", "--model.teacher.decay=1.5"], ["decay"]),
    "beta": Mistake(
        lambda p, f: ["--model.objective.divergence=GeneralizedJSD", "--model.objective.divergence.beta=-1"],
        ["beta"],
        repeats=True,
    ),
    "top-k over the vocabulary": Mistake(
        lambda p, f: ["--model.objective.support=TopKWithTail", "--model.objective.support.k=999"],
        ["model.objective.support.k", "999", " 107 "],
    ),
    "negative temperature": Mistake(lambda p, f: ["--model.sampling.temperature=-1"], ["temperature"], repeats=True),
    "accumulate_grad_batches": Mistake(
        lambda p, f: ["--trainer.accumulate_grad_batches=4"], ["trainer.accumulate_grad_batches", "data.batch_size"]
    ),
    "gradient_clip_val": Mistake(
        lambda p, f: ["--trainer.gradient_clip_val=1"], ["trainer.gradient_clip_val", "model.max_grad_norm"]
    ),
    "missing checkpoint": Mistake(lambda p, f: ["--ckpt_path=nowhere.ckpt"], ["ckpt_path", "nowhere.ckpt"], repeats=True),
    "quantized GGUF": Mistake(
        lambda p, f: [
            f"--model.policy.model={(p / 'm.gguf').write_bytes(b'') or p}/m.gguf",
            "--model.policy.quantization=transformers.BitsAndBytesConfig",
        ],
        ["model.policy.quantization", ".gguf"],
    ),
    "schedule too short": Mistake(
        lambda p, f: [
            "--model.lr_scheduler=OneCycleLR",
            "--model.lr_scheduler.max_lr=0.1",
            "--model.lr_scheduler.total_steps=1",
        ],
        ["model.lr_scheduler", "total_steps", "trainer.max_steps"],
    ),
    "schedule by a metric": Mistake(lambda p, f: ["--model.lr_scheduler=ReduceLROnPlateau"], ["ReduceLROnPlateau"]),
    "a step budget in the data": Mistake(lambda p, f: ["--trainer.max_steps=two"], ["trainer.max_steps", "two"]),
}
