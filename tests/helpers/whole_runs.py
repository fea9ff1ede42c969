"""Runs of the command line in processes forked from this one, to be killed, and what they leave behind."""

from __future__ import annotations

import csv
import json
import re
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import yaml

from helpers.files import write_jsonl
from helpers.processes import Child, two_ranks
from opsd_lightning.cli.command import main

STEPS = 6


def configure(folder: Path, model: str, every: int = 1, **trainer: Any) -> list[str]:
    """Write the configuration of a small run that uses many parts; return the command's arguments.

    Args:
        folder: Where everything goes.
        model: Folder of the base model.
        every: Steps between checkpoints.
        trainer: The trainer's further settings.
    """
    folder.mkdir(parents=True, exist_ok=True)
    rows = [{"problem": f"{n}+1?", "solution": f"The answer is {n + 1}.", "gold": str(n + 1)} for n in range(14)]
    path = write_jsonl(folder / "rows.jsonl", rows)
    callbacks = [
        # Its metric is of no value, but it changes.
        ("ModelCheckpoint", {"dirpath": str(folder / "best"), "monitor": "val/completion_tokens", "mode": "min"}),
        ("ModelCheckpoint", {"dirpath": str(folder / "steps"), "every_n_train_steps": every, "save_last": True}),
        ("AdapterExport", {}),
        ("RolloutTable", {"every_n_steps": 1, "rows": 2}),
        ("RunReport", {"questions": 2}),
    ]
    config = {
        "model": {
            "policy": {"model": model, "dtype": "float32", "lora": {"r": 4, "alpha": 8.0, "dropout": 0.3}},
            "sampling": {"max_new_tokens": 6},
            "eval_sampling": {"max_new_tokens": 6, "n": 2},
            "teacher": {"class_path": "EMATeacher", "init_args": {"decay": 0.7}},
            "optimizer": {"class_path": "torch.optim.AdamW", "init_args": {"lr": 0.02}},
            "lr_scheduler": {
                "class_path": "torch.optim.lr_scheduler.LinearLR",
                "init_args": {"start_factor": 1.0, "end_factor": 0.1, "total_iters": STEPS},
            },
        },
        "data": {
            split: {"class_path": "FileSource", "init_args": {"path": str(path), "columns": {"answer": "gold"}}}
            for split in ("train", "val", "test")
        }
        | {"batch_size": 2, "eval_batch_size": 2},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": STEPS,
            "val_check_interval": 2,
            "check_val_every_n_epoch": None,
            "num_sanity_val_steps": 0,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(folder), "version": "log"}},
            "log_every_n_steps": 1,
            "callbacks": [{"class_path": name, "init_args": settings} for name, settings in callbacks],
            "default_root_dir": str(folder),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        }
        | trainer,
    }
    config["data"]["train"]["init_args"]["split"] = "train[6:]"  # four steps an epoch
    config["data"]["val"]["init_args"]["split"] = "train[:3]"
    config["data"]["test"]["init_args"]["split"] = "train[:6]"
    (folder / "base.yaml").write_text(yaml.safe_dump(config))
    return [f"--config={folder / 'base.yaml'}"]


def fit(folder: Path, arguments: list[str], environment: Mapping[str, str] | None = None) -> Child:
    return Child(lambda: main(["fit", *arguments]), folder / "output.log", environment)


_known: dict[str | None, tuple[dict[str, Any], float]] = {}


def never_stopped(folder: Path, model: str, strategy: str | None = None) -> tuple[dict[str, Any], float]:
    """Return the results of a run that is never stopped, and its seconds; on two ranks if a strategy is given. Cached."""
    if strategy not in _known:
        arguments = configure(folder, model)
        ranks = [fit(folder, arguments)] if strategy is None else on_two_ranks(folder, arguments, strategy)
        codes = [rank.end(300) for rank in ranks]
        assert not any(codes), ranks[codes[0] == 0].said()
        _known[strategy] = left_by(folder), ranks[0].seconds
    return _known[strategy]


def on_two_ranks(folder: Path, arguments: list[str], strategy: str) -> list[Child]:
    """Start a fit in two processes as torchrun does, each with half of a step's questions."""
    settings = ["--data.batch_size=1", "--trainer.devices=2", f"--trainer.strategy={strategy}"]
    return two_ranks(folder, partial(main, ["fit", *arguments, *settings]))


def wait_until_joined(ranks: list[Child]) -> None:
    """Wait until the ranks are connected. Before, no rank notices that the other was killed."""
    while "data." not in ranks[0].said() and not any(rank.ended(0.01) for rank in ranks):
        pass


def left_by(folder: Path) -> dict[str, Any]:
    """Return the results of a run that must not depend on how often it was stopped, by name."""
    found: dict[str, Any] = {}
    if (folder / "steps" / "last.ckpt").exists():
        last = torch.load(folder / "steps" / "last.ckpt", weights_only=True)
        keys = ("state_dict", "optimizer_states", "lr_schedulers", "global_step", "epoch")
        found |= {f"last {key}": last[key] for key in keys}
        found |= {
            f"best by {state['monitor']}": _best(state) for state in last["callbacks"].values() if state.get("monitor")
        }
    found["adapter"] = (folder / "adapter" / "adapter_model.safetensors").read_bytes()
    lines = [json.loads(line) for line in (folder / "record" / "metrics.jsonl").read_text().splitlines()]
    for line in lines:
        line.pop("seconds")
        line["metrics"] = {name: value for name, value in line["metrics"].items() if not name.startswith("time/")}
    found["record's metrics"] = lines
    found["record's samples"] = (folder / "record" / "samples.jsonl").read_text().splitlines()
    found["status"] = json.loads((folder / "record" / "run.json").read_text())["status"]
    with (folder / "rollouts.csv").open(newline="") as file:
        found["rollouts.csv"] = list(csv.reader(file))
    found["page"] = (folder / "report.html").stat().st_size > 10_000
    return found


def _best(state: Mapping[str, Any]) -> dict[str, Any]:
    """Return the best checkpoint of a callback, without the version suffix that a kill can add."""
    return {"name": re.sub(r"-v\d+$", "", Path(state["best_model_path"]).stem), "score": state["best_model_score"]}


def differences(one: Any, other: Any, path: str = "") -> list[str]:
    """Return the differences between the results of two runs."""
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        if set(one) != set(other):
            return [f"{path}: {sorted(map(str, set(one) ^ set(other)))} in one alone"]
        return [text for key in one for text in differences(one[key], other[key], f"{path}/{key}")]
    if isinstance(one, (list, tuple)) and isinstance(other, (list, tuple)):
        if len(one) != len(other):
            return [f"{path}: {len(one)} and {len(other)} entries"]
        return [text for i, pair in enumerate(zip(one, other, strict=True)) for text in differences(*pair, f"{path}/{i}")]
    if isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor):
        return [] if torch.equal(one, other) else [f"{path}: tensors differ"]
    return [] if one == other or (one != one and other != other) else [f"{path}: {str(one)[:200]} and {str(other)[:200]}"]
