"""The ``opsd`` command: the command line of ``main.py``, and the commands that need no trainer.

Only the module of the command that is asked for is imported.
"""

from __future__ import annotations

import sys
from importlib import import_module

from opsd_lightning.import_path import add_folder, without_folder

#: Commands beside LightningCLI's, and the modules whose ``main`` runs them.
COMMANDS: dict[str, str] = {"doctor": "opsd_lightning.doctor", "report": "opsd_lightning.report"}
#: Commands that make objects of the classes that settings name.
_BUILDING = {"doctor", "fit", "validate", "test", "predict"}


def entry() -> None:
    """Run the command that the process's arguments name."""
    arguments = sys.argv[1:]
    command = arguments[0] if arguments else ""
    with without_folder():
        import_module("opsd_lightning.terminal").guard_tracebacks()
        module = import_module(COMMANDS.get(command, "opsd_lightning.main"))
        if command not in COMMANDS and command in ("-h", "--help"):
            print(f"Beside the subcommands below: {', '.join(f'opsd {name}' for name in COMMANDS)} (see their own --help)\n")
        if command == "doctor" or (command not in COMMANDS and _BUILDING & set(arguments)):
            add_folder(arguments)
        if command in COMMANDS:
            module.main(arguments[1:])
        else:
            module.main()


if __name__ == "__main__":
    entry()
