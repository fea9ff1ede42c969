"""Rollouts sampled by vLLM: on servers elsewhere, or in this very process.

Either holds the base model once and gets the adapter, a few megabytes, before every rollout whose weights are new. Each
version of an adapter has a name and a folder of its own, so that a request can never be answered with other weights than
those it names.
"""

from __future__ import annotations

import os
import tempfile
import threading
import weakref
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor

from opsd_lightning.distributed.collectives import from_rank_zero, of_every_rank, this_rank, together
from opsd_lightning.models.export import adapter_weights
from opsd_lightning.models.policy import active_adapter, base_of, device_of, eos_ids
from opsd_lightning.models.rope import sampler_length
from opsd_lightning.rollouts.base import RolloutEngine, seed_for
from opsd_lightning.rollouts.vllm.adapters import AdapterVersions
from opsd_lightning.rollouts.vllm.client import Adapter, Server, ServerPool, check_urls
from opsd_lightning.rollouts.vllm.protocol import Expected, Row, as_rollouts, check_length, read_answer, sampling_fields
from opsd_lightning.types import (
    NonNegativeInt,
    OpenUnitInterval,
    PositiveFloat,
    PositiveInt,
    Rollouts,
    Sampling,
    UserError,
    checked,
)

_RANKS = (8, 16, 32, 64, 128, 256, 320, 512)  # that vLLM's max_lora_rank may be


@checked
class VLLMServerEngine(RolloutEngine):
    """vLLM servers on this or other machines: each rollout is spread over all of them, and survives the end of some.

    Start them with ``--enable-lora --max-lora-rank R`` and ``VLLM_ALLOW_RUNTIME_LORA_UPDATING=True`` (docs/vllm.md).

    Args:
        urls: The servers, such as ``[http://localhost:8000, http://node2:8000]``, each once, without a user or password.
        adapter_folder: Where adapters are handed over, each run's in a folder of its own: a folder that the trainer and all
            servers see under the same path. Servers on other machines need a shared file system.
        adapter_name: What the servers call the student's adapter, followed by the run and the version; the teacher's, if
            it has one, gets ``-teacher`` in between. Letters, digits, ``.``, ``_`` and ``-``.
        timeout_seconds: Time limit of one completion, above 0: from connecting to the last byte of the answer. Questions to
            a server (10 seconds) and loading an adapter (120) have lower limits where this one is higher.
        retries: Failures in a row, with growing pauses between, after which a server is given up for the step: beyond the
            first, 0 or more.
        max_concurrency: The most requests, one a completion, that are under way on each server, at least 1. A server
            batches as many as fit its memory (its ``--max-num-seqs``).
        logprob_tolerance: As for every engine: training stops where the servers' log-probabilities and the trainer's own
            differ by more, in nats and on average over a step's tokens. A server in bfloat16 is some 0.01 away. Null
            neither checks nor asks the servers for them.
        overlap: Sample the next step's completions while this one trains, with the weights that this one starts from.
            They are then one step old, and their tokens are weighted by ``max_importance_ratio``.
        max_importance_ratio: As for every engine: losses are weighted by the ratio of a token's probability under the
            student to that under the server, at most this, above 0. 2 with ``overlap``, and not weighted without, unless
            given.
        api_key_env: Environment variable that holds the servers' API key, where they were started with one.
    """

    def __init__(
        self,
        urls: list[str],
        adapter_folder: str = "runs/vllm_adapters",
        adapter_name: str = "opsd",
        timeout_seconds: PositiveFloat = 600.0,
        retries: NonNegativeInt = 4,
        max_concurrency: PositiveInt = 64,
        logprob_tolerance: PositiveFloat | None = 0.1,
        overlap: bool = False,
        max_importance_ratio: PositiveFloat | None = None,
        api_key_env: str = "VLLM_API_KEY",
    ) -> None:
        if not urls or isinstance(urls, str):
            raise UserError(
                "model.rollouts.init_args.urls is a list of at least one server, such as [http://localhost:8000]"
            )
        self.urls = list(urls)
        check_urls(self.urls)
        self.adapter_folder, self.adapter_name = adapter_folder, adapter_name
        self.timeout_seconds = timeout_seconds
        self.retries = retries
        self.max_concurrency = max_concurrency
        self.logprob_tolerance = logprob_tolerance
        self.overlap = overlap
        self.max_importance_ratio = 2.0 if overlap else None
        if max_importance_ratio is not None:
            self.max_importance_ratio = max_importance_ratio
        self.api_key_env = api_key_env
        self._pool: ServerPool | None = None
        self._versions: AdapterVersions | None = None
        self._ahead: _Ahead | None = None
        self._end: weakref.finalize[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        # Copies have the settings and connect for themselves.
        return self.__dict__ | {"_pool": None, "_versions": None, "_ahead": None, "_end": None}

    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        asked = _Asked(tuple(map(tuple, prompts)), sampling, seed)
        if self._ahead is not None and all(of_every_rank(self._ahead.asked == asked)):
            ahead, self._ahead = self._ahead, None
            try:
                return together(ahead.result)
            except BaseException:  # interrupted
                ahead.stop()
                raise
        task = self._task(model, asked)
        return together(task)

    def prefetch(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> None:
        if self.overlap:
            self._forget()
            asked = _Asked(tuple(map(tuple, prompts)), sampling, seed)
            self._ahead = _Ahead(asked, self._task(model, asked), self._served)

    def refresh(self, model: PeftModel) -> None:
        """Have every living server hold the active weights, as each rollout does first. Every rank must call."""
        self._refresh(self._connected(), model)

    def close(self) -> None:
        self._forget()
        if self._end is not None:
            self._end()
        self._pool = self._versions = self._end = None

    def _forget(self) -> None:
        if self._ahead is not None:
            self._ahead.stop()
            self._ahead = None

    def _task(self, model: PeftModel, asked: _Asked) -> Callable[..., Rollouts]:
        """Bring the servers up to date, and return what then only has to be sent: HTTP alone, for any thread."""
        pool = self._connected()
        adapter = self._served = self._refresh(pool, model)
        stop, vocabulary = eos_ids(model), base_of(model).config.get_text_config().vocab_size
        with_logprobs = self.logprob_tolerance is not None or self.max_importance_ratio is not None
        expected = Expected(asked.sampling.max_new_tokens, stop, vocabulary, with_logprobs)
        bodies = [
            {"prompt": list(prompt)}
            | sampling_fields(asked.sampling, stop, seed_for(asked.seed, row * asked.sampling.n + copy), with_logprobs)
            | {"return_token_ids": True, "return_tokens_as_token_ids": True, "skip_special_tokens": False}
            for row, prompt in enumerate(asked.prompts)
            for copy in range(asked.sampling.n)
        ]

        def unfit(server: Server) -> str | None:
            if not server.max_model_len:  # this rank has not seen it
                return None
            try:
                check_length(asked.prompts, asked.sampling, server.max_model_len, "start the servers with --max-model-len")
                sampler_length(base_of(model), server.max_model_len, f"--max-model-len of {server.url}")
            except UserError as error:
                return str(error)
            return None

        def send(cancelled: threading.Event | None = None) -> Rollouts:
            # Not a rank's own mistake to raise before: the others would wait for it.
            pool.require(unfit)
            read = partial(read_answer, expected=expected)
            rows = pool.post_all(bodies, adapter, read, this_rank(), cancelled)
            return as_rollouts(rows, expected, asked.sampling.n)

        return send

    def _connected(self) -> ServerPool:
        if self._pool is None:
            pool = ServerPool(self.urls, self.timeout_seconds, self.retries, self.max_concurrency, self.api_key_env)
            try:
                together(pool.connect)
            except BaseException:
                pool.close()
                raise
            parent = Path(self.adapter_folder).expanduser().absolute()
            self._pool, self._versions = pool, AdapterVersions(parent, self.adapter_name)
            # At the latest when the process ends; a killed one's are removed at the next run's start.
            self._end = weakref.finalize(self, _end, pool, self._versions)
        return self._pool

    def _refresh(self, pool: ServerPool, model: PeftModel) -> Adapter | None:
        """The version of the active adapter, held by every living server; None for the base model. Every rank must call."""
        role = active_adapter(model)
        versions = self._versions
        assert versions is not None
        weights = None if role is None else adapter_weights(model, role)

        def push() -> tuple[Adapter | None, list[str]]:
            pool.revive()
            adapter = None
            if role is not None and weights is not None:
                adapter = versions.write(model, role, weights)
                in_use = [] if self._ahead is None else [self._ahead.adapter]
                first = versions.count == 1
                pool.hold(adapter, versions.stale(keep=in_use))
                versions.remove(versions.outdated(keep=in_use))
                if first:
                    versions.sweep()
            return adapter, [server.url for server in pool.alive()]

        adapter, living = from_rank_zero(push)
        for server in pool.servers:  # every rank goes by what the first has seen
            if this_rank():
                server.returned |= not server.alive
                server.alive, server.failures = server.url in living, 0
            if adapter is not None and server.alive:
                server.adapters.setdefault(adapter.name, adapter.folder)
        return adapter


@checked
class VLLMEngine(RolloutEngine):
    """vLLM in this very process, on the trainer's GPU: every rank has an engine of its own. Needs ``pip install vllm``.

    It holds a second copy of the base weights, which it can put aside while the trainer works.

    Args:
        gpu_memory_utilization: Share of the GPU's memory that vLLM may take, for its weights and cache, above 0 to below 1.
        sleep: Between rollouts, give that memory back to the trainer: weights go to the host's memory.
        max_model_len: The most tokens of a prompt and its completion, at least 1; the model's own context unless given.
        adapter_folder: Where adapters are handed over, each run's in a folder of its own. Defaults to the system's temporary
            folder.
        logprob_tolerance: As for every engine: training stops where vLLM's log-probabilities and the trainer's own differ by
            more, in nats and on average over a step's tokens. Null neither checks nor asks for them.
        max_importance_ratio: As for every engine: losses are weighted by the ratio of a token's probability under the
            student to that under vLLM, at most this, above 0. Not weighted unless given.
        options: Further arguments of ``vllm.LLM``, by name, such as ``{dtype: bfloat16, enforce_eager: true}``.
    """

    def __init__(
        self,
        gpu_memory_utilization: OpenUnitInterval = 0.3,
        sleep: bool = True,
        max_model_len: PositiveInt | None = None,
        adapter_folder: str | None = None,
        logprob_tolerance: PositiveFloat | None = 0.1,
        max_importance_ratio: PositiveFloat | None = None,
        options: dict[str, Any] | None = None,
    ) -> None:
        self.gpu_memory_utilization = gpu_memory_utilization
        self.sleep = sleep
        self.max_model_len = max_model_len
        self.adapter_folder = adapter_folder
        self.logprob_tolerance = logprob_tolerance
        self.max_importance_ratio = max_importance_ratio
        self.options = options or {}
        own = {
            "model",
            "gpu_memory_utilization",
            "enable_sleep_mode",
            "enable_lora",
            "max_model_len",
            "tensor_parallel_size",
        }
        if own := own & set(self.options):
            raise UserError(f"model.rollouts.init_args.options: {sorted(own)} is decided elsewhere")
        self._llm: Any = None
        self._versions: AdapterVersions | None = None
        self._numbers: dict[str, int] = {}
        self._end: weakref.finalize[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_llm": None, "_versions": None, "_numbers": {}, "_end": None}

    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        role = active_adapter(model)
        weights = None if role is None else adapter_weights(model, role)
        return together(lambda: self._generate(model, role, weights, prompts, sampling, seed))

    def _generate(
        self,
        model: PeftModel,
        role: str | None,
        weights: dict[str, Tensor] | None,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
    ) -> Rollouts:
        vllm = _import_vllm()
        if self._versions is None:
            parent = Path(self.adapter_folder or tempfile.gettempdir()).expanduser().absolute()
            self._versions = AdapterVersions(parent, "opsd")
            self._versions.sweep()
            self._end = weakref.finalize(self, self._versions.remove_all)
        request = None
        if role is not None and weights is not None:
            adapter = self._versions.write(model, role, weights)
            # A number of its own for each version: vLLM keeps what it has loaded under a number.
            number = self._numbers.setdefault(adapter.name, len(self._numbers) + 1)
            request = vllm.lora.request.LoRARequest(adapter.name, number, adapter.folder)
        if self._llm is None:
            self._llm = self._start(vllm, model)
        elif self.sleep:
            self._llm.wake_up()
        fits = self._llm.model_config.max_model_len
        check_length(prompts, sampling, fits, "set model.rollouts.init_args.max_model_len to")
        stop = eos_ids(model)
        with_logprobs = self.logprob_tolerance is not None or self.max_importance_ratio is not None
        rows = [vllm.TokensPrompt(prompt_token_ids=list(prompt)) for prompt in prompts for _ in range(sampling.n)]
        settings = [
            vllm.SamplingParams(
                **sampling_fields(sampling, stop, seed_for(seed, row), with_logprobs),
                detokenize=False,
            )
            for row in range(len(rows))
        ]
        outputs = self._llm.generate(rows, settings, lora_request=request, use_tqdm=False)
        if self.sleep:
            self._llm.sleep(level=1)
        self._versions.remove(self._versions.outdated())
        if len(outputs) != len(rows):
            raise RuntimeError(f"vLLM returned {len(outputs)} completions for {len(rows)} prompts")
        found = []
        for output in outputs:
            ids = list(output.outputs[0].token_ids)
            logprobs = None
            if with_logprobs:
                logprobs = [place[token].logprob for place, token in zip(output.outputs[0].logprobs, ids, strict=True)]
            found.append(Row(ids, logprobs, str(output.outputs[0].finish_reason)))
        vocabulary = base_of(model).config.get_text_config().vocab_size
        return as_rollouts(found, Expected(sampling.max_new_tokens, stop, vocabulary, with_logprobs), sampling.n)

    def _start(self, vllm: Any, model: PeftModel) -> Any:
        name = base_of(model).config._name_or_path
        rank = max(getattr(config, "r", 1) for config in model.peft_config.values())
        settings = {
            "model": name,
            "enable_lora": True,
            "max_lora_rank": next((r for r in _RANKS if r >= rank), rank),
            "gpu_memory_utilization": self.gpu_memory_utilization,
            "enable_sleep_mode": self.sleep,
            "generation_config": "vllm",  # the checkpoint's own sampling defaults stay out
            "seed": 0,
        } | self.options
        length = sampler_length(base_of(model), self.max_model_len, "model.rollouts.init_args.max_model_len")
        if length is not None:
            settings["max_model_len"] = length
        try:
            with _only_device(device_of(model)):
                return vllm.LLM(**settings)
        except (ValueError, TypeError, OSError) as error:
            raise UserError(f"model.rollouts: vLLM cannot load {name} ({error})") from error

    def close(self) -> None:
        if self._end is not None:
            self._end()
        self._llm = self._versions = self._end = None
        self._numbers = {}


def _end(pool: ServerPool, versions: AdapterVersions) -> None:
    """Remove a run's adapters, from disk and from the servers."""
    if names := versions.remove_all():
        pool.drop(names)
    pool.close()


class _Asked(NamedTuple):
    """What one call of ``generate`` asks for, but for the weights."""

    prompts: tuple[tuple[int, ...], ...]
    sampling: Sampling
    seed: int


class _Ahead:
    """A rollout on its way in a thread of its own."""

    def __init__(self, asked: _Asked, task: Callable[..., Rollouts], adapter: Adapter | None) -> None:
        self.asked, self.adapter = asked, adapter
        self.found: Rollouts | None = None
        self.error: BaseException | None = None
        self.cancelled = threading.Event()
        self.thread = threading.Thread(target=self._run, args=(task,), name="opsd-ahead", daemon=True)
        self.thread.start()

    def _run(self, task: Callable[..., Rollouts]) -> None:
        try:
            self.found = task(self.cancelled)
        except BaseException as error:  # also a stop, which ends the run where the rollout is wanted
            self.error = error

    def result(self) -> Rollouts:
        """Wait for it."""
        self.thread.join()
        if self.error is not None:
            raise self.error
        assert self.found is not None
        return self.found

    def stop(self) -> None:
        """Send no more, and wait for what is under way."""
        self.cancelled.set()
        self.thread.join()


def _import_vllm() -> Any:
    try:
        import vllm
        import vllm.lora.request
    except ImportError as error:
        raise UserError(
            f"model.rollouts is VLLMEngine, but vLLM cannot be imported ({error}): install the vllm package into this "
            "environment, or use VLLMServerEngine, whose servers have one of their own"
        ) from None
    return vllm


@contextmanager
def _only_device(device: torch.device) -> Iterator[None]:
    """The process that vLLM starts inside sees this rank's GPU alone: it would take the first one."""
    if device.type != "cuda" or torch.cuda.device_count() == 1:
        yield
        return
    before = os.environ.get("CUDA_VISIBLE_DEVICES")
    index = device.index if device.index is not None else torch.cuda.current_device()
    os.environ["CUDA_VISIBLE_DEVICES"] = str(index) if before is None else before.split(",")[index]
    try:
        yield
    finally:
        if before is None:
            del os.environ["CUDA_VISIBLE_DEVICES"]
        else:
            os.environ["CUDA_VISIBLE_DEVICES"] = before
