"""Arguments of commands: mistakes that a user makes, and the files they need."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from helpers.files import write_jsonl
from helpers.models import make_model, make_tokenizer
from opsd_lightning.models.export import write_adapter
from opsd_lightning.models.policy import LoRA, Policy


def folder(tmp_path: Path, **changes: object) -> str:
    """A model folder whose tokenizer lacks something."""
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


Mistake = tuple[Callable[[Path, dict[str, str]], list[str]], str]
MISTAKES: dict[str, Mistake] = {
    "missing column": (lambda p, f: ["--data.train.columns.trace=proof"], r"no column 'proof' \(columns.trace\); it has problem"),
    "empty trace": (lambda p, f: strict(rows(p, row(solution=""))), r"data\.train, row 4: empty trace"),
    "contradicting trace": (lambda p, f: strict(rows(p, row(gold="6"))), "row 4: trace contradicts the reference answer"),
    "trace without answer": (lambda p, f: strict(rows(p, row(solution="Hm."))), "row 4: trace has no final answer"),
    "prompt too long": (lambda p, f: strict(rows(p, row("q" * 600))), "do not fit the model's context of 512 tokens"),
    "completion too long": (lambda p, f: ["--model.sampling.max_new_tokens=600"], "no usable row of 4 .*do not fit"),
    "shards for one device": (lambda p, f: [f"--ckpt_path={p}"], "folder of shards, which only trainer.strategy fsdp2 reads"),
    "missing data file": (lambda p, f: ["--data.train.path=nowhere.jsonl"], "path: nowhere.jsonl does not exist"),
    "unknown file type": (lambda p, f: ["--data.train.path=rows.txt"], "does not end in one of .jsonl"),
    "unreadable data": (lambda p, f: [f"--data.train.path={(p / 'x.json').write_text('{') and p / 'x.json'}"], "x.json, line 1: no JSON"),
    "no training data": (lambda p, f: ["--data.train=null"], r"data\.train: .* not set"),
    "batch over the data": (lambda p, f: ["--data.batch_size=9"], r"data\.batch_size: .* 9 questions"),
    "context without its column": (
        lambda p, f: ["--data.context=ColumnContext", "--data.context.column=tip"], r"data\.context\.column: .* 'tip'",
    ),
    "template without placeholder": (lambda p, f: ["--data.prompts.student_template=hi"], r"data\.prompts\.student_template: "),
    "fsdp of the first kind": (lambda p, f: ["--trainer.strategy=fsdp"], "Use fsdp2"),
    "deepspeed": (lambda p, f: ["--trainer.strategy=deepspeed_stage_3"], "Use fsdp2"),
    "sharding left to the module": (lambda p, f: ["--trainer.strategy=ModelParallelStrategy"], "use fsdp2"),
    "neither trace nor answer": (
        lambda p, f: ['--data.val.columns={"trace": null, "answer": null}'], "no usable row of 4 .*neither trace nor answer",
    ),
    "no trace to train on": (lambda p, f: ['--data.train.columns={"trace": null, "answer": "gold"}'], "no usable row of 4 .*empty trace"),
    "no trace for a graded teacher": (
        lambda p, f: ['--data.val.columns={"trace": null, "answer": "gold"}', "--model.evaluate_teacher=true"],
        r"model\.evaluate_teacher: 4 of 4 questions of data\.val ",
    ),
    "broken answer pattern": (lambda p, f: ["--data.grader.answer_pattern=("], "is not a regular expression"),
    "unknown class": (lambda p, f: ["--model.teacher=NoSuchTeacher"], "NoSuchTeacher"),
    "unknown setting": (lambda p, f: ["--model.nonsense=1"], "nonsense"),
    "missing config": (lambda p, f: ["--config=nowhere.yaml"], "nowhere.yaml"),
    "missing model folder": (lambda p, f: ["--model.policy.model=./nowhere"], r"model\.policy\.model: ./nowhere does not exist"),
    "model not on the hub": (lambda p, f: ["--model.policy.model=nobody/nothing"], "cannot load 'nobody/nothing'"),
    "adapter of another model": (
        lambda p, f: [f"--model.policy.adapter={foreign_adapter(p, f)}", "--model.policy.lora.r=2", "--model.policy.lora.alpha=2"],
        "was made for another model",
    ),
    "adapter and other settings": (
        lambda p, f: [f"--model.policy.adapter={foreign_adapter(p, f)}"], r"brings r = 2 and alpha = 2; model\.policy\.lora says 4",
    ),
    "monitor of another k": (
        lambda p, f: ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/avg@4"],
        r"model\.eval_sampling\.n: ModelCheckpoint monitors val/avg@4, and validation samples 1 .*\. Set it to 4, or",
    ),
    "monitor of a teacher that is not graded": (
        lambda p, f: ["--trainer.callbacks=ModelCheckpoint", "--trainer.callbacks.monitor=val/teacher_avg@1"],
        r"model\.evaluate_teacher: .*the teacher is not graded\. Set it to true",
    ),
    "missing adapter": (lambda p, f: ["--model.policy.adapter=./nowhere"], "is not a LoRA adapter's folder or id"),
    "no chat template": (lambda p, f: [f"--model.policy.model={folder(p, chat_template=None)}"], "has no chat template"),
    "no pad token": (lambda p, f: [f"--model.policy.model={folder(p, pad_token=None)}"], r"set model\.policy\.pad_token"),
    "LoRA targets": (lambda p, f: ["--model.policy.lora.target_modules=[nope]"], r"model\.policy\.lora: .*nope"),
    "EMA without an adapter": (
        lambda p, f: [f"--config={overlay(p, 'model: {policy: {lora: null}, teacher: EMATeacher}')}"],
        r"model\.teacher: .* model\.policy\.lora is null .*FixedTeacher",
    ),
    "rank zero": (lambda p, f: ["--model.policy.lora.r=0"], r"policy\.lora\.r"),
    "EMA decay": (lambda p, f: ["--model.teacher=EMATeacher", "--model.teacher.decay=1.5"], "decay"),
    "beta": (
        lambda p, f: ["--model.objective.divergence=GeneralizedJSD", "--model.objective.divergence.beta=-1"], "beta",
    ),
    "top-k over the vocabulary": (
        lambda p, f: ["--model.objective.support=TopKWithTail", "--model.objective.support.k=999"],
        r"model\.objective\.support\.k: k is 999, but the model's vocabulary has only 107",
    ),
    "negative temperature": (lambda p, f: ["--model.sampling.temperature=-1"], "temperature"),
    "accumulate_grad_batches": (
        lambda p, f: ["--trainer.accumulate_grad_batches=4"], r"trainer\.accumulate_grad_batches: .*set data\.batch_size",
    ),
    "gradient_clip_val": (lambda p, f: ["--trainer.gradient_clip_val=1"], r"set model\.max_grad_norm instead"),
    "missing checkpoint": (lambda p, f: ["--ckpt_path=nowhere.ckpt"], "ckpt_path: nowhere.ckpt does not exist"),
    "quantized GGUF": (
        lambda p, f: [
            f"--model.policy.model={(p / 'm.gguf').write_bytes(b'') or p}/m.gguf",
            "--model.policy.quantization=transformers.BitsAndBytesConfig",
        ],
        "quantization does not go with a .gguf",
    ),
    "schedule too short": (
        lambda p, f: ["--model.lr_scheduler=OneCycleLR", "--model.lr_scheduler.max_lr=0.1", "--model.lr_scheduler.total_steps=1"],
        r"ends after total_steps = 1, before trainer\.max_steps = 2",
    ),
    "schedule by a metric": (lambda p, f: ["--model.lr_scheduler=ReduceLROnPlateau"], "ReduceLROnPlateau"),
    "a step budget in the data": (lambda p, f: ["--trainer.max_steps=two"], "max_steps"),
}  # fmt: skip
