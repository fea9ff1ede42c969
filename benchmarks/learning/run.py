"""One run of the test bed: a method, a base model and a seed give one JSON file.

A run uses the module and data module of the package and Lightning's Trainer. A `Method` specifies their parts in a form that
JSON can hold, so that the file records what was run.
"""

from __future__ import annotations

import hashlib
import importlib
import json
import os
import time
import warnings
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from functools import cache
from importlib.metadata import version
from pathlib import Path
from typing import Any, Literal

import torch
from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything

import opsd_lightning
from benchmarks.learning.bases import EASY_OPERATIONS, MAX_NEW_TOKENS, easier, greedy_accuracy, load, questions
from benchmarks.learning.task import GRADER, PROMPTS, ChainProblems, Style
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.types import Sampling


@dataclass(frozen=True)
class Method:
    """Settings of a training run. Nested parts have the form ``{"class": name, argument: value, ...}``.

    In ``arguments``, ``{"beside_base": name}`` stands for the path of another model in a folder beside the base.

    Args:
        name: Name in tables.
        module: The LightningModule: a public name of the package, or a dotted path.
        arguments: Arguments of the module in addition to those below.
        data: Additional arguments of the data module, such as ``context``.
        lora: Arguments of `LoRA`.
        learning_rate: Learning rate of AdamW after ``warmup_steps``.
        warmup_steps: Optimizer steps of the linear warm-up from 0.
        decay: If True, the rate decays linearly to 0 over the rest of the run. Otherwise it stays constant.
        max_grad_norm: Norm to which larger gradients are clipped.
        steps: Optimizer steps.
        questions: Number of questions per step.
        n: Number of rollouts per question.
        temperature: Sampling temperature of the rollouts.
        max_new_tokens: Length limit of the rollouts, in tokens.
        train_questions: Number of distinct training questions. Defaults to as many as the run needs.
        trace: Style of the references.
        uses: Part of a reference that the method uses: ``trace``, ``answer`` (only the final answer) or ``nothing``.
    """

    name: str
    module: str = "OPSDModule"
    arguments: Mapping[str, Any] = field(default_factory=dict)
    data: Mapping[str, Any] = field(default_factory=dict)
    lora: Mapping[str, Any] = field(default_factory=lambda: {"r": 16, "alpha": 32.0, "dropout": 0.0})
    learning_rate: float = 2e-3
    warmup_steps: int = 0
    decay: bool = False
    max_grad_norm: float | None = 1.0
    steps: int = 100
    questions: int = 64
    n: int = 1
    temperature: float = 1.0
    max_new_tokens: int = MAX_NEW_TOKENS
    train_questions: int | None = None
    trace: Style = "terse"
    uses: Literal["trace", "answer", "nothing"] = "trace"


@dataclass(frozen=True)
class Measuring:
    """Settings of the measurements, all with greedy decoding.

    Args:
        every_steps: Optimizer steps between points of the curve.
        validation: Number of validation questions of each point.
        test: Number of test questions at the end, and at most as many of each easier kind.
    """

    every_steps: int = 10
    validation: int = 300
    test: int = 500


@dataclass(frozen=True)
class Job:
    """Settings of one run.

    Args:
        method: Settings of the training.
        base: Folder of the base model.
        seed: Seed of the questions, their order, the rollouts and the adapter's initial weights.
        measuring: Settings of the measurements.
    """

    method: Method
    base: str
    seed: int = 0
    measuring: Measuring = Measuring()

    def settings(self) -> dict[str, Any]:
        """Return all settings that determine the result, including those of the base and the models beside it."""
        base = Path(self.base)
        found = {"method": asdict(self.method), "base": base.name, "base_settings": _recipe(base), "seed": self.seed}
        found["measuring"] = asdict(self.measuring)
        # Only if there are any, so that the file names of other methods do not change.
        if names := beside_base(self.method.arguments):
            found["beside_base"] = {name: _recipe(base.parent / name) for name in names}
        return json.loads(json.dumps(found))

    def path(self, root: Path) -> Path:
        """Return the path of the result, which depends on all settings."""
        settings = self.settings()
        digest = hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:10]
        return root / f"{self.method.name}-{settings['base']}-seed{self.seed}-{digest}.json"


def _recipe(folder: Path) -> Any:
    record = folder / "base.json"
    return json.loads(record.read_text(encoding="utf-8"))["settings"] if record.exists() else None


def beside_base(spec: Any) -> list[str]:
    """Return the names of the models beside the base in a specification."""
    if isinstance(spec, Mapping):
        return [spec["beside_base"]] if "beside_base" in spec else beside_base(list(spec.values()))
    return [name for value in spec for name in beside_base(value)] if isinstance(spec, list | tuple) else []


def located(spec: Any, folder: Path) -> Any:
    """Return the specification with the paths of the models in the folders beside the base."""
    if isinstance(spec, Mapping):
        if "beside_base" in spec:
            return str(folder / spec["beside_base"])
        return {name: located(value, folder) for name, value in spec.items()}
    return [located(value, folder) for value in spec] if isinstance(spec, list | tuple) else spec


def made_with(job: Job) -> dict[str, str]:
    """Return the versions of the libraries and the weight hashes of the base and the models beside it."""
    found = {name: version(name) for name in ("torch", "transformers", "peft", "lightning", "opsd_lightning")}
    base = Path(job.base)
    for folder in [base, *(base.parent / name for name in beside_base(job.method.arguments))]:
        found[f"{folder.name}_sha256"] = hashlib.sha256((folder / "model.safetensors").read_bytes()).hexdigest()
    return found


def build(spec: Any) -> Any:
    """Build the part that a specification describes. Return other values unchanged."""
    if isinstance(spec, Mapping):
        values = {name: build(value) for name, value in spec.items() if name != "class"}
        return find(spec["class"])(**values) if "class" in spec else values
    return [build(value) for value in spec] if isinstance(spec, list | tuple) else spec


def find(name: str) -> Any:
    """Return the object of a public name of the package or of a dotted path."""
    room, _, last = name.rpartition(".")
    return getattr(importlib.import_module(room) if room else opsd_lightning, last)


def make_module(method: Method, policy: Policy, seed: int) -> LightningModule:
    """Build the module of a method, a `PolicyModule`."""

    def optimizer(parameters: Any) -> torch.optim.Optimizer:
        return torch.optim.AdamW(parameters, lr=method.learning_rate, weight_decay=0.0)

    def rate(step: int) -> float:
        rising = (step + 1) / (method.warmup_steps + 1)
        falling = (method.steps - step) / max(method.steps - method.warmup_steps, 1) if method.decay else 1.0
        return max(0.0, min(1.0, rising, falling))

    module = find(method.module)
    common = {
        "policy": policy,
        "sampling": Sampling(max_new_tokens=method.max_new_tokens, temperature=method.temperature, n=method.n),
        "eval_sampling": Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0),
        "grader": GRADER,
        "optimizer": optimizer,
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.LambdaLR(o, rate),
        "max_grad_norm": method.max_grad_norm,
        "seed": seed,
    }
    return module(**common | {name: build(value) for name, value in method.arguments.items()})


def make_data(method: Method, policy: Policy, seed: int, measuring: Measuring) -> OPSDDataModule:
    """Build the data module. The validation questions are the same in all runs."""
    size = method.train_questions or method.steps * method.questions
    return OPSDDataModule(
        policy=policy,
        train=ChainProblems("train", size, seed=seed, trace=method.trace),
        val=ChainProblems("validation", measuring.validation),
        prompts=PROMPTS,
        grader=GRADER,
        batch_size=method.questions,
        eval_batch_size=measuring.validation,
        max_new_tokens=max(MAX_NEW_TOKENS, method.max_new_tokens),
        on_invalid="error",
        seed=seed,
        **{name: build(value) for name, value in method.data.items()},
    )


class Curve(Callback):
    """Collects a row for each validation, including the one before training.

    A row has ``step``, ``tokens`` (generated for training), ``references`` (distinct traces read so far), ``seconds`` (of
    training steps only), ``accuracy``, and the means of the module's training metrics since the previous row.
    """

    def __init__(self, uses_traces: bool) -> None:
        self.uses_traces = uses_traces
        self.rows: list[dict[str, Any]] = []
        self.seconds, self.read = 0.0, set[str]()
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        self.started = time.perf_counter()

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        self.seconds += time.perf_counter() - self.started
        if self.uses_traces:
            self.read.update(example.question for example in batch.examples)
        metrics = trainer.callback_metrics.items()
        self.steps.append({k: float(v) for k, v in metrics if k.startswith(("train/", "time/"))})

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        names = dict.fromkeys(name for step in self.steps for name in step)
        values = {name: [step[name] for step in self.steps if name in step] for name in names}
        self.rows.append(
            {
                "step": 0 if trainer.sanity_checking else trainer.global_step,
                "tokens": int(getattr(pl_module, "tokens_generated", 0)),
                "references": len(self.read),
                "seconds": round(self.seconds, 3),
                "accuracy": float(trainer.callback_metrics["val/avg@1"]),
                "metrics": {name: sum(found) / len(found) for name, found in values.items()},
            }
        )
        self.steps = []


def scores(model: Any, test: int) -> dict[str, float]:
    """Return the greedy accuracy of the current weights on test questions of the task and of the easier kinds.

    ``privileged`` is the accuracy with the teacher's prompt, which shows how well these weights use a reference.
    """
    examples = questions("test", test)
    found = {"test": greedy_accuracy(model, examples), "privileged": greedy_accuracy(model, examples, "terse")}
    for operations in EASY_OPERATIONS:
        found[f"{operations}_operations"] = greedy_accuracy(model, easier(operations, test))
    return found


@cache
def scores_before(base: str, test: int) -> dict[str, float]:
    """Return the scores of a base, which do not depend on the training."""
    return scores(load(Path(base)), test)


def execute(job: Job) -> dict[str, Any]:
    """Train and measure.

    Returns:
        ``settings``, ``made_with`` (see `made_with`), ``curve`` (see `Curve`), ``before`` and ``after`` (see `scores`),
        ``wall_seconds``, everything included; and ``failed``, a message, where training stopped on a number that is not
        finite.
    """
    started = time.perf_counter()
    result: dict[str, Any] = {"settings": job.settings(), "made_with": made_with(job)}
    base = str(Path(job.base).resolve())
    method = replace(job.method, arguments=located(job.method.arguments, Path(base).parent))
    result["before"] = scores_before(base, job.measuring.test)
    seed_everything(job.seed, verbose=False)  # after the scores, which are not computed again in each run
    policy = Policy(base, LoRA(**method.lora), dtype="float32")
    module = make_module(method, policy, job.seed)
    data = make_data(method, policy, job.seed, job.measuring)
    curve = Curve(method.uses == "trace")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        trainer = Trainer(
            accelerator="cpu",
            devices=1,
            max_steps=method.steps,
            val_check_interval=job.measuring.every_steps,
            check_val_every_n_epoch=None,
            num_sanity_val_steps=-1,
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            callbacks=[curve],
        )
        module.configure_model()
        try:
            trainer.fit(module, data)
        except RuntimeError as error:
            if "gradient's norm" not in str(error):
                raise
            result["failed"] = str(error)
    result["curve"] = curve.rows
    result["after"] = scores(module.model, job.measuring.test)
    result["wall_seconds"] = round(time.perf_counter() - started, 1)
    return result


def write(path: Path, content: Any) -> None:
    """Write a JSON file atomically."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f".{path.name}.{os.getpid()}.partial")
    partial.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    os.replace(partial, path)


def read(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))
