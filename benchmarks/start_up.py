"""Seconds until commands of `opsd` have answered.

    python benchmarks/start_up.py                    this checkout
    python benchmarks/start_up.py --before FOLDER    this checkout and another one, in turn

Each command runs in a process of its own, with the files in the page cache. CPU seconds (user and system) depend less on
other processes than seconds on the clock do. Both are medians.
"""

from __future__ import annotations

import os
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from common import machine, parser, report

COMMANDS = ["--version", "--help", "fitt", "report --help", "doctor --help", "fit --help", "fit --print_config"]


def run(root: Path, words: list[str]) -> tuple[float, float, int]:
    """Run a command of a checkout.

    Returns:
        Seconds on the clock, CPU seconds, and lines on the standard error.
    """
    environment = os.environ | {"PYTHONPATH": str(root), "HF_HUB_OFFLINE": "1"}
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    start = time.perf_counter()
    command = [sys.executable, "-P", "-m", "opsd_lightning", *words]
    done = subprocess.run(command, env=environment, capture_output=True, text=True)
    seconds = time.perf_counter() - start
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu = after.ru_utime - before.ru_utime + after.ru_stime - before.ru_stime
    return seconds, cpu, len(done.stderr.splitlines())


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--before", type=Path, default=None, help="another checkout")
    arguments.add_argument(
        "--command", action="append", metavar="ARGUMENTS", help="another command, such as --command='fit -h'"
    )
    args = arguments.parse_args()
    roots = {} if args.before is None else {"before": args.before.resolve()}
    roots["now"] = Path(__file__).resolve().parents[1]
    rows: list[dict[str, Any]] = []
    for command in args.command or COMMANDS:
        found: dict[str, list[tuple[float, float, int]]] = {name: [] for name in roots}
        for repeat in range(args.repeats + 1):
            for name, root in roots.items():
                measured = run(root, command.split())
                if repeat:  # the first one reads the files from the disk
                    found[name].append(measured)
        row: dict[str, Any] = {"command": f"opsd {command}"}
        for name, values in found.items():
            clock, cpu, lines = zip(*values, strict=True)
            row |= {f"{name}, s": statistics.median(clock), f"{name}, CPU s": statistics.median(cpu)}
            row[f"{name}, lines on stderr"] = int(statistics.median(lines))
        rows.append(row)
    report("start_up", machine("cpu"), {"seconds until a command has answered": rows}, args.json)


if __name__ == "__main__":
    main()
