"""Memory of QLoRA on one GPU by model size and completion length, computed from measured bytes.

    python benchmarks/memory.py                   Qwen3 1.7B, 4B and 8B in the settings of configs/qwen3_*_qlora.yaml

Two numbers are measured on any device: the bytes of an NF4 weight with double quantization, on a layer of the real shape;
and the bytes that autograd keeps per token in one decoder layer of the real width (bfloat16 with a float32 LoRA of rank 64
under autocast), as the difference between two lengths. From them are computed:

    weights   linear weights x measured NF4 bytes + embeddings, tied or not, in bfloat16
    adapter   LoRA parameters x 16 bytes (float32 weight, gradient, and AdamW's two moments)
    rollout   keys and values in bfloat16 of all completions of a step at full length
    scoring   tokens of a pass x (each layer's input in bfloat16, which gradient checkpointing keeps, + what one layer
              keeps while it is recomputed, measured) + the largest layer dequantized
    states    the teacher's hidden states of the whole step in bfloat16
    logits    the objective's logits_memory_mib, whatever the length (384)
    total     weights + adapter + max(rollout, scoring + states + logits)
    plain     total with both roles' logits of one pass at once, 7 float32 tensors of [tokens, vocabulary], instead

A pass has model.token_budget tokens, or one row if the row is longer. The CUDA context and the reserve of the allocator need
about 1 GiB more.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from bitsandbytes.functional import quantize_4bit
from common import machine, parser, report
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

GIB = 2**30


class Size(NamedTuple):
    """Sizes of a Qwen3 model, from its published config.json."""

    hidden: int
    layers: int
    heads: int
    intermediate: int
    tied: bool
    token_budget: int
    kv_heads: int = 8
    head: int = 128
    vocabulary: int = 151_936

    @property
    def linears(self) -> list[tuple[int, int]]:
        """Return the shapes of the linear layers of one decoder layer."""
        q, kv = self.heads * self.head, self.kv_heads * self.head
        attention = [(q, self.hidden), (kv, self.hidden), (kv, self.hidden), (self.hidden, q)]
        return [*attention, *[(self.intermediate, self.hidden)] * 2, (self.hidden, self.intermediate)]


SIZES = {
    "Qwen3-1.7B": Size(2048, 28, 16, 6144, True, 16_384),
    "Qwen3-4B": Size(2560, 36, 32, 9728, True, 8192),
    "Qwen3-8B": Size(4096, 36, 32, 12_288, False, 8192),
}


def nf4_bytes_per_weight(size: Size, device: str) -> float:
    """Measure the bytes per weight of the widest layer in NF4 with double quantization, including scales."""
    shape = size.linears[-1]
    packed, state = quantize_4bit(torch.randn(shape, device=device), compress_statistics=True, quant_type="nf4")
    parts = [packed, state.absmax, state.code, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in parts) / (shape[0] * shape[1])


def layer_bytes_per_token(size: Size, device: str) -> float:
    """Measure the bytes that autograd keeps per token in one decoder layer."""
    config = Qwen3Config(
        vocab_size=64, hidden_size=size.hidden, num_hidden_layers=1, num_attention_heads=size.heads,
        num_key_value_heads=size.kv_heads, head_dim=size.head, intermediate_size=size.intermediate,
    )  # fmt: skip
    base = Qwen3ForCausalLM(config).to(torch.bfloat16)
    # peft makes a float32 adapter on a bfloat16 or quantized base.
    get_peft_model(base, LoraConfig(r=64, target_modules="all-linear", lora_dropout=0.05)).to(device).train()
    layer = base.model.layers[0]
    kept: dict[int, int] = {}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = tensor.untyped_storage()
        kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    def total(tokens: int) -> int:
        kept.clear()
        hidden = torch.randn(1, tokens, size.hidden, dtype=torch.bfloat16, device=device, requires_grad=True)
        positions = torch.arange(tokens, device=device)[None]
        embeddings = base.model.rotary_emb(hidden, positions)
        autocast = torch.autocast(torch.device(device).type, dtype=torch.bfloat16)
        with autocast, torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
            layer(hidden, position_embeddings=embeddings, position_ids=positions)
        return sum(kept.values())

    return (total(48) - total(16)) / 32


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--questions", type=int, default=32, help="rollouts of an optimizer step")
    options.add_argument("--prompt", type=int, default=256, help="tokens of the student's prompt")
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    options.add_argument("--models", nargs="+", default=list(SIZES), choices=SIZES)
    options.add_argument("--rank", type=int, default=64)
    options.add_argument("--logits-mib", type=int, default=384)
    args = options.parse_args()
    device = args.device
    measured, table = [], []
    for name in args.models:
        size = SIZES[name]
        weight_bytes = nf4_bytes_per_weight(size, device)
        token_bytes = layer_bytes_per_token(size, device)
        measured.append({"model": name, "NF4 bytes a weight": weight_bytes, "KiB a token and layer": token_bytes / 1024})
        linear = size.layers * sum(a * b for a, b in size.linears)
        embeddings = size.vocabulary * size.hidden * (1 if size.tied else 2)
        weights = linear * weight_bytes + embeddings * 2
        adapter = size.layers * sum(args.rank * (a + b) for a, b in size.linears) * 16
        for length in args.lengths:
            row = args.prompt + length
            rollout = args.questions * row * size.layers * 2 * size.kv_heads * size.head * 2
            tokens = max(size.token_budget // row * row, row)
            scored = tokens // row * length
            layers = tokens * (size.layers * size.hidden * 2 + token_bytes) + max(a * b for a, b in size.linears) * 2
            states = args.questions * length * size.hidden * 2
            scoring = layers + states + args.logits_mib * 2**20
            plain = layers + states + 7 * 4 * scored * size.vocabulary
            table.append(
                {
                    "model": name,
                    "completion": length,
                    "weights (c from m)": weights / GIB,
                    "adapter (c)": adapter / GIB,
                    "rollout (c)": rollout / GIB,
                    "scoring (c from m)": layers / GIB,
                    "states (c)": states / GIB,
                    "logits (c)": args.logits_mib / 1024,
                    "total GiB (c)": (weights + adapter + max(rollout, scoring)) / GIB,
                    "plain GiB (c)": (weights + adapter + max(rollout, plain)) / GIB,
                }
            )
    how = "(c from m) computed from the bytes measured above, (c) computed"
    title = f"GiB with {args.questions} rollouts a step, prompts of {args.prompt}; {how}"
    report("memory", machine(device), {"measured here": measured, title: table}, args.json)


if __name__ == "__main__":
    main()
