"""Tables of the comparison, computed from the result files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.learning.report import markdown
from benchmarks.learning.run import read
from benchmarks.real_model.settings import ARMS, SEQUENCE_ARMS, Arm, all_rates
from opsd_lightning import StoryContinuations
from opsd_lightning.utils.statistics import paired_change, wilson_interval

Result = dict[str, Any]

#: Title of each measured set, and how to read its verdicts from the measurements of a run.
SETS: dict[str, Callable[[Result], str]] = {
    "target": lambda found: found["target"]["strict"],
    "target, last number": lambda found: found["target"]["last_number"],
    "transfer": lambda found: found["transfer"]["strict"],
    "transfer, last number": lambda found: found["transfer"]["last_number"],
    "facts": lambda found: found["facts"],
    "stories": lambda found: found["stories"],
    "formats": lambda found: found["formats"],
}
KEPT = ("facts", "stories", "formats")
TRAINED = tuple(name for name in SETS if name not in KEPT)


class Report:
    """Reads the results of a folder and writes its tables.

    Intervals are 95 % intervals over questions (over situations for stories), for the seeds at hand. The scores of each seed
    are in the table of all runs.

    Args:
        results: Folder of the result files.
    """

    def __init__(self, results: Path) -> None:
        self.found = {path.stem: read(path) for path in sorted(results.glob("*.json"))}

    def tables(self) -> dict[str, str]:
        """Return all tables that the results allow, as Markdown, by their titles."""
        made = {
            "Learning rates": self.rates,
            "The trained task": lambda: self.scores(TRAINED),
            "Skills that were not trained": lambda: self.scores(KEPT, drift=True),
            "Change from the untrained model": self.changes,
            "OPSD minus the other method": self.differences,
            "Each run": self.runs,
            "Two tasks in sequence": self.sequence,
        }
        return {title: table for title, make in made.items() if (table := make())}

    def text(self) -> str:
        return "\n\n".join(f"### {title}\n\n{table}" for title, table in self.tables().items())

    def rates(self) -> str:
        """Return the validation accuracy of each learning rate after the last step (seed 0), for both tasks."""
        rows = []
        for prefix in ("", "second-"):
            for arm in ARMS.values():
                runs = [self.found.get(f"{prefix}{arm.name}-lr{rate:g}-seed0") for rate in all_rates()]
                if any(runs) and arm.tuned == arm:
                    cells = [f"{100 * run['validation']:.1f} %" if run else "-" for run in runs]
                    rows.append([f"{arm.name}{', second task' if prefix else ''}", *cells])
        return markdown(["validation accuracy, seed 0", *(f"rate {rate:g}" for rate in all_rates())], rows) if rows else ""

    def scores(self, columns: Sequence[str], drift: bool = False) -> str:
        """Return mean held-out scores over the seeds, and with ``drift`` the divergence from the base model."""
        base = self.found.get("base-measured")
        if base is None:
            return ""
        headings = ["%, with 95 % interval", "runs", "rate", *columns, *["divergence, nats a token"] * drift]
        rows = [["before", "", "", *shares([base], columns), *["0"] * drift]]
        for arm in ARMS.values():
            if measured := self._measured(arm):
                rate = f"{self.found[measured[0]['run']]['learning_rate']:g}"
                far = [f"{fmean(run['base_divergence'] for run in measured):.3f}"] * drift
                rows.append([arm.name, str(len(measured)), rate, *shares(measured, columns), *far])
        for style in dict.fromkeys(arm.style for arm in ARMS.values() if arm.style is not None and not drift):
            if teacher := self.found.get(f"teacher-{style}-measured"):
                cells = [share([teacher["target"][score]]) for score in ("strict", "last_number")]
                rows.append([f"teacher, {style} reference", "", "", *cells, *[""] * (len(columns) - 2)])
        return markdown(headings, rows)

    def runs(self) -> str:
        """Return the scores of every measured run, with what it read and generated."""
        rows = []
        for arm in ARMS.values():
            for seed, found in sorted(self._by_seed(arm).items()):
                run = self.found[found["run"]]
                made = [f"{run['questions_read']:,}", f"{run['tokens_generated']:,.0f}", f"{run['training_seconds']:,}"]
                scores = [percent(fmean(map(int, read_set(found)))) for read_set in SETS.values()]
                rows.append([f"{arm.name}, seed {seed}", *made, *scores, f"{found['base_divergence']:.3f}"])
        headings = ["%", "questions read", "tokens generated", "training, s", *SETS, "divergence, nats a token"]
        return markdown(headings, rows) if rows else ""

    def changes(self) -> str:
        """Return paired changes from the untrained model."""
        base = self.found.get("base-measured")
        if base is None:
            return ""
        rows = []
        for arm in ARMS.values():
            if measured := self._measured(arm):
                rows.append([arm.name, *changes_of([base] * len(measured), measured)])
        return markdown(["points", *SETS], rows) if rows else ""

    def differences(self) -> str:
        """Return paired differences of OPSD to SFT with the same references, and to GRPO, seed by seed."""
        rows = []
        for arm in ARMS.values():
            opsd = ARMS["opsd-own" if arm.style is None else f"opsd-{arm.style}"]
            ours, theirs = self._by_seed(opsd), self._by_seed(arm)
            if arm.method == "opsd" or not (seeds := sorted(ours.keys() & theirs.keys())):
                continue
            cells = changes_of([theirs[seed] for seed in seeds], [ours[seed] for seed in seeds])
            rows.append([f"{opsd.name} minus {arm.name}", *cells])
        return markdown(["points", *SETS], rows) if rows else ""

    def sequence(self) -> str:
        """Return the scores of both tasks and of the kept skills before training and after each task."""
        base, second_base = self.found.get("base-measured"), self.found.get("base-second")
        if base is None or second_base is None:
            return ""
        columns = ["target", "target, last number", *KEPT]
        rows = []
        for name in SEQUENCE_ARMS:
            stages: list[tuple[Result, Result, Result, Result]] = []
            for seed, first in sorted(self._by_seed(ARMS[name]).items()):
                ends = [
                    found
                    for key, found in self.found.items()
                    if key.startswith(f"second-{name}-") and key.endswith(f"-seed{seed}-measured")
                ]
                between = self.found.get(f"{first['run']}-second")
                if ends and between:
                    stages.append((first, between, ends[0], self.found[f"{ends[0]['run']}-second"]))
            if not stages:
                continue
            named = {
                "before": ([base], [second_base]),
                "after task one": ([stage[0] for stage in stages], [stage[1] for stage in stages]),
                "after task two": ([stage[2] for stage in stages], [stage[3] for stage in stages]),
            }
            for title, (ones, twos) in named.items():
                two = share([found["second"]["strict"] for found in twos])
                cells = shares(ones, columns)
                rows.append([f"{name}, {title}", *cells[:2], two, *cells[2:]])
            moved = changes_of([stage[0] for stage in stages], [stage[2] for stage in stages], columns)
            gained = change(
                [stage[1]["second"]["strict"] for stage in stages], [stage[3]["second"]["strict"] for stage in stages]
            )
            rows.append([f"{name}, change by task two, points", *moved[:2], gained, *moved[2:]])
        return markdown(["", "task one", "task one, last number", "task two", *KEPT], rows) if rows else ""

    def _measured(self, arm: Arm) -> list[Result]:
        """Return the measurements of an arm's runs on the first task, in the order of the seeds."""
        return [found for _, found in sorted(self._by_seed(arm).items())]

    def _by_seed(self, arm: Arm) -> dict[int, Result]:
        names = [f"{arm.name}-lr{rate:g}-seed" for rate in all_rates()]
        return {
            int(found["run"].rpartition("seed")[2]): found
            for name, found in self.found.items()
            if name.endswith("-measured") and any(name.startswith(prefix) for prefix in names)
        }


def means(verdicts: Sequence[str]) -> list[float]:
    """Return each question's mean verdict over the runs."""
    return [fmean(int(digit) for digit in column) for column in zip(*verdicts, strict=True)]


@cache
def situations(items: int) -> tuple[str, ...]:
    """Return the situation of each story. Stories of one situation are not independent."""
    return tuple(example.columns["situation"] for example in StoryContinuations(size=items).examples())


def share(verdicts: Sequence[str], groups: Sequence[str] | None = None) -> str:
    """Return the mean over all runs with Wilson's interval.

    The interval takes each question, or each group of questions, as one outcome of one run. That is more than the variance
    of means over several runs, or of groups with different answers.
    """
    scores = means(verdicts)
    low, high = wilson_interval(fmean(scores), len(scores) if groups is None else len(set(groups)))
    return f"{percent(fmean(scores))} ({percent(low)} to {percent(high)})"


def change(before: Sequence[str], after: Sequence[str], groups: Sequence[str] | None = None) -> str:
    """Return the paired change of the same questions in points, with half of its 95 % interval."""
    mean, half = paired_change(means(before), means(after), groups)
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


def shares(runs: Sequence[Result], columns: Sequence[str] = tuple(SETS)) -> list[str]:
    """Return the `share` of each set."""
    verdicts = {column: [SETS[column](run) for run in runs] for column in columns}
    return [share(found, groups_of(column, found)) for column, found in verdicts.items()]


def changes_of(before: Sequence[Result], after: Sequence[Result], columns: Sequence[str] = tuple(SETS)) -> list[str]:
    """Return the `change` of each set."""
    found = {column: ([SETS[column](run) for run in before], [SETS[column](run) for run in after]) for column in columns}
    return [change(early, late, groups_of(column, early)) for column, (early, late) in found.items()]


def groups_of(column: str, verdicts: Sequence[str]) -> tuple[str, ...] | None:
    """Return the group of each item of a set, or None if its items are independent."""
    return situations(len(verdicts[0])) if column == "stories" else None


def percent(value: float) -> str:
    return f"{100 * value:.1f}"
