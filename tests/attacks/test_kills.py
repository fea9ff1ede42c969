"""Runs that are killed anywhere, again and again, and resumed: they end as one that was never killed, to the last bit."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from helpers.attack import Attack
from helpers.processes import Child
from helpers.whole_runs import configure, differences, fit, left_by, never_stopped, on_two_ranks, wait_until_joined
from opsd_lightning.cli.command import main

pytestmark = pytest.mark.integration


in_rounds = pytest.mark.skipif("OPSD_ATTACK_ROUND" not in os.environ, reason="takes a minute: `make attack`")
FIT, RANKS, TEST = "kills of a fit", "kills of one of two ranks", "kills of test and predict"


@pytest.mark.parametrize("part", range(4))
def test_fits_end_as_one_that_was_never_killed(part: int, attack: Attack, roomy: str, tmp_path: Path) -> None:
    """Start-up, rollouts, backward passes, checkpoints, validations, the export and the page."""
    if part and not attack.round:
        pytest.skip("a quarter of a round's kills, of which a sample needs one")
    expected, seconds = never_stopped(tmp_path / "whole", roomy)
    left, run = attack.tries(sample=1, whole=15), 0
    while left:
        folder, times, more, killed = tmp_path / f"run{run}", [], [], True
        run += 1
        arguments = configure(folder, roomy)
        while killed:
            child = fit(folder, arguments + more)
            times.append(attack.random.uniform(0.1, 1.0) * seconds if left else 300.0)
            killed = not child.ended(times[-1])
            assert killed or child.code == 0, f"{times}\n{child.said()}"
            child.kill()
            left -= killed
            attack.tried(FIT, killed)
            more = ["--ckpt_path", "last"]
        assert not differences(expected, left_by(folder)), times


@in_rounds
@pytest.mark.parametrize("command", ["test", "predict"])
def test_evaluations_end_as_one_that_was_never_killed(command: str, attack: Attack, roomy: str, tmp_path: Path) -> None:
    def start(folder: Path, arguments: list[str]) -> Child:
        return Child(lambda: main([command, *arguments]), folder / "output.log")

    def completions(folder: Path) -> dict[str, bytes]:
        return {str(path.relative_to(folder)): path.read_bytes() for path in folder.rglob("completions.jsonl")}

    changes: dict[str, Any] = {"logger": False, "callbacks": []}
    whole = tmp_path / "whole"
    child = start(whole, configure(whole, roomy, **changes))
    assert child.end(300) == 0, child.said()
    seconds, expected = child.seconds, completions(whole)
    assert list(expected) and (whole / f"{command}.jsonl").exists()
    left, run = attack.tries(sample=0, whole=6), 0
    while left:
        folder, times, killed = tmp_path / f"run{run}", [], True
        run += 1
        arguments = configure(folder, roomy, **changes)
        while killed:
            child = start(folder, arguments)
            times.append(attack.random.uniform(0.3, 1.0) * seconds if left else 300.0)
            killed = not child.ended(times[-1])
            assert killed or child.code == 0, f"{times}\n{child.said()}"
            child.kill()
            left -= killed
            attack.tried(TEST, killed)
        assert completions(folder) == expected, times
        assert (folder / f"{command}.jsonl").read_bytes() == (whole / f"{command}.jsonl").read_bytes(), times


@in_rounds
def test_ranks_end_as_ranks_that_were_never_killed(attack: Attack, roomy: str, tmp_path: Path) -> None:
    """If one of two ranks is killed, the other ends by itself, and both are resumed."""
    expected, seconds = never_stopped(tmp_path / "whole", roomy, "ddp")
    left, run = attack.tries(sample=0, whole=6), 0
    while left:
        folder, times, more, killed = tmp_path / f"run{run}", [], [], True
        run += 1
        arguments = configure(folder, roomy)
        while killed:
            ranks = on_two_ranks(folder, arguments + more, "ddp")
            target = attack.random.choice(ranks)
            times.append(attack.random.uniform(0.3, 1.0) * seconds if left else 300.0)
            killed = not target.ended(times[-1])
            wait_until_joined(ranks)
            target.kill()
            codes = [rank.end(60) for rank in ranks]
            assert killed or codes == [0, 0], f"{times} {codes}\n{ranks[0].said()}"
            left -= killed
            attack.tried(RANKS, killed)
            more = ["--ckpt_path", "last"]
        assert not differences(expected, left_by(folder)), times
