"""The disk is full at some step: what was saved stays whole, and with room again the run ends as one that never stopped."""

from __future__ import annotations

import json
import resource
import signal
from pathlib import Path

import torch
from whole_runs import Child, configure, differences, fit, left_by, never_stopped

from conftest import Attack
from opsd_lightning.main import main

SECONDS = 120


def with_no_room(arguments: list[str], limit: int) -> None:
    """Fit where no file may grow beyond so many bytes."""
    signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, limit))
    main(["fit", *arguments])


def test_nothing_is_lost_on_a_full_disk(attack: Attack, roomy: str, tmp_path: Path) -> None:
    expected, _ = never_stopped(tmp_path / "whole", roomy)
    largest = 5 * len(expected["adapter"])  # a checkpoint, with two adapters and the optimizer's state
    for number in range(attack.tries(sample=1, whole=10)):
        folder = tmp_path / f"run{number}"
        arguments, more = configure(folder, roomy), []
        if attack.random.random() < 0.7:  # it has trained before
            first = fit(folder, [*arguments, "--trainer.max_steps=2"])
            assert first.end(300) == 0, first.said()
            (folder / "adapter").rename(folder / "adapter-before")
            more = ["--ckpt_path", "last"]
        before = {path: path.read_bytes() for path in (folder / "steps").glob("*.ckpt")}
        # From a few kilobytes, where logs end, to the largest file, a checkpoint.
        limit = int(attack.random.uniform(0.02, 1.0) ** 2 * largest)
        child = Child(lambda a=[*arguments, *more], n=limit: with_no_room(a, n), tmp_path / f"output{number}.log")  # type: ignore[misc]
        code = child.end(SECONDS)
        attack.tried("full disk at a random step")
        case = f"limit {limit}, status {code}\n{child.said()}"
        for path in (folder / "steps").glob("*.ckpt"):
            assert torch.load(path, weights_only=True)["state_dict"], case  # whole
        assert all(path.exists() or code == 0 or list((folder / "steps").glob("*.ckpt")) for path in before), case
        run = folder / "record" / "run.json"
        if run.exists():  # whole, and not of success where there was none
            status = json.loads(run.read_text())["status"]
            assert status != "finished" or code == 0 or (folder / "steps" / "last.ckpt").exists(), case
        again = fit(folder, [*arguments, *(["--ckpt_path", "last"] if list((folder / "steps").glob("*")) else [])])
        assert again.end(300) == 0, f"{case}\n{again.said()}"
        assert not differences(expected, left_by(folder)), case
