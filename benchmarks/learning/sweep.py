"""All runs of the test bed, in worker processes. Finished runs are not repeated.

    python -m benchmarks.learning.sweep bases                    make the base models and the separate teacher
    python -m benchmarks.learning.sweep tune                     tune each method at equal budgets, on validation questions
    python -m benchmarks.learning.sweep main                     all methods with their settings, on all bases and seeds
    python -m benchmarks.learning.sweep ablations                one-factor changes of the chosen OPSD settings
    python -m benchmarks.learning.sweep report                   tables and figures of the finished runs
    python -m benchmarks.learning.sweep all                      the five, in this order

The file of a run is written atomically, and its name depends on all settings. An interrupted stage therefore resumes, and a
changed setting is run again. Each worker has one thread.
"""

from __future__ import annotations

import argparse
import multiprocessing
import os
import traceback
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, ProcessPoolExecutor, as_completed
from pathlib import Path
from typing import Any

from benchmarks.learning.task import runs_folder

TUNING_SEED = 1000  # different from the seeds of the comparison


def _start_worker() -> None:
    import logging

    import torch
    from transformers.utils import logging as transformers_logging

    torch.set_num_threads(1)
    transformers_logging.disable_progress_bar()
    for name in ("lightning.pytorch", "lightning.fabric", "lightning.pytorch.utilities.rank_zero"):
        logging.getLogger(name).setLevel(logging.WARNING)


def _execute(job: Any, path: Path) -> str:
    from benchmarks.learning.run import execute, write

    result = execute(job)
    write(path, result)
    best = max((row["accuracy"] for row in result["curve"]), default=float("nan"))
    failed = " FAILED: " + result["failed"][:60] if "failed" in result else ""
    return f"validation {best:.1%}, test {result['after']['test']:.1%}, {result['wall_seconds']:.0f} s{failed}"


def in_workers(tasks: Mapping[str, tuple[Callable[..., Any], tuple[Any, ...]]], workers: int) -> list[str]:
    """Call tasks in worker processes, and return the names of those that raised."""
    if not tasks:
        return []
    # Workers inherit the environment, and libraries read their number of threads from it on import.
    os.environ["OMP_NUM_THREADS"] = "1"
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
    failed = []
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(min(workers, len(tasks)), mp_context=context, initializer=_start_worker) as pool:
        futures: dict[Future[Any], str] = {pool.submit(call, *args): name for name, (call, args) in tasks.items()}
        try:
            for number, future in enumerate(as_completed(futures), 1):
                name = futures[future]
                try:
                    print(f"[{number}/{len(tasks)}] {name}: {future.result()}", flush=True)
                except Exception:
                    failed.append(name)
                    print(f"[{number}/{len(tasks)}] {name} raised:\n{traceback.format_exc()}", flush=True)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
    return failed


def run_all(jobs: Iterable[Any], root: Path, workers: int) -> list[Any]:
    """Run the jobs without a result, and return the results of all jobs in order.

    Raises:
        SystemExit: A run raised. The results of the others are kept.
    """
    from benchmarks.learning.run import read

    paths = {job.path(root): job for job in jobs}
    missing = {path: job for path, job in paths.items() if not path.exists()}
    print(f"{len(paths) - len(missing)} of {len(paths)} runs are done; {len(missing)} to do, results in {root}", flush=True)
    failed = in_workers({path.stem: (_execute, (job, path)) for path, job in missing.items()}, workers)
    if failed:
        raise SystemExit(f"{len(failed)} runs raised: {', '.join(failed)}")
    return [read(path) for path in paths]


class Sweep:
    """Stages of the test bed.

    Args:
        options: Options of the command line.
    """

    def __init__(self, options: argparse.Namespace) -> None:
        from benchmarks.learning import methods

        self.options, self.root = options, options.output
        self.known = methods.METHODS | methods.LONG
        if unknown := set(options.methods or ()) - self.known.keys():
            raise SystemExit(f"--methods: no {', '.join(sorted(unknown))}; there are {', '.join(self.known)}")
        self.methods = {name: self.known[name] for name in options.methods or methods.METHODS}
        self.chosen_path = self.root / "chosen.json"

    def others(self) -> list[str]:
        """Return the models beside the bases that the methods need."""
        from benchmarks.learning.run import beside_base

        return sorted({name for method in self.methods.values() for name in beside_base(method.arguments)})

    def bases(self) -> list[Path]:
        from benchmarks.learning.bases import STRONG, Base, Strong, make

        root = self.root / "bases"
        wanted = [Base(seed=seed) for seed in range(self.options.bases)]
        wanted += [Strong()] if STRONG in self.others() else []
        failed = in_workers({base.name: (make, (base, root)) for base in wanted}, self.options.workers)
        if failed:
            raise SystemExit(f"bases raised: {', '.join(failed)}")
        return [root / base.name for base in wanted]

    def base_folders(self, others: Iterable[str] = ()) -> list[Path]:
        """Return the folders of the bases. All of them and the models beside them exist."""
        folders = [self.root / "bases" / f"base{seed}" for seed in range(self.options.bases)]
        for folder in [*folders, *(self.root / "bases" / name for name in others)]:
            if not (folder / "base.json").exists():
                raise SystemExit(f"{folder} does not exist: run the stage `bases` first")
        return folders

    def _measuring(self, method: Any) -> Any:
        from benchmarks.learning.run import Measuring

        # About forty points per curve, at least ten steps apart.
        return Measuring(every_steps=max(10, method.steps // 40))

    def _jobs(self, method: Any, bases: Sequence[Path], seeds: Iterable[int]) -> list[Any]:
        from benchmarks.learning.run import Job

        return [Job(method, str(base), seed, self._measuring(method)) for base in bases for seed in seeds]

    def tune(self) -> dict[str, Any]:
        """Choose for each method the settings with the highest mean final validation accuracy, and write chosen.json."""
        from benchmarks.learning.methods import TUNING, changed
        from benchmarks.learning.run import write

        settings = {
            name: [changed(method, change, f"tune-{name}-{i}") for i, change in enumerate(TUNING[name])]
            for name, method in self.methods.items()
            if name in TUNING
        }
        bases = self.base_folders(self.others())
        jobs = [job for found in settings.values() for method in found for job in self._jobs(method, bases, [TUNING_SEED])]
        results = run_all(jobs, self.root / "tune", self.options.workers)
        chosen: dict[str, Any] = read_or_empty(self.chosen_path)
        for name, found in settings.items():
            scores = []
            for method in found:
                own = [r for r in results if r["settings"]["method"]["name"] == method.name]
                # The mean of the last two points makes the choice less noisy. A failed run counts as 0.
                last = [0.0 if "failed" in r else sum(row["accuracy"] for row in r["curve"][-2:]) / 2 for r in own]
                scores.append(sum(last) / len(last))
            best = max(range(len(found)), key=lambda i: scores[i])
            chosen[name] = {"change": TUNING[name][best], "validation": scores[best], "all": scores}
            print(f"{name}: {TUNING[name][best]} (validation {scores[best]:.1%} of {[f'{s:.1%}' for s in scores]})")
        write(self.chosen_path, chosen)
        return chosen

    def chosen(self, name: str) -> Any:
        """Return a method with the chosen settings, or with its own if it was not tuned."""
        from benchmarks.learning.methods import changed

        found = read_or_empty(self.chosen_path).get(name)
        if found is None:
            print(f"{name} is not tuned: its default settings are used")
        return changed(self.known[name], found["change"] if found else {}, name)

    def main(self) -> dict[str, list[Any]]:
        bases = self.base_folders(self.others())
        jobs = {name: self._jobs(self.chosen(name), bases, range(self.options.seeds)) for name in self.methods}
        results = run_all([job for found in jobs.values() for job in found], self.root / "main", self.options.workers)
        return {name: [r for r in results if r["settings"]["method"]["name"] == name] for name in jobs}

    def ablations(self) -> dict[str, dict[str, list[Any]]]:
        from benchmarks.learning import methods

        tables = {t: rows for t, rows in methods.ABLATIONS.items() if not self.options.tables or t in self.options.tables}
        rows = methods.ablations(self.chosen("opsd"), tables)
        unique = {method.name: method for method in rows.values()}
        bases, seeds = self.base_folders(), range(self.options.ablation_seeds)
        jobs = [job for method in unique.values() for job in self._jobs(method, bases, seeds)]
        results: dict[str, list[Any]] = {}
        for result in run_all(jobs, self.root / "ablations", self.options.workers):
            results.setdefault(result["settings"]["method"]["name"], []).append(result)
        return {
            table: {row: results[rows[f"{table}/{row}"].name] for row in tables[table]}
            for table in tables
        }  # fmt: skip

    def report(self) -> Path:
        """Write tables and figures of the results on disk."""
        from benchmarks.learning import methods, plots, report

        main = {}
        for name in self.methods:
            jobs = self._jobs(self.chosen(name), self.base_folders(), range(self.options.seeds))
            if found := existing(jobs, self.root / "main"):
                main[name] = found
        tables: dict[str, dict[str, list[Any]]] = {}
        bases, seeds = self.base_folders(), range(self.options.ablation_seeds)
        for place, method in methods.ablations(self.chosen("opsd")).items():
            table, _, row = place.partition("/")
            if found := existing(self._jobs(method, bases, seeds), self.root / "ablations"):
                tables.setdefault(table, {})[row] = found
        tables = {table: rows for table, rows in tables.items() if len(rows) > 1}
        target: Path = self.options.report or self.root / "report"
        pictures: list[Path] = []
        if main:
            title = "Chains of three operations modulo 10: mean of all runs, 95 % bands"
            pictures += plots.curves(main, target / "learning", title)
            pictures += plots.retention(main, target / "retention", "Accuracy on each kind of question")
        for table, rows in tables.items():
            pictures += plots.curves(rows, target / f"ablation-{table}", f"OPSD by {table}", ["tokens"])
        names = [picture.name for picture in pictures if picture.suffix == ".png"]
        target.mkdir(parents=True, exist_ok=True)
        path = target / "report.md"
        path.write_text(report.document(main, tables, names), encoding="utf-8")
        print(f"The report is {path}")
        return path


def existing(jobs: Iterable[Any], root: Path) -> list[Any]:
    """Return the results of the jobs that have one."""
    from benchmarks.learning.run import read

    return [read(path) for path in dict.fromkeys(job.path(root) for job in jobs) if path.exists()]


def read_or_empty(path: Path) -> Any:
    from benchmarks.learning.run import read

    return read(path) if path.exists() else {}


STAGES = ("bases", "tune", "main", "ablations", "report")


def main(argv: Sequence[str] | None = None) -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning.sweep", description="Run the test bed.")
    options.add_argument("stage", choices=[*STAGES, "all"])
    options.add_argument("--output", type=Path, default=runs_folder(), help="bases and results (default: %(default)s)")
    options.add_argument("--report", type=Path, help="folder of tables and figures (default: report in --output)")
    options.add_argument("--workers", type=int, default=2, help="processes with one thread each (default: %(default)s)")
    options.add_argument("--bases", type=int, default=3, help="base models (default: %(default)s)")
    options.add_argument("--seeds", type=int, default=5, help="seeds of the comparison (default: %(default)s)")
    options.add_argument("--ablation-seeds", type=int, default=2, help="seeds of the ablations (default: %(default)s)")
    options.add_argument("--methods", nargs="*", help="only these methods")
    options.add_argument("--tables", nargs="*", help="only these ablations")
    chosen = options.parse_args(argv)
    sweep = Sweep(chosen)
    for stage in STAGES if chosen.stage == "all" else [chosen.stage]:
        getattr(sweep, stage)()


if __name__ == "__main__":
    main()
