"""Messages of libraries that the ``opsd`` command does not print: what users of it can neither cause nor change.

Each is matched by its text, so that every other warning of the same library is still shown. Errors are never hidden.
"""

from __future__ import annotations

import logging
import re
import sys
import warnings
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import NamedTuple


class HiddenMessage(NamedTuple):
    """A message that is not shown.

    Args:
        pattern: Regular expression that matches the beginning of the text.
        reason: Why users of ``opsd`` do not need it.
        loggers: Loggers that write it. Without any, it is a warning of Python's ``warnings``.
    """

    pattern: str
    reason: str
    loggers: tuple[str, ...] = ()


# `rank_zero_info` writes to the logger of whichever of these modules was imported last.
_LIGHTNING = (
    "lightning.pytorch.utilities.rank_zero",
    "lightning.fabric.utilities.rank_zero",
    "lightning_utilities.core.rank_zero",
)

HIDDEN_MESSAGES = (
    HiddenMessage(
        r"Failed to load CPU gemm_4bit_forward from kernels-community",
        "an optional kernel for 4-bit inference on CPUs; peft imports bitsandbytes to look for its layers in any model",
        ("bitsandbytes.backends.cpu.ops",),
    ),
    HiddenMessage(r"[TH]PU available: False", "a kind of device that this package does not support", _LIGHTNING),
    HiddenMessage(r"\W*Tip: For seamless cloud", "an advertisement", _LIGHTNING),
    HiddenMessage(
        r"You are using a CUDA device \(.*\) that has Tensor Cores",
        "recommends a function call, and `trainer.precision` is the setting for that choice",
        _LIGHTNING,
    ),
    HiddenMessage(r"LightningCLI's args parameter", "the doctor and the quick start pass arguments on purpose"),
    HiddenMessage(
        r"You have overridden `transfer_batch_to_device`", "batches are lists of token ids, which stay where they are"
    ),
    HiddenMessage(
        r"The '\w+' does not have many workers", "a batch is a list of prompts in memory: workers would only cost time"
    ),
    HiddenMessage(
        r"The number of training batches \(\d+\) is smaller than the logging", "the methods log every optimizer step"
    ),
    HiddenMessage(r"You defined a `validation_step` but have no `val_dataloader`", "`data.val: null` says so already"),
    HiddenMessage(
        r"Found keys that are in the model state dict but not in the checkpoint",
        "a checkpoint has the trained weights only, and the package checks that all of these are there",
    ),
    HiddenMessage(r"Total length of `list` across ranks is zero", "`data.val: null` says so already"),
    HiddenMessage(r"You called `self\.log\(.*logger=True\)` but have no logger", "`trainer.logger: false` says so already"),
    HiddenMessage(
        r"Found \d+ module\(s\) in eval mode at the start of training", "teachers and frozen models are in eval mode"
    ),
    HiddenMessage(
        r"It is recommended to use `self\.log\('(val|test)/.*sync_dist=True\)`",
        "these metrics are computed over all ranks before they are logged",
    ),
    HiddenMessage(
        r"Using ModelCheckpoint with manual optimization and every_n_train_steps",
        "checkpoints are meant to hold the weights after the optimizer step",
    ),
    HiddenMessage(r"fan_in_fan_out is set to \w+ but the target module is", "peft corrects it by itself"),
    HiddenMessage(r"`isinstance\(treespec, LeafSpec\)` is deprecated", "Lightning's use of torch"),
    HiddenMessage(
        r"`(is_gradient_checkpointing|gradient_checkpointing_enable)` is deprecated",
        "the new names need a later transformers than this package and peft require",
    ),
)


@contextmanager
def hide_library_messages() -> Iterator[None]:
    """Hide `HIDDEN_MESSAGES` in the block, and transformers' progress bars unless they are drawn on a terminal."""
    filters = [_Filter(hidden) for hidden in HIDDEN_MESSAGES]
    with ExitStack() as stack:
        stack.enter_context(warnings.catch_warnings())
        for found in filters:
            for name in found.hidden.loggers:
                logger = logging.getLogger(name)
                logger.addFilter(found)
                stack.callback(logger.removeFilter, found)
            if not found.hidden.loggers:
                warnings.filterwarnings("ignore", found.hidden.pattern)
        if not sys.stderr.isatty():
            stack.enter_context(_no_progress_bars())
        yield


class _Filter(logging.Filter):
    def __init__(self, hidden: HiddenMessage) -> None:
        super().__init__()
        self.hidden, self.pattern = hidden, re.compile(hidden.pattern)

    def filter(self, record: logging.LogRecord) -> bool:
        return record.levelno >= logging.ERROR or not self.pattern.match(record.getMessage())


@contextmanager
def _no_progress_bars() -> Iterator[None]:
    from transformers.utils import logging as transformers_logging

    if not transformers_logging.is_progress_bar_enabled():  # the user has disabled them
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()
