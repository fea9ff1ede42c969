"""Parts that both vLLM engines share: requests, checks of answers, and ranks that succeed or fail together."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from opsd_lightning.rollouts.vllm.client import BadAnswer, said
from opsd_lightning.types import Rollouts, Sampling, UserError

# A log-probability may be this far above 0, by rounding; vLLM sends no lower ones than -9999.
_MOST_LOGPROB, _LEAST_LOGPROB = 1e-3, -1e4


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
    """A completion as vLLM sampled it.

    Args:
        ids: Its tokens, the EOS included where it has one.
        logprobs: Their log-probabilities, where they were asked for.
        finish_reason: Why it ended, in vLLM's words.
    """

    ids: list[int]
    logprobs: list[float] | None
    finish_reason: str


class Expected(NamedTuple):
    """Properties that every completion of a rollout must have.

    Args:
        max_new_tokens: Its length, unless an EOS ends it.
        stop: Tokens that end it.
        vocabulary: Number of the policy's tokens.
        with_logprobs: Log-probabilities were asked for.
    """

    max_new_tokens: int
    stop: frozenset[int]
    vocabulary: int
    with_logprobs: bool


def read_answer(body: dict[str, Any], model: str, answer: Any, expected: Expected) -> Row:
    """Read the one completion in a server's answer.

    Args:
        body: The request.
        model: The model that it asked for.
        answer: The answer's JSON.
        expected: Required properties of the completion.

    Raises:
        BadAnswer: It is not the answer to the request, or a completion that cannot be.
    """
    if not isinstance(answer, dict) or not isinstance(answer.get("choices"), list):
        raise BadAnswer("the answer holds no choices")
    if answer.get("model") != model:
        raise BadAnswer(f"the answer is of model {said(answer.get('model'))}, and {model} was asked for")
    if len(answer["choices"]) != 1 or not isinstance(answer["choices"][0], dict):
        raise BadAnswer(f"the answer holds {len(answer['choices'])} choices, and one was asked for")
    choice = answer["choices"][0]
    index = choice.get("index", 0)
    if type(index) is not int or index != 0:
        raise BadAnswer(f"the choice has index {said(index)}, and one was asked for")
    prompt = choice.get("prompt_token_ids")
    if prompt is not None and (not _are_ids(prompt) or prompt != body["prompt"]):
        raise BadAnswer("the answer is to another prompt")
    ids = choice.get("token_ids")
    if ids is None:
        raise BadAnswer("the answer has no token ids (return_token_ids): vLLM 0.10.2 or newer is needed")
    if not _are_ids(ids):
        raise BadAnswer("token_ids are no token ids")
    reason = choice.get("finish_reason")
    logprobs = None
    if expected.with_logprobs:
        found = choice.get("logprobs")
        if not isinstance(found, dict) or not isinstance(found.get("token_logprobs"), list):
            raise BadAnswer("the answer has no log-probabilities")
        if found.get("tokens") != [f"token_id:{token}" for token in ids]:
            raise BadAnswer("log-probabilities are not those of the token ids")
        logprobs = found["token_logprobs"]
    row = Row(ids, logprobs, reason if isinstance(reason, str) else said(reason))
    if (problem := row_problem(row, expected)) is not None:
        raise BadAnswer(problem)
    return row


def row_problem(row: Row, expected: Expected) -> str | None:
    """Say why a completion cannot be what was asked for; None if it can."""
    ids, count = row.ids, len(row.ids)
    if row.finish_reason not in ("stop", "length"):
        return f"a completion ended by {said(row.finish_reason)}"  # the server is going down
    if (strange := next((token for token in ids if not 0 <= token < expected.vocabulary), None)) is not None:
        return (
            f"token {said(strange)} was sampled, and model.policy.model has {expected.vocabulary} tokens: it serves another "
            "model"
        )
    if count > expected.max_new_tokens:
        return f"a completion has {count} tokens, and at most {expected.max_new_tokens} were asked for"
    first = next((place for place, token in enumerate(ids) if token in expected.stop), None)
    if first is not None and first != count - 1:
        return f"a completion goes on after its EOS at token {first + 1} of {count}"
    if first is None and count != expected.max_new_tokens:
        return (
            f"a completion ended after {count} tokens without an EOS ({said(row.finish_reason)}), though "
            f"{expected.max_new_tokens} were asked for: start vLLM without stop tokens or max_new_tokens of its own "
            "(--override-generation-config)"
        )
    if row.logprobs is None:
        return "a completion has no log-probabilities" if expected.with_logprobs else None
    if len(row.logprobs) != count:
        return f"a completion of {count} tokens has {len(row.logprobs)} log-probabilities"
    for value in row.logprobs:  # NaN is in no interval
        if type(value) not in (float, int) or not _LEAST_LOGPROB <= value <= _MOST_LOGPROB:
            return f"{said(value, length=40)} is no log-probability of a sampled token"
    return None


def _are_ids(found: Any) -> bool:
    return isinstance(found, list) and all(type(token) is int for token in found)


def as_rollouts(rows: Sequence[Row], expected: Expected, n: int) -> Rollouts:
    """Completions of a rollout.

    Args:
        rows: Completions that vLLM sampled.
        expected: Required properties of each.
        n: Completions for each prompt.

    Raises:
        UserError: One of them is not.
    """
    for row in rows:
        if (problem := row_problem(row, expected)) is not None:
            raise UserError(f"model.rollouts: {problem}")
    return Rollouts(
        [row.ids for row in rows],
        [bool(row.ids) and row.ids[-1] in expected.stop for row in rows],
        n,
        [[float(value) for value in row.logprobs or []] for row in rows] if expected.with_logprobs else None,
    )
