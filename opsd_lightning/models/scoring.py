"""Scoring: hidden states that predict completion tokens, with gradient for the student and without for a teacher.

Flash attention gets packed rows. Otherwise rows of similar length are grouped, so that a pass contains little padding. Only
the hidden states at completion tokens reach the head. Without gradient, a prompt with several completions is run once, and
its key-value cache serves them all.
"""

from __future__ import annotations

import copy
import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any, Protocol

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from opsd_lightning.models.packing import join, micro_batches, pad_left, repeated, to_device
from opsd_lightning.models.policy import base_of, below_head, device_of, evaluating, is_adapter_key
from opsd_lightning.models.token_budget import TokenBudget
from opsd_lightning.types import ConfigError, TokenStates


def packs_rows(model: PeftModel) -> bool:
    """Return True if attention takes the lengths of rows packed into one sequence (flash attention)."""
    # Linear attention and convolutions would carry state from one row to the next.
    return uses_flash_attention(base_of(model)) and selectable_cache(model)


def uses_flash_attention(base: Any) -> bool:
    """Return True if a model uses flash attention (see `is_flash_attention`)."""
    return is_flash_attention(base.config._attn_implementation)


def is_flash_attention(implementation: str | None) -> bool:
    """Return True for ``flash_attention_2`` and newer, and for kernels from the hub (``kernels-community/flash-attn2``)."""
    # A kernel's name may have a repository before it, and a revision and a function after it.
    return re.search(r"flash[-_]att(n|ention)[^/]*$", str(implementation)) is not None


def split_rows(model: PeftModel, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Split rows of these lengths into micro-batches for `score` (see `packing.micro_batches`)."""
    # The cost of a further pass in tokens: about 40 for SmolLM2-135M on two CPU cores (benchmarks/scaling.py). A GPU needs
    # some ten milliseconds to launch a pass's kernels, in which it would score about a thousand tokens.
    pass_tokens = 32 if device_of(model).type == "cpu" else 1024
    return micro_batches(lengths, token_budget, pass_tokens, packs_rows(model))


def score(
    model: PeftModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[TokenStates, Tensor]:
    """Score completions in one pass under the active adapter, with gradient if autograd is enabled.

    Args:
        model: The policy. Its mode (training or evaluation) stays as it is.
        prompts: B prompts.
        completions: B completions, T tokens in total.

    Returns:
        Hidden states of shape [T, D] that predict each completion token, with the language-model head; and the target
        tokens, of shape [T].
    """
    rows = join(prompts, completions, device_of(model), packs_rows(model))
    # No attention mask: rows are padded on the right only, or packed (see packing.py).
    lengths = {} if rows.row_lengths is None else _row_lengths(rows.row_lengths, rows.input_ids.device)
    hidden = hidden_states(model, input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **lengths)
    return states_of(model, hidden.flatten(0, 1)[rows.predictors]), rows.targets


class Ranks(Protocol):
    """Sums and maxima over ranks. See `distributed.collectives.TrainerRanks`."""

    def sum(self, values: Sequence[float]) -> list[float]: ...

    def max(self, values: Sequence[float]) -> list[float]: ...

    @property
    def repeats_passes(self) -> bool:
        """True if a rank may repeat a pass after an error, without the others."""
        ...


class SingleRank:
    """The collectives of a process that runs alone."""

    repeats_passes = True

    def sum(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]

    def max(self, values: Sequence[float]) -> list[float]:
        return [float(value) for value in values]


_SINGLE = SingleRank()


class Scorer:
    """Score completions without gradient, in passes of bounded size.

    A pass for which the device has too little memory is repeated in smaller parts (see `token_budget.TokenBudget`).

    Args:
        model: The policy, or another causal LM. Methods use the adapter that is active when they are called.
        token_budget: Limit on the tokens of one pass, padding and cached tokens included. At least 1. Scorers that share a
            `TokenBudget` share its current limit.
        ranks: Ranks that must make the same number of passes, as sharding requires.

    Example::

        states = Scorer(model, token_budget=4096).score(prompts, completions)  # all tokens of all completions
        logits = states.head(states.hidden[:8])  # [8, V]
    """

    def __init__(self, model: PeftModel, token_budget: int | TokenBudget = 8192, ranks: Ranks = _SINGLE) -> None:
        self.model = model
        self.budget = token_budget if isinstance(token_budget, TokenBudget) else TokenBudget(token_budget)
        self.ranks = ranks

    def of(self, model: PeftModel) -> Scorer:
        """Return a scorer of another model with the same budget and ranks."""
        return Scorer(model, self.budget, self.ranks)

    @torch.no_grad()
    def score(self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]) -> TokenStates:
        """Return the hidden states that predict each completion token. Every rank must call.

        Dropout and gradient checkpointing are off during the passes.

        Args:
            prompts: B prompts. A prompt that several rows share is run once.
            completions: B completions, T tokens in total.

        Returns:
            Hidden states of shape [T, D], row by row, and the language-model head.

        Raises:
            ConfigError: The device has too little memory for a row.
        """
        found: dict[int, Tensor] = {}
        with evaluating(self.model):
            self.budget.attempt(lambda: self._score_rest(prompts, completions, found), repeats=self.ranks.repeats_passes)
        return states_of(self.model, torch.cat([found[row] for row in range(len(prompts))]))

    def _score_rest(
        self, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]], found: dict[int, Tensor]
    ) -> None:
        """Score the rows that are not found yet, and add their states."""
        model = self.model
        rest = [row for row in range(len(prompts)) if row not in found]
        groups = repeated([prompts[row] for row in rest]) if selectable_cache(model) else []
        groups = [[rest[i] for i in group] for group in groups]
        shared = {row for group in groups for row in group}
        single = [row for row in rest if row not in shared]
        lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
        alone = [[single[i] for i in batch] for batch in self._split([lengths[i] for i in single])]
        together = []
        for batch in self._split([len(prompts[group[0]]) for group in groups]):
            picked = [groups[i] for i in batch]
            # The prompt predicts the first token of a completion, and the last token predicts nothing: the rest need a pass.
            rows = [row for group in picked for row in group if len(completions[row]) > 1]
            width = max(len(prompts[group[0]]) for group in picked)
            parts = self._split([width + len(completions[row]) for row in rows])
            together.append((picked, [[rows[i] for i in part] for part in parts]))
        passes = len(alone) + sum(1 + len(parts) for _, parts in together)
        missing = self.most_passes(passes) - passes  # before the passes, which under sharding wait for other ranks, too
        for rows in alone:
            states, _ = score(model, [prompts[row] for row in rows], [completions[row] for row in rows])
            found |= zip(rows, states.hidden.split([len(completions[row]) for row in rows]), strict=True)
        for picked, parts in together:
            found |= _score_shared(model, prompts, completions, picked, parts)
        for _ in range(missing):
            score(model, [prompts[0][:1]], [[]])

    def micro_batches(self, lengths: Sequence[int]) -> list[list[int]]:
        """Split rows into the micro-batches of a training pass. Every rank must call.

        Args:
            lengths: Tokens of each row, prompt and completion.

        Returns:
            Row indices of each pass. A rank with fewer passes than another gets empty ones at the end.
        """
        plan = self._split(lengths)
        return plan + [[] for _ in range(self.most_passes(len(plan)) - len(plan))]

    def most_passes(self, passes: int) -> int:
        """All-reduce (max) the number of passes."""
        return int(self.ranks.max([passes])[0])

    def _split(self, lengths: Sequence[int]) -> list[list[int]]:
        plan = split_rows(self.model, lengths, self.budget.tokens)
        self.budget.note(lengths, plan)
        return plan


def _score_shared(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    groups: list[list[int]],
    parts: list[list[int]],
) -> dict[int, Tensor]:
    """Score rows that share prompts: one pass over the prompts, then one over each part of the completions."""
    device = device_of(model)
    # Padded on the left, so that no gap separates a completion from its prompt: sliding windows would count it.
    input_ids, mask, position_ids = pad_left([prompts[group[0]] for group in groups], device)
    cache = DynamicCache(config=base_of(model).config)
    hidden = hidden_states(
        model, input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
    )
    prompt_of = {row: index for index, group in enumerate(groups) for row in group}
    found = {row: hidden[index, -1:][: len(completions[row])] for row, index in prompt_of.items()}
    for rows in parts:
        which = to_device([prompt_of[row] for row in rows], device)
        tails = join([completions[row][:1] for row in rows], [completions[row][1:] for row in rows], device)
        starts = to_device([len(prompts[row]) for row in rows], device)
        hidden = hidden_states(
            model,
            input_ids=tails.input_ids,
            attention_mask=torch.cat([mask[which], torch.ones_like(tails.input_ids)], dim=1),
            position_ids=starts[:, None] + tails.position_ids,
            past_key_values=_select(cache, which),
            use_cache=True,
        )
        for row, states in zip(rows, hidden, strict=True):
            found[row] = torch.cat([found[row], states[: len(completions[row]) - 1]])
    return found


def selectable_cache(model: PeftModel) -> bool:
    """Return True if the cache holds keys and values only, whose rows can be selected (no linear-attention state)."""
    layers = DynamicCache(config=base_of(model).config).layers
    return all(isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) for layer in layers)


def _select(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """Return a cache with some rows of another, which does not change."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def hidden_states(model: PeftModel, **inputs: Any) -> Tensor:
    """Run the decoder without the head and return the last hidden states."""
    base = base_of(model)
    if hasattr(base, "hidden_states"):  # sharded: only this method gathers the weights (see distributed.fsdp2)
        return base.hidden_states(**inputs)
    return below_head(base)(**inputs).last_hidden_state


def _row_lengths(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """Return the arguments of flash attention's variable-length kernels."""
    ends = to_device([0, *lengths], device).cumsum(0).to(torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def states_of(model: PeftModel, hidden: Tensor) -> TokenStates:
    """Return hidden states together with the language-model head."""
    return TokenStates(hidden, head_of(model), tuple(base_of(model).get_output_embeddings().parameters()))


def head_of(model: PeftModel, kept: Mapping[str, Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """Return the map from hidden states [rows, D] to logits [rows, V], with the model's scale and soft cap.

    Args:
        model: The policy.
        kept: Weights that replace the head's own, as `moving_weights` returned them.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    head = base.get_output_embeddings()
    scale = (getattr(config, "logit_scale", None) or 1.0) / (getattr(config, "logits_scaling", None) or 1.0)
    cap = getattr(config, "final_logit_softcapping", None)

    def logits(hidden: Tensor) -> Tensor:
        out = functional_call(head, dict(kept), (hidden,)) if kept else head(hidden)
        out = out if scale == 1.0 else out * scale
        return out if cap is None else cap * torch.tanh(out / cap)

    return logits


def moving_weights(model: PeftModel) -> dict[str, Tensor]:
    """Copy the trainable weights of the head: those of its adapter, or all weights in full fine-tuning.

    Every rank must call, because sharded weights are gathered.
    """
    named = base_of(model).get_output_embeddings().named_parameters()
    moving = {name: p.detach() for name, p in named if p.requires_grad or is_adapter_key(name)}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in moving.items()}


def has_adapted_head(model: PeftModel) -> bool:
    """Return True if the language-model head has an adapter, so that student and teacher have different heads."""
    head = base_of(model).get_output_embeddings()
    return isinstance(head, BaseTunerLayer) or any(is_adapter_key(name) for name, _ in head.named_parameters())


@torch.no_grad()
def check_head(model: PeftModel, setting: str = "model.policy") -> None:
    """Compare logits from `head_of` with the model's own on a few tokens.

    Args:
        model: The policy, or the network of a teacher.
        setting: Prefix of the model's settings, for errors.

    Raises:
        ConfigError: They differ, because the architecture computes something between hidden states and logits that
            `head_of` does not know, or they are not finite.
    """
    prompt = [list(range(4, 10))]
    with evaluating(model):
        states, _ = score(model, [prompt[0][:1]], [prompt[0][1:]])
        ours = states.head(states.hidden)
        theirs = base_of(model)(input_ids=to_device(prompt, device_of(model))[:, :-1]).logits[0]
    # The dtype of the logits is that of the computation. Under autocast the hidden states can be in float32.
    full = ours.dtype in (torch.float32, torch.float64) and states.hidden.dtype in (torch.float32, torch.float64)
    tolerance = 1e-4 if full else 5e-2
    ours, theirs = ours.float(), theirs.float()
    name = type(base_of(model)).__name__
    if not torch.isfinite(theirs).all():
        raise ConfigError(
            f"{name} computes logits that are not finite, for which no divergence is defined",
            f"{setting}.model",
            "Check for a broken checkpoint or a padded vocabulary masked with -inf, or choose another model",
        )
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())):
        raise ConfigError(
            f"{name} does not compute its logits from the hidden states and the head alone (largest difference "
            f"{float((ours - theirs).abs().max()):.3g}), which is not supported",
            f"{setting}.model",
            "Choose another model",
        )
