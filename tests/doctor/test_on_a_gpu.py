"""Tests of `opsd doctor` on an imitated GPU: a small one, one without bfloat16, and one that another process uses."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from helpers.strict_device import Card, strict_device, unavailable
from opsd_lightning.doctor.command import main
from opsd_lightning.doctor.memory import RESERVE

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif((reason := unavailable()) is not None, reason=str(reason)),
]

Doctor = Callable[..., dict[str, Any]]
NF4 = {"load_in_4bit": "true", "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": "bfloat16"}
HALF = ["--trainer.precision=bf16-mixed", "--model.policy.dtype=bfloat16"]
QUANTIZED = ["--model.policy.quantization=transformers.BitsAndBytesConfig"] + [
    f"--model.policy.quantization.{name}={value}" for name, value in NF4.items()
]


@pytest.fixture
def doctor(base: list[str], tmp_path: Path) -> Doctor:
    """Return a function that runs the command for a card, and returns what ``--json`` holds."""

    def run(card: Card, *arguments: str) -> dict[str, Any]:
        path = tmp_path / "findings.json"
        with strict_device(card), pytest.MonkeyPatch.context() as patch:
            patch.setattr(torch.cuda, "get_arch_list", lambda: ["sm_75", "sm_80", "sm_90"])
            with contextlib.suppress(SystemExit):
                main([*base, f"--json={path}", "--trainer.accelerator=gpu", *arguments])
        found: dict[str, Any] = json.loads(path.read_text())
        return found

    return run


def settings(found: dict[str, Any], level: str, part: str) -> list[str]:
    return [each["setting"] for each in found["findings"] if each["level"] == level and each["part"] == part]


def test_a_run_on_a_gpu_is_examined(doctor: Doctor) -> None:
    found = doctor(Card(), *HALF)
    assert found["healthy"], found["findings"]
    assert not settings(found, "warning", "settings") and not settings(found, "warning", "memory")
    memory = found["facts"]["memory"]
    assert memory["bytes"]["reserve"] == RESERVE and memory["device_bytes"] == 24 * 2**30
    assert memory["measured"]["peak_bytes"] > 0
    assert found["facts"]["time"]["decoding_bound"] in ("kernel launches", "memory bandwidth")
    assert found["facts"]["gpu"]["capability"] == [8, 9]


def test_a_gpu_without_bfloat16_gets_advice(doctor: Doctor) -> None:
    found = doctor(Card.t4(), *HALF, *QUANTIZED, "--no-model")
    assert settings(found, "warning", "settings") == ["trainer.precision"]
    (finding,) = [each for each in found["findings"] if each["setting"] == "trainer.precision"]
    assert "Tesla T4" in finding["text"]
    advised = [
        "--trainer.precision=32-true",
        "--model.policy.dtype=float32",
        *QUANTIZED,
        "--model.policy.quantization.bnb_4bit_compute_dtype=float32",
    ]
    found = doctor(Card.t4(), *advised)
    assert found["healthy"], found["findings"]
    assert not settings(found, "warning", "settings"), "as advised"
    assert found["facts"]["memory"]["measured"]["peak_bytes"] > 0, "a step ran"


def test_memory_of_another_process_is_not_available(doctor: Doctor) -> None:
    size = 3 * RESERVE // 2
    alone = doctor(Card(total_memory=size), "--no-model")
    assert not settings(alone, "error", "memory") and not settings(alone, "warning", "memory")
    shared = doctor(Card(total_memory=size, used_elsewhere=size // 2), "--no-model")
    assert settings(shared, "error", "memory")
    (finding,) = [each for each in shared["findings"] if each["part"] == "memory"]
    assert "nvidia-smi" in finding["fix"]
    assert shared["facts"]["memory"]["free_bytes"] == size // 2


def test_a_card_that_is_too_small_runs_no_step(doctor: Doctor) -> None:
    found = doctor(Card(total_memory=2**20))
    assert settings(found, "error", "memory") and "time" not in found["facts"]


def test_a_resumed_run_is_told_about_deterministic_kernels(doctor: Doctor) -> None:
    found = doctor(Card(), *HALF, "--no-model", "--ckpt_path=last")
    assert "trainer.deterministic" in settings(found, "note", "settings")
    try:
        deterministic = [
            *HALF,
            "--no-model",
            "--trainer.deterministic=true",
            "--model.sampling.top_p=0.9",
            "--ckpt_path=last",
        ]
        found = doctor(Card(), *deterministic)
        other = doctor(Card(), *deterministic, "--model.rollouts=ContinuousBatchingEngine")
    finally:
        torch.use_deterministic_algorithms(False)
    assert "trainer.deterministic" not in [each["setting"] for each in found["findings"]]
    assert "model.rollouts" in settings(other, "error", "settings")
