"""Cost model of a training step from the tokens, operations and bytes of each phase, checked against measured steps.

    python benchmarks/step.py --batch 8 --completion 256 --steps 1 --json long.json
    python benchmarks/step.py --json equal.json
    python benchmarks/plan.py --calibrate long.json --check equal.json

Three numbers are fitted to the first step: the shares of the matmul peak that passes without gradient and the student's pass
reach, and the share of the memory bandwidth that decoding reaches. The other steps are then predicted and compared with
their measurements. Without files, only the plan for GPUs is printed, with the shares from the options.

With N weights in the layers, E = vocabulary x hidden size in the head, and T completion tokens of a step:

    rollouts    longest x max(K x L, (weight and cache bytes) / bandwidth) + 2 (N + E) T + 2 N (prompt tokens)
    teacher     2 N (prompt + completion tokens)
    student     4 N (prompt + completion tokens) + 6 E T    6 N with gradient checkpointing; no gradient of the base weights;
                the objective runs the teacher's head as well
    network     ddp: 2 (adapter gradients); fsdp2: (weights) x (1 for the rollout + teacher passes + 2 student passes), each
                times (ranks - 1) / ranks; vLLM: the adapter, once for each server

A decoded token takes at least K x L: the CPU launches K kernels for it, one after the other, each in a time L. K is what
benchmarks/device_counts.py counts on an imitated device for 28 layers (``--kernels``), scaled by the number of layers. L is
assumed: launches without PyTorch take 3.8 microseconds each, one after the other (NVIDIA's blog, "Getting Started with CUDA
Graphs", V100), or 4 to 6 (https://susun-blog.com/blog/pegainfer-3-cuda-graph, RTX 5070 Ti). What PyTorch does before each
launch comes on top, so this is a lower bound. vLLM launches one CUDA graph for a token instead. Launches of scoring passes
are left out: a pass takes far longer.
"""

from __future__ import annotations

import argparse
import json
import shlex
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from common import log_uniform, parser


@dataclass(frozen=True)
class Model:
    """Sizes of a model, and of its adapter of rank r on all linear layers.

    Args:
        layers: Weights in the decoder layers.
        head: Vocabulary times hidden size.
        tied: True if the head shares its weights with the embeddings.
        adapter: Weights of the adapter.
        bytes_a_weight: 4 in float32, 2 in bfloat16, about 0.52 in NF4.
        cache_bytes: Bytes of the keys and values of one token in all layers.
        depth: Number of layers.
    """

    layers: float
    head: float
    tied: bool
    adapter: float
    bytes_a_weight: float
    cache_bytes: float
    depth: int

    @property
    def bytes_a_token(self) -> float:
        """Bytes per token of the weights, which decoding reads for each token."""
        return self.layers * self.bytes_a_weight + self.head * max(self.bytes_a_weight, 2)

    @property
    def stored(self) -> float:
        return self.bytes_a_token + (0 if self.tied else self.head * max(self.bytes_a_weight, 2))


@dataclass(frozen=True)
class Work:
    """Tokens of one rank in a step."""

    lengths: list[int]
    prompt: int
    teacher_prompt: int
    checkpointing: bool = False


@dataclass(frozen=True)
class Machine:
    """Limits of a device, the shares of them that are reached, and its link to other devices in bytes per second.

    Args:
        launch_seconds: Time of a kernel launch. 0 on a CPU.
        kernels: Kernels of a decoded token in each layer.
    """

    matmul_flops: float
    bandwidth: float
    forward_share: float
    student_share: float
    bandwidth_share: float
    network: float = 0.0
    launch_seconds: float = 0.0
    kernels: float = 0.0


# Kernels of a decoded token of a model with 28 layers, 4-bit weights and an adapter, in the default engine on CUDA.
KERNELS, LAYERS = 971, 28
SMOLLM2 = Model(106.2e6, 49152 * 576, True, 4.9e6, 4, 30 * 3 * 64 * 2 * 4, 30)
QWEN3_8B = {
    name: Model(6.95e9, 151936 * 4096, False, 175e6, width, 36 * 8 * 128 * 2 * 2, 36)
    for name, width in (("bf16", 2), ("NF4", 0.52))
}


def cached_bytes(model: Model, work: Work) -> float:
    """Return the bytes of keys and values that decoding reads in a step: the cache of each row, for each of its tokens."""
    return sum(length * (work.prompt + length / 2) for length in work.lengths) * model.cache_bytes


def decoding_seconds(model: Model, work: Work, machine: Machine) -> dict[str, float]:
    """Return the lower bounds of decoding: kernel launches, and reading of all weights and caches, for each token."""
    longest, bandwidth = max(work.lengths), machine.bandwidth * machine.bandwidth_share
    return {
        "launches": longest * model.depth * machine.kernels * machine.launch_seconds,
        "bandwidth": (longest * model.bytes_a_token + cached_bytes(model, work)) / bandwidth,
    }


def phases(model: Model, work: Work, machine: Machine) -> dict[str, float]:
    """Return the seconds of each phase on one device."""
    flops, training = (machine.matmul_flops * share for share in (machine.forward_share, machine.student_share))
    tokens, rows = sum(work.lengths), len(work.lengths)
    student, teacher = (tokens + rows * prompt for prompt in (work.prompt, work.teacher_prompt))
    return {
        "rollouts": max(decoding_seconds(model, work, machine).values())
        + (2 * (model.layers + model.head) * tokens + 2 * model.layers * rows * work.prompt) / flops,
        "teacher": 2 * model.layers * teacher / flops,
        "student": ((6 if work.checkpointing else 4) * model.layers * student + 6 * model.head * tokens) / training,
    }


def traffic(model: Model, strategy: str, ranks: int, passes: int, servers: int = 0) -> float:
    """Return the bytes that a rank receives in a step and that the first rank sends to the servers."""
    others = (ranks - 1) / ranks
    gradients = 2 * model.adapter * 4 * others
    gathered = model.stored * (1 + 3 * passes) * others if strategy == "fsdp2" else 0.0
    if servers and strategy == "fsdp2":
        gathered = model.stored * 3 * passes * others
    return gradients + gathered + model.adapter * 4 * servers


def measured(path: str) -> tuple[Work, dict[str, float], float, float]:
    """Read the work, the seconds of each phase and the limits of the machine from a result of step.py."""
    found = json.loads(Path(path).read_text(encoding="utf-8"))
    options = argparse.ArgumentParser()
    for name, default in {"batch": 16, "shortest": 16, "completion": 128, "prompt": 64, "teacher-prompt": 128}.items():
        options.add_argument(f"--{name}", type=int, default=default)
    options.add_argument("--lengths", default="equal")
    run, _ = options.parse_known_args(shlex.split(found["command"])[2:])
    equal = run.lengths == "equal"
    lengths = [run.completion] * run.batch if equal else log_uniform(run.batch, run.shortest, run.completion)
    ours = next(
        row for table in found.values() if isinstance(table, list) for row in table if row["trainer"] == "opsd_lightning"
    )
    seconds = {"rollouts": ours["rollouts s"], "teacher": ours["teacher s"], "student": ours["student and update s"]}
    facts = found["machine"]
    return Work(lengths, run.prompt, run.teacher_prompt), seconds, facts["matmul_flops"], facts["read_bytes_per_second"]


def calibrate(path: str, model: Model) -> tuple[float, float, float]:
    """Fit the shares of matmul peak (without gradient, student) and bandwidth to the phases of a measured step."""
    work, seconds, flops, bandwidth = measured(path)
    ideal = phases(model, work, Machine(flops, bandwidth, 1.0, 1.0, 1e12))
    forward, student = (ideal[phase] / seconds[phase] for phase in ("teacher", "student"))
    reading = seconds["rollouts"] - ideal["rollouts"] / forward
    read = max(work.lengths) * model.bytes_a_token + cached_bytes(model, work)
    return forward, student, read / bandwidth / max(reading, 1e-9)


def table(title: str, rows: list[dict[str, Any]]) -> None:
    print(f"\n{title}")
    cells = [list(rows[0])] + [[f"{v:.3g}" if isinstance(v, float) else str(v) for v in row.values()] for row in rows]
    widths = [max(len(line[i]) for line in cells) for i in range(len(cells[0]))]
    for line in cells:
        print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)))


def shares(seconds: dict[str, float]) -> dict[str, float]:
    return {name: value / sum(seconds.values()) for name, value in seconds.items()}


def plan(machine: Machine, questions: int, completion: int) -> list[dict[str, Any]]:
    """Plan a step of Qwen3-8B by strategy and number of GPUs, with the questions split among them."""
    rows = []
    for gpus in (1, 8, 64):
        for name, model, strategy, away in (
            ("NF4, ddp", QWEN3_8B["NF4"], "ddp", False),
            ("bf16, fsdp2", QWEN3_8B["bf16"], "fsdp2", False),
            ("bf16, ddp, vLLM on half", QWEN3_8B["bf16"], "ddp", True),
        ):
            if (gpus == 1 and strategy == "fsdp2") or (gpus == 1 and away):
                continue
            trainers = gpus // 2 if away else gpus
            mine = max(questions // trainers, 1)
            work = Work([completion] * mine, 256, 2048, checkpointing=True)
            seconds = phases(model, work, machine)
            if away:  # share of the questions per server
                theirs = Work([completion] * max(questions // (gpus - trainers), 1), 256, 0)
                seconds["rollouts"] = phases(model, theirs, replace(machine, kernels=0.0))["rollouts"]  # CUDA graphs
                # One more pass of the student without gradient, which checks the log-probabilities of the servers.
                operations = 2 * model.layers * mine * (completion + work.prompt) + 2 * model.head * mine * completion
                seconds["student"] += operations / (machine.matmul_flops * machine.forward_share)
            passes = max(-(-mine * (completion + 2048) // 8192), 1)
            network = traffic(model, strategy, trainers, passes, servers=gpus - trainers) / machine.network
            total = sum(seconds.values()) + network
            row = {"GPUs": gpus, "how": name, "questions a rank": mine}
            row |= {f"{phase} s": value for phase, value in seconds.items()} | {"network s": network, "step s": total}
            overlapped = max(seconds["rollouts"], total - seconds["rollouts"]) if away else ""
            bound = max(seconds, key=seconds.__getitem__)
            if bound == "rollouts":
                decoding = (
                    decoding_seconds(model, theirs, replace(machine, kernels=0.0))
                    if away
                    else decoding_seconds(model, work, machine)
                )
                bound += f", {max(decoding, key=decoding.__getitem__)}"
            rows.append(row | {"overlapped s": overlapped, "bound by": bound})
    return rows


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--calibrate", default=None, help="a JSON file of step.py on SmolLM2-135M-Instruct")
    options.add_argument("--check", nargs="*", default=[], help="further files of steps to predict")
    options.add_argument("--forward-share", type=float, default=0.4, help="share of a GPU's peak in passes without gradient")
    options.add_argument("--student-share", type=float, default=0.3, help="share of a GPU's peak in the student's pass")
    options.add_argument("--bandwidth-share", type=float, default=0.3, help="share of a GPU's bandwidth in decoding")
    options.add_argument("--gpu-flops", type=float, default=989e12, help="dense bfloat16 peak; an H100 SXM's by default")
    options.add_argument("--gpu-bandwidth", type=float, default=3.35e12)
    options.add_argument("--launch-us", type=float, default=4.5, help="microseconds of a kernel launch, assumed")
    options.add_argument("--kernels", type=float, default=KERNELS, help=f"kernels of a decoded token with {LAYERS} layers")
    options.add_argument("--network", type=float, default=50e9, help="bytes a second between GPUs; 400 Gbit/s by default")
    options.add_argument("--questions", type=int, default=256, help="questions of a step, over all GPUs")
    options.add_argument("--completion", type=int, default=1024)
    args = options.parse_args()
    results: dict[str, Any] = {}
    if args.calibrate:
        fitted = calibrate(args.calibrate, SMOLLM2)
        print("fitted to {}: {:.2f} and {:.2f} of the matmul peak, {:.2f} of the bandwidth".format(args.calibrate, *fitted))
        rows = []
        for path in [args.calibrate, *args.check]:
            work, seconds, flops, read = measured(path)
            predicted = phases(SMOLLM2, work, Machine(flops, read, *fitted))
            for who, values in (("measured", seconds), ("predicted", predicted)):
                share = {f"{phase} share": value for phase, value in shares(values).items()}
                rows.append({"step": path, "": who} | share | {"step s": sum(values.values())})
        table("shares of a step's time (SmolLM2-135M)", rows)
        results["shares"] = rows
    reached = (args.forward_share, args.student_share, args.bandwidth_share)
    machine = Machine(
        args.gpu_flops, args.gpu_bandwidth, *reached, args.network, args.launch_us * 1e-6, args.kernels / LAYERS
    )
    results["plan"] = plan(machine, args.questions, args.completion)
    table(f"Qwen3-8B, {args.questions} questions a step, {args.completion} new tokens (calculated)", results["plan"])
    if args.json:
        Path(args.json).write_text(json.dumps(results, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
