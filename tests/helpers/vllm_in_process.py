"""Runs `VLLMEngine` with vLLM itself, in vLLM's environment: python vllm_in_process.py SCENARIO MODEL FOLDER.

Prints one line that starts with FOUND and holds JSON.
"""

from __future__ import annotations

import json
import os
import sys
import warnings
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import Callback
from transformers import BitsAndBytesConfig

from helpers.models import PROMPTS
from helpers.training import parts, trainer
from opsd_lightning.losses.objectives import token_logprobs
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import score
from opsd_lightning.rollouts.base import Demand
from opsd_lightning.rollouts.vllm import process
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine
from opsd_lightning.types import Sampling, UserError

OPTIONS = {"dtype": "float32", "enforce_eager": True}
ADAPTER = LoRA(r=4, alpha=8, dropout=0.0)
FOUR_BITS = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)


def sample(folder: str, adapters: str) -> Any:
    """Rollouts of the base model and of two versions of the adapter, and their differences to the trainer."""
    torch.manual_seed(0)
    policy = Policy(folder, dtype="float32", lora=ADAPTER)
    model = policy.build()
    engine = VLLMEngine(sleep=False, options=OPTIONS, adapter_folder=adapters)
    engine.prepare(policy, Demand(256, len(PROMPTS) * 3))
    found = []

    def generate(**settings: Any) -> None:
        rollouts = engine.generate(model, PROMPTS, Sampling(**settings), seed=3)
        rows = [prompt for prompt in PROMPTS for _ in range(rollouts.n)]
        states, targets = score(model, rows, rollouts.completions)
        assert rollouts.logprobs is not None
        theirs = torch.tensor([value for row in rollouts.logprobs for value in row])
        found.append([rollouts.completions, float((token_logprobs(states, targets) - theirs).abs().max())])

    with torch.no_grad():
        with model.disable_adapter():
            generate(max_new_tokens=30, n=3)
        for _ in range(2):
            for _, parameter in model.named_parameters():
                if parameter.requires_grad:
                    parameter += 0.3 * torch.randn_like(parameter)
            generate(max_new_tokens=30, n=3)
        generate(max_new_tokens=30, n=3)
        generate(max_new_tokens=30, temperature=0)
    message = refusal(lambda: engine.generate(model, PROMPTS, Sampling(max_new_tokens=250), seed=0))
    length = process.context_length(engine._llm)
    engine.close()
    return [found, message, length]


class Logged(Callback):
    """Callback that keeps the differences of each step, and the context length of the engine."""

    def __init__(self) -> None:
        self.differences: list[float] = []
        self.length = 0

    def on_train_batch_end(self, trainer: Any, module: Any, *args: Any) -> None:
        self.differences.append(float(trainer.callback_metrics["train/rollout_logprob_difference_max"]))
        self.length = process.context_length(module.rollouts._llm)


def fit(folder: str, adapters: str) -> Any:
    """Training with a 4-bit policy, and a validation with longer completions than training's."""
    torch.manual_seed(0)
    policy = Policy(folder, dtype="float32", lora=ADAPTER, quantization=FOUR_BITS)
    engine = VLLMEngine(sleep=False, options=OPTIONS, adapter_folder=adapters, logprob_tolerance=1e-3)
    module, data = parts(policy, rollouts=engine, eval_sampling=Sampling(max_new_tokens=20), lr_scheduler=None)
    data.max_new_tokens = 20
    logged = Logged()
    run = trainer(Path(adapters) / "run", logged, max_steps=2, val_check_interval=2, check_val_every_n_epoch=None)
    run.fit(module, data)
    longest = max(len(row) for row in data.rows["val"].student) + 20
    assert longest >= max(len(row) for row in data.rows["train"].student) + 8
    evaluated = {name: float(value) for name, value in run.callback_metrics.items() if name.startswith("val/")}
    return [logged.differences, logged.length, longest, sorted(evaluated)]


def failures(folder: str, adapters: str) -> Any:
    """Messages of failures in vLLM's configuration, and in its engine's process."""
    policy = Policy(folder, dtype="float32", lora=ADAPTER)
    model = policy.build()
    del os.environ["VLLM_CPU_KVCACHE_SPACE"]  # it would replace the option

    def message(**settings: Any) -> str:
        options = OPTIONS | settings.pop("options", {})
        engine = VLLMEngine(adapter_folder=adapters, options=options, **{"sleep": False} | settings)
        return refusal(lambda: engine.generate(model, PROMPTS, Sampling(max_new_tokens=8), seed=0))

    return [
        message(sleep=True),
        message(options={"no_such_argument": 1}),
        message(max_model_len=2048),
        message(options={"kv_cache_memory_bytes": 4096}),  # in the engine's process
    ]


def refusal(call: Any) -> str:
    try:
        call()
    except UserError as error:
        return str(error)
    raise AssertionError("not refused")


if __name__ == "__main__":
    warnings.simplefilter("ignore")
    scenario = {"sample": sample, "fit": fit, "failures": failures}[sys.argv[1]]
    print("FOUND " + json.dumps(scenario(*sys.argv[2:])), flush=True)
