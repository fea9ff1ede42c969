"""Cost of a scoring pass by number of rows, prompt length, completion length and vocabulary.

    python benchmarks/scaling.py                   SmolLM2-135M-Instruct: `make quickstart` leaves it in runs/models
    python benchmarks/scaling.py --model Qwen/Qwen3-0.6B --device cuda --dtype bfloat16

The fit to the first table, seconds = fixed + slope x tokens, gives the cost of one more pass in tokens, which the scoring
weighs against padding when it splits rows into passes.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from common import PeakMemory, in_turn, machine, model_folder, parser, report
from transformers import DynamicCache

from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.models.policy import LoRA, Policy, base_of, evaluating
from opsd_lightning.models.scoring import Scorer, score
from opsd_lightning.rollouts.fast_weights import merged_adapter, packed_linears
from opsd_lightning.types import TokenStates


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--tokens", type=int, default=512, help="number of tokens in the table of the objective")
    args = options.parse_args()
    device, dtype = args.device, getattr(torch, args.dtype)
    facts = machine(device, dtype)
    peak, bandwidth = facts["matmul_flops"], facts["read_bytes_per_second"]
    model = Policy(model_folder(args.model), lora=LoRA(r=16, alpha=32, dropout=0.0), dtype=args.dtype).build().to(device)
    base = base_of(model)
    embedding = base.get_input_embeddings().weight
    frozen = sum(p.numel() for p in base.parameters() if not p.requires_grad)
    body = frozen - embedding.numel() * (1 if base.get_output_embeddings().weight is embedding else 2)
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, base.config.vocab_size, (count,), generator=generator).tolist()

    def student(rows: int, prompt: int, completion: int) -> Callable[[], None]:
        prompts, completions = [ids(prompt) for _ in range(rows)], [ids(completion) for _ in range(rows)]

        def run() -> None:
            states, _ = score(model, prompts, completions)
            states.hidden.sum().backward()  # without the head, which the objective runs

        return run

    def cost(sides: dict[Any, Callable[[], object]]) -> dict[Any, float]:
        named = {str(key): side for key, side in sides.items()}
        seconds = in_turn(named, args.repeats, device)
        return {key: seconds[str(key)] for key in sides}

    tables: dict[str, list[dict[str, Any]]] = {}
    found = cost({rows: student(rows, 32, 32) for rows in (1, 2, 4, 8, 16)})
    tokens = torch.tensor([rows * 63.0 for rows in found], dtype=torch.float64)
    times = torch.tensor(list(found.values()), dtype=torch.float64)
    # Weights of 1 / seconds minimize the relative error, so that short passes count.
    design = torch.stack([torch.ones_like(tokens), tokens], dim=1) / times[:, None]
    fixed, slope = torch.linalg.lstsq(design, torch.ones_like(times)[:, None]).solution.flatten().tolist()
    tables[f"student, rows of 32 + 32 tokens; a further pass costs {fixed / slope:.0f} tokens"] = [
        {"rows": r, "seconds": s, "tokens/s": r * 63 / s, "of matmul peak": 4 * body * r * 63 / s / peak}
        for r, s in found.items()
    ]
    found = cost({length: student(4, 32, length) for length in (16, 64, 256)})
    tables["student, 4 rows, prompt 32, by completion length"] = [
        {"completion": c, "seconds": s, "tokens/s": 4 * (31 + c) / s, "of matmul peak": 4 * body * 4 * (31 + c) / s / peak}
        for c, s in found.items()
    ]

    def teacher(prompt: int) -> Callable[[], object]:
        prompts, completions = [ids(prompt)] * 8, [ids(64) for _ in range(8)]
        return lambda: Scorer(model, 100_000).score(prompts, completions)

    found = cost({length: teacher(length) for length in (64, 256, 1024)})
    tables["teacher, 8 completions of 64 tokens of one prompt, by its length"] = [
        {
            "prompt": p,
            "seconds": s,
            "of matmul peak": 2 * body * (p + 8 * 63) / s / peak,
            "tokens not repeated": 7 * p,
        }
        for p, s in found.items()
    ]

    rows_table = []
    with torch.no_grad(), evaluating(model), merged_adapter(model), packed_linears(model):
        for rows in (1, 4, 16, 32):
            start = torch.tensor([ids(64) for _ in range(rows)], device=device)
            cache = DynamicCache(config=base.config)
            base(input_ids=start, past_key_values=cache, use_cache=True)
            step = start[:, :1]

            def decode(step: torch.Tensor = step, cache: DynamicCache = cache) -> object:
                return base(input_ids=step, past_key_values=cache, use_cache=True)

            second = in_turn({"decode": decode}, 4 * args.repeats, device)["decode"]
            least = frozen * dtype.itemsize / bandwidth
            rows_table.append(
                {"rows": rows, "seconds": second, "tokens/s": rows / second, "of memory bandwidth": least / second}
            )
    tables["decoding step, by rows, about 64 tokens cached"] = rows_table

    table: list[dict[str, Any]] = []
    hidden_size, count = 576, args.tokens
    for vocabulary in (8192, 32_768, 151_936):
        weight = torch.randn(vocabulary, hidden_size, device=device, dtype=dtype) * (3 / hidden_size**0.5)
        hidden = torch.randn(count, hidden_size, device=device, dtype=dtype)
        moved = hidden + 0.2 * torch.randn_like(hidden)
        targets, weights = torch.zeros(count, dtype=torch.long, device=device), torch.ones(count, device=device) / count

        def loss(
            weight: torch.Tensor = weight,
            hidden: torch.Tensor = hidden,
            moved: torch.Tensor = moved,
            targets: torch.Tensor = targets,
            weights: torch.Tensor = weights,
        ) -> None:
            def head(states: torch.Tensor) -> torch.Tensor:
                return states @ weight.T

            leaf = hidden.clone().requires_grad_()
            DivergenceObjective()(TokenStates(leaf, head), TokenStates(moved, head), targets, weights)[0].backward()

        loss()
        with PeakMemory(device) as memory:
            loss()
        second = in_turn({"loss": loss}, args.repeats, device)["loss"]
        flops = 6 * count * hidden_size * vocabulary
        row = {"vocabulary": vocabulary, "seconds": second, "peak MiB": memory.extra_bytes / 2**20}
        table.append(row | {"of matmul peak": flops / second / peak})
    tables[f"objective, {count} tokens, hidden {hidden_size}, by vocabulary"] = table
    report("scaling", facts, tables, args.json)


if __name__ == "__main__":
    main()
