"""Tables of the comparison, computed from the result files alone."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from statistics import fmean
from typing import Any

from benchmarks.learning.report import markdown
from benchmarks.learning.run import read
from benchmarks.real_model.settings import ARMS, RATES, SEQUENCE_ARMS, Arm
from opsd_lightning.utils.statistics import mean_and_interval

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


class Report:
    """Reads the results of a folder and writes its tables.

    Args:
        results: Folder of the result files.
    """

    def __init__(self, results: Path) -> None:
        self.found = {path.stem: read(path) for path in sorted(results.glob("*.json"))}

    def text(self) -> str:
        """Return all tables that the results allow, as Markdown."""
        tables = {
            "Learning rates": self.rates,
            "Methods by style of the references": self.scores,
            "OPSD minus the other method": self.differences,
            "Two tasks in sequence": self.sequence,
        }
        return "\n\n".join(f"### {title}\n\n{table}" for title, make in tables.items() if (table := make()))

    def rates(self) -> str:
        """Return the validation accuracy of each learning rate after the last step (seed 0), for both tasks."""
        rows = []
        for prefix in ("", "second-"):
            for arm in ARMS.values():
                runs = [self.found.get(f"{prefix}{arm.name}-lr{rate:g}-seed0") for rate in RATES]
                if any(runs):
                    cells = [f"{100 * run['validation']:.1f} %" if run else "-" for run in runs]
                    rows.append([f"{arm.name}{', second task' if prefix else ''}", *cells])
        return markdown(["validation accuracy, seed 0", *(f"rate {rate:g}" for rate in RATES)], rows) if rows else ""

    def scores(self) -> str:
        """Return held-out scores: the mean over the seeds, with a 95 % interval over questions."""
        base = self.found.get("base-measured")
        if base is None:
            return ""
        headings = ["", "rate", "references read", "tokens generated", *SETS, "divergence from the base, nats a token"]
        rows = [["before", "", "", "", *(share([read_set(base)]) for read_set in SETS.values()), "0"]]
        for arm in ARMS.values():
            if measured := self._measured(arm):
                runs = [self.found[run["run"]] for run in measured]
                references = "0" if arm.method == "grpo" else f"{runs[0]['completions_or_references']:,}"
                tokens = f"{fmean(run['tokens_generated'] for run in runs):,.0f}"
                cells = [share([read_set(run) for run in measured]) for read_set in SETS.values()]
                drift = [run["base_divergence"] for run in measured]
                spread = f"{fmean(drift):.3f} ({min(drift):.3f} to {max(drift):.3f})"
                rows.append([arm.name, f"{runs[0]['learning_rate']:g}", references, tokens, *cells, spread])
        for style in dict.fromkeys(arm.style for arm in ARMS.values() if arm.style is not None):
            if teacher := self.found.get(f"teacher-{style}-measured"):
                cells = [share([teacher["target"][score]]) for score in ("strict", "last_number")]
                rows.append([f"teacher, {style} reference", "", "", "", *cells, *[""] * (len(SETS) - 1)])
        return markdown(headings, rows)

    def differences(self) -> str:
        """Return paired differences of OPSD to SFT with the same references, and to GRPO."""
        rows = []
        for arm in ARMS.values():
            opsd = ARMS["opsd-own" if arm.style is None else f"opsd-{arm.style}"]
            if arm.method == "opsd" or not (ours := self._measured(opsd)) or not (theirs := self._measured(arm)):
                continue
            cells = []
            for read_set in SETS.values():
                a, b = (means([read_set(run) for run in runs]) for runs in (ours, theirs))
                cells.append(signed([x - y for x, y in zip(a, b, strict=True)]))
            rows.append([f"{opsd.name} minus {arm.name}", *cells])
        if base := self.found.get("base-measured"):
            for arm in ARMS.values():
                if measured := self._measured(arm):
                    cells = []
                    for read_set in SETS.values():
                        a, b = means([read_set(run) for run in measured]), means([read_set(base)])
                        cells.append(signed([x - y for x, y in zip(a, b, strict=True)]))
                    rows.append([f"{arm.name} minus before", *cells])
        return markdown(["points", *SETS], rows) if rows else ""

    def sequence(self) -> str:
        """Return the scores of both tasks before training, after the first task and after the second."""
        rows = []
        base, second_base = self.found.get("base-measured"), self.found.get("base-second")
        for name in SEQUENCE_ARMS:
            arm = ARMS[name]
            runs = []
            for first in self._measured(arm):
                seed = self.found[first["run"]]["seed"]
                ends = [
                    run
                    for run in self.found.values()
                    if run.get("run", "").startswith(f"second-{name}-") and "target" in run and seed_of(run) == seed
                ]
                between = self.found.get(f"{first['run']}-second")
                if ends and between:
                    runs.append((first, between, ends[0], self.found[f"{ends[0]['run']}-second"]))
            if runs and base and second_base:
                rows.append(
                    [
                        name,
                        share([base["target"]["strict"]]),
                        share([first["target"]["strict"] for first, *_ in runs]),
                        share([last["target"]["strict"] for *_, last, _ in runs]),
                        change([last["target"]["strict"] for *_, last, _ in runs], [r[0]["target"]["strict"] for r in runs]),
                        share([second_base["second"]["strict"]]),
                        share([between["second"]["strict"] for _, between, *_ in runs]),
                        share([end["second"]["strict"] for *_, end in runs]),
                    ]
                )
        headings = ["", "task one before", "between", "after", "change by task two", "task two before", "between", "after"]
        return markdown(headings, rows) if rows else ""

    def _measured(self, arm: Arm) -> list[Result]:
        """Return the measurements of an arm's runs on the first task, one for each seed."""
        names = [f"{arm.name}-lr{rate:g}-seed" for rate in RATES]
        return [
            found
            for name, found in self.found.items()
            if name.endswith("-measured") and any(name.startswith(prefix) for prefix in names)
        ]


def seed_of(run: Result) -> int:
    """Return the seed in the name of a run."""
    return int(run["run"].rpartition("seed")[2])


def means(verdicts: Sequence[str]) -> list[float]:
    """Return each question's mean verdict over the runs."""
    return [fmean(int(digit) for digit in column) for column in zip(*verdicts, strict=True)]


def share(verdicts: Sequence[str]) -> str:
    """Return the mean with its 95 % interval over questions, and the means of the runs if there are several."""
    mean, half = mean_and_interval(means(verdicts))
    each = ", ".join(f"{100 * fmean(map(int, run)):.1f}" for run in verdicts)
    return f"{100 * mean:.1f} ± {100 * half:.1f} %" + (f" ({each})" if len(verdicts) > 1 else "")


def signed(values: Sequence[float]) -> str:
    """Return the mean of differences with its 95 % interval over questions, in points."""
    mean, half = mean_and_interval(list(values))
    return f"{100 * mean:+.1f} ± {100 * half:.1f}"


def change(after: Sequence[str], before: Sequence[str]) -> str:
    """Return the change of the same questions in points."""
    return signed([a - b for a, b in zip(means(after), means(before), strict=True)])
