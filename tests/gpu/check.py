"""Check everything that only a GPU can tell, in eight minutes.

    make test-gpu PYTHON=python3                    on a machine with one NVIDIA GPU; installs and downloads nothing
    make test-gpu ARGS="--imitate gpu"                 the same code on an imitation of a GPU, with tiny sizes
    make test-gpu ARGS="engines recipe_first_steps" these checks alone

The checks run in order of worth and print what they find. The results are written as JSON after each of them, to runs/gpu.json
or the file that --json names, so that a run that is cut off leaves what it found. Checks that would not end in time, or that
need a package that is missing, are skipped with the reason. The models are of the recipes' shapes, with random weights.
Exit status: the number of failed checks, at most 100; 130 after Ctrl-C.
"""

from __future__ import annotations

import argparse
import datetime
import shutil
import signal
import sys
import tempfile
from pathlib import Path
from typing import Any

from gpu.runner import Check, Run, table

CHECKS = [
    Check("environment", "gpu.correctness:environment", 5, "device, driver and versions"),
    Check("loss_and_gradients", "gpu.correctness:loss_and_gradients", 10, "loss, metrics and gradients are the CPU's, for every architecture"),
    Check("four_bit_training", "gpu.correctness:four_bit_training", 15, "NF4, autocast, checkpointing: every adapter weight trains, the base stays"),
    Check("throughput", "gpu.speed:throughput", 5, "matrix products, reads from memory, kernel launches"),
    Check("recipe_first_steps", "gpu.recipe:recipe_first_steps", 60, "the 1.7B recipe trains; peaks by phase are below the estimates"),
    Check("recipe_full_length", "gpu.recipe:recipe_full_length", 50, "a step of 32 x 1,024 tokens is within the estimate"),
    Check("memory_of_rollouts", "gpu.recipe:memory_of_rollouts", 25, "rollouts of a step and of a validation fit"),
    Check("engines", "gpu.speed:engines", 100, "tokens a second of each engine and setting"),
    Check("resume", "gpu.correctness:resume", 15, "a resumed run continues like an uninterrupted one"),
    Check("determinism", "gpu.correctness:determinism", 15, "two runs agree as far as deterministic kernels are set"),
    Check("kernels_and_waits", "gpu.speed:kernels_and_waits", 20, "kernels and waits of a decoded token and of a micro-batch"),
    Check("little_memory", "gpu.recipe:little_memory", 20, "rollouts and scoring go on in smaller parts when memory runs out"),
    Check("vllm_colocated", "gpu.packages:vllm_colocated", 90, "vLLM samples in the trainer's process", ("vllm",), alone=True),
    Check("flash_hub_kernels", "gpu.packages:flash_hub_kernels", 25, "flash attention from the hub equals sdpa", ("kernels",)),
    Check("flash_attn", "gpu.packages:flash_attn", 25, "flash attention of the package flash-attn equals sdpa", ("flash_attn",)),
    Check("greedy_rollouts", "gpu.correctness:greedy_rollouts", 10, "rollouts in segments are those of plain generate"),
    Check("first_steps", "gpu.correctness:first_steps", 10, "the first optimizer steps are the CPU's"),
    Check("callbacks_and_export", "gpu.correctness:callbacks_and_export", 15, "callbacks, validation, export and merged export"),
    Check("doctor", "gpu.recipe:doctor", 60, "the doctor's extrapolated memory and time of a full step"),
    Check("gpu_tests", "gpu.packages:gpu_tests", 30, "the tests that are marked gpu", ("pytest",)),
    Check("compiled_decoding", "gpu.speed:compiled_decoding", 90, "compiled decoding", ("triton",), alone=True),
]  # fmt: skip


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("names", nargs="*", metavar="NAME", help="checks to run (default: all)")
    parser.add_argument(
        "--imitate", choices=["gpu", "t4"], help="run on an imitation of a card, with tiny sizes; a T4 has no bfloat16"
    )
    parser.add_argument(
        "--json", type=Path, default=Path("runs/gpu.json"), help="file for the results (default: %(default)s)"
    )
    parser.add_argument("--minutes", type=float, default=8.0, help="time for everything (default: %(default)s)")
    parser.add_argument("--list", action="store_true", help="list the checks and exit")
    options = parser.parse_args(argv)
    if options.list:
        print("\n".join(f"{check.name:22}{check.seconds:4.0f} s  {check.shows}" for check in CHECKS))
        return 0
    if unknown := set(options.names) - {check.name for check in CHECKS}:
        parser.error(f"no check {', '.join(sorted(unknown))}. `--list` lists them")
    chosen = [check for check in CHECKS if not options.names or check.name in options.names]
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    return run_checks(chosen, options.json, 60 * options.minutes, "gpu.machine:opened", options.imitate)


def run_checks(checks: list[Check], json_path: Path, budget: float, machine: str, imitate: str | None = None) -> int:
    """Run checks, print the table, and return the exit status.

    Args:
        checks: The checks, the most valuable first.
        json_path: File for the results.
        budget: Seconds for everything.
        machine: Context manager of the checks' machine, as ``module:name``.
        imitate: Card to imitate. Its times say nothing: no check is skipped because of its estimate.
    """
    folder = Path(tempfile.mkdtemp(prefix="opsd-gpu-"))
    facts: dict[str, Any] = {
        "started": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "imitated": imitate or "",
        "budget_seconds": budget,
    }
    arguments = ["--machine", machine, "--folder", str(folder), *(["--imitate", imitate] if imitate else [])]
    run = Run(checks, arguments, json_path, facts, budget, lambda line: print(line, flush=True), estimates=imitate is None)
    status = None
    try:
        run.run()
    except KeyboardInterrupt:
        status = 130
    finally:
        shutil.rmtree(folder, ignore_errors=True)
    print(f"\n{table(run.results, checks)}\nwritten to {json_path} and {run.output}", flush=True)
    return min(sum(result.status == "fail" for result in run.results), 100) if status is None else status


if __name__ == "__main__":
    sys.exit(main())
