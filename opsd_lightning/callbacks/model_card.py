"""Model cards of exported adapters and models: the README.md that the Hugging Face hub shows.

A card contains no secrets and no paths of this machine. A local file or folder appears by its name only.
"""

from __future__ import annotations

import re
import shutil
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, NamedTuple

import jinja2
from huggingface_hub import ModelCard, ModelCardData
from lightning.pytorch import Trainer
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer

from opsd_lightning import __version__
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import ExampleSource, HubSource
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.models.export import ADAPTER
from opsd_lightning.models.fingerprint import described, plain
from opsd_lightning.models.policy import STUDENT, Policy, base_of
from opsd_lightning.rollouts.vllm.protocol import max_lora_rank
from opsd_lightning.runs.provenance import hub_commit, hub_license, license_in, weights_digest
from opsd_lightning.runs.record import device_summary, library_versions
from opsd_lightning.types import Example
from opsd_lightning.utils.folders import MANIFEST, replace_folder
from opsd_lightning.utils.redaction import redact, redact_text
from opsd_lightning.utils.terminal import escape_controls

Kind = Literal["adapter", "merged", "model"]

_MAX_ROWS, _MAX_COLUMNS, _MAX_CHARACTERS = 24, 3, 400
# Attributes of a method that the card shows if they are not None, with their labels.
_PARTS = {
    "teacher": "Teacher",
    "objective": "Objective",
    "context": "Context made in each step",
    "learn_from": "Completions learned from",
    "reward": "Reward",
    "clip_ratio": "Clip ratio",
    "trace_share": "Share of steps on traces",
    "anchor": "Anchor",
    "sampling": "Sampling",
    "max_grad_norm": "Gradient norm limit",
    "updates_per_batch": "Optimizer steps on a batch",
}
_LEFT_OUT = ("logits_memory_mib", "columns", "headers", "url", "base_url", "api_key")
_OPTIMIZER_SETTINGS = ("lr", "max_lr", "weight_decay", "betas", "momentum")
_LIMITS, _HELD_OUT = "## Intended use and limits", "## Held-out result"
_OWN_TEMPLATE = "The chat template is that of the base model."
_OTHER_TEMPLATE = "The chat template is that of the run (`model.policy.chat_template`), not that of the base model."


class BaseModel(NamedTuple):
    """The model that a policy starts from.

    Args:
        name: Hub id, or None if it is unknown.
        revision: Branch, tag or commit of the hub id that the policy was loaded with, or None.
        commit: Commit of the hub id in the local cache, or None.
        digest: SHA-256 of local weights, or None.
        license: License of the base model, or None if it is unknown.
    """

    name: str | None
    revision: str | None = None
    commit: str | None = None
    digest: str | None = None
    license: str | None = None


@dataclass
class Validation:
    """Metrics of one validation.

    Args:
        tokens: Completion tokens generated in training so far.
        values: Metrics by name.
    """

    tokens: int
    values: dict[str, float]


def is_local(model: str) -> bool:
    """Return True if a policy's model is a folder or file, as transformers decides it."""
    with suppress(OSError, RuntimeError):
        return Path(model).expanduser().exists()
    return False


def loaded_commit(policy: Policy) -> str | None:
    """Return the commit of a policy's hub id in the local cache. None for a folder or file, and if it is not there.

    Call it soon after the model was loaded: another process may download a newer commit of the branch.
    """
    return None if is_local(policy.model) else hub_commit(policy.model, policy.revision)


def base_model_of(policy: Policy, given: str | None, commit: str | None) -> BaseModel:
    """Return the facts about a policy's base model that are known without a network.

    Args:
        policy: The policy.
        given: Hub id of a base model that is loaded from a folder or a file, or None.
        commit: Result of `loaded_commit`.
    """
    if not is_local(policy.model):
        licence = hub_license(policy.model, commit or policy.revision)
        return BaseModel(policy.model, policy.revision, commit, license=licence)
    path = Path(policy.model).expanduser()
    licence = license_in(path) or (hub_license(given) if given else None)
    return BaseModel(given, digest=weights_digest(path), license=licence)


def model_card(
    trainer: Trainer,
    module: PolicyModule,
    kind: Kind,
    base: BaseModel,
    best: Any,
    history: Mapping[int, Validation],
    name: str | None = None,
) -> str:
    """Return the model card of an export as Markdown with YAML metadata.

    Args:
        trainer: Trainer of the run.
        module: The trained module.
        kind: Contents of the export: an ``adapter``, the ``merged`` model, or the ``model`` of full fine-tuning.
        base: The base model.
        best: The `ModelCheckpoint` that kept the exported checkpoint. None for the weights of the last step.
        history: Validations by optimizer step.
        name: Hub id of the export. Defaults to a placeholder.
    """
    data = getattr(trainer, "datamodule", None)
    sources = data.sources if isinstance(data, OPSDDataModule) else {}
    train = sources.get("train")
    hub = revision = None
    if isinstance(train, HubSource) and not is_local(train.path):
        hub, revision = train.path, train.revision
    relation: dict[str, Any] = {"base_model_relation": "adapter" if kind == "adapter" else "finetune"} if base.name else {}
    metadata = ModelCardData(
        base_model=base.name,
        datasets=[hub] if hub else None,
        library_name="peft" if kind == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=["opsd-lightning", "on-policy-distillation", *(["lora"] if kind == "adapter" else [])],
        **relation,
    )
    monitor = None if best is None else best.monitor
    environment = jinja2.Environment(trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined)
    text = environment.from_string(_TEMPLATE).render(
        kind=kind,
        title=name or {"adapter": "LoRA adapter", "merged": "Merged model", "model": "Model"}[kind],
        name=name or {"adapter": "path/to/adapter", "merged": "path/to/merged", "model": "path/to/model"}[kind],
        summary=(type(module).__doc__ or type(module).__name__).strip().splitlines()[0],
        base=base,
        base_rows=_base_rows(module, base),
        settings=_settings(trainer, module),
        rank=_rank(module),
        data=[(split, _source(source), _count(data, split)) for split, source in sources.items() if source is not None],
        data_license=None if hub is None else _license(hub_license(hub, revision, "dataset"), "dataset's"),
        context=_call(described(data.context, _LEFT_OUT)) if isinstance(data, OPSDDataModule) else None,
        prompt=_prompt(data),
        template=_OWN_TEMPLATE if module.policy.chat_template is None else _OTHER_TEMPLATE,
        curve=_curve(history, monitor),
        choice=_choice(trainer, best, history),
        chosen=best is not None,
        license=_license(base.license, "base model's"),
        limits=_LIMITS,
        package_version=__version__,
        versions=", ".join(f"{name} {version}" for name, version in library_versions().items() if name != "system"),
    )
    return str(ModelCard(f"---\n{metadata.to_yaml()}\n---\n\n{escape_controls(text)}"))


def add_held_out_result(folder: Path, result: str) -> None:
    """Write a held-out result into the model card of an exported adapter. The folder is replaced atomically.

    Args:
        folder: The export. Without a model card of `model_card`, it stays as it is.
        result: The result as Markdown. It replaces an earlier one.

    Raises:
        ConfigError: The folder contains other files than those of the export.
    """
    path = folder / "README.md"
    text = path.read_text(encoding="utf-8") if path.is_file() else ""
    if _LIMITS not in text:
        return
    before, _, after = text.partition(_LIMITS)
    before = before.partition(_HELD_OUT)[0].rstrip()
    with replace_folder(folder, "folder", ADAPTER) as temporary:
        for each in folder.iterdir():
            if each.is_file() and each.name != MANIFEST:
                shutil.copy2(each, temporary)
        card = f"{before}\n\n{_HELD_OUT}\n\n{result.strip()}\n\n{_LIMITS}{after}"
        (temporary / path.name).write_text(card, encoding="utf-8")


def _base_rows(module: PolicyModule, base: BaseModel) -> list[tuple[str, str]]:
    config = base_of(module.model).config
    architecture = (getattr(config, "architectures", None) or [type(base_of(module.model)).__name__])[0]
    rows = [("Architecture", architecture)]
    if base.name is not None:
        rows.insert(0, ("Base model", base.name))
    if base.revision is not None:
        rows.append(("Revision", base.revision))
    if base.commit is not None:
        rows.append(("Commit", base.commit))
    if base.digest is not None:
        rows.append(("SHA-256 of the weights", base.digest))
    return [(label, _cell(value)) for label, value in rows]


def _settings(trainer: Trainer, module: PolicyModule) -> list[tuple[str, str]]:
    """Return the main settings of a run with their labels."""
    policy = module.policy
    rows: list[tuple[str, Any]] = [("Method", type(module).__name__)]
    for attribute, label in _PARTS.items():
        value = getattr(module, attribute, None)
        if value is not None:
            rows.append((label, described(value, _LEFT_OUT)))
    rows.append(("Rollout engine", type(module.rollouts).__name__))
    config = getattr(module.model, "peft_config", {}).get(STUDENT)
    if config is None:
        rows.append(("Trained weights", "all (full fine-tuning)"))
    else:
        layers = {
            name.rpartition(".")[2]
            for name, part in base_of(module.model).named_modules()
            if isinstance(part, BaseTunerLayer)
        }
        lora = {"r": config.r, "alpha": config.lora_alpha, "dropout": config.lora_dropout, "layers": sorted(layers)}
        rows.append(("LoRA", {"class": "LoRA"} | lora))
        if policy.adapter is not None:
            rows.append(("Adapter that training started from", policy.adapter))
    if (quantization := policy.quantization) is not None:
        rows.append(("Quantization in training", "4 bits" if quantization.load_in_4bit else "8 bits"))
    if module.configured is not None:
        record, start = module.configured.record, module.configured.start[0]
        given = {name: plain(start[name]) for name in _OPTIMIZER_SETTINGS if name in start}
        rows.append(("Optimizer", {"class": record["class"]} | given))
        if record["scheduler"] is not None:
            rows.append(("Learning-rate schedule", record["scheduler"]["class"]))
    rows.append(("Optimizer steps", trainer.global_step))
    if isinstance(data := getattr(trainer, "datamodule", None), OPSDDataModule):
        rows.append(("Questions of a step", data.batch_size * trainer.world_size))
    rows += [("Tokens generated in training", module.tokens_generated), ("Seed", module.seed)]
    rows += [("Precision", str(trainer.precision)), ("Dtype of the base weights", str(base_of(module.model).dtype))]
    rows.append(("Devices", device_summary(trainer.strategy.root_device, trainer.world_size)))
    return [(label, _call(value)) for label, value in rows]


def _call(value: Any) -> str:
    """Return plain settings as the call that makes them, in a Markdown code span."""
    text = _written(redact(value, whole=True))
    return _cell(text if len(text) <= _MAX_CHARACTERS else f"{text[:_MAX_CHARACTERS]} ...")


def _cell(text: str) -> str:
    """Return a text without secrets as a Markdown code span, which may stand in a table."""
    shown = " ".join(redact_text(text).split()).replace("`", "'").replace("|", "\\|")
    return f"`{shown}`"


def _license(name: str | None, owner: str) -> str:
    """Return the license of a repository for the card. Its name is a text of others, and so a code span."""
    return f"unknown: see the {owner} page" if name is None else _cell(name)


def _written(value: Any) -> str:
    if isinstance(value, Mapping):
        name = str(value.get("class", "")).removeprefix("torch.")
        arguments = ", ".join(
            f"{key}={_written(part)}" for key, part in value.items() if key != "class" and part is not None
        )
        return f"{name}({arguments})" if arguments or not name else name
    if isinstance(value, (list, tuple)):
        return f"[{', '.join(map(_written, value))}]"
    return f"{value:g}" if isinstance(value, float) else _portable(str(value))


def _portable(text: str) -> str:
    """Return the name of a local file or folder, and any other text as it is."""
    if "\n" in text or not 0 < len(text) < 1000:
        return text
    with suppress(OSError, RuntimeError, ValueError):
        path = Path(text).expanduser()
        if path.is_absolute() or ("/" in text and (text.startswith(".") or path.exists())):
            return path.name
    return text


def _source(source: ExampleSource) -> str:
    return _call(described(source, (*_LEFT_OUT, "options")))


def _count(data: Any, split: str) -> int | None:
    return len(data.rows[split].examples) if split in data.rows else None


def _prompt(data: Any) -> list[tuple[str, str]]:
    """Return role and text of the student's messages, with ``{question}`` in place of the question."""
    if not isinstance(data, OPSDDataModule):
        return []
    rows = data.rows.get("train")
    chat = bool(rows is not None and rows.examples and rows.examples[0].messages)
    asked: list[Any] = [{"role": "user", "content": "{question}"}] if chat else []
    messages = data.prompts.messages(Example("{question}", "", "", {}, asked))
    return [(message["role"], redact_text(str(message["content"])).replace("~~~~", "~ ~ ~ ~")) for message in messages]


def _curve(history: Mapping[int, Validation], monitor: str | None) -> list[list[str]]:
    """Return the table of validations, the heading first. Empty without validations."""
    names = {name for point in history.values() for name in point.values}
    first = [monitor] if monitor in names else []
    first += sorted(name for name in names if re.fullmatch(r"val/(avg|pass|maj)@\d+", name))
    first += [name for name in ("val/nll", "val/divergence") if name in names]
    columns = list(dict.fromkeys(first))[:_MAX_COLUMNS]
    if not columns:
        return []
    steps = sorted(history)
    if len(steps) > _MAX_ROWS:  # evenly spread, with the first and the last
        steps = sorted({steps[place * (len(steps) - 1) // (_MAX_ROWS - 1)] for place in range(_MAX_ROWS)})
    table = [["optimizer steps", "tokens generated", *columns]]
    for step in steps:
        values = history[step].values
        table.append([str(step), str(history[step].tokens), *(_value(name, values) for name in columns)])
    return table


def _value(name: str, values: Mapping[str, float]) -> str:
    if name not in values:
        return ""
    if "@" not in name:
        return f"{values[name]:.4g}"
    error = values.get(f"{name}_se")
    return f"{values[name]:.1%}" + ("" if error is None else f" ± {error:.1%}")


def _choice(trainer: Trainer, best: Any, history: Mapping[int, Validation]) -> str:
    if best is None or getattr(best, "best_model_score", None) is None:
        return f"The weights are those of the last optimizer step, {trainer.global_step}. No metric chose a checkpoint."
    score, monitor = float(best.best_model_score), str(best.monitor)
    # The first of equal validations was kept. Before the first step there is no checkpoint.
    same = [step for step in sorted(history) if step and abs(history[step].values.get(monitor, float("nan")) - score) < 1e-6]
    where = f"after optimizer step {same[0]}" if same else f"`{Path(best.best_model_path).name}`"
    extreme = "highest" if best.mode == "max" else "lowest"
    shown = f"{score:.1%}" if "@" in monitor else f"{score:.4g}"
    return f"The weights are those of the checkpoint {where}, which had the {extreme} `{monitor}` ({shown})."


def _rank(module: PolicyModule) -> int | None:
    """Return vLLM's ``max_lora_rank`` for the adapter, or None in full fine-tuning."""
    if not isinstance(module.model, PeftModel):
        return None
    config: Any = module.model.peft_config[STUDENT]
    return max_lora_rank(max([config.r, *(config.rank_pattern or {}).values()]))


_TEMPLATE = """\
# {{ title }}

{{ summary }}

Trained with the Python package `opsd-lightning` ([On-Policy Self-Distillation](https://arxiv.org/abs/2601.18734)).
{% if kind == "adapter" %}
This folder is a LoRA adapter in PEFT's format. It needs its base model.
{% elif kind == "merged" %}
This folder is a full model: the base model with a LoRA adapter merged into its weights.
{% else %}
This folder is a full model, all weights of which were trained.
{% endif %}

## Base model

| | |
|---|---|
{% for label, value in base_rows %}
| {{ label }} | {{ value }} |
{% endfor %}
{% if base.digest and base.name %}

The base model was loaded from a local copy. The name above is that of the run's settings.
{% elif base.digest %}

The base model was loaded from a local folder or file. The run's settings do not give its name.
{% endif %}

## Training

| setting | value |
|---|---|
{% for label, value in settings %}
| {{ label }} | {{ value }} |
{% endfor %}
{% if context %}
| Teacher's context | {{ context }} |
{% endif %}

Made with {{ versions }}.
{% if data %}

### Data

| split | source | rows used |
|---|---|---|
{% for split, source, rows in data %}
| {{ split }} | {{ source }} | {{ "not read in training" if rows is none else rows }} |
{% endfor %}
{% endif %}
{% if prompt %}

### Prompt

These are the messages of the prompt. `{question}` is a question of the data. {{ template }}

{% for role, text in prompt %}
~~~~text
{{ role }}: {{ text }}
~~~~
{% endfor %}
{% endif %}

## Validation

{% if curve %}
{{ "| " + curve[0] | join(" | ") + " |" }}
{{ "|" + "---|" * curve[0] | length }}
{% for row in curve[1:] %}
{{ "| " + row | join(" | ") + " |" }}
{% endfor %}
{% if "±" in curve | string %}

± is one standard error.
{% endif %}
{% else %}
The run had no validation.
{% endif %}

{{ choice }}
{% if chosen %}
These questions chose the checkpoint. Its value is therefore an optimistic estimate for new questions.
{% endif %}

{{ limits }}

- The intended use is to answer questions like those of the training data, in the prompt above. Other uses were not measured.
- Completions can be wrong and sound right. Check an answer before you rely on it.
- Skills that the run does not train can get worse.
- Nothing was tested for safety. The limits and biases of the base model remain.

## License

- Base model: {{ license }}
{% if data_license %}
- Training data: {{ data_license }}
{% endif %}

## Use

{% if kind == "adapter" %}
{% set base_name = base.name or "path/to/base-model" %}
{% set argument = ', revision="' ~ base.revision ~ '"' if base.revision else "" %}
{% set option = " --revision " ~ base.revision if base.revision else "" %}
With PEFT:

```python
from peft import PeftModel
from transformers import AutoModelForCausalLM, AutoTokenizer

base = "{{ base_name }}"
tokenizer = AutoTokenizer.from_pretrained(base{{ argument }})
model = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base{{ argument }}), "{{ name }}")
```

With vLLM:

```bash
vllm serve {{ base_name }}{{ option }} --enable-lora --max-lora-rank {{ rank }} --lora-modules opsd={{ name }}
```
{% else %}
With transformers:

```python
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained("{{ name }}")
model = AutoModelForCausalLM.from_pretrained("{{ name }}")
```

With vLLM:

```bash
vllm serve {{ name }}
```
{% endif %}

## Citation

```bibtex
@inproceedings{zhao2026opsd,
  title         = {Self-Distilled Reasoner: On-Policy Self-Distillation for Large Language Models},
  author        = {Zhao, Siyan and Xie, Zhihui and Liu, Mengchen and Huang, Jing and Pang, Guan and Chen, Feiyu and
                   Grover, Aditya},
  booktitle     = {Proceedings of the 43rd International Conference on Machine Learning (ICML)},
  series        = {PMLR},
  volume        = {306},
  year          = {2026},
  eprint        = {2601.18734},
  archivePrefix = {arXiv}
}

@software{opsd_lightning,
  title   = {opsd-lightning: On-Policy Self-Distillation for PyTorch Lightning},
  author  = {% raw %}{{opsd-lightning contributors}}{% endraw %},
  version = {{ "{" ~ package_version ~ "}" }},
  year    = {2026}
}
```
"""
