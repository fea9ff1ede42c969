"""vLLM servers against rollouts in the trainer: time to refresh an adapter, and training steps per minute.

    python benchmarks/servers.py --vllm-python .venv-vllm/bin/python       starts two servers itself, on this machine
    python benchmarks/servers.py --urls http://node1:8000 http://node2:8000 --adapter-folder /shared/adapters

On one machine, servers and trainer share its cores. The gain of more servers shows only with a machine per server.
"""

from __future__ import annotations

import os
import signal
import socket
import statistics
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import torch
from common import machine, model_folder, parser, report
from lightning.pytorch import Callback, Trainer

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.rollouts.vllm.engines import VLLMServerEngine
from opsd_lightning.types import Sampling


@contextmanager
def servers(python: str, model: str, count: int, device: str) -> Iterator[list[str]]:
    """Start vLLM servers on free ports of this machine, and stop them at the end."""
    command = [python, "-m", "vllm.entrypoints.openai.api_server", "--model", model, "--max-model-len", "512",
               "--enable-lora", "--max-lora-rank", "16", "--host", "127.0.0.1"]  # fmt: skip
    if device == "cpu":
        command += ["--dtype", "float32", "--enforce-eager"]
    else:
        command += ["--gpu-memory-utilization", str(round(0.5 / count, 2))]
    own = {"VLLM_ALLOW_RUNTIME_LORA_UPDATING": "True", "VLLM_NO_USAGE_STATS": "1", "VLLM_CPU_KVCACHE_SPACE": "1",
           "VLLM_CPU_OMP_THREADS_BIND": "nobind", "OMP_NUM_THREADS": str(max((os.cpu_count() or 2) // 2, 1))}  # fmt: skip
    started, urls = [], []
    with tempfile.TemporaryDirectory() as logs:
        try:
            for number in range(count):
                with socket.socket() as sock:
                    sock.bind(("127.0.0.1", 0))
                    port = sock.getsockname()[1]
                line, environment = [*command, "--port", str(port)], os.environ | own
                with (Path(logs) / f"{number}.log").open("wb") as log:
                    process = subprocess.Popen(line, env=environment, stdout=log, stderr=log, start_new_session=True)
                started.append(process)
                urls.append(f"http://127.0.0.1:{port}")
            for number, url in enumerate(urls):
                while True:
                    if started[number].poll() is not None:
                        raise SystemExit((Path(logs) / f"{number}.log").read_text()[-3000:])
                    try:
                        httpx.get(url + "/health", timeout=5, trust_env=False).raise_for_status()
                        break
                    except httpx.HTTPError:
                        time.sleep(1)
            yield urls
        finally:
            for process in started:
                if process.poll() is None:
                    os.killpg(process.pid, signal.SIGTERM)
                    process.wait(timeout=60)


class Clock(Callback):
    """Measures the seconds of each step and of its phases."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_train_batch_start(self, *args: Any) -> None:
        self.start = time.perf_counter()

    def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
        logged = trainer.callback_metrics
        self.steps.append(
            {
                "seconds": time.perf_counter() - self.start,
                "rollout s": float(logged["time/rollout_seconds"]),
                "scoring s": float(logged["time/scoring_seconds"]),
                "tokens": float(logged["train/tokens_generated"]),
                "difference": float(logged.get("train/rollout_logprob_difference", float("nan"))),
            }
        )


def run(policy: Policy, engine: RolloutEngine, batch: int, tokens: int, steps: int, device: str) -> list[dict[str, float]]:
    """Return the times of the steps of a fit, except the first one, which connects and warms up."""
    torch.manual_seed(0)
    sampling = Sampling(max_new_tokens=tokens)
    module = OPSDModule(policy, rollouts=engine, sampling=sampling, optimizer=lambda p: torch.optim.AdamW(p, lr=1e-4))
    data = OPSDDataModule(policy, train=WordProblems(size=batch * (steps + 2)), batch_size=batch, max_new_tokens=tokens)
    clock = Clock()
    Trainer(
        max_steps=steps + 1, accelerator="cpu" if device == "cpu" else "gpu", devices=1, callbacks=[clock], logger=False,
        enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
    ).fit(module, data)  # fmt: skip
    before = [0.0, *(step["tokens"] for step in clock.steps)]
    return [step | {"tokens": step["tokens"] - before[i]} for i, step in enumerate(clock.steps)][1:]


def refresh_seconds(policy: Policy, url: str, folder: str, repeats: int, device: str) -> list[float]:
    """Measure the seconds from changed weights to the first token sampled with them.

    The time of a token without a change of weights is subtracted.
    """
    model = policy.build().to(device)
    engine = VLLMServerEngine([url], folder)
    one = Sampling(max_new_tokens=1, temperature=0)
    parameters = [p for p in model.parameters() if p.requires_grad]

    def token() -> float:
        start = time.perf_counter()
        engine.generate(model, [[40, 41, 42]], one, 0)
        return time.perf_counter() - start

    found = []
    for repeat in range(repeats + 1):
        with torch.no_grad():
            for parameter in parameters:
                parameter += 1e-4
        changed = token()
        if repeat:
            found.append(changed - token())
    engine.close()
    return found


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--vllm-python", default=None, help="Python of an environment with vLLM, to start two servers")
    options.add_argument("--urls", nargs="+", default=None, help="URLs of running servers")
    options.add_argument("--adapter-folder", default=None, help="folder that trainer and servers see under the same path")
    options.add_argument("--batch", type=int, default=16)
    options.add_argument("--tokens", type=int, default=64)
    options.add_argument("--steps", type=int, default=3)
    options.add_argument("--rank", type=int, default=16)
    args = options.parse_args()
    if (args.vllm_python is None) == (args.urls is None):
        raise SystemExit("give either --vllm-python or --urls")
    facts = machine(args.device)
    model = model_folder(args.model)
    dtype = "float32" if args.device == "cpu" else "bfloat16"
    policy = Policy(model, lora=LoRA(r=args.rank, alpha=2 * args.rank, dropout=0.0), dtype=dtype)
    with tempfile.TemporaryDirectory() as scratch:
        folder = args.adapter_folder or scratch

        def measure(urls: list[str], tables: dict[str, list[dict[str, Any]]]) -> None:
            seconds = refresh_seconds(policy, urls[0], folder, max(args.repeats, 5), args.device)
            tables["adapter refresh on a live server"] = [
                {"refreshes": len(seconds), "median s": statistics.median(seconds), "slowest s": max(seconds)}
            ]
            print(f"adapter refresh: {[round(value, 3) for value in seconds]} s", flush=True)
            engines = {"none: in the trainer": TransformersEngine}
            for count in range(1, len(urls) + 1):
                engines[f"{count}"] = lambda n=count: VLLMServerEngine(urls[:n], folder)
            engines[f"{len(urls)}, overlapped"] = lambda: VLLMServerEngine(urls, folder, overlap=True)
            found: dict[str, list[dict[str, float]]] = {name: [] for name in engines}
            for _ in range(args.repeats):
                for name, make in engines.items():
                    engine = make()
                    found[name] += run(policy, engine, args.batch, args.tokens, args.steps, args.device)
                    print(f"servers: {name}: {[round(step['seconds'], 1) for step in found[name]]} s a step", flush=True)
            tables[f"training steps of {args.batch} completions of at most {args.tokens} tokens, by servers"] = [
                {"servers": name, "steps a minute": 60 / statistics.median(s["seconds"] for s in steps)}
                | {
                    key: statistics.median(s[key] for s in steps)
                    for key in ("rollout s", "scoring s", "tokens", "difference")
                }
                for name, steps in found.items()
            ]

        tables: dict[str, list[dict[str, Any]]] = {}
        if args.urls:
            measure(args.urls, tables)
        else:
            with servers(args.vllm_python, model, 2, args.device) as urls:
                measure(urls, tables)
    report("servers", facts, tables, args.json)


if __name__ == "__main__":
    main()
