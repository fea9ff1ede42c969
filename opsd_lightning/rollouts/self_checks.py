"""Checks of the built policy at the start of a run: batch invariance, and agreement of rollouts with scoring.

A model may compute wrong results in a batch (by its cache, positions or mask), or sample from another distribution than
the scored one. A run would then silently train on something else. A few passes over two short rows detect this.
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
from opsd_lightning.models.scoring import Scorer, check_head, score
from opsd_lightning.models.sharding import reshard_on_exit
from opsd_lightning.rollouts.base import LocalEngine, RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Sampling

#: Largest accepted difference of logits by the precision of the computation: the root mean square over the vocabulary,
#: divided by the standard deviation of the logits. Measured values are in `docs/troubleshooting.md`.
TOLERANCES = {torch.float32: 1e-3, torch.bfloat16: 0.25, torch.float16: 0.1}
# LLM.int8() selects the columns that it does not round from the whole batch.
_QUANTIZED = 0.5

_NEW_TOKENS = 6


class Agreement(NamedTuple):
    """Results of `check_policy`. Differences are in standard deviations of the logits.

    Args:
        batch: Difference between the logits of rows scored together and alone.
        shared: Difference between the logits of rows scored with a shared prompt and alone.
        rollout: Difference between the logits of the rollout and of scoring, or None if the engine does not expose them.
        agreed: Number of greedily sampled tokens that are also the most likely ones in scoring.
        tokens: Number of greedily sampled tokens.
        tolerance: Largest accepted difference.
    """

    batch: float
    shared: float
    rollout: float | None
    agreed: int
    tokens: int
    tolerance: float


def check_policy(
    model: PeftModel, engine: RolloutEngine | None = None, setting: str = "model.policy", every_adapter: bool = False
) -> Agreement:
    """Compare rows scored together, with a shared prompt and alone, and compare greedy rollouts with their scores.

    Weights, training modes and the state of random number generators are unchanged afterwards. Every rank must call and
    makes the same passes.

    Args:
        model: The policy, or the network of a teacher.
        engine: Rollout engine to check. If None, or not a `LocalEngine`, only scoring is checked.
        setting: Prefix of the model's settings, for errors.
        every_adapter: If True, refuse adapters on layers that these passes do not run, which ddp cannot train.

    Raises:
        ConfigError: A pass fails, or logits differ by more than the tolerance of the precision.
    """
    device = device_of(model)
    devices = [device] if device.type == "cuda" else []
    name = type(base_of(model)).__name__
    with (
        torch.random.fork_rng(devices=devices),
        torch.no_grad(),
        evaluating(model),
        reshard_on_exit(model),
        _explained(name, setting),
        _reached(model) as reached,
    ):
        check_head(model, setting)
        found = _compare_scores(model)
        if isinstance(engine, LocalEngine):
            rollout, agreed, tokens = _compare_rollouts(model, engine, found.tolerance)
            found = found._replace(rollout=rollout, agreed=agreed, tokens=tokens)
    _check_tolerance(
        f"{name}: the logits of a row depend on the other rows of its batch", found.batch, found.tolerance, setting
    )
    _check_tolerance(
        f"{name}: logits after a prompt that several rows share are wrong", found.shared, found.tolerance, setting
    )
    if found.rollout is not None:
        _check_tolerance(
            f"{name}: the logits of a rollout differ from those of scoring", found.rollout, found.tolerance, setting
        )
    if found.agreed < 0.95 * found.tokens:
        raise ConfigError(
            f"{name}: {found.tokens - found.agreed} of {found.tokens} greedily sampled tokens are not the likeliest scored",
            f"{setting}.attn_implementation",
            "Set it to eager or sdpa, or choose another model",
        )
    if getattr(base_of(model), "is_loaded_in_8bit", False):
        rank_zero_warn(
            f"{setting}.quantization: logits of 8-bit layers depend on the other rows of the batch, and differ here by "
            f"{found.batch:.2g} standard deviations from those of the row alone. Use load_in_4bit with bnb_4bit_quant_type "
            "nf4, which does not depend on the batch"
        )
    unreached = [layer for layer, ran in reached.items() if not ran]
    if every_adapter and unreached:
        raise ConfigError(
            f"{len(unreached)} layers of {name} have an adapter but do not run on every text, such as {unreached[0]}, and "
            "ddp waits for their gradients",
            "trainer.strategy",
            "Set it to ddp_find_unused_parameters_true, or exclude them in model.policy.lora.options.exclude_modules",
        )
    if unreached:
        rank_zero_warn(
            f"{setting}.lora: {len(unreached)} layers of {name} have an adapter but did not run on two short texts, such as "
            f"{unreached[0]}. Adapters of layers that never run do not train. Exclude them in "
            "model.policy.lora.options.exclude_modules"
        )
    return found


@torch.no_grad()
def agreement(model: PeftModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> tuple[int, int]:
    """Return how many greedily sampled tokens are also the most likely in scoring, and the number of all tokens."""
    if not any(completions):
        return 0, 0
    states = Scorer(model).score(prompts, completions)
    targets = torch.tensor([token for row in completions for token in row], device=device_of(model))
    return _count_most_likely(model, _logits(states), targets), len(targets)


def _count_most_likely(model: PeftModel, logits: Tensor, targets: Tensor) -> int:
    """Count the targets with the largest logit, up to differences within the tolerance of rounding."""
    picked = logits.gather(-1, targets[:, None])[:, 0]
    near = 4 * _tolerance(model, base_of(model).dtype) * logits.std(-1)
    return int((picked >= logits.max(-1).values - near).sum())


def _compare_scores(model: PeftModel) -> Agreement:
    prompts, completions = _rows(model)
    states, _ = score(model, prompts, completions)
    together = _logits(states).split([len(completion) for completion in completions])
    alone = [_logits(score(model, [p], [c])[0]) for p, c in zip(prompts, completions, strict=True)]
    tolerance = _tolerance(model, states.hidden.dtype)
    batch = _difference(together, alone, tolerance)
    # Each prompt once for two rows of different lengths.
    prompts, completions = prompts * 2, [*completions, completions[1][:2], completions[0][:3]]
    shared = _logits(Scorer(model).score(prompts, completions)).split([len(completion) for completion in completions])
    return Agreement(batch, _difference(shared[:2], alone, tolerance), None, 0, 0, tolerance)


def _compare_rollouts(model: PeftModel, engine: RolloutEngine, tolerance: float) -> tuple[float | None, int, int]:
    """Sample greedily from a short and a long prompt, and compare with scoring.

    Returns:
        Difference of the logits (see `Agreement`), number of tokens that are the most likely in scoring, number of tokens.
    """
    prompts, _ = _rows(model)
    if isinstance(engine, TransformersEngine) and engine.compile:  # takes long, and changes only rounding
        engine = copy.copy(engine)
        engine.compile = False
    seen: list[Tensor] = []
    with _logits_of_passes(model, seen):
        sampled = engine.generate(model, prompts, Sampling(max_new_tokens=_NEW_TOKENS, temperature=0.0), 0).completions
    states, targets = score(model, prompts, sampled)
    logits = _logits(states)
    agreed = _count_most_likely(model, logits, targets)
    # Rows in order of length keep their order until the first one ends.
    steps = min(len(seen), *map(len, sampled))
    if not steps or any(len(rows) != len(prompts) for rows in seen[:steps]):
        return None, agreed, len(targets)
    scored = [row[:steps] for row in logits.split([len(completion) for completion in sampled])]
    ours = list(torch.stack(seen[:steps], dim=1))
    return _difference(ours, scored, tolerance), agreed, len(targets)


def _rows(model: PeftModel) -> tuple[list[list[int]], list[list[int]]]:
    """Return a short and a long prompt with completions. The long one exceeds the attention window if that is small."""
    config: Any = base_of(model).config.get_text_config()
    windows = [getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size", "local_attention")]
    widest = max((window for window in windows if isinstance(window, int) and window <= 48), default=0)
    limit = getattr(base_of(model), "row_limit", None) or 10**6
    long = min(max(widest + 3, 19), max(limit - 8 - _NEW_TOKENS, 2))
    vocabulary = int(config.vocab_size)

    def tokens(count: int, start: int) -> list[int]:
        # Tokens from the middle of the vocabulary: its ends often hold control tokens and unused ones.
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


def _difference(ours: Sequence[Tensor], theirs: Sequence[Tensor], tolerance: float) -> float:
    """Return the largest difference between the logits of rows, each of shape [C, V].

    The difference of a token is the root mean square over the vocabulary, in standard deviations of the logits. The
    difference of a row is the maximum over its tokens in float32. In lower precision it is the median, since a mixture of
    experts may route single tokens to other experts.
    """
    found = []
    for row, other in zip(ours, theirs, strict=True):
        error = (row - other).square().mean(-1).sqrt() / other.std(-1).clamp(min=1e-6)
        error = error.nan_to_num(math.inf)
        found.append(float(error.max() if tolerance <= TOLERANCES[torch.float32] else error.median()))
    return max(found)


@contextmanager
def _logits_of_passes(model: PeftModel, seen: list[Tensor]) -> Iterator[None]:
    """Append the last logits of every row to ``seen`` in each pass of the model inside the context."""

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
    """Yield a dictionary from the names of layers with a trainable adapter to True if they ran inside the context."""

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
def _explained(name: str, setting: str) -> Iterator[None]:
    """Turn errors in a model's code into a ConfigError."""
    try:
        yield
    except (ConfigError, torch.OutOfMemoryError):
        raise
    except Exception as error:
        reason = (str(error).strip() or "no message").splitlines()[0]
        raise ConfigError(
            f"{name} fails on two short rows ({type(error).__name__}: {reason})",
            f"{setting}.model",
            "Choose a decoder-only causal language model of transformers that takes position_ids and a cache",
        ) from error


def _check_tolerance(problem: str, found: float, tolerance: float, setting: str) -> None:
    if not found <= tolerance:
        raise ConfigError(
            f"{problem} (by {found:.3g} standard deviations, where rounding gives at most {tolerance:g})",
            f"{setting}.model",
            f"Set {setting}.attn_implementation to eager or sdpa, or choose another model",
        )
