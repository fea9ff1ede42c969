"""Callback `KeptSkills`, which measures skills that a run does not train."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterator, Mapping
from copy import copy
from pathlib import Path
from statistics import fmean
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer
from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from rich.console import Console
from rich.table import Table
from torch.distributed.tensor import DTensor

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.distributed.collectives import run_on_all_ranks
from opsd_lightning.evaluation.skills import ItemScore, SkillResult, SkillSet, has_base, measure_skill
from opsd_lightning.evaluation.store import described
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.fingerprint import digest
from opsd_lightning.rollouts.base import Demand
from opsd_lightning.runs.reader import RECORD_FOLDER
from opsd_lightning.runs.record import CHECKPOINT_ID, belongs_to_another_run, is_newest_checkpoint
from opsd_lightning.teachers import is_identity
from opsd_lightning.types import ConfigError, PositiveInt, checked
from opsd_lightning.utils.disk_errors import warn_on_write_error
from opsd_lightning.utils.files import atomic_write
from opsd_lightning.utils.folders import free_name
from opsd_lightning.utils.terminal import safe_markup, say

_PREFIX = {"fit": "skills/", "validate": "val/skills/", "test": "test/skills/"}
_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.\-]*")


@checked
class KeptSkills(Callback):
    """Callback that measures skills that the run does not train, and their change since before training.

    In ``fit`` it measures the untrained model at the start, the trained one at each validation (or every
    ``every_n_steps``), and at the end. In ``validate`` and ``test`` it measures the weights at hand and, if ``base`` is
    True, the base model, with all adapters disabled. Both answer the same items, so the change of a score is paired, and
    its interval is smaller than those of the two scores.

    In ``fit`` the metrics are ``skills/SET``, its standard error over items ``skills/SET_se``, the change since the base
    model ``skills/SET_change`` and the half-width of its 95 % interval ``skills/SET_change_ci95``. In ``test`` their names
    begin with ``test/skills/`` and in ``validate`` with ``val/skills/``, and there is ``SET_base`` too. `BaseDivergence` has
    no base value and no change.

    Every item is written to ``skills.jsonl`` (in ``fit``), ``skills_validate.jsonl`` or ``skills_test.jsonl``, one JSON
    object a line: ``step``, ``set``, ``role`` (``base`` or ``run``), ``item``, ``question``, ``score``, ``weight``, and what
    the set adds, such as the completion. A resumed run continues the file of ``fit``; a new run renames an earlier one to
    ``skills-1.jsonl`` and so on. The other two are replaced. With ``fast_dev_run`` nothing is written.

    The base model is the one of ``model.policy.model``, also where ``model.policy.adapter`` starts from an adapter. In full
    fine-tuning, the base model is only measured at the start of ``fit``: ``test`` then measures the weights at hand alone.

    Args:
        sets: The sets of skills, by name. Names consist of letters, digits, and the signs ``_``, ``.`` and ``-``.
        every_n_steps: Number of optimizer steps between measurements in ``fit``, at least 1. Defaults to a measurement at
            each validation.
        base: If True, ``validate`` and ``test`` measure the base model too.
        folder: Folder of the files, relative to the trainer's ``default_root_dir``.

    Example::

        >>> from opsd_lightning import CategoryQuestions, ChoicesByLikelihood, KeptSkills
        >>> KeptSkills({"facts": ChoicesByLikelihood(CategoryQuestions(size=300, seed=9), scored="label")}).base
        True
    """

    #: True for callbacks that write to ``default_root_dir`` in ``fit``. `runs.lock` allows one such run at a time.
    writes_to_root = True

    #: True for callbacks that need logged metrics.
    reads_metrics = True

    def __init__(
        self,
        sets: dict[str, SkillSet],
        every_n_steps: PositiveInt | None = None,
        base: bool = True,
        folder: str = ".",
    ) -> None:
        setting = "trainer.callbacks.sets"
        if not sets:
            raise ConfigError("it is empty", setting, "Name a set, or leave KeptSkills out")
        for name in sets:
            if not _NAME.fullmatch(name) or name.endswith(("_se", "_base", "_change", "_ci95")):
                fix = "Use letters, digits, _, . and -, and no ending of a metric such as _se"
                raise ConfigError(f"{name!r} cannot name a metric", setting, fix)
        self.sets, self.every_n_steps, self.base, self.folder = sets, every_n_steps, base, folder
        #: Results of the base model by set.
        self.of_base: dict[str, SkillResult] = {}
        #: Results of the weights of the last measurement, by set.
        self.of_run: dict[str, SkillResult] = {}
        #: Values of all measurements of a fit, for `RunReport`: one entry for each step and set.
        self.history: list[dict[str, Any]] = []
        self._digests: dict[str, str] = {}
        self._told: set[tuple[str, str]] = set()  # sets with a warning, and its kind
        self._measured: int | None = None  # step of the last measurement of the run
        self._multiples = 0  # multiples of every_n_steps so far
        self._is_branch, self._is_new = True, False  # as in RolloutTable

    # -- preparation -------------------------------------------------------------------------------------------------------

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if stage not in _PREFIX or not isinstance(pl_module, PolicyModule):
            return
        self._measured, self._is_branch, self._is_new = None, True, False
        self.of_base, self.of_run, self.history = {}, {}, []
        batches = {"test": "limit_test_batches", "validate": "limit_val_batches"}
        if stage in batches and not getattr(trainer, batches[stage]):
            problem = "it is 0, so that Lightning skips the evaluation and KeptSkills would measure nothing"
            raise ConfigError(problem, f"trainer.{batches[stage]}", "Set it to 1 to measure little but the skills")
        self._told = set()
        data = getattr(trainer, "datamodule", None)
        kwargs = data.prompts.of_split("test").student_chat_template_kwargs if isinstance(data, OPSDDataModule) else {}
        digests: dict[str, str] = {}
        for name, skills in self.sets.items():
            try:
                skills.setup(pl_module.policy, kwargs)
            except ConfigError as error:
                own = not error.setting.startswith("model.")
                setting = f"trainer.callbacks.sets.{name}.init_args.{error.setting}" if own else error.setting
                raise ConfigError(error.problem, setting, error.fix) from None
            digests[name] = _digest(skills)
        self._digests = digests
        run_on_all_ranks(lambda: self._check_file(self._path(trainer, stage)) if trainer.is_global_zero else None)

    def demand(self, stage: str) -> list[Demand]:
        """Return the largest rollout of each set, for engines that reserve room. Called after `setup`."""
        found = (skills.demand() for skills in self.sets.values())
        return [each for each in found if each is not None] if stage in _PREFIX else []

    def logged_names(self, module: PolicyModule) -> set[str]:
        """Return the names of all metrics that a fit logs."""
        found = set()
        for name, skills in self.sets.items():
            endings = ("", "_se", "_change", "_change_ci95") if skills.graded else ("", "_se")
            found |= {f"{_PREFIX['fit']}{name}{ending}" for ending in endings}
        return found

    def better(self, metric: str) -> str | None:
        """Return ``max`` if larger values of a metric of `logged_names` are better, ``min`` if smaller ones are."""
        name = metric.removeprefix(_PREFIX["fit"])
        skills = self.sets.get(name.removesuffix("_change"))
        return None if skills is None else "max" if skills.graded else "min"

    # -- fit ---------------------------------------------------------------------------------------------------------------

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        record, identifier = Path(trainer.default_root_dir) / RECORD_FOLDER, checkpoint.get(CHECKPOINT_ID)
        self._is_branch = not is_newest_checkpoint(record, identifier)
        self._is_new = belongs_to_another_run(record, identifier)

    def state_dict(self) -> dict[str, Any]:
        scores = {name: [item.score for item in result.items] for name, result in self.of_base.items()}
        values = {"base": scores, "digests": dict(self._digests), "measured": self._measured}
        return values | {"history": [dict(entry) for entry in self.history]}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        # A set with other items or settings than before the checkpoint starts anew.
        same = {name for name, digest in self._digests.items() if state_dict["digests"].get(name) == digest}
        for name, scores in state_dict["base"].items():
            if name in same:
                self.of_base[name] = SkillResult([ItemScore(score) for score in scores])
        self._measured = state_dict["measured"]
        self.history = [dict(entry) for entry in state_dict["history"] if entry["set"] in same]

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if not isinstance(pl_module, PolicyModule):
            return
        if trainer.global_step == 0:
            self.of_base, self._measured, self.history = {}, None, []
        self._multiples = trainer.global_step // (self.every_n_steps or 1)
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._path(trainer, "fit")
            with warn_on_write_error(trainer, str(path)):
                _prepare(path, 0 if self._is_new else trainer.global_step, self._is_branch, self._keeps)
        self._measure_base(trainer, pl_module, "fit")
        if trainer.global_step == 0:
            self._measure(trainer, pl_module, "fit", 0)

    def _keeps(self, record: Mapping[str, Any], step: int) -> bool:
        """Return True for a record that a run which resumes at a step does not write again."""
        if record["role"] == "base":
            return record["set"] in self.of_base
        if not any(entry["set"] == record["set"] for entry in self.history):
            return False
        return bool(record["step"] < step or (record["step"] == step and self._measured == step))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        if self.every_n_steps is not None and isinstance(pl_module, PolicyModule):
            before, self._multiples = self._multiples, trainer.global_step // self.every_n_steps
            if self._multiples > before:  # at the step of Lightning's own metrics
                self._measure(trainer, pl_module, "fit", trainer.fit_loop.epoch_loop._batches_that_stepped)
                # For callbacks that monitor them.
                pl_module.log_dict(self._metrics("fit"), logger=False, batch_size=1)

    def on_validation_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.sanity_checking or not isinstance(pl_module, PolicyModule):
            return
        if trainer.state.fn != "fit":
            self._evaluate(trainer, pl_module, "validate")
        elif self.every_n_steps is None and self._measured != trainer.global_step:
            self._measure(trainer, pl_module, "fit")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, PolicyModule) and self._measured != trainer.global_step:
            self._measure(trainer, pl_module, "fit", trainer.fit_loop.epoch_loop._batches_that_stepped - 1)

    def on_fit_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer, "fit")

    # -- validate and test -------------------------------------------------------------------------------------------------

    def on_test_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if isinstance(pl_module, PolicyModule):
            self._evaluate(trainer, pl_module, "test")

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == "validate":
            self._print(trainer, "validate")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._print(trainer, "test")

    def _evaluate(self, trainer: Trainer, module: PolicyModule, stage: str) -> None:
        if trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            path = self._path(trainer, stage)
            with warn_on_write_error(trainer, str(path)):
                atomic_write(path, "")
        self.of_base = {}  # a checkpoint may hold those of a fit
        if self.base:
            self._measure_base(trainer, module, stage)
        self._measure(trainer, module, stage)

    def _print(self, trainer: Trainer, stage: str) -> None:
        if trainer.is_global_zero and self.of_run:
            print_skills(self.sets, self.of_base, self.of_run)
            if not trainer.fast_dev_run:  # type: ignore[attr-defined]
                say(f"Kept skills, item by item: {self._path(trainer, stage)}")

    # -- measurements ------------------------------------------------------------------------------------------------------

    def _measure_base(self, trainer: Trainer, module: PolicyModule, stage: str) -> None:
        """Measure the base model with the graded sets that have no result of it yet."""
        missing = {name: skills for name, skills in self.sets.items() if skills.graded and name not in self.of_base}
        if not missing:
            return
        untrained = stage == "fit" and trainer.global_step == 0
        if not has_base(module.model) and not untrained:
            rank_zero_info(
                "KeptSkills: the base model is not measured, because all weights train (model.policy.lora is null) and it "
                "is not in memory. Measure it in a run without --ckpt_path"
            )
            return
        # In full fine-tuning the untrained weights are the base model's.
        of_base = {name: measure_skill(module, skills, base=has_base(module.model)) for name, skills in missing.items()}
        self.of_base |= of_base
        self._write(trainer, stage, "base", 0 if stage == "fit" else trainer.global_step, of_base)

    def _measure(self, trainer: Trainer, module: PolicyModule, stage: str, logged_step: int | None = None) -> None:
        """Measure the weights at hand, log the metrics and write the records. Every rank must call.

        Args:
            trainer: The trainer.
            module: The module.
            stage: ``fit``, ``validate`` or ``test``.
            logged_step: Step at which the metrics are passed to the loggers at once, where Lightning would log them later or
                not at all. Defaults to logging them with the evaluation.
        """
        is_base = not _may_be_trained(module)
        self.of_run = {
            name: self.of_base[name] if is_base and name in self.of_base else measure_skill(module, skills)
            for name, skills in self.sets.items()
        }
        self._measured = trainer.global_step
        if stage == "fit":
            self.history += [self._entry(trainer.global_step, name, result) for name, result in self.of_run.items()]
        self._write(trainer, stage, "run", trainer.global_step, self.of_run)
        values = self._metrics(stage)
        if logged_step is None:
            module.log_dict(values, batch_size=1)
        for logger in trainer.loggers if logged_step is not None else ():
            logger.log_metrics(values, step=logged_step)
        self._warn()

    def _warn(self) -> None:
        """Warn of truncated completions and of values that are not finite, once for each set."""
        for name, skills in self.sets.items():
            results = [found[name].items for found in (self.of_base, self.of_run) if name in found]
            broken = max(sum(map(_is_broken, items)) for items in results)
            truncated = max(fmean(bool(item.details.get("truncated")) for item in items) for items in results)
            if broken and (name, "broken") not in self._told:
                self._told.add((name, "broken"))
                rank_zero_warn(
                    f"KeptSkills: {broken} of {len(results[0])} items of {name} have values that are not finite: the "
                    "weights have diverged, or the precision is too low. Lower model.optimizer.init_args.lr, or set "
                    "trainer.precision to 32-true"
                )
            if skills.graded and truncated > 0.5 and (name, "truncated") not in self._told:
                self._told.add((name, "truncated"))
                rank_zero_warn(
                    f"KeptSkills: {truncated:.0%} of the completions of {name} were truncated, so its scores say little. "
                    f"Raise trainer.callbacks.sets.{name}.init_args.max_new_tokens. If they are thoughts, switch thinking "
                    "off instead: set prompts beside it to {student_template: '{question}', student_chat_template_kwargs: "
                    "{enable_thinking: false}}"
                )

    def _entry(self, step: int, name: str, result: SkillResult) -> dict[str, Any]:
        before = self.of_base.get(name)
        return {
            "step": step,
            "set": name,
            "graded": self.sets[name].graded,
            "items": len(result.items),
            "value": result.value,
            "interval": list(result.interval),
            "base": None if before is None else before.value,
            "change": None if before is None else list(result.change(before)),
        }

    def _metrics(self, stage: str) -> dict[str, float]:
        found: dict[str, float] = {}
        for name, result in self.of_run.items():
            found |= {name: result.value, f"{name}_se": result.error}
            if (before := self.of_base.get(name)) is not None:
                change, half = result.change(before)
                found |= {f"{name}_change": change, f"{name}_change_ci95": half}
                if stage != "fit":
                    found[f"{name}_base"] = before.value
        return {f"{_PREFIX[stage]}{name}": value for name, value in found.items()}

    # -- files -------------------------------------------------------------------------------------------------------------

    def _path(self, trainer: Trainer, stage: str) -> Path:
        name = "skills.jsonl" if stage == "fit" else f"skills_{stage}.jsonl"
        return Path(trainer.default_root_dir) / self.folder / name

    def _check_file(self, path: Path) -> None:
        if path.is_symlink() or (path.exists() and not path.is_file()):
            problem = f"{path} is not a regular file"
            raise ConfigError(problem, "trainer.callbacks.folder", "Choose another folder or move this one away")

    def _write(self, trainer: Trainer, stage: str, role: str, step: int, results: Mapping[str, SkillResult]) -> None:
        if not trainer.is_global_zero or trainer.fast_dev_run:  # type: ignore[attr-defined]
            return
        path = self._path(trainer, stage)
        with warn_on_write_error(trainer, str(path)):
            written = path.read_bytes() if path.exists() else b""
            lines = [json.dumps(record, allow_nan=False) for record in self._records(role, step, results)]
            atomic_write(path, written + "".join(f"{line}\n" for line in lines).encode())

    def _records(self, role: str, step: int, results: Mapping[str, SkillResult]) -> Iterator[dict[str, Any]]:
        for name, result in results.items():
            for number, (example, item) in enumerate(zip(self.sets[name].examples, result.items, strict=True)):
                record: dict[str, Any] = {
                    "step": step,
                    "set": name,
                    "role": role,
                    "item": number,
                    "question": example.question,
                }
                yield _finite(record | {"score": item.score, "weight": item.weight} | dict(item.details))


def _digest(skills: SkillSet) -> str:
    """Return a digest of all that determines the scores of a set's items: the items, and the set's class and settings."""
    items = [(example.contents, example.columns) for example in skills.examples]
    settings = copy(skills)
    for name in ("source", "examples", "batch_size"):  # the items count, wherever they come from
        vars(settings).pop(name, None)
    return digest([json.dumps(described(part), sort_keys=True, default=repr) for part in (items, settings)])


def _is_broken(item: ItemScore) -> bool:
    """Return True for an item with values that are not finite."""
    return not math.isfinite(item.score) or "problem" in item.details


def _finite(value: Any) -> Any:
    """Return a value with null in place of numbers that JSON does not have: infinity and NaN."""
    if isinstance(value, Mapping):
        return {key: _finite(each) for key, each in value.items()}
    return None if isinstance(value, float) and not math.isfinite(value) else value


def print_skills(sets: Mapping[str, SkillSet], base: Mapping[str, SkillResult], run: Mapping[str, SkillResult]) -> None:
    """Print the scores of some sets before and after training as a table, and each divergence as a line.

    Args:
        sets: The sets, by name.
        base: Results of the base model. Sets without one have no change.
        run: Results of the trained weights.
    """
    table = Table("set", "items", "base", "run", "change, 95 % interval", title="Kept skills", title_justify="left")
    console = Console(width=100, emoji=False)
    for name, result in run.items():
        if sets[name].graded:
            before, change = base.get(name), ""
            if before is not None:
                mean, half = result.change(before)
                change = f"{100 * mean:+.1f} ± {100 * half:.1f} points"
            shown = "" if before is None else f"{before.value:.1%}"
            table.add_row(safe_markup(name), str(len(result.items)), shown, f"{result.value:.1%}", change)
    if table.row_count:
        console.print(table)
    for name, result in run.items():
        if not sets[name].graded:
            say(
                f"{name}: KL(base || run) {result.value:.4f} ± {result.error:.4f} (standard error) nats a token, on "
                f"{result.units:.0f} tokens of the base model's answers to {len(result.items)} prompts"
            )


def _may_be_trained(module: PolicyModule) -> bool:
    """Return False if the weights at hand are surely the base model's."""
    if not has_base(module.model) or any(isinstance(p, DTensor) for p in module.model.parameters()):
        return True
    return not is_identity(module.model)


def _prepare(path: Path, step: int, keep: bool, keeps: Callable[[Mapping[str, Any], int], bool]) -> None:
    """Prepare the file of a fit: a new run renames it, a resumed one removes the records that it will write again.

    Args:
        path: The file. It need not exist.
        step: Optimizer steps already made, above 0 for a resumed run.
        keep: If True, save a copy as ``skills-1.jsonl`` and so on before records are removed.
        keeps: Returns True for a record that is kept when a run resumes at a step.
    """
    if not path.exists():
        return
    if not step:
        path.rename(free_name(path))
        return
    content = path.read_bytes()
    whole = [line for line in content.splitlines(keepends=True) if line.endswith(b"\n")]
    kept = b"".join(line for line in whole if keeps(json.loads(line), step))
    if kept != content:
        if keep:
            atomic_write(free_name(path), content)
        atomic_write(path, kept)
