"""Tests that the recipes fit into the memory of the cards that they name, by the estimate."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
import yaml

from helpers.messages import mentions
from helpers.paths import ROOT
from helpers.qwen3 import qwen3_folder
from opsd_lightning.doctor.examination import build_parts
from opsd_lightning.doctor.memory import DeviceMemory, Estimator, Step, memory_findings
from opsd_lightning.doctor.run_memory import estimator_of, step_of
from opsd_lightning.models.cache_size import cache_bytes
from opsd_lightning.models.policy import base_of, is_adapter_key
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine
from opsd_lightning.types import ConfigError

RECIPES = {"qwen3_1.7b_qlora": "Qwen/Qwen3-1.7B", "qwen3_4b_qlora": "Qwen/Qwen3-4B", "qwen3_8b_qlora": "Qwen/Qwen3-8B"}
EVALS = sorted((ROOT / "configs" / "eval").glob("*.yaml"))
# Of a T4: 4-bit weights, and computation in float32.
FLOAT32 = [
    "--model.policy.dtype=float32",
    "--model.policy.quantization.init_args.bnb_4bit_compute_dtype=float32",
    "--trainer.precision=32-true",
]

pytestmark = pytest.mark.integration

Estimate = Callable[..., tuple[Estimator, Step]]


def card_of(recipe: str) -> DeviceMemory:
    """Return the card that a recipe names in its comment."""
    text = (ROOT / "configs" / f"{recipe}.yaml").read_text(encoding="utf-8")
    (gigabytes,) = re.findall(r"^#.*\b(\d+) GB\b", text, re.MULTILINE)
    return DeviceMemory.card(float(gigabytes))


@pytest.fixture(scope="module")
def estimate(tmp_path_factory: pytest.TempPathFactory) -> Estimate:
    """Return a function that makes the estimator and the step of a recipe, with prompts of 512 tokens."""
    root = tmp_path_factory.mktemp("qwen3")

    @cache
    def make(recipe: str, *arguments: str) -> tuple[Estimator, Step]:
        folder = qwen3_folder(RECIPES.get(recipe, "Qwen/Qwen3-1.7B"), root)
        config = f"--config={ROOT / 'configs' / f'{recipe}.yaml'}"
        parts, problems = build_parts([config, *arguments, f"--model.policy.model={folder}"], with_model=False)
        # The trainer itself cannot be built without a GPU.
        assert parts is not None and {problem.setting for problem in problems} <= {"trainer.accelerator"}, problems
        precision = str(parts.config[parts.subcommand].trainer.precision)
        return estimator_of(parts.model, card_of(recipe), precision), step_of(parts.model, parts.datamodule, 512)

    return make


def check(estimator: Estimator, step: Step) -> dict[str, int]:
    """Check that a step fits, with all of its phases, and return the bytes by part."""
    parts = estimator.parts(step)
    assert parts["validation: keys and values"] > 0 and parts["rollout: keys and values"] > 0
    assert parts["total"] < estimator.device.available, parts
    assert not list(memory_findings(estimator.least(step), estimator.device, "card"))
    return parts


@pytest.mark.parametrize("recipe", RECIPES)
def test_recipes_fit_the_cards_that_they_name(recipe: str, estimate: Estimate) -> None:
    estimator, step = estimate(recipe)
    assert step.eval_rows == 16 * 4 and step.rows == 32
    check(estimator, step)


@pytest.mark.parametrize("evaluation", EVALS, ids=lambda path: path.stem)
@pytest.mark.parametrize("recipe", RECIPES)
def test_benchmarks_fit_the_cards_of_the_recipes(recipe: str, evaluation: Path, estimate: Estimate) -> None:
    estimator, step = estimate(recipe)
    settings = yaml.safe_load(evaluation.read_text(encoding="utf-8"))
    sampling = settings["model"]["eval_sampling"]
    rows = settings["data"]["eval_batch_size"] * sampling["n"]
    asked = step._replace(eval_rows=rows, eval_completion=sampling["max_new_tokens"], rows_at_once=rows)
    check(estimator, asked)
    row = cache_bytes(base_of(estimator.model).config, asked.prompt + asked.eval_completion, 2)
    assert rows * row > 10 * estimator.device.total, "all rows at once would not fit"


@pytest.mark.parametrize("recipe", [*RECIPES, "qwen3_1.7b_lora_vllm"])
def test_thinking_validation_fits_the_cards_of_the_recipes(recipe: str, estimate: Estimate) -> None:
    """With few completions at one time."""
    thinking = ROOT / "configs" / "presets" / "validate_thinking.yaml"
    estimator, step = estimate(recipe, f"--config={thinking}")
    assert (step.eval_completion, step.eval_rows) == (38912, 64) and step.completion == 1024
    assert estimator.parts(step)["total"] < estimator.device.available
    assert not list(memory_findings(estimator.least(step), estimator.device, "card"))
    if recipe in RECIPES:  # the numbers of docs/reproducing.md
        asked = step._replace(rows=step.eval_rows, completion=step.eval_completion)
        larger = dataclasses.replace(estimator, device=DeviceMemory.card(80))
        found = estimator.rows_at_once(asked), larger.rows_at_once(asked)
        assert found == (1, {"1.7b": 13, "4b": 9, "8b": 8}[recipe.split("_")[1]])


def test_vllm_in_this_process_fits_the_card_of_its_recipe(estimate: Estimate) -> None:
    """Its share of the card counts while it samples, or always where it does not sleep."""
    estimator, step = estimate("qwen3_1.7b_lora_vllm")
    parts = estimator.parts(step)
    weights = 2 * sum(p.numel() for n, p in estimator.model.named_parameters() if not is_adapter_key(n))
    row = cache_bytes(base_of(estimator.model).config, step.prompt + step.eval_completion, 2)
    assert parts["rollout: vLLM"] > weights + row
    kept = sum(size for part, size in parts.items() if ":" not in part and part != "total")
    assert kept + parts["rollout: vLLM"] <= parts["total"] < estimator.device.available
    assert not list(memory_findings(estimator.least(step), estimator.device, "card"))
    awake = dataclasses.replace(estimator, engine=VLLMEngine(sleep=False)).parts(step)
    assert awake["vLLM"] > weights and "rollout: vLLM" not in awake
    small = dataclasses.replace(estimator, device=DeviceMemory.card(8))
    with pytest.raises(ConfigError, match=mentions("vLLM")):
        small.parts(step)


def test_the_smallest_recipe_fits_a_t4_in_float32(estimate: Estimate) -> None:
    estimator, step = estimate("qwen3_1.7b_qlora", *FLOAT32)
    parts = check(estimator, step)
    half, _ = estimate("qwen3_1.7b_qlora")
    assert parts["base weights"] > half.parts(step)["base weights"], "the embeddings are float32"
    assert parts["scoring: activations"] > 1.4 * half.parts(step)["scoring: activations"]


def test_a_larger_model_does_not_fit_a_small_card(estimate: Estimate) -> None:
    estimator, step = estimate("qwen3_8b_qlora")
    small = dataclasses.replace(estimator, device=DeviceMemory.card(12))
    (finding,) = memory_findings(small.least(step), small.device, "a small card")
    assert finding.level == "error" and finding.setting.startswith("model.")


def test_another_process_that_holds_half_of_the_memory(estimate: Estimate) -> None:
    alone, step = estimate("qwen3_8b_qlora")
    card = alone.device
    shared = dataclasses.replace(alone, device=card._replace(available=card.total // 2))
    assert shared.rows_at_once(step) < alone.rows_at_once(step) == 32
    (finding,) = memory_findings(shared.least(step), shared.device, "card")
    assert finding.level == "error" and "nvidia-smi" in finding.fix
    assert not list(memory_findings(alone.least(step), card, "card"))


def test_larger_cards_sample_more_rows_at_one_time(estimate: Estimate) -> None:
    estimator, step = estimate("qwen3_8b_qlora")
    step = step._replace(rows=256, rows_at_once=256)
    rows = []
    for gigabytes in (24, 48, 80):
        larger = dataclasses.replace(estimator, device=DeviceMemory.card(gigabytes))
        rows.append(larger.rows_at_once(step))
    assert rows == sorted(rows) and rows[0] < rows[-1]


def test_validation_without_grades_samples_nothing(estimate: Estimate) -> None:
    graded, scored = (estimate("qwen3_1.7b_qlora", *more)[1] for more in ((), ("--data.grader=NoGrader",)))
    assert graded.eval_rows > 0 and scored == graded._replace(eval_rows=0, rows_at_once=scored.rows_at_once)
