"""Figures of the report: accuracy along four axes with 95 % bands, and accuracy on easier questions."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from benchmarks.learning.report import EASY, Runs, band, estimate

# Okabe and Ito's colours, which colour-blind readers can distinguish. Each has its own line style.
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
STYLES = ("-", "--", "-.", ":", (0, (5, 1)), (0, (1, 1)), (0, (3, 1, 1, 1)))
AXES = {
    "tokens": "generated tokens, thousands",
    "step": "optimizer steps",
    "references": "references read, thousands",
    "seconds": "training time, seconds",
}
LABELS = {
    "opsd": "OPSD",
    "grpo": "GRPO",
    "sft-terse": "SFT, references in another style",
    "sft-worked": "SFT, references in the model's own style",
    "distill": "on-policy distillation, another model",
    "mixed": "OPSD, a quarter of the steps on references",
}


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise SystemExit("pictures need matplotlib: pip install 'opsd-lightning[plots]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "font.size": 10,
            "axes.spines.top": False,
            "axes.spines.right": False,
            "axes.grid": True,
            "grid.alpha": 0.25,
            "svg.hashsalt": "opsd",
            "legend.frameon": False,
        }
    )
    return pyplot


def _save(figure: Any, path: Path) -> list[Path]:
    path.parent.mkdir(parents=True, exist_ok=True)
    paths = [path.with_suffix(".png"), path.with_suffix(".svg")]
    figure.savefig(paths[0], dpi=160)
    figure.savefig(paths[1], metadata={"Date": None})
    _pyplot().close(figure)
    return paths


def curves(runs: Runs, path: Path, title: str, axes: Sequence[str] = tuple(AXES)) -> list[Path]:
    """Plot validation accuracy along each axis, one line per method, with a band for several runs."""
    pyplot = _pyplot()
    columns = min(len(axes), 2)
    height = -(-len(axes) // columns)
    legend_rows = -(-len(runs) // 2) if len(runs) > 1 else 0
    inches = (5.2 * columns if columns > 1 else 6.4, 3.5 * height + 0.4 + 0.24 * legend_rows)
    figure, grid = pyplot.subplots(height, columns, figsize=inches, squeeze=False, sharey=True)
    handles: dict[str, Any] = {}
    for place, axis in zip(grid.flat, axes, strict=False):
        scale = 1000 if "thousands" in AXES[axis] else 1
        for number, (name, found) in enumerate(runs.items()):
            if any(run["curve"][-1][axis] <= 0 for run in found):
                continue  # methods that do not use this axis have no line
            xs, ys = band(found, axis)
            colour = COLOURS[number % len(COLOURS)]
            label = LABELS.get(name, name)
            (line,) = place.plot(
                [x / scale for x in xs], [100 * y.mean for y in ys], color=colour, lw=1.8, ls=STYLES[number % len(STYLES)]
            )
            handles[label] = line
            if len(found) > 1:
                low, high = ([100 * (y.mean + sign * y.half) for y in ys] for sign in (-1, 1))
                place.fill_between([x / scale for x in xs], low, high, color=colour, alpha=0.18, lw=0)
        place.set(xlabel=AXES[axis], ylim=(0, 101))
        place.set_xlim(left=0)
    for row in grid:
        row[0].set_ylabel("validation accuracy, %")
    for place in list(grid.flat)[len(axes) :]:
        place.set_visible(False)
    figure.suptitle(title, x=0.01, ha="left", fontsize=11)
    if legend_rows:
        figure.legend(handles.values(), handles.keys(), loc="lower center", ncols=2, handlelength=3.2)
    figure.tight_layout(rect=(0, 0.24 * legend_rows / inches[1], 1, 1))  # the legend is below the figure
    return _save(figure, path)


def retention(runs: Runs, path: Path, title: str) -> list[Path]:
    """Plot accuracy before and after training on each kind of question, with 95 % intervals."""
    pyplot = _pyplot()
    kinds = {**EASY, "test": "three operations"}
    figure, grid = pyplot.subplots(1, len(kinds), figsize=(10.4, 1.6 + 0.45 * len(runs)), sharey=True)
    for place, (kind, label) in zip(grid, kinds.items(), strict=True):
        for number, found in enumerate(runs.values()):
            before, after = (estimate(run[when][kind] for run in found) for when in ("before", "after"))
            colour = COLOURS[number % len(COLOURS)]
            place.plot([100 * before.mean, 100 * after.mean], [number, number], color=colour, lw=1, alpha=0.6)
            place.plot(100 * before.mean, number, "o", mfc="white", mec=colour, ms=7)
            half = 0 if after.runs < 2 else 100 * after.half
            place.errorbar(100 * after.mean, number, xerr=half, fmt="o", color=colour, ms=7, capsize=3)
        place.set(title=label, xlim=(-3, 103), xlabel="test accuracy, %", ylim=(len(runs) - 0.5, -0.5))
        place.title.set_fontsize(10)
    grid[0].set_yticks(range(len(runs)), [LABELS.get(name, name) for name in runs])
    figure.suptitle(f"{title} (open: before, filled: after)", x=0.01, ha="left", fontsize=11)
    figure.tight_layout()
    return _save(figure, path)
