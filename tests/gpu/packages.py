"""Checks that need packages which may be missing: flash attention, vLLM, pytest."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.constants import HF_HUB_CACHE

from gpu.machine import Machine, perturb, random_rows
from gpu.recipe import run_recipe
from gpu.runner import Skip
from gpu.speed import decoding
from helpers.models import COMPLETIONS, PROMPTS
from helpers.paths import ROOT
from opsd_lightning.losses.objectives import token_logprobs
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import packs_rows, score
from opsd_lightning.rollouts.transformers_engine import TransformersEngine

HUB_KERNELS = "kernels-community/flash-attn2"
VLLM_RECIPE = ROOT / "configs" / "qwen3_1.7b_lora_vllm.yaml"


def flash_attn(machine: Machine, facts: Any) -> None:
    """Score packed rows with the package flash-attn as padded rows with sdpa, sample, and train."""
    _flash(machine, facts, "flash_attention_2")


def flash_hub_kernels(machine: Machine, facts: Any) -> None:
    """Score packed rows with the hub's flash attention as padded rows with sdpa, sample, and train."""
    _in_the_cache(HUB_KERNELS)
    _flash(machine, facts, HUB_KERNELS)


def _in_the_cache(repository: str) -> None:
    """Skip if the kernels would have to be downloaded."""
    cache = Path(os.environ.get("KERNELS_CACHE") or HF_HUB_CACHE)
    if not any(cache.glob(f"*--{repository.replace('/', '--')}")):
        raise Skip(f"{repository} is not in the cache, and nothing is downloaded here: load it once (docs/gpu.md)")


def _flash(machine: Machine, facts: Any, attention: str) -> None:
    if machine.imitated:
        raise Skip("its kernels run on a GPU only")
    if torch.cuda.get_device_capability() < (8, 0):
        raise Skip("it needs compute capability 8.0 (Ampere)")
    found = {}
    for implementation in ("sdpa", attention):
        torch.manual_seed(0)
        # A head of 64: the kernels have no smaller ones of every size.
        model = machine.build(Policy(machine.large(), lora=LoRA(r=4, alpha=8, dropout=0.0), dtype="bfloat16",
                                     attn_implementation=implementation))  # fmt: skip
        perturb(model, 0.01)
        assert packs_rows(model) == (implementation == attention), "rows are packed under flash attention alone"
        with machine.autocast(), torch.no_grad():
            states, targets = score(model, PROMPTS, COMPLETIONS)
            found[implementation] = token_logprobs(states, targets)
        facts[implementation] = decoding(machine, model, TransformersEngine(), 24)
        rows = random_rows(8, 1024)
        facts[f"{implementation}, s of scoring 8 x 2,048 tokens"] = _scoring_seconds(machine, model, rows)
        del model
        machine.clean()
    facts["largest difference of a log-probability"] = difference = float((found["sdpa"] - found[attention]).abs().max())
    assert difference < 0.1, f"log-probabilities differ by up to {difference:.2g}"
    policy = Policy(machine.large(), lora=LoRA(r=4, alpha=8), dtype="bfloat16", attn_implementation=attention)
    module, data = machine.parts(policy)
    machine.fit(module, data, "flash", precision="bf16-mixed")


def _scoring_seconds(machine: Machine, model: Any, rows: list[list[int]]) -> float:
    def score_rows() -> None:
        with machine.autocast(), torch.no_grad():
            score(model, rows, rows)

    score_rows()
    return machine.seconds(score_rows)


def vllm_colocated(machine: Machine, facts: Any) -> None:
    """Train the recipe with vLLM beside the trainer, which sleeps between rollouts, and compare log-probabilities."""
    if machine.imitated:
        raise Skip("vLLM needs a real GPU")
    if not machine.bfloat16:
        raise Skip("the recipe samples in bfloat16, which this GPU has not")
    arguments = machine.recipe_arguments("vllm", 64, steps=2, config=VLLM_RECIPE)
    logged = run_recipe(machine, facts, arguments, 64)
    facts["rollout tokens a second"] = logged["time/rollout_tokens_per_second"]
    facts["log-probabilities of vLLM and trainer, nats"] = difference = {
        "mean difference": logged["train/rollout_logprob_difference"],
        "largest": logged["train/rollout_logprob_difference_max"],
    }
    assert difference["mean difference"] < 0.1, "vLLM has other weights than the trainer"


def gpu_tests(machine: Machine, facts: Any) -> None:
    """Run the tests that are marked ``gpu``."""
    marked = [path for path in sorted((ROOT / "tests").rglob("test_*.py")) if "mark.gpu" in path.read_text(encoding="utf-8")]
    facts["files"] = [path.name for path in marked]
    if not marked:
        raise Skip("no test is marked gpu")
    if machine.imitated:
        raise Skip("tests that are marked gpu need a real one")
    command = [sys.executable, "-m", "pytest", "-m", "gpu", "-q", "-p", "no:cacheprovider", "-rs", *map(str, marked)]
    machine.clean()
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    print(found.stdout, found.stderr, sep="\n", flush=True)
    facts["result"] = (found.stdout.strip().splitlines() or ["no output"])[-1]
    if found.returncode == 5:
        raise Skip("no test is marked gpu")
    assert found.returncode == 0, f"pytest ended with status {found.returncode}: {facts['result']}"
