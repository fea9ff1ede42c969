"""Tests that settings of engines which fail or have no effect are refused before training."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from transformers import BitsAndBytesConfig

from helpers.models import PROMPTS
from helpers.strict_device import strict_device, unavailable
from opsd_lightning.cli.command import main
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.trainer_checks import trainer_problems
from opsd_lightning.models.policy import LoRA, Policy, base_of, evaluating
from opsd_lightning.rollouts import continuous_batching
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine
from opsd_lightning.rollouts.decoding import Decoder
from opsd_lightning.rollouts.rollout_copy import rollout_copy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Sampling

CUDA, CPU = torch.device("cuda", 0), torch.device("cpu")
NF4 = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.bfloat16)
STATIC = "model.rollouts.init_args.static_cache"
COMPILE = "model.rollouts.init_args.compile"


def refused(engine: RolloutEngine, policy: Policy, precision: str, device: torch.device) -> str | None:
    try:
        engine.check(policy, precision, device)
    except ConfigError as error:
        return error.setting
    return None


@pytest.mark.parametrize(
    ("engine", "policy", "precision", "device", "setting"),
    [
        (TransformersEngine(static_cache=True, compile=True), {"quantization": NF4}, "32-true", CUDA, COMPILE),
        (TransformersEngine(static_cache=True, compile=True), {}, "32-true", CUDA, None),
        (TransformersEngine(static_cache=True, compile=True), {}, "32-true", CPU, COMPILE),
        (TransformersEngine(static_cache=True), {"quantization": NF4, "dtype": "bfloat16"}, "bf16-mixed", CUDA, None),
        (TransformersEngine(static_cache=True), {}, "bf16-mixed", CPU, STATIC),
        (TransformersEngine(static_cache=True), {"dtype": "auto"}, "bf16-mixed", CPU, STATIC),
        (TransformersEngine(static_cache=True), {}, "bf16-mixed", CUDA, None),  # samples with a copy in bfloat16
        (TransformersEngine(static_cache=True, rollout_copy=False), {}, "bf16-mixed", CUDA, STATIC),
        (TransformersEngine(static_cache=True, compile=True), {}, "bf16-mixed", CUDA, STATIC),
        (TransformersEngine(static_cache=True), {"dtype": "bfloat16"}, "bf16-mixed", CPU, None),
        (TransformersEngine(static_cache=True), {}, "32-true", CPU, None),
        (TransformersEngine(), {}, "bf16-mixed", CPU, None),
        (ContinuousBatchingEngine(), {}, "bf16-mixed", CUDA, None),
    ],
)
def test_settings_that_do_not_work_together(
    engine: RolloutEngine, policy: dict[str, Any], precision: str, device: torch.device, setting: str | None,
    folders: dict[str, str],
) -> None:  # fmt: skip
    recipe = Policy(folders["llama"], **({"dtype": "float32"} | policy))
    assert refused(engine, recipe, precision, device) == setting


def test_the_checks_before_training_include_the_engine(folders: dict[str, str]) -> None:
    module = OPSDModule(Policy(folders["llama"], dtype="float32"), rollouts=TransformersEngine(static_cache=True))
    trainer = Trainer(accelerator="cpu", precision="bf16-mixed", logger=False, max_steps=1, enable_progress_bar=False)
    assert STATIC in [problem.setting for problem in trainer_problems(trainer, module, None)]


@pytest.mark.parametrize("command", ["fit", "validate"])
def test_commands_refuse_them(command: str, base: list[str], capsys: pytest.CaptureFixture[str]) -> None:
    settings = ["--trainer.precision=bf16-mixed", "--model.rollouts=TransformersEngine", f"--{STATIC}=true"]
    with pytest.raises(SystemExit):
        main([command, *base, *settings])
    assert STATIC in capsys.readouterr().err


def test_an_unusable_static_cache_is_the_reason(built: Callable[..., PeftModel]) -> None:
    """Keys are float32 and values are not. Without an error the refusal would be wrong."""
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(RuntimeError):
        TransformersEngine(static_cache=True).generate(built("qwen3"), PROMPTS, Sampling(max_new_tokens=4), 0)


@pytest.mark.skipif(unavailable() is not None, reason=str(unavailable()))
def test_a_copy_makes_the_static_cache_work(folders: dict[str, str]) -> None:
    policy = Policy(folders["qwen3"], lora=LoRA(r=4, alpha=8), dtype="float32")
    sampling = Sampling(max_new_tokens=6, temperature=0)
    with strict_device() as device:
        model = policy.build().to("cuda:0")
        with torch.autocast("cuda", torch.bfloat16):
            found = TransformersEngine(static_cache=True).generate(model, PROMPTS, sampling, 0)
            assert found == TransformersEngine().generate(model, PROMPTS, sampling, 0)
    assert not device.mixes


@pytest.mark.integration
@pytest.mark.usefixtures("cpu_alone")
def test_continuous_batching_under_autocast_samples_in_its_precision(built: Callable[..., PeftModel]) -> None:
    """Its thread does not inherit autocast: it samples with a copy in bfloat16."""
    model, sampling = built(), Sampling(max_new_tokens=8, temperature=0)
    with torch.autocast("cpu", torch.bfloat16):
        engine = ContinuousBatchingEngine(options={"num_blocks": 8, "max_batch_tokens": 256})  # not half of the free memory
        found = engine.generate(model, PROMPTS[:1], sampling, 0).completions
    with evaluating(model), torch.no_grad():
        expected = Decoder(rollout_copy(model), PROMPTS[:1], sampling, 1).in_segments()
    assert found == [row.tokens for row in expected]


def test_continuous_batching_refuses_autocast_without_a_copy(
    built: Callable[..., PeftModel], monkeypatch: pytest.MonkeyPatch
) -> None:
    model = built()
    monkeypatch.setattr(continuous_batching, "can_copy", lambda model: False)  # as for sharded weights
    with torch.autocast("cpu", torch.bfloat16), pytest.raises(ConfigError) as error:
        ContinuousBatchingEngine().generate(model, PROMPTS, Sampling(max_new_tokens=4), 0)
    assert error.value.setting == "model.rollouts" and base_of(model).training
