"""Tests of GRPO on fixed completions, against formulas computed row by row and TRL."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fixed_completions import BATCH, REWARDS, Fixed, Fixing, logprobs, same_weights, sgd
from helpers.messages import mentions
from helpers.models import PROMPTS
from helpers.steps import adapter, fit
from opsd_lightning.grading.base import Grade
from opsd_lightning.losses.objectives import NegativeLogLikelihood, SampledKLObjective
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.grpo import AnswerReward, GRPOModule, Reward
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.online_contexts import Attempts
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.types import Example, Rollouts, Sampling, UserError


@pytest.mark.parametrize("reduction", ["token_mean", "sequence_mean"])
@pytest.mark.parametrize("anchored", [False, True], ids=["", "anchor"])
def test_grpo_equals_the_clipped_surrogate(
    reduction: Any, anchored: bool, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Three updates on one batch by autograd through min(rho A, clip(rho) A) and the k3 term; rho moves far enough to clip."""
    policy = make_policy()
    torch.manual_seed(0)
    flat = policy.build()
    rollouts = Fixed().generate(None, PROMPTS, Sampling(n=2), 0)
    rows = [(PROMPTS[i // 2], completion) for i, completion in enumerate(rollouts.completions)]
    rewards = torch.tensor(REWARDS).view(-1, 2)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    optimizer = sgd([p for p in flat.parameters() if p.requires_grad])
    with torch.no_grad():
        old = logprobs(flat, rows, 0.7)
        with flat.disable_adapter():
            reference = logprobs(flat, rows)
    clipped = 0

    def reduced(values: list[torch.Tensor]) -> torch.Tensor:
        return torch.cat(values).mean() if reduction == "token_mean" else torch.stack([v.mean() for v in values]).mean()

    for _ in range(3):
        surrogate = []
        for now, before, advantage in zip(logprobs(flat, rows, 0.7), old, advantages, strict=True):
            ratio = (now - before).exp()
            surrogate.append(-torch.minimum(ratio * advantage, ratio.clamp(0.9, 1.1) * advantage))
            clipped += int((((ratio > 1.1) & (advantage > 0)) | ((ratio < 0.9) & (advantage < 0))).sum())
        loss = reduced(surrogate)
        if anchored:
            differences = [r - now for r, now in zip(reference, logprobs(flat, rows), strict=True)]
            loss = loss + 0.3 * reduced([d.exp() - d - 1 for d in differences])
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert clipped > 0
    torch.manual_seed(0)
    module = GRPOModule(
        policy,
        reward=Fixing(),
        likelihood=NegativeLogLikelihood(temperature=0.7, reduction=reduction),
        clip_ratio=0.1,
        anchor=Anchor(0.3, SampledKLObjective(reduction=reduction)) if anchored else None,
        sampling=Sampling(n=2, temperature=0.7),
        rollouts=Fixed(),
        optimizer=sgd,
        updates_per_batch=3,
        token_budget=40,
    )
    fit(module, 3, tmp_path, BATCH)  # type: ignore[arg-type]
    same_weights(module, flat)


def test_grpo_trains_at_the_temperature_that_it_samples_at(make_policy: Callable[..., Policy]) -> None:
    with pytest.raises(UserError, match=mentions("model.likelihood.temperature", "model.sampling.temperature", "0.7")):
        GRPOModule(make_policy(), likelihood=NegativeLogLikelihood(), sampling=Sampling(n=2, temperature=0.7))
    assert GRPOModule(make_policy(), sampling=Sampling(n=2, temperature=0.7)).objective.temperature == 0.7


class Reporting(Fixed):
    """Says log-probabilities at temperature 1 that are off by a known amount, as another sampler's are."""

    def __init__(self, policy: Policy, off: float, limit: float | None = None) -> None:
        self.policy, self.off, self.max_importance_ratio = policy, off, limit

    def generate(self, model: Any, prompts: Any, sampling: Sampling, seed: int) -> Rollouts:
        found = super().generate(model, prompts, sampling, seed)
        rows = [(prompts[i // found.n], completion) for i, completion in enumerate(found.completions)]
        with torch.no_grad():
            ours = logprobs(model, rows)
        return found._replace(logprobs=[(row - self.off).tolist() for row in ours])


def test_sampler_logprobs_do_not_change_update_ratios(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Updates are weighted by the student's own probabilities at the loss's temperature; the sampler's ratio, cut off, is a
    factor of its own, and of a loss of the whole step a constant one here."""

    def weights(engine: RolloutEngine, rate: float) -> dict[str, torch.Tensor]:
        torch.manual_seed(0)
        module = GRPOModule(
            make_policy(), reward=Fixing(), clip_ratio=0.1, sampling=Sampling(n=2, temperature=0.7), rollouts=engine,
            optimizer=lambda p: torch.optim.SGD(p, lr=rate), updates_per_batch=3,
        )  # fmt: skip
        fit(module, 3, tmp_path, BATCH)  # type: ignore[arg-type]
        return adapter(module)

    policy = make_policy()
    plain = weights(Fixed(), 0.2)
    for engine, rate in ((Reporting(policy, 0.9), 0.2), (Reporting(policy, 0.9, limit=2.0), 0.1)):
        for name, value in weights(engine, rate).items():
            torch.testing.assert_close(value, plain[name], rtol=1e-3, atol=1e-6)


def test_right_answers_get_a_higher_reward() -> None:
    grades = [Grade(1.0, "4"), Grade(0.0, "5"), Grade(0.0), Grade(0.25, "4")]
    attempts = Attempts([Example("q", "", "4")] * 2, ["4", "5", "", "4"], grades, [True] * 4, 2)
    assert AnswerReward()(attempts) == [1.0, 0.0, 0.0, 0.25]


@pytest.mark.parametrize("score", [0.43, 0.86])
def test_equal_partial_scores_change_nothing(score: float, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Their mean and standard deviation have rounding errors, which Adam would follow at its full rate."""

    class Equal(Reward):
        def __call__(self, attempts: Attempts) -> Sequence[float]:
            return [score] * len(attempts.texts)

    module = GRPOModule(make_policy(), Equal(), rollouts=Fixed(), sampling=Sampling(n=3), optimizer=torch.optim.Adam)
    module.configure_model()
    start = adapter(module)
    run = fit(module, 1, tmp_path, BATCH)
    assert run.callback_metrics["train/groups_without_signal"] == 1 and run.callback_metrics["train/grad_norm"] == 0
    assert all(value.equal(start[name]) for name, value in adapter(module).items())


def test_single_completions_are_refused(make_policy: Callable[..., Policy]) -> None:
    with pytest.raises(UserError, match=mentions("model.sampling.n")):
        GRPOModule(make_policy(), sampling=Sampling(n=1))


def padded(rows: Sequence[Sequence[int]], left: bool) -> tuple[torch.Tensor, torch.Tensor]:
    """Token ids and mask of rows padded to one length."""
    width = max(map(len, rows))
    ids = [[0] * (width - len(row)) * left + list(row) + [0] * (width - len(row)) * (not left) for row in rows]
    mask = [[0] * (width - len(row)) * left + [1] * len(row) + [0] * (width - len(row)) * (not left) for row in rows]
    return torch.tensor(ids), torch.tensor(mask)


@pytest.mark.parametrize(("reduction", "loss_type"), [("token_mean", "bnpo"), ("sequence_mean", "grpo")])
def test_grpo_equals_trls(reduction: Any, loss_type: Any, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Two updates on the same completions by TRL's own loss, its k3 term included; the advantages are checked above."""
    from datasets import Dataset
    from trl import GRPOConfig, GRPOTrainer

    policy = make_policy()
    torch.manual_seed(0)
    flat = policy.build()
    trainer: Any = GRPOTrainer(
        model=flat,
        reward_funcs=lambda **_: [0.0],
        args=GRPOConfig(
            output_dir=str(tmp_path), use_cpu=True, bf16=False, loss_type=loss_type, beta=0.3, epsilon=0.1, num_generations=2,
            per_device_train_batch_size=2, temperature=1.0, report_to=[], use_bias_correction_kl=False,
        ),
        train_dataset=Dataset.from_list([{"prompt": "q"}]),
        processing_class=policy.load_tokenizer(),
    )  # fmt: skip
    trainer.current_gradient_accumulation_steps = 1
    model = trainer.model.train()
    rollouts = Fixed().generate(None, PROMPTS, Sampling(n=2), 0)
    prompts = [PROMPTS[i // 2] for i in range(6)]
    rewards = torch.tensor(REWARDS).view(-1, 2)
    advantages = ((rewards - rewards.mean(1, keepdim=True)) / (rewards.std(1, keepdim=True) + 1e-4)).flatten()
    (prompt_ids, prompt_mask), (ids, mask) = padded(prompts, True), padded(rollouts.completions, False)
    inputs = {
        "prompt_ids": prompt_ids, "prompt_mask": prompt_mask, "completion_ids": ids, "completion_mask": mask,
        "advantages": advantages, "num_items_in_batch": mask.sum(),
    }  # fmt: skip

    def aligned(rows: Sequence[torch.Tensor]) -> torch.Tensor:
        return torch.nn.utils.rnn.pad_sequence(list(rows), batch_first=True)

    rows = list(zip(prompts, rollouts.completions, strict=True))
    with torch.no_grad():
        inputs["old_per_token_logps"] = aligned(logprobs(model, rows))
        with model.disable_adapter():
            inputs["ref_per_token_logps"] = aligned(logprobs(model, rows))
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        optimizer.zero_grad()
        trainer._compute_loss(model, inputs).backward()
        optimizer.step()
    torch.manual_seed(0)
    module = GRPOModule(
        policy,
        reward=Fixing(),
        likelihood=NegativeLogLikelihood(reduction=reduction),
        clip_ratio=0.1,
        anchor=Anchor(0.3, SampledKLObjective(reduction=reduction)),
        sampling=Sampling(n=2),
        rollouts=Fixed(),
        optimizer=sgd,
        updates_per_batch=2,
    )
    fit(module, 2, tmp_path, BATCH)  # type: ignore[arg-type]
    same_weights(module, model)
