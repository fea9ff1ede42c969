"""Does a clipped divergence still pull the student to the teacher? The direction of its gradient at the student's logits.

    python benchmarks/clip_inversion.py
    python benchmarks/clip_inversion.py --taus 0.01 0.05 0.2 --raise-nats 1 2 4

Student logits are normal numbers; the teacher's are the same but for one of the student's ten likeliest tokens, which it
likes more by ``--raise-nats``. Without a clip, gradient descent raises that token. Told for every clip: the share of
positions where it lowers the token (inverted) or leaves it (no gradient), and the cosine with the gradient of no clip.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from common import machine, parser, report
from torch import Tensor

from opsd_lightning import DivergenceObjective, ForwardKL, NoClip, PointwiseClip, RescaleClip, ReverseKL, TokenClip
from opsd_lightning.shaping import Clip


def gradient(objective: DivergenceObjective, student: Tensor, teacher: Tensor) -> Tensor:
    """Of the sum of the positions' losses at the student's logits. Shapes [N, V]."""
    student = student.clone().requires_grad_()
    targets = torch.zeros(len(student), dtype=torch.long)
    loss, _ = objective.per_token(student.log_softmax(-1), teacher.log_softmax(-1), targets)
    (found,) = torch.autograd.grad(loss.sum(), student)
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--positions", type=int, default=2000)
    options.add_argument("--vocabulary", type=int, default=1000)
    options.add_argument("--spread", type=float, default=3.0, help="standard deviation of the student's logits")
    options.add_argument("--taus", type=float, nargs="+", default=[0.01, 0.05, 0.2])
    options.add_argument("--raise-nats", type=float, nargs="+", default=[1.0, 2.0, 4.0])
    args = options.parse_args()
    generator = torch.Generator().manual_seed(0)
    student = args.spread * torch.randn(args.positions, args.vocabulary, generator=generator, dtype=torch.float64)
    places = torch.randint(10, (args.positions, 1), generator=generator)
    wanted = student.topk(10).indices.gather(1, places)
    clips: dict[str, Callable[[float], Clip]] = {
        "PointwiseClip": PointwiseClip, "TokenClip": TokenClip, "RescaleClip": RescaleClip,
    }  # fmt: skip
    rows = []
    for divergence in (ForwardKL(), ReverseKL()):
        for nats in args.raise_nats:
            teacher = student.scatter_add(1, wanted, torch.full_like(student[:, :1], nats))
            plain = gradient(DivergenceObjective(divergence=divergence, clip=NoClip()), student, teacher)
            for tau in args.taus:
                for name, clip in clips.items():
                    found = gradient(DivergenceObjective(divergence=divergence, clip=clip(tau)), student, teacher)
                    at = found.gather(1, wanted)
                    gone = found.norm(dim=1) < 1e-12
                    cosine = torch.cosine_similarity(found, plain, dim=1)
                    rows.append({
                        "divergence": type(divergence).__name__, "teacher likes it more by, nats": nats, "tau": tau,
                        "clip": name,
                        "inverted, %": 100 * float(((at > 0).squeeze(1) & ~gone).double().mean()),
                        "no gradient, %": 100 * float(gone.double().mean()),
                        "mean cosine": float(cosine[~gone].mean()) if not gone.all() else 0.0,
                    })  # fmt: skip
    report("clip_inversion", machine("cpu"), {"direction of the gradient": rows}, args.json)


if __name__ == "__main__":
    main()
