"""Trial training steps: real steps of bounded size, whose time and peak memory are measured. No weight changes.

Lightning runs the method's own ``training_step`` on a few questions with short completions, with an optimizer that leaves
the weights alone. Time and memory of a step of the run are extrapolated linearly in the length of completions, and in the
number of rows if a whole batch would take too long.

On a GPU, a decoding step of few rows takes the time of its kernel launches, whatever the number of rows. It takes longer
only where reading the weights, keys and values does: that time is computed from the measured bandwidth.
"""

from __future__ import annotations

import dataclasses
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch import Callback, Trainer
from torch.utils.data import DataLoader

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.doctor.memory import Step
from opsd_lightning.methods.mixed import MixedOPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import is_adapter_key
from opsd_lightning.rollouts.base import LocalEngine, RolloutEngine
from opsd_lightning.types import PromptBatch, Rollouts, Sampling

#: Tokens of the completions of trial steps, at most.
SHORT_TOKENS, TRIAL_TOKENS = 4, 16
# A larger step is tried if the smaller ones predict that it takes at most this long.
_LARGER_SECONDS = 15.0


class TrialStep(NamedTuple):
    """One measured step.

    Args:
        rows: Completions.
        prompt: Tokens of the longest student's prompt.
        completion: Tokens of the longest completion, which is the number of decoding steps.
        tokens: Tokens that were scored: prompts and completions of all rows, of both roles.
        rollout_seconds: Time of sampling. 0 where completions are not sampled in this process.
        scoring_seconds: Time of everything else: the teacher's passes, the student's, and their backward passes.
        peak_bytes: Peak memory of the CUDA device. 0 on other devices.
    """

    rows: int
    prompt: int
    completion: int
    tokens: int
    rollout_seconds: float
    scoring_seconds: float
    peak_bytes: int


class Reading(NamedTuple):
    """Bytes that a decoding step on a GPU reads, and the measured bandwidth of the GPU.

    Args:
        weights: Bytes of the weights that are sampled with.
        cached: Bytes of the keys and values of one token of a row.
        bandwidth: Bytes per second.
    """

    weights: int
    cached: float
    bandwidth: float

    def seconds(self, rows: int, tokens: float) -> float:
        """Return the least time of a decoding step of some rows with some tokens each, prompt included."""
        return (self.weights + rows * tokens * self.cached) / self.bandwidth


class Speed(NamedTuple):
    """Measured times from which the time of a step of any size is computed.

    Args:
        decoding: Seconds of one decoding step, by the number of rows that are sampled at one time. Empty without sampling.
        prefill: Seconds of reading the prompt of one row before sampling.
        scoring: Seconds for each scored token.
        reading: Bytes that a decoding step reads. None on a CPU, where rows of few tokens already show its time.
    """

    decoding: dict[int, float]
    prefill: float
    scoring: float
    reading: Reading | None = None

    def rollout_seconds(self, rows: int, rows_at_once: int, completion: float, prompt: float = 0.0) -> float:
        """Return the seconds of sampling ``rows`` completions of a length, ``rows_at_once`` at one time."""
        at_once = min(rows, rows_at_once)
        each = self._decoding_seconds(at_once)
        if self.reading is not None:
            each = max(each, self.reading.seconds(at_once, prompt + completion / 2))
        return rows * self.prefill + rows / at_once * completion * each

    def bound(self, rows_at_once: int, completion: float, prompt: float) -> str:
        """Return the limit of a decoding step on a GPU: ``kernel launches`` or ``memory bandwidth``."""
        assert self.reading is not None
        reading = self.reading.seconds(rows_at_once, prompt + completion / 2)
        return "memory bandwidth" if reading >= self._decoding_seconds(rows_at_once) else "kernel launches"

    def _decoding_seconds(self, rows: int) -> float:
        """Return the seconds of one decoding step. Interpolated and extrapolated linearly in the number of rows."""
        (fewer, one), (more, other) = min(self.decoding.items()), max(self.decoding.items())
        if rows <= fewer:
            return one
        if more > fewer:
            slope = max(other - one, 0.0) / (more - fewer)
        else:
            # Without a second measurement: as if rows were decoded one after the other on a CPU, an upper bound.
            slope = one / fewer if self.reading is None else 0.0
        return one + slope * (rows - fewer)


def run_trials(
    module: Any,
    rows: PromptBatch,
    questions: int,
    most_questions: int,
    step: Step,
    device: torch.device,
    read: tuple[int, float] = (0, 0.0),
) -> tuple[list[TrialStep], Speed]:
    """Run trial steps and derive `Speed` from them.

    Args:
        module: A `PolicyModule` with its model. Its weights, settings and random state are restored.
        rows: The training rows.
        questions: Questions of the small steps, at least 1.
        most_questions: Upper limit on the questions of a larger step, which is chosen to take about 15 seconds.
        step: Sizes of a step of the run.
        device: The device of the model.
        read: Bytes of the weights that are sampled with, and of the keys and values of a token. Used on CUDA.

    Returns:
        The measured steps, and what they say about steps of other sizes.
    """
    questions = min(questions, len(rows.examples))
    small = _batch(rows, questions)
    _, short, long = _run(module, [small] * 3, [SHORT_TOKENS, SHORT_TOKENS, TRIAL_TOKENS], device)  # the first one warms up
    steps = [short, long]
    affordable = int(_LARGER_SECONDS / max((long.rollout_seconds + long.scoring_seconds) / questions, 1e-9))
    if (larger := min(most_questions, affordable, len(rows.examples))) > questions:
        steps += _run(module, [_batch(rows, larger)], [TRIAL_TOKENS], device)
    sampled = steps
    if not _samples(module) and step.rows_at_once:  # in evaluation only
        sampled = [_sample(module, small.student, length) for length in (SHORT_TOKENS, TRIAL_TOKENS)]
    reading = Reading(*read, copy_bandwidth(device)) if device.type == "cuda" else None
    return steps, speed_of(steps, sampled, step.rows_at_once, reading)


def copy_bandwidth(device: torch.device, size: int = 2**26, repeats: int = 5) -> float:
    """Measure the bytes per second that a GPU reads and writes in a copy.

    Args:
        device: A CUDA device.
        size: Bytes of the copy. Larger than a GPU's cache.
        repeats: Number of copies. The first one is not timed.
    """
    source = torch.empty(size, dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    seconds = []
    for _ in range(repeats + 1):
        torch.cuda.synchronize(device)
        start = time.perf_counter()
        target.copy_(source)
        torch.cuda.synchronize(device)
        seconds.append(time.perf_counter() - start)
    return 2 * size / max(min(seconds[1:]), 1e-9)


def speed_of(
    steps: Sequence[TrialStep], sampled: Sequence[TrialStep], rows_at_once: int, reading: Reading | None = None
) -> Speed:
    """Derive the times of steps of other sizes.

    Args:
        steps: Measured steps. The last one has the most rows.
        sampled: Measured steps with sampling. The first two have the same rows, and the first has shorter completions. A
            third step may have more rows.
        rows_at_once: Completions that the engine samples at one time. 0 if nothing is sampled in this process.
        reading: As in `Speed`.
    """
    scoring = steps[-1].scoring_seconds / max(steps[-1].tokens, 1)
    if not rows_at_once:
        return Speed({}, 0.0, scoring, reading)
    short, long, largest = sampled[0], sampled[1], sampled[-1]
    more, seconds = long.completion - short.completion, long.rollout_seconds - short.rollout_seconds
    each = seconds / more if more > 0 and seconds > 0 else long.rollout_seconds / max(long.completion, 1)
    prefill = max(short.rollout_seconds - short.completion * each, 0.0) / short.rows
    at_once = min(long.rows, rows_at_once)
    decoding = {at_once: each * at_once / long.rows}
    if (at_once := min(largest.rows, rows_at_once)) not in decoding:
        rest = max(largest.rollout_seconds - largest.rows * prefill, 0.0)
        decoding[at_once] = rest / max(largest.completion, 1) * at_once / largest.rows
    return Speed(decoding, prefill, scoring, reading)


def time_facts(
    module: Any,
    data: OPSDDataModule,
    trainer: Trainer,
    step: Step,
    trials: tuple[Sequence[TrialStep], Speed],
    traces: Sequence[int],
) -> dict[str, Any]:
    """Return the seconds of a step, of all steps and of a validation.

    Args:
        module: A `PolicyModule`.
        data: Set up.
        trainer: As configured.
        step: Sizes of a step of the run.
        trials: Results of `run_trials`.
        traces: Tokens of each trace, as an estimate of completions.
    """
    measured, speed = trials
    usual = min(sum(traces) / len(traces) if traces else step.completion, step.completion)
    lengths = data.lengths["train"]
    roles = [sum(student for student, _ in lengths) / len(lengths)]
    if _has_teacher(module):
        roles.append(sum(teacher or student for student, teacher in lengths) / len(lengths))

    def phases(completion: float) -> dict[str, float]:
        found = {}
        if _samples(module) and speed.decoding:
            found["rollouts"] = speed.rollout_seconds(step.rows, step.rows_at_once, completion, roles[0])
        tokens = step.rows * sum(prompt + completion for prompt in roles)
        return found | {"scoring": speed.scoring * tokens}

    lowest, highest = phases(usual), phases(step.completion)
    found: dict[str, Any] = {
        "measured": [trial._asdict() for trial in measured],
        "step_seconds": [sum(lowest.values()), sum(highest.values())],
        "phases": highest,
        "rows": step.rows,
        "usual_completion": usual,
        "longest_completion": step.completion,
    }
    if speed.reading is not None and "rollouts" in highest:
        found["decoding_bound"] = speed.bound(min(step.rows, step.rows_at_once), step.completion, roles[0])
    steps, updates = trainer.max_steps, module.updates_per_batch
    if steps < 0 and trainer.max_epochs is not None and 0 <= trainer.max_epochs < 1000:
        steps = trainer.max_epochs * (len(data.rows["train"].examples) // (data.batch_size * trainer.world_size)) * updates
    if steps >= 0:
        found |= {"steps": steps, "run_seconds": [seconds * steps / updates for seconds in found["step_seconds"]]}
    if step.eval_rows and speed.decoding and "val" in data.rows:
        rows = -(-len(data.rows["val"].examples) // trainer.world_size) * module.evaluator.sampling.n
        evaluated = 2 if module.evaluator.teacher is not None else 1
        at_once = min(step.rows_at_once or step.eval_rows, step.eval_rows)
        found["validation_seconds"] = evaluated * speed.rollout_seconds(rows, at_once, step.eval_completion, roles[0])
    return found


def measured_memory(estimate: Callable[[Step], dict[str, int]], step: Step, trial: TrialStep) -> dict[str, int]:
    """Extrapolate the measured peak memory of a trial step to a step of the run.

    The estimate is used only for the difference between the two steps, and for the optimizer state, which a trial step does
    not have.

    Args:
        estimate: Returns the estimated bytes of a step, as `memory` does.
        step: Sizes of a step of the run.
        trial: The measured step.
    """
    whole, tried = estimate(step), estimate(step.shortened(trial.rows, trial.completion, trial.prompt))
    total = trial.peak_bytes + whole["total"] - tried["total"] + whole["optimizer state"]
    return {"peak_bytes": trial.peak_bytes, "rows": trial.rows, "completion": trial.completion, "extrapolated_bytes": total}


# -- running steps -----------------------------------------------------------------------------------------------------


def _batch(rows: PromptBatch, questions: int) -> PromptBatch:
    """Return the batch of some questions, spread over all rows."""
    picked = [place * len(rows.examples) // questions for place in range(questions)]
    return PromptBatch(
        [rows.student[i] for i in picked],
        [rows.teacher[i] for i in picked],
        [rows.examples[i] for i in picked],
        [True] * questions,
        traces=[rows.traces[i] for i in picked] if rows.traces else [],
    )


def _run(module: Any, batches: Sequence[PromptBatch], lengths: Sequence[int], device: torch.device) -> list[TrialStep]:
    """Run one training step on each batch, with completions of at most the length that goes with it."""
    lengths = [min(length, module.sampling.max_new_tokens) for length in lengths]
    record = _Record(batches, lengths, device)
    batches = [batch._replace(traces=[t[:n] for t in batch.traces]) for batch, n in zip(batches, lengths, strict=True)]
    with _unchanged(module), torch.random.fork_rng([device] if device.type == "cuda" else []):
        trainer = Trainer(
            accelerator="gpu" if device.type == "cuda" else "cpu", devices=1, precision=module.trainer.precision,
            fast_dev_run=len(batches) * module.updates_per_batch, callbacks=[record], enable_progress_bar=False,
            enable_model_summary=False,
        )  # fmt: skip
        module.make_optimizer, module.make_scheduler = _NoUpdate, None
        if isinstance(module, MixedOPSDModule):
            module.trace_share = 0.0  # steps that sample, which take longer
        if not isinstance(module.rollouts, LocalEngine):
            module.rollouts = _FirstTokens()
        try:
            loader: Any = DataLoader(batches, batch_size=None, collate_fn=lambda batch: batch)  # type: ignore[arg-type]
            trainer.fit(module, loader)
        finally:
            module.model.to(device)  # the end of a fit moves it to the CPU
    return record.steps


@contextmanager
def _unchanged(module: Any) -> Iterator[None]:
    """Restore the module's attributes, adapter weights and trainer after the block, and remove gradients."""
    attributes = dict(vars(module))
    # In full fine-tuning no weight moves: the optimizer does not, and no teacher averages weights.
    adapters = {name: p.detach().clone() for name, p in module.model.named_parameters() if is_adapter_key(name)}
    try:
        yield
    finally:
        vars(module).clear()
        vars(module).update(attributes)
        with torch.no_grad():
            for name, parameter in module.model.named_parameters():
                parameter.grad = None
                if name in adapters:
                    parameter.copy_(adapters[name])


class _Record(Callback):
    """Bounds the completions of each step and keeps its measurements."""

    def __init__(self, batches: Sequence[PromptBatch], lengths: Sequence[int], device: torch.device) -> None:
        self.lengths, self.device = lengths, device
        self.on_cuda = device.type == "cuda"
        self.steps: list[TrialStep] = []

    def on_train_batch_start(self, trainer: Trainer, pl_module: Any, batch: PromptBatch, batch_idx: int) -> None:
        pl_module.sampling = dataclasses.replace(pl_module.sampling, max_new_tokens=self.lengths[batch_idx])
        if self.on_cuda:
            torch.cuda.reset_peak_memory_stats(self.device)

    def on_train_batch_end(self, trainer: Trainer, pl_module: Any, outputs: Any, batch: PromptBatch, batch_idx: int) -> None:
        logged = {name: float(value) for name, value in trainer.callback_metrics.items()}
        n = pl_module.sampling.n if _samples(pl_module) else 1
        rows = len(batch.student) * n
        roles = [batch.student]
        if _has_teacher(pl_module):
            roles.append([teacher or student for student, teacher in zip(batch.student, batch.teacher, strict=True)])
        self.steps.append(
            TrialStep(
                rows,
                max(map(len, batch.student)),
                int(logged["train/completion_tokens_max"]),
                n * sum(len(prompt) for prompts in roles for prompt in prompts)
                + round(len(roles) * rows * logged["train/completion_tokens"]),
                logged["time/rollout_seconds"],
                logged["time/scoring_seconds"],
                int(torch.cuda.max_memory_allocated(self.device)) if self.on_cuda else 0,
            )
        )


class _NoUpdate(torch.optim.Optimizer):
    """An optimizer that leaves the parameters alone."""

    def __init__(self, parameters: Iterable[Any]) -> None:
        super().__init__(parameters, {"lr": 1.0})

    def step(self, closure: Any = None) -> Any:
        return None if closure is None else closure()


class _FirstTokens(RolloutEngine):
    """Rollout engine that returns the first tokens of the prompts. It replaces an engine that samples in another process."""

    def generate(self, model: Any, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        rows = [list(prompt[: sampling.max_new_tokens]) for prompt in prompts for _ in range(sampling.n)]
        return Rollouts(rows, [True] * len(rows), sampling.n)


def _sample(module: Any, prompts: Sequence[Sequence[int]], length: int) -> TrialStep:
    """Measure the sampling of evaluation completions, for a method that trains without sampling."""
    start = time.perf_counter()  # the engine returns lists of numbers, so that the device has finished
    rollouts = module.rollouts.generate(module.model, prompts, Sampling(max_new_tokens=length, temperature=0.0), 0)
    seconds = time.perf_counter() - start
    return TrialStep(len(prompts), 0, max(map(len, rollouts.completions)), 0, seconds, 0.0, 0)


def _samples(module: Any) -> bool:
    return not isinstance(module, SFTModule)


def _has_teacher(module: Any) -> bool:
    return bool(module.teachers)
