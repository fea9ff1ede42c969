"""Repeat every attack, each round with other seeds, until the time is over, and print what was tried and what failed.

Run as ``python -m tests.attacks.hour``, which `make attack` does. The last round is finished: with ``--minutes 0`` every
attack is made once, at its full size. Exits with status 1 if any attack succeeded.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

HERE = Path(__file__).parent


def run_round(number: int, report: Path, workers: int, chosen: list[str]) -> int:
    """Make every attack once, at its full size; returns pytest's exit status."""
    command = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-n", str(workers), "--dist", "load", *chosen]
    environment = os.environ | {"OPSD_ATTACK_ROUND": str(number), "OPSD_ATTACK_REPORT": str(report), "HF_HUB_OFFLINE": "1"}
    return subprocess.run(command, env=environment, cwd=HERE.parents[1], check=False).returncode


def table(lines: list[dict[str, object]]) -> str:
    """Return the tries of each attack as rows of Markdown."""
    tried: Counter[str] = Counter()
    failed: Counter[str] = Counter()
    for line in lines:
        tried[str(line["attack"])] += int(str(line["tried"]))
        failed[str(line["attack"])] += int(str(line["failed"]))
    rows = [f"| {name} | {tried[name]:,} | {failed[name]} |" for name in sorted(tried)]
    return "\n".join(["| attack | tried | tests failed |", "|---|---|---|", *rows])


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=60.0, help="no new round begins after so many minutes")
    parser.add_argument("--workers", type=int, default=2, help="processes that attack at once")
    parser.add_argument("chosen", nargs="*", default=[str(HERE)], help="test files, or pytest's options behind --")
    options = parser.parse_args()
    started, number, status = time.monotonic(), 0, 0
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.jsonl"
        while number == 0 or time.monotonic() - started < 60 * options.minutes:
            number += 1
            status |= run_round(number, report, options.workers, options.chosen)
        lines = [json.loads(line) for line in report.read_text(encoding="utf-8").splitlines()] if report.exists() else []
    print(f"\n{number} round(s) in {(time.monotonic() - started) / 60:.0f} minutes\n\n{table(lines)}")
    return int(status != 0)


if __name__ == "__main__":
    raise SystemExit(main())
