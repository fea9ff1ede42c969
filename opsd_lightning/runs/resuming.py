"""Run the validation and the epoch end that were still pending when a checkpoint within an epoch was saved.

A `ModelCheckpoint` that saves every N steps does so before the validation of its step. When Lightning resumes such a
checkpoint, it skips that validation and the hooks of the epoch end, and does nothing after the last step of a run. This
module stores the pending work in the checkpoint, and the loops of the resumed run begin with it.
"""

from __future__ import annotations

from typing import Any, Literal

from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint
from lightning.pytorch.loops.fetchers import _DataFetcher
from lightning.pytorch.loops.fit_loop import _FitLoop
from lightning.pytorch.loops.training_epoch_loop import _TrainingEpochLoop
from lightning.pytorch.utilities import rank_zero_info

_KEY = "opsd_within_epoch"


class _ResumedEpochLoop(_TrainingEpochLoop):
    """Epoch loop that begins with the pending validation or the pending end of the epoch."""

    pending: Literal["validation", "end"] | None = None

    @property
    def done(self) -> bool:
        return self.pending == "end" if self.pending else super().done

    def advance(self, data_fetcher: _DataFetcher) -> None:
        if self.pending is None:
            super().advance(data_fetcher)
        else:
            self.val_loop.restarting = False  # validate from the first batch

    def on_advance_end(self, data_fetcher: _DataFetcher) -> None:
        super().on_advance_end(data_fetcher)
        self.pending = None

    def _should_check_val_fx(self, data_fetcher: _DataFetcher) -> bool:
        return self.pending == "validation" or super()._should_check_val_fx(data_fetcher)


class _ResumedFitLoop(_FitLoop):
    """Fit loop that resumes a checkpoint saved after a step within an epoch.

    Attributes:
        saved: Pending work from the checkpoint. None after `run` has begun.
    """

    saved: dict[str, bool] | None = None

    def run(self) -> None:
        self.setup_data()
        if self.saved is not None:
            self._begin(self.saved)
            self.saved = None
        super().run()

    def _begin(self, saved: dict[str, bool]) -> None:
        """Choose the pending work to begin with. This run may have other limits than the run that saved the checkpoint."""
        loop, trainer = self.epoch_loop, self.trainer
        assert isinstance(loop, _ResumedEpochLoop)
        due = saved["validation_due"] and trainer.enable_validation and trainer.limit_val_batches != 0
        if (due and saved["should_stop"]) or any(_has_stopped(callback) for callback in trainer.callbacks):  # type: ignore[attr-defined]
            trainer.should_stop = True
            rank_zero_info(
                "A callback stopped the run at the step of this checkpoint, so the resumed run ends there. To continue "
                "training, remove the callback (for CollapseGuard, set action to warn)"
            )
        stopped = trainer.should_stop and self._can_stop_early
        if due:
            loop.pending = "validation"
        elif loop._is_training_done or stopped:
            loop.pending = "end"
        for callback in trainer.checkpoint_callbacks:
            if isinstance(callback, ModelCheckpoint) and callback.last_model_path == str(trainer.ckpt_path):
                callback._last_checkpoint_saved = callback.last_model_path  # do not save it again at the end of the epoch
        if loop.pending is not None:  # mark the step as finished, or Lightning skips the pending work
            for progress in (loop.batch_progress.total, loop.batch_progress.current):
                progress.completed = progress.processed  # type: ignore[attr-defined]

    @property
    def done(self) -> bool:
        return self.epoch_loop.pending is None and super().done  # type: ignore[attr-defined]

    def on_advance_end(self) -> None:
        loop = self.epoch_loop
        assert isinstance(loop, _ResumedEpochLoop)
        if loop.pending == "end":
            loop._batches_that_stepped += 1
            loop.restarting, loop.pending = False, None
        super().on_advance_end()


def record_pending_work(trainer: Trainer, checkpoint: dict[str, Any], validated: int) -> None:
    """Store in a checkpoint whether a validation is pending and whether the run is about to stop.

    Args:
        trainer: Trainer of the fit.
        checkpoint: The checkpoint that is about to be saved.
        validated: Training batches processed when the last validation ended, over all epochs.
    """
    fit = trainer.fit_loop
    loop, epochs = fit.epoch_loop, fit.epoch_progress.total
    now, total = loop.batch_progress.current, loop.batch_progress.total
    if not (now.ready == now.processed > 0 and epochs.processed == epochs.started - 1) or fit._data_fetcher is None:  # type: ignore[attr-defined]
        return
    due = total.ready != validated and loop._should_check_val_fx(fit._data_fetcher)
    checkpoint[_KEY] = {"validation_due": bool(due), "should_stop": bool(trainer.should_stop)}


def batches_trained(trainer: Trainer) -> int:
    """Return the number of training batches of a fit so far, over all epochs."""
    return int(trainer.fit_loop.epoch_loop.batch_progress.total.ready)


def restore_pending_work(trainer: Trainer, checkpoint: dict[str, Any]) -> None:
    """Make a fit begin with the pending work of a checkpoint. Checkpoints of older versions contain none."""
    saved = checkpoint.pop(_KEY, None)
    fit: Any = trainer.fit_loop
    if (
        saved is None
        or type(fit) not in (_FitLoop, _ResumedFitLoop)
        or type(fit.epoch_loop) not in (_TrainingEpochLoop, _ResumedEpochLoop)
    ):
        return
    # The trainer and its connectors hold references to the loops, so their classes change in place.
    fit.__class__, fit.epoch_loop.__class__ = _ResumedFitLoop, _ResumedEpochLoop
    fit.saved, fit.epoch_loop.pending = dict(saved), None


def starts_with_validation(trainer: Trainer) -> bool:
    """Return True if a resumed fit begins with a validation. Valid in ``on_train_start``."""
    return getattr(trainer.fit_loop.epoch_loop, "pending", None) == "validation"


def _has_stopped(callback: Any) -> bool:
    return isinstance(callback, EarlyStopping) and callback.wait_count >= max(callback.patience, 1)
