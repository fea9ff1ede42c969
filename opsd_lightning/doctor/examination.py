"""The examination of a command line: its parts are built as ``opsd fit`` builds them, and examined."""

from __future__ import annotations

import io
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, redirect_stderr
from typing import Any

from lightning.fabric.utilities.exceptions import MisconfigurationException
from lightning.pytorch import Trainer

from opsd_lightning.cli.command import OPSDCLI, cli_settings
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.doctor.diagnosis import diagnose, refusal_finding
from opsd_lightning.doctor.findings import Diagnosis, Finding
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.types import UserError
from opsd_lightning.utils.terminal import guarded, say


def examine(arguments: list[str], examples: int = 4, with_model: bool = True) -> Diagnosis:
    """Build what ``opsd fit`` with these arguments would run, and `diagnose` it."""
    with _quietly(), guarded():
        cli, problems = _parts(arguments, with_model)
        if cli is None:
            return Diagnosis(problems)
        found = diagnose(cli.model, cli.datamodule, cli.trainer, examples, with_model, say)
    found.findings[:0] = problems
    return found


class _Unstarted(OPSDCLI):
    """Parses the arguments and makes the parts, and stops there."""

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
                if "accelerator" in str(error).lower() or "gpu" in str(error).lower():
                    # Only of this machine: the run may be meant for another.
                    text = f"{found.text} The rest is examined on the CPU"
                    found = Finding("error" if self.with_model else "warning", "settings", text, "trainer.accelerator")
                self.problems.append(found)
        wanted = self.config_init[self.subcommand].trainer
        # The rest is worth looking at all the same.
        return Trainer(accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, max_steps=wanted.max_steps)

    def _run_subcommand(self, subcommand: str) -> None:
        pass


def _parts(arguments: list[str], with_model: bool) -> tuple[Any, list[Finding]]:
    """The run's parts, unless they cannot be made; and what stood in the way."""
    problems: list[Finding] = []
    said = io.StringIO()
    try:
        with redirect_stderr(said):
            return _Unstarted(problems, with_model, args=["fit", *arguments], **cli_settings()), problems
    except (UserError, MisconfigurationException) as error:
        problems.append(refusal_finding("settings", error))
    except SystemExit as stop:
        if stop.code in (0, None):  # --help, --print_config
            raise
        message = said.getvalue()
        message = message[message.rindex("error:") + len("error:") :] if "error:" in message else message
        problems.append(refusal_finding("settings", " ".join(message.split())))
    return None, problems


@contextmanager
def _quietly() -> Iterator[None]:
    """Without bars of files being read, and what Lightning says of a machine."""
    from datasets.utils.logging import disable_progress_bar, enable_progress_bar
    from transformers.utils import logging as transformers_logging

    loggers = [logging.getLogger(name) for name in ("lightning.pytorch", "lightning.fabric")]
    levels = [logger.level for logger in loggers]
    transformers_logging.disable_progress_bar()
    disable_progress_bar()
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
        transformers_logging.enable_progress_bar()
        enable_progress_bar()
