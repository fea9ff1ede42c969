"""Progress as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from lightning.pytorch.trainer.states import TrainerFn
from rich.console import Console
from rich.table import Table

from opsd_lightning.utils.terminal import safe_markup, say


def print_metrics(values: Mapping[str, float], intervals: Mapping[str, tuple[float, float]] | None = None) -> None:
    """Print the metrics of an evaluation as a table.

    Each accuracy has its 95 % interval or, without one, its standard error. With one completion per question that is right
    or wrong, avg@1, pass@1 and maj@1 are equal, and only the first is printed.

    Args:
        values: Metrics by name, without the prefix of the stage.
        intervals: Bounds of the 95 % interval by name of the metric. Defaults to no intervals.
    """
    intervals = intervals or {}
    same = {name.replace("avg@1", other) for name in intervals if name.endswith("avg@1") for other in ("pass@1", "maj@1")}
    same |= {name.replace("pass@1", "maj@1") for name in intervals if name.endswith("pass@1")}
    shown = [name for name in values if "_se" not in name and name not in same]
    errors = {
        "± over questions": {name: values.get(f"{name}_se") for name in shown if name not in intervals},
        "± over samples": {name: values.get(f"{name}_se_samples") for name in shown if name not in intervals},
    }
    errors = {column: found for column, found in errors.items() if any(value is not None for value in found.values())}
    ranges = ["95 % interval"] if intervals else []
    title = " ± one standard error" if errors else ""
    table = Table("metric", "value", *ranges, *errors, title=f"Metrics{title}", title_justify="left")
    for name in shown:
        value, cells = values[name], ["" for _ in ranges]
        if name in intervals:
            cells = [" to ".join(f"{end:.1%}" for end in intervals[name])]
        cells += ["" if (error := found.get(name)) is None else f"{error:.1%}" for found in errors.values()]
        number = f"{value:.4f}" if name in ("nll", "divergence") else f"{value:.1f}"
        share = "@" in name or name.endswith("fraction")
        table.add_row(safe_markup(name.replace("_", " ")), f"{value:.1%}" if share else number, *cells)
    Console(width=100, emoji=False).print(table)


class ProgressLines(ProgressBar):
    """Progress as lines of text, one per training step and per evaluation batch.

    Use it instead of a progress bar for slow steps and for log files.
    """

    def __init__(self) -> None:
        super().__init__()
        self.is_enabled = True

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        now = {name: float(value) for name, value in trainer.callback_metrics.items()}
        of = f"/{trainer.max_steps}" if trainer.max_steps > 0 else ""
        # OPSD logs a divergence, GRPO a reward, SFT neither.
        labels = {"forward KL": "forward_kl", "reward": "reward"}
        optional = [f"{label} {now[f'train/{name}']:.4f}  " for label, name in labels.items() if f"train/{name}" in now]
        self._print(
            trainer,
            f"step {trainer.global_step}{of}  loss {now['train/loss']:.4f}  {''.join(optional)}"
            f"{now['train/completion_tokens']:.1f} tokens per completion, {now['train/truncated_fraction']:.0%} truncated  "
            f"rollouts {now['time/rollout_seconds']:.0f} s, scoring {now['time/scoring_seconds']:.0f} s",
        )

    def on_validation_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        batches = trainer.num_sanity_val_batches if trainer.sanity_checking else trainer.num_val_batches
        self._batch(trainer, "validation", args[2], batches)

    def on_test_batch_end(self, trainer: Trainer, pl_module: LightningModule, *args: Any) -> None:
        self._batch(trainer, "test", args[2], trainer.num_test_batches)

    def on_validation_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        if trainer.state.fn == TrainerFn.FITTING:  # other commands print a table
            self._scores(trainer, "val")

    def _batch(self, trainer: Trainer, stage: str, index: int, batches: Sequence[float]) -> None:
        self._print(trainer, f"  {stage}: batch {index + 1}/{int(sum(batches))}")

    def _scores(self, trainer: Trainer, stage: str) -> None:
        for name, value in trainer.callback_metrics.items():
            if name in (f"{stage}/nll", f"{stage}/divergence"):
                self._print(trainer, f"  {name}: {float(value):.4f} nats a token of the demonstrations")
            if name.startswith(f"{stage}/") and "avg@" in name and "_se" not in name:
                error = float(trainer.callback_metrics[f"{name}_se"])
                self._print(trainer, f"  {name}: {float(value):.1%} ± {error:.1%} (standard error)")

    def _print(self, trainer: Trainer, line: str) -> None:
        if self.is_enabled and trainer.is_global_zero:
            say(line)

    def enable(self) -> None:
        self.is_enabled = True

    def disable(self) -> None:
        self.is_enabled = False
