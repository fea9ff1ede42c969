"""Estimates of the memory of a run from the model's configuration, without loading weights.

The policy and its adapter are built on the meta device, where tensors have shapes and no data.

    base weights   base model, by data type; 4-bit and 8-bit weights with their scales
    teacher        a copy of the adapter, or a separate model
    trainable      adapter (all weights in full fine-tuning), gradients, and optimizer state, which is measured by one step
                   of the configured optimizer on a small tensor
    rollout        what sampling needs at one time: the engine's copies of the weights, keys and values of the completions at
                   full length, logits and their copies in the sampler; or vLLM's share of the device
    validation     the same with the rows and lengths of validation
    scoring        activations that autograd saves in one pass, the teacher's hidden states of the whole step, and the
                   objective's logits_memory_mib
    reserve        the CUDA context, and gaps between the allocator's blocks (`RESERVE`, an assumption)
    total          weights + teacher + trainable + reserve + the largest of rollout, validation and scoring; on a CPU
                   rollout (or validation) and scoring are added up, since the C allocator keeps most of the memory that one
                   phase has freed while the other runs

On CUDA, `TransformersEngine` samples as many completions at one time as fit into the free memory. So do the estimates.

Not included: the libraries, and attention kernels that are neither flash nor memory-efficient. The first steps of the quick
start on a CPU took 3.6 GiB without the libraries; the estimate is 3.4 GiB. Nothing was measured on a GPU. On an imitated
device, the peak of a layer with LoRA under bfloat16 autocast is within 5 % of the estimate (``benchmarks/memory.py``).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from opsd_lightning.doctor.findings import Finding, Level
from opsd_lightning.losses.objectives import Objective
from opsd_lightning.models.cache_size import cache_bytes
from opsd_lightning.models.policy import ModelSettings, Policy, base_of, is_adapter_key
from opsd_lightning.models.scoring import hidden_states
from opsd_lightning.rollouts.base import LocalEngine, RolloutEngine
from opsd_lightning.rollouts.capacity import free_bytes, place_copy, row_bytes, rows_that_fit
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.rollouts.vllm.colocated import VLLMEngine

GIB = 2**30
#: Assumed bytes of a CUDA context and of the gaps between an allocator's blocks, with segments that can grow.
RESERVE = GIB


class DeviceMemory(NamedTuple):
    """Memory of a device.

    Args:
        type: ``cuda`` or ``cpu``.
        available: Bytes that this process may use.
        total: Bytes of the device.
    """

    type: str
    available: int
    total: int

    @classmethod
    def card(cls, gigabytes: float) -> DeviceMemory:
        """Return the memory of a GPU that is sold with this many gigabytes, with nothing else on it."""
        return cls("cuda", int(gigabytes * 10**9), int(gigabytes * 10**9))

    @classmethod
    def of(cls, device: torch.device) -> DeviceMemory:
        """Read the free memory of a GPU, or the part of the machine's memory that this process may use."""
        if device.type == "cuda":
            return cls("cuda", free_bytes(device), int(torch.cuda.mem_get_info(device)[1]))
        limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
        for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
            try:
                limits.append(int(Path(path).read_text()))
            except (OSError, ValueError):  # no such limit
                continue
        return cls("cpu", min(limits), min(limits))

    @property
    def on_cuda(self) -> bool:
        return self.type == "cuda"


class Step(NamedTuple):
    """The sizes of an optimizer step of one rank.

    Args:
        rows: Completions.
        prompt: Tokens of a long student's prompt.
        completion: Tokens of the longest completion.
        rows_at_once: Completions that are sampled at one time. 0 if this process samples none.
        token_budget: Tokens of one scoring pass.
        eval_rows: Completions of a validation batch. 0 without validation.
        eval_completion: Tokens of the longest completion in validation.
    """

    rows: int
    prompt: int
    completion: int
    rows_at_once: int
    token_budget: int
    eval_rows: int = 0
    eval_completion: int = 0

    @property
    def pass_tokens(self) -> int:
        """Tokens of the largest scoring pass."""
        row = self.prompt + self.completion
        return min(max(self.token_budget // row * row, row), self.rows * row)

    def shortened(self, rows: int, completion: int, prompt: int | None = None) -> Step:
        """Return a step with fewer rows and shorter completions, and without evaluation."""
        prompt = self.prompt if prompt is None else prompt
        return self._replace(rows=rows, completion=completion, prompt=prompt, eval_rows=0)


def skeleton(policy: ModelSettings) -> PeftModel:
    """Return the policy on the meta device, without weights.

    Raises:
        UserError: The model's configuration cannot be read, or the adapter does not fit it.
    """
    config = policy.load_config()
    dtype = config.dtype or torch.float32 if policy.dtype == "auto" else getattr(torch, policy.dtype)
    with torch.device("meta"):
        base = AutoModelForCausalLM.from_config(config, dtype=dtype, trust_remote_code=policy.trust_remote_code)
        if not policy.trains_all:
            base.requires_grad_(False)
        return policy.adapt(base).train()


def size_of(tensors: Iterable[Tensor]) -> int:
    """Return the bytes of tensors, each counted once."""
    return sum(tensor.numel() * tensor.element_size() for tensor in {id(tensor): tensor for tensor in tensors}.values())


def weight_bytes(model: PeftModel, quantization: BitsAndBytesConfig | None) -> int:
    """Return the bytes of the base model's weights and buffers as stored, with the scales of quantized weights."""
    thin = {id(layer.weight): _quantized_bytes(layer.weight.numel(), layer.weight.shape[0], quantization)
            for layer in quantized_layers(model, quantization)}  # fmt: skip
    rest = [p for name, p in model.named_parameters() if not is_adapter_key(name) and id(p) not in thin]
    return int(sum(thin.values())) + size_of([*rest, *model.buffers()])


def quantized_layers(model: PeftModel, quantization: BitsAndBytesConfig | None) -> list[nn.Linear]:
    """Return the layers that transformers quantizes: all linear layers except the head."""
    if quantization is None:
        return []
    head = base_of(model).get_output_embeddings()
    kept = quantization.llm_int8_skip_modules or []
    return [
        layer
        for name, layer in model.named_modules()
        if isinstance(layer, nn.Linear) and layer is not head and not is_adapter_key(name)
        and not any(part in kept for part in name.split("."))
    ]  # fmt: skip


def _quantized_bytes(numbers: int, rows: int, quantization: BitsAndBytesConfig | None) -> float:
    assert quantization is not None
    if quantization.load_in_8bit:
        return numbers + 4 * rows
    # One scale for 64 numbers: 4 bytes, or with double quantization 1 byte and 4 for 256 scales.
    return numbers / 2 + numbers / 64 * ((1 + 4 / 256) if quantization.bnb_4bit_use_double_quant else 4)


def optimizer_bytes(make: Callable[..., Any], trainable: list[nn.Parameter]) -> int:
    """Return the bytes of optimizer state for parameters, measured on a tensor of 4096 numbers."""
    if not trainable:
        return 0
    small = nn.Parameter(torch.ones(64, 64, dtype=trainable[0].dtype))
    small.grad = torch.ones_like(small)
    try:
        optimizer = make([small])
        optimizer.step()
        kept = [value for value in optimizer.state[small].values() if isinstance(value, Tensor)]
    except Exception:  # an optimizer for GPUs only, such as bitsandbytes': assume two moments
        return sum(p.numel() for p in trainable) * 2 * (1 if "8bit" in repr(make) else 4)
    each = [value for value in kept if value.numel() == small.numel()]
    fixed = size_of(kept) - size_of(each)
    return sum(p.numel() for p in trainable) * size_of(each) // small.numel() + fixed * len(trainable)


def kept_bytes_per_token(model: PeftModel) -> float:
    """Return the bytes that autograd saves for each token of a row, without gradient checkpointing.

    Args:
        model: A skeleton, or a model with its weights.
    """
    own = {tensor.untyped_storage()._cdata for tensor in [*model.parameters(), *model.buffers()]}
    device = next(model.parameters()).device

    def total(tokens: int) -> int:
        kept: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage._cdata not in own:
                kept[storage._cdata] = storage.nbytes()
            return tensor

        ids = torch.zeros(1, tokens, dtype=torch.long, device=device)
        # A mask of its own, since transformers would look at the positions to choose one, and here they have no numbers.
        mask = torch.ones(1, 1, tokens, tokens, dtype=torch.bool, device=device)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            # Held until counted: a new storage may get the identity of one that was freed.
            _graph = hidden_states(model, input_ids=ids, attention_mask=mask, use_cache=False)
        return sum(kept.values())

    # Attention on the meta device saves a matrix of shape [tokens, tokens]. The kernels of real devices do not, so that the
    # part that grows with the square of the length is subtracted.
    try:
        short, middle, long = total(16), total(32), total(48)
    except (RuntimeError, NotImplementedError):
        # Experts that are chosen token by token, and some recurrences, cannot run on a device without numbers.
        return typical_bytes_per_token(base_of(model).config.get_text_config(), base_of(model).dtype)
    square = (long - 2 * middle + short) / 2 / 16**2
    return (middle - short) / 16 - square * 48


def typical_bytes_per_token(config: Any, dtype: torch.dtype) -> float:
    """Return a rough value of `kept_bytes_per_token` for a transformer, from the sizes in its configuration."""
    inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
    if expert := getattr(config, "moe_intermediate_size", None) or (getattr(config, "num_local_experts", 0) and inner):
        inner = expert * (getattr(config, "num_experts_per_tok", None) or 1)
    # The inputs of norms and products, queries, keys and values, and a gated network's inner states.
    return float(config.num_hidden_layers * (16 * config.hidden_size + 5 * inner) * dtype.itemsize)


def logits_bytes(objective: Objective, vocabulary: int, tokens: int, element_size: int) -> int:
    """Return the peak bytes of logits: the bound of the objective, or less for few tokens."""
    return min(objective.logits_memory_mib * 2**20, tokens * vocabulary * (12 * 4 + 2 * element_size))


@dataclass
class Estimator:
    """Estimates the memory of steps of a run on one device.

    Args:
        model: A skeleton of the policy.
        policy: Settings of the policy.
        objective: Objective of the method.
        make_optimizer: Makes the optimizer of parameters.
        engine: Rollout engine.
        device: Memory of the device.
        precision: ``trainer.precision``.
        teacher: Bytes of teachers' weights.
        teacher_states: Number of teachers that score each completion.
        shards: Devices over which weights, gradients and optimizer state are sharded.
    """

    model: PeftModel
    policy: Policy
    objective: Objective
    make_optimizer: Callable[..., Any]
    engine: RolloutEngine
    device: DeviceMemory
    precision: str = "32-true"
    teacher: int = 0
    teacher_states: int = 1
    shards: int = 1

    def parts(self, step: Step) -> dict[str, int]:
        """Return the bytes of a step by purpose, and their ``total``."""
        return self._parts(step, max(step.rows, step.eval_rows))

    def _parts(self, step: Step, vllm_rows: int) -> dict[str, int]:
        kept = dict(self._kept)
        if isinstance(self.engine, VLLMEngine) and not self.engine.sleep:  # also while training
            kept["vLLM"] = self._vllm_bytes(step, vllm_rows)
        found = dict(kept)
        phases = {
            "rollout": self._sampling(step.rows, step.prompt, step.completion, step.rows_at_once),
            "validation": self._sampling(step.eval_rows, step.prompt, step.eval_completion, step.rows_at_once),
            "scoring": self._scoring(step),
        }
        if isinstance(self.engine, VLLMEngine) and self.engine.sleep:
            phases["rollout"] = {"vLLM": self._vllm_bytes(step, vllm_rows)}
        found |= {f"{phase}: {part}": size for phase, parts in phases.items() for part, size in parts.items()}
        sizes = {phase: sum(parts.values()) for phase, parts in phases.items()}
        sampling = max(sizes["rollout"], sizes["validation"])
        at_once = max(sampling, sizes["scoring"]) if self.device.on_cuda else sampling + sizes["scoring"]
        return found | {"total": sum(kept.values()) + at_once}

    def least(self, step: Step) -> dict[str, int]:
        """Return the bytes of a step in which the engine samples as few completions at one time as it can."""
        if isinstance(self.engine, VLLMEngine):
            return self._parts(step, 1)
        return self.parts(step._replace(rows_at_once=min(step.rows_at_once, 1))) if self._bounds_itself else self.parts(step)

    def rows_at_once(self, step: Step) -> int:
        """Return the number of completions that are sampled at one time in a training step."""
        if not self._bounds_itself or not step.rows_at_once:
            return step.rows_at_once
        return self._placed(min(step.rows, step.rows_at_once), step.prompt, step.completion)[1]

    def rollout_weights(self, step: Step) -> int:
        """Return the bytes of the weights that a decoded token reads."""
        copied = self._sampling(step.rows, step.prompt, step.completion, step.rows_at_once).get("copies of weights", 0)
        return copied or self._kept["base weights"]

    @property
    def cached_bytes(self) -> float:
        """Bytes of the keys and values of one token, in 16 bits."""
        return cache_bytes(base_of(self.model).config, 1024, 2) / 1024

    @property
    def _bounds_itself(self) -> bool:
        return self.device.on_cuda and isinstance(self.engine, TransformersEngine)

    @cached_property
    def _kept(self) -> dict[str, int]:
        trainable = [p for p in self.model.parameters() if p.requires_grad]
        weights = weight_bytes(self.model, self.policy.quantization)
        frozen = weights - (size_of(trainable) if self.policy.trains_all else 0)
        found = {
            "base weights": frozen // self.shards,
            "teacher": self.teacher // self.shards,
            "trainable weights": size_of(trainable) // self.shards,
            "gradients": size_of(trainable) // self.shards,
            "optimizer state": optimizer_bytes(self.make_optimizer, trainable) // self.shards,
        }
        if self.device.on_cuda:
            found["reserve"] = RESERVE
        return found

    @cached_property
    def _per_token(self) -> float:
        """Bytes of activations for each token of a scoring pass."""
        config, element = self._config, self._element
        kept = kept_bytes_per_token(self.model)
        if not self.policy.gradient_checkpointing:
            return kept
        # Each layer's input, and one layer while it is computed anew, with two gradients of its widest state.
        inner = getattr(config, "intermediate_size", None) or 4 * config.hidden_size
        layers = config.num_hidden_layers
        return layers * config.hidden_size * element + kept / layers + 2 * inner * element

    @property
    def _config(self) -> Any:
        return base_of(self.model).config.get_text_config()

    @property
    def _element(self) -> int:
        """Bytes of a number of the base model."""
        return int(base_of(self.model).dtype.itemsize)

    def _scoring(self, step: Step) -> dict[str, int]:
        config, tokens = self._config, step.rows * step.completion
        widest = max((layer.weight.numel() for layer in quantized_layers(self.model, self.policy.quantization)), default=0)
        return {
            "activations": int(step.pass_tokens * self._per_token) + widest * self._element,
            "states of teachers": self.teacher_states * tokens * config.hidden_size * self._element,
            "logits": logits_bytes(self.objective, config.vocab_size, min(tokens, step.pass_tokens), self._element),
        }

    def _sampling(self, rows: int, prompt: int, completion: int, rows_at_once: int) -> dict[str, int]:
        """Return the bytes of sampling some completions, without the parts that are always there."""
        if not rows:
            return {}
        if not isinstance(self.engine, LocalEngine) or not rows_at_once:
            return {}
        copies, rows, element = self._placed(min(rows, rows_at_once), prompt, completion)
        cache = rows * cache_bytes(base_of(self.model).config, prompt + completion, element)
        found = {"copies of weights": copies, "keys and values": cache}
        if self._bounds_itself:
            found["logits and prompts"] = rows * row_bytes(base_of(self.model).config, prompt, completion, element) - cache
        return found

    def _placed(self, rows: int, prompt: int, completion: int) -> tuple[int, int, int]:
        """Return the bytes of copies of weights, the rows at one time, and the bytes of a number of keys and values."""
        weights = weight_bytes(self.model, self.policy.quantization)
        gathered = weights - weights // self.shards if getattr(self.engine, "gather_weights", False) else 0
        config, engine = base_of(self.model).config, self.engine
        plain = self.policy.quantization is None and base_of(self.model).dtype == torch.float32
        merges = plain and getattr(engine, "merge_adapter", False) and not self.policy.trains_all
        if not (self.device.on_cuda and isinstance(engine, TransformersEngine)):
            packs = plain and not self.device.on_cuda and isinstance(engine, TransformersEngine)
            return gathered + weights * (merges + packs), rows, self._element
        free = self.device.available - sum(self._kept.values()) - gathered
        half = self.precision.startswith("bf16") or base_of(self.model).dtype == torch.bfloat16
        if half and engine.rollout_copy and not engine.compile and self.shards == 1:
            each = row_bytes(config, prompt, completion, 2)
            light, full = self._copied_bytes(False), self._copied_bytes(True)
            if (placed := place_copy(free, each, light, full, rows)) is not None:
                return placed.size, placed.rows, 2
        copies = weights if merges and self.precision == "32-true" and 2 * weights < free else 0
        fit = rows_that_fit(free - copies, row_bytes(config, prompt, completion, self._element))
        return gathered + copies, min(rows, fit), self._element

    def _copied_bytes(self, dequantize: bool) -> int:
        """Return the bytes of a bfloat16 copy of the policy, without the weights that it shares with the policy."""
        layers = {id(layer.weight) for layer in quantized_layers(self.model, self.policy.quantization)}
        cast = sum(p.numel() for p in self.model.parameters() if id(p) not in layers and p.dtype != torch.bfloat16)
        four_bits = getattr(self.policy.quantization, "load_in_4bit", False)
        more = sum(p.numel() for p in self.model.parameters() if id(p) in layers) if dequantize and four_bits else 0
        return 2 * (cast + more)

    def _vllm_bytes(self, step: Step, rows: int) -> int:
        """Return the bytes of vLLM in this process: its share of the device, which it fills with keys and values."""
        engine: Any = self.engine
        numbers = sum(p.numel() for name, p in self.model.named_parameters() if not is_adapter_key(name))
        tokens = step.prompt + max(step.completion, step.eval_completion if step.eval_rows else 0)
        row = cache_bytes(base_of(self.model).config, tokens, 2)
        weights, kept = self._kept["base weights"], sum(self._kept.values())
        free = self.device.available - weights
        share = engine.memory_share(2 * numbers, row, rows, free, self.device.total, kept - weights)
        return int(share * self.device.total)


_LESS_MEMORY: dict[str, tuple[str, str]] = {
    "base weights": ("model.policy.quantization", "quantize to 4 bits (see configs/qwen3_*_qlora.yaml), or shard (fsdp2)"),
    "teacher": ("model.teacher", "use FixedTeacher with an adapter, which needs no copy of the weights"),
    "trainable weights": ("model.policy.lora", "train an adapter (LoRA), or lower model.policy.lora.r"),
    "gradients": ("model.policy.lora", "train an adapter (LoRA), or lower model.policy.lora.r"),
    "optimizer state": ("model.optimizer", "use bitsandbytes.optim.AdamW8bit, train an adapter, or shard (fsdp2)"),
    "reserve": ("model.policy.quantization", "quantize to 4 bits (see configs/qwen3_*_qlora.yaml)"),
    "rollout: keys and values": ("model.rollouts.init_args.max_rows", "set it, to sample in several batches"),
    "rollout: copies of weights": ("model.rollouts.init_args.merge_adapter", "set it to false"),
    "rollout: logits and prompts": ("model.rollouts.init_args.max_rows", "set it, to sample in several batches"),
    "vLLM": ("model.rollouts.init_args.sleep", "set it to true, to free vLLM's memory between rollouts"),
    "rollout: vLLM": ("model.rollouts.init_args.gpu_memory_utilization", "lower it, or use TransformersEngine"),
    "scoring: activations": ("model.token_budget", "lower it, and set model.policy.gradient_checkpointing to true"),
    "scoring: states of teachers": ("data.batch_size", "lower it, or model.sampling.max_new_tokens"),
    "scoring: logits": ("model.objective.init_args.logits_memory_mib", "lower it"),
}


def less_memory(found: dict[str, int]) -> tuple[str, str]:
    """Return the setting that saves most memory, and the advice for it.

    Args:
        found: The result of `Estimator.parts`.
    """
    return _LESS_MEMORY[_largest(found).replace("validation: ", "rollout: ")]


def _largest(found: dict[str, int]) -> str:
    return max((part for part in found if part != "total"), key=found.__getitem__)


def memory_findings(
    found: dict[str, int], device: DeviceMemory, name: str, measured: dict[str, int] | None = None
) -> Iterator[Finding]:
    """Find whether a step fits into the free memory of the device.

    Args:
        found: The result of `Estimator.least`.
        device: Memory of the device.
        name: Name of the device.
        measured: The result of `trial.measured_memory`. Defaults to none: the estimate is compared.
    """
    total = found["total"] if measured is None else measured["extrapolated_bytes"]
    if total <= 0.9 * device.available:
        return
    text = f"about {total / GIB:.2g} GiB are needed, most of it for {_largest(found)}; {name} has {device.total / GIB:.2g}"
    level: Level = "error" if total > device.available else "warning"
    if measured is not None:
        text += (
            f" (extrapolated from {measured['peak_bytes'] / GIB:.2g} GiB of a step of {measured['rows']} completions of "
            f"{measured['completion']} tokens)"
        )
    setting, fix = less_memory(found)
    if device.available < 0.9 * device.total:
        text += f", of which {device.available / GIB:.2g} are free"
        if total <= 0.9 * device.total:
            fix = f"end the other processes on the device (nvidia-smi lists them), or: {setting}: {fix}"
    yield Finding(level, "memory", text, setting, fix)
