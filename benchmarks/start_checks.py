"""Seconds of the checks before training, evaluation and export in the quick start, and their share of its time.

    python benchmarks/start_checks.py            the whole quick start: about ten minutes on two CPU cores
    python benchmarks/start_checks.py --short    two steps: same seconds, but not the shares of a real run

Each check is timed where the quick start (test, fit with export, test) calls it.
"""

from __future__ import annotations

import functools
import importlib
import tempfile
import time
from collections import defaultdict
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from typing import Any
from unittest.mock import patch

from common import machine, model_folder, parser, report

# Modules and functions of each row of the table. No function calls another one.
CHECKS: dict[str, list[tuple[str, str]]] = {
    "settings, callbacks, precision": [
        ("cli.command", "check_trainer"),
        ("cli.command", "precision_problem"),
        ("methods.base", "check_trainer"),
        ("methods.base", "check_dtypes"),
        ("methods.base", "check_precision"),
    ],
    "folders and loggers": [("cli.command", "check_folders"), ("cli.command", "check_checkpoint_alias")],
    "prompts rendered with sentinels": [("data.datamodule", "OPSDDataModule._check_prompts")],
    "tensors, vocabulary, routers": [
        ("models.policy", "check_config"),
        ("models.policy", "check_tensors"),
        ("models.policy", "check_vocabulary"),
        ("models.policy", "not_adapted"),
        ("models.policy", "check_adapted"),
    ],
    "a trial step of the optimizer": [("methods.base", "make_optimizer"), ("methods.base", "make_scheduler")],
    "rows together and apart, rollouts": [("evaluation.evaluator", "EvaluatedModule.check_policy")],
    "record of the run in checkpoints": [
        ("methods.checkpoint_record", "record_of"),
        ("methods.checkpoint_record", "compare"),
    ],
    "fingerprint of the base": [("methods.base", "base_record")],
    "export compared with the policy": [
        ("models.export", "check_adapter"),
        ("models.export", "check_model"),
        ("models.export", "logits_of"),
    ],
}


def timed(
    function: Callable[..., Any], name: str, seconds: dict[str, list[float]], running: list[str]
) -> Callable[..., Any]:
    """Return the function with a counter of the seconds of its outermost calls."""

    @functools.wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if running:
            return function(*args, **kwargs)
        running.append(name)
        start = time.perf_counter()
        try:
            return function(*args, **kwargs)
        finally:
            seconds[name].append(time.perf_counter() - start)
            running.clear()

    return call


def main() -> None:
    arguments = parser(__doc__)
    arguments.add_argument("--short", action="store_true", help="two steps and few questions")
    arguments.add_argument("--model", default=None, help="another model's folder or hub id")
    args = arguments.parse_args()
    from opsd_lightning import quickstart

    seconds: dict[str, list[float]] = defaultdict(list)
    running: list[str] = []
    with tempfile.TemporaryDirectory() as folder, ExitStack() as patches:
        for name, functions in CHECKS.items():
            for module, path in functions:
                owner: Any = importlib.import_module(f"opsd_lightning.{module}")
                *outer, last = path.split(".")
                for part in outer:
                    owner = getattr(owner, part)
                patches.enter_context(patch.object(owner, last, timed(getattr(owner, last), name, seconds, running)))
        start = time.perf_counter()
        config = str(Path(__file__).parents[1] / "configs" / "quickstart.yaml")
        options = ["--config", config, "--model", model_folder(args.model), *["--short"] * args.short]
        quickstart.main([*options, "--output", str(Path(folder) / "run")])
        whole = time.perf_counter() - start
    rows = [
        {
            "check": name,
            "calls": len(seconds[name]),
            "seconds": sum(seconds[name]),
            "share, %": 100 * sum(seconds[name]) / whole,
        }
        for name in CHECKS
    ]
    total = sum(sum(values) for values in seconds.values())
    rows.append(
        {"check": "all", "calls": sum(map(len, seconds.values())), "seconds": total, "share, %": 100 * total / whole}
    )
    report("start_checks", machine(args.device), {f"of {whole:.0f} seconds": rows}, args.json)


if __name__ == "__main__":
    main()
