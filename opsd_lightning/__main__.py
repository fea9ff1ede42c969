"""The ``opsd`` command.

Only the module of the requested command is imported. Help, version and errors about the command itself import no library.
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

# Process id of the first rank, which starts the other ranks of a node.
_FIRST_RANK = "OPSD_FIRST_RANK"
_END_SECONDS = 10.0


def entry() -> None:
    """Run the command that the process's arguments name."""
    end_with_first_rank()
    early_signals.install()
    arguments = sys.argv[1:]
    with without_current_folder():  # and only then import what could lie in the current folder
        from opsd_lightning.cli.commands import find_command
        from opsd_lightning.utils.fast_imports import fast_imports
        from opsd_lightning.utils.terminal import safe_tracebacks

        safe_tracebacks()
        command = find_command(arguments)
        with fast_imports():
            module = import_module(command.module)
        if command.builds_parts:
            add_current_folder(arguments)
        if command.own_arguments:
            module.main(arguments[1:])
        else:
            module.main()


def end_with_first_rank() -> None:
    """End a rank some seconds after the first rank, which started it, is gone.

    Before the ranks are connected, nothing else would end it.
    """
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
