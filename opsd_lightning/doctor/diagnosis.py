"""The diagnosis of a run before it trains: errors, contradicting settings, and the memory and time of a step.

Performs the checks of ``fit`` before its first step, and turns every error into a `Finding`.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer
from lightning.pytorch.accelerators import CUDAAccelerator
from transformers import PreTrainedTokenizerBase

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.distributed.checks import check_precision, check_strategy
from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.doctor.data_checks import (
    Room,
    data_facts,
    data_findings,
    length_facts,
    length_findings,
    overlap_findings,
    rate_findings,
    setting_findings,
    trace_lengths,
)
from opsd_lightning.doctor.findings import Diagnosis, Finding, at_share
from opsd_lightning.doctor.gpu_checks import (
    architecture_findings,
    build_findings,
    determinism_findings,
    precision_findings,
    surroundings,
)
from opsd_lightning.doctor.memory import DeviceMemory, Step, less_memory, memory_findings
from opsd_lightning.doctor.probe import (
    AGREEMENT_TOKENS,
    LOOKED_AT,
    Examples,
    agreement_findings,
    divergence_facts,
    divergence_findings,
)
from opsd_lightning.doctor.prompt_checks import (
    context_findings,
    injected_findings,
    roles_of,
    template_findings,
    thinking_facts,
    thinking_findings,
    token_findings,
    tool_findings,
)
from opsd_lightning.doctor.run_memory import estimator_of, step_of
from opsd_lightning.doctor.trial import TRIAL_TOKENS, measured_memory, run_trials, time_facts
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.opsd import DistillationModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import Policy, eos_ids
from opsd_lightning.models.precision import check_dtypes
from opsd_lightning.prompts.template_checks import rendering_problems
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.rollouts.self_checks import agreement
from opsd_lightning.teachers import ModelTeacher, Teacher
from opsd_lightning.types import ConfigError, Example, PromptBatch, Sampling, UserError

_RENDERED = 32  # rows whose prompts are looked at closely


def diagnose(
    module: PolicyModule,
    data: OPSDDataModule,
    trainer: Trainer,
    examples: int = 4,
    with_model: bool = True,
    say: Callable[[str], None] = lambda text: None,
    resumes: bool = False,
) -> Diagnosis:
    """Check data, prompts and settings, and measure a few short training steps. No weight changes.

    Afterwards the module may hold the model, and the data module its rows.

    Args:
        module: The method.
        data: The data.
        trainer: The trainer of the run. It launches no processes and calls neither callbacks nor loggers.
        examples: Training questions on which the divergence and the time are measured, at least 1.
        with_model: If False, read the model's configuration and tokenizer, but not its weights: neither the divergence nor
            the time of a step is measured.
        say: Function that is called with a line about each stage. Defaults to one that ignores it.
        resumes: True if the run starts from a checkpoint.

    Example::

        module, data = OPSDModule(Policy("HuggingFaceTB/SmolLM2-135M-Instruct")), OPSDDataModule(...)
        found = diagnose(module, data, Trainer(max_steps=100))
        for finding in found.of("error"):
            print(finding.setting, finding.text, finding.fix)
    """
    return _Examination(module, data, trainer, max(examples, 1), say, resumes).run(with_model)


class _Examination:
    def __init__(
        self,
        module: Any,
        data: OPSDDataModule,
        trainer: Trainer,
        examples: int,
        say: Callable[[str], None],
        resumes: bool,
    ) -> None:
        self.module, self.data, self.trainer, self.examples, self.say = module, data, trainer, examples, say
        self.resumes = resumes
        self.policy: Policy = module.policy
        self.found = Diagnosis()
        self.memory_findings: list[Finding] = []
        self.traces: list[int] = []
        self.limit: int | None = None
        self.device = torch.device("cuda", 0) if isinstance(trainer.accelerator, CUDAAccelerator) else torch.device("cpu")
        self.samples = not isinstance(module, SFTModule)
        self.teachers: list[Teacher] = list(module.teachers)

    def run(self, with_model: bool) -> Diagnosis:
        module, trainer = self.module, self.trainer
        trainer.strategy.connect(module)
        module.trainer = self.data.trainer = trainer
        with self._refusals("settings"):
            check_precision(trainer.precision_plugin)
        with self._refusals("settings"):
            check_dtypes(self.policy, str(trainer.precision))
        with self._refusals("settings"):
            check_strategy(trainer.strategy)
        self._gpu()
        tokenizer: PreTrainedTokenizerBase | None = None
        with self._refusals("template"):
            tokenizer = self.policy.load_tokenizer()
            self.limit = self.policy.context_length()
        if tokenizer is None:
            return self.found
        if self._renders(tokenizer):
            self.say("Reading the data ...")
            self._data(tokenizer)
        rows = self.data.rows.get("train")
        usable = 0 if rows is None else len(rows.examples)
        self.found.add(setting_findings(module, self.data, trainer, usable))
        if rows is not None:
            with self._refusals("template"):
                self._prompts(tokenizer, rows)
        fits = False
        with self._refusals("memory"):
            fits = self._memory()
        if with_model and fits and rows is not None:
            self.say("Loading the model ...")
            with self._refusals("settings"):
                self._model(rows)
        else:
            with self._refusals("settings"):
                self._without_model(tokenizer)
        self.found.add(self.memory_findings)
        return self.found

    def _gpu(self) -> None:
        """Compare the GPU with torch's build and with the settings."""
        around = surroundings()
        self.found.add(build_findings(around))
        if self.device.type != "cuda":
            return
        capability, name = torch.cuda.get_device_capability(self.device), torch.cuda.get_device_name(self.device)
        self.found.facts["gpu"] = {"name": name, "capability": list(capability)} | around._asdict()
        self.found.add(architecture_findings(around, capability, name))
        self.found.add(precision_findings(self.module, str(self.trainer.precision), capability, name))
        self.found.add(determinism_findings(self.module, self.resumes))

    @contextmanager
    def _refusals(self, part: str) -> Iterator[None]:
        """Turn an error in the block into a finding, and go on after the block."""
        try:
            yield
        except (UserError, MisconfigurationException) as error:
            self.found.add([refusal_finding(part, error)])
        except Exception as error:  # from a library or from a part of the user: `fit` would end here, too
            text = (str(error).strip() or "no message").splitlines()[0]
            self.found.add([Finding("error", part, f"{type(error).__name__}: {text}")])

    # -- data and prompts --------------------------------------------------------------------------------------------------

    def _renders(self, tokenizer: PreTrainedTokenizerBase) -> bool:
        """Find all texts that do not reach the prompts. ``fit`` reports only the first.

        Returns:
            True if prompts can be made.
        """
        data = self.data
        data.checks_prompts = False
        for problem in rendering_problems(tokenizer, data.prompts, data.reads_teacher("fit")):
            self.found.add([Finding("error", "template", problem.problem, problem.setting, problem.fix)])
        example = Example("1+1?", "", "2")
        try:
            student, teacher = data.prompts.student(tokenizer, example), data.prompts.teacher(tokenizer, example, "")
        except ConfigError:
            return False
        self.overhead = len(teacher) - len(student)
        self.found.add(context_findings(tokenizer, data.prompts, data.context, data.reads_teacher("fit")))
        return True

    def _room(self, split: str) -> list[Room]:
        """Return the context lengths that prompts and completions of a split must fit, as in `OPSDDataModule.setup`."""
        found = [] if self.limit is None else [Room(self.limit, self.data.longest_completion(split))]
        for teacher in self.teachers if split == "train" else []:
            own, new = teacher.context_length(), self.module.sampling.max_new_tokens
            if (limit := own or self.limit) is not None:
                found.append(Room(limit, new, teacher.privileged, f"a {teacher.setting}" if own else "a model"))
        return found

    def _data(self, tokenizer: PreTrainedTokenizerBase) -> None:
        data = self.data
        refuses, data.on_invalid = data.on_invalid == "error", "drop"
        sources = dict(data.sources)
        facts: dict[str, Any] = {}
        for split, stage in (("val", "validate"), ("train", "fit")):
            if split == "val" and sources["val"] is None:
                continue
            with self._refusals("data"):
                data.setup(stage)
            if split not in data.rows:
                data.sources[split] = None  # so that the other split is still read
            if split in data.rows or split in data.dropped:
                facts[split] = data_facts(data, split)
        rooms = {split: self._room(split) for split in ("val", "train")}
        for split in facts:
            self.found.add(data_findings(data, split, facts[split], refuses, rooms, self.overhead))
        data.sources = sources
        data.on_invalid = "error" if refuses else "drop"
        self.found.add(overlap_findings(data))
        self.found.facts["data"] = facts
        if data.lengths.get("train"):
            self.traces = trace_lengths(tokenizer, data.rows["train"].examples if "train" in data.rows else [])
            longest = self.module.sampling.max_new_tokens
            self.found.facts["lengths"] = length_facts(data, self.limit, self.traces, longest)
            sampling, objective = self.module.sampling, self.module.objective
            self.found.add(length_findings(data, rooms, self.overhead, self.traces, sampling, objective, self.samples))

    def _prompts(self, tokenizer: PreTrainedTokenizerBase, rows: PromptBatch) -> None:
        prompts, module = self.data.prompts, self.module
        picked = _spread(len(rows.examples), _RENDERED)
        examples = [rows.examples[i] for i in picked]
        reads = module.data_requirements.privileged
        teachers = [rows.teacher[i] for i in picked] if reads else []
        roles = roles_of(prompts, examples, [rows.student[i] for i in picked], teachers, self.data.rows.get("val"))
        vocabulary = self.policy.load_config().get_text_config().vocab_size
        eos = self._eos(tokenizer)
        in_place = module.data_requirements.trace_completions
        for role in roles:
            traces = [example.trace for example in examples] if in_place else []
            self.found.add(template_findings(tokenizer, prompts, role, eos, vocabulary, traces))
        self.found.add(token_findings(tokenizer, eos, vocabulary))
        self.found.add(injected_findings(tokenizer, rows.examples))
        self.found.add(tool_findings(tokenizer, prompts, rows.examples))
        facts = thinking_facts(tokenizer, prompts, roles, [example.trace for example in rows.examples])
        skipped = module.objective.skip_first_tokens
        self.found.add(thinking_findings(tokenizer, prompts, roles, facts, skipped, in_place))
        ends = {role.name: tokenizer.decode(list(role.prompts[0])[-12:]) for role in roles}
        texts = {role.name: str(tokenizer.decode(list(role.prompts[0]), skip_special_tokens=False)) for role in roles}
        self.found.facts["template"] = {
            "eos": sorted(eos), "pad": tokenizer.pad_token_id, "prompts_end_with": ends, "prompts": texts,
        }  # fmt: skip
        self.found.facts["thinking"] = facts

    def _eos(self, tokenizer: PreTrainedTokenizerBase) -> frozenset[int]:
        """Return every token that ends a completion, as `Policy.build` collects them."""
        try:
            return frozenset(self.policy.end_ids(tokenizer))
        except UserError:  # see `token_findings`
            return frozenset()

    # -- the model ---------------------------------------------------------------------------------------------------------

    def _step(self) -> Step:
        students = [student for student, _ in self.data.lengths.get("train", [])]
        completion = None if self.samples else at_share(self.traces, 0.99)
        return step_of(self.module, self.data, at_share(students, 0.99), completion)

    def _memory(self) -> bool:
        """Estimate the memory of a step, and return whether the model can be loaded here."""
        self.say("Estimating memory ...")
        device = DeviceMemory.of(self.device)
        sharded = isinstance(self.trainer.strategy, FSDP2Strategy)
        shards = self.trainer.world_size if sharded else 1
        self.estimator = estimator_of(self.module, device, str(self.trainer.precision), shards)
        self.skeleton = self.estimator.model
        step = self._step()
        bytes_by_part = self.estimator.parts(step)
        self.name = torch.cuda.get_device_name(self.device) if device.on_cuda else "this machine's CPU"
        self.found.facts["memory"] = {
            "bytes": bytes_by_part, "device": self.name, "device_bytes": device.total, "free_bytes": device.available,
            "step": step._asdict(), "rows_at_once": self.estimator.rows_at_once(step),
        }  # fmt: skip
        self.memory_findings = list(memory_findings(self.estimator.least(step), device, self.name))
        return bytes_by_part["base weights"] + bytes_by_part["teacher"] < 0.9 * device.available

    def _without_model(self, tokenizer: PreTrainedTokenizerBase) -> None:
        """Perform the checks of `configure_model` and of the start of `fit` that need no weights."""
        module = self.module
        with self._refusals("settings"):
            module.objective.check(self.policy.load_config().get_text_config().vocab_size, "model.objective")
        if (model := getattr(self, "skeleton", None)) is None:
            return
        for teacher in self.teachers:
            with self._refusals("settings"):
                if isinstance(teacher, ModelTeacher) and teacher.recipe is not None:
                    teacher.check(tokenizer)
                elif isinstance(teacher, ModelTeacher) or self.policy.trains_all:
                    copy.deepcopy(teacher).attach(model)
        module.model = model
        self._optimizer()
        del module.model

    def _optimizer(self) -> None:
        with self._refusals("settings"):
            made = self.module.configure_optimizers()
            optimizer = made["optimizer"] if isinstance(made, dict) else made
            self.found.add(rate_findings(optimizer))

    def _model(self, rows: PromptBatch) -> None:
        module, trainer = self.module, self.trainer
        # One device, whatever the strategy, so that no process is launched.
        precision: Any = trainer.precision
        single = Trainer(
            accelerator="gpu" if self.device.type == "cuda" else "cpu", devices=1, precision=precision, logger=False,
            enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        )  # fmt: skip
        module.trainer = single
        module.configure_model()
        if self.policy.quantization is None:
            module.model.to(self.device)
        with self._refusals("settings"):
            module.check_policy()
        module.trainer = trainer
        self._optimizer()
        self.found.facts["template"] = self.found.facts.get("template", {}) | {"eos": sorted(eos_ids(module.model))}
        found, teacher = self._examples(rows)
        self.say(f"Sampling and scoring {len(found.students)} examples ...")
        with single.precision_plugin.forward_context():
            if teacher is not None:
                facts = divergence_facts(module, teacher, found)
                self.found.facts["divergence"] = facts
                self.found.add(divergence_findings(facts, module.objective.skip_first_tokens))
        if isinstance(module.rollouts, LocalEngine):
            sampling = Sampling(max_new_tokens=AGREEMENT_TOKENS, temperature=0.0)
            completions = module.rollouts.generate(module.model, found.students, sampling, 0).completions
            if any(completions):
                agreed, total = agreement(module.model, found.students, completions)
                self.found.facts["agreement"] = {"tokens": total, "agreed": agreed}
                self.found.add(agreement_findings(agreed, total))
        with self._refusals("time"):
            self._trials(rows)

    def _trials(self, rows: PromptBatch) -> None:
        """Run training steps of bounded size, and extrapolate their time and, on a CUDA device, their peak memory."""
        module, step, estimator = self.module, self._step(), self.estimator
        rows_of_question = step.rows // self.data.batch_size
        small = min(self.examples, self.data.batch_size)
        if not self._fits(step.shortened(small * rows_of_question, TRIAL_TOKENS)):
            return  # the memory is too small for any step, which `memory_findings` has found
        larger = self._fits(step.shortened(step.rows, TRIAL_TOKENS))
        self.say("Running a few short training steps ...")
        try:
            read = estimator.rollout_weights(step), estimator.cached_bytes
            most = self.data.batch_size if larger else small
            trials = run_trials(module, rows, small, most, step, self.device, read)
        except torch.OutOfMemoryError:
            text = (
                f"a training step of {small} questions with completions of {TRIAL_TOKENS} tokens does not fit on {self.name}"
            )
            self.memory_findings = [Finding("error", "memory", text, *less_memory(estimator.least(step)))]
            return
        timed = step._replace(rows_at_once=estimator.rows_at_once(step))
        self.found.facts["time"] = time_facts(module, self.data, self.trainer, timed, trials, self.traces)
        if self.device.type == "cuda" and not isinstance(self.trainer.strategy, FSDP2Strategy):
            measured = measured_memory(estimator.parts, step, trials[0][-1])
            self.found.facts["memory"]["measured"] = measured
            self.memory_findings = list(memory_findings(estimator.least(step), estimator.device, self.name, measured))
        if (used := module.scoring_budget.tokens) < module.token_budget:
            text = f"scoring passes of {module.token_budget} tokens ran out of memory, and of {used} tokens did not"
            self.found.add([Finding("warning", "memory", text, "model.token_budget", f"set it to {used}")])

    def _fits(self, step: Step) -> bool:
        """Return True if a trial step fits into memory. On a CPU the system would kill a process that needs too much."""
        return self.device.type == "cuda" or self.estimator.parts(step)["total"] < 0.9 * self.estimator.device.available

    def _examples(self, rows: PromptBatch) -> tuple[Examples, Teacher | None]:
        """Return a few prompts with the first tokens of their traces, and the teacher that scores them."""
        module = self.module
        picked = _spread(len(rows.examples), self.examples)
        students = [rows.student[i] for i in picked]
        tokenizer = module.tokenizer
        texts = [rows.examples[i].trace or rows.examples[i].answer or "The answer" for i in picked]
        completions = [tokenizer.encode(text, add_special_tokens=False)[:LOOKED_AT] for text in texts]
        teacher, context = (module.teacher, module.context) if isinstance(module, DistillationModule) else (None, None)
        needs = module.data_requirements
        reads = needs.privileged and needs.teacher_prompts
        if context is not None:
            text = f"model.context is {type(context).__name__}, which is made from completions in training: "
            text += "the teacher is checked with data.context instead" if reads else "the teacher is not checked"
            self.found.add([Finding("note", "divergence", text, "model.context")])
            teacher = teacher if reads else None
        return Examples(students, [rows.teacher[i] for i in picked] if reads else students, completions), teacher


def refusal_finding(part: str, error: Exception | str) -> Finding:
    """Return the finding for an error, with the fields of a `ConfigError` or the message of another error."""
    if isinstance(error, ConfigError):
        return Finding("error", part, error.problem, error.setting, error.fix)
    return Finding("error", part, str(error))


def _spread(total: int, count: int) -> Sequence[int]:
    """Return up to ``count`` evenly spaced numbers below ``total``."""
    return range(0, total, max(-(-total // count), 1))
