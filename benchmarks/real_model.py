"""OPSD against SFT and GRPO with a real model on word problems, at equal completions and at equal generated tokens.

    python -m benchmarks.real_model                      SmolLM2-135M-Instruct, all methods, three seeds
    python -m benchmarks.real_model --methods opsd --seeds 1

Each run is the command line's ``fit`` and ``test`` on the quick start's configuration, with the overlay of the method and
the learning rate in ``METHODS``. The score is that of the weights after the last step, not of the best checkpoint. OPSD and
GRPO sample equally many completions per step but not equally many tokens. The last column of the table therefore compares
validation accuracies at the number of tokens that the run with the fewest tokens generated in total. SFT trains on the
traces of the questions that OPSD uses. The ``result.json`` of a run has its settings, versions and hashes. An interrupted
run resumes from its last checkpoint, and a finished run is not repeated. All runs of an output folder have the same model,
number of steps and number of questions.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import platform
import subprocess
from importlib.metadata import version
from pathlib import Path
from typing import Any

from benchmarks.learning.report import at

CONFIG = "configs/quickstart.yaml"

SECONDS = ("time/rollout_seconds", "time/scoring_seconds")

#: Overlay and learning rate by name. Each method runs with two learning rates, and both are reported.
METHODS = {
    "opsd": (None, 5e-4),
    "opsd, rate x 2": (None, 1e-3),
    "sft": ("configs/presets/sft.yaml", 5e-4),
    "sft, rate x 2": ("configs/presets/sft.yaml", 1e-3),
    "grpo": ("configs/presets/grpo.yaml", 5e-4),
    "grpo, rate x 2": ("configs/presets/grpo.yaml", 1e-3),
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.real_model", description=__doc__.splitlines()[0])  # type: ignore[union-attr]
    parser.add_argument("--model", help="another model's hub id or folder")
    parser.add_argument("--output", type=Path, default=Path("runs/real_model"), help="results (default: %(default)s)")
    parser.add_argument("--methods", nargs="*", choices=list(METHODS), default=list(METHODS))
    parser.add_argument("--seeds", type=int, default=3, help="runs of each method (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=12, help="optimizer steps (default: %(default)s)")
    parser.add_argument("--questions", type=int, default=256, help="held-out questions (default: %(default)s)")
    parser.add_argument("--report", action="store_true", help="only print the table of the existing results")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    from opsd_lightning.quickstart import MODEL_FOLDER, obtain_model

    out: Path = options.output
    if not options.report:
        model = options.model or str(obtain_model(MODEL_FOLDER))
        agree(out, {"model_sha256": model_hash(model), "steps": options.steps, "questions": options.questions})
        before(model, out, options.questions)
        for seed in range(options.seeds):
            for name in options.methods:
                once(name, model, out, seed, options.steps, options.questions)
    report(out)


def agree(out: Path, asked: dict[str, Any]) -> None:
    """Check that a folder has results of the same model, number of steps and number of questions only.

    Raises:
        SystemExit: The results in the folder have other settings.
    """
    from benchmarks.learning.run import write
    from opsd_lightning.runs.reader import read_records

    held: list[tuple[Path, dict[str, Any]]] = []
    if (record := out / "settings.json").exists():
        held.append((record, json.loads(record.read_text(encoding="utf-8"))))
    if (untrained := out / "before" / "test.jsonl").exists():
        held.append((untrained, {"questions": sum(row["role"] == "student" for row in read_records(untrained))}))
    for path in sorted(out.glob("*/result.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        questions = next(a.split("=")[1] for a in found["arguments"] if a.startswith("--data.test.init_args.size="))
        settings = {"model_sha256": found["made_with"]["model_sha256"], "steps": found["optimizer_steps"]}
        held.append((path, settings | {"questions": int(questions)}))
        if found["method"] in METHODS and (rate := METHODS[found["method"]][1]) != found["learning_rate"]:
            raise SystemExit(
                f"error: {path} has learning rate {found['learning_rate']}, METHODS {rate}: give another --output"
            )
    for path, settings in held:
        other = [f"{k} {value} (asked for: {asked[k]})" for k, value in settings.items() if value != asked[k]]
        if other:
            raise SystemExit(
                f"error: {path} is of other settings: {', '.join(other)}. Ask for those, or give another --output"
            )
    write(record, asked)


def before(model: str, out: Path, questions: int) -> None:
    """Evaluate the untrained model as student and as teacher."""
    from opsd_lightning.quickstart import run, say

    if (out / "before" / "test.jsonl").exists():
        return
    say("before training")
    run(
        [
            "test",
            "--config",
            CONFIG,
            f"--model.policy.model={model}",
            f"--data.test.init_args.size={questions}",
            "--verbose=false",
            f"--trainer.default_root_dir={out / 'before'}",
            "--model.evaluate_teacher=true",
        ]
    )


def once(name: str, model: str, out: Path, seed: int, steps: int, questions: int) -> None:
    """Train, score the last weights, and write ``result.json``."""
    from benchmarks.learning.run import write
    from opsd_lightning.quickstart import run, say

    folder = out / f"{name.replace(', ', '-').replace(' ', '')}-seed{seed}"
    done = folder / "result.json"
    if done.exists():
        return
    say(f"{name}, seed {seed}")
    overlay, rate = METHODS[name]
    common = ["--config", CONFIG, *(["--config", overlay] if overlay else []), f"--model.init_args.policy.model={model}"]
    common += [f"--seed_everything={seed}", f"--model.init_args.optimizer.init_args.lr={rate}"]
    common += [f"--model.init_args.lr_scheduler.init_args.max_lr={rate}"]
    common += [f"--model.init_args.lr_scheduler.init_args.total_steps={steps}"]
    common += [f"--data.test.init_args.size={questions}"]
    fit = [f"--trainer.default_root_dir={folder}", f"--trainer.logger.init_args.save_dir={folder}"]
    fit += [f"--trainer.max_steps={steps}", "--trainer.callbacks+=ModelCheckpoint"]
    every = next(n for n in (3, 2, 1) if steps % n == 0)  # saves the last step
    fit += [f"--trainer.callbacks.{key}" for key in (f"dirpath={folder}", "filename=last", f"every_n_train_steps={every}")]
    fit += ["--trainer.callbacks.enable_version_counter=false", "--trainer.callbacks.save_top_k=1"]
    last = folder / "last.ckpt"
    run(["fit", *common, *fit, *([f"--ckpt_path={last}"] if last.exists() else [])])
    run(["test", *common, "--verbose=false", f"--trainer.default_root_dir={folder / 'after'}", f"--ckpt_path={last}"])
    rows, validations = read_log(folder)
    result = {
        "method": name,
        "seed": seed,
        "learning_rate": rate,
        "optimizer_steps": steps,
        "tokens_generated": rows[-1]["train/tokens_generated"],
        "validation": validations,
        # Rollouts and scoring of all steps, without loading, validation and repeated steps.
        "training_seconds": round(sum(value for row in rows for key, value in row.items() if key in SECONDS)),
        "arguments": common + fit,
        "made_with": made_with(model),
        "completions_sha256": digest(folder / "after" / "test.jsonl"),
    }
    write(done, result)


def read_log(folder: Path) -> tuple[list[dict[str, float]], list[tuple[int, float]]]:
    """Read the training steps of a run, and its validations as (optimizer steps, accuracy).

    Each resumption has its own log. For steps that were repeated, the latest log counts.
    """
    from opsd_lightning.runs.reader import read_metrics

    rows: dict[float, dict[str, float]] = {}
    validations: dict[int, float] = {}
    for log in sorted(folder.glob("lightning_logs/version_*/metrics.csv"), key=lambda path: int(path.parent.name[8:])):
        found, measured = read_metrics(log)
        rows |= {row["step"]: row for row in found}
        validations |= dict(measured)
    return [rows[step] for step in sorted(rows)], sorted(validations.items())


def digest(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()


def model_hash(model: str) -> str:
    """Return the hash of the weights in a folder, or the name itself for a hub id."""
    weights = Path(model) / "model.safetensors"
    return digest(weights) if weights.exists() else model


def made_with(model: str) -> dict[str, str]:
    """Return the versions, the revision of this repository and the hash of the model's weights."""
    found = {name: version(name) for name in ("torch", "transformers", "peft", "lightning", "opsd_lightning")}
    git = subprocess.run(["git", "rev-parse", "HEAD"], capture_output=True, text=True, check=False)
    found["revision"] = git.stdout.strip() or "unknown"
    found["model_sha256"] = model_hash(model)
    return found | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}


def report(out: Path) -> None:
    """Return a Markdown table of each method's held-out accuracy, averaged over seeds, and its change."""
    from opsd_lightning.runs.reader import read_records
    from opsd_lightning.utils.statistics import mean_and_interval, wilson

    untrained = read_records(out / "before" / "test.jsonl")
    student = [r["correct"] for r in untrained if r["role"] == "student"]
    teacher = [r["correct"] for r in untrained if r["role"] == "teacher"]
    results: dict[str, list[dict[str, Any]]] = {}
    for path in sorted(out.glob("*/result.json")):
        found = json.loads(path.read_text(encoding="utf-8"))
        found["correct"] = [r["correct"] for r in read_records(path.parent / "after" / "test.jsonl")]
        found["curve"] = curve(path.parent)
        results.setdefault(found["method"], []).append(found)
    # The fewest tokens that a run with rollouts had generated at its last validation.
    ends = [r["curve"][-1]["tokens"] for runs in results.values() for r in runs if r["tokens_generated"]]
    budget = min(ends, default=0)
    print(f"\n| {len(student)} held-out questions | seeds | accuracy | 95 % interval | change | tokens generated", end="")
    print(f" | validation, at the end | validation, at {budget:,.0f} tokens |\n{'| --- ' * 8}|")
    for name, outcomes in (("before", student), ("teacher, before", teacher)):
        low, high = wilson(outcomes)
        print(f"| {name} | | {sum(outcomes) / len(outcomes):.1%} | {low:.1%} to {high:.1%} | | | | |")
    for name in METHODS:
        if not (runs := results.get(name)):
            continue
        # The score of a question is its mean over the seeds. The interval is over questions, for these seeds.
        scores = [sum(column) / len(runs) for column in zip(*(r["correct"] for r in runs), strict=True)]
        mean, half = mean_and_interval(scores)
        change, spread = mean_and_interval([after - before for after, before in zip(scores, student, strict=True)])
        each = ", ".join(f"{sum(r['correct']) / len(student):.1%}" for r in runs)
        tokens = sum(r["tokens_generated"] for r in runs) / len(runs)
        end = sum(r["curve"][-1]["accuracy"] for r in runs) / len(runs)
        reached = [value for r in runs if tokens and (value := at(r["curve"], budget)) is not None]
        equal = f"{sum(reached) / len(reached):.1%}" if reached else "-"
        print(
            f"| {name} | {len(runs)} ({each}) | {mean:.1%} | {mean - half:.1%} to {mean + half:.1%} | "
            f"{change:+.1%} ± {spread:.1%} | {tokens:,.0f} | {end:.1%} | {equal} |"
        )


def curve(folder: Path) -> list[dict[str, float]]:
    """Return the validations of a run with the tokens generated until then."""
    rows, validations = read_log(folder)
    tokens = {row["step"] + 1: row["train/tokens_generated"] for row in rows}
    return [{"step": step, "tokens": tokens.get(step, 0.0), "accuracy": value} for step, value in validations]


if __name__ == "__main__":
    main()
