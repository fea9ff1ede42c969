"""The record of a run's settings in its checkpoints, and its comparison with the settings of the run that loads it."""

from __future__ import annotations

import copy
import warnings
from array import array
from collections.abc import Iterable, Iterator, Mapping
from importlib.metadata import version
from typing import Any, NamedTuple

from lightning.pytorch.utilities import rank_zero_info, rank_zero_warn
from torch.optim import Optimizer
from torch.optim.lr_scheduler import ChainedScheduler, LambdaLR, LRScheduler, MultiplicativeLR, SequentialLR

from opsd_lightning.checkpoints.file import SECOND_ADAPTER, mismatched_weights
from opsd_lightning.models.fingerprint import adapter_record, base_record, described, digest, plain
from opsd_lightning.teachers import FixedTeacher, ModelTeacher
from opsd_lightning.types import ConfigError, PromptBatch
from opsd_lightning.utils.redaction import redact

KEY = "opsd_made_with"
_ALLOW = "model.allow_checkpoint_changes"
_PACKAGES = ("torch", "transformers", "peft")
# Names of PEFT's LoRA settings in `LoRA`.
_LORA_NAMES = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
# Attributes of a scheduler that count its steps and are not settings.
_SCHEDULER_PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
# Settings that may change when training is resumed: those of some methods, and those of every method.
_METHOD_SETTINGS = ("likelihood", "reward", "clip_ratio", "anchor", "context", "trace_share", "max_importance_ratio")
_COMMON_SETTINGS = ("max_grad_norm", "updates_per_batch")
# Nested settings that are not recorded: one has no effect on results, an anchor's teacher is recorded with the teachers.
_NOT_RECORDED = ("logits_memory_mib", "teacher")
# Optimizer settings that identify its kind if a checkpoint does not name its class.
_KIND_SETTINGS = ("betas", "momentum", "alpha", "rho", "etas", "lambd")
# Optimizer settings that need a state that the optimizer does not keep without them.
_STATE_SETTINGS = ("amsgrad", "centered")


class Difference(NamedTuple):
    """A setting whose value in a checkpoint differs from this run's.

    Args:
        setting: Name of the setting on the command line.
        saved: Value in the checkpoint.
        current: Value in this run.
    """

    setting: str
    saved: Any
    current: Any

    def __str__(self) -> str:
        return f"{self.setting} {_format(self.saved)} -> {_format(self.current)}"


class OptimizerDifferences(NamedTuple):
    """Differences between the optimizer and schedule of a checkpoint and those of this run.

    Args:
        optimizer: Differences that make the saved optimizer state unusable.
        group_sizes: Different numbers of parameters in the groups, which make it unusable too.
        schedule: A different class of schedule.
        values: Differences of single values, with which training can be resumed.
    """

    optimizer: list[Difference]
    group_sizes: list[Difference]
    schedule: list[Difference]
    values: list[Difference]


class Configured:
    """The initial settings of the optimizer and its schedule, before a checkpoint is loaded.

    Args:
        optimizer: The newly made optimizer.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [plain(_settings(group)) for group in optimizer.param_groups]
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.record: dict[str, Any] = {"class": _class_name(optimizer), "groups": groups, "sizes": sizes, "scheduler": None}
        self.start = [copy.deepcopy(_settings(group)) for group in optimizer.param_groups]
        self.calls_functions = False

    def add(self, scheduler: LRScheduler) -> None:
        """Record the settings of a newly made schedule of the optimizer."""
        settings = plain(scheduler.state_dict(), _SCHEDULER_PROGRESS)
        self.record["scheduler"] = {"class": _class_name(scheduler), "settings": settings}
        self.start = [copy.deepcopy(_settings(group)) for group in scheduler.optimizer.param_groups]
        self.calls_functions = _calls_functions(scheduler)

    def apply(self, optimizer: Optimizer, scheduler: LRScheduler | None, steps: int) -> None:
        """Replace the settings that a checkpoint gave an optimizer by this run's, and keep the optimizer's state.

        Args:
            optimizer: The optimizer.
            scheduler: Its newly made schedule, which is advanced by ``steps``.
            steps: Number of optimizer steps made so far.
        """
        for group, start in zip(optimizer.param_groups, self.start, strict=True):
            group.update(copy.deepcopy(start))
        if scheduler is not None:
            _advance(optimizer, scheduler, steps)


def record_of(module: Any) -> dict[str, Any]:
    """Return the record of a run's settings for its checkpoints. It contains plain values only.

    Args:
        module: The `PolicyModule`, after its model is built.
    """
    trainer = module._trainer
    rows = getattr(getattr(trainer, "datamodule", None), "rows", {}).get("train")
    record: dict[str, Any] = {
        "versions": {name: version(name) for name in _PACKAGES},
        "method": _method_name(module),
        "base": module.base_record or base_record(module.policy, module.model),
        "adapter": adapter_record(module.model),
        "teachers": _teacher_records(module),
        "seed": int(module.seed),
        "settings": _method_settings(module),
    }
    if isinstance(rows, PromptBatch):
        data = trainer.datamodule
        if module.rows_digest is None or module.rows_digest[0] is not rows:
            module.rows_digest = (rows, rows_digest(rows))
        record["data"] = {
            "rows": len(rows.examples),
            "digest": module.rows_digest[1][0],
            "tokens_digest": module.rows_digest[1][1],
            "batch_size": int(data.batch_size),
            "devices": trainer.world_size,
            "seed": int(data.seed),
        }
    if module.configured is not None:
        record["optimizer"] = module.configured.record | {"lr": [float(group["lr"]) for group in _param_groups(module)]}
    return record


def compare(module: Any, checkpoint: dict[str, Any]) -> bool:
    """Compare the record in a checkpoint with this run, before the checkpoint is loaded.

    Resuming training requires the same value of every setting that determines the rest of the run. Evaluation requires the
    same base model and adapter settings, and the same teacher if it is graded. Other differences in the settings of the
    optimizer, the objective and sampling are reported, and ``checkpoint`` is modified so that this run's values are used.

    Args:
        module: The `PolicyModule`, after its model is built.
        checkpoint: The contents of the checkpoint. A sharded checkpoint needs no tensors of the optimizer.

    Returns:
        True if `Configured.apply` must be called after the checkpoint is loaded.

    Raises:
        ConfigError: A required setting differs, and ``allow_checkpoint_changes`` is False, or the checkpoint has no
            optimizer state and training is to be resumed.
    """
    trainer = module._trainer
    resumes = trainer is not None and trainer.state.fn == "fit"
    if resumes and "lr_schedulers" not in checkpoint:
        raise ConfigError(
            "the checkpoint contains only weights (save_weights_only), and training cannot be resumed without the "
            "optimizer state",
            "ckpt_path",
            "Choose a checkpoint that was saved without save_weights_only, or evaluate this one",
        )
    if KEY not in checkpoint:
        rank_zero_warn(
            "ckpt_path: the checkpoint has no record of its settings, so they are not compared with this run's. Make sure "
            "that the base model, LoRA settings, optimizer, batch size, seed and data are the same"
        )
    current, saved = record_of(module), checkpoint.get(KEY)
    if not resumes:
        _refuse(module, checkpoint, [] if saved is None else _model_differences(saved, current, False, module))
        return False
    if module.configured is None:
        module.configure_optimizers()  # records the settings; Lightning makes the optimizer itself later
        current = record_of(module)
    required: list[Difference] = []
    changed: list[Difference] = []
    adapter_differs = False
    if saved is None:
        saved = {"optimizer": _infer_optimizer_record(checkpoint, module.configured)}
    else:
        required = [*_model_differences(saved, current, True, module), *_data_differences(saved, current)]
        adapter_differs = any(_policy_differences(saved, current, True, module))
        changed = list(_setting_differences(saved, current))
    found = _optimizer_differences(saved.get("optimizer"), current.get("optimizer"))
    # A different adapter has a different number of parameters, and is reported already.
    sizes = [] if adapter_differs else found.group_sizes
    _refuse(module, checkpoint, [*required, *found.optimizer, *sizes, *found.schedule])
    if warning := _move_position(checkpoint, saved, current):
        rank_zero_warn(warning)
    if found.optimizer or found.group_sizes:
        rank_zero_warn("the checkpoint's optimizer state does not fit this run's optimizer, which starts with a new state")
        checkpoint["optimizer_states"] = []
    values = found.values
    changes_class = bool(found.optimizer or found.group_sizes or found.schedule)
    configured = module.configured
    if configured is not None and configured.calls_functions and KEY in checkpoint and not (changes_class or values):
        values = _learning_rate_differences(module, saved, int(checkpoint["global_step"]))
    if values or changed:
        rank_zero_info(f"This run's settings replace those of the checkpoint: {', '.join(map(str, [*values, *changed]))}")
    if not (changes_class or values):
        return False
    checkpoint["lr_schedulers"] = []
    return True


def check_weights(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint's weights have the names and shapes of a run's weights.

    Args:
        module: The `PolicyModule`, after its model is built.
        checkpoint: The contents of the checkpoint, as in `compare`.

    Raises:
        ConfigError: They do not. The message names the settings that the names and shapes depend on.
    """
    mismatches = mismatched_weights(checkpoint["state_dict"], module.state_dict(), module.policy)
    if not mismatches:
        return
    saved = checkpoint.get(KEY) or {}
    causes = [f"{_second_adapter_setting(module, saved, setting)} ({example})" for setting, example in mismatches.items()]
    raise ConfigError(
        "the checkpoint does not fit this configuration, because these settings give its weights other names or shapes: "
        f"{'; '.join(causes)}",
        "ckpt_path",
        "Set these settings to the values that the checkpoint was made with",
    )


def rows_digest(rows: PromptBatch) -> tuple[str, str]:
    """Return two digests of training rows in their order: of their texts, and of the token ids of prompts and traces."""

    def texts() -> Iterator[str]:
        for example in rows.examples:
            yield "\x1f".join(example.contents) + "\x1e"

    def token_bytes() -> Iterator[bytes]:
        for lists in (rows.student, rows.teacher, rows.traces):
            for tokens in lists:
                yield len(tokens).to_bytes(8, "little")
                yield array("i", tokens).tobytes()

    return digest(texts(), 8), digest(token_bytes(), 8)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _param_groups(module: Any) -> Iterable[Mapping[str, Any]]:
    optimizers = module._trainer.optimizers if module._trainer is not None else []
    return optimizers[0].param_groups if optimizers else module.configured.start


def _class_name(part: Any) -> str:
    kind = type(part)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _method_name(module: Any) -> str:
    """Return the name of the method's class in this package, so that a user's subclass can load its checkpoints."""
    own = __name__.partition(".")[0]
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == own)


def _teacher_records(module: Any) -> dict[str, Any]:
    """Return the records of all teachers by their setting. Teachers with the same setting are numbered."""
    found: dict[str, Any] = {}
    for teacher in getattr(module, "teachers", ()):
        name, number = teacher.setting, 1
        while name in found:
            number += 1
            name = f"{teacher.setting} ({number})"
        found[name] = described(teacher)
        if isinstance(teacher, ModelTeacher) and teacher.recipe is not None:
            found[name]["base"] = teacher.base
    return found


def _method_settings(module: Any) -> dict[str, Any]:
    """Return the settings of training that may change when it is resumed."""
    found = {f"model.{name}": getattr(module, name) for name in _COMMON_SETTINGS}
    found |= {f"model.{name}": vars(module)[name] for name in _METHOD_SETTINGS if name in vars(module)}
    if "model.likelihood" not in found:
        found["model.objective"] = module.objective
    if _method_name(module) != "SFTModule":  # it trains on traces, without sampling
        found["model.sampling"] = module.sampling
    if module._trainer is not None:
        found["trainer.precision"] = str(module._trainer.precision)
    return {name: redact(described(value, _NOT_RECORDED), name) for name, value in found.items()}


def _second_adapter_setting(module: Any, saved: Mapping[str, Any], setting: str) -> str:
    """Replace `SECOND_ADAPTER` by the one setting that adds the second adapter, if the record shows it."""
    if setting != SECOND_ADAPTER or "teachers" not in saved:
        return setting
    teachers = saved["teachers"].get("model.teacher"), _teacher_records(module).get("model.teacher")
    kinds = [None if teacher is None else teacher["class"] for teacher in teachers]
    if kinds[0] == kinds[1] or not _has_own_adapter(kinds):
        return "model.policy.adapter"
    return str(Difference("model.teacher", *kinds))


def _has_own_adapter(kinds: list[str | None]) -> bool:
    """Return True if one of the teachers has an adapter even if the policy does not start from one."""
    return not {"FixedTeacher", "TrustRegionTeacher", "LiveTeacher", "ModelTeacher", None}.issuperset(kinds)


def _calls_functions(scheduler: LRScheduler) -> bool:
    """Return True if the schedule depends on functions. Its settings then do not determine the learning rate."""
    if isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        return any(map(_calls_functions, scheduler._schedulers))
    return isinstance(scheduler, (LambdaLR, MultiplicativeLR))


def _advance(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> None:
    optimizer._opt_called = True  # type: ignore[attr-defined]  # its steps were made before the checkpoint was saved
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            scheduler.step()


def _refuse(module: Any, checkpoint: Mapping[str, Any], differences: Iterable[Difference]) -> None:
    """Raise an error that lists the differences, or warn about them if they are allowed."""
    text = "; ".join(map(str, differences))
    if not text:
        return
    loadable = not mismatched_weights(checkpoint["state_dict"], module.state_dict(), module.policy)
    problem = f"the checkpoint does not fit this configuration: {text}"
    if module.allow_checkpoint_changes:
        if loadable:  # otherwise `check_weights` raises an error
            rank_zero_warn(f"ckpt_path: {problem}. It is loaded because {_ALLOW} is true")
        return
    raise ConfigError(
        f"{problem} (checkpoint -> this run)",
        "ckpt_path",
        "Use the settings that it was made with" + (f", or set {_ALLOW} to true" if loadable else ""),
    )


def _upgraded(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    """Return True if the records were made with different versions of libraries."""
    return saved.get("versions") != current["versions"]


def _model_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], resumes: bool, module: Any
) -> Iterator[Difference]:
    if resumes:
        yield from _value_differences("model", saved["method"], current["method"], _upgraded(saved, current))
    yield from _policy_differences(saved, current, resumes, module)
    yield from _teacher_differences(saved, current, resumes, module)


def _policy_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], resumes: bool, module: Any
) -> Iterator[Difference]:
    upgraded = _upgraded(saved, current)
    # After full fine-tuning the checkpoint contains all weights of the student, but not the initial weights, which a fixed
    # teacher uses.
    compare_weights = resumes or current["adapter"] is not None or isinstance(module.evaluator.teacher, FixedTeacher)
    yield from _base_differences("model.policy", saved["base"], current["base"], compare_weights, upgraded)
    prefix = f"model.policy.{'adapter' if module.policy.adapter is not None else 'lora'}"
    first, second = saved["adapter"], current["adapter"]
    if first is None or second is None:
        if first is not second:
            yield Difference(prefix, *(None if adapter is None else "an adapter" for adapter in (first, second)))
        return
    for name in sorted(first.keys() | second.keys()):
        if not resumes and name == "lora_dropout":  # it has no effect on evaluation
            continue
        if upgraded and (name not in first or name not in second):
            continue
        setting = f"{prefix}.{_LORA_NAMES.get(name, f'options.{name}')}"
        if name == "target_modules" and first.get(name) != second.get(name):
            yield Difference(setting, *_summarize_modules(first.get(name) or [], second.get(name) or []))
        else:
            yield from _value_differences(setting, first.get(name), second.get(name), upgraded)


def _teacher_differences(
    saved: Mapping[str, Any], current: Mapping[str, Any], resumes: bool, module: Any
) -> Iterator[Difference]:
    upgraded, graded = _upgraded(saved, current), module.evaluator.teacher
    for setting in sorted(saved["teachers"].keys() | current["teachers"].keys()):
        if not resumes and (graded is None or setting != graded.setting):
            continue
        first, second = (dict(record["teachers"].get(setting) or {}) for record in (saved, current))
        first_base, second_base = first.pop("base", None), second.pop("base", None)
        yield from _value_differences(setting, first or None, second or None, upgraded)
        if first.get("class") != second.get("class"):
            continue
        if first_base is None or second_base is None:
            first_model, second_model = (base and base["model"] for base in (first_base, second_base))
            yield from _value_differences(f"{setting}.model", first_model, second_model, upgraded)
        else:
            yield from _base_differences(setting, first_base, second_base, True, upgraded)


def _base_differences(
    prefix: str, saved: Mapping[str, Any], current: Mapping[str, Any], compare_weights: bool, upgraded: bool
) -> Iterator[Difference]:
    """Yield the differences of two records of a base model. Its path is not compared, because a model may be moved."""
    if compare_weights and saved["weights"] != current["weights"]:
        yield Difference(f"{prefix}.model", *(f"{base['model']} (weights {base['weights']})" for base in (saved, current)))
    for name, setting in (
        *(("class", "model (class)"), ("config", "model"), ("dtype", "dtype"), ("quantization", "quantization")),
        ("rope", "max_length (RoPE frequencies)"),
    ):
        if name in saved:
            yield from _value_differences(f"{prefix}.{setting}", saved[name], current[name], upgraded)


def _setting_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Difference]:
    """Yield the differences of settings that may change when training is resumed, if both records contain them."""
    first, second = saved.get("settings", {}), current["settings"]
    for name in second:
        if name in first:
            yield from _value_differences(name, first[name], second[name], _upgraded(saved, current))


def _data_differences(saved: Mapping[str, Any], current: Mapping[str, Any]) -> Iterator[Difference]:
    if saved["seed"] != current["seed"]:
        yield Difference("seed_everything", saved["seed"], current["seed"])
    first, second = saved.get("data"), current.get("data")
    if first is None or second is None:
        return  # the user's own data loaders
    if first["seed"] != second["seed"] and (first["seed"], second["seed"]) != (saved["seed"], current["seed"]):
        yield Difference("data.seed", first["seed"], second["seed"])
    if _questions_per_step(first) != _questions_per_step(second):
        sizes = (f"{data['batch_size']} x {data['devices']} devices" for data in (first, second))
        yield Difference("data.batch_size", *sizes)
    if first["digest"] != second["digest"]:
        yield Difference("data.train", *(f"{data['rows']} rows (digest {data['digest']})" for data in (first, second)))
    elif _tokens_differ(first, second) and saved["method"] == current["method"]:  # the token ids depend on the method too
        setting = "data.prompts, data.context or the chat template"
        yield Difference(setting, *(f"token ids {data['tokens_digest']}" for data in (first, second)))


def _optimizer_differences(saved: Any, current: Any) -> OptimizerDifferences:
    found = OptimizerDifferences([], [], [], [])
    if saved is None or current is None:
        return found
    if saved["class"] != current["class"]:
        found.optimizer.append(Difference("model.optimizer", saved["class"], current["class"]))
    elif saved["sizes"] != current["sizes"]:
        setting = "model.optimizer (parameters in each group)"
        found.group_sizes.append(Difference(setting, saved["sizes"], current["sizes"]))
    else:
        several = len(current["groups"]) > 1
        for number, (first, second) in enumerate(zip(saved["groups"], current["groups"], strict=True)):
            group = f" (group {number})" if several else ""
            for name in second:
                if name in first and first[name] != second[name]:
                    momentum = name == "momentum" and not first[name] and "SGD" not in current["class"]
                    if momentum or (name in _STATE_SETTINGS and second[name]):
                        found.optimizer.append(Difference(f"model.optimizer.{name}{group}", first[name], second[name]))
                    else:
                        found.values.append(Difference(f"{name}{group}", first[name], second[name]))
    none: dict[str, Any] = {"class": None, "settings": {}}
    first, second = (none if record["scheduler"] is None else record["scheduler"] for record in (saved, current))
    if first["class"] != second["class"]:
        found.schedule.append(Difference("model.lr_scheduler", first["class"], second["class"]))
    else:
        found.values.extend(_value_differences("model.lr_scheduler", first["settings"], second["settings"], False))
    return found


def _infer_optimizer_record(checkpoint: Mapping[str, Any], configured: Configured | None) -> dict[str, Any] | None:
    """Return the optimizer's record of a checkpoint without one, as far as its optimizer state shows the settings."""
    states = checkpoint.get("optimizer_states") or []
    if configured is None or not states or states[0] is None:
        return None
    current, saved_groups = configured.record, states[0]["param_groups"]
    saved_kind, current_kind = (
        [name for name in _KIND_SETTINGS if name in groups[0]] for groups in (saved_groups, current["groups"])
    )
    groups = []
    for saved, start, own in zip(saved_groups, configured.start, current["groups"], strict=False):
        seen = {name: value for name, value in plain(_settings(saved)).items() if name in own}
        if checkpoint["lr_schedulers"]:  # a schedule changes the learning rate, and some schedules change the betas
            same = saved.get("initial_lr") == start.get("initial_lr")
            seen = {
                "weight_decay": seen.get("weight_decay"),
                "lr": own["lr"] if same else saved.get("initial_lr", saved["lr"]),
            }
        groups.append(own | {name: value for name, value in seen.items() if value is not None})
    scheduler = {"class": "another", "settings": {}} if checkpoint["lr_schedulers"] else None
    other_kind = f"an optimizer with {', '.join(saved_kind) or 'other settings'}"
    return {
        "class": current["class"] if saved_kind == current_kind else other_kind,
        "groups": groups,
        "sizes": [len(group["params"]) for group in saved_groups],
        "scheduler": current["scheduler"] if (scheduler is None) == (current["scheduler"] is None) else scheduler,
    }


def _learning_rate_differences(module: Any, saved: Mapping[str, Any], steps: int) -> list[Difference]:
    """Return the learning rates that differ at the checkpoint's step. They may differ although all settings agree."""
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    _advance(optimizer, scheduler, steps)
    rates = [float(group["lr"]) for group in optimizer.param_groups]
    pairs = zip(saved["optimizer"]["lr"], rates, strict=True)
    return [Difference(f"lr at step {steps}", a, b) for a, b in pairs if abs(a - b) > 1e-6 * max(abs(a), abs(b))]


def _move_position(checkpoint: dict[str, Any], saved: Mapping[str, Any], current: Mapping[str, Any]) -> str:
    """Convert the checkpoint's position in the epoch to this run's batches, and return a warning about questions that this
    repeats or leaves out. The warning is empty if the position does not change."""
    first, second = saved.get("data"), current.get("data")
    fit_loop = checkpoint.get("loops", {}).get("fit_loop", {})
    states = fit_loop.get("state_dict", {}).get("combined_loader", [])
    if first is None or second is None or len(states) != 1 or "done" not in states[0]:
        return ""
    before = states[0]["done"]
    if first["digest"] != second["digest"] or _tokens_differ(first, second) or first["seed"] != second["seed"]:
        after, warning = 0, "the epoch starts again, with this run's data and order"
    elif _questions_per_step(first) != _questions_per_step(second):
        after = -(-before * _questions_per_step(first) // _questions_per_step(second))
        position = after * _questions_per_step(second)
        skipped = position - before * _questions_per_step(first)
        warning = f"the epoch continues after its first {position} questions"
        warning += f". {skipped} of them are left out" if skipped else ""
    else:
        return ""
    states[0]["done"] = after
    progress = fit_loop.get("epoch_loop.batch_progress", {}).get("current", {})
    for name in progress:
        progress[name] = max(0, progress[name] + after - before)
    return f"ckpt_path: {warning}"


def _tokens_differ(saved: Mapping[str, Any], current: Mapping[str, Any]) -> bool:
    return "tokens_digest" in saved and saved["tokens_digest"] != current["tokens_digest"]


def _questions_per_step(data: Mapping[str, Any]) -> int:
    return data["batch_size"] * data["devices"]


def _value_differences(setting: str, saved: Any, current: Any, upgraded: bool) -> Iterator[Difference]:
    """Yield the differences of nested settings. If two parts are of different classes, only the classes are compared.

    Args:
        setting: Name of the setting.
        saved: Value in the checkpoint.
        current: Value in this run.
        upgraded: If True, ignore settings that only one of the values has: another version of a library may lack them.
    """
    values = (saved, current)
    kinds = [value.get("class") if isinstance(value, Mapping) else None for value in values]
    if kinds[0] != kinds[1]:
        yield Difference(setting, *(value if kind is None else kind for kind, value in zip(kinds, values, strict=True)))
    elif isinstance(saved, Mapping) and isinstance(current, Mapping):
        for name in sorted(saved.keys() | current.keys()):
            if not (upgraded and (name not in saved or name not in current)):
                path = f"{setting}.{name.removeprefix('_')}"  # schedules keep some arguments as private attributes
                yield from _value_differences(path, saved.get(name), current.get(name), upgraded)
    elif saved != current:
        yield Difference(setting, saved, current)


def _summarize_modules(saved: list[str], current: list[str]) -> tuple[Any, Any]:
    """Return the last parts of the names of adapted modules, or the numbers of modules if those parts are the same."""
    first, second = (sorted({name.rpartition(".")[2] for name in names}) for names in (saved, current))
    return (f"{len(saved)} modules", f"{len(current)} modules") if first == second else (first, second)


def _format(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_format, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_format(part)}' for name, part in value.items())}}}"
    return str(value)
