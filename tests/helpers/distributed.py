"""Training runs on two gloo processes, and their comparison with a run on one process."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import DDPStrategy, Strategy

from helpers.models import EOS
from helpers.processes import on_ranks
from opsd_lightning.checkpoints.io import read_adapters
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.losses.divergences import ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.models.sharding import full_tensor
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.types import Rollouts, Sampling

TIMEOUT_SECONDS = 60  # of a collective


def ddp(**settings: Any) -> Strategy:
    return DDPStrategy(process_group_backend="gloo", timeout=timedelta(seconds=TIMEOUT_SECONDS), **settings)


def fsdp2(**settings: Any) -> Strategy:
    return FSDP2Strategy(process_group_backend="gloo", timeout_seconds=TIMEOUT_SECONDS, **settings)


STRATEGIES = {"ddp": ddp, "fsdp2": fsdp2}
both = pytest.mark.parametrize("strategy", STRATEGIES)


class Scripted(RolloutEngine):
    """Gives every prompt the completions that were written down for it: the same on one process and on two."""

    def __init__(self, lengths: Sequence[int]) -> None:
        self.lengths = lengths
        self.order: list[tuple[int, ...]] = []

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        completions, terminated = [], []
        for prompt in prompts:
            for copy in range(sampling.n):
                length = self.lengths[(sum(prompt) + copy) % len(self.lengths)]
                completions.append(
                    [20 + (sum(prompt) + 3 * i + copy) % 60 for i in range(max(length - 1, 0))] + [EOS] * (length > 0)
                )
                terminated.append(True)
        return Rollouts(completions, terminated, sampling.n)


def parts(policy: Policy, batch_size: int, **settings: Any) -> tuple[OPSDModule, OPSDDataModule]:
    torch.manual_seed(0)
    settings = {
        "sampling": Sampling(max_new_tokens=8, n=2),
        "objective": DivergenceObjective(ReverseKL()),
        "optimizer": lambda p: torch.optim.AdamW(p, lr=0.01),
        "lr_scheduler": lambda o: torch.optim.lr_scheduler.LinearLR(o, 1.0, 0.1, 6),
        "max_grad_norm": 0.5,
        "token_budget": 150,
    } | settings
    method = settings.pop("method", OPSDModule)
    data = OPSDDataModule(
        policy,
        train=WordProblems(size=24, seed=1),
        val=WordProblems(size=5, seed=2),
        test=WordProblems(size=5, seed=3),
        prompts=Prompts("{question}", "{question} {context}"),
        batch_size=batch_size,
        eval_batch_size=2,
        max_new_tokens=8,
    )
    if settings["objective"] is None or method is GRPOModule:
        del settings["objective"]
    return method(policy, **settings), data


@dataclass
class Seen:
    """Of every step of a run: loss, metrics, this rank's completions, gradient and weights, whole."""

    losses: list[float] = field(default_factory=list)
    logged: list[dict[str, float]] = field(default_factory=list)
    completions: list[list[list[int]]] = field(default_factory=list)
    gradients: list[dict[str, torch.Tensor]] = field(default_factory=list)
    weights: list[dict[str, torch.Tensor]] = field(default_factory=list)


class Recorder(Callback):
    def __init__(self) -> None:
        self.seen = Seen()

    def on_before_optimizer_step(self, trainer: Trainer, module: Any, optimizer: Any) -> None:
        self.seen.gradients.append({n: full_tensor(p.grad).clone() for n, p in module.named_parameters() if p.requires_grad})

    def on_train_batch_end(self, trainer: Trainer, module: Any, outputs: Any, *args: Any) -> None:
        self.seen.losses.append(float(outputs["loss"]))
        self.seen.completions.append(outputs["rollouts"].completions)
        self.seen.weights.append({name: full_tensor(value).clone() for name, value in module.state_dict().items()})
        self.seen.logged.append({k: float(v) for k, v in trainer.callback_metrics.items() if not k.startswith("time/")})


def trainer(folder: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    settings = {"max_steps": 3, "logger": False, "num_sanity_val_steps": 0, "limit_val_batches": 0} | settings
    return Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=folder, enable_progress_bar=False,
        enable_model_summary=False, log_every_n_steps=1, **settings,
    )  # fmt: skip


def run(policy: Policy, folder: Path, world: int, strategy: Callable[..., Strategy] | None, steps: int = 3, checkpoint: Any = None,
        callbacks: Sequence[Callback] = (), **settings: Any) -> Seen:  # fmt: skip
    """A fit of eight questions a step, whatever the number of ranks."""
    recorder = Recorder()
    chosen = {"strategy": strategy()} if strategy is not None else {}
    questions = 8 // world
    fit = trainer(
        folder, recorder, *callbacks, devices=world, max_steps=steps, enable_checkpointing=bool(callbacks), **chosen
    )
    fit.fit(*parts(policy, questions, **settings), ckpt_path=checkpoint, weights_only=True)
    return recorder.seen


def assert_same(ours: Seen, theirs: Seen, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(ours.losses, theirs.losses, rtol=tolerance, atol=1e-6)
    for mine, other in zip(ours.gradients, theirs.gradients, strict=True):
        assert mine.keys() == other.keys() and mine
        for name, gradient in mine.items():
            torch.testing.assert_close(gradient, other[name], rtol=1e-3, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")
    for mine, other in zip(ours.weights, theirs.weights, strict=True):
        assert mine.keys() == other.keys() and mine
        for name, weight in mine.items():
            # A hundredth of a step of 0.01: Adam divides rounding by a gradient that is next to nothing.
            torch.testing.assert_close(weight, other[name], rtol=1e-3, atol=1e-4, msg=lambda m, n=name: f"{n}: {m}")


def joined(policy: Policy, folder: Path, **settings: Any) -> Seen:
    return run(policy, folder, 1, None, **settings)


class FirstHalfSilent(Scripted):
    """Every other question of a step gets empty completions: on two ranks, all of the first rank's."""

    def __init__(self, rank: int | None) -> None:
        super().__init__([3, 8, 1, 5])
        self.rank = rank

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        found = super().generate(model, prompts, sampling, seed)
        silent = [(i // sampling.n) % 2 == 0 if self.rank is None else self.rank == 0 for i in range(len(found.completions))]
        return found._replace(completions=[[] if s else row for s, row in zip(silent, found.completions, strict=True)])


class EndsOften(Callback):
    """Every ninth token of the vocabulary ends a completion."""

    def on_train_start(self, trainer: Trainer, module: Any) -> None:
        module.model.get_base_model().generation_config.eos_token_id = list(range(0, 90, 9))


def fsdp2_sharded(**settings: Any) -> Strategy:
    return fsdp2(save_distributed_checkpoint=True, **settings)


def check_resumption(
    policy: Policy,
    tmp_path: Path,
    saved: tuple[int, Callable[..., Strategy]],
    sharded: bool,
    resumed: Sequence[tuple[int, Callable[..., Strategy] | None]],
    **settings: Any,
) -> None:
    """Two steps are saved under a strategy on some processes, hold what one process has then, and go on as it does."""
    world, strategy = saved
    whole_run = joined(policy, tmp_path, steps=4, **settings)

    def save(rank: int) -> Seen:
        keep = ModelCheckpoint(tmp_path / "saved", filename="run", every_n_train_steps=2)
        return run(policy, tmp_path, world, strategy, steps=2, callbacks=[keep], **settings)

    assert_same(on_ranks(save, tmp_path, world)[0], Seen(*(list(v)[:2] for v in vars(whole_run).values())))
    path = tmp_path / "saved" / "run.ckpt"
    assert path.is_dir() == sharded
    assert [p.name for p in path.parent.iterdir()] == ["run.ckpt"]
    held = read_adapters(path)
    assert held.keys() == whole_run.weights[1].keys()
    for name, weight in held.items():
        torch.testing.assert_close(weight, whole_run.weights[1][name], rtol=1e-3, atol=1e-5)
    rest = Seen(*(list(v)[2:] for v in vars(whole_run).values()))
    for world, chosen in resumed:
        again = on_ranks(
            lambda rank, w=world, s=chosen: run(policy, tmp_path, w, s, steps=4, checkpoint=str(path), **settings),
            tmp_path,
            world,
        )
        assert_same(again[0], rest)


class ByReference(MathGrader):
    """Right are the completions of questions whose answer has two digits."""

    def equal(self, answer: Any, reference: str) -> bool:
        return len(reference) == 2


NF4 = {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_use_double_quant": True}
