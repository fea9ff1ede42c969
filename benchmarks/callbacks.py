"""Cost of the monitoring callbacks at their default settings, as a share of an optimizer step.

    python benchmarks/callbacks.py                       SmolLM2-135M-Instruct (`make quickstart` leaves it in runs/models)
    python benchmarks/callbacks.py --batch 24 --new-tokens 256

Fits over the same steps run in turn without and with the callbacks. A fit is as long as the longest default period of a
callback, so that each callback does all its work. The table shows the ratio of the fits and the time inside each callback's
hooks. The latter is more precise, since times of two fits differ by more than a few percent on a shared machine.
"""

from __future__ import annotations

import argparse
import tempfile
import time
import warnings
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import torch
from common import machine, model_folder, parser, report, wait
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.loggers import CSVLogger, TensorBoardLogger

from opsd_lightning import (
    CollapseGuard,
    Health,
    LoRA,
    OPSDDataModule,
    OPSDModule,
    Policy,
    Prompts,
    RolloutTable,
    RunReport,
    Sampling,
    TokenReport,
    WordProblems,
)

SHOWN = (RolloutTable, TokenReport, Health, CollapseGuard, RunReport)


def timed(callback: Callback, seconds: dict[str, float], device: str) -> Callback:
    """Return the callback with a counter of the seconds that its hooks take during steps."""

    def wrap(hook: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait(device)
            start = time.perf_counter()
            result = hook(*args, **kwargs)
            wait(device)
            seconds[type(callback).__name__] += time.perf_counter() - start
            return result

        return call

    for name in ("on_train_batch_start", "on_before_optimizer_step", "on_train_batch_end"):
        setattr(callback, name, wrap(getattr(callback, name)))
    return callback


class Clock(Callback):
    """Measures the seconds from the start of the first step to the end of training."""

    def on_train_batch_start(self, *args: Any) -> None:
        if not hasattr(self, "began"):
            self.began = time.perf_counter()

    def on_train_end(self, *args: Any) -> None:
        self.seconds = time.perf_counter() - self.began


def fit(args: argparse.Namespace, policy: Policy, folder: Path, shown: bool) -> tuple[float, dict[str, float]]:
    """Return the seconds of all steps and of each callback's hooks."""
    torch.manual_seed(0)
    module = OPSDModule(
        policy, sampling=Sampling(max_new_tokens=args.new_tokens), optimizer=lambda p: torch.optim.AdamW(p, lr=0.0)
    )
    train = WordProblems(size=args.batch * args.steps, seed=1)
    prompts = Prompts("{question}", "{question} Solution: {context}")
    data = OPSDDataModule(policy, train=train, prompts=prompts, batch_size=args.batch, max_new_tokens=args.new_tokens)
    clock, hooks = Clock(), defaultdict[str, float](float)
    callbacks = [timed(kind(), hooks, args.device) for kind in SHOWN] if shown else []
    loggers = [CSVLogger(folder, "csv"), TensorBoardLogger(folder, "board")]
    trainer = Trainer(
        accelerator="gpu" if args.device.startswith("cuda") else "cpu", devices=1, max_steps=args.steps, logger=loggers,
        callbacks=[clock, *callbacks], default_root_dir=folder, enable_progress_bar=False, enable_model_summary=False,
        enable_checkpointing=False, log_every_n_steps=1,
    )  # fmt: skip
    trainer.fit(module, data)
    return clock.seconds, hooks


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--batch", type=int, default=4, help="questions per step, with one completion each")
    options.add_argument("--new-tokens", type=int, default=64, help="length limit of a completion in tokens")
    options.add_argument("--steps", type=int, default=25, help="optimizer steps of a fit (the longest default period is 25)")
    args = options.parse_args()
    warnings.simplefilter("ignore")
    policy = Policy(model_folder(args.model), dtype="float32", lora=LoRA(r=16, alpha=32))
    fits: dict[bool, list[float]] = {False: [], True: []}
    shares: dict[str, list[float]] = defaultdict(list)
    with tempfile.TemporaryDirectory() as folder:
        for repeat in range(args.repeats):
            for shown in (False, True):
                seconds, hooks = fit(args, policy, Path(folder) / f"{repeat}-{shown}", shown)
                fits[shown].append(seconds)
                if shown:
                    rest = seconds - sum(hooks.values())
                    for name in (kind.__name__ for kind in SHOWN):
                        shares[name].append(hooks[name] / rest)
                    shares["all together"].append(sum(hooks.values()) / rest)
    table = [{"callback": name, "share of a step, %": 100 * median(values)} for name, values in shares.items()]
    both = median(b / a for a, b in zip(fits[False], fits[True], strict=True))
    whole = [{"seconds a step without": median(fits[False]) / args.steps, "time of a fit with them / without": both}]
    report("callbacks", machine(args.device), {"in the hooks": table, "whole fits": whole}, args.json)


if __name__ == "__main__":
    main()
