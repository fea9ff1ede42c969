"""The process that runs the checks: reads the name of a check a line, and answers each with one line of JSON.

It ends with the process that started it, whatever a check does meanwhile.
"""

from __future__ import annotations

import argparse
import importlib
import json
import logging
import os
import signal
import sys
import threading
import traceback
from collections import UserDict
from pathlib import Path
from queue import SimpleQueue
from typing import Any

from gpu.runner import Skip


class Facts(UserDict[str, Any]):
    """The facts of a check. Each is sent when it is set, so that those of a check that hangs are known."""

    def __init__(self, send: Any) -> None:
        super().__init__()
        self._send = send

    def __setitem__(self, name: str, value: Any) -> None:
        self.data[name] = value
        self._send({"fact": name, "value": value})


def named(place: str) -> Any:
    """Return the object that ``module:name`` names."""
    module, _, name = place.partition(":")
    return getattr(importlib.import_module(module), name)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--answers", type=int, required=True, help="file descriptor for the answers")
    parser.add_argument("--machine", required=True, help="context manager of the machine, as module:name")
    parser.add_argument("--folder", type=Path, required=True, help="folder for models and runs")
    parser.add_argument("--imitate", default="", help="card to imitate")
    options = parser.parse_args()
    answers = os.fdopen(options.answers, "wb", buffering=0)

    def send(message: dict[str, Any]) -> None:
        answers.write(json.dumps(message, default=str).encode() + b"\n")

    names: SimpleQueue[str] = SimpleQueue()

    def listen() -> None:
        for line in sys.stdin:
            names.put(line.strip())
        os.killpg(os.getpgid(0), signal.SIGKILL)  # the other process has ended: end the children of checks, too

    threading.Thread(target=listen, daemon=True).start()
    logging.getLogger("lightning.pytorch").setLevel(logging.ERROR)
    with named(options.machine)(options.folder, options.imitate) as machine:
        send({"ready": True})
        while True:
            send(answer_of(names.get(), machine, send))


def answer_of(function: str, machine: Any, send: Any) -> dict[str, str]:
    """Run a check, and return its status, and the reason if it did not pass."""
    print(f"--- {function}", flush=True)
    try:
        named(function)(machine, Facts(send))
        return {"status": "pass"}
    except Skip as reason:
        return {"status": "skip", "reason": str(reason)}
    except BaseException as error:  # whatever a check raises, such as the SystemExit of a command
        traceback.print_exc()
        return {"status": "fail", "reason": f"{type(error).__name__}: {error}"[:1500]}
    finally:
        machine.clean()


if __name__ == "__main__":
    main()
