"""The settings that a checkpoint was made with, and their comparison with those of the run that loads it."""

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

from opsd_lightning.checkpoints.file import mismatched_weights
from opsd_lightning.models.fingerprint import adapter_record, base_record, described, digest, plain
from opsd_lightning.teachers import FixedTeacher, ModelTeacher
from opsd_lightning.types import ConfigError, PromptBatch
from opsd_lightning.utils.redaction import redact

KEY = "opsd_made_with"
_ALLOW = "model.allow_checkpoint_changes"
_PACKAGES = ("torch", "transformers", "peft")
_LORA = {"r": "r", "lora_alpha": "alpha", "lora_dropout": "dropout", "target_modules": "target_modules"}
# Part of a scheduler's progress, not of its settings.
_PROGRESS = {"last_epoch", "_step_count", "_last_lr", "_get_lr_called_within_step", "_is_initial"}
# Change how a run goes on, but not what of the checkpoint can be used.
_METHOD = ("likelihood", "reward", "clip_ratio", "anchor", "context", "trace_share", "max_importance_ratio")
_TRAINER = ("max_grad_norm", "updates_per_batch")
_WITHOUT_EFFECT = ("logits_memory_mib", "teacher")  # an anchor's teacher is recorded with the teachers
_SIZES = "model.optimizer (parameters in each group)"
# Settings that tell kinds of optimizers apart where a checkpoint does not name its own.
_MARKS = ("betas", "momentum", "alpha", "rho", "etas", "lambd")
# Settings that need a state which an optimizer without them has not gathered.
_NEEDS_STATE = ("amsgrad", "centered")


class Difference(NamedTuple):
    """A setting that a checkpoint was made with another value of."""

    setting: str
    theirs: Any
    ours: Any

    def __str__(self) -> str:
        return f"{self.setting} {_short(self.theirs)} -> {_short(self.ours)}"


class Configured:
    """Optimizer and schedule as a run's settings make them, before a checkpoint changes them.

    Args:
        optimizer: Freshly made.
    """

    def __init__(self, optimizer: Optimizer) -> None:
        groups = [plain(_settings(group)) for group in optimizer.param_groups]
        sizes = [len(group["params"]) for group in optimizer.param_groups]
        self.record: dict[str, Any] = {"class": _class_of(optimizer), "groups": groups, "sizes": sizes, "scheduler": None}
        self.start = [copy.deepcopy(_settings(group)) for group in optimizer.param_groups]
        self.calls_functions = False

    def add(self, scheduler: LRScheduler) -> None:
        """Take in the schedule, freshly made for the optimizer."""
        settings = plain(scheduler.state_dict(), _PROGRESS)
        self.record["scheduler"] = {"class": _class_of(scheduler), "settings": settings}
        self.start = [copy.deepcopy(_settings(group)) for group in scheduler.optimizer.param_groups]
        self.calls_functions = _calls_functions(scheduler)

    def apply(self, optimizer: Optimizer, scheduler: LRScheduler | None, steps: int) -> None:
        """Set an optimizer and its schedule to where this run's settings have them after some steps; the optimizer's
        state stays.

        Args:
            optimizer: With whatever settings a checkpoint gave it.
            scheduler: As freshly made.
            steps: Optimizer steps made so far.
        """
        for group, start in zip(optimizer.param_groups, self.start, strict=True):
            group.update(copy.deepcopy(start))
        if scheduler is not None:
            _advance(optimizer, scheduler, steps)


def record_of(module: Any) -> dict[str, Any]:
    """The record that a checkpoint of a run holds: plain values alone.

    Args:
        module: The `PolicyModule`, its model built.
    """
    trainer = module._trainer
    rows = getattr(getattr(trainer, "datamodule", None), "rows", {}).get("train")
    found: dict[str, Any] = {
        "versions": {name: version(name) for name in _PACKAGES},
        "method": _method_of(module),
        "base": module.base_record or base_record(module.policy, module.model),
        "adapter": adapter_record(module.model),
        "teachers": _teachers(module),
        "seed": int(module.seed),
        "settings": _method_settings(module),
    }
    if isinstance(rows, PromptBatch):
        data = trainer.datamodule
        if module.rows_digest is None or module.rows_digest[0] is not rows:
            module.rows_digest = (rows, rows_digest(rows))
        found["data"] = {
            "rows": len(rows.examples),
            "digest": module.rows_digest[1][0],
            "tokens_digest": module.rows_digest[1][1],
            "batch_size": int(data.batch_size),
            "devices": trainer.world_size,
            "seed": int(data.seed),
        }
    if module.configured is not None:
        found["optimizer"] = module.configured.record | {"lr": [float(g["lr"]) for g in _groups(module)]}
    return found


def compare(module: Any, checkpoint: dict[str, Any]) -> bool:
    """Compare the record of a checkpoint with this run, before anything of it is loaded.

    To resume training, everything that decides the rest of the run has to agree; to evaluate, the base model, the adapter's
    settings and, where it is graded, the teacher. Other settings of the optimizer, the objective and sampling are reported,
    and ``checkpoint`` is changed so that this run's are used.

    Args:
        module: The `PolicyModule`, its model built.
        checkpoint: As loaded; of a sharded one without tensors of the optimizer.

    Returns:
        True if `Configured.apply` has to be called once the checkpoint is loaded.

    Raises:
        ConfigError: Something differs, and ``allow_checkpoint_changes`` is false.
    """
    trainer = module._trainer
    resumes = trainer is not None and trainer.state.fn == "fit"
    if resumes and "lr_schedulers" not in checkpoint:
        raise ConfigError(
            "the checkpoint holds weights alone (save_weights_only), and no optimizer state to go on with",
            "ckpt_path",
            "Give one that was written without save_weights_only, or evaluate it",
        )
    if KEY not in checkpoint:
        rank_zero_warn(
            "ckpt_path: the checkpoint has no record of the settings that it was made with, so that they are not compared "
            "with this run's: make sure that base model, LoRA settings, optimizer, batch size, seed and data are the same"
        )
    ours, theirs = record_of(module), checkpoint.get(KEY)
    if not resumes:
        _refuse(module, checkpoint, [] if theirs is None else list(_of_model(theirs, ours, False, module)))
        return False
    if module.configured is None:
        module.configure_optimizers()  # of no use but for its settings; Lightning has not made one yet
        ours = record_of(module)
    differences: list[Difference] = []
    changed: list[Difference] = []
    if theirs is None:
        theirs = {"optimizer": _seen_in(checkpoint, module.configured)}
    else:
        differences = [*_of_model(theirs, ours, True, module), *_of_data(theirs, ours)]
        changed = list(_of_settings(theirs, ours))
    kinds, values = _of_optimizer(theirs.get("optimizer"), ours.get("optimizer"))
    # Parameters of another number are what another adapter has.
    adapter = any(difference.setting.startswith("model.policy.") for difference in differences)
    _refuse(module, checkpoint, differences + [each for each in kinds if not (adapter and each.setting == _SIZES)])
    if told := _reposition(checkpoint, theirs, ours):
        rank_zero_warn(told)
    if any(difference.setting.startswith("model.optimizer") for difference in kinds):
        rank_zero_warn("the optimizer starts without the checkpoint's state, which is of another kind")
        checkpoint["optimizer_states"] = []
    if module.configured is not None and module.configured.calls_functions and KEY in checkpoint and not (kinds or values):
        values = _of_schedule(module, theirs, int(checkpoint["global_step"]))
    if values or changed:
        rank_zero_info(f"This run's settings take the place of the checkpoint's: {_list([*values, *changed], ', ')}")
    if not (kinds or values):
        return False
    checkpoint["lr_schedulers"] = []
    return True


def check_weights(module: Any, checkpoint: Mapping[str, Any]) -> None:
    """Check that a checkpoint's weights have the names and shapes of a run's.

    Args:
        module: The `PolicyModule`, its model built.
        checkpoint: As for `compare`.

    Raises:
        ConfigError: They do not; the message names the settings that decide it.
    """
    unfit = mismatched_weights(checkpoint["state_dict"], module.state_dict(), module.policy)
    if not unfit:
        return
    theirs = checkpoint.get(KEY) or {}
    told = [f"{_second_adapter(module, theirs, setting)} ({example})" for setting, example in unfit.items()]
    raise ConfigError(
        f"the checkpoint does not fit this configuration, its weights are of other names or shapes: {'; '.join(told)}",
        "ckpt_path",
        "Give these the values that it was made with",
    )


def rows_digest(rows: PromptBatch) -> tuple[str, str]:
    """Digests of training rows in their order: of their texts, and of the token ids of all prompts and traces."""

    def texts() -> Iterator[str]:
        for example in rows.examples:
            yield "\x1f".join(example[:3]) + "\x1e"

    def tokens_of_all() -> Iterator[bytes]:
        for lists in (rows.student, rows.teacher, rows.traces):
            for tokens in lists:
                yield len(tokens).to_bytes(8, "little")
                yield array("i", tokens).tobytes()

    return digest(texts(), 8), digest(tokens_of_all(), 8)


def _settings(group: Mapping[str, Any]) -> dict[str, Any]:
    return {name: value for name, value in group.items() if name not in ("params", "param_names")}


def _groups(module: Any) -> Iterable[Mapping[str, Any]]:
    optimizers = module._trainer.optimizers if module._trainer is not None else []
    return optimizers[0].param_groups if optimizers else module.configured.start


def _class_of(part: Any) -> str:
    kind = type(part)
    return f"{kind.__module__.partition('.')[0]}.{kind.__qualname__}"


def _method_of(module: Any) -> str:
    """The method's class in this package: a user's subclass of it goes on with its checkpoints."""
    own = __name__.partition(".")[0]
    return next(kind.__name__ for kind in type(module).__mro__ if kind.__module__.partition(".")[0] == own)


def _teachers(module: Any) -> dict[str, Any]:
    """Records of all teachers by their settings; numbers tell those apart that share one."""
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
    """Settings that change how training goes on, but not what of a checkpoint can be used."""
    found = {f"model.{name}": getattr(module, name) for name in _TRAINER}
    found |= {f"model.{name}": vars(module)[name] for name in _METHOD if name in vars(module)}
    if "model.likelihood" not in found:
        found["model.objective"] = module.objective
    if _method_of(module) != "SFTModule":  # which samples nothing to train on
        found["model.sampling"] = module.sampling
    if module._trainer is not None:
        found["trainer.precision"] = str(module._trainer.precision)
    return {name: redact(described(value, _WITHOUT_EFFECT), name) for name, value in found.items()}


def _second_adapter(module: Any, theirs: Mapping[str, Any], setting: str) -> str:
    """Name the one of two settings by which a checkpoint holds a second adapter, where its record tells."""
    if setting != "model.teacher or model.policy.adapter" or "teachers" not in theirs:
        return setting
    first, second = theirs["teachers"].get("model.teacher"), _teachers(module).get("model.teacher")
    kinds = [None if each is None else each["class"] for each in (first, second)]
    if kinds[0] == kinds[1] or not _keeps_adapter(kinds):
        return "model.policy.adapter"
    return str(Difference("model.teacher", *kinds))


def _keeps_adapter(kinds: list[str | None]) -> bool:
    """Tell whether one of two teachers keeps an adapter whatever the policy starts from."""
    return not {"FixedTeacher", "TrustRegionTeacher", "LiveTeacher", "ModelTeacher", None}.issuperset(kinds)


def _calls_functions(scheduler: LRScheduler) -> bool:
    """Tell schedules that depend on functions, whose contents their settings do not show."""
    if isinstance(scheduler, (SequentialLR, ChainedScheduler)):
        return any(map(_calls_functions, scheduler._schedulers))
    return isinstance(scheduler, (LambdaLR, MultiplicativeLR))


def _advance(optimizer: Optimizer, scheduler: LRScheduler, steps: int) -> None:
    optimizer._opt_called = True  # type: ignore[attr-defined]  # the steps were made before the checkpoint
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for _ in range(steps):
            scheduler.step()


def _refuse(module: Any, checkpoint: Mapping[str, Any], differences: list[Difference]) -> None:
    if not differences:
        return
    fits = not mismatched_weights(checkpoint["state_dict"], module.state_dict(), module.policy)
    told = f"the checkpoint does not fit this configuration: {_list(differences)}"
    if module.allow_checkpoint_changes:
        if fits:  # else `check_weights` refuses it
            rank_zero_warn(f"ckpt_path: {told}. {_ALLOW} is true, so that it is used")
        return
    raise ConfigError(
        f"{told} (checkpoint -> this run)",
        "ckpt_path",
        "Give it the settings that it was made with" + (f", or set {_ALLOW} to true" if fits else ""),
    )


def _of_model(theirs: Mapping[str, Any], ours: Mapping[str, Any], resumes: bool, module: Any) -> Iterator[Difference]:
    upgraded = theirs.get("versions") != ours["versions"]
    if resumes:
        yield from _between("model", theirs["method"], ours["method"], upgraded)
    # In full fine-tuning the checkpoint brings all weights itself, but not those that a fixed teacher starts from.
    graded = module.evaluator.teacher
    weights = resumes or ours["adapter"] is not None or isinstance(graded, FixedTeacher)
    yield from _of_base("model.policy", theirs["base"], ours["base"], weights, upgraded)
    lora = "adapter" if module.policy.adapter is not None else "lora"
    first, second = theirs["adapter"], ours["adapter"]
    if first is None or second is None:
        if first is not second:
            yield Difference(f"model.policy.{lora}", *(None if each is None else "an adapter" for each in (first, second)))
    else:
        for name in sorted(first.keys() | second.keys()):
            if (resumes or name != "lora_dropout") and not (upgraded and (name not in first or name not in second)):
                setting = f"model.policy.{lora}.{_LORA.get(name, f'options.{name}')}"
                if name == "target_modules" and first.get(name) != second.get(name):
                    yield Difference(setting, *_modules(first.get(name) or [], second.get(name) or []))
                else:
                    yield from _between(setting, first.get(name), second.get(name), upgraded)
    for setting in sorted(theirs["teachers"].keys() | ours["teachers"].keys()):
        if resumes or (graded is not None and setting == graded.setting):
            one, other = (dict(each["teachers"].get(setting) or {}) for each in (theirs, ours))
            base, own = one.pop("base", None), other.pop("base", None)
            yield from _between(setting, one or None, other or None, upgraded)
            if one.get("class") != other.get("class"):
                continue
            if base is None or own is None:
                yield from _between(f"{setting}.model", base and base["model"], own and own["model"], upgraded)
            else:
                yield from _of_base(setting, base, own, True, upgraded)


def _of_base(
    setting: str, theirs: Mapping[str, Any], ours: Mapping[str, Any], weights: bool, upgraded: bool
) -> Iterator[Difference]:
    """Differences of two records of a base model. Its name is not compared: the same weights may lie elsewhere."""
    if weights and theirs["weights"] != ours["weights"]:
        yield Difference(f"{setting}.model", *(f"{each['model']} (weights {each['weights']})" for each in (theirs, ours)))
    for name, place in (
        *(("class", "model (class)"), ("config", "model"), ("dtype", "dtype"), ("quantization", "quantization")),
        ("rope", "max_length (RoPE frequencies)"),
    ):
        if name in theirs:
            yield from _between(f"{setting}.{place}", theirs[name], ours[name], upgraded)


def _of_settings(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Difference]:
    """Differences of settings that both records have and that only change how training goes on."""
    first, second = theirs.get("settings", {}), ours["settings"]
    upgraded = theirs.get("versions") != ours["versions"]
    for name in second:
        if name in first:
            yield from _between(name, first[name], second[name], upgraded)


def _of_data(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> Iterator[Difference]:
    if theirs["seed"] != ours["seed"]:
        yield Difference("seed_everything", theirs["seed"], ours["seed"])
    first, second = theirs.get("data"), ours.get("data")
    if first is None or second is None:
        return  # loaders of a user's own
    if first["seed"] != second["seed"] and (first["seed"], second["seed"]) != (theirs["seed"], ours["seed"]):
        yield Difference("data.seed", first["seed"], second["seed"])
    if _questions(first) != _questions(second):
        sizes = (f"{each['batch_size']} x {each['devices']} devices" for each in (first, second))
        yield Difference("data.batch_size", *sizes)
    if first["digest"] != second["digest"]:
        yield Difference("data.train", *(f"{each['rows']} rows (digest {each['digest']})" for each in (first, second)))
    elif _other_tokens(first, second) and theirs["method"] == ours["method"]:  # which decides the rows' form too
        setting = "data.prompts, data.context or the chat template"
        yield Difference(setting, *(f"token ids {each['tokens_digest']}" for each in (first, second)))


def _of_optimizer(theirs: Any, ours: Any) -> tuple[list[Difference], list[Difference]]:
    """Differences in the kind of optimizer or schedule, and differences in values alone."""
    if theirs is None or ours is None:
        return [], []
    kinds, values = [], []
    if theirs["class"] != ours["class"]:
        kinds.append(Difference("model.optimizer", theirs["class"], ours["class"]))
    elif theirs["sizes"] != ours["sizes"]:
        kinds.append(Difference(_SIZES, theirs["sizes"], ours["sizes"]))
    else:
        several = len(ours["groups"]) > 1
        for number, (first, second) in enumerate(zip(theirs["groups"], ours["groups"], strict=True)):
            for name in second:
                if name in first and first[name] != second[name]:
                    where = f" (group {number})" if several else ""
                    momentum = name == "momentum" and not first[name] and "SGD" not in ours["class"]
                    if momentum or (name in _NEEDS_STATE and second[name]):
                        kinds.append(Difference(f"model.optimizer.{name}{where}", first[name], second[name]))
                    else:
                        values.append(Difference(f"{name}{where}", first[name], second[name]))
    first, second = (
        {"class": None, "settings": {}} if each["scheduler"] is None else each["scheduler"] for each in (theirs, ours)
    )
    if first["class"] != second["class"]:
        kinds.append(Difference("model.lr_scheduler", first["class"], second["class"]))
    else:
        for difference in _between("model.lr_scheduler", first["settings"], second["settings"], False):
            values.append(difference._replace(setting=difference.setting.replace("._", ".")))
    return kinds, values


def _seen_in(checkpoint: Mapping[str, Any], configured: Configured | None) -> dict[str, Any] | None:
    """A record of the optimizer as far as the state of a checkpoint without one shows it."""
    states = checkpoint.get("optimizer_states") or []
    if configured is None or not states or states[0] is None:
        return None
    ours, saved = configured.record, states[0]["param_groups"]
    marks = [[name for name in _MARKS if name in groups[0]] for groups in (saved, ours["groups"])]
    groups = []
    for group, start, own in zip(saved, configured.start, ours["groups"], strict=False):
        seen = {name: value for name, value in plain(_settings(group)).items() if name in own}
        if checkpoint["lr_schedulers"]:  # which moves the rate, and some also the betas
            same = group.get("initial_lr") == start.get("initial_lr")
            seen = {
                "weight_decay": seen.get("weight_decay"),
                "lr": own["lr"] if same else group.get("initial_lr", group["lr"]),
            }
        groups.append(own | {name: value for name, value in seen.items() if value is not None})
    scheduled = {"class": "another", "settings": {}} if checkpoint["lr_schedulers"] else None
    return {
        "class": ours["class"] if marks[0] == marks[1] else f"an optimizer with {', '.join(marks[0]) or 'other settings'}",
        "groups": groups,
        "sizes": [len(group["params"]) for group in saved],
        "scheduler": ours["scheduler"] if (scheduled is None) == (ours["scheduler"] is None) else scheduled,
    }


def _of_schedule(module: Any, theirs: Mapping[str, Any], steps: int) -> list[Difference]:
    """Learning rates that differ at the checkpoint's step although the settings that can be seen do not."""
    made = module.configure_optimizers()
    optimizer, scheduler = made["optimizer"], made["lr_scheduler"]["scheduler"]
    _advance(optimizer, scheduler, steps)
    now = [float(group["lr"]) for group in optimizer.param_groups]
    pairs = zip(theirs["optimizer"]["lr"], now, strict=True)
    return [Difference(f"lr at step {steps}", a, b) for a, b in pairs if abs(a - b) > 1e-6 * max(abs(a), abs(b))]


def _reposition(checkpoint: dict[str, Any], theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> str:
    """Move the place in the epoch to where it is for this run's batches; returns what to tell the user."""
    first, second = theirs.get("data"), ours.get("data")
    fit = checkpoint.get("loops", {}).get("fit_loop", {})
    states = fit.get("state_dict", {}).get("combined_loader", [])
    if first is None or second is None or len(states) != 1 or "done" not in states[0]:
        return ""
    place = states[0]["done"]
    if first["digest"] != second["digest"] or _other_tokens(first, second) or first["seed"] != second["seed"]:
        now, told = 0, "the epoch begins anew, with this run's data and order"
    elif _questions(first) != _questions(second):
        now = -(-place * _questions(first) // _questions(second))
        left_out = now * _questions(second) - place * _questions(first)
        told = f"the epoch goes on behind its first {now * _questions(second)} questions" + (
            f", of which {left_out} are left out" if left_out else ""
        )
    else:
        return ""
    states[0]["done"] = now
    progress = fit.get("epoch_loop.batch_progress", {}).get("current", {})
    for name in progress:
        progress[name] = max(0, progress[name] + now - place)
    return f"ckpt_path: {told}"


def _other_tokens(theirs: Mapping[str, Any], ours: Mapping[str, Any]) -> bool:
    return "tokens_digest" in theirs and theirs["tokens_digest"] != ours["tokens_digest"]


def _questions(data: Mapping[str, Any]) -> int:
    return data["batch_size"] * data["devices"]


def _between(setting: str, theirs: Any, ours: Any, upgraded: bool) -> Iterator[Difference]:
    """Differences of nested settings, of parts of different classes the classes alone. A setting that only one version of a
    library knows is not compared with another's."""
    kinds = [each.get("class") if isinstance(each, Mapping) else None for each in (theirs, ours)]
    if kinds[0] != kinds[1]:
        parts = zip(kinds, (theirs, ours), strict=True)
        yield Difference(setting, *(each if kind is None else kind for kind, each in parts))
    elif isinstance(theirs, Mapping) and isinstance(ours, Mapping):
        for name in sorted(theirs.keys() | ours.keys()):
            if not (upgraded and (name not in theirs or name not in ours)):
                yield from _between(f"{setting}.{name}", theirs.get(name), ours.get(name), upgraded)
    elif theirs != ours:
        yield Difference(setting, theirs, ours)


def _modules(theirs: list[str], ours: list[str]) -> tuple[Any, Any]:
    first, second = (sorted({name.rpartition(".")[2] for name in names}) for names in (theirs, ours))
    return (f"{len(theirs)} modules", f"{len(ours)} modules") if first == second else (first, second)


def _short(value: Any) -> str:
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, list):
        return f"[{', '.join(map(_short, value))}]"
    if isinstance(value, Mapping):
        return f"{{{', '.join(f'{name}: {_short(part)}' for name, part in value.items())}}}"
    return str(value)


def _list(differences: list[Difference], between: str = "; ") -> str:
    return between.join(map(str, differences))
