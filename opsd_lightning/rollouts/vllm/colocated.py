"""Rollouts by vLLM in the trainer's process: one vLLM instance on each rank, on the trainer's GPU.

vLLM has its own copy of the base weights. Before each rollout it takes its memory back and loads the adapter if its weights
have changed. Afterwards it sleeps: the weights move to host memory, and the memory of keys and values is freed for training.
"""

from __future__ import annotations

import tempfile
import weakref
from collections.abc import Sequence
from pathlib import Path
from typing import Any, final

import torch
from lightning.pytorch.utilities import rank_zero_info
from peft import PeftModel
from torch import Tensor

from opsd_lightning.distributed.collectives import run_on_all_ranks
from opsd_lightning.models.cache_size import cache_bytes
from opsd_lightning.models.dequantized import write_dequantized
from opsd_lightning.models.export import adapter_weights
from opsd_lightning.models.policy import ModelSettings, active_adapter, base_of, device_of, eos_ids
from opsd_lightning.models.rope import sampler_length
from opsd_lightning.rollouts.base import Demand, RolloutEngine, seed_for
from opsd_lightning.rollouts.vllm import process
from opsd_lightning.rollouts.vllm.adapters import AdapterVersions
from opsd_lightning.rollouts.vllm.memory import memory_of, memory_share
from opsd_lightning.rollouts.vllm.protocol import (
    Expected,
    Row,
    as_rollouts,
    check_length,
    check_policy,
    max_lora_rank,
    sampling_fields,
)
from opsd_lightning.types import ConfigError, OpenUnitInterval, PositiveFloat, PositiveInt, Rollouts, Sampling, checked
from opsd_lightning.utils.folders import remove_tree

_MAX_ROWS = 256  # completions that vLLM decodes at once, its default on most GPUs
_MAX_MODEL_LEN = "model.rollouts.init_args.max_model_len"
_DTYPES = {"float32": torch.float32, "float": torch.float32, "float16": torch.float16, "half": torch.float16}
#: Arguments of ``vllm.LLM`` that follow from other settings.
_RESERVED = {
    "model": "model.policy.model",
    "tokenizer": "model.policy.model",
    "revision": "model.policy.revision",
    "tokenizer_revision": "model.policy.revision",
    "trust_remote_code": "model.policy.trust_remote_code",
    "gpu_memory_utilization": "model.rollouts.init_args.gpu_memory_utilization",
    "max_model_len": _MAX_MODEL_LEN,
    "enable_sleep_mode": "model.rollouts.init_args.sleep",
    "enable_lora": "model.policy.lora",
    "max_lora_rank": "model.policy.lora.r",
    "tensor_parallel_size": "trainer.devices",
    "generation_config": "model.sampling",
    "logprobs_mode": "model.sampling",  # log-probabilities are compared at temperature 1
}


@checked
@final
class VLLMEngine(RolloutEngine):
    """Rollouts by vLLM in this process, on the trainer's GPU, with one vLLM instance on each rank.

    Needs vLLM in the trainer's environment (docs/vllm.md) and memory for a second copy of the base weights in 16 bits, which
    is freed between rollouts. If the policy is quantized to 4 bits, vLLM gets its dequantized weights.

    Args:
        gpu_memory_utilization: Fraction of the GPU's memory for vLLM's weights, keys and values, above 0 and below 1.
            Defaults to the need of the run's largest rollout, or to the free memory if that is less.
        sleep: If True, free this memory between rollouts: the weights move to host memory. Only on GPUs.
        max_model_len: Length limit of a prompt with its completion in tokens, at least 1. Defaults to the run's longest
            prompt and completion, in training and evaluation.
        adapter_folder: Folder for adapters and dequantized weights. Each run uses its own subfolder. Defaults to the
            system's temporary folder.
        logprob_tolerance: Largest accepted difference between vLLM's log-probabilities and the trainer's own, in nats and
            averaged over the tokens of a step. Training stops beyond it. Null disables the check.
        max_importance_ratio: Upper limit, above 0, of the ratio of a token's probability under the student to that under
            vLLM, by which its loss is weighted. Defaults to no weighting.
        options: Further arguments of ``vllm.LLM``, by name, such as ``{dtype: bfloat16, enforce_eager: true}``.

    Example::

        >>> from opsd_lightning import VLLMEngine
        >>> engine = VLLMEngine(options={"dtype": "bfloat16"})
        >>> engine.sleep
        True
    """

    neutral_settings = RolloutEngine.neutral_settings | {"adapter_folder", "gpu_memory_utilization", "sleep"}

    def __init__(
        self,
        gpu_memory_utilization: OpenUnitInterval | None = None,
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
        if found := sorted(_RESERVED.keys() & self.options.keys()):
            raise ConfigError(
                f"{found[0]} cannot be set here",
                "model.rollouts.init_args.options",
                f"Remove it, and use {_RESERVED[found[0]]}",
            )
        self._policy: ModelSettings | None = None
        self._demand: Demand | None = None
        self._llm: Any = None
        self._log: process.EngineLog | None = None
        self._versions: AdapterVersions | None = None
        self._numbers: dict[str, int] = {}
        self._finalizer: weakref.finalize[..., Any] | None = None

    def __getstate__(self) -> dict[str, Any]:
        running = {"_policy": None, "_demand": None, "_llm": None, "_log": None, "_versions": None, "_finalizer": None}
        return self.__dict__ | running | {"_numbers": {}}

    def prepare(self, policy: ModelSettings, demand: Demand | None = None) -> None:
        check_policy(policy)
        if policy.model.endswith(".gguf"):
            raise ConfigError(
                "vLLM cannot load a .gguf file for training", "model.policy.model", "Convert it to a model folder first"
            )
        if policy.quantization is not None and policy.quantization.load_in_8bit:
            raise ConfigError(
                "the policy computes in 8 bits, and vLLM has no such computation, so its log-probabilities would differ",
                "model.policy.quantization",
                "Use 4 bits or none, or TransformersEngine",
            )
        if demand is not None and self.max_model_len is not None and demand.tokens > self.max_model_len:
            raise ConfigError(
                f"the longest prompt and completion of the run are {demand.tokens} tokens, more than {self.max_model_len}",
                _MAX_MODEL_LEN,
                f"Set it to {demand.tokens} or more, or remove it",
            )
        self._policy, self._demand = policy, demand

    def memory_share(self, weights: int, row: int, rows: int, free: int, total: int, kept: int = 0) -> float:
        """Return the share of the GPU's memory that vLLM gets, ``gpu_memory_utilization`` if it is set.

        Takes the arguments of `rollouts.vllm.memory.memory_share`. Without ``sleep``, half of the free memory at most is
        used, since training needs the rest.

        Raises:
            ConfigError: Not even one completion fits.
        """
        if self.gpu_memory_utilization is not None:
            return self.gpu_memory_utilization
        return memory_share(weights, row, min(rows, _MAX_ROWS), free if self.sleep else free // 2, total, kept)

    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        role = active_adapter(model)
        weights = None if role is None else adapter_weights(model, role)
        return run_on_all_ranks(lambda: self._generate(model, role, weights, prompts, sampling, seed))

    def _generate(
        self,
        model: PeftModel,
        role: str | None,
        weights: dict[str, Tensor] | None,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        seed: int,
    ) -> Rollouts:
        vllm = process.import_vllm()
        if self._versions is None:
            self._open()
        assert self._versions is not None and self._log is not None
        request = None
        if role is not None and weights is not None:
            adapter = self._versions.write(model, role, weights)
            # Each version needs its own number, since vLLM caches loaded adapters by number.
            number = self._numbers.setdefault(adapter.name, len(self._numbers) + 1)
            request = vllm.lora.request.LoRARequest(adapter.name, number, adapter.folder)
        if self._llm is None:
            self._llm = self._start(vllm, model, prompts, sampling)
        elif self.sleep:
            process.guarded("take back its GPU memory", self._log, lambda: process.wake(self._llm))
        check_length(prompts, sampling, process.context_length(self._llm), _MAX_MODEL_LEN)
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
        outputs = process.guarded(
            "sample", self._log, lambda: self._llm.generate(rows, settings, lora_request=request, use_tqdm=False)
        )
        if self.sleep:
            process.guarded("free its GPU memory", self._log, lambda: self._llm.sleep(level=1))
        self._versions.remove(self._versions.outdated())
        if len(outputs) != len(rows):
            raise RuntimeError(f"vLLM returned {len(outputs)} completions for {len(rows)} prompts")
        found = []
        for output in outputs:
            one = output.outputs[0]
            logprobs = process.sampled_logprobs(one) if with_logprobs else None
            found.append(Row(list(one.token_ids), logprobs, str(one.finish_reason)))
        vocabulary = base_of(model).config.get_text_config().vocab_size
        return as_rollouts(found, Expected(sampling.max_new_tokens, stop, vocabulary, with_logprobs), sampling.n)

    def _open(self) -> None:
        """Open the run's folder and the file for vLLM's output. They are removed at the end of the process at the latest."""
        parent = Path(self.adapter_folder or tempfile.gettempdir()).expanduser().absolute()
        self._versions = AdapterVersions(parent, "opsd")
        self._versions.remove_dead_runs()
        self._log = process.EngineLog()
        self._finalizer = weakref.finalize(self, self._versions.remove_all)

    def _start(self, vllm: Any, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling) -> Any:
        assert self._versions is not None and self._log is not None
        base, log, folder = base_of(model), self._log, None
        name, dtype = base.config._name_or_path, self._dtype(model)
        demand = self._demand or Demand(max(map(len, prompts)) + sampling.max_new_tokens, len(prompts) * sampling.n)
        rank = max(getattr(config, "r", 1) for config in model.peft_config.values())
        source: dict[str, Any] = {"model": name}
        if self._policy is not None:
            source |= {"trust_remote_code": self._policy.trust_remote_code}
            if self._policy.revision is not None:
                source |= {"revision": self._policy.revision, "tokenizer_revision": self._policy.revision}
        if getattr(base, "is_quantized", False):
            folder = self._versions.scratch("base")
            write_dequantized(model, folder, dtype)
            source |= {"model": str(folder), "tokenizer": name}
            source.pop("revision", None)
        settings = source | {
            "dtype": str(dtype).removeprefix("torch."),
            "max_model_len": self._length(model, demand),
            "max_num_seqs": min(demand.rows, _MAX_ROWS),
            "enable_lora": True,
            "max_lora_rank": max_lora_rank(rank),
            "enable_sleep_mode": self.sleep,
            "generation_config": "vllm",  # do not apply the checkpoint's sampling defaults
            "seed": 0,
        }
        device = device_of(model)
        torch.cuda.empty_cache()
        settings["gpu_memory_utilization"] = self._share(model, demand, dtype, device)
        rank_zero_info(f"Starting vLLM {vllm.__version__} for {name}, with its output in {log.path}")
        try:
            with process.child_environment(device):
                llm = process.guarded(f"load {name}", log, lambda: vllm.LLM(**settings | self.options), quiet=True)
        finally:
            if folder is not None:  # loaded, and as large as the model
                remove_tree(folder)
        return llm

    def _dtype(self, model: PeftModel) -> torch.dtype:
        """Return the data type of vLLM's weights: that of ``options``, else the trainer's, in 16 bits on a GPU."""
        chosen = self.options.get("dtype")
        if chosen is not None and chosen != "auto":
            name = str(chosen).removeprefix("torch.")
            return _DTYPES.get(name, torch.bfloat16)
        own: torch.dtype = base_of(model).dtype
        on_gpu = device_of(model).type == "cuda"
        return torch.bfloat16 if on_gpu and own == torch.float32 else own

    def _length(self, model: PeftModel, demand: Demand) -> int:
        """Return the context length for vLLM.

        Raises:
            ConfigError: vLLM would use other RoPE frequencies than the trainer.
        """
        own = sampler_length(base_of(model), self.max_model_len, _MAX_MODEL_LEN)
        return demand.tokens if own is None else own

    def _share(self, model: PeftModel, demand: Demand, dtype: torch.dtype, device: torch.device) -> float:
        """Return the share of the device's memory for vLLM, from the free memory and the run's largest rollout."""
        base = base_of(model)
        row = cache_bytes(base.config, -(-demand.tokens // 16) * 16, dtype.itemsize)  # vLLM's pages hold 16 tokens
        parameters = sum(_numbers(p) for p in base.parameters())
        trainable = sum(p.numel() for p in model.parameters() if p.requires_grad)
        free, total = memory_of(device)
        # Gradients and AdamW's two moments in float32, allocated in the first optimizer step.
        return self.memory_share(parameters * dtype.itemsize, row, demand.rows, free, total, kept=12 * trainable)

    def close(self) -> None:
        if self._finalizer is not None:
            self._finalizer()
        if self._llm is not None and self._log is not None:
            process.stop(self._llm, self._log)
            self._log.remove()
        self._llm = self._log = self._versions = self._finalizer = None
        self._numbers = {}


def _numbers(parameter: Tensor) -> int:
    """Return the number of weights in a parameter. bitsandbytes packs two 4-bit weights into one byte."""
    state = getattr(parameter, "quant_state", None)
    return int(parameter.numel() if state is None else state.shape.numel())
