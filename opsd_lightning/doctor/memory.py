"""Estimates of the memory of a run from the model's configuration, without loading weights.

The policy and its adapter are built on the meta device, where tensors have shapes and no data.

    weights      base model, by data type; 4-bit and 8-bit weights with their scales
    teacher      a copy of the adapter, or a separate model
    trainable    adapter (all weights in full fine-tuning), gradients, and optimizer state, which is measured by one step of
                 the configured optimizer on a small tensor
    rollout      keys and values of all completions at full length, and an engine's copies of the weights
    scoring      activations that autograd saves in one pass, the teacher's hidden states of the whole step, and the
                 objective's logits_memory_mib
    total        weights + teacher + trainable + the larger of rollout and scoring; on a CPU the sum of both, since the C
                 allocator keeps most of the memory that one phase has freed while the other runs

Not included: the CUDA context and the allocator's reserve (about 1 GiB), the libraries, and attention kernels that are
neither flash nor memory-efficient. The first steps of the quick start on a CPU took 3.6 GiB without the libraries; the
estimate is 3.4 GiB.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import torch
from peft import PeftModel
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, DynamicCache, PretrainedConfig

from opsd_lightning.doctor.findings import Finding
from opsd_lightning.losses.objectives import Objective
from opsd_lightning.models.policy import ModelSettings, Policy, base_of, is_adapter_key
from opsd_lightning.models.scoring import hidden_states

GIB = 2**30


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


def cache_bytes(config: PretrainedConfig, tokens: int, element_size: int) -> int:
    """Return the bytes of keys and values of one row with this many tokens, prompt included."""
    text: Any = config.get_text_config()
    if (heads := getattr(text, "num_attention_heads", None)) is None:  # a recurrent state, whatever the length
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    each = 2 * (getattr(text, "num_key_value_heads", None) or heads) * width * element_size
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    windows = windows or [None] * text.num_hidden_layers
    return sum(each * (tokens if window is None else min(tokens, window - 1)) for window in windows)


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
            # Held until counted: a storage that is let go may come back under the same name.
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


def memory(
    model: PeftModel,
    policy: Policy,
    objective: Objective,
    make_optimizer: Callable[..., Any],
    step: Step,
    *,
    teacher: int = 0,
    teacher_states: int = 1,
    merged_copies: int = 0,
    shards: int = 1,
    gathers: bool = False,
    frees: bool = True,
) -> dict[str, int]:
    """Return the bytes on one device by purpose, and their ``total``.

    Args:
        model: A skeleton of the policy.
        policy: Settings of the policy.
        objective: Objective of the method.
        make_optimizer: Makes the optimizer of parameters.
        step: Sizes of a step on this device.
        teacher: Bytes of teachers' weights.
        teacher_states: Number of teachers that score each completion.
        merged_copies: Copies of the base weights that the engine makes for a rollout.
        shards: Devices over which weights, gradients and optimizer state are sharded.
        gathers: If True, each device gathers all weights for a rollout.
        frees: If True, memory that one phase frees is available to the next, as on a GPU.
    """
    base = base_of(model)
    config = base.config.get_text_config()
    trainable = [p for p in model.parameters() if p.requires_grad]
    weights = weight_bytes(model, policy.quantization)
    frozen = weights - (size_of(trainable) if policy.trains_all else 0)
    element = base.dtype.itemsize
    per_token = kept_bytes_per_token(model)
    if policy.gradient_checkpointing:  # each layer's input, and one layer while it is computed anew
        layers = config.num_hidden_layers
        per_token = layers * config.hidden_size * element + per_token / layers
    widest = max((layer.weight.numel() for layer in quantized_layers(model, policy.quantization)), default=0)
    tokens = step.rows * step.completion
    rows = min(step.rows_at_once or 0, step.rows)
    cache = rows * cache_bytes(base.config, step.prompt + step.completion, element)
    if step.eval_rows and step.rows_at_once:
        rows = min(step.rows_at_once, step.eval_rows)
        cache = max(cache, rows * cache_bytes(base.config, step.prompt + step.eval_completion, element))
    found = {
        "base weights": frozen // shards,
        "teacher": teacher // shards,
        "trainable weights": size_of(trainable) // shards,
        "gradients": size_of(trainable) // shards,
        "optimizer state": optimizer_bytes(make_optimizer, trainable) // shards,
        "rollout: keys and values": cache,
        "rollout: copies of weights": merged_copies * weights + (weights - weights // shards if gathers else 0),
        "scoring: activations": int(step.pass_tokens * per_token) + widest * element,
        "scoring: states of teachers": teacher_states * tokens * config.hidden_size * element,
        "scoring: logits": logits_bytes(objective, config.vocab_size, min(tokens, step.pass_tokens), element),
    }
    phase = {name: sum(value for key, value in found.items() if key.startswith(name)) for name in ("rollout", "scoring")}
    kept = sum(value for key, value in found.items() if ":" not in key)
    return found | {"total": kept + (max if frees else sum)(phase.values())}


def memory_of(device: torch.device) -> int:
    """Return the bytes of a device: a GPU's memory, or the part of the machine's memory that this process may use."""
    if device.type == "cuda":
        return int(torch.cuda.get_device_properties(device).total_memory)
    limits = [os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")]
    for path in ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes"):
        try:
            limits.append(int(Path(path).read_text()))
        except (OSError, ValueError):  # no such limit
            continue
    return min(limits)


_LESS_MEMORY: dict[str, tuple[str, str]] = {
    "base weights": ("model.policy.quantization", "quantize to 4 bits (see configs/qwen3_*_qlora.yaml), or shard (fsdp2)"),
    "teacher": ("model.teacher", "use FixedTeacher with an adapter, which needs no copy of the weights"),
    "trainable weights": ("model.policy.lora", "train an adapter (LoRA), or lower model.policy.lora.r"),
    "gradients": ("model.policy.lora", "train an adapter (LoRA), or lower model.policy.lora.r"),
    "optimizer state": ("model.optimizer", "use bitsandbytes.optim.AdamW8bit, train an adapter, or shard (fsdp2)"),
    "rollout: keys and values": (
        "model.rollouts.init_args.max_rows",
        "set it, to sample in several batches",
    ),
    "rollout: copies of weights": ("model.rollouts.init_args.merge_adapter", "set it to false"),
    "scoring: activations": ("model.token_budget", "lower it, and set model.policy.gradient_checkpointing to true"),
    "scoring: states of teachers": ("data.batch_size", "lower it, or model.sampling.max_new_tokens"),
    "scoring: logits": ("model.objective.init_args.logits_memory_mib", "lower it"),
}


def less_memory(found: dict[str, int]) -> tuple[str, str]:
    """Return the setting that saves most memory, and the advice for it.

    Args:
        found: The result of `memory`.
    """
    return _LESS_MEMORY[max((part for part in found if part != "total"), key=found.__getitem__)]


def memory_findings(
    found: dict[str, int], has: int, device: str, measured: dict[str, int] | None = None
) -> Iterator[Finding]:
    """Find whether a step fits into the memory of the device.

    Args:
        found: The result of `memory`.
        has: Bytes of the device.
        device: Name of the device.
        measured: The result of `trial.measured_memory`. Defaults to none: the estimate is compared.
    """
    total = found["total"] if measured is None else measured["extrapolated_bytes"]
    if total > 0.9 * has:
        worst = max((part for part in found if part != "total"), key=found.__getitem__)
        text = f"about {total / GIB:.2g} GiB are needed, most of it for {worst}; {device} has {has / GIB:.2g}"
        if measured is not None:
            text += (
                f" (extrapolated from {measured['peak_bytes'] / GIB:.2g} GiB of a step of {measured['rows']} completions of "
                f"{measured['completion']} tokens)"
            )
        yield Finding("error" if total > has else "warning", "memory", text, *less_memory(found))
