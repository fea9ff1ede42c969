"""Rollout engines against plain ``generate`` on completions of very different lengths.

    python benchmarks/rollout.py                   SmolLM2-135M-Instruct: `make quickstart` leaves it in runs/models
    python benchmarks/rollout.py --continuous      transformers' continuous batching too: for GPUs

The plain side calls ``generate`` of the LoRA model on each batch of prompts, padded on the left, until the last row has
ended. The lengths are log-uniform and the same for all engines: an EOS is forced at the end and forbidden before.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import EndAt, in_turn, log_uniform, machine, model_folder, parser, report
from transformers import GenerationConfig

from opsd_lightning.models.packing import cut_at_eos, pad_left
from opsd_lightning.models.policy import LoRA, Policy, base_of, evaluating
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Sampling


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--batch", type=int, default=16, help="rows of a batch")
    options.add_argument("--rows", type=int, default=None, help="completions in total (default: --batch)")
    options.add_argument("--prompt", type=int, default=64, help="length of a prompt in tokens")
    options.add_argument("--shortest", type=int, default=16)
    options.add_argument("--longest", type=int, default=256)
    options.add_argument("--continuous", action="store_true")
    args = options.parse_args()
    device = args.device
    rows = args.rows or args.batch
    facts = machine(device, getattr(torch, args.dtype))
    model = Policy(model_folder(args.model), lora=LoRA(r=16, alpha=32, dropout=0.0), dtype=args.dtype).build().to(device)
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.01)
    base = base_of(model)
    generator = torch.Generator().manual_seed(0)
    prompts = torch.randint(10, base.config.vocab_size, (rows, args.prompt), generator=generator).tolist()
    lengths = log_uniform(rows, args.shortest, args.longest)
    eos = list(base.generation_config.eos_token_id)
    EndAt({tuple(p): n for p, n in zip(prompts, lengths, strict=True)}, eos, [0, eos[0]]).install(base)

    def plain(temperature: float) -> list[list[int]]:
        torch.manual_seed(0)
        found: list[list[int]] = []
        sampled = {"temperature": temperature} if temperature else {}
        config = GenerationConfig(
            max_new_tokens=args.longest, do_sample=temperature > 0, top_k=0, eos_token_id=eos, pad_token_id=eos[0], **sampled
        )
        with evaluating(model), torch.no_grad():
            for start in range(0, rows, args.batch):
                ids, mask, _ = pad_left(prompts[start : start + args.batch], torch.device(device))
                output = model.generate(input_ids=ids, attention_mask=mask, generation_config=config)
                found += [cut_at_eos(row, frozenset(eos))[0] for row in output[:, ids.shape[1] :].tolist()]
        return found

    def engine_side(engine: RolloutEngine) -> Callable[[], list[list[int]]]:
        sampling = Sampling(max_new_tokens=args.longest, temperature=1.0)
        return lambda: engine.generate(model, prompts, sampling, seed=0).completions

    size = args.batch if rows > args.batch else None
    sides: dict[str, Callable[[], list[list[int]]]] = {
        "plain generate": lambda: plain(1.0),
        "TransformersEngine": engine_side(TransformersEngine(max_rows=size)),
        "  adapter not merged": engine_side(TransformersEngine(max_rows=size, merge_adapter=False)),
    }
    if device.startswith("cuda"):
        sides["  without a copy of the policy"] = engine_side(TransformersEngine(max_rows=size, rollout_copy=False))
        sides["  static cache, compiled"] = engine_side(TransformersEngine(max_rows=size, static_cache=True, compile=True))
    greedy = TransformersEngine(max_rows=size).generate(
        model, prompts, Sampling(max_new_tokens=args.longest, temperature=0), seed=0
    )
    same = sum(a == b for a, b in zip(greedy.completions, plain(0.0), strict=True))
    for name, side in sides.items():
        got = [len(row) for row in side()]
        assert got == lengths, name
    seconds = in_turn(sides, args.repeats, device)
    tokens = sum(lengths)
    weights = sum(p.numel() * p.element_size() for p in base.parameters() if not p.requires_grad)
    # Fewest bytes that decoding must read: the weights once a step, of which there are as many as the longest completion
    # has tokens, or as full batches take for all of them, and the keys and values of every row at every token.
    config = base.config
    head = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
    row_bytes = 2 * config.num_hidden_layers * config.num_key_value_heads * head * base.dtype.itemsize
    cached = row_bytes * sum(length * (args.prompt + length / 2) for length in lengths)
    steps = max(args.longest, -(-tokens // args.batch))
    least = (steps * weights + cached) / facts["read_bytes_per_second"]
    table = [
        {
            "engine": name,
            "seconds": second,
            "tokens/s": tokens / second,
            "speed ratio": seconds["plain generate"] / second,
            "of memory bandwidth": least / second,
        }
        for name, second in seconds.items()
    ]
    title = (
        f"{rows} completions of {args.shortest} to {args.longest} tokens, {args.batch} at one time, prompts of {args.prompt}"
    )
    greedy_row = [{"greedy completions equal to plain generate's": f"{same} of {rows}"}]
    tables = {title: table, "temperature 0": greedy_row}
    if args.continuous:
        # Its rows are one flat row, in which lengths cannot be forced. No completion ends before the limit here.
        del base._get_logits_processor
        base.generation_config.eos_token_id = [-1]
        sides = {
            "TransformersEngine": engine_side(TransformersEngine(max_rows=size)),
            "ContinuousBatchingEngine": engine_side(ContinuousBatchingEngine()),
        }
        seconds = in_turn(sides, args.repeats, device)
        tables[f"continuous batching, {rows} completions of {args.longest} tokens each"] = [
            {
                "engine": name,
                "seconds": second,
                "tokens/s": rows * args.longest / second,
                "speed ratio": seconds["TransformersEngine"] / second,
            }
            for name, second in seconds.items()
        ]
    report("rollout", facts, tables, args.json)


if __name__ == "__main__":
    main()
