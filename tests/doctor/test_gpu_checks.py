"""Tests of the checks of a GPU: its driver and torch's build, bfloat16, and reproducible kernels."""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import BitsAndBytesConfig

from opsd_lightning.doctor import gpu_checks
from opsd_lightning.doctor.findings import Finding
from opsd_lightning.doctor.gpu_checks import (
    Surroundings,
    architecture_findings,
    build_findings,
    determinism_findings,
    precision_findings,
    surroundings,
)
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine
from opsd_lightning.types import Sampling


@pytest.mark.parametrize(
    ("found", "levels", "names"),
    [
        (Surroundings(False, None, None), [], ""),
        (Surroundings(True, (12, 4), None), ["warning"], "12.4"),
        (Surroundings(True, (12, 4), (13, 0)), ["error"], "12.4"),
        (Surroundings(True, (12, 4), (12, 8)), ["note"], "12.8"),
        (Surroundings(True, (13, 0), (12, 8)), [], ""),
        (Surroundings(True, (12, 8), (12, 8)), [], ""),
        (Surroundings(True, None, (13, 0)), [], ""),
    ],
    ids=["no GPU", "build without CUDA", "old driver", "older minor version", "newer driver", "same", "unknown driver"],
)
def test_driver_and_build_are_compared(found: Surroundings, levels: list[str], names: str) -> None:
    findings = list(build_findings(found))
    assert [finding.level for finding in findings] == levels
    assert all(names in finding.text for finding in findings)


@pytest.mark.parametrize(
    ("architectures", "capability", "runs"),
    [
        (("sm_75", "sm_80", "sm_90"), (7, 5), True),
        (("sm_75", "sm_80", "sm_90"), (8, 9), True),  # of the same major version
        (("sm_75", "sm_80", "sm_90"), (7, 0), False),
        (("sm_75", "sm_80", "sm_90"), (12, 0), False),
        (("sm_75", "sm_90", "compute_90"), (12, 0), True),  # compiled from PTX
        (("sm_90a", "sm_100", "sm_120"), (10, 3), True),
        ((), (8, 0), True),  # unknown
    ],
)
def test_kernels_for_the_gpu_are_there(architectures: tuple[str, ...], capability: tuple[int, int], runs: bool) -> None:
    findings = list(architecture_findings(Surroundings(True, None, None, architectures), capability, "A GPU"))
    assert [finding.level for finding in findings] == ([] if runs else ["error"])


@pytest.mark.skipif(torch.cuda.is_available(), reason="the driver is asked itself")
def test_the_driver_is_read_from_nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path), prepend=os.pathsep)
    program = tmp_path / "nvidia-smi"
    program.write_text("#!/bin/sh\necho '| NVIDIA-SMI 550.54.15   Driver Version: 550.54.15   CUDA Version: 12.4 |'\n")
    program.chmod(0o755)
    found = surroundings()
    assert found.present and found.driver_cuda == (12, 4)
    program.write_text("#!/bin/sh\necho 'NVIDIA-SMI has failed' >&2\nexit 9\n")
    assert surroundings().driver_cuda is None


@pytest.fixture
def module(make_policy: Callable[..., Policy]) -> Callable[..., OPSDModule]:
    def make(dtype: str = "bfloat16", compute: str = "bfloat16", top_p: float = 1.0, **settings: Any) -> OPSDModule:
        quantization = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=compute)
        policy = dataclasses.replace(make_policy(quantization=quantization, **settings), dtype=dtype)
        return OPSDModule(policy, sampling=Sampling(max_new_tokens=8, top_p=top_p))

    return make


def only(findings: Iterator[Finding]) -> Finding:
    (finding,) = findings
    return finding


def test_bfloat16_is_advised_against_where_it_is_emulated(module: Callable[..., OPSDModule]) -> None:
    finding = only(precision_findings(module(), "bf16-mixed", (7, 5), "Tesla T4"))
    assert finding.level == "warning"
    for setting in ("trainer.precision", "model.policy.dtype", "bnb_4bit_compute_dtype"):
        assert setting in finding.text and setting in finding.fix
    assert not list(precision_findings(module(), "bf16-mixed", (8, 0), "A100"))
    assert not list(precision_findings(module("float32", "float32"), "32-true", (7, 5), "Tesla T4")), "as advised"
    assert "model.policy.dtype" not in only(precision_findings(module("float32"), "32-true", (7, 5), "Tesla T4")).text


@pytest.mark.parametrize("name", ["flash_attention_2", "kernels-community/flash-attn2"])
def test_flash_attention_needs_ampere(name: str, module: Callable[..., OPSDModule]) -> None:
    flash = module("float32", "float32", attn_implementation=name)
    finding = only(precision_findings(flash, "32-true", (7, 5), "Tesla T4"))
    assert finding.level == "error" and finding.setting == "model.policy.attn_implementation"


@pytest.mark.parametrize(
    ("dtype", "refused"), [(None, True), ("auto", True), ("bfloat16", True), ("float", False), ("half", False)]
)
def test_vllm_needs_ampere_for_bfloat16(dtype: str | None, refused: bool, module: Callable[..., OPSDModule]) -> None:
    full = module("float32", "float32")
    full.rollouts = VLLMEngine(options={} if dtype is None else {"dtype": dtype})
    found = [finding.setting for finding in precision_findings(full, "32-true", (7, 5), "Tesla T4")]
    assert found == (["model.rollouts.init_args.options"] if refused else [])


@pytest.fixture
def deterministic() -> Iterator[None]:
    torch.use_deterministic_algorithms(True)
    yield
    torch.use_deterministic_algorithms(False)


def test_a_resumed_run_on_a_gpu_is_not_called_bit_identical(module: Callable[..., OPSDModule]) -> None:
    finding = only(determinism_findings(module(), resumes=True))
    assert finding.level == "note" and finding.setting == "trainer.deterministic"
    assert not list(determinism_findings(module(), resumes=False))


@pytest.mark.usefixtures("deterministic")
def test_deterministic_kernels_are_taken_at_their_word(module: Callable[..., OPSDModule]) -> None:
    assert not list(determinism_findings(module(), resumes=True))
    torch.use_deterministic_algorithms(True, warn_only=True)
    assert only(determinism_findings(module(), resumes=True)).setting == "trainer.deterministic"


def test_builds_for_the_cpu_ask_no_driver() -> None:
    assert gpu_checks.surroundings().torch_cuda is None or hasattr(torch._C, "_cuda_getDriverVersion")
