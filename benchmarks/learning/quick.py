"""``make learn``: the test bed in three minutes. A tiny model learns from its own rollouts on a CPU.

Makes a base model with plain torch, runs the command line three times (test, fit, test) on ``configs/learn.yaml``, and
shows a table of results and the curve of validation accuracy.
"""

from __future__ import annotations

import argparse
import os
import time
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer

from benchmarks.learning.task import runs_folder
from opsd_lightning.quickstart import run, say
from opsd_lightning.runs.reader import read_metrics, read_records
from opsd_lightning.utils.statistics import paired_change, wilson

NOTE = (
    "This is a toy: a model of 144,576 parameters, made weak on purpose on the very task, and a teacher whose reference "
    "holds nearly the whole answer. It shows that the method learns here, not what it would gain on your model and data."
)


class AccuracyLines(Callback):
    """Prints a line with a bar for every validation."""

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        value = float(trainer.callback_metrics["val/avg@1"])
        step = 0 if trainer.sanity_checking else trainer.global_step
        tokens = int(getattr(pl_module, "tokens_generated", 0))
        print(f"  step {step:4}  {tokens:7,} tokens generated  {value:6.1%}  {'#' * round(40 * value)}", flush=True)


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.learning.quick", description="The test bed, briefly.")
    parser.add_argument("--config", default="configs/learn.yaml", help="the run's settings (default: %(default)s)")
    parser.add_argument("--output", type=Path, default=runs_folder() / "quick", help="results (default: %(default)s)")
    parser.add_argument("--seed", type=int, default=0, help="seed for the order of questions and for rollouts")
    parser.add_argument("--short", action="store_true", help="two steps on a barely trained base model, as a smoke test")
    parser.add_argument("rest", nargs="*", metavar="--option value", help="after --: further options of `opsd`")
    options = parser.parse_args(argv)
    started = time.perf_counter()
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from benchmarks.learning.bases import Base, make

    out: Path = options.output
    say("1/4  A base model, pretrained for a minute or two (made once)")
    bases = out / "bases" if options.short else runs_folder() / "bases"
    folder = make(Base(steps=10) if options.short else Base(), bases)
    common = ["--config", options.config, f"--model.policy.model={folder}", f"--seed_everything={options.seed}"]
    common += [f"--trainer.logger.init_args.save_dir={out}"]
    if options.short:
        common += [f"--data.{split}.init_args.size=32" for split in ("train", "val", "test")]
        common += ["--data.batch_size=8", "--trainer.max_steps=2", "--trainer.val_check_interval=1"]
    common += options.rest
    say("2/4  Held-out questions before training, for the student and for the teacher, who has read the reference")
    test = ["test", *common, "--verbose=false"]
    run([*test, f"--trainer.default_root_dir={out / 'before'}", "--model.evaluate_teacher=true"])
    say("3/4  Training on the student's own completions: validation accuracy, greedy")
    fit = run(["fit", *common, f"--trainer.default_root_dir={out}"])
    say("4/4  The same held-out questions with the checkpoint that validated best")
    best = fit.trainer.checkpoint_callback.best_model_path
    run([*test, f"--trainer.default_root_dir={out / 'after'}", f"--ckpt_path={best}"])
    report(out, fit.trainer, time.perf_counter() - started)


def report(out: Path, trainer: Any, seconds: float) -> None:
    """Print the table and the completions of a question, and draw the curve."""
    from rich.console import Console
    from rich.table import Table

    before, after = (read_records(out / when / "test.jsonl") for when in ("before", "after"))
    roles = {
        "student before": [r for r in before if r["role"] == "student"],
        "student after": [r for r in after if r["role"] == "student"],
        "teacher (has read the reference)": [r for r in before if r["role"] == "teacher"],
    }
    console = Console(width=110)
    table = Table(title=f"Test accuracy, {len(after)} questions, greedy decoding", title_justify="left")
    for heading in ("", "accuracy", "95 % interval"):
        table.add_column(heading)
    for name, records in roles.items():
        outcomes = [record["correct"] for record in records]
        low, high = wilson(outcomes)
        table.add_row(name, f"{sum(outcomes) / len(outcomes):.1%}", f"{low:.1%} to {high:.1%}")
    console.print()
    console.print(table)
    pairs = list(zip(roles["student before"], roles["student after"], strict=True))
    gain, spread = paired_change([bool(a["correct"]) for a, _ in pairs], [bool(b["correct"]) for _, b in pairs])
    console.print(f"Change on the same questions: {gain:+.1%} ± {spread:.1%} (95 % interval)")
    old, new = next(((a, b) for a, b in pairs if b["correct"] and not a["correct"]), pairs[0])
    console.print(
        f"{old['question']} modulo 10 is {old['reference']}. Before: {old['completion']}   after: {new['completion']}"
    )
    console.print(NOTE)
    steps, validations = read_metrics(Path(trainer.logger.log_dir) / "metrics.csv")
    tokens = [0.0, *(step["train/tokens_generated"] for step in steps)]
    curve = [{"step": step, "tokens": tokens[step], "accuracy": value} for step, value in validations]
    try:
        from benchmarks.learning.plots import curves

        title = "OPSD on chains of three operations modulo 10 (one run)"
        picture = curves({"opsd": [{"curve": curve}]}, out / "curve", title, ["tokens", "step"])[0]
        console.print(f"The curve: {picture}", soft_wrap=True)
    except SystemExit as error:
        console.print(f"No picture: {error}")
    console.print(f"The adapter: {out / 'adapter'}   Took {seconds / 60:.1f} minutes.", soft_wrap=True)


if __name__ == "__main__":
    main()
