"""The training step against the flat reference of the first notebook, and against itself cut up differently."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.models import ARCHITECTURES, EOS, PROMPTS, SECOND_EOS, TEACHER_PROMPTS
from helpers.paths import ROOT
from helpers.steps import adapter, fit
from opsd_lightning.losses.divergences import GeneralizedJSD, ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective, Objective
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.base import seed_for
from opsd_lightning.teachers import EMATeacher
from opsd_lightning.types import Sampling

NOTEBOOK = ROOT / "notebooks" / "01_opsd_from_scratch.ipynb"


def reference() -> dict[str, Any]:
    cells = [c for c in json.loads(NOTEBOOK.read_text())["cells"] if "reference" in c["metadata"].get("tags", [])]
    source = "".join(cells[0]["source"])
    assert "opsd_lightning" not in source and source.count("\n") < 200
    names: dict[str, Any] = {}
    exec(compile(source, str(NOTEBOOK), "exec"), names)
    return names


def sgd(parameters: Any) -> torch.optim.Optimizer:
    return torch.optim.SGD(parameters, lr=0.5)


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_training_steps_equal_the_flat_reference(
    architecture: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(architecture)
    torch.manual_seed(0)
    flat = policy.build()
    start = {n: p.detach().clone() for n, p in flat.named_parameters() if p.requires_grad}
    optimizer = torch.optim.SGD([p for p in flat.parameters() if p.requires_grad], lr=0.5)
    step = reference()["opsd_step"]
    losses = [step(flat, optimizer, PROMPTS, TEACHER_PROMPTS, 15, {EOS, SECOND_EOS}, 0, 0.7)[0] for _ in range(3)]

    module = OPSDModule(
        policy, sampling=Sampling(max_new_tokens=15, temperature=0), optimizer=sgd, max_grad_norm=0.7, token_budget=30
    )
    torch.manual_seed(0)
    seen: list[float] = []
    original = module.training_step
    module.training_step = lambda *a: seen.append(float((out := original(*a))["loss"])) or out  # type: ignore[method-assign, func-returns-value]
    fit(module, 3, tmp_path)
    assert seen == pytest.approx(losses, rel=1e-5)
    for name, value in flat.named_parameters():
        if value.requires_grad:
            torch.testing.assert_close(dict(module.model.named_parameters())[name], value, atol=1e-5, rtol=1e-4)
            assert "lora_A" in name or not torch.equal(value, start[name])


@pytest.mark.parametrize(
    "objective",
    [
        DivergenceObjective(),
        DivergenceObjective(ReverseKL(), reduction="sequence_mean"),
        DivergenceObjective(GeneralizedJSD(), skip_first_tokens=2, include_truncated=False),
    ],
    ids=["token_mean", "sequence_mean", "skips"],
)
def test_gradient_is_independent_of_micro_batch_size(
    objective: Objective, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Loss and adapter gradient of one step, for every split of the same rollouts (gradient accumulation that averages
    means fails here: completions differ in length)."""

    def step(budget: int) -> tuple[float, dict[str, torch.Tensor]]:
        torch.manual_seed(0)
        module = OPSDModule(
            make_policy(lora=LoRA(r=4, alpha=8, dropout=0.0, options={"init_lora_weights": False})),
            objective=objective, sampling=Sampling(max_new_tokens=25, n=3), optimizer=sgd, token_budget=budget,
        )  # fmt: skip
        losses: list[float] = []
        gradients: dict[str, torch.Tensor] = {}

        def remember(optimizer: Any) -> None:
            gradients.update({n: p.grad.clone() for n, p in module.model.named_parameters() if p.grad is not None})

        module.on_before_optimizer_step = remember  # type: ignore[method-assign]
        original = module.training_step
        module.training_step = lambda *a: losses.append(float((out := original(*a))["loss"])) or out  # type: ignore[method-assign, func-returns-value]
        fit(module, 1, tmp_path)
        return losses[0], gradients

    whole, expected = step(10_000)
    assert expected
    for budget in (1, 60, 150):
        loss, gradients = step(budget)
        # other splits are other matrix products: float32 rounding apart, which the large weights here amplify
        assert loss == pytest.approx(whole, rel=5e-6)
        ours, theirs = (torch.cat([g.flatten() for g in part.values()]) for part in (gradients, expected))
        assert float((ours - theirs).norm() / theirs.norm()) < 5e-6


def test_bf16_mixed_trains_every_adapter_weight(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Autocast remembers casts of weights. The rollout and the teacher come first, without gradient: should their casts
    be used again, as some versions of torch did, the student would train nothing."""
    module = OPSDModule(make_policy(), teacher=EMATeacher(), sampling=Sampling(max_new_tokens=8), optimizer=sgd)
    grads: list[bool] = []
    module.on_before_optimizer_step = lambda optimizer: grads.extend(  # type: ignore[method-assign]
        p.grad is not None and (bool(p.grad.any()) or "lora_A" in n)
        for n, p in module.model.named_parameters()
        if p.requires_grad
    )
    fit(module, 1, tmp_path, precision="bf16-mixed")
    assert grads and all(grads)


def test_the_step_seeds_dropout_and_rollouts(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """The same seed gives the same run, whatever random numbers were drawn before it."""

    def run(seed: int, before: int) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = OPSDModule(
            make_policy(lora=LoRA(r=4, alpha=8, dropout=0.5)), sampling=Sampling(max_new_tokens=8), optimizer=sgd, seed=seed
        )
        module.on_train_start = lambda: torch.rand(before) and None if before == 1 else None  # type: ignore[method-assign]
        fit(module, 2, tmp_path)
        return adapter(module)

    first, again, other = run(0, 0), run(0, 1), run(1, 0)
    assert all(torch.equal(first[n], again[n]) for n in first)
    assert not all(torch.equal(first[n], other[n]) for n in first)
    assert seed_for(0, "rollout", 3, 0) != seed_for(0, "rollout", 3, 1) != seed_for(0, "rollout", 4, 1)


def test_an_empty_completion_neither_raises_nor_moves_the_adapter(
    make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    module = OPSDModule(
        make_policy(),
        objective=DivergenceObjective(skip_first_tokens=99),
        sampling=Sampling(max_new_tokens=3),
        optimizer=sgd,
    )
    module.configure_model()
    before = adapter(module)
    fit(module, 1, tmp_path)
    assert all(torch.equal(before[n], p) for n, p in adapter(module).items())
