"""Command lines and configuration files with a typo or another mistake, and the names that the message must hold."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple


class Typo(NamedTuple):
    """A command line that is refused before anything is loaded.

    Attributes:
        arguments: The arguments of ``opsd``. ``{folder}`` is a folder with the file, ``{file}`` the file.
        words: Names that the message must hold: the setting, and the nearest right name if there is one.
        file: Contents of a configuration file.
    """

    arguments: Sequence[str]
    words: Sequence[str]
    file: str = ""


def config(text: str, *words: str, command: str = "fit") -> Typo:
    return Typo([command, "--config={file}"], words, text)


def fit(*arguments: str, words: Sequence[str]) -> Typo:
    return Typo(["fit", *arguments], words)


TYPOS = {
    # -- commands
    "command": Typo(["fitt", "--config=x.yaml"], ["fit?"]),
    "command in capitals": Typo(["FIT"], ["fit?"]),
    "another program's command": Typo(["train"], ["fit", "report"]),
    "missing command": Typo([], ["fit", "report"]),
    "missing command behind an option": Typo(["--config={file}"], ["fit"], "trainer: {max_steps: 1}\n"),
    "option of no command": Typo(["--verison"], ["version"]),
    # -- names of settings on the command line
    "trainer setting": fit("--trainer.max_stepz=4", words=["trainer.max_stepz", "max_steps"]),
    "abbreviated setting": fit("--trainer.max_st=4", words=["trainer.max_st", "max_steps"]),
    "hyphens for underscores": fit("--trainer.max-steps=4", words=["trainer.max-steps", "max_steps"]),
    "camel case": fit("--trainer.maxSteps", "4", words=["trainer.maxSteps", "max_steps"]),
    "misspelt group": fit("--trainr.max_steps=4", words=["trainr.max_steps", "trainer.max_steps"]),
    "data setting": fit("--data.batchsize=4", words=["data.batchsize", "batch_size"]),
    "prompt setting": fit("--data.prompts.sytem=x", words=["data.prompts.sytem", "system"]),
    "setting of a part": fit(
        "--model.teacher=EMATeacher", "--model.teacher.decai=0.9", words=["model.teacher", "EMATeacher", "decai", "decay"]
    ),
    "setting of a part, in full": fit(
        "--model.init_args.teacher.class_path=EMATeacher", "--model.init_args.teacher.init_args.decai=0.9",
        words=["EMATeacher", "decai", "decay"],
    ),
    "setting of a part of a part": fit(
        "--model.objective.clip=TokenClip", "--model.objective.clip.tua=1", words=["TokenClip", "tua", "tau"]
    ),
    "setting of another class of its kind": fit("--model.teacher.decay=0.9", words=["FixedTeacher", "decay", "EMATeacher"]),
    "setting of a divergence": fit("--model.objective.divergence.beta=0.5", words=["beta", "GeneralizedJSD"]),
    "LoRA rank": fit("--model.policy.lora.rank=8", words=["model.policy.lora.rank", "model.policy.lora.r"]),
    "sampling setting": fit("--model.sampling.max_tokens=4", words=["max_tokens", "max_new_tokens"]),
    "learning rate": fit("--model.lr=1e-4", words=["model.lr", "model.optimizer.init_args.lr"]),
    "learning rate of another trainer": fit("--learning_rate=1e-4", words=["learning_rate", "model.optimizer.init_args.lr"]),
    "batch size of another trainer": fit("--per_device_train_batch_size=8", words=["data.batch_size"]),
    "epochs of another trainer": fit("--num_train_epochs=1", words=["trainer.max_epochs"]),
    "output folder of another trainer": fit("--output_dir=runs", words=["trainer.default_root_dir"]),
    "setting at the wrong level": fit("--data.max_new_tokens=4", words=["data.max_new_tokens", "model.sampling"]),
    "setting without its level": fit("--max_steps=4", words=["max_steps", "trainer.max_steps"]),
    "optimizer setting": fit("--model.optimizer.weight_decy=0", words=["AdamW", "weight_decy", "weight_decay"]),
    "source setting": fit("--data.train=FileSource", "--data.train.pth=x", words=["FileSource", "pth", "path"]),
    "grader setting": fit("--data.grader.time_out_seconds=3", words=["MathGrader", "timeout_seconds"]),
    "engine setting": fit("--model.rollouts.max_row=3", words=["TransformersEngine", "max_row", "max_rows"]),
    "callback setting": fit(
        "--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.monitr=x", words=["ModelCheckpoint", "monitor"]
    ),
    "config option": fit("--confg=x.yaml", words=["confg", "config"]),
    "seed": fit("--seed=3", words=["seed", "seed_everything"]),
    "writer setting": Typo(["predict", "--writer.foldr=x"], ["writer.foldr", "folder"]),
    "option of another command": fit("--verbose=true", words=["verbose", "validate", "test"]),
    "argument without a setting": fit("extra", words=["'extra'"]),
    "one hyphen": fit("-ckpt_path", "x", words=["--ckpt_path"]),
    "option without a value": fit("--ckpt_path", words=["ckpt_path"]),
    # -- names of classes
    "teacher": fit("--model.teacher=EMATeachr", words=["model.teacher", "EMATeachr", "EMATeacher"]),
    "snake case": fit("--model.teacher=ema_teacher", words=["ema_teacher", "EMATeacher"]),
    "method": fit("--model=OPSDModul", words=["OPSDModul", "OPSDModule"]),
    "divergence": fit("--model.objective.divergence=ForwardKl", words=["ForwardKl", "ForwardKL"]),
    "divergence with its module": fit(
        "--model.objective.divergence=opsd_lightning.ReverseLK", words=["opsd_lightning.ReverseLK", "ReverseKL"]
    ),
    "missing module": fit("--model.teacher=no_such_parts.Own", words=["model.teacher", "no_such_parts"]),
    "class of another kind": fit("--model.teacher=opsd_lightning.ForwardKL", words=["ForwardKL", "EMATeacher"]),
    "class of another kind, its name alone": fit("--model.teacher=ForwardKL", words=["ForwardKL", "EMATeacher"]),
    "nothing like it": fit("--model.teacher=Zzz", words=["Zzz", "EMATeacher", "FixedTeacher"]),
    "optimizer": fit("--model.optimizer=Adamw", words=["model.optimizer", "Adamw", "AdamW"]),
    "schedule": fit("--model.lr_scheduler=CosineAnealingLR", words=["CosineAnealingLR", "CosineAnnealingLR"]),
    "source": fit("--data.train=FileSorce", words=["data.train", "FileSorce", "FileSource"]),
    "grader": fit("--data.grader=MathGradr", words=["data.grader", "MathGrader"]),
    "engine": Typo(["validate", "--model.rollouts=TransformerEngine"], ["TransformerEngine", "TransformersEngine"]),
    "context": fit("--data.context=TraceContxt", words=["TraceContxt", "TraceContext"]),
    "logger": fit("--trainer.logger=TensorbordLogger", words=["trainer.logger", "TensorBoardLogger"]),
    "callback": fit("--trainer.callbacks=TokenRepot", words=["trainer.callbacks", "TokenReport"]),
    "part that was never named": fit("--data.val.path=x", words=["data.val", "FileSource"]),
    "help of a class": fit("--model.teacher.help=EMATeachr", words=["model.teacher.help", "EMATeachr", "EMATeacher"]),
    "help of a method": fit("--model.help", "OPSDModul", words=["model.help", "OPSDModul", "OPSDModule"]),
    "help of a source": fit("--data.train.help=FileSorce", words=["data.train.help", "FileSorce", "FileSource"]),
    # -- values
    "precision": fit("--trainer.precision=bf16mixed", words=["trainer.precision", "bf16mixed", "bf16-mixed"]),
    "dtype": fit("--model.policy.dtype=bf16", words=["model.policy.dtype", "bf16", "bfloat16"]),
    "strategy": fit("--trainer.strategy=fsd2", words=["trainer.strategy", "fsd2", "fsdp2"]),
    "accelerator": fit("--trainer.accelerator=gpuu", words=["trainer.accelerator", "gpuu", "gpu"]),
    "word for a number": fit("--trainer.max_steps=two", words=["trainer.max_steps", "'two'"]),
    "number with its unit": fit("--model.sampling.max_new_tokens=512tokens", words=["max_new_tokens", "'512tokens'"]),
    "fraction for a count": fit("--data.batch_size=1.5", words=["data.batch_size", "1.5"]),
    "negative size": fit("--data.batch_size=-1", words=["data.batch_size", "-1"]),
    "zero completions": Typo(["test", "--model.eval_sampling.n=0"], ["model.eval_sampling.n", "'0'"]),
    "share above one": fit("--model.sampling.top_p=95", words=["top_p", "95"]),
    "decay above one": fit("--model.teacher=EMATeacher", "--model.teacher.decay=1.5", words=["decay", "1.5"]),
    "None for null": fit("--model.max_grad_norm=None", words=["model.max_grad_norm", "None", "null"]),
    "None for a number": fit("--data.batch_size=None", words=["data.batch_size", "None"]),
    "yes for true": fit("--data.verify=yess", words=["data.verify", "yess", "true"]),
    "choice": fit("--data.on_invalid=dorp", words=["data.on_invalid", "dorp", "drop"]),
    "position": fit("--data.prompts.context_position=sytem", words=["context_position", "sytem", "system"]),
    "learning rate in words": fit("--model.optimizer.lr=fast", words=["model.optimizer", "lr", "'fast'"]),
    "LoRA rank in words": fit("--model.policy.lora.r=eight", words=["model.policy.lora.r", "'eight'"]),
    "quantization by name": fit("--model.policy.quantization=nf4", words=["model.policy.quantization", "nf4"]),
    "seed in words": fit("--seed_everything=x", words=["seed_everything", "'x'"]),
    "negative seed": fit("--seed_everything=-1", words=["seed_everything", "-1"]),
    "devices": fit("--trainer.devices=-3", words=["devices"]),
    "missing setting of a class": fit("--data.train=FileSource", words=["data.train.init_args.path", "FileSource"]),
    "accumulation": fit("--trainer.accumulate_grad_batches=4", words=["accumulate_grad_batches", "data.batch_size"]),
    "missing checkpoint folder": fit("--ckpt_path={folder}", words=["ckpt_path", "fsdp2"]),
    # -- configuration files
    "missing file": fit("--config=nowhere.yaml", words=["config", "nowhere.yaml"]),
    "misspelt file": fit("--config={folder}/confg.yaml", words=["confg.yaml", "config.yaml"]),
    "file after -c": fit("-c", "nowhere.yaml", words=["nowhere.yaml"]),
    "folder for a file": fit("--config={folder}", words=["config"]),
    "key in a file": config("trainer:\n  max_stepz: 3\n", "trainer.max_stepz", "max_steps", "line 2"),
    "group in a file": config("trainr:\n  max_steps: 3\n", "trainr.max_steps", "trainer.max_steps"),
    "nested key in a file": config(
        "model:\n  class_path: OPSDModule\n  init_args:\n    teacher:\n      class_path: EMATeacher\n"
        "      init_args: {decai: 0.9}\n",
        "EMATeacher", "decai", "decay", "line 6",
    ),
    "class in a file": config("model:\n  teacher: EMATeachr\n", "model.teacher", "EMATeachr", "EMATeacher", "line 2"),
    "missing init_args": config(
        "model:\n  teacher:\n    class_path: EMATeacher\n    decay: 0.9\n", "model.teacher", "init_args", "line 2"
    ),
    "misspelt class_path": config("model:\n  teacher:\n    clas_path: EMATeacher\n", "model.teacher", "class_path"),
    "misspelt init_args": config(
        "model:\n  teacher:\n    class_path: EMATeacher\n    init_arg: {decay: 0.9}\n", "model.teacher", "init_args", "line 2"
    ),
    "callback in a file": config("trainer:\n  callbacks:\n  - class_path: EarlyStoping\n", "EarlyStoping", "EarlyStopping"),
    "setting of a callback in a file": config(
        "trainer:\n  callbacks:\n  - class_path: EarlyStopping\n    init_args: {monitr: x}\n", "EarlyStopping", "monitor"
    ),
    "value in a file": config("data:\n  batch_size: four\n", "data.batch_size", "four", "line 2"),
    "list for a number": config("data:\n  batch_size: [4]\n", "data.batch_size"),
    "None in a file": config("data:\n  batch_size: None\n", "data.batch_size", "None"),
    "null for a number": config("data:\n  batch_size: null\n", "data.batch_size"),
    "dotted key in a file": config("trainer.max_stepz: 3\n", "trainer.max_stepz", "max_steps"),
    "section of a command": config("fit:\n  trainer: {max_steps: 3}\n", "fit.trainer.max_steps", "trainer.max_steps"),
    "unclosed brace": config("model: {teacher: EMATeacher\ndata:\n", "config", "line 2"),
    "tab": config("model:\n\tteacher: EMATeacher\n", "config", "line 2"),
    "missing colon": config("trainer\n  max_steps: 3\n", "config"),
    "text for settings": config("just text\n", "config"),
    "list for settings": config("- model\n- data\n", "config"),
    "twice the same key": config("data:\n  batch_size: 4\n  batch_size: 2\n", "config", "batch_size", "line 3"),
    "key of another command's file": config("writer: {foldr: x}\n", "writer.foldr", "folder", command="test"),
    # -- commands with options of their own
    "doctor's option": Typo(["doctor", "--exampels=3"], ["--examples"]),
    "doctor's value": Typo(["doctor", "--examples=some"], ["--examples", "'some'"]),
    "doctor's setting": Typo(["doctor", "--data.batchsize=4"], ["data.batchsize", "batch_size"]),
    "doctor's class": Typo(["doctor", "--model.teacher=EMATeachr"], ["EMATeachr", "EMATeacher"]),
    "report's option": Typo(["report", "x", "--outptu=y"], ["--outptu", "--output"]),
    "report without a run": Typo(["report"], ["RUN"]),
    "report of no run": Typo(["report", "{folder}/nowhere"], ["nowhere"]),
    "chat's option": Typo(["chat", "--adaptor=x"], ["--adaptor", "--adapter"]),
    "chat without a model": Typo(["chat"], ["--model", "--adapter"]),
    "chat's missing model": Typo(["chat", "--model={folder}/nowhere"], ["--model", "nowhere"]),
    "chat's missing adapter": Typo(["chat", "--adapter={folder}/nowhere"], ["--adapter", "nowhere"]),
    "chat's missing context": Typo(["chat", "--model=x", "--context={folder}/nowhere"], ["--context", "nowhere"]),
    "chat's role": Typo(["chat", "--model=x", "--role=techer"], ["--role", "teacher"]),
    "chat's shading of nothing": Typo(["chat", "--model=x", "--shade"], ["--shade", "--context"]),
    "chat's temperature": Typo(["chat", "--model=x", "--temperature=nan"], ["--temperature", "nan"]),
    "show's device": Typo(["show", "x", "--device=gpu"], ["--device", "gpu"]),
    "show's port": Typo(["show", "x", "--port=70000"], ["--port", "70000"]),
    "show's missing checkpoint": Typo(["show", "{folder}/nowhere"], ["CHECKPOINT", "nowhere"]),
    "show's option": Typo(["show", "x", "--divice=cpu"], ["--divice", "--device"]),
    "chat's length": Typo(["chat", "--model=x", "--max_new_tokens=0"], ["--max_new_tokens", "0"]),
}  # fmt: skip
