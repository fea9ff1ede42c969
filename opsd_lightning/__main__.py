"""The ``opsd`` command: the command line of ``main.py``, and the commands that need no trainer.

Only the room of the command that is asked for is imported.
"""

from __future__ import annotations

import os
import sys
from importlib import import_module

#: Commands beside LightningCLI's, and the rooms whose ``main`` runs them.
COMMANDS: dict[str, str] = {"doctor": "opsd_lightning.doctor", "report": "opsd_lightning.report"}


def entry() -> None:
    """Run the command that the process's arguments name."""
    # As for `python cli.py`: a part of one's own in the current folder can be named in YAML.
    sys.path.insert(0, os.getcwd())
    command = sys.argv[1] if len(sys.argv) > 1 else ""
    if command in COMMANDS:
        import_module(COMMANDS[command]).main(sys.argv[2:])
        return
    if COMMANDS and command in ("-h", "--help"):
        print(f"Beside the subcommands below: {', '.join(f'opsd {name}' for name in COMMANDS)} (see their own --help)\n")
    import_module("opsd_lightning.main").main()


if __name__ == "__main__":
    entry()
