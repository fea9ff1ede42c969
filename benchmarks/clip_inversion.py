"""Direction of the gradient of clipped divergences at the student's logits, relative to the gradient without a clip.

    python benchmarks/clip_inversion.py --made-up                       synthetic logits, which show the mechanism
    python benchmarks/clip_inversion.py --made-up --raise-nats 1 2 4
    python benchmarks/clip_inversion.py                                 SmolLM2-135M-Instruct's own rollouts on word problems

Synthetic student logits are normal random numbers. The teacher's logits are the same, except that one of the student's ten
most probable tokens is higher by ``--raise-nats``. Without a clip, gradient descent raises that token. With a model, the
logits of both roles are those at all tokens of its own completions before training. The token in question is then the one
with the largest p_T (log p_T - log p_S), which the teacher most wants to raise. The table shows for each clip the share of
positions where a gradient step lowers the token (inverted), where the gradient has a negative product with the gradient
without a clip (turned) and where the gradient is zero, and the mean cosine with the gradient without a clip.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable, Iterator

import torch
from common import machine, model_folder, parser, report
from torch import Tensor

from opsd_lightning import (
    DivergenceObjective,
    FixedTeacher,
    ForwardKL,
    NoClip,
    OPSDDataModule,
    PointwiseClip,
    Policy,
    RescaleClip,
    ReverseKL,
    Sampling,
    TokenClip,
    TransformersEngine,
    WordProblems,
)
from opsd_lightning.losses.clips import Clip
from opsd_lightning.models.scoring import Scorer

CLIPS: dict[str, Callable[[float], Clip]] = {
    "PointwiseClip": PointwiseClip, "TokenClip": TokenClip, "RescaleClip": RescaleClip,
}  # fmt: skip
ROWS = 64  # positions per chunk, which limits the memory


def gradient(objective: DivergenceObjective, student: Tensor, teacher: Tensor) -> Tensor:
    """Return the gradient of the summed losses at the student's logits. All shapes are [N, V]."""
    student = student.clone().requires_grad_()
    targets = torch.zeros(len(student), dtype=torch.long)
    loss, _ = objective.per_token(student.log_softmax(-1), teacher.log_softmax(-1), targets)
    (found,) = torch.autograd.grad(loss.sum(), student)
    return found


def directions(
    objective: DivergenceObjective, plain: DivergenceObjective, positions: Iterator[tuple[Tensor, Tensor, Tensor]]
) -> dict[str, float]:
    """Compare the gradient of an objective with the gradient without a clip, over all positions.

    Takes the logits of both roles, [N, V] each, and the token in question of each position, [N, 1].
    """
    parts = []
    for student, teacher, wanted in positions:
        found, whole = gradient(objective, student, teacher), gradient(plain, student, teacher)
        gone = found.norm(dim=1) < 1e-12
        cosine = torch.cosine_similarity(found, whole, dim=1)
        parts.append(torch.stack([found.gather(1, wanted).squeeze(1) > 0, cosine < 0, gone, cosine]).double())
    lowered, turned, gone, cosine = torch.cat(parts, dim=1)
    here = gone == 0
    return {
        "inverted, %": 100 * float((lowered * here).mean()),
        "turned, %": 100 * float((turned * here).mean()),
        "no gradient, %": 100 * float(gone.mean()),
        "mean cosine": float(cosine[here].mean()) if here.any() else 0.0,
    }


def made_up(args: argparse.Namespace, nats: float) -> tuple[Tensor, Tensor, Tensor]:
    """Return synthetic logits of both roles, and the token that the teacher raises."""
    generator = torch.Generator().manual_seed(0)
    student = args.spread * torch.randn(args.positions, args.vocabulary, generator=generator, dtype=torch.float64)
    places = torch.randint(10, (args.positions, 1), generator=generator)
    wanted = student.topk(10).indices.gather(1, places)
    return student, student.scatter_add(1, wanted, torch.full_like(student[:, :1], nats)), wanted


@torch.no_grad()
def of_a_model(args: argparse.Namespace) -> tuple[Tensor, Tensor, Tensor]:
    """Return both roles' logits at a model's completions, and the tokens that the teacher most wants to raise."""
    policy = Policy(model_folder(args.model), dtype="float32")
    data = OPSDDataModule(
        policy, train=WordProblems(size=args.questions, seed=1), max_new_tokens=args.new_tokens, batch_size=1
    )
    data.setup("fit")
    rows, model = data.rows["train"], policy.build()
    sampling = Sampling(max_new_tokens=args.new_tokens)
    completions = TransformersEngine().generate(model, rows.student, sampling, seed=0).completions
    students = Scorer(model, 2048).score(rows.student, completions)
    teachers = FixedTeacher().score(Scorer(model, 2048), rows.teacher, completions)
    student, teacher = students.head(students.hidden).float(), teachers.head(teachers.hidden).float()
    ours, theirs = student.log_softmax(-1), teacher.log_softmax(-1)
    return student, teacher, (theirs.exp() * (theirs - ours)).argmax(1, keepdim=True)


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--made-up", action="store_true", help="synthetic logits instead of a model's")
    options.add_argument("--taus", type=float, nargs="+", default=[1e-6, 0.05, 0.2])
    options.add_argument("--model", default=None)
    options.add_argument("--questions", type=int, default=32, help="questions, with one completion each")
    options.add_argument("--new-tokens", type=int, default=40, help="length limit of a completion in tokens")
    options.add_argument("--positions", type=int, default=2000, help="synthetic positions")
    options.add_argument("--vocabulary", type=int, default=1000)
    options.add_argument("--spread", type=float, default=3.0, help="standard deviation of the student's logits")
    options.add_argument("--raise-nats", type=float, nargs="+", default=[2.0])
    args = options.parse_args()
    worlds = {}
    if args.made_up:
        worlds = {f"made up, raised by {nats:g} nats": made_up(args, nats) for nats in args.raise_nats}
    else:
        worlds = {"a model's own completions": of_a_model(args)}
    tables = {}
    for name, world in worlds.items():
        rows = []
        for divergence in (ForwardKL(), ReverseKL()):
            plain = DivergenceObjective(divergence=divergence, clip=NoClip())
            for tau in args.taus:
                for clip, kind in CLIPS.items():
                    objective = DivergenceObjective(divergence=divergence, clip=kind(tau))
                    chunks = zip(*(part.split(ROWS) for part in world), strict=True)
                    found = directions(objective, plain, chunks)
                    rows.append({"divergence": type(divergence).__name__, "tau": tau, "clip": clip} | found)
        tables[f"direction of the gradient, {name}, {len(world[0])} positions"] = rows
    report("clip_inversion", machine("cpu"), tables, args.json)


if __name__ == "__main__":
    main()
