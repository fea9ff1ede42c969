"""The disk is full from some moment on: what was saved stays whole, and with room again the run ends as one that never stopped."""

from __future__ import annotations

import json
import resource
from pathlib import Path

import pytest
import torch

from helpers.attack import Attack
from helpers.whole_runs import configure, differences, fit, left_by, never_stopped

pytestmark = pytest.mark.integration


def test_nothing_is_lost_on_a_full_disk(attack: Attack, roomy: str, tmp_path: Path) -> None:
    """No file can grow beyond a limit any more. Below a checkpoint's size, the run ends with one message, and status 2."""
    expected, seconds = never_stopped(tmp_path / "whole", roomy) if attack.round else ({}, 0.0)
    for number in range(attack.tries(sample=1, whole=10)):
        folder = tmp_path / f"run{number}"
        arguments, last = configure(folder, roomy), folder / "steps" / "last.ckpt"
        child = fit(folder, arguments)
        if attack.round:
            child.ended(attack.random.uniform(0.0, 0.9) * seconds)
        else:
            while not last.exists():
                assert not child.ended(0.01), child.said()
        before = torch.load(last, weights_only=True)["global_step"] if last.exists() else 0
        largest = last.stat().st_size if before else 100_000
        limit = int(1000 * (largest / 1000) ** attack.random.uniform(0.0 if attack.round else 0.9, 1.0)) - 1
        if child.code is None:
            resource.prlimit(child.pid, resource.RLIMIT_FSIZE, (limit, limit))
        code = child.end(120)
        attack.tried("full disk at a random step")
        case = f"limit {limit} of {largest} after step {before}, status {code}\n{child.said()}"
        assert code in (0, 2) if attack.round else code == 2, case
        assert "Traceback" not in child.said() and child.said().count("error:") <= 1, case
        for path in (folder / "steps").glob("*.ckpt"):
            assert torch.load(path, weights_only=True)["state_dict"], case  # whole
        assert not before or torch.load(last, weights_only=True)["global_step"] >= before, case
        run = folder / "record" / "run.json"
        if run.exists():  # whole, and not of success where there was none
            assert json.loads(run.read_text())["status"] != "finished" or code == 0 or last.exists(), case
        if not attack.round:
            return
        again = fit(folder, [*arguments, *(["--ckpt_path", "last"] if last.exists() else [])])
        assert again.end(300) == 0, f"{case}\n{again.said()}"
        assert not differences(expected, left_by(folder)), case
