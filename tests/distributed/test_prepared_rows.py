"""Tests that rank zero verifies and tokenizes the rows of all ranks."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Callable, Sequence
from datetime import timedelta
from pathlib import Path
from typing import Any

import numpy
import pytest
import torch.distributed as dist
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.strategies import DDPStrategy

from helpers.distributed import parts, trainer
from helpers.processes import on_ranks, two_ranks
from opsd_lightning.data import preparation
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.preparation import Preparation
from opsd_lightning.data.sources import ExampleSource
from opsd_lightning.distributed.collectives import get_rank, run_on_rank_zero
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.types import ConfigError, DataRequirements, Example

pytestmark = pytest.mark.integration

ROWS = [Example(f"{n}+1?", f"The answer is {n + 1}.", "" if n % 5 == 0 else str(n + (n % 7 > 0))) for n in range(30)]
TIMEOUT = timedelta(seconds=5)


class Listed(ExampleSource):
    def __init__(self, rows: Sequence[Example], seconds: float = 0.0) -> None:
        self.rows, self.seconds = list(rows), seconds

    def examples(self) -> list[Example]:
        return self.rows


class SlowGrader(MathGrader):
    """A user's grader, whose rows are not cached. One that is slow on rank zero and must not be asked elsewhere."""

    def find_answer(self, text: str) -> str | None:
        assert get_rank() == 0
        time.sleep(TIMEOUT.total_seconds() * 1.5 / len(ROWS))
        return super().find_answer(text)


class Method(LightningModule):
    data_requirements = DataRequirements()


def set_up(policy: Policy, strategy: DDPStrategy | None = None, **settings: Any) -> OPSDDataModule:
    settings = {"train": Listed(ROWS), "batch_size": 1, "max_new_tokens": 8, "cache_dir": None} | settings
    data = OPSDDataModule(policy, prompts=Prompts("{question}", "{question} {context}"), **settings)
    chosen: dict[str, Any] = {"devices": 2, "strategy": strategy} if strategy else {"devices": 1}
    data.trainer = Trainer(accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False, **chosen)
    data.trainer.strategy.connect(Method())
    data.trainer.strategy.setup_environment()
    data.setup("fit")
    return data


def ddp() -> DDPStrategy:
    return DDPStrategy(process_group_backend="gloo", timeout=TIMEOUT)


def contents(data: OPSDDataModule) -> list[Any]:
    return [*data.rows["train"][:4], data.rows["train"].traces, data.dropped, data.lengths, data.traces_cut]


@pytest.mark.parametrize("cache", ["without a cache", "cold", "warm"])
def test_two_ranks_have_the_rows_of_one(
    cache: str, make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(preparation, "LARGE", 0)
    policy = make_policy()
    settings: dict[str, Any] = {} if cache == "without a cache" else {"cache_dir": str(tmp_path / "cache")}
    one = contents(set_up(policy, **(settings if cache == "warm" else {})))
    assert one[5]["train"].total() > 0 and len(one[2]) > 10

    def work(rank: int) -> tuple[list[Any], list[int]]:
        made: list[int] = []
        real = Preparation.prepare
        Preparation.prepare = lambda *args, **kwargs: (made.append(rank), real(*args, **kwargs))[1]  # type: ignore[assignment]
        return contents(set_up(policy, ddp(), **settings)), made

    ranks = on_ranks(work, tmp_path)
    assert [found for found, _ in ranks] == [one, one]
    assert [made for _, made in ranks] == [[0] if cache != "warm" else [], []]


def test_ranks_wait_for_rank_zero_longer_than_for_a_collective(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """The grader and the type of a text are a user's: these rows are shared, though they have no fingerprint."""
    policy, train = make_policy(), Listed([*ROWS, Example(numpy.str_("99+1?"), "The answer is 100.", "100")])
    one = contents(set_up(policy, train=train))
    assert on_ranks(lambda rank: contents(set_up(policy, ddp(), train=train, grader=SlowGrader())), tmp_path) == [one, one]


def refusal(work: Callable[[], object]) -> str:
    try:
        work()
    except ConfigError as error:
        return error.setting
    return ""


def test_a_refusal_of_rank_zero_is_one_of_every_rank(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()
    settings = {"train": Listed([Example("a", "", "2")])}
    assert on_ranks(lambda rank: refusal(lambda: set_up(policy, ddp(), **settings)), tmp_path) == ["data.train"] * 2


def test_ranks_that_read_other_rows_are_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()

    def work(rank: int) -> str:
        return refusal(lambda: set_up(policy, ddp(), train=Listed(ROWS if rank == 0 else ROWS[::-1])))

    assert on_ranks(work, tmp_path) == ["data.train"] * 2


class KillsRankZero(ExampleSource):
    def examples(self) -> list[Example]:
        if get_rank() == 0:
            os.kill(os.getpid(), signal.SIGKILL)
        return ROWS


def test_a_rank_that_waits_for_a_killed_one_ends(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()

    def work() -> None:
        module, data = parts(policy, 1)
        data.sources["train"] = KillsRankZero()
        trainer(tmp_path, devices=2, strategy=ddp(), enable_checkpointing=False).fit(module, data)

    first, second = two_ranks(tmp_path, work)
    try:
        assert first.end(120) == -signal.SIGKILL
        assert second.end(60) != 0  # by gloo, or by the connection between the ranks
    finally:
        first.kill()
        second.kill()


def test_large_results_of_rank_zero_arrive_every_time(tmp_path: Path) -> None:
    def work(rank: int) -> list[int]:
        dist.init_process_group("gloo", timeout=timedelta(seconds=60))
        sizes = [10**7 if n == 0 else 1000 * n for n in range(20)]
        return [len(run_on_rank_zero(lambda size=size: b"x" * size, timedelta(minutes=1))) for size in sizes]  # type: ignore[misc]

    assert on_ranks(work, tmp_path) == [[10**7, *(1000 * n for n in range(1, 20))]] * 2
