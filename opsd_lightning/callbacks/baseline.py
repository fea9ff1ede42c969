"""Evaluation of the untrained model."""

from __future__ import annotations

import warnings

from lightning.pytorch import Callback, LightningModule, Trainer


class BaselineEvaluation(Callback):
    """Callback that logs the validation metrics of the untrained model as step 0.

    With ``trainer.num_sanity_val_steps: -1``, Lightning's sanity check runs over the whole validation set before training
    and discards its metrics. This callback logs them.
    """

    def on_sanity_check_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        loader = trainer.val_dataloaders
        if loader is None or trainer.num_sanity_val_steps != float("inf"):
            warnings.warn(
                "BaselineEvaluation logs nothing, since the sanity check does not run over the whole validation set: set "
                "trainer.num_sanity_val_steps to -1",
                stacklevel=2,
            )
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        for logger in trainer.loggers:
            logger.log_metrics(metrics, step=0)
