"""Checks of speed: tokens a second of each engine and setting, kernels a token, and waits for the device."""

from __future__ import annotations

import shutil
from typing import Any

import torch

from gpu.machine import Machine, per_item, perturb, random_rows
from gpu.recipe import RandomTokens
from gpu.runner import Skip
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.rollouts.base import LocalEngine
from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Sampling

#: Most waits for the device: for each decoded token, and for each micro-batch of an update.
WAITS_A_TOKEN, WAITS_A_PASS = 2.0, 3.0

#: The engines that sample in this process, by the label of their settings. Every setting is measured at some value.
ENGINES: dict[str, tuple[type[LocalEngine], dict[str, Any]]] = {
    "as in the recipe": (TransformersEngine, {}),
    "8 rows at one time": (TransformersEngine, {"max_rows": 8}),
    "adapter never merged": (TransformersEngine, {"merge_adapter": False}),
    "without a copy of the policy": (TransformersEngine, {"rollout_copy": False}),
    "with log-probabilities": (TransformersEngine, {"logprob_tolerance": 1.0}),
    "static cache": (TransformersEngine, {"static_cache": True}),
    "continuous batching": (ContinuousBatchingEngine, {}),
    "continuous batching, half of the memory": (ContinuousBatchingEngine, {"max_memory_percent": 0.25}),
    "continuous batching, adapter never merged": (ContinuousBatchingEngine, {"merge_adapter": False}),
    "continuous batching, CUDA graphs": (ContinuousBatchingEngine, {"options": {"use_cuda_graph": True}}),
}
#: Measured in a process of its own, since compilation takes a minute.
COMPILED: tuple[type[LocalEngine], dict[str, Any]] = (TransformersEngine, {"static_cache": True, "compile": True})
#: Settings that have no speed on one GPU.
NOT_MEASURED = {"gather_weights", "max_importance_ratio"}


def decoding(machine: Machine, model: Any, engine: LocalEngine, tokens: int) -> dict[str, float]:
    """Measure a decoding step from two rollouts of different lengths, sampled as in the recipe and under its autocast."""
    prompts = [row[: machine.prompt - place % 4] for place, row in enumerate(random_rows(machine.rows, machine.prompt))]
    few = max(tokens // 4, 2)

    def sample(length: int) -> None:
        with machine.autocast():
            engine.generate(model, prompts, Sampling(length, 1.1, 0.95, 20), 0)

    if not machine.imitated:
        sample(2)  # warms up
    short, long = (machine.seconds(lambda n=length: sample(n)) for length in (few, tokens))
    # Where other work disturbs so short a measurement, the whole rollout counts.
    step = per_item(short, long, few, tokens) if long > short else long / tokens
    return {
        "tokens a second": machine.rows / step,
        "ms for a token of each row": 1e3 * step,
        "s for 1,024 tokens": short + (1024 - few) * step,
    }


def engines(machine: Machine, facts: Any) -> None:
    """Measure the tokens a second of each engine and setting, on NF4 and on bfloat16 weights."""
    failed = []
    for weights, quantized in (("NF4", True), (machine.dtype, False)):
        policy = machine.recipe_policy(quantized)
        model = machine.build(policy)
        perturb(model, 0.01)
        for label, (kind, settings) in ENGINES.items():
            name = f"{weights}, {label}"
            if machine.imitated and not quantized and settings:
                continue  # which says the same as on NF4
            if machine.imitated and kind is ContinuousBatchingEngine:
                facts[name] = "not on the imitation, which does not reach the thread that it samples in"
                continue
            tokens = 3 if machine.imitated else 64 if quantized else 32
            try:
                engine = kind(**settings)
                engine.check(policy, machine.precision, machine.device)  # as before a run
                facts[name] = decoding(machine, model, engine, tokens)
            except ConfigError as error:
                facts[name] = f"refused: {error.problem[:160]}"
            except Exception as error:  # so that the other engines are measured
                facts[name] = f"failed: {type(error).__name__}: {str(error)[:160]}"
                failed.append(name)
            machine.clean()
        del model
        machine.clean()
    assert not failed, f"failed: {'; '.join(failed)}"


def compiled_decoding(machine: Machine, facts: Any) -> None:
    """Measure compiled decoding, and the time of its compilation, on bfloat16 weights."""
    if machine.imitated:
        raise Skip("there is nothing to compile for on the imitation")
    if shutil.which("cc") is None and shutil.which("gcc") is None:
        raise Skip("compilation needs a C compiler")
    model = machine.build(machine.recipe_policy(quantized=False))
    perturb(model, 0.01)
    kind, settings = COMPILED
    engine = kind(**settings)
    facts["s of the first rollout"] = machine.seconds(
        lambda: engine.generate(model, random_rows(machine.rows, machine.prompt), Sampling(8, 1.1, 0.95, 20), 0)
    )
    facts["compiled"] = decoding(machine, model, engine, 48)
    facts["not compiled"] = decoding(machine, model, kind(**{**settings, "compile": False}), 24)


def kernels_and_waits(machine: Machine, facts: Any) -> None:
    """Count kernels and waits of a decoded token, and waits of a micro-batch."""
    model = machine.build(machine.recipe_policy())
    perturb(model, 0.01)
    few, many = (2, 4) if machine.imitated else (4, 12)
    prompts = random_rows(machine.rows, machine.prompt)

    def sample(length: int) -> None:
        with machine.autocast():
            TransformersEngine().generate(model, prompts, Sampling(length, 1.1, 0.95, 20), 0)

    sample(2)  # warms up
    counts = [machine.kernels(lambda n=length: sample(n)) for length in (few, many)]
    facts["kernels a decoded token"] = per_item(*(float(sum(count.values())) for count in counts), few, many)
    facts["most frequent"] = {name[:60]: per_item(counts[0][name], n, few, many) for name, n in counts[1].most_common(8)}
    waits = []
    for length in (few, many):
        with machine.waits() as found:
            sample(length)
        waits.append(found)
    facts["waits a decoded token"] = token = per_item(*(float(sum(found.values())) for found in waits), few, many)
    facts["where"] = {place[-70:]: per_item(waits[0][place], n, few, many) for place, n in waits[1].most_common(4)}
    passes = _waits_of_updates(machine)
    facts["waits of an update, by its micro-batches"] = passes
    (few, short), (many, long) = sorted(passes.items())
    facts["waits a micro-batch"] = each = per_item(short, long, few, many)
    assert token <= WAITS_A_TOKEN, f"{token:.1f} waits a decoded token"
    assert each <= WAITS_A_PASS, f"{each:.1f} waits a micro-batch"


def _waits_of_updates(machine: Machine) -> dict[int, int]:
    """Count the waits of an update on the same rows, in one micro-batch and in several."""
    found: dict[int, int] = {}
    for budget in (4096, 1):
        policy = machine.tiny_policy(dtype=machine.dtype, quantization=machine.nf4, gradient_checkpointing=True)
        module, data = machine.parts(policy, rollouts=RandomTokens(), sampling=Sampling(6, n=2), token_budget=budget)
        counted: list[int] = []
        update = module.update

        def counting(*args: Any, update: Any = update, counted: list[int] = counted) -> None:
            with machine.waits() as places:
                update(*args)
            counted.append(sum(places.values()))

        module.update = counting  # type: ignore[method-assign]
        machine.fit(module, data, "waits", precision=machine.precision, max_steps=1 if machine.imitated else 2)
        assert isinstance(module, PolicyModule)
        found[4 if budget == 1 else 1] = counted[-1]  # two questions with two completions each
    return found


def throughput(machine: Machine, facts: Any) -> None:
    """Measure the peak of matrix products and of reads from memory, by which the other numbers can be judged."""
    size, count = (64, 2**12) if machine.imitated else (8192, 2**28)
    for dtype in (torch.float32, torch.bfloat16):
        a, b = (torch.randn(size, size, device=machine.device, dtype=dtype) for _ in range(2))
        a @ b
        seconds = min(machine.seconds(lambda a=a, b=b: a @ b) for _ in range(3))
        facts[f"matmul TFLOP/s, {str(dtype).removeprefix('torch.')}"] = 2 * size**3 / seconds / 1e12
    numbers = torch.ones(count, device=machine.device)
    numbers.sum()
    seconds = min(machine.seconds(numbers.sum) for _ in range(3))
    facts["reads GB/s"] = numbers.nbytes / seconds / 1e9
    small = torch.ones(16, device=machine.device)
    launches = 32 if machine.imitated else 2000

    def launch() -> None:
        for _ in range(launches):
            small.add_(1.0)

    launch()
    facts["microseconds a launch"] = 1e6 * min(machine.seconds(launch) for _ in range(3)) / launches
