"""Checks that the GPU computes what the CPU does, that a 4-bit policy trains, and that runs can be repeated."""

from __future__ import annotations

import importlib
import importlib.metadata
import os
import platform
import subprocess
from typing import Any

import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from gpu.machine import GIB, Losses, Machine, perturb, within
from gpu.runner import installed
from helpers.models import ARCHITECTURES, COMPLETIONS, PROMPTS
from opsd_lightning.callbacks.collapse_guard import CollapseGuard
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.health import Health
from opsd_lightning.callbacks.rollouts import RolloutTable
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.methods.step import StepCallback
from opsd_lightning.models.export import merge_adapter
from opsd_lightning.models.policy import LoRA, base_of, eos_ids, evaluating
from opsd_lightning.models.scoring import score
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.token_report import TokenReport
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher
from opsd_lightning.types import Sampling, TokenStates


def environment(machine: Machine, facts: Any) -> None:
    """Record the device, its driver and the versions of all packages."""
    properties = torch.cuda.get_device_properties(0)
    facts["device"] = properties.name
    facts["compute capability"] = f"{properties.major}.{properties.minor}"
    facts["memory GiB"] = round(properties.total_memory / GIB, 1)
    facts["free GiB"] = round(torch.cuda.mem_get_info()[0] / GIB, 1)
    facts["bfloat16"] = machine.bfloat16
    if not machine.imitated:
        facts["driver"] = _driver()
        torch.zeros(1, device=machine.device).add_(1).item()  # torch has kernels for this device
    facts["CUDA of torch"] = str(torch.version.cuda)
    facts["Python"] = platform.python_version()
    facts["CPU cores"] = os.cpu_count()
    for name in ("torch", "transformers", "peft", "lightning", "bitsandbytes", "datasets", "accelerate"):
        facts[name] = (
            getattr(importlib.import_module(name), "__version__", "unknown") if installed(name) else "not installed"
        )
    for name in ("vllm", "flash_attn", "kernels", "triton", "pytest"):
        facts[name] = _version(name) if installed(name) else "not installed"


def _version(module: str) -> str:
    try:
        return importlib.metadata.version(module.replace("_", "-"))
    except importlib.metadata.PackageNotFoundError:
        return "unknown"


def _driver() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=20, check=True).stdout.splitlines()[0].strip()
    except (OSError, subprocess.SubprocessError, IndexError):
        return "unknown"


def loss_and_gradients(machine: Machine, facts: Any) -> None:
    """Compare loss, measurements and the adapter's gradient with the CPU's, in float32, for every architecture."""
    for architecture in ARCHITECTURES:
        policy = machine.tiny_policy(architecture)
        found = {}
        for device in (torch.device("cpu"), machine.device):
            torch.manual_seed(0)
            model = policy.build()
            perturb(model)
            model.to(device)
            with evaluating(model):
                states, targets = score(model, PROMPTS, COMPLETIONS)
            teacher = TokenStates(states.hidden.detach() + 0.1, states.head)
            weights = torch.full((len(targets),), 1 / len(targets), device=device)
            loss, measured = DivergenceObjective()(states, teacher, targets, weights)
            loss.backward()
            gradient = torch.cat([p.grad.flatten().cpu() for p in model.parameters() if p.grad is not None])
            found[device.type] = (
                float(loss.detach()),
                gradient,
                {name: value.detach().cpu() for name, value in measured.items()},
            )
        (loss, gradient, measured), (loss_here, gradient_here, measured_here) = found["cpu"], found["cuda"]
        difference = float((gradient - gradient_here).norm() / gradient.norm())
        facts[architecture] = {"loss": abs(loss - loss_here) / abs(loss), "gradient": difference}
        assert gradient.norm() > 0, "there is no gradient to compare"
        assert abs(loss - loss_here) <= 1e-4 * abs(loss), f"{architecture}: the loss is {loss} on the CPU and {loss_here}"
        assert difference < 1e-3, f"{architecture}: the gradients differ by {difference:.2g}"
        for name, value in measured.items():
            torch.testing.assert_close(measured_here[name], value, rtol=1e-3, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}")


def greedy_rollouts(machine: Machine, facts: Any) -> None:
    """Compare greedy rollouts with ``generate`` of each prompt alone; the same seed gives the same samples."""
    model = machine.tiny_policy().build()
    perturb(model)
    model.to(machine.device)
    tokens = 5 if machine.imitated else 40
    prompts = [[40 + i % 30 for i in range(n)] for n in ((3, 17) if machine.imitated else (3, 17, 1, 9, 5, 30))]
    expected = []
    with torch.no_grad(), evaluating(model):
        for prompt in prompts:
            ids = torch.tensor([prompt], device=machine.device)
            row = base_of(model).generate(input_ids=ids, max_new_tokens=tokens, do_sample=False)[0, len(prompt) :].tolist()
            ends = [place for place, token in enumerate(row) if token in eos_ids(model)]
            expected.append(row[: ends[0] + 1] if ends else row)
    for name, settings in (
        ("all rows", {}),
        ("two rows at one time", {"max_rows": 2}),
        ("static cache", {"static_cache": True}),
    ):
        found = TransformersEngine(**settings).generate(model, prompts, Sampling(tokens, temperature=0), 0).completions
        same = sum(a == b for a, b in zip(found, expected, strict=True))
        facts[name] = f"{same} of {len(prompts)} equal"
        assert same >= len(prompts) - 1, f"{name}: {same} of {len(prompts)} rows equal"  # a tie may break another way
    samples = [TransformersEngine().generate(model, prompts, Sampling(tokens), seed).completions for seed in (1, 1, 2)]
    assert samples[0] == samples[1] != samples[2], "the seed does not decide the samples"


def first_steps(machine: Machine, facts: Any) -> None:
    """Compare the losses of the first optimizer steps with the CPU's: greedy rollouts, EMA teacher, float32."""
    found = {}
    for accelerator in ("cpu", "gpu"):
        module, data = machine.parts(machine.tiny_policy(), sampling=Sampling(6, temperature=0), teacher=EMATeacher(0.8))
        losses = Losses()
        machine.fit(
            module, data, f"first-{accelerator}", losses, accelerator=accelerator, max_steps=2 if machine.imitated else 3
        )
        found[accelerator] = losses.values
        facts[accelerator] = losses.values
    assert within(found["cpu"], found["gpu"], 1e-3), found


class _Look(StepCallback):
    """Callback that keeps weights and gradients of the first step."""

    def __init__(self) -> None:
        self.types: dict[str, str] = {}
        self.before: dict[str, torch.Tensor] = {}
        self.base: dict[str, torch.Tensor] = {}
        self.without: list[str] = []

    def on_step_scored(self, trainer: Any, pl_module: Any, record: Any) -> None:
        if self.before:
            return
        self.types = {name: str(rows[0].dtype) for name, rows in record.measured.items()}
        for name, parameter in pl_module.model.named_parameters():
            kept = self.before if parameter.requires_grad else self.base
            kept[name] = parameter.detach().clone()
            if parameter.requires_grad and (parameter.grad is None or ("lora_B" in name and not bool(parameter.grad.any()))):
                self.without.append(name)


def four_bit_training(machine: Machine, facts: Any) -> None:
    """Train in the recipe's precision: every adapter weight moves at 5e-6, the base stays, metrics are float32."""
    policy = machine.tiny_policy(
        lora=LoRA(r=4, alpha=8, dropout=0.05), dtype=machine.dtype, quantization=machine.nf4, gradient_checkpointing=True
    )
    module, data = machine.parts(policy, optimizer=lambda p: torch.optim.AdamW(p, lr=5e-6))
    look = _Look()
    machine.fit(module, data, "four-bit", look, precision=machine.precision)
    module.model.to(machine.device)  # the end of a fit moves it to the CPU
    after = {name: parameter.detach() for name, parameter in module.model.named_parameters()}
    moved = [float((after[name] != before).float().mean()) for name, before in look.before.items() if "lora_B" in name]
    facts["lora_B weights that moved"] = f"{100 * sum(moved) / len(moved):.1f} %"
    wrong = {name: kind for name, kind in look.types.items() if kind != "torch.float32"}
    facts["metrics not in float32"] = wrong or "none"
    assert not look.without, f"{len(look.without)} weights have no gradient, such as {look.without[0]}"
    assert sum(moved) > 0.9 * len(moved), "weights of lora_B did not move"
    changed = [name for name, before in look.base.items() if not torch.equal(after[name], before)]
    assert not changed, f"{len(changed)} weights of the base have changed, such as {changed[0]}"
    assert not wrong, f"measured in another dtype than float32: {wrong}"


def _adapters(module: Any) -> dict[str, torch.Tensor]:
    return {key: value.detach().cpu().clone() for key, value in module.state_dict().items()}


def _largest_difference(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> float:
    return max(float((one[key].float() - other[key].float()).abs().max()) for key in one)


def _modes(machine: Machine) -> dict[str, dict[str, Any]]:
    """Return the settings of a run as configured, and with the deterministic kernels that docs/reliability.md describes."""
    modes: dict[str, dict[str, Any]] = {"as configured": {"deterministic": None, "top_p": 0.95}}
    if not machine.imitated:  # it computes on the CPU, whose kernels are deterministic
        modes["trainer.deterministic: true"] = {"deterministic": True, "top_p": 0.95}
    return modes


def _record(machine: Machine, facts: Any, mode: str, difference: float) -> None:
    """Record the difference of two runs, and fail if it should be none."""
    facts[mode] = "bit-identical" if difference == 0 else f"weights differ by up to {difference:.2g}"
    exact = machine.imitated or mode != "as configured"
    assert difference == 0 or not exact, f"{mode}: weights differ by up to {difference:.2g}"


def resume(machine: Machine, facts: Any) -> None:
    """Compare a resumed run with one that was not interrupted, in the recipe's precision, with dropout and an EMA teacher."""
    policy = machine.tiny_policy(lora=LoRA(r=4, alpha=8, dropout=0.3), dtype=machine.dtype, quantization=machine.nf4)
    steps = 2 if machine.imitated else 4
    for mode, settings in _modes(machine).items():
        sampling = Sampling(5 if machine.imitated else 16, 1.1, settings["top_p"], 20, n=2)

        def run(name: str, *callbacks: Any, sampling: Any = sampling, mode: Any = settings, **more: Any) -> Any:
            module, data = machine.parts(policy, teacher=EMATeacher(0.8), sampling=sampling)
            more |= {"precision": machine.precision, "deterministic": mode["deterministic"]}
            machine.fit(module, data, name, *callbacks, **more)
            return _adapters(module)

        folder = machine.folder / f"kept-{settings['deterministic']}"
        keep = ModelCheckpoint(folder, filename="kept", every_n_train_steps=steps // 2, save_top_k=1)
        whole = run("whole", max_steps=steps)
        run("interrupted", keep, max_steps=steps // 2, enable_checkpointing=True)
        torch.rand(9, device=machine.device)  # the generator's state must come from the checkpoint or the seed
        resumed = run("resumed", max_steps=steps, ckpt_path=keep.best_model_path, weights_only=True)
        _record(machine, facts, mode, _largest_difference(whole, resumed))


def determinism(machine: Machine, facts: Any) -> None:
    """Compare two runs of the same settings, as configured and with deterministic kernels, on rows of some length."""
    policy = machine.tiny_policy(lora=LoRA(r=4, alpha=8, dropout=0.1), dtype=machine.dtype)
    tokens, steps = (5, 1) if machine.imitated else (64, 2)
    for mode, settings in _modes(machine).items():
        weights = []
        for _ in range(2):
            sampling = Sampling(tokens, 1.1, settings["top_p"], 20, n=2)
            module, data = machine.parts(policy, token_budget=2048, sampling=sampling)
            more = {"precision": machine.precision, "deterministic": settings["deterministic"]}
            machine.fit(module, data, "determinism", max_steps=steps, **more)
            weights.append(_adapters(module))
        _record(machine, facts, mode, _largest_difference(*weights))


def callbacks_and_export(machine: Machine, facts: Any) -> None:
    """Fit with every callback of the recipes, validate student and teacher, and export; merge the adapter and compare."""
    folder = machine.folder / "callbacks"
    policy = machine.tiny_policy(lora=LoRA(r=4, alpha=8), dtype=machine.dtype, quantization=machine.nf4)
    module, data = machine.parts(policy, evaluate_teacher=True, teacher=FixedTeacher(), sampling=Sampling(6, n=2))
    callbacks = [AdapterExport(), RolloutTable(), TokenReport(every_n_steps=1), Health(), CollapseGuard(), RunReport()]
    machine.fit(
        module, data, "callbacks", *callbacks, precision=machine.precision, logger=CSVLogger(folder), limit_val_batches=1.0,
        val_check_interval=1, check_val_every_n_epoch=None, max_steps=1 if machine.imitated else 2,
    )  # fmt: skip
    made = sorted({path.name for path in folder.rglob("*") if path.suffix in (".html", ".safetensors")})
    facts["files"] = made
    assert {"report.html", "tokens.html", "adapter_model.safetensors"} <= set(made), made
    if not machine.imitated:
        adapter = next(folder.rglob("adapter_model.safetensors")).parent
        merge_adapter(policy, adapter, folder / "merged", dequantize=True)
        facts["merged"] = sorted(path.name for path in (folder / "merged").iterdir())
