"""Scoring of ragged rows grouped by length against padded rows, and of shared against repeated prompts.

    python benchmarks/scoring.py                 SmolLM2-135M-Instruct: `make quickstart` leaves it in runs/models
    python benchmarks/scoring.py --model Qwen/Qwen3-0.6B --device cuda

The ragged case is the student's pass with gradient over 32 completions with log-uniform lengths from 16 to 256. The padded
case has the same rows padded to the longest, in as many passes as the same token budget needs. The shared case is the
teacher's pass over 8 completions of 64 tokens after one prompt of 512 tokens.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import in_turn, log_uniform, machine, model_folder, parser, report

from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.models.policy import LoRA, Policy, base_of
from opsd_lightning.models.scoring import Scorer, score, split_rows
from opsd_lightning.types import TokenStates


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--rows", type=int, default=32)
    options.add_argument("--prompt", type=int, default=32, help="length of the prompts of the ragged rows in tokens")
    options.add_argument("--shortest", type=int, default=16)
    options.add_argument("--longest", type=int, default=256)
    options.add_argument("--token-budget", type=int, default=2048)
    options.add_argument("--n", type=int, default=8, help="completions of the shared prompt")
    options.add_argument("--teacher-prompt", type=int, default=512)
    options.add_argument("--completion", type=int, default=64)
    args = options.parse_args()
    device = args.device
    facts = machine(device, getattr(torch, args.dtype))
    policy = Policy(model_folder(args.model), lora=LoRA(r=16, alpha=32, dropout=0.0), dtype=args.dtype)
    model = policy.build().to(device).eval()
    base = base_of(model)
    vocabulary, hidden_size = base.config.vocab_size, base.config.hidden_size
    body = sum(p.numel() for p in base.model.parameters() if p.dim() > 1) - base.get_input_embeddings().weight.numel()
    generator = torch.Generator().manual_seed(0)

    def ids(count: int) -> list[int]:
        return torch.randint(10, vocabulary, (count,), generator=generator).tolist()

    lengths = log_uniform(args.rows, args.shortest, args.longest)
    prompts, completions = [ids(args.prompt) for _ in lengths], [ids(length) for length in lengths]
    objective = DivergenceObjective()
    teacher = Scorer(model, args.token_budget).score(prompts, completions)
    # Any fixed target works if the loss is not zero: the states of the same tokens with a small shift.
    moved = teacher.hidden + 0.1 * torch.randn(teacher.hidden.shape, generator=generator).to(teacher.hidden)
    moved_rows = moved.split(lengths)

    def step(batches: list[list[int]], pad_to: int | None) -> float:
        """Run forward and backward of the whole batch, and return the loss."""
        model.zero_grad()
        total = 0.0
        for rows in batches:
            full = [completions[i] + [0] * ((pad_to or 0) - lengths[i]) for i in rows]
            states, targets = score(model, [prompts[i] for i in rows], full)
            width = [len(row) for row in full]
            real = torch.cat([torch.arange(w) < lengths[i] for w, i in zip(width, rows, strict=True)]).to(device)
            kept = TokenStates(states.hidden[real], states.head, states.head_parameters)
            goal = TokenStates(torch.cat([moved_rows[i] for i in rows]), teacher.head)
            weights = torch.full((len(kept.hidden),), 1 / sum(lengths), device=device)
            loss, _ = objective(kept, goal, targets[real], weights)
            loss.backward()
            total += float(loss.detach())
        return total

    rows_per_pass = max(args.token_budget // (args.prompt + args.longest), 1)
    rectangle = [list(range(i, min(i + rows_per_pass, args.rows))) for i in range(0, args.rows, rows_per_pass)]
    grouped = split_rows(model, [args.prompt + length for length in lengths], args.token_budget)
    ragged: dict[str, Callable[[], float]] = {
        "grouped": lambda: step(grouped, None),
        "padded": lambda: step(rectangle, args.longest),
    }
    losses = {name: side() for name, side in ragged.items()}
    seconds = in_turn(ragged, args.repeats, device)
    tokens = sum(lengths) + args.rows * (args.prompt - 1)
    rectangle_tokens = args.rows * (args.prompt + args.longest - 1)
    # Frozen weights need 2 FLOP per weight and token forward, 2 backward; the head three products per completion token.
    flops = 4 * body * tokens + 6 * vocabulary * hidden_size * sum(lengths)
    table_ragged = [
        {
            "rows": f"{args.rows} x {args.prompt} + {args.shortest}..{args.longest}",
            "grouped s": seconds["grouped"],
            "padded s": seconds["padded"],
            "time ratio": seconds["grouped"] / seconds["padded"],
            "token ratio": tokens / rectangle_tokens,
            "passes": f"{len(grouped)} / {len(rectangle)}",
            "loss rel. diff.": abs(losses["grouped"] - losses["padded"]) / abs(losses["padded"]),
            "of matmul peak": flops / seconds["grouped"] / facts["matmul_flops"],
        }
    ]

    prompt = ids(args.teacher_prompt)
    rows = [ids(args.completion) for _ in range(args.n)]

    def unshared() -> TokenStates:
        with torch.no_grad():
            return score(model, [prompt] * args.n, rows)[0]

    def shared() -> TokenStates:
        return Scorer(model, args.n * (args.teacher_prompt + args.completion)).score([prompt] * args.n, rows)

    with torch.no_grad():
        states = shared()
        ours, theirs = states.head(states.hidden), states.head(unshared().hidden)
        difference = float((ours - theirs).abs().max() / theirs.abs().max())
    seconds = in_turn({"shared": shared, "unshared": unshared}, args.repeats, device)
    tokens = args.teacher_prompt + args.n * (args.completion - 1)
    table_shared = [
        {
            "rows": f"{args.n} x ({args.teacher_prompt} + {args.completion})",
            "shared s": seconds["shared"],
            "unshared s": seconds["unshared"],
            "time ratio": seconds["shared"] / seconds["unshared"],
            "token ratio": tokens / (args.n * (args.teacher_prompt + args.completion - 1)),
            "logits rel. diff.": difference,
            "of matmul peak": 2 * body * tokens / seconds["shared"] / facts["matmul_flops"],
        }
    ]
    tables = {
        "student's scoring pass, forward and backward": table_ragged,
        "teacher's scoring pass, without gradient": table_shared,
    }
    report("scoring", facts, tables, args.json)


if __name__ == "__main__":
    main()
