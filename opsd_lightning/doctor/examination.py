"""The examination of a command line: its parts are built as ``opsd fit`` builds them, and examined."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

import torch
from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from opsd_lightning.cli.command import OPSDCLI, cli_settings
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.doctor.diagnosis import diagnose, refusal_finding
from opsd_lightning.doctor.findings import Diagnosis, Finding
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.types import UserError
from opsd_lightning.utils.library_messages import hide_library_messages
from opsd_lightning.utils.terminal import safe_messages, say


def examine(arguments: list[str], examples: int = 4, with_model: bool = True) -> Diagnosis:
    """Build the parts that ``opsd fit`` would run with these arguments, and `diagnose` them.

    Args:
        arguments: Arguments of ``opsd fit``.
        examples: Training questions that the model is run on.
        with_model: If False, the model's weights are not loaded.
    """
    with _quietly(), safe_messages():
        cli, problems = build_parts(arguments, with_model)
        if cli is None:
            return Diagnosis(problems)
        resumes = cli.config[cli.subcommand].get("ckpt_path") is not None
        found = diagnose(cli.model, cli.datamodule, cli.trainer, examples, with_model, say, resumes)
    found.findings[:0] = problems
    return found


class _Unstarted(OPSDCLI):
    """A command line that builds its parts and runs nothing. Errors become findings."""

    def __init__(self, problems: list[Finding], with_model: bool, **settings: Any) -> None:
        self.problems, self.with_model = problems, with_model
        super().__init__(PolicyModule, OPSDDataModule, **settings)

    def before_instantiate_classes(self) -> None:
        try:
            super().before_instantiate_classes()
        except UserError as error:
            self.problems.append(refusal_finding("settings", error))

    def instantiate_trainer(self, **kwargs: Any) -> Trainer:
        if not self.problems:
            try:
                return super().instantiate_trainer(**kwargs)
            except (MisconfigurationException, ValueError, TypeError, ImportError, RuntimeError) as error:
                found = refusal_finding("settings", str(error).strip().splitlines()[0])
                if _lacks_gpus(self.config_init[self.subcommand].trainer):
                    # A problem of this machine only: the run may be meant for another.
                    text = f"{found.text} Everything else is checked on the CPU"
                    found = Finding("error" if self.with_model else "warning", "settings", text, "trainer.accelerator")
                self.problems.append(found)
        wanted = self.config_init[self.subcommand].trainer
        # A trainer on the CPU, so that everything else is still examined.
        return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=wanted.max_steps)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _lacks_gpus(trainer: Any) -> bool:
    """Return whether the trainer's settings ask for more GPUs than this machine has."""
    devices = trainer.devices
    number = len(devices) if isinstance(devices, list) else int(devices) if str(devices).isdigit() else 1
    return trainer.accelerator in ("gpu", "cuda") and torch.cuda.device_count() < number


def build_parts(arguments: list[str], with_model: bool) -> tuple[Any, list[Finding]]:
    """Build the parts of a run with the arguments of ``opsd fit``, and run nothing.

    Args:
        arguments: As of `examine`.
        with_model: True if the run is meant for this machine: a missing GPU is then an error.

    Returns:
        The command line with the parts, or None if they cannot be built, and the problems.

    Raises:
        SystemExit: With status 2, after one message, if the arguments cannot be parsed.
    """
    problems: list[Finding] = []
    printed = io.StringIO()
    try:
        with redirect_stderr(printed):
            return _Unstarted(problems, with_model, args=["fit", *arguments], **cli_settings()), problems
    except (UserError, MisconfigurationException) as error:
        problems.append(refusal_finding("settings", error))
    except SystemExit:  # --help, --print_config, or arguments that cannot be parsed
        if text := printed.getvalue().rstrip("\n"):
            say(text, error=True)
        raise
    return None, problems


@contextmanager
def _quietly() -> Iterator[None]:
    """Hide warnings, Lightning's messages and progress bars: the report says what is wrong."""
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    bars = transformers_logging.is_progress_bar_enabled()
    if bars:
        transformers_logging.disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with hide_library_messages():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        if bars:
            transformers_logging.enable_progress_bar()
