"""Hidden messages of libraries, and the console of a run."""

from __future__ import annotations

import io
import json
import logging
import os
import re
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
import yaml
from transformers.utils import logging as transformers_logging

from helpers.paths import ROOT
from opsd_lightning.utils.library_messages import HIDDEN_MESSAGES, hide_library_messages

LOGGED = [hidden for hidden in HIDDEN_MESSAGES if hidden.loggers]


@pytest.fixture
def records() -> list[str]:
    """Messages that reach the handlers of the loggers of hidden messages."""
    found: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: found.append(record.getMessage())  # type: ignore[method-assign]
    names = {name for hidden in LOGGED for name in hidden.loggers}
    for name in names:
        logging.getLogger(name).addHandler(handler)
    yield found
    for name in names:
        logging.getLogger(name).removeHandler(handler)


def test_logged_messages_are_hidden_by_their_text(records: list[str]) -> None:
    logger = logging.getLogger("lightning.pytorch.utilities.rank_zero")
    tip = "\N{ELECTRIC LIGHT BULB} Tip: For seamless cloud uploads and versioning, try installing [litmodels]"
    lines = ["TPU available: False, using: 0 TPU cores", tip]
    with hide_library_messages():
        for text in lines:
            logger.warning(text)
        assert not records
        logger.error(lines[0])
        logger.warning("GPU available: True, used: True")
        logging.getLogger("bitsandbytes.backends.cpu.ops").warning("Failed to load CPU gemm_4bit_forward from %s", "x")
    assert records == [lines[0], "GPU available: True, used: True", "Failed to load CPU gemm_4bit_forward from x"]
    logger.warning(lines[0])
    assert records[-1] == lines[0], "after the block it is logged again"


def test_warnings_are_hidden_by_their_text() -> None:
    hidden = [
        "The 'train_dataloader' does not have many workers which may be a bottleneck.",
        "You defined a `validation_step` but have no `val_dataloader`. Skipping val loop.",
        "`is_gradient_checkpointing` is deprecated and will be removed in v6.",
        "It is recommended to use `self.log('val/avg@1', ..., sync_dist=True)` when logging on epoch level",
    ]
    shown = ["The 'train_dataloader' yields nothing", "data.val: 3 rows are left out"]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        with hide_library_messages():
            for text in [*hidden, *shown]:
                warnings.warn(text, UserWarning, stacklevel=1)
        warnings.warn(hidden[0], UserWarning, stacklevel=1)
    assert [str(warning.message) for warning in caught] == [*shown, hidden[0]]


def test_every_hidden_message_has_a_reason_and_a_narrow_pattern() -> None:
    for hidden in HIDDEN_MESSAGES:
        assert hidden.reason and len(hidden.pattern) > 15
        assert not re.match(hidden.pattern, "Some other warning of a library")


@pytest.mark.parametrize("terminal", [True, False])
def test_progress_bars_of_libraries_are_for_terminals(terminal: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    stream = io.StringIO()
    stream.isatty = lambda: terminal  # type: ignore[method-assign]
    monkeypatch.setattr(sys, "stderr", stream)
    transformers_logging.enable_progress_bar()
    with hide_library_messages():
        assert transformers_logging.is_progress_bar_enabled() == terminal
    assert transformers_logging.is_progress_bar_enabled()


@pytest.mark.integration
def test_a_run_prints_its_own_lines_only(folders: dict[str, str], tmp_path: Path) -> None:
    """Every line on the console is this package's or Lightning's progress."""
    rows = [{"problem": f"{n}+1?", "solution": f"The answer is {n + 1}.", "gold": str(n + 1)} for n in range(4)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    read = {"path": str(tmp_path / "rows.jsonl"), "columns": {"answer": "gold"}}
    train = {"class_path": "FileSource", "init_args": read | {"split": "train[2:]"}}
    val = {"class_path": "FileSource", "init_args": read | {"split": "train[:2]"}}
    sampling = {"max_new_tokens": 6}
    config = {
        "model": {
            "policy": {"model": folders["llama"], "dtype": "float32", "gradient_checkpointing": True},
            "sampling": sampling,
            "eval_sampling": sampling,
        },
        "data": {"train": train, "val": val, "batch_size": 2},
        "trainer": {"accelerator": "cpu", "max_steps": 2, "default_root_dir": str(tmp_path), "enable_progress_bar": False},
    }
    (tmp_path / "run.yaml").write_text(yaml.safe_dump(config))
    command = [sys.executable, "-m", "opsd_lightning", "fit", "--config", str(tmp_path / "run.yaml")]
    environment = os.environ | {"HF_HUB_OFFLINE": "1", "COLUMNS": "200"}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stderr
    expected = re.compile(
        r"Seed set to \d+|GPU available: \w+.*|data\.\w+ \(\w+\): \d of \d rows|`Trainer\.fit` stopped: .*"
        # Lightning's summary of the model
        r"|[┏┡├└┃│].*|(Trainable|Non-trainable|Total) (estimated model )?params.*|Modules in \w+ mode: \d+\s*|Total FLOPs.*"
    )
    foreign = [line for line in (done.stdout + done.stderr).splitlines() if line.strip() and not expected.fullmatch(line)]
    assert not foreign
