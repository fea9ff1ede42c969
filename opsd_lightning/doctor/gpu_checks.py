"""Checks of an NVIDIA GPU: its driver against torch's build, its precisions, and reproducible kernels."""

from __future__ import annotations

import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch

from opsd_lightning.doctor.findings import Finding
from opsd_lightning.models.scoring import is_flash_attention
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine

Version = tuple[int, int]

#: The first compute capability with bfloat16 units and with FlashAttention-2 (Ampere).
AMPERE = (8, 0)
_INSTALL = "https://pytorch.org/get-started/locally"


class Surroundings(NamedTuple):
    """The GPU software of a machine.

    Args:
        present: True if the machine has a driver of NVIDIA.
        driver_cuda: Newest CUDA version that the driver supports. None if it is unknown.
        torch_cuda: CUDA version that torch is built for. None for a build without CUDA.
        architectures: Names of the architectures that torch has kernels for, such as ``sm_80``. Empty if torch finds no GPU.
    """

    present: bool
    driver_cuda: Version | None
    torch_cuda: Version | None
    architectures: tuple[str, ...] = ()


def surroundings() -> Surroundings:
    """Read the versions of the driver and of torch, without initializing CUDA."""
    driver = None
    if hasattr(torch._C, "_cuda_getDriverVersion"):  # only in builds for CUDA
        number = torch._C._cuda_getDriverVersion()  # 12040 for 12.4, 0 without a driver
        driver = (number // 1000, number % 1000 // 10) if number else None
    printed = _nvidia_smi() if driver is None else ""
    if found := re.search(r"CUDA Version:\s*(\d+)\.(\d+)", printed):
        driver = (int(found[1]), int(found[2]))
    present = driver is not None or bool(printed) or Path("/proc/driver/nvidia/version").exists()
    built = str(torch.version.cuda).split(".") if torch.version.cuda else None
    return Surroundings(
        present,
        driver,
        None if built is None else (int(built[0]), int(built[1])),
        tuple(torch.cuda.get_arch_list()) if torch.cuda.is_available() else (),
    )


def _nvidia_smi() -> str:
    """Return the output of ``nvidia-smi``, or an empty string if it is missing or fails."""
    try:
        done = subprocess.run(["nvidia-smi"], capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired):
        return ""
    return done.stdout if done.returncode == 0 else ""


def build_findings(found: Surroundings) -> Iterator[Finding]:
    """Find whether torch's build can use the machine's GPU."""
    if not found.present or torch.version.hip:
        return
    driver = "" if found.driver_cuda is None else f" (its driver supports CUDA {_text(found.driver_cuda)})"
    if found.torch_cuda is None:
        text = f"this machine has an NVIDIA GPU{driver}, and torch {torch.__version__} is built without CUDA"
        yield Finding("warning", "settings", text, "trainer.accelerator", f"install a build for CUDA ({_INSTALL})")
    elif found.driver_cuda is not None and found.torch_cuda[0] > found.driver_cuda[0]:
        text = (
            f"torch {torch.__version__} is built for CUDA {_text(found.torch_cuda)}, and the GPU's driver is too old: it "
            f"supports CUDA {_text(found.driver_cuda)}"
        )
        fix = f"update the driver, or install a build of torch for CUDA {found.driver_cuda[0]} ({_INSTALL})"
        yield Finding("error", "settings", text, "trainer.accelerator", fix)
    elif found.driver_cuda is not None and found.torch_cuda > found.driver_cuda:
        text = (
            f"torch {torch.__version__} is built for CUDA {_text(found.torch_cuda)}, and the GPU's driver supports CUDA "
            f"{_text(found.driver_cuda)}. Kernels of torch run. Kernels that are compiled at run time (torch.compile, "
            "vLLM) may need a newer driver"
        )
        yield Finding("note", "settings", text)


def architecture_findings(found: Surroundings, capability: Version, name: str) -> Iterator[Finding]:
    """Find whether torch has kernels for a GPU.

    Args:
        found: The software of the machine.
        capability: Compute capability of the GPU.
        name: Name of the GPU.
    """
    built = [(match[1], (int(match[2]), int(match[3]))) for each in found.architectures
             if (match := re.fullmatch(r"(sm|compute)_(\d+)(\d)[a-z]?", each))]  # fmt: skip
    # Binary code runs on later GPUs of the same major version, and PTX ("compute") on all later ones.
    runs = any(version <= capability and (kind == "compute" or version[0] == capability[0]) for kind, version in built)
    if built and not runs:
        text = (
            f"torch {torch.__version__} has no kernels for {name} (compute capability {_text(capability)}), only for "
            f"{', '.join(found.architectures)}"
        )
        fix = f"install a build of torch for this GPU, such as one for an older CUDA version ({_INSTALL})"
        yield Finding("error", "settings", text, "trainer.accelerator", fix)


def precision_findings(module: Any, precision: str, capability: Version, name: str) -> Iterator[Finding]:
    """Find settings that a GPU without bfloat16 units does not support, or emulates.

    Args:
        module: A `PolicyModule`.
        precision: ``trainer.precision``.
        capability: Compute capability of the GPU.
        name: Name of the GPU.
    """
    if capability >= AMPERE:
        return
    policy, rollouts = module.policy, module.rollouts
    what = f"{name} (compute capability {_text(capability)})"
    if is_flash_attention(policy.attn_implementation):
        text = f"FlashAttention-2 needs compute capability {_text(AMPERE)}, and {what} has less"
        yield Finding("error", "settings", text, "model.policy.attn_implementation", "set it to sdpa")
    dtypes = ("half", "float16", "float", "float32")
    if isinstance(rollouts, VLLMEngine) and str(rollouts.options.get("dtype")).removeprefix("torch.") not in dtypes:
        text = f"vLLM refuses bfloat16 on {what}"
        fix = "set dtype to float32 there, or use TransformersEngine"
        yield Finding("error", "settings", text, "model.rollouts.init_args.options", fix)
    quantization = policy.quantization
    computes_in = getattr(quantization, "bnb_4bit_compute_dtype", None) if quantization is not None else None
    emulated = {
        "model.policy.dtype": policy.dtype == "bfloat16",
        "bnb_4bit_compute_dtype": computes_in == torch.bfloat16,
        "trainer.precision": precision.startswith("bf16"),
    }
    if any(emulated.values()):
        names = [setting for setting, half in emulated.items() if half]
        text = (
            f"{what} has no bfloat16 units: the bfloat16 of {', '.join(names)} is emulated, without tensor cores. float16 "
            "is refused, because gradients underflow in it"
        )
        kept = "keep the 4-bit weights" if quantization is not None else "quantize the weights to 4 bits"
        fix = (
            f"{kept}, and compute in float32 (model.policy.dtype and bnb_4bit_compute_dtype float32, trainer.precision "
            "32-true). Embeddings, activations, keys and values then need twice the memory"
        )
        yield Finding("warning", "settings", text, "trainer.precision", fix)


def determinism_findings(module: Any, resumes: bool) -> Iterator[Finding]:
    """Find whether a run on a GPU repeats itself bit by bit.

    Args:
        module: A `PolicyModule`.
        resumes: True if the run starts from a checkpoint.
    """
    if torch.are_deterministic_algorithms_enabled():
        if torch.is_deterministic_algorithms_warn_only_enabled():
            text = "with trainer.deterministic warn, attention's backward pass stays nondeterministic on a GPU"
            yield Finding("warning", "settings", text, "trainer.deterministic", "set it to true")
            return
        if isinstance(module.rollouts, LocalEngine) and not isinstance(module.rollouts, TransformersEngine):
            text = (
                f"{type(module.rollouts).__name__} samples with kernels that are not deterministic, and would raise an error"
            )
            fix = "set it to TransformersEngine, or trainer.deterministic to null"
            yield Finding("error", "settings", text, "model.rollouts", fix)
    elif resumes:
        text = (
            "on a GPU a resumed run is not bit-identical to one that was never stopped: the default kernels of attention's "
            "backward pass add up in another order each time"
        )
        fix = "set it to true if that matters. Deterministic kernels are slower (docs/reliability.md)"
        yield Finding("note", "settings", text, "trainer.deterministic", fix)


def _text(version: Version) -> str:
    return f"{version[0]}.{version[1]}"
