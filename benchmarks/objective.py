"""The chunked objective against a plain computation: time, peak memory, loss and gradients.

    python benchmarks/objective.py                      151,936 tokens of vocabulary, hidden size 1,024, 2,048 tokens
    python benchmarks/objective.py --divergences all    every divergence

The plain side computes the logits of both roles at all tokens, two log-softmaxes, the divergence and its gradient by
autograd. The objective also measures each token (both KLs, entropies, log-probabilities). The plain side has only its loss.
"""

from __future__ import annotations

import torch
from common import PeakMemory, in_turn, machine, parser, report

from opsd_lightning.losses.clips import PointwiseClip
from opsd_lightning.losses.divergences import ForwardKL, GeneralizedJSD, ReverseKL
from opsd_lightning.losses.objectives import DivergenceObjective
from opsd_lightning.types import TokenStates

CASES = {
    "reverse KL": (ReverseKL(), None),
    "forward KL": (ForwardKL(), None),
    "forward KL, pointwise clip": (ForwardKL(), PointwiseClip(0.05)),
    "JSD 0.5": (GeneralizedJSD(0.5), None),
}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--vocabulary", type=int, default=151_936)
    options.add_argument("--hidden", type=int, default=1024)
    options.add_argument("--tokens", type=int, default=2048)
    options.add_argument("--memory-mib", type=int, default=384, help="the objective's logits_memory_mib")
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--divergences", default="forward KL", help="comma separated, or all: " + ", ".join(CASES))
    args = options.parse_args()
    dtype, device = getattr(torch, args.dtype), args.device
    facts = machine(device, dtype)
    torch.manual_seed(0)
    # As in trained models: logits of order 1 to 10, and a teacher close to the student.
    weight = torch.randn(args.vocabulary, args.hidden, device=device, dtype=dtype) * (3 / args.hidden**0.5)
    hidden = torch.randn(args.tokens, args.hidden, device=device, dtype=dtype)
    teacher = hidden + 0.2 * torch.randn_like(hidden)
    targets = torch.randint(args.vocabulary, (args.tokens,), device=device)
    weights = torch.full((args.tokens,), 1 / args.tokens, device=device)

    def head(states: torch.Tensor) -> torch.Tensor:
        return states @ weight.T

    rows = []
    for name in list(CASES) if args.divergences == "all" else args.divergences.split(","):
        divergence, clip = CASES[name]
        objective = DivergenceObjective(divergence, clip=clip, logits_memory_mib=args.memory_mib)

        def kernel(objective: DivergenceObjective = objective) -> tuple[torch.Tensor, torch.Tensor]:
            leaf = hidden.clone().requires_grad_()
            loss, _ = objective(TokenStates(leaf, head), TokenStates(teacher, head), targets, weights)
            loss.backward()
            assert leaf.grad is not None
            return loss.detach(), leaf.grad

        def plain(objective: DivergenceObjective = objective) -> tuple[torch.Tensor, torch.Tensor]:
            leaf = hidden.clone().requires_grad_()
            with torch.no_grad():
                teacher_logprobs = head(teacher).float().log_softmax(-1)
            entries = objective.divergence.entries(head(leaf).float().log_softmax(-1), teacher_logprobs)
            loss = (objective.clip.apply(entries) * weights).sum()
            loss.backward()
            assert leaf.grad is not None
            return loss.detach(), leaf.grad

        with PeakMemory(device) as ours:
            loss, gradient = kernel()
        with PeakMemory(device) as theirs:
            expected_loss, expected = plain()
        seconds = in_turn({"kernel": kernel, "plain": plain}, args.repeats, device)
        flops = 3 * 2 * args.tokens * args.hidden * args.vocabulary
        rows.append(
            {
                "divergence": name,
                "kernel s": seconds["kernel"],
                "plain s": seconds["plain"],
                "time ratio": seconds["kernel"] / seconds["plain"],
                "kernel MiB": ours.extra_bytes / 2**20,
                "plain MiB": theirs.extra_bytes / 2**20,
                "memory ratio": ours.extra_bytes / theirs.extra_bytes,
                "loss rel. diff.": float((loss - expected_loss).abs() / expected_loss.abs()),
                "gradient rel. diff.": float((gradient - expected).float().norm() / expected.float().norm()),
                "of matmul peak": flops / seconds["kernel"] / facts["matmul_flops"],
            }
        )
    title = f"objective: {args.tokens} tokens, vocabulary {args.vocabulary}, hidden {args.hidden}"
    report("objective", facts, {title: rows}, args.json)


if __name__ == "__main__":
    main()
