"""Rollouts by vLLM servers, on this or other machines.

A server loads the base model once, and the adapter (some megabytes) before every rollout with new weights. Each version of
an adapter has its own name and folder, so a request is never answered with other weights than it names.
"""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, final

from peft import PeftModel

from opsd_lightning.distributed.collectives import all_gather_object, get_rank, run_on_all_ranks, run_on_rank_zero
from opsd_lightning.models.export import adapter_weights
from opsd_lightning.models.policy import ModelSettings, active_adapter, base_of, eos_ids
from opsd_lightning.models.rope import sampler_length
from opsd_lightning.rollouts.base import Demand, RolloutEngine, seed_for
from opsd_lightning.rollouts.vllm.adapters import AdapterVersions
from opsd_lightning.rollouts.vllm.client import Adapter, Server, ServerPool, check_urls
from opsd_lightning.rollouts.vllm.protocol import (
    Expected,
    as_rollouts,
    check_length,
    check_policy,
    read_answer,
    sampling_fields,
)
from opsd_lightning.types import (
    ConfigError,
    NonNegativeInt,
    PositiveFloat,
    PositiveInt,
    Rollouts,
    Sampling,
    checked,
)


@checked
@final
class VLLMServerEngine(RolloutEngine):
    """Rollouts by vLLM servers on this or other machines. Completions are distributed over all servers that answer.

    Start the servers with ``--enable-lora --max-lora-rank R`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` (docs/vllm.md).

    Args:
        urls: Addresses of the servers, such as ``[http://localhost:8000, http://node2:8000]``, without user and password.
        adapter_folder: Folder for adapters, which the trainer and all servers must see under the same path. Servers on other
            machines need a shared file system. Each run uses its own subfolder.
        adapter_name: First part of the student adapter's name on the servers, followed by the run and the version. The name
            of a teacher's adapter has ``-teacher`` in between. Letters, digits, ``.``, ``_`` and ``-`` are allowed.
        timeout_seconds: Time limit of one completion in seconds, above 0, from connecting to the last byte of the response.
            Queries of a server take at most 10 seconds and loading an adapter at most 120.
        retries: Number of consecutive failures after the first one, 0 or more, after which a server is not used for the rest
            of the step. The pauses between them grow.
        max_concurrency: Maximum number of simultaneous requests to each server, at least 1, with one completion each. A
            server batches as many as fit its memory (its ``--max-num-seqs``).
        logprob_tolerance: Largest accepted difference between the servers' log-probabilities and the trainer's own, in nats
            and averaged over the tokens of a step. Training stops beyond it. A server in bfloat16 differs by about 0.01.
            Null disables the check.
        serves_quantized: If True, the servers have a quantized policy's own base weights (docs/vllm.md). A quantized policy
            requires it, since its checkpoint in 16 bits is another model.
        overlap: If True, sample the completions of the next step while the current step trains, with the weights before the
            current step. Their tokens are weighted by ``max_importance_ratio``.
        max_importance_ratio: Upper limit, above 0, of the ratio of a token's probability under the student to that under the
            server, by which its loss is weighted. Defaults to 2 with ``overlap``, and otherwise to no weighting.
        api_key_env: Environment variable with the servers' API key, if they require one.

    Example::

        >>> from opsd_lightning import VLLMServerEngine
        >>> engine = VLLMServerEngine(["http://localhost:8000", "http://node2:8000"], overlap=True)
        >>> engine.max_importance_ratio
        2.0
    """

    neutral_settings = RolloutEngine.neutral_settings | {
        "urls",
        "adapter_folder",
        "adapter_name",
        "timeout_seconds",
        "retries",
        "max_concurrency",
        "overlap",
        "api_key_env",
    }

    def __init__(
        self,
        urls: list[str],
        adapter_folder: str = "runs/vllm_adapters",
        adapter_name: str = "opsd",
        timeout_seconds: PositiveFloat = 600.0,
        retries: NonNegativeInt = 4,
        max_concurrency: PositiveInt = 64,
        logprob_tolerance: PositiveFloat | None = 0.1,
        serves_quantized: bool = False,
        overlap: bool = False,
        max_importance_ratio: PositiveFloat | None = None,
        api_key_env: str = "VLLM_API_KEY",
    ) -> None:
        if not urls or isinstance(urls, str):
            raise ConfigError(
                f"{urls!r} is not a list of addresses",
                "model.rollouts.init_args.urls",
                "Name at least one server, such as [http://localhost:8000]",
            )
        self.urls = list(urls)
        check_urls(self.urls)
        self.adapter_folder, self.adapter_name = adapter_folder, adapter_name
        self.timeout_seconds = timeout_seconds
        self.retries = retries
        self.max_concurrency = max_concurrency
        self.logprob_tolerance = logprob_tolerance
        self.serves_quantized = serves_quantized
        self.overlap = overlap
        self.max_importance_ratio = 2.0 if overlap else None
        if max_importance_ratio is not None:
            self.max_importance_ratio = max_importance_ratio
        self.api_key_env = api_key_env
        self._pool: ServerPool | None = None
        self._versions: AdapterVersions | None = None
        self._prefetched: _Prefetch | None = None
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # A copy has the same settings and opens its own connections.
        return self.__dict__ | {"_pool": None, "_versions": None, "_prefetched": None, "_finalizer": None}

    def prepare(self, policy: ModelSettings, demand: Demand | None = None) -> None:
        check_policy(policy)
        if policy.quantization is not None and not self.serves_quantized:
            raise ConfigError(
                "the policy is quantized, and servers that load its checkpoint in 16 bits have another model (docs/vllm.md)",
                "model.rollouts.init_args.serves_quantized",
                "Serve the policy's dequantized weights and set it to true, use VLLMEngine, which gets them by itself, or "
                "remove model.policy.quantization",
            )

    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        request = _Request(tuple(map(tuple, prompts)), sampling, seed)
        if self._prefetched is not None and all(all_gather_object(self._prefetched.request == request)):
            prefetched, self._prefetched = self._prefetched, None
            try:
                return run_on_all_ranks(prefetched.result)
            except BaseException:  # interrupted
                prefetched.stop()
                raise
        task = self._task(model, request)
        return run_on_all_ranks(task)

    def prefetch(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> None:
        if self.overlap:
            self._cancel_prefetch()
            request = _Request(tuple(map(tuple, prompts)), sampling, seed)
            self._prefetched = _Prefetch(request, self._task(model, request), self._served)

    def refresh(self, model: PeftModel) -> None:
        """Load the active weights on all servers, as every rollout does at its start. Every rank must call."""
        self._refresh(self._connect(), model)

    def close(self) -> None:
        self._cancel_prefetch()
        if self._finalizer is not None:
            self._finalizer()
        self._pool = self._versions = self._finalizer = None

    def _cancel_prefetch(self) -> None:
        if self._prefetched is not None:
            self._prefetched.stop()
            self._prefetched = None

    def _task(self, model: PeftModel, request: _Request) -> Callable[..., Rollouts]:
        """Update the adapters on the servers, and return a function that sends the requests and may run in any thread."""
        pool = self._connect()
        adapter = self._served = self._refresh(pool, model)
        stop, vocabulary = eos_ids(model), base_of(model).config.get_text_config().vocab_size
        with_logprobs = self.logprob_tolerance is not None or self.max_importance_ratio is not None
        expected = Expected(request.sampling.max_new_tokens, stop, vocabulary, with_logprobs)
        bodies = [
            {"prompt": list(prompt)}
            | sampling_fields(request.sampling, stop, seed_for(request.seed, row * request.sampling.n + copy), with_logprobs)
            | {"return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
            for row, prompt in enumerate(request.prompts)
            for copy in range(request.sampling.n)
        ]

        def unfit(server: Server) -> str | None:
            if not server.max_model_len:  # not yet known on this rank
                return None
            try:
                check_length(request.prompts, request.sampling, server.max_model_len, "--max-model-len of the server")
                sampler_length(base_of(model), server.max_model_len, "--max-model-len of the server")
            except ConfigError as error:
                return str(error)
            return None

        def send(cancelled: threading.Event | None = None) -> Rollouts:
            # Checked here and not earlier, since an error before a collective operation would leave other ranks waiting.
            pool.require(unfit)
            read = partial(read_answer, expected=expected)
            rows = pool.post_all(bodies, adapter, read, get_rank(), cancelled)
            return as_rollouts(rows, expected, request.sampling.n)

        return send

    def _connect(self) -> ServerPool:
        if self._pool is None:
            pool = ServerPool(self.urls, self.timeout_seconds, self.retries, self.max_concurrency, self.api_key_env)
            try:
                run_on_all_ranks(pool.connect)
            except BaseException:
                pool.close()
                raise
            parent = Path(self.adapter_folder).expanduser().absolute()
            self._pool, self._versions = pool, AdapterVersions(parent, self.adapter_name)
            # Runs at the end of the process at the latest. The folders of a killed process are removed by the next run.
            self._finalizer = weakref.finalize(self, _close, pool, self._versions)
        return self._pool

    def _refresh(self, pool: ServerPool, model: PeftModel) -> Adapter | None:
        """Load the active adapter on all servers. Every rank must call.

        Returns:
            The version of the adapter, or None if adapters are disabled.
        """
        role = active_adapter(model)
        versions = self._versions
        assert versions is not None
        weights = None if role is None else adapter_weights(model, role)

        def push() -> tuple[Adapter | None, list[str]]:
            pool.revive()
            adapter = None
            if role is not None and weights is not None:
                adapter = versions.write(model, role, weights)
                in_use = [] if self._prefetched is None else [self._prefetched.adapter]
                first = versions.count == 1
                pool.load(adapter, versions.stale(keep=in_use))
                versions.remove(versions.outdated(keep=in_use))
                if first:
                    versions.remove_dead_runs()
            return adapter, [server.url for server in pool.alive()]

        adapter, living = run_on_rank_zero(push)
        for server in pool.servers:  # all ranks use the state that rank zero has seen
            if get_rank():
                server.returned |= not server.alive
                server.alive, server.failures = server.url in living, 0
            if adapter is not None and server.alive:
                server.adapters.setdefault(adapter.name, adapter.folder)
        return adapter


def _close(pool: ServerPool, versions: AdapterVersions) -> None:
    """Remove the adapters of a run from disk and from the servers, and close all connections."""
    if names := versions.remove_all():
        pool.unload(names)
    pool.close()


class _Request(NamedTuple):
    """Arguments of one call of ``generate``, without the model."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    seed: int


class _Prefetch:
    """Rollout that is sampled in a background thread."""

    def __init__(self, request: _Request, task: Callable[..., Rollouts], adapter: Adapter | None) -> None:
        self.request, self.adapter = request, adapter
        self.found: Rollouts | None = None
        self.error: BaseException | None = None
        self.cancelled = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(task,), name="opsd-prefetch", daemon=True)
        self.thread.start()

    def _run(self, task: Callable[..., Rollouts]) -> None:
        try:
            self.found = task(self.cancelled)
        except BaseException as error:  # raised again in the main thread by `result`
            self.error = error

    def result(self) -> Rollouts:
        """Wait for the rollout and return it."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found

    def stop(self) -> None:
        """Send no further requests, and wait for the pending ones."""
        self.cancelled.set()
        self.thread.join()
