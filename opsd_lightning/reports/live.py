"""Load student and teacher of a checkpoint, answer typed questions with the student, and score the answers with both.

The student has the trained weights. The teacher has the weights of the run's teacher, and reads a typed context.
"""

from __future__ import annotations

import sys
import threading
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from importlib import import_module
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel

import opsd_lightning
from opsd_lightning.checkpoints.file import load_file, local_path
from opsd_lightning.checkpoints.shards import is_shards
from opsd_lightning.losses.objectives import DivergenceObjective, Objective, Term
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.token_data import TOP, completion_data, pieces_of
from opsd_lightning.reports.token_scores import measure_completions
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.runs.exported_adapter import built, load_exported
from opsd_lightning.runs.reader import RecordedSettings, flatten, settings_of_run_around
from opsd_lightning.teachers import FixedTeacher, LiveTeacher, Teacher
from opsd_lightning.types import ConfigError, Example, Sampling, UserError
from opsd_lightning.utils.redaction import redact_text
from opsd_lightning.utils.token_text import Pieces

_SETTING = "CHECKPOINT"
_FIX = "Give a checkpoint file (.ckpt) of a run, a folder that AdapterExport wrote, or a model"
_MOST_SAMPLES, _MAX_TOKENS = 16, 4096  # of one question


@dataclass
class Live:
    """Student and teacher of a checkpoint.

    Args:
        policy: Settings of the model.
        model: The network of both.
        tokenizer: Its tokenizer.
        teacher: The teacher, attached to the model.
        prompts: Templates of both prompts.
        objective: Objective that measures the tokens.
        sampling: Sampling of the run. Its values are the defaults of the form.
        method: Name of the run's method, or None.
        token_budget: Limit on the tokens of one scoring pass.
        engine: Engine that samples the completions.
    """

    policy: Policy
    model: Any
    tokenizer: Any
    teacher: Teacher
    prompts: Prompts
    objective: Objective
    sampling: Sampling
    method: str | None = None
    token_budget: int = 8192
    engine: RolloutEngine = field(default_factory=TransformersEngine)

    def __post_init__(self) -> None:
        self._pieces = Pieces(self.tokenizer)
        self._lock = threading.Lock()  # one model and tokenizer for all threads of the server
        self._asked = 0
        lengths = (self.policy.context_length(), self.teacher.context_length())  # here, since a hub id is looked up online
        self._limit = min((length for length in lengths if length is not None), default=None)

    def describe(self) -> dict[str, Any]:
        """Return the values that the head of the page shows, and those that the form starts with."""
        found = {
            "version": opsd_lightning.__version__,
            "model": redact_text(self.policy.model),
            "method": self.method,
            "objective": type(self.objective).__name__,
            "teacher": type(self.teacher).__name__,
            "live": {
                "samples": 1,
                "temperature": self.sampling.temperature,
                "max_new_tokens": min(self.sampling.max_new_tokens, _MAX_TOKENS),
                "reads_context": self.teacher.privileged,
            },
        }
        for part in ("divergence", "clip"):
            found[part] = type(getattr(self.objective, part)).__name__ if hasattr(self.objective, part) else None
        return found

    def answer(self, asked: Mapping[str, Any]) -> dict[str, Any]:
        """Sample completions of a question, score them with both roles, and return them as a step of the token page.

        Args:
            asked: ``question``, and optionally ``context`` for the teacher, ``samples``, ``temperature``,
                ``max_new_tokens`` and ``seed``.

        Raises:
            UserError: The question is empty or does not fit the model, or a value is out of range.
        """
        question, context = (str(asked.get(name) or "").strip() for name in ("question", "context"))
        if not question:
            raise UserError("the question is empty: type one")
        sampling = Sampling(
            max_new_tokens=int(_number(asked, "max_new_tokens", self.sampling.max_new_tokens, 1, _MAX_TOKENS)),
            temperature=_number(asked, "temperature", self.sampling.temperature, 0, 10),
            top_p=self.sampling.top_p,
            top_k=self.sampling.top_k,
            min_p=self.sampling.min_p,
            n=int(_number(asked, "samples", 1, 1, _MOST_SAMPLES)),
        )
        seed = _number(asked, "seed", -1, 0, 2**32 - 1)
        example = Example(question, "", "")
        with self._lock:
            teacher = student = self.prompts.student(self.tokenizer, example)
            if self.teacher.privileged:
                teacher = self.prompts.teacher(self.tokenizer, example, context or None, whole=True)
            needed = max(len(student), len(teacher)) + sampling.max_new_tokens
            if self._limit is not None and needed > self._limit:
                raise UserError(
                    f"prompt and completion need {needed} tokens, and the model reads {self._limit}: shorten the question "
                    "or the context, or lower the length of the completion"
                )
            self._asked += 1
            scored = self._score(student, teacher, sampling, self._asked if seed < 0 else int(seed))
            common = {
                "question": question,
                "trace": None,
                "context": context or None,
                "reference": None,
                "student_prompt": redact_text(str(self.tokenizer.decode(student))),
                "teacher_prompt": redact_text(str(self.tokenizer.decode(teacher))),
                "answer": None,
                "grade": "ungraded",
                "sampled": True,
            }
            rollouts = [common | {"row": row} | rollout for row, rollout in enumerate(scored)]
            return {
                "step": self._asked,
                "temperature": self.objective.temperature,
                "pieces": pieces_of(self._pieces, rollouts),
                "rollouts": rollouts,
            }

    @torch.no_grad()
    def _score(self, student: list[int], teacher: list[int], sampling: Sampling, seed: int) -> list[dict[str, Any]]:
        """Sample completions of the student's prompt, and score them with both prompts."""
        scorer = Scorer(self.model, self.token_budget)
        rollouts = self.engine.generate(self.model, [student], sampling, seed)
        completions = rollouts.completions
        theirs = self.teacher.score(scorer, [teacher] * len(completions), completions)
        weights = self.objective.token_weights(rollouts)
        term = Term(self.objective, weights, theirs)
        found = measure_completions(scorer, term, [student] * len(completions), completions, TOP)
        return [
            completion_data(self._pieces, completion, len(completion), weight, measured, scores)
            | {"truncated": not terminated}
            for completion, terminated, weight, measured, scores in zip(
                completions, rollouts.terminated, weights, *found, strict=True
            )
        ]


def _number(asked: Mapping[str, Any], name: str, default: float, low: float, high: float) -> float:
    value = asked.get(name)
    if value is None or value == "":
        return default
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = float("nan")
    if not low <= number <= high:
        raise UserError(f"{name.replace('_', ' ')} is {str(value)[:40]!r}: give a number from {low:g} to {high:g}")
    return number


def load_live(checkpoint: str, base: str | None = None, device: str | None = None, **given: Any) -> Live:
    """Load the student and the teacher of a checkpoint.

    Args:
        checkpoint: A checkpoint file of a command-line run, a folder of an exported adapter, or a model: a folder, a Hugging
            Face id or a ``.gguf`` file. A model without an adapter is student and teacher at once.
        base: Base model, in place of the one that the checkpoint names.
        device: Device of the model. Defaults to a GPU if there is one.
        given: Other settings of the `Policy`, such as ``pad_token``, for an adapter or a model. Values of None are ignored.

    Raises:
        ConfigError: The checkpoint cannot be loaded, or there is no such device.
    """
    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, dtype=torch.float32, device=device)
    except (RuntimeError, AssertionError) as error:  # no such device, or a build of torch without it
        reason = str(error).strip().partition("\n")[0]
        raise ConfigError(f"cannot use {device!r} ({reason})", "--device", "Give cpu, cuda or cuda:N") from None
    given = {name: value for name, value in given.items() if value is not None}
    load = _of_file if checkpoint.endswith(".ckpt") else _of_folder
    found = load(checkpoint, base, given)
    found.model.to(device)
    found.model.requires_grad_(False)
    return found


def _of_file(checkpoint: str, base: str | None, given: Mapping[str, Any]) -> Live:
    path = local_path(checkpoint, _SETTING)
    if path.is_dir():
        raise ConfigError(f"{path} is a folder of shards", _SETTING, "Give the adapter that AdapterExport wrote")
    for name in [*(["model"] if base is not None else []), *given]:
        problem = f"a checkpoint file has its own {name}"
        raise ConfigError(problem, f"--{name}", "Leave it out, or give the exported adapter instead of the file")
    method = _method(load_file(path).get(PolicyModule.CHECKPOINT_HYPER_PARAMS_KEY, {}), path)
    module = method.load_from_checkpoint(path, weights_only=True)
    prompts = getattr(module, "prompts", None)
    if prompts is None:  # SFT and GRPO have none of their own
        prompts = built(Prompts, settings_of_run_around(path).part("data", "prompts"), path, _SETTING)
    teacher = getattr(module, "teacher", None)
    objective = module.objective
    if teacher is None or not objective.uses_teacher:  # SFT and GRPO: compared with their start
        teacher = _base_teacher(module.model)
        objective = DivergenceObjective(temperature=objective.temperature)
    return Live(
        module.policy,
        module.model,
        module.tokenizer,
        teacher,
        prompts.of_split("train"),
        objective,
        module.sampling,
        type(module).__name__,
        module.token_budget,
    )


def _method(settings: Mapping[str, Any], path: Path) -> type[PolicyModule]:
    """Return the method of a checkpoint's settings. Only modules of this package and imported ones are looked at."""
    name = settings.get("_class_path")
    place, _, kind = name.rpartition(".") if isinstance(name, str) else ("", "", "")
    module = sys.modules.get(place)
    if f"{place}.".startswith("opsd_lightning."):
        with suppress(ImportError):
            module = import_module(place)
    found = getattr(module, kind, None)
    if not (isinstance(found, type) and issubclass(found, PolicyModule)):
        problem = f"{path} does not name a method of this package (it names {name!r})"
        raise ConfigError(problem, _SETTING, "Give a checkpoint of a command-line run, or the exported adapter")
    return found


def _of_folder(checkpoint: str, base: str | None, given: Mapping[str, Any]) -> Live:
    folder = Path(checkpoint).expanduser()
    if folder.is_dir() and is_shards(folder):
        raise ConfigError(f"{folder} is a folder of shards", _SETTING, "Give the adapter that AdapterExport wrote")
    settings, prompts = RecordedSettings({}, None), Prompts().of_split("train")
    if (folder / "adapter_config.json").is_file():
        policy, prompts, settings = load_exported(str(folder), base, _SETTING, **given)
    elif base is not None:
        raise ConfigError(f"{checkpoint} is not an adapter, and --model names a base model", "--model", "Leave it out")
    else:
        if folder.is_dir() and not (folder / "config.json").is_file():
            raise ConfigError(f"{folder} holds neither an adapter nor a model", _SETTING, _FIX)
        policy = Policy(checkpoint, lora=LoRA(r=1), **given)  # an adapter that changes nothing
    tokenizer, network = policy.load_tokenizer(), policy.build()
    sampling, objective = (settings.part("model", name) for name in ("sampling", "objective"))
    temperature = {name: objective[name] for name in ("temperature",) if name in objective}
    return Live(
        policy,
        network,
        tokenizer,
        _base_teacher(network),
        prompts,
        built(DivergenceObjective, temperature, checkpoint, _SETTING),
        built(Sampling, sampling or {"max_new_tokens": 256}, checkpoint, _SETTING),
        flatten(settings.config).get("model"),
    )


def _base_teacher(model: Any) -> Teacher:
    """Return the base model as the teacher. After full fine-tuning it is not in memory, and the model itself is returned."""
    if not isinstance(model, PeftModel):
        return LiveTeacher()
    teacher = FixedTeacher()
    teacher.use_base_weights()
    return teacher
