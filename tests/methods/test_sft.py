"""Tests of SFT on fixed completions, against transformers' and TRL's losses."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.fixed_completions import BATCH, COMPLETIONS, losses, same_weights, sgd
from helpers.models import PROMPTS
from helpers.steps import fit
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import Policy, base_of


@pytest.mark.parametrize("budget", [30, 10_000])
def test_sft_equals_transformers_own_loss(budget: int, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()
    torch.manual_seed(0)
    flat = policy.build()
    optimizer = sgd([p for p in flat.parameters() if p.requires_grad])
    expected = []
    tokens = sum(map(len, COMPLETIONS))
    for _ in range(3):
        loss: Any = 0.0
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True):
            ids = torch.tensor([[*prompt, *completion]])
            labels = torch.tensor([[-100] * len(prompt) + list(completion)])
            loss = loss + base_of(flat)(input_ids=ids, labels=labels).loss * len(completion) / tokens
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        expected.append(float(loss.detach()))
    torch.manual_seed(0)
    module = SFTModule(policy, optimizer=sgd, token_budget=budget)
    assert losses(module, 3, tmp_path) == pytest.approx(expected, rel=1e-5)
    same_weights(module, flat)
    assert module.tokens_generated == 0


def test_sft_equals_trls(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Two updates by TRL's trainer: its collator, its loss on the completion alone."""
    from datasets import Dataset
    from trl import SFTConfig, SFTTrainer

    policy = make_policy()
    torch.manual_seed(0)
    flat = policy.build()
    rows = [
        {"input_ids": [*prompt, *completion], "completion_mask": [0] * len(prompt) + [1] * len(completion)}
        for prompt, completion in zip(PROMPTS, COMPLETIONS, strict=True)
    ]
    arguments = SFTConfig(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, report_to=[], completion_only_loss=True,
    )  # fmt: skip
    trainer: Any = SFTTrainer(
        model=flat, args=arguments, train_dataset=Dataset.from_list(rows), processing_class=policy.load_tokenizer()
    )
    model = trainer.model.train()
    optimizer = sgd([p for p in model.parameters() if p.requires_grad])
    for _ in range(2):
        optimizer.zero_grad()
        trainer.compute_loss(model, dict(trainer.data_collator(list(trainer.train_dataset)))).backward()
        optimizer.step()
    torch.manual_seed(0)
    module = SFTModule(policy, optimizer=sgd)
    fit(module, 2, tmp_path, BATCH)  # type: ignore[arg-type]
    same_weights(module, model)
