"""Checks of the built policy at the start of a run: rows do not depend on their batch, and rollouts are what is scored.

A model may be right alone and wrong in a batch (its cache, its positions, its mask), or sample another distribution than it
is scored with. Such a run trains on something else in silence. A few passes over two short rows tell.
"""

from __future__ import annotations

import copy
import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from lightning.pytorch.utilities import rank_zero_warn
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn

from opsd_lightning.models.policy import base_of, device_of, evaluating, is_adapter_key
from opsd_lightning.models.scoring import check_head, score, score_all
from opsd_lightning.models.sharding import reshard_on_exit
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Sampling, UserError

#: How far logits may be apart, by the precision that is computed in: root of the mean square over the vocabulary, divided
#: by the logits' standard deviation. See `docs/troubleshooting.md` for what is measured.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
# LLM.int8() chooses the columns that it does not round from the whole batch.
_QUANTIZED = 0.5

_NEW_TOKENS = 6


class Agreement(NamedTuple):
    """Differences that were found, as multiples of the logits' standard deviation.

    Args:
        batch: Difference between rows scored together and rows scored alone.
        shared: Difference between rows whose prompt is run once and rows scored alone.
        rollout: Of logits in the rollout from logits in scoring; None where the engine does not show them.
        agreed: Greedily sampled tokens that are the likeliest when scored, too.
        tokens: Greedily sampled tokens.
        tolerance: The most that is accepted.
    """

    batch: float
    shared: float
    rollout: float | None
    agreed: int
    tokens: int
    tolerance: float


def samples_here(engine: RolloutEngine) -> bool:
    """Return whether an engine samples in this process, and not in a server that would have to be started."""
    return isinstance(engine, (TransformersEngine, ContinuousBatchingEngine))


def check_policy(
    model: PeftModel, engine: RolloutEngine | None = None, setting: str = "model.policy", every_adapter: bool = False
) -> Agreement:
    """Compare rows scored together, with a shared prompt and alone, and greedy rollouts with their scores.

    Weights, modes and random numbers are the same after as before. Every rank must call: all make the same passes.

    Args:
        model: The policy, or a teacher's network.
        engine: What samples. Only scoring is checked where None, or where it samples in another process.
        setting: Where the model stands in the configuration, for messages.
        every_adapter: Refuse an adapter on a layer that these passes never reach, which ddp cannot train.

    Raises:
        ConfigError: A pass fails, or its logits differ by more than the precision explains.
    """
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    name = type(base_of(model)).__name__
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        evaluating(model),
        reshard_on_exit(model),
        _refusing(name, setting),
        _reached(model) as reached,
    ):
        check_head(model)
        found = _scoring(model)
        if engine is not None and samples_here(engine):
            rollout, agreed, tokens = _sampling(model, engine, found.tolerance)
            found = found._replace(rollout=rollout, agreed=agreed, tokens=tokens)
    _refuse(f"{name}: the logits of a row change with the other rows of its batch", found.batch, found.tolerance, setting)
    _refuse(f"{name}: logits behind a prompt that several rows share are others", found.shared, found.tolerance, setting)
    if found.rollout is not None:
        _refuse(f"{name}: the logits of a rollout are not those of scoring", found.rollout, found.tolerance, setting)
    if found.agreed < 0.95 * found.tokens:
        raise ConfigError(
            f"{name}: {found.tokens - found.agreed} of {found.tokens} greedily sampled tokens are not the likeliest scored",
            f"{setting}.attn_implementation",
            "Set it to eager or sdpa, or choose another model",
        )
    if getattr(base_of(model), "is_loaded_in_8bit", False):
        rank_zero_warn(
            f"{setting}.quantization: 8-bit layers round activations, and choose what they do not round from the whole "
            f"batch. Logits of a row differ by {found.batch:.2g} standard deviations from those of the row alone. Use "
            "load_in_4bit with bnb_4bit_quant_type nf4, which does not depend on the batch"
        )
    unreached = [layer for layer, ran in reached.items() if not ran]
    if every_adapter and unreached:
        raise ConfigError(
            f"{len(unreached)} layers of {name} have an adapter and do not run on every text, such as {unreached[0]}, and "
            "ddp waits for their gradients",
            "trainer.strategy",
            "Set it to ddp_find_unused_parameters_true, or leave them out by model.policy.lora.options.exclude_modules",
        )
    if unreached:
        rank_zero_warn(
            f"{setting}.lora: {len(unreached)} layers of {name} have an adapter and did not run on two short texts, such as "
            f"{unreached[0]}: if they never run, their adapters stay as they are. Leave them out by "
            "model.policy.lora.options.exclude_modules"
        )
    return found


@torch.no_grad()
def agreement(model: PeftModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Count how many greedily sampled tokens are also the likeliest when scored, and how many there are."""
    if not any(completions):
        return 0, 0
    states = score_all(model, prompts, completions, 8192)
    targets = torch.tensor([token for row in completions for token in row], device=device_of(model))
    return _likeliest(model, _logits(states), targets), len(targets)


def _likeliest(model: PeftModel, logits: Tensor, targets: Tensor) -> int:
    """Count how many of the targets have the largest logit. A tie, or two that rounding tells apart, is no disagreement."""
    picked = logits.gather(-1, targets[:, None])[:, 0]
    near = 4 * _tolerance(model, base_of(model).dtype) * logits.std(-1)
    return int((picked >= logits.max(-1).values - near).sum())


def _scoring(model: PeftModel) -> Agreement:
    prompts, completions = _rows(model)
    states, _ = score(model, prompts, completions)
    together = _logits(states).split([len(completion) for completion in completions])
    alone = [_logits(score(model, [p], [c])[0]) for p, c in zip(prompts, completions, strict=True)]
    tolerance = _tolerance(model, states.hidden.dtype)
    batch = _distance(together, alone, tolerance)
    # Each prompt once for two rows of different lengths.
    prompts, completions = prompts * 2, [*completions, completions[1][:2], completions[0][:3]]
    shared = _logits(score_all(model, prompts, completions, 8192)).split([len(completion) for completion in completions])
    return Agreement(batch, _distance(shared[:2], alone, tolerance), None, 0, 0, tolerance)


def _sampling(model: PeftModel, engine: RolloutEngine, tolerance: float) -> tuple[float | None, int, int]:
    """Sample greedily from a short and a long prompt; also return how many tokens agree with scoring, of how many."""
    prompts, _ = _rows(model)
    if getattr(engine, "compile", False):  # takes long, and changes rounding alone
        engine = copy.copy(engine)
        engine.compile = False  # type: ignore[attr-defined]
    seen: list[Tensor] = []
    with _logits_of_passes(model, seen):
        sampled = engine.generate(model, prompts, Sampling(max_new_tokens=_NEW_TOKENS, temperature=0.0), 0).completions
    states, targets = score(model, prompts, sampled)
    logits = _logits(states)
    agreed = _likeliest(model, logits, targets)
    # Rows of ascending length keep their places until the first one ends.
    steps = min(len(seen), *map(len, sampled))
    if not steps or any(len(rows) != len(prompts) for rows in seen[:steps]):
        return None, agreed, len(targets)
    scored = [row[:steps] for row in logits.split([len(completion) for completion in sampled])]
    ours = list(torch.stack(seen[:steps], dim=1))
    return _distance(ours, scored, tolerance), agreed, len(targets)


def _rows(model: PeftModel) -> tuple[list[list[int]], list[list[int]]]:
    """A short and a long prompt and completion, of ordinary tokens; the long ones pass a window that is not too wide."""
    config: Any = base_of(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention")]
    widest = max((window for window in windows if isinstance(window, int) and window <= 48), default=0)
    limit = getattr(base_of(model), "row_limit", None) or 10**6
    long = min(max(widest + 3, 19), max(limit - 8 - _NEW_TOKENS, 2))
    vocabulary = int(config.vocab_size)

    def tokens(count: int, start: int) -> list[int]:
        # A fixed stride over the middle of the vocabulary: its ends hold control tokens and unused ones.
        return [vocabulary // 4 + (start + 7919 * i) % max(vocabulary // 2, 1) for i in range(count)]

    short = min(5, long)
    return [tokens(short, 1), tokens(long, 3)], [tokens(7, 11), tokens(4, 17)]


def _tolerance(model: PeftModel, dtype: torch.dtype) -> float:
    base = base_of(model)
    if torch.is_autocast_enabled(device_of(model).type):
        dtype = torch.get_autocast_dtype(device_of(model).type)
    found = max(TOLERANCES.get(d, 0.0) for d in (dtype, base.dtype, torch.float32))
    return max(found, _QUANTIZED) if getattr(base, "is_loaded_in_8bit", False) else found


def _logits(states: Any) -> Tensor:
    return states.head(states.hidden).float()


def _distance(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> float:
    """Largest distance of two rows' logits [C, V]: root mean square over the vocabulary, in their standard deviations.

    Of a row's tokens the farthest counts in float32, and the median in low precision, where a mixture of experts may route
    single tokens to other experts.
    """
    found = []
    for row, other in zip(ours, theirs, strict=True):
        error = (row - other).square().mean(-1).sqrt() / other.std(-1).clamp(min=1e-6)
        error = error.nan_to_num(math.inf)
        found.append(float(error.max() if tolerance <= TOLERANCES[torch.float32] else error.median()))
    return max(found)


@contextmanager
def _logits_of_passes(model: PeftModel, seen: list[Tensor]) -> Iterator[None]:
    """The last logits of every row of each pass of the whole model, head included."""

    def keep(module: Any, inputs: Any, output: Any) -> None:
        if isinstance(logits := getattr(output, "logits", None), Tensor) and logits.dim() == 3:
            seen.append(logits[:, -1].detach().float())

    handle = base_of(model).register_forward_hook(keep)
    try:
        yield
    finally:
        handle.remove()


@contextmanager
def _reached(model: PeftModel) -> Iterator[dict[str, bool]]:
    """The layers with an adapter that trains, and whether they ran inside."""

    def trains(module: nn.Module) -> bool:
        own = (key for key, parameter in module.named_parameters() if parameter.requires_grad)
        return isinstance(module, BaseTunerLayer) and any(map(is_adapter_key, own))

    layers = {name: module for name, module in model.named_modules() if trains(module)}
    found = dict.fromkeys(layers, False)

    def mark(name: str) -> Callable[..., None]:
        def hook(module: Any, inputs: Any, output: Any) -> None:
            found[name] = True

        return hook

    handles = [module.register_forward_hook(mark(name)) for name, module in layers.items()]
    try:
        yield found
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def _refusing(name: str, setting: str) -> Iterator[None]:
    """Errors of a model's own code as one message."""
    try:
        yield
    except UserError:
        raise
    except torch.OutOfMemoryError:
        raise
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise ConfigError(
            f"{name} fails on two short rows ({type(error).__name__}: {reason})",
            f"{setting}.model",
            "Choose a decoder-only causal language model of transformers that takes position_ids and a cache",
        ) from error


def _refuse(problem: str, found: float, tolerance: float, setting: str) -> None:
    if not found <= tolerance:
        raise ConfigError(
            f"{problem} (by {found:.3g} standard deviations, where {tolerance:g} is rounding)",
            f"{setting}.model",
            f"Set {setting}.attn_implementation to eager or sdpa, or choose another model",
        )
