"""Checks of configs/qwen3_1.7b_qlora.yaml on a model of its shape: first steps, memory against the doctor's estimates."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from gpu.machine import GIB, Losses, Machine, PeakMemory, perturb, random_rows
from opsd_lightning.cli.command import main
from opsd_lightning.doctor.examination import examine
from opsd_lightning.models.scoring import Scorer
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Rollouts, Sampling

#: A measured peak may be above the estimate by this factor and this many GiB: fragments, and workspaces of libraries.
FACTOR, REST_GIB = 1.15, 0.75
CALLBACKS = ["--trainer.callbacks+=gpu.machine.PeakMemory", "--trainer.callbacks+=gpu.machine.Losses"]


class RandomTokens(RolloutEngine):
    """Rollout engine that returns random completions of full length at once, so that scoring is measured alone."""

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = random_rows(len(prompts) * sampling.n, sampling.max_new_tokens, seed % 2**31)
        return Rollouts(rows, [False] * len(rows), sampling.n)


def run_recipe(machine: Machine, facts: Any, arguments: list[str], completion: int) -> dict[str, float]:
    """Fit with these arguments, record losses, seconds and peaks, and compare the peaks with the doctor's estimates.

    Returns:
        The metrics that the run logged last.
    """
    estimated = examine(arguments, with_model=False).facts["memory"]["bytes"]
    machine.clean()
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always")
        cli = main(["fit", *arguments, *CALLBACKS])
    # Those of this package say what it did by itself, such as fewer rows at one time after running out of memory.
    facts["warnings"] = sorted({str(warning.message)[:300] for warning in seen if "opsd_lightning" in warning.filename})
    (peaks,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, PeakMemory))
    (losses,) = (callback for callback in cli.trainer.callbacks if isinstance(callback, Losses))
    logged = {name: float(value) for name, value in cli.trainer.callback_metrics.items()}
    facts["losses"] = losses.values
    facts["tokens of a completion"] = logged["train/completion_tokens"]
    facts["seconds of a step"] = dict(peaks.seconds)
    for phase, found in (compared := compare(peaks.peak_bytes, estimated)).items():
        facts[f"peak of {phase}, GiB"] = found
    facts["reserved GiB"] = torch.cuda.memory_reserved() / GIB
    assert len(losses.values) == cli.trainer.global_step > 0 and all(map(math.isfinite, losses.values)), losses.values
    assert logged["train/completion_tokens_max"] <= completion
    above = too_large(compared, 0.0 if machine.imitated else REST_GIB)
    assert not above, f"{above} take more memory than estimated: {compared}"
    return logged


def kept_bytes(estimated: Mapping[str, int]) -> int:
    """Return the estimated bytes that all phases keep, without the reserve, which the allocator does not count."""
    return sum(size for name, size in estimated.items() if ":" not in name and name not in ("total", "reserve"))


def phase_bytes(estimated: Mapping[str, int], phase: str) -> int:
    """Return the estimated bytes of a phase beside what is kept."""
    return sum(size for name, size in estimated.items() if name.startswith(f"{phase}:"))


def compare(peaks: Mapping[str, int], estimated: Mapping[str, int]) -> dict[str, dict[str, float]]:
    """Return the measured and the estimated peak of each phase in GiB.

    Args:
        peaks: Bytes by phase, as `PeakMemory` measures them.
        estimated: Bytes by purpose, as the doctor estimates them.
    """
    found = {}
    for phase, peak in peaks.items():
        own = phase_bytes(estimated, "rollout" if phase == "rollout" else "scoring")
        found[phase] = {"measured": peak / GIB, "estimated": (kept_bytes(estimated) + own) / GIB}
    return found


def too_large(compared: dict[str, dict[str, float]], rest: float = REST_GIB) -> list[str]:
    """Return the phases whose measured peak is above the estimate by more than `FACTOR` and ``rest`` GiB."""
    return [name for name, found in compared.items() if found["measured"] > FACTOR * found["estimated"] + rest]


def recipe_first_steps(machine: Machine, facts: Any) -> None:
    """Fit the recipe with its own settings, callbacks and rows, and short completions."""
    completion = 6 if machine.imitated else 64
    arguments = machine.recipe_arguments("recipe", completion, steps=1 if machine.imitated else 2)
    arguments.append("--model.rollouts.logprob_tolerance=0.5")  # compares the sampler with the trainer
    logged = run_recipe(machine, facts, arguments, completion)
    facts["log-probabilities of sampler and trainer, nats"] = {
        "mean difference": logged["train/rollout_logprob_difference"],
        "largest": logged["train/rollout_logprob_difference_max"],
    }
    facts["rollout tokens a second"] = logged["time/rollout_tokens_per_second"]
    facts["scoring tokens a second"] = logged["time/scoring_tokens_per_second"]
    made = {path.name for path in (machine.folder / "recipe").rglob("*") if path.is_file()}
    assert {"adapter_model.safetensors", "report.html"} <= made, made


def recipe_full_length(machine: Machine, facts: Any) -> None:
    """Score, and step on, 32 completions of 1,024 tokens: the recipe's full size, without the time of sampling them."""
    arguments = machine.recipe_arguments("full", machine.completion, steps=1 if machine.imitated else 2)
    run_recipe(machine, facts, [*arguments, "--model.rollouts=gpu.recipe.RandomTokens"], machine.completion)


def memory_of_rollouts(machine: Machine, facts: Any) -> None:
    """Measure the last tokens of the largest rollouts: a step's 32 rows of 1,280 tokens, a validation's 64 of 2,304.

    All rows have one long prompt, which is computed once, so that keys and values have their full size after a few tokens.
    """
    arguments = machine.recipe_arguments("rollouts", machine.completion, steps=1)
    arguments += [
        f"--model.eval_sampling.max_new_tokens={2 * machine.completion}",
        f"--data.eval_batch_size={machine.rows // 2}",
    ]
    estimated = examine(arguments, with_model=False).facts["memory"]["bytes"]
    model = machine.build(machine.recipe_policy())
    perturb(model, 0.01)
    sizes = {
        "rollout": (machine.rows, machine.prompt + machine.completion),
        "validation": (2 * machine.rows, machine.prompt + 2 * machine.completion),
    }
    problems = []
    for phase, (rows, columns) in sizes.items():
        found = {"estimated GiB beside the weights": phase_bytes(estimated, phase) / GIB}
        try:
            found |= _rollout(machine, model, rows, columns)
        except torch.OutOfMemoryError as error:
            problems.append(f"{phase}: {rows} rows of {columns} tokens do not fit ({str(error).splitlines()[0]})")
        facts[phase] = found
        if found.get("GiB beside the weights", 0.0) > FACTOR * found["estimated GiB beside the weights"] + REST_GIB:
            problems.append(f"{phase} takes more than estimated: {found}")
    assert not problems, "; ".join(problems)


def _rollout(machine: Machine, model: Any, rows: int, columns: int) -> dict[str, float]:
    """Sample the last tokens of rows of this many tokens, and return the peak and the seconds."""
    new = 3 if machine.imitated else 16
    found: list[Rollouts] = []
    took: list[float] = []

    def sample() -> None:
        with machine.autocast():
            sampling = Sampling(new, 1.0, 0.95, n=rows)
            found.append(TransformersEngine().generate(model, random_rows(1, columns - new), sampling, 0))

    peak = machine.peak(lambda: took.append(machine.seconds(sample)))
    assert len(found[0].completions) == rows
    return {"GiB beside the weights": peak / GIB, "seconds": took[0]}


def little_memory(machine: Machine, facts: Any) -> None:
    """Roll out and score with 0.6 of the memory that they take: both go on in smaller parts, and scores stay."""
    model = machine.build(machine.recipe_policy())
    perturb(model, 0.01)
    rows, columns, new = (8, 40, 3) if machine.imitated else (machine.rows, machine.prompt + machine.completion, 16)
    prompt, completions = random_rows(1, columns - new), random_rows(rows, columns // 2, seed=1)
    samples: list[Rollouts] = []
    scores: list[torch.Tensor] = []
    actions = {
        "rollout": lambda: samples.append(
            TransformersEngine(max_rows=rows, rollout_copy=False).generate(
                model, prompt, Sampling(new, 1.0, 0.95, n=rows), 0
            )
        ),
        "scoring": lambda: scores.append(
            Scorer(model, rows * columns).score(random_rows(rows, columns // 2), completions).hidden.float()
        ),
    }
    for name, action in actions.items():
        with machine.autocast():
            needed = machine.peak(action)
            with machine.free_memory(int(0.6 * needed)), warnings.catch_warnings(record=True) as seen:
                warnings.simplefilter("always")
                action()
        messages = sorted({str(warning.message)[:200] for warning in seen if issubclass(warning.category, UserWarning)})
        facts[name] = {"GiB taken": needed / GIB, "warnings": messages}
        assert any("memory" in message for message in messages), f"{name}: it did not run out of memory"
    assert len(samples[1].completions) == rows and all(samples[1].completions)
    facts["largest relative difference of a state"] = difference = float((scores[0] - scores[1]).norm() / scores[0].norm())
    assert difference < 0.05, f"scores in smaller parts differ by {difference:.2g}"


def doctor(machine: Machine, facts: Any) -> None:
    """Run the doctor on the recipe with the model: no error, and an extrapolated peak and time of a full step."""
    arguments = machine.recipe_arguments("doctor", machine.completion, steps=100)
    found = examine(arguments, examples=2)
    errors = [f"{finding.part}: {finding.text}" for finding in found.findings if finding.level == "error"]
    memory, time = found.facts.get("memory", {}), found.facts.get("time", {})
    if "measured" in memory:
        facts["peak of a full step, GiB"] = {"estimated": memory["bytes"]["total"] / GIB,
                                             "extrapolated": memory["measured"]["extrapolated_bytes"] / GIB}  # fmt: skip
    facts["seconds of a full step"] = time.get("phases", {})
    facts["seconds of 100 steps"] = time.get("run_seconds", [])
    facts["findings"] = [f"{finding.level} {finding.part}: {finding.text}"[:200] for finding in found.findings]
    assert not errors, "; ".join(errors)[:800]
