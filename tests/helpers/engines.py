"""A check that every rollout engine passes."""

from __future__ import annotations

import torch
from peft import PeftModel

from helpers.models import EOS, SECOND_EOS
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.types import Sampling


def check_greedy_rollouts(engine: RolloutEngine, model: PeftModel) -> None:
    """Compare an engine's greedy rollouts with an argmax loop, for rows of very different lengths and repeated prompts."""
    stop = {EOS, SECOND_EOS, *range(60, 68)}
    model.get_base_model().generation_config.eos_token_id = sorted(stop)
    prompts = [[10 + i, *range(20, 21 + (7 * i) % 13)] for i in range(9)]
    prompts += prompts[:2]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rollouts = engine.generate(model, prompts, Sampling(max_new_tokens=60, temperature=0, n=2), seed=0)
    expected = []
    model.eval()
    for prompt in prompts:
        ids = list(prompt)
        with torch.no_grad():
            while len(ids) < len(prompt) + 60 and (len(ids) == len(prompt) or ids[-1] not in stop):
                ids.append(int(model(input_ids=torch.tensor([ids])).logits[0, -1].argmax()))
        expected += [ids[len(prompt) :]] * 2
    assert rollouts.completions == expected
    assert rollouts.terminated == [row[-1] in stop for row in expected]
    assert len({len(row) for row in expected}) > 3, "the rows must be ragged for this test to mean anything"
    for name, value in model.state_dict().items():
        assert torch.equal(value, before[name]), name
