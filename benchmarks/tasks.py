"""Held-out scores of the recipes in ``configs/tasks`` before and after training, over several seeds.

    python -m benchmarks.tasks --task choice --seeds 0 1 2
    python -m benchmarks.tasks --report                      only print the table of the existing results

Each run is the command line's ``fit`` and ``test`` with the recipe as it is, except that there is one validation, after the
last step. The weights after that step are graded. The untrained student and the teacher are graded once for each task.
Results are written to ``docs/results/tasks``, one JSON file for the untrained model and one for each seed. They have the
verdict on each held-out question, so that the table can be computed again without the runs. A finished run is not repeated.
"""

from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import Any

import yaml

RESULTS = Path(__file__).resolve().parents[1] / "docs" / "results" / "tasks"


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.tasks", description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--task", help="name of the recipe in configs/tasks")
    parser.add_argument("--seeds", type=int, nargs="*", default=[0, 1, 2], help="seeds of the runs (default: 0 1 2)")
    parser.add_argument("--model", help="another model's hub id or folder")
    parser.add_argument("--output", type=Path, default=Path("runs/task_seeds"), help="runs (default: %(default)s)")
    parser.add_argument("--results", type=Path, default=RESULTS, help="folder of the results (default: docs/results/tasks)")
    parser.add_argument("--report", action="store_true", help="only print the table of the existing results")
    options = parser.parse_args(argv)
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    if not options.report:
        if options.task is None:
            parser.error("--task is missing")
        from opsd_lightning.quickstart import MODEL_FOLDER, obtain_model

        model = options.model or str(obtain_model(MODEL_FOLDER))
        runs = Runs(options.task, model, options.output / options.task, options.results)
        runs.before()
        for seed in options.seeds:
            runs.train(seed)
    print(table(options.results))


class Runs:
    """Runs of one task, with a result file for each.

    Args:
        task: Name of the recipe.
        model: Hub id or folder of the model.
        folder: Folder of the runs.
        results: Folder of the result files.
    """

    def __init__(self, task: str, model: str, folder: Path, results: Path) -> None:
        self.task, self.model, self.folder, self.results = task, model, folder, results
        recipe = f"configs/tasks/{task}.yaml"
        self.common = ["--config", recipe, f"--model.policy.model={model}"]
        self.test = ["test", *self.common, "--verbose=false"]
        self.steps = yaml.safe_load(Path(recipe).read_text(encoding="utf-8"))["trainer"]["max_steps"]

    def before(self) -> None:
        """Grade the untrained model as student and as teacher."""
        from opsd_lightning.quickstart import run, say

        done = self.results / f"{self.task}-before.json"
        if done.exists():
            return
        say(f"{self.task}, before training")
        folder = self.folder / "before"
        run([*self.test, f"--trainer.default_root_dir={folder}", "--model.evaluate_teacher=true"])
        roles = {role: verdicts(folder, role) for role in ("student", "teacher")}
        self._write(done, {"task": self.task, **roles, "completions_sha256": digest_of(folder)})

    def train(self, seed: int) -> None:
        """Train, and grade the weights after the last step."""
        from benchmarks.real_model.runs import read_log
        from opsd_lightning.quickstart import run, say

        done = self.results / f"{self.task}-seed{seed}.json"
        if done.exists():
            return
        say(f"{self.task}, seed {seed}")
        folder = self.folder / f"seed{seed}"
        fit = [f"--seed_everything={seed}", f"--trainer.default_root_dir={folder}"]
        fit += [f"--trainer.logger.init_args.save_dir={folder}", "--trainer.num_sanity_val_steps=0"]
        fit += [f"--trainer.val_check_interval={self.steps}"]
        trained = run(["fit", *self.common, *fit])
        best = trained.trainer.checkpoint_callback.best_model_path
        run([*self.test, f"--trainer.default_root_dir={folder / 'after'}", f"--ckpt_path={best}"])
        rows, validations = read_log(folder)
        result = {
            "task": self.task,
            "seed": seed,
            "student": verdicts(folder / "after", "student"),
            "validation": validations,
            "optimizer_steps": len(rows),
            "tokens_generated": rows[-1]["train/tokens_generated"],
            "completions_sha256": digest_of(folder / "after"),
        }
        self._write(done, result)

    def _write(self, path: Path, result: dict[str, Any]) -> None:
        from benchmarks.learning.run import write
        from opsd_lightning.runs.provenance import made_with

        path.parent.mkdir(parents=True, exist_ok=True)
        write(
            path,
            result | {"made_with": made_with(self.model)},
        )


def verdicts(folder: Path, role: str) -> str:
    """Return the verdicts on the held-out questions of a role as digits, 1 for a right completion."""
    from opsd_lightning.runs.reader import read_records

    records = [record for record in read_records(folder / "test.jsonl") if record["role"] == role]
    return "".join(str(int(record["correct"])) for record in records)


def digest_of(folder: Path) -> str:
    from opsd_lightning.runs.provenance import file_digest

    return file_digest(folder / "test.jsonl")


def table(results: Path) -> str:
    """Return a Markdown table of all results: the student before, the teacher, and each seed after training."""
    from opsd_lightning.utils.statistics import paired_change, wilson

    lines = ["| task | run | right | 95 % interval | change on the same questions |", "| --- | --- | ---: | ---: | ---: |"]
    for path in sorted(results.glob("*-before.json")):
        before = json.loads(path.read_text(encoding="utf-8"))
        start = [digit == "1" for digit in before["student"]]
        named = [("before", before["student"]), ("teacher, before", before["teacher"])]
        seeds = [json.loads(p.read_text(encoding="utf-8")) for p in sorted(results.glob(f"{before['task']}-seed*.json"))]
        named += [(f"after, seed {found['seed']}", found["student"]) for found in seeds]
        for name, digits in named:
            right = [digit == "1" for digit in digits]
            low, high = wilson(right)
            gain, half = paired_change(start, right)
            change = f"{100 * gain:+.1f} ± {100 * half:.1f}" if name.startswith("after") else ""
            share = f"{100 * sum(right) / len(right):.1f} %"
            interval = f"{100 * low:.1f} to {100 * high:.1f} %"
            lines.append(f"| {before['task']} ({len(right)} questions) | {name} | {share} | {interval} | {change} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
