"""The subcommands of ``opsd``: their names, ``opsd --help``, ``opsd --version``, and the error for an unknown one.

Imports the standard library only, so that these answer at once.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from opsd_lightning import __version__
from opsd_lightning.utils.near_names import near_names, question
from opsd_lightning.utils.terminal import SafeArgumentParser

#: The program in one line.
TITLE = "opsd: On-Policy Self-Distillation of language models with PyTorch Lightning."


class Command(NamedTuple):
    """A subcommand of ``opsd``.

    Args:
        summary: One line for ``opsd --help``.
        module: The module that has its ``main``. Defaults to the LightningCLI.
        own_arguments: If True, ``main`` is given the arguments after the subcommand. If False, it reads the command line.
        builds_parts: If True, the command imports the classes that its settings name.
    """

    summary: str
    module: str = "opsd_lightning.cli.command"
    own_arguments: bool = False
    builds_parts: bool = True


COMMANDS: dict[str, Command] = {
    "fit": Command("Train a model, and validate it as it trains."),
    "validate": Command("Measure the accuracy of a model on data.val."),
    "test": Command("Measure the accuracy of a model on data.test, and store the graded completions."),
    "predict": Command("Sample completions for data.test, and store them with their grades."),
    "doctor": Command(
        "Check data, prompts, settings and memory before training.", "opsd_lightning.doctor.command", own_arguments=True
    ),
    "chat": Command(
        "Talk to the student, or to the teacher with a context.",
        "opsd_lightning.chat.command",
        own_arguments=True,
        builds_parts=False,
    ),
    "report": Command(
        "Write one HTML page about one run, or several side by side.",
        "opsd_lightning.reports.page",
        own_arguments=True,
        builds_parts=False,
    ),
    "show": Command(
        "Show the tokens of student and teacher for questions that you type, on a page in your browser.",
        "opsd_lightning.reports.show",
        own_arguments=True,
        builds_parts=False,
    ),
}


def find_command(arguments: Sequence[str]) -> Command:
    """Return the command that the arguments name.

    Args:
        arguments: The process's arguments, without the program's name.

    Raises:
        SystemExit: With status 0 after ``--help`` and ``--version``, with status 2 for a missing or unknown command.
    """
    first = arguments[0] if arguments else ""
    if first in COMMANDS:
        return COMMANDS[first]
    if first.startswith("-") and first not in ("-h", "--help", "--version"):  # LightningCLI's own, such as --config
        builds_parts = any(COMMANDS[argument].builds_parts for argument in arguments if argument in COMMANDS)
        return COMMANDS["fit"]._replace(builds_parts=builds_parts)
    parser = _parser()
    if first.startswith("-"):
        parser.parse_args([first])
    names = ", ".join(COMMANDS)
    if not first:
        parser.error(f"a command is missing. Commands: {names}")
    asked = question(near_names(first, COMMANDS))
    parser.error(f"there is no command {first!r}. {asked + ' ' if asked else ''}Commands: {names}")


def _parser() -> SafeArgumentParser:
    parser = SafeArgumentParser(
        prog="opsd",
        usage="opsd [-h] [--version] [-c CONFIG] COMMAND ...",
        description=TITLE,
        epilog="`opsd COMMAND --help` lists a command's options. `opsd doctor` takes those of `opsd fit`: run it first.",
    )
    parser.add_argument("--version", action="version", version=f"opsd {__version__}")
    parser.add_argument("-c", "--config", metavar="CONFIG", help="YAML file with a section of settings for each command")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for name, command in COMMANDS.items():
        commands.add_parser(name, help=command.summary, add_help=False)
    return parser
