"""The ``opsd`` command: the command line of ``cli``, and the commands that need no trainer.

Only the module of the command that is asked for is imported.
"""

from __future__ import annotations

import os
import sys
import threading
import time
from contextlib import suppress
from importlib import import_module

from opsd_lightning.runs import early_signals
from opsd_lightning.utils.import_path import add_current_folder, without_current_folder

#: Commands beside LightningCLI's, and the modules whose ``main`` runs them.
COMMANDS: dict[str, str] = {"doctor": "opsd_lightning.doctor.command", "report": "opsd_lightning.reports.page"}
#: Commands that make objects of the classes that settings name.
_BUILDING = {"doctor", "fit", "validate", "test", "predict"}
# The process that has started this one, where Lightning starts the ranks: the first rank.
_FIRST_RANK = "OPSD_FIRST_RANK"
_END_SECONDS = 10.0


def entry() -> None:
    """Run the command that the process's arguments name."""
    end_with_first_rank()
    early_signals.install()
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else ""
    with without_current_folder():
        import_module("opsd_lightning.utils.terminal").safe_tracebacks()
        module = import_module(COMMANDS.get(command, "opsd_lightning.cli.command"))
        if command not in COMMANDS and command in ("-h", "--help"):
            print(f"Beside the subcommands below: {', '.join(f'opsd {name}' for name in COMMANDS)} (see their own --help)\n")
        if command == "doctor" or (command not in COMMANDS and _BUILDING & set(arguments)):
            add_current_folder(arguments)
        if command in COMMANDS:
            module.main(arguments[1:])
        else:
            module.main()


def end_with_first_rank() -> None:
    """End a rank that the first rank has started some seconds after that is gone. Before the ranks are connected, nothing
    else would end it."""
    first, rank = os.environ.get(_FIRST_RANK, ""), os.environ.get("LOCAL_RANK", "0")
    if not first.isdigit() or rank == "0" or "TORCHELASTIC_RUN_ID" in os.environ:
        os.environ[_FIRST_RANK] = str(os.getpid())
        return

    def watch() -> None:
        while os.getppid() == int(first):
            time.sleep(1)
        time.sleep(_END_SECONDS)
        with suppress(OSError):
            os.write(2, f"error: the first rank is gone: rank {rank} ends as well\n".encode())
        os._exit(1)

    threading.Thread(target=watch, name="opsd-first-rank", daemon=True).start()


if __name__ == "__main__":
    entry()
