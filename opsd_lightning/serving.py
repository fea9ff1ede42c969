"""What both vLLM engines share: versions of the adapter on disk, what is asked of vLLM and what comes back, and ranks that
succeed or fail together.
"""

from __future__ import annotations

import hashlib
import secrets
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, TypeVar

import torch
import torch.distributed as dist
from peft import PeftModel
from torch import Tensor

from opsd_lightning.export import remove_weights, write_weights
from opsd_lightning.policy import TEACHER
from opsd_lightning.rollouts import Sampling
from opsd_lightning.tokens import cut_at_eos
from opsd_lightning.types import Rollouts, UserError
from opsd_lightning.vllm_servers import Adapter

T = TypeVar("T")

# What peft can and vLLM cannot (its lora/peft_helper.py); it would ignore some of these without a word.
_NOT_IN_VLLM = (
    "use_dora",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
)


def sampling_fields(sampling: Sampling, stop: frozenset[int], seed: int, logprobs: bool) -> dict[str, Any]:
    """Fields of vLLM's ``SamplingParams``, named the same in its HTTP requests.

    All are given: a server fills what is missing with the sampling defaults of the checkpoint.
    """
    return {
        "max_tokens": int(sampling.max_new_tokens),
        "temperature": float(sampling.temperature),
        "top_p": max(float(sampling.top_p), 1e-6),  # vLLM wants more than 0; the first token is kept always
        "top_k": int(sampling.top_k),
        "min_p": float(sampling.min_p),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": sorted(stop),
        "ignore_eos": True,  # the tokenizer's one EOS: ours are all of them
        "logprobs": 0 if logprobs else None,  # beside the sampled token's own, no others
    }


def check_length(prompts: Sequence[Sequence[int]], sampling: Sampling, fits: int, remedy: str) -> None:
    """Raise where a prompt and its completion may not fit: vLLM would cut the completion short without a word."""
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    if longest > fits:
        raise UserError(
            f"the longest prompt and {sampling.max_new_tokens} new tokens are {longest} tokens, and vLLM takes {fits}: "
            f"{remedy} {longest} or more, or lower max_new_tokens"
        )


class Row(NamedTuple):
    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


def read_choice(choice: dict[str, Any], with_logprobs: bool) -> Row:
    ids = choice.get("token_ids")
    if ids is None:
        raise UserError("the vLLM servers return no token ids (return_token_ids): vLLM 0.10.2 or newer is needed")
    if not with_logprobs:
        return Row(ids, None, choice["finish_reason"])
    found = choice["logprobs"]
    if found["tokens"] != [f"token_id:{token}" for token in ids]:
        raise RuntimeError("a vLLM server's log-probabilities are not those of its token ids")
    return Row(ids, found["token_logprobs"], choice["finish_reason"])


def as_rollouts(rows: Sequence[Row], sampling: Sampling, stop: frozenset[int], vocabulary: int) -> Rollouts:
    """Completions cut at their EOS.

    Args:
        rows: What vLLM returned.
        sampling: What was asked for.
        stop: Tokens that end a completion.
        vocabulary: Number of the policy's tokens.

    Raises:
        UserError: One ended early without an EOS, or holds a token that the policy does not have.
    """
    if (largest := max((max(row.ids, default=0) for row in rows), default=0)) >= vocabulary:
        raise UserError(
            f"vLLM sampled token {largest}, and model.policy.model has {vocabulary} tokens: it serves another model"
        )
    completions, terminated, logprobs = [], [], []
    for row in rows:
        ids, ended = cut_at_eos(row.ids, stop)
        if not ended and len(ids) != sampling.max_new_tokens:
            raise UserError(
                f"a completion ended after {len(ids)} tokens without an EOS ({row.finish_reason}), though "
                f"{sampling.max_new_tokens} were asked for: start vLLM without stop tokens or max_new_tokens of its own "
                "(--override-generation-config)"
            )
        completions.append(ids)
        terminated.append(ended)
        logprobs.append((row.logprobs or [])[: len(ids)])
    return Rollouts(completions, terminated, sampling.n, logprobs if all(r.logprobs is not None for r in rows) else None)


class AdapterVersions:
    """The adapters' versions in a folder, of each adapter the newest and those still in use."""

    def __init__(self, folder: Path, name: str) -> None:
        self.folder, self.name = folder, name
        self.run = secrets.token_hex(3)  # another run may share the folder and the servers
        self.count = 0
        self.newest: dict[str, tuple[str, Adapter]] = {}
        self.written: list[Adapter] = []

    def write(self, model: PeftModel, role: str, weights: dict[str, Tensor]) -> Adapter:
        """The version with these weights; a new one if they have changed.

        Raises:
            UserError: It is no adapter that vLLM can serve.
        """
        config = model.peft_config[role]
        if wrong := [name for name in _NOT_IN_VLLM if getattr(config, name, None)]:
            raise UserError(
                f"vLLM does not serve adapters with {', '.join(wrong)}: leave it out of model.policy.lora.options, or take "
                "another model.rollouts than vLLM's"
            )
        digest = hashlib.blake2b(repr(sorted(weights)).encode())
        for _, value in sorted(weights.items()):
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
        known = self.newest.get(role)
        if known is not None and known[0] == digest.hexdigest():
            return known[1]
        self.count += 1
        role_name = self.name + ("-teacher" if role == TEACHER else "")
        name = f"{role_name}-{self.run}-{self.count}"
        folder = self.folder / name
        try:
            write_weights(config, weights, folder)
        except OSError as error:
            raise UserError(
                f"model.rollouts.init_args.adapter_folder: cannot write {folder} ({error.strerror or error})"
            ) from None
        adapter = Adapter(name, str(folder))
        self.newest[role] = digest.hexdigest(), adapter
        self.written.append(adapter)
        return adapter

    def outdated(self, keep: Sequence[Adapter | None] = ()) -> list[Adapter]:
        """Versions that nothing asks for any more."""
        newest = [adapter for _, adapter in self.newest.values()]
        return [adapter for adapter in self.written if adapter not in newest and adapter not in keep]

    def remove(self, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            remove_weights(adapter.folder)
            self.written.remove(adapter)

    def remove_all(self) -> list[str]:
        """Remove every version; returns their names."""
        names = [adapter.name for adapter in self.written]
        self.remove(list(self.written))
        self.newest = {}
        return names


def this_rank() -> int:
    return dist.get_rank() if dist.is_available() and dist.is_initialized() else 0


def of_every_rank(value: T) -> list[T]:
    """Each rank's value, on every rank."""
    if not (dist.is_available() and dist.is_initialized()) or dist.get_world_size() == 1:
        return [value]
    values: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(values, value)
    return values


def together(action: Callable[[], T]) -> T:
    """Do something on every rank; where it fails on one, it fails on all, instead of leaving the others waiting."""
    result, error = None, None
    try:
        result = action()
    except Exception as problem:
        error = problem
    messages = [found for found in of_every_rank(None if error is None else _message(error)) if found is not None]
    if error is not None:
        raise error
    if messages:
        raise messages[0][0](messages[0][1])
    return result  # type: ignore[return-value]


def from_rank_zero(action: Callable[[], T]) -> T:
    """What an action gives on the first rank, alone, on every rank."""
    return next(
        found for found in of_every_rank(together(lambda: action() if this_rank() == 0 else None)) if found is not None
    )


def _message(error: Exception) -> tuple[type[Exception], str]:
    return (UserError if isinstance(error, UserError) else RuntimeError), str(error)
