"""Progress as lines of text."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.callbacks import ProgressBar
from rich.console import Console
from rich.table import Table

from opsd_lightning.utils.terminal import safe_markup, say


def print_metrics(values: Mapping[str, float]) -> None:
    """Print the metrics of an evaluation as a table.

    Args:
        values: Metrics by name, without the prefix of the stage.
    """
    columns = ("metric", "value", "± over questions", "± over samples")
    table = Table(*columns, title="Metrics ± one standard error", title_justify="left")
    for name, value in values.items():
        if "_se" in name:
            continue
        label = safe_markup(name.replace("_", " "))
        if "@" in name:
            errors = [values.get(f"{name}{error}") for error in ("_se", "_se_samples")]
            table.add_row(label, f"{value:.1%}", *("" if error is None else f"{error:.1%}" for error in errors))
        else:
            shown = f"{value:.4f}" if name in ("nll", "divergence") else f"{value:.1f}"
            table.add_row(label, f"{value:.1%}" if name.endswith("fraction") else shown, "", "")
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
        self._scores(trainer, "val")

    def on_test_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._scores(trainer, "test")

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
