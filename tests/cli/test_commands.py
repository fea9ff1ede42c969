"""Help, version and errors about the command answer without the libraries that training needs."""

from __future__ import annotations

import subprocess
import sys

import pytest

from helpers.paths import ROOT
from opsd_lightning import __version__
from opsd_lightning.cli.commands import COMMANDS, find_command

pytestmark = pytest.mark.integration

HEAVY = [
    "torch",
    "transformers",
    "lightning",
    "peft",
    "bitsandbytes",
    "datasets",
    "torchmetrics",
    "matplotlib",
    "pandas",
    "sympy",
    "jinja2",
]
_PROGRAM = f"""
import atexit, sys
from opsd_lightning.__main__ import entry
atexit.register(lambda: print("LOADED", *(name for name in {HEAVY} if name in sys.modules)))
entry()
"""


def opsd(*words: str) -> tuple[int, str, set[str]]:
    """Return the exit status of a command in a process of its own, its output, and the large libraries that it imports."""
    done = subprocess.run([sys.executable, "-c", _PROGRAM, *words], cwd=ROOT, capture_output=True, text=True, timeout=240)
    out, _, loaded = done.stdout.rpartition("LOADED")
    return done.returncode, out + done.stderr, set(loaded.split())


@pytest.mark.parametrize(
    ("words", "status", "text"),
    [
        (["--help"], 0, "validate"),
        (["-h"], 0, "doctor"),
        (["--version"], 0, __version__),
        ([], 2, "report"),
        (["fitt", "--config", "configs/quickstart.yaml"], 2, "fit?"),
        (["doctro"], 2, "doctor?"),
        (["nothing-like-it"], 2, "predict"),
        (["report", "--help"], 0, "RUN"),
        (["chat", "--help"], 0, "--adapter"),
        (["doctor", "--help"], 0, "--no-model"),
        (["doctor", "--examples=0"], 2, "--examples"),
    ],
)
def test_answers_import_no_large_library(words: list[str], status: int, text: str) -> None:
    found, output, loaded = opsd(*words)
    assert (found, loaded) == (status, set())
    assert text in output


# Both commands build the same parser.
@pytest.mark.parametrize("command", ["fit", pytest.param("doctor", marks=pytest.mark.slow)])
def test_a_command_without_quantization_does_not_import_bitsandbytes(command: str) -> None:
    status, output, loaded = opsd(command, "--print_config")
    assert status == 0 and "OPSDModule" in output
    assert "torch" in loaded and "bitsandbytes" not in loaded


def test_help_lists_every_command() -> None:
    _, output, _ = opsd("--help")
    assert all(f"\n    {name} " in output for name in COMMANDS)
    assert all(" ".join(command.summary.split()) in " ".join(output.split()) for command in COMMANDS.values())
    assert all(command.summary.endswith(".") for command in COMMANDS.values())


def test_options_before_the_command_are_left_to_lightning() -> None:
    assert find_command(["--config", "x.yaml", "fit"]) == COMMANDS["fit"]
    assert find_command(["--config=x.yaml", "report"]) == COMMANDS["fit"]._replace(builds_parts=False)
