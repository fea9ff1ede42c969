"""States that predict completion tokens: with gradient for the student, and without for a teacher.

No pass spends much on padding: rows are packed where attention takes their lengths (flash attention), and grouped by
length otherwise; only the hidden states at completion tokens go on to the head. Without gradient, a prompt that
several completions follow is run once, and its cache serves them all.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from peft import PeftModel
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor
from torch.distributed.tensor import DTensor
from torch.func import functional_call
from transformers import DynamicCache
from transformers.cache_utils import DynamicLayer, LinearAttentionLayer

from opsd_lightning.models.packing import join, micro_batches, pad_left, repeated
from opsd_lightning.models.policy import base_of, below_head, device_of, evaluating, is_adapter_key
from opsd_lightning.types import TokenStates, UserError


def packs_rows(model: PeftModel) -> bool:
    """Whether the model's attention takes the lengths of rows packed into one (flash attention)."""
    # Not where a state runs on from row to row, as in linear attention and convolutions.
    return str(base_of(model).config._attn_implementation).startswith("flash_attention") and selectable_cache(model)


def split_rows(model: PeftModel, lengths: Sequence[int], token_budget: int) -> list[list[int]]:
    """Rows of these lengths as micro-batches for `score` (see `packing.micro_batches`)."""
    # What a further pass costs: about 40 tokens for SmolLM2-135M on two CPU cores (benchmarks/scaling.py). A GPU spends
    # some ten milliseconds on launching a pass's kernels, in which it would score about a thousand tokens.
    pass_tokens = 32 if device_of(model).type == "cpu" else 1024
    return micro_batches(lengths, token_budget, pass_tokens, packs_rows(model))


def score(
    model: PeftModel, prompts: Sequence[Sequence[int]], completions: Sequence[Sequence[int]]
) -> tuple[TokenStates, Tensor]:
    """States that predict each completion token under whatever adapter is active, in one pass, and those tokens.

    Args:
        model: The policy, in whatever mode it is in.
        prompts: B prompts.
        completions: B completions; all their tokens, T, are scored.

    Returns:
        Hidden states of shape [T, D] with the head that makes logits of them, and the targets, of shape [T].
    """
    rows = join(prompts, completions, device_of(model), packs_rows(model))
    # No attention mask: rows are padded on the right only, or packed (see packing.py).
    lengths = {} if rows.row_lengths is None else _row_lengths(rows.row_lengths, rows.input_ids.device)
    hidden = hidden_states(model, input_ids=rows.input_ids, position_ids=rows.position_ids, use_cache=False, **lengths)
    return states_of(model, hidden.flatten(0, 1)[rows.predictors]), rows.targets


@torch.no_grad()
def score_all(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    token_budget: int,
    agree: Callable[[int], int] = lambda passes: passes,
) -> TokenStates:
    """States that predict all completion tokens, without gradient, in as many passes as the budget asks for.

    Args:
        model: The policy; dropout and gradient checkpointing are off for the time.
        prompts: B prompts. One that occurs several times is run once.
        completions: B completions, with T tokens in all.
        token_budget: The most tokens, padding and cached ones included, that one pass works on.
        agree: From this rank's number of passes, the number that every rank makes: under sharding all must make as many.

    Returns:
        Hidden states of shape [T, D], row by row, with the head that makes logits of them.
    """
    groups = repeated(prompts) if selectable_cache(model) else []
    shared = {row for group in groups for row in group}
    single = [row for row in range(len(prompts)) if row not in shared]
    lengths = [len(prompt) + len(completion) for prompt, completion in zip(prompts, completions, strict=True)]
    alone = [[single[i] for i in batch] for batch in split_rows(model, [lengths[i] for i in single], token_budget)]
    together = []
    for batch in split_rows(model, [len(prompts[group[0]]) for group in groups], token_budget):
        picked = [groups[i] for i in batch]
        # The first token of a completion is predicted by its prompt, the last predicts nothing: the rest need a pass.
        rows = [row for group in picked for row in group if len(completions[row]) > 1]
        width = max(len(prompts[group[0]]) for group in picked)
        parts = split_rows(model, [width + len(completions[row]) for row in rows], token_budget)
        together.append((picked, [[rows[i] for i in part] for part in parts]))
    found: dict[int, Tensor] = {}
    passes = len(alone) + sum(1 + len(parts) for _, parts in together)
    missing = agree(passes) - passes
    with evaluating(model):
        for rows in alone:
            states, _ = score(model, [prompts[row] for row in rows], [completions[row] for row in rows])
            found |= zip(rows, states.hidden.split([len(completions[row]) for row in rows]), strict=True)
        for picked, parts in together:
            found |= _score_shared(model, prompts, completions, picked, parts)
        for _ in range(missing):
            score(model, [prompts[0][:1]], [[]])
    return states_of(model, torch.cat([found[row] for row in range(len(prompts))]))


def _score_shared(
    model: PeftModel,
    prompts: Sequence[Sequence[int]],
    completions: Sequence[Sequence[int]],
    groups: list[list[int]],
    parts: list[list[int]],
) -> dict[int, Tensor]:
    """States of the rows of some prompts: a pass over the prompts, then one over each part of the completions."""
    device = device_of(model)
    # On the left, so that completions follow their prompts at once: a gap would count in sliding windows.
    input_ids, mask, position_ids = pad_left([prompts[group[0]] for group in groups], device)
    cache = DynamicCache(config=base_of(model).config)
    hidden = hidden_states(
        model, input_ids=input_ids, attention_mask=mask, position_ids=position_ids, past_key_values=cache, use_cache=True
    )
    prompt_of = {row: index for index, group in enumerate(groups) for row in group}
    found = {row: hidden[index, -1:][: len(completions[row])] for row, index in prompt_of.items()}
    for rows in parts:
        which = torch.tensor([prompt_of[row] for row in rows], device=device)
        tails = join([completions[row][:1] for row in rows], [completions[row][1:] for row in rows], device)
        starts = torch.tensor([len(prompts[row]) for row in rows], device=device)
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
    """Whether the cache is one of keys and values, whose rows can be selected (not the state of a linear attention)."""
    layers = DynamicCache(config=base_of(model).config).layers
    return all(isinstance(layer, DynamicLayer) and not isinstance(layer, LinearAttentionLayer) for layer in layers)


def _select(cache: DynamicCache, rows: Tensor) -> DynamicCache:
    """A cache of some rows of another, which stays as it is."""
    selected = copy.copy(cache)
    selected.layers = [copy.copy(layer) for layer in cache.layers]
    selected.batch_select_indices(rows)
    return selected


def hidden_states(model: PeftModel, **inputs: Any) -> Tensor:
    """The last hidden states, before the head, of a pass that goes round the model's own forward."""
    base = base_of(model)
    if hasattr(base, "hidden_states"):  # sharded: only by this method are the weights gathered (see distributed.fsdp2)
        return base.hidden_states(**inputs)
    return below_head(base)(**inputs).last_hidden_state


def _row_lengths(lengths: Sequence[int], device: torch.device) -> dict[str, Any]:
    """What flash attention's variable-length kernels ask for."""
    ends = torch.tensor([0, *lengths], device=device).cumsum(0).to(torch.int32)
    return {"cu_seq_lens_q": ends, "cu_seq_lens_k": ends, "max_length_q": max(lengths), "max_length_k": max(lengths)}


def states_of(model: PeftModel, hidden: Tensor) -> TokenStates:
    """Hidden states with the head that makes logits of them."""
    return TokenStates(hidden, head_of(model), tuple(base_of(model).get_output_embeddings().parameters()))


def head_of(model: PeftModel, kept: Mapping[str, Tensor] | None = None) -> Callable[[Tensor], Tensor]:
    """The map from hidden states [rows, D] to logits [rows, V], with the model's own scale and soft cap.

    Args:
        model: The policy.
        kept: Weights that stand in the place of the head's own, as `moving_weights` gave them.
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
    """Copies of those of the head's weights that optimizer steps change: its adapters', or all in full fine-tuning.

    Every rank must call: sharded weights are gathered.
    """
    named = base_of(model).get_output_embeddings().named_parameters()
    moving = {name: p.detach() for name, p in named if p.requires_grad or is_adapter_key(name)}
    return {name: (p.full_tensor() if isinstance(p, DTensor) else p).clone() for name, p in moving.items()}


def has_adapted_head(model: PeftModel) -> bool:
    """Whether an adapter sits on the language-model head, so that each role has a head of its own."""
    head = base_of(model).get_output_embeddings()
    return isinstance(head, BaseTunerLayer) or any(is_adapter_key(name) for name, _ in head.named_parameters())


@torch.no_grad()
def check_head(model: PeftModel) -> None:
    """Compare our logits with the model's own on a few tokens.

    Raises:
        UserError: They differ, because this architecture does something between its hidden states and its logits that
            `head_of` does not know; or they are not finite.
    """
    prompt = [list(range(4, 10))]
    with evaluating(model):
        states, _ = score(model, [prompt[0][:1]], [prompt[0][1:]])
        ours = states.head(states.hidden).float()
        device = device_of(model)
        theirs = base_of(model)(input_ids=torch.tensor(prompt, device=device)[:, :-1]).logits[0].float()
    if not torch.isfinite(theirs).all():
        raise UserError(
            f"{type(base_of(model)).__name__} gives logits that are not finite, of which no divergence can be taken: is its "
            "checkpoint broken, or its padded vocabulary masked with -inf?"
        )
    tolerance = 1e-4 if states.hidden.dtype == torch.float32 else 5e-2
    if not torch.allclose(ours, theirs, rtol=tolerance, atol=tolerance * float(theirs.abs().max())):
        name = type(base_of(model)).__name__
        raise UserError(
            f"{name} does not make its logits from its hidden states and its head alone (largest difference "
            f"{float((ours - theirs).abs().max()):.3g}): this model is not supported yet"
        )
