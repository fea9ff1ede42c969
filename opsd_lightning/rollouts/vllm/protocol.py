"""Sampling parameters for vLLM, and checks of the completions that it returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from opsd_lightning.models.policy import ModelSettings
from opsd_lightning.rollouts.vllm.client import BadAnswer
from opsd_lightning.types import ConfigError, Rollouts, Sampling
from opsd_lightning.utils.http import sanitize

# Rounding may raise a log-probability above 0. The lowest value that vLLM sends is -9999.
_LORA_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # values that vLLM accepts as max_lora_rank
_MAX_LOGPROB, _MIN_LOGPROB = 1e-3, -1e4


def sampling_fields(sampling: Sampling, stop: frozenset[int], seed: int, logprobs: bool) -> dict[str, Any]:
    """Return the fields of vLLM's ``SamplingParams``, which have the same names in HTTP requests.

    No field is omitted, since a server would use the checkpoint's sampling defaults for it.

    Args:
        sampling: Sampling settings.
        stop: Ids of the EOS tokens.
        seed: Seed for this completion.
        logprobs: If True, request the log-probabilities of the sampled tokens.
    """
    return {
        "max_tokens": int(sampling.max_new_tokens),
        "temperature": float(sampling.temperature),
        "top_p": max(float(sampling.top_p), 1e-6),  # vLLM requires more than 0, and always keeps the first token
        "top_k": int(sampling.top_k),
        "min_p": float(sampling.min_p),
        "repetition_penalty": 1.0,
        "presence_penalty": 0.0,
        "frequency_penalty": 0.0,
        "seed": seed,
        "stop_token_ids": sorted(stop),
        "ignore_eos": True,  # refers to the tokenizer's EOS token, which is in stop_token_ids
        "logprobs": 0 if logprobs else None,  # no other tokens than the sampled one
    }


def check_policy(policy: ModelSettings) -> None:
    """Check that a policy has an adapter, since vLLM loads the base weights only once.

    Raises:
        ConfigError: All weights of the policy train.
    """
    if policy.trains_all:
        raise ConfigError(
            "vLLM engines send adapters only, and model.policy.lora is null (full fine-tuning)",
            "model.rollouts",
            "Use TransformersEngine, or set model.policy.lora",
        )


def max_lora_rank(rank: int) -> int:
    """Return the smallest value of vLLM's ``max_lora_rank`` that serves adapters of a rank."""
    return next((each for each in _LORA_RANKS if each >= rank), rank)


def check_length(prompts: Sequence[Sequence[int]], sampling: Sampling, max_model_len: int, setting: str) -> None:
    """Check that every prompt and its completion fit vLLM's context, since vLLM silently truncates completions.

    Args:
        prompts: Token ids of the prompts.
        sampling: Sampling settings.
        max_model_len: vLLM's context length in tokens.
        setting: Name of the setting of the context length, for errors.

    Raises:
        ConfigError: The longest prompt and ``max_new_tokens`` exceed the context length.
    """
    longest = max(map(len, prompts)) + sampling.max_new_tokens
    if longest > max_model_len:
        raise ConfigError(
            f"the longest prompt and {sampling.max_new_tokens} new tokens are {longest} tokens, and vLLM's context is "
            f"{max_model_len} tokens",
            setting,
            f"Set it to {longest} or more, or lower model.sampling.max_new_tokens",
        )


class Row(NamedTuple):
    """A completion that vLLM sampled.

    Args:
        ids: Token ids, including the EOS token if there is one.
        logprobs: Log-probabilities of the tokens in nats, or None if they were not requested.
        finish_reason: vLLM's reason for the end of the completion.
    """

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


class Expected(NamedTuple):
    """Expected properties of the completions of a rollout.

    Args:
        max_new_tokens: Length of a completion without an EOS token.
        stop: Ids of the EOS tokens.
        vocabulary: Vocabulary size of the policy.
        with_logprobs: True if log-probabilities were requested.
    """

    max_new_tokens: int
    stop: frozenset[int]
    vocabulary: int
    with_logprobs: bool


def read_answer(body: dict[str, Any], model: str, answer: Any, expected: Expected) -> Row:
    """Return the completion in a server's response.

    Args:
        body: The request.
        model: The requested model.
        answer: Decoded JSON of the response.
        expected: Expected properties of the completion.

    Raises:
        BadAnswer: The response does not answer the request, or its completion is invalid.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise BadAnswer("the response has no choices")
    if answer.get("model") != model:
        raise BadAnswer(f"the response is from model {sanitize(answer.get('model'))} instead of {model}")
    if len(answer["choices"]) != 1 or not isinstance(answer["choices"][0], dict):
        raise BadAnswer(f"the response has {len(answer['choices'])} choices instead of one")
    choice = answer["choices"][0]
    index = choice.get("index", 0)
    if type(index) is not int or index != 0:
        raise BadAnswer(f"the choice has index {sanitize(index)} instead of 0")
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and (not _is_list_of_ids(prompt) or prompt != body["prompt"]):
        raise BadAnswer("the response is to another prompt")
    ids = choice.get("token_ids")
    if ids is None:
        raise BadAnswer("the response has no token ids (return_token_ids), for which vLLM 0.10.2 or newer is required")
    if not _is_list_of_ids(ids):
        raise BadAnswer("token_ids is not a list of integers")
    reason = choice.get("finish_reason")
    logprobs = None
    if expected.with_logprobs:
        found = choice.get("logprobs")
        if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
            raise BadAnswer("the response has no log-probabilities")
        if found.get("tokens") != [f"token_id:{token}" for token in ids]:
            raise BadAnswer("the log-probabilities belong to other tokens than the token ids")
        logprobs = found["token_logprobs"]
    row = Row(ids, logprobs, reason if isinstance(reason, str) else sanitize(reason))
    if (problem := row_problem(row, expected)) is not None:
        raise BadAnswer(problem)
    return row


def row_problem(row: Row, expected: Expected) -> str | None:
    """Return the reason why a completion is invalid, or None if it is valid."""
    ids, count = row.ids, len(row.ids)
    if row.finish_reason not in ("stop", "length"):
        return f"a completion ended with {sanitize(row.finish_reason)}"  # for example, the server is shutting down
    if (unknown := next((token for token in ids if not 0 <= token < expected.vocabulary), None)) is not None:
        return (
            f"token {sanitize(unknown)} was sampled, and model.policy.model has {expected.vocabulary} tokens: vLLM serves "
            "another model"
        )
    if count > expected.max_new_tokens:
        return f"a completion has {count} tokens, more than the requested {expected.max_new_tokens}"
    first = next((place for place, token in enumerate(ids) if token in expected.stop), None)
    if first is not None and first != count - 1:
        return f"a completion continues after the EOS token at position {first + 1} of {count}"
    if first is None and count != expected.max_new_tokens:
        return (
            f"a completion ended without an EOS token after {count} of {expected.max_new_tokens} tokens "
            f"({sanitize(row.finish_reason)}), possibly by stop tokens or max_new_tokens in --override-generation-config"
        )
    if row.logprobs is None:
        return "a completion has no log-probabilities" if expected.with_logprobs else None
    if len(row.logprobs) != count:
        return f"a completion of {count} tokens has {len(row.logprobs)} log-probabilities"
    for value in row.logprobs:  # NaN is in no interval
        if type(value) not in (float, int) or not _MIN_LOGPROB <= value <= _MAX_LOGPROB:
            return f"{sanitize(value, length=40)} is not a log-probability of a sampled token"
    return None


def _is_list_of_ids(found: Any) -> bool:
    return isinstance(found, list) and all(type(token) is int for token in found)


def as_rollouts(rows: Sequence[Row], expected: Expected, n: int) -> Rollouts:
    """Return vLLM's completions as `Rollouts`.

    Args:
        rows: Completions of all prompts.
        expected: Expected properties of each completion.
        n: Completions for each prompt.

    Raises:
        ConfigError: A completion is invalid.
    """
    for row in rows:
        if (problem := row_problem(row, expected)) is not None:
            raise ConfigError(
                problem, "model.rollouts", "Start vLLM with model.policy.model and without stop tokens of its own"
            )
    return Rollouts(
        [row.ids for row in rows],
        [bool(row.ids) and row.ids[-1] in expected.stop for row in rows],
        n,
        [[float(value) for value in row.logprobs or []] for row in rows] if expected.with_logprobs else None,
    )
