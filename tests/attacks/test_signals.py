"""Signals to one of two ranks, and ranks that are gone: every rank ends within seconds, and the run can be resumed."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer

from helpers.attack import Attack
from helpers.distributed import STRATEGIES, parts, trainer
from helpers.processes import two_ranks
from helpers.whole_runs import STEPS, configure, differences, fit, left_by, never_stopped, on_two_ranks, wait_until_joined
from opsd_lightning.models.policy import Policy
from opsd_lightning.runs.signals import SECOND_SIGNAL_SECONDS

pytestmark = pytest.mark.integration


SECONDS = 20  # within which every rank ends, on a machine with other work
GENTLE = [signal.SIGTERM, signal.SIGINT, signal.SIGHUP]


def last_step(folder: Path) -> int:
    """The last step of the record; 0 before it is begun."""
    path = folder / "record" / "metrics.jsonl"
    lines = path.read_text().splitlines() if path.exists() else []
    return max((json.loads(line)["step"] for line in lines if line.endswith("}")), default=0)


@pytest.mark.parametrize("number", GENTLE, ids=lambda number: number.name)
def test_one_process_saves_and_says_how_to_go_on(number: signal.Signals, attack: Attack, roomy: str, tmp_path: Path) -> None:
    """It ends with 128 plus the signal's number, and what it saved is what a run that never stopped had there."""
    if not attack.round and number != signal.SIGTERM:
        pytest.skip("one signal is enough for a sample")
    folder = tmp_path / "run"
    # It has no checkpoint of the step where it is stopped, and saves one.
    arguments = configure(folder, roomy, every=STEPS)
    child = fit(folder, arguments)
    while last_step(folder) < 3:
        assert not child.ended(0.02), child.said()
    child.send(number)
    assert child.end(SECONDS) == 128 + number, child.said()
    attack.tried("signals to one process")
    record = json.loads((folder / "record" / "run.json").read_text())
    assert (record["status"], record["reason"]) == ("interrupted", number.name)
    assert "--ckpt_path" in child.said()
    saved = [path.name for path in (folder / "steps").iterdir() if path.name.startswith("last")]
    assert saved == ["last.ckpt"]
    if attack.round:
        again = fit(folder, [*arguments, "--ckpt_path", "last"])
        assert again.end(300) == 0, again.said()
        assert not differences(never_stopped(tmp_path / "whole", roomy)[0], left_by(folder))


class Stuck(Callback):
    """Makes rank 0 wait in its second step, not for another rank."""

    def __init__(self, sign: Path) -> None:
        self.sign = sign

    def on_train_batch_start(self, trainer: Trainer, pl_module: LightningModule, batch: Any, batch_idx: int) -> None:
        if trainer.global_rank == 0 and batch_idx == 1:
            self.sign.touch()
            time.sleep(300)


@pytest.mark.parametrize("how", ["killed", "two signals to it", "two signals to the other"])
@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_a_rank_that_waits_for_nobody_ends_too(
    strategy: str, how: str, attack: Attack, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    if not attack.round and (strategy, how) != ("ddp", "killed"):
        pytest.skip("one is enough for a sample")
    policy, sign = make_policy(), tmp_path / "sign"

    def work() -> None:
        run = trainer(tmp_path, Stuck(sign), devices=2, strategy=STRATEGIES[strategy](), enable_checkpointing=False)
        run.fit(*parts(policy, 2))

    ranks = two_ranks(tmp_path, work)
    while not sign.exists():
        assert not ranks[0].ended(0.02), ranks[0].said()
    target = ranks[how == "two signals to the other" or how == "killed"]
    start = time.monotonic()
    if how == "killed":
        target.kill()
    else:
        target.send(signal.SIGTERM)
        time.sleep(SECOND_SIGNAL_SECONDS + 0.5)
        target.send(signal.SIGTERM)
    codes = [rank.end(SECONDS) for rank in ranks]
    attack.tried("signals to one of two ranks")
    assert 0 not in codes and time.monotonic() - start < SECONDS, codes


@pytest.mark.parametrize("strategy", ["ddp", "fsdp2"])
def test_ranks_end_together(strategy: str, attack: Attack, roomy: str, tmp_path: Path) -> None:
    """One of two gets a signal at any time, is killed, or raises; both are resumed, and end as ranks that never stopped."""
    if not attack.round and strategy == "fsdp2":
        pytest.skip("one strategy is enough for a sample")
    expected, seconds = never_stopped(tmp_path / "whole", roomy, strategy) if attack.round else ({}, 0.0)
    kinds = [signal.SIGTERM, signal.SIGINT, signal.SIGKILL, signal.SIGUSR1]
    for number in range(attack.tries(sample=1, whole=8)):
        folder, kind = tmp_path / f"run{number}", kinds[number % len(kinds)]
        arguments = configure(folder, roomy)
        ranks = on_two_ranks(folder, arguments, strategy)
        target, at = attack.random.choice(ranks), attack.random.uniform(0.05, 0.9) * seconds
        if not attack.round:
            while not last_step(folder):
                assert not target.ended(0.02), target.said()
        else:
            target.ended(at)
            if kind not in GENTLE:
                wait_until_joined(ranks)
        trains = last_step(folder) > 0
        target.send(kind)
        start = time.monotonic()
        codes = [rank.end(SECONDS) for rank in ranks]
        case = f"{strategy} {kind.name} to rank {ranks.index(target)} at {at:.1f} s: {codes}"
        attack.tried("signals to one of two ranks")
        assert time.monotonic() - start < SECONDS, case
        if kind in GENTLE and trains and codes != [0, 0]:
            assert codes == [128 + kind] * 2, f"{case}\n{ranks[0].said()}{ranks[1].said()}"
            assert json.loads((folder / "record" / "run.json").read_text())["status"] == "interrupted", case
            assert torch.load(folder / "steps" / "last.ckpt", weights_only=True)["global_step"] >= last_step(folder), case
        if not attack.round:
            return
        more = ["--ckpt_path", "last"] if (folder / "steps" / "last.ckpt").exists() else []
        ranks = on_two_ranks(folder, arguments + more, strategy)
        assert [rank.end(300) for rank in ranks] == [0, 0], f"{case}\n{ranks[0].said()}{ranks[1].said()}"
        assert not differences(expected, left_by(folder)), case
