"""Seconds until the training rows are verified and tokenized, on one process and on two ranks.

    python benchmarks/data_start.py                    this checkout: no cache, a new one, a filled one
    python benchmarks/data_start.py --before FOLDER    and another checkout, in turn

Rows are generated: questions of 60 words, traces of 20 to 120 sentences, and answers of which every eighth is left to
computer algebra. Each side runs in processes of its own, which have imported everything before the clock starts. Two ranks
are connected by gloo, and the slower one counts. The prepared rows of all sides are compared.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import resource
import socket
import statistics
import subprocess
import sys
import tempfile
import time
from collections import defaultdict
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import machine, model_folder, parser, report

PROSE = (
    "let us consider a function where each number divides the sum of integers so that this equation holds then we "
    "substitute its result because that triangle has an angle of some prime remainder modulo 7"
)
WORDS = PROSE.split()
#: Sides: checkout, ranks, and what the cache holds at the start (None: it is off).
SIDES = {
    "before, one process": ("before", 1, None),
    "before, two ranks": ("before", 2, None),
    "one process, no cache": ("now", 1, None),
    "one process, empty cache": ("now", 1, "empty"),
    "one process, filled cache": ("now", 1, "filled"),
    "two ranks, no cache": ("now", 2, None),
    "two ranks, filled cache": ("now", 2, "filled"),
}
#: Where the time of a side goes: functions of each part. No function calls another one.
PARTS = {
    "fingerprint": [("data.preparation", "Preparation.fingerprint")],
    "verifying": [("data.preparation", "Preparation._verify")],
    "tokenizing": [("data.preparation", "Preparation._tokenize")],
    "cache file": [
        *(("utils.file_cache", f"FileCache.{name}") for name in ("load", "store")),
        *(("data.prepared_rows", f"PreparedRows.{name}") for name in ("to_bytes", "from_bytes")),
    ],
    "token lists": [("data.datamodule", "token_lists")],
}


def generated(count: int, sentences: int) -> list[tuple[str, str, str]]:
    """Return questions, traces and answers, a tenth of which contradict each other."""
    draw = random.Random(0)
    rows = []
    for number in range(count):
        question = " ".join(draw.choices(WORDS, k=60)) + f", for $x^2 + {draw.randint(1, 99)}x = {number}$?"
        steps = []
        for step in range(draw.randint(max(sentences // 6, 1), sentences)):
            a, b = draw.randint(1, 999), draw.randint(1, 999)
            steps.append(" ".join(draw.choices(WORDS, k=8)) + rf" ${a} + {b} = {a + b}$, \frac{{{a}}}{{{b}}} x^{{{step}}}.")
        a, b = draw.randint(1, 999), draw.randint(2, 99)
        found, reference = draw.choices(
            [
                (str(a), str(a)),
                (rf"\dfrac{{{2 * a}}}{{{2 * b}}}", f"{a}/{b}"),
                (rf"{a}\sqrt{{{b}}}", rf"\sqrt{{{b}}} \cdot {a}"),
                (str(a), str(a + 1)),
            ],
            [60, 18, 12, 10],
        )[0]
        rows.append((question, "\n".join([*steps, rf"Therefore the answer is $\boxed{{{found}}}$."]), reference))
    return rows


def rank_main(args: argparse.Namespace) -> None:
    """Prepare the rows in this process, and print the seconds and a digest of the rows as JSON."""
    import importlib

    from lightning.pytorch import Trainer
    from lightning.pytorch.strategies import DDPStrategy

    import opsd_lightning as opsd
    from opsd_lightning.data.sources import ExampleSource

    class Generated(ExampleSource):
        def __init__(self) -> None:
            self.rows = [opsd.Example(*row) for row in generated(args.rows, args.sentences)]

        def examples(self) -> list[Any]:
            return self.rows

    policy = opsd.Policy(args.model)
    settings: dict[str, Any] = {} if args.checkout == "before" else {"cache_dir": args.cache}
    data = opsd.OPSDDataModule(policy, train=Generated(), batch_size=1, max_new_tokens=64, **settings)
    chosen: dict[str, Any] = {"devices": 1}
    if args.ranks > 1:
        chosen = {"devices": args.ranks, "strategy": DDPStrategy(process_group_backend="gloo")}
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **chosen)
    data.trainer.strategy.connect(opsd.OPSDModule(policy, sampling=opsd.Sampling(max_new_tokens=64)))
    data.trainer.strategy.setup_environment()
    parts: dict[str, float] = defaultdict(float)
    with ExitStack() as patches:
        for part, functions in PARTS.items() if args.checkout == "now" else ():
            for module, path in functions:
                owner: Any = importlib.import_module(f"opsd_lightning.{module}")
                *outer, last = path.split(".")
                for name in outer:
                    owner = getattr(owner, name)
                patches.enter_context(patch.object(owner, last, timed(getattr(owner, last), part, parts)))
        start = time.perf_counter()
        data.setup("fit")
        seconds = time.perf_counter() - start
    rows = data.rows["train"]
    digest = hashlib.sha256()
    answers, dropped = [example.answer for example in rows.examples], sorted(map(repr, data.dropped["train"].items()))
    for content in (rows.student, rows.teacher, answers, dropped):
        for row in content:
            digest.update(f"{row}\n".encode())
    used = resource.getrusage(resource.RUSAGE_SELF)
    found = {
        "seconds": seconds,
        "parts": parts,
        "digest": digest.hexdigest(),
        "rows": len(rows.student),
        "tokens": sum(a + b for a, b in data.lengths["train"]),
        "CPU seconds": used.ru_utime + used.ru_stime,
    }
    print(f"RESULT {json.dumps(found)}", flush=True)


def timed(function: Any, part: str, parts: dict[str, float]) -> Any:
    def call(*args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            parts[part] += time.perf_counter() - start

    return call


def run(root: Path, side: str, cache: str | None, words: list[str]) -> dict[str, Any]:
    """Run the ranks of a side in processes of their own, and return the result of the slower one."""
    checkout, ranks, _ = SIDES[side]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = [sys.executable, "-P", str(Path(__file__).resolve()), "--checkout", checkout, "--ranks", str(ranks), *words]
    children = []
    for rank in map(str, range(ranks)):
        environment = os.environ | {"PYTHONPATH": f"{root}:{Path(__file__).resolve().parent}", "HF_HUB_OFFLINE": "1"}
        if ranks > 1:
            environment |= {
                "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "RANK": rank, "LOCAL_RANK": rank, "GROUP_RANK": "0",
                "WORLD_SIZE": str(ranks), "LOCAL_WORLD_SIZE": str(ranks), "TORCHELASTIC_RUN_ID": "benchmark",
            }  # fmt: skip
        command = [*script, *(["--cache", cache] if cache else [])]
        children.append(subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, text=True))
    said = [child.communicate()[0] for child in children]
    if any(child.returncode for child in children):
        raise SystemExit(f"{side}: a process failed")
    results = [line.removeprefix("RESULT ") for text in said for line in text.splitlines() if line.startswith("RESULT ")]
    found = [json.loads(result) for result in results]
    if len({each["digest"] for each in found}) != 1:
        raise SystemExit(f"{side}: the ranks have different rows")
    slowest: dict[str, Any] = max(found, key=lambda each: each["seconds"])
    return slowest | {"parts": found[0]["parts"]}  # of rank 0


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--rows", type=int, default=30_000)
    arguments.add_argument("--sentences", type=int, default=120, help="longest trace")
    arguments.add_argument("--sides", nargs="+", choices=list(SIDES), default=list(SIDES), help="in this order")
    arguments.add_argument("--before", type=Path, default=None, help="another checkout")
    arguments.add_argument("--model", default=None, help="folder or hub id of the tokenizer's model")
    for option in ("--checkout", "--cache"):  # of the child processes
        arguments.add_argument(option, default=None, help=argparse.SUPPRESS)
    arguments.add_argument("--ranks", type=int, default=1, help=argparse.SUPPRESS)
    args = arguments.parse_args()
    args.model = model_folder(args.model)
    if args.checkout is not None:
        rank_main(args)
        return
    roots = {"now": Path(__file__).resolve().parents[1]}
    if args.before is not None:
        roots["before"] = args.before.resolve()
    words = ["--rows", str(args.rows), "--sentences", str(args.sentences), "--model", args.model]
    found: dict[str, list[dict[str, Any]]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for side in args.sides:
                checkout, _, state = SIDES[side]
                if checkout in roots:
                    cache = None if state is None else str(Path(folder) / str(repeat))
                    found[side].append(run(roots[checkout], side, cache, words))
                    print(f"{side}: {found[side][-1]['seconds']:.1f} s", flush=True)
    digests = {each["digest"] for side in found.values() for each in side}
    if len(digests) != 1:
        raise SystemExit("the sides have different rows")
    rows = []
    for side, values in found.items():
        row: dict[str, Any] = {"side": side, "seconds": statistics.median(each["seconds"] for each in values)}
        for part in PARTS:
            if values[0]["parts"]:
                row[f"{part}, s"] = statistics.median(each["parts"].get(part, 0.0) for each in values)
        rows.append(row)
    one = next(iter(found.values()))[0]
    title = f"{args.rows} rows, {one['rows']} usable, {one['tokens'] / 1e6:.1f} million tokens: the same rows on every side"
    report("data_start", machine("cpu"), {title: rows}, args.json)


if __name__ == "__main__":
    main()
