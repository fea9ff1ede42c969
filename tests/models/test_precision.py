"""Precisions: which are refused, and that those that are not lose no gradient."""

from __future__ import annotations

import random
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.plugins import DoublePrecision, HalfPrecision, MixedPrecision
from lightning.pytorch.trainer.states import TrainerFn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from opsd_lightning.distributed.checks import check_precision
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.precision import check_dtypes, precision_problem
from opsd_lightning.models.scoring import score
from opsd_lightning.types import ConfigError


@pytest.mark.parametrize(
    "name", ["16-true", "bf16-true", "16-mixed", 16, "16", "transformer-engine", "transformer-engine-float16"]
)
def test_unsafe_precisions_are_refused(name: str | int) -> None:
    problem = precision_problem(name)
    assert problem is not None and problem.setting == "trainer.precision" and "bf16-mixed" in problem.fix


@pytest.mark.parametrize("name", ["32-true", 32, "32", "bf16-mixed", "bf16", "64-true", 64, None])
def test_safe_precisions_are_accepted(name: str | int | None) -> None:
    assert precision_problem(name) is None


def test_precision_plugins_are_checked() -> None:
    for plugin in (HalfPrecision("bf16-true"), HalfPrecision("16-true")):
        with pytest.raises(ConfigError) as error:
            check_precision(plugin)
        assert error.value.setting == "trainer.precision"
    check_precision(MixedPrecision("bf16-mixed", "cpu"))
    check_precision(DoublePrecision())


@pytest.fixture(scope="module")
def half(folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> str:
    """A checkpoint in float16."""
    folder = tmp_path_factory.mktemp("half")
    AutoModelForCausalLM.from_pretrained(folders["llama"], dtype=torch.float16).save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja"):
        if (source := Path(folders["llama"]) / name).exists():
            (folder / name).write_bytes(source.read_bytes())
    return str(folder)


def setting(policy: Policy, precision: str, model: Any = None) -> str | None:
    try:
        check_dtypes(policy, precision, model)
    except ConfigError as error:
        return error.setting
    return None


def test_float16_weights_that_would_compute_in_float16(half: str, folders: dict[str, str]) -> None:
    own: dict[str, Any] = {"lora": LoRA(r=4)}
    for policy in (Policy(half, **own), Policy(folders["llama"], dtype="float16", **own)):
        assert setting(policy, "32-true") == "model.policy.dtype"
        assert setting(policy, "bf16-mixed") is None and setting(policy, "64-true") is None
        assert setting(policy, "32-true", policy.build()) == "model.policy.dtype"
    for dtype in ("float32", "bfloat16"):
        policy = Policy(half, dtype=dtype, **own)  # type: ignore[arg-type]
        assert setting(policy, "32-true") is None and setting(policy, "32-true", policy.build()) is None
    full = Policy(folders["llama"], lora=None, dtype="float16")
    assert setting(full, "bf16-mixed") == "model.policy.dtype"
    for compute, refused in ((torch.float16, True), (torch.bfloat16, False), (torch.float32, False)):
        bits = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
        found = setting(Policy(folders["llama"], dtype="float32", quantization=bits, **own), "bf16-mixed")
        assert found == ("model.policy.quantization.bnb_4bit_compute_dtype" if refused else None)


def test_a_plain_trainer_refuses_before_the_weights_are_read(
    half: str, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(Policy, "build", lambda *args: pytest.fail("the model is loaded"))
    for settings, refused in (({"precision": "bf16-true"}, "trainer.precision"), ({}, "model.policy.dtype")):
        run = Trainer(accelerator="cpu", max_steps=1, logger=False, default_root_dir=tmp_path, **settings)
        module = OPSDModule(Policy(half, lora=LoRA(r=4)))
        module.trainer = run
        with pytest.raises(ConfigError) as error:
            module.configure_model()
        assert error.value.setting == refused


def gradients(policy: Policy, autocast: bool, tokens: int) -> torch.Tensor:
    """Of a forward KL against the base, whose weights divide by that many tokens, for all of them together."""
    torch.manual_seed(0)
    model, noise, draw = policy.build(), torch.Generator().manual_seed(3), random.Random(0)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.05 * torch.randn(parameter.shape, generator=noise)
    prompts = [[draw.randrange(7, 100) for _ in range(8)] for _ in range(4)]
    completions = [[draw.randrange(7, 100) for _ in range(20)] for _ in prompts]
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast, cache_enabled=False):
        with torch.no_grad(), model.disable_adapter():
            teacher, _ = score(model, prompts, completions)
        student, targets = score(model, prompts, completions)
        loss, _ = DivergenceObjective()(student, teacher, targets, torch.full((len(targets),), 1 / tokens))
        loss.backward()
    found = [parameter.grad.float().flatten() for parameter in model.parameters() if parameter.grad is not None]
    return torch.cat(found) * tokens


def test_no_gradient_underflows_in_what_is_supported(folders: dict[str, str]) -> None:
    """In a step of very many tokens: float16 weights are as good as float32 ones under bf16-mixed, and lose most without."""

    def error(dtype: str, autocast: bool) -> float:
        policy = Policy(folders["llama"], lora=LoRA(r=4, alpha=8, dropout=0.0), dtype=dtype)  # type: ignore[arg-type]
        return float((gradients(policy, autocast, 100_000) - expected).norm() / expected.norm())

    policy = Policy(folders["llama"], lora=LoRA(r=4, alpha=8, dropout=0.0), dtype="float32")
    expected = gradients(policy, False, 1)
    for dtype in ("float32", "bfloat16", "float16"):
        assert error(dtype, True) < 0.06
    assert error("bfloat16", False) < 0.06 and error("float32", False) < 1e-4
    assert error("float16", False) > 0.1  # why it is refused


def test_whole_layers_do_not_train_in_half_precision(folders: dict[str, str]) -> None:
    """peft copies ``modules_to_save`` in the dtype of the base."""
    lora = LoRA(r=2, alpha=4, options={"modules_to_save": ["lm_head"]})
    with pytest.raises(ConfigError) as caught:
        Policy(folders["llama"], lora=lora, dtype="bfloat16").build()
    assert caught.value.setting == "model.policy.dtype"
    model = Policy(folders["llama"], lora=lora, dtype="float32").build()
    assert {p.dtype for p in model.parameters() if p.requires_grad} == {torch.float32}
    assert Policy(folders["llama"], lora=LoRA(r=2, alpha=4), dtype="bfloat16").build().dtype == torch.bfloat16


def test_an_evaluation_has_no_gradient_that_could_underflow(half: str, tmp_path: Path) -> None:
    module = OPSDModule(Policy(half, lora=LoRA(r=2, alpha=4)))
    module.trainer = Trainer(accelerator="cpu", logger=False, default_root_dir=tmp_path)
    module.trainer.state.fn = TrainerFn.TESTING
    module.configure_model()
    assert module.model.dtype == torch.float16
