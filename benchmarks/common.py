"""Helpers of the benchmarks: times of alternating runs, peak memory, limits of the machine, tables and JSON files.

A time is the median of alternating runs (A, B, A, B, ...), so that other load slows both sides equally. Benchmarks report
the ratio of two times. Peak memory is that of torch's allocator on CUDA and the resident set of the process on a CPU
(Linux), relative to the memory before the call.
"""

from __future__ import annotations

import argparse
import ctypes
import gc
import json
import os
import platform
import random
import statistics
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
sys.path.append(str(Path(__file__).resolve().parents[1] / "tests"))  # the imitated device and tiny models, in `helpers`

import torch
import transformers
from transformers import LogitsProcessor


def parser(description: str | None) -> argparse.ArgumentParser:
    """Return a parser with the common options of all benchmarks."""
    options = argparse.ArgumentParser(description=(description or "").splitlines()[0])
    options.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu", help="cpu, cuda or cuda:N")
    options.add_argument("--repeats", type=int, default=5, help="runs of each side, which alternate")
    options.add_argument("--json", default=None, help="file for the results (default: results/<script>.json)")
    return options


def model_folder(given: str | None) -> str:
    """Return the model of a benchmark: as passed, else the quick start's folder, else SmolLM2-135M-Instruct on the hub."""
    local = Path(__file__).parents[1] / "runs" / "models" / "SmolLM2-135M-Instruct"
    return given or (str(local) if local.is_dir() else "HuggingFaceTB/SmolLM2-135M-Instruct")


def log_uniform(count: int, shortest: int, longest: int) -> list[int]:
    """Return lengths that are evenly spaced on a logarithmic scale, in a fixed random order."""
    ratio = longest / shortest
    lengths = [round(shortest * ratio ** (i / max(count - 1, 1))) for i in range(count)]
    random.Random(0).shuffle(lengths)
    return lengths


class EndAt(LogitsProcessor):
    """Logits processor that gives each completion a planned length, by an EOS at its end and none before.

    It works in all batches of the model's ``generate``, with padding on the left.

    Args:
        lengths: Length of the completion of each prompt.
        eos: Ids that end a completion. The first one is used.
        pads: Ids that can pad a prompt on the left.
    """

    def __init__(self, lengths: Mapping[tuple[int, ...], int], eos: Sequence[int], pads: Sequence[int]) -> None:
        self.eos, self.pads = list(eos), set(pads)
        self.by_start = sorted(lengths.items(), key=lambda item: -len(item[0]))

    def __call__(self, input_ids: torch.LongTensor, scores: torch.FloatTensor) -> torch.FloatTensor:
        scores[:, self.eos] = -torch.inf
        for place, row in enumerate(input_ids.tolist()):
            if self._left(row) <= 1:
                scores[place] = -torch.inf
                scores[place, self.eos[0]] = 0.0
        return scores

    def _left(self, row: list[int]) -> int:
        start = 0
        while True:
            for prompt, length in self.by_start:
                if row[start : start + len(prompt)] == list(prompt):
                    return length - (len(row) - start - len(prompt))
            if row[start] not in self.pads:
                raise ValueError("a prompt was not planned")
            start += 1

    def install(self, base: Any) -> None:
        """Install the processor in all ``generate`` calls of a model, until ``del base._get_logits_processor``."""
        original = base._get_logits_processor

        def with_lengths(*args: Any, **kwargs: Any) -> Any:
            processors = original(*args, **kwargs)
            processors.insert(0, self)  # before top-k and top-p, which must not remove all tokens
            return processors

        base._get_logits_processor = with_lengths


def wait(device: str) -> None:
    if device.startswith("cuda"):
        torch.cuda.synchronize(device)


def in_turn(sides: Mapping[str, Callable[[], Any]], repeats: int, device: str = "cpu") -> dict[str, float]:
    """Return the median seconds of each side. After one warm-up run each, the sides alternate."""
    seconds: dict[str, list[float]] = {name: [] for name in sides}
    for repeat in range(repeats + 1):
        for name, side in sides.items():
            gc.collect()
            wait(device)
            start = time.perf_counter()
            side()
            wait(device)
            if repeat:
                seconds[name].append(time.perf_counter() - start)
    return {name: statistics.median(values) for name, values in seconds.items()}


def resident_bytes() -> int:
    """Return the resident set size of this process (Linux)."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


class PeakMemory:
    """Context manager that measures peak memory.

    ``peak_bytes`` is the peak inside the context, ``extra_bytes`` the peak above the memory in use on entry. On a CPU the
    resident set is sampled every millisecond. On CUDA the peak is that of torch's allocator.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device, self.cuda = device, device.startswith("cuda")
        self.extra_bytes = self.peak_bytes = 0

    def __enter__(self) -> PeakMemory:
        gc.collect()
        if sys.platform == "linux":
            ctypes.CDLL(None).malloc_trim(0)  # return the memory of earlier calls to the system first
        if self.cuda:
            wait(self.device)
            torch.cuda.reset_peak_memory_stats(self.device)
            self._before = torch.cuda.memory_allocated(self.device)
        else:
            self._before = self._peak = resident_bytes()
            self._stop = threading.Event()
            self._thread = threading.Thread(target=self._watch, daemon=True)
            self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.001):
            self._peak = max(self._peak, resident_bytes())

    def __exit__(self, *_: object) -> None:
        if self.cuda:
            wait(self.device)
            self.peak_bytes = torch.cuda.max_memory_allocated(self.device)
            self.extra_bytes = self.peak_bytes - self._before
        else:
            self._stop.set()
            self._thread.join()
            self.peak_bytes = max(self._peak, resident_bytes())
            self.extra_bytes = self.peak_bytes - self._before


#: Size of the matrices and number of elements read to measure the machine, on a CPU and on other devices.
MEASURED_ON_CPU, MEASURED_ELSEWHERE = (2048, 2**26), (8192, 2**29)


def machine(device: str, dtype: torch.dtype = torch.float32) -> dict[str, Any]:
    """Measure the limits of the machine: matrix products in FLOP/s and reads from memory in bytes/s."""
    size, count = MEASURED_ON_CPU if device == "cpu" else MEASURED_ELSEWHERE
    a, b = (torch.randn(size, size, device=device, dtype=dtype) for _ in range(2))
    numbers = torch.ones(count, device=device)
    sides = {"matmul": lambda: a @ b, "read": numbers.sum}
    seconds = in_turn(sides, 3, device)
    return {
        "device": torch.cuda.get_device_name(device) if device.startswith("cuda") else _cpu_name(),
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "dtype": str(dtype).removeprefix("torch."),
        "matmul_flops": 2 * size**3 / seconds["matmul"],
        "read_bytes_per_second": numbers.nbytes / seconds["read"],
    }


def _cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.split(":", 1)[1].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def report(
    script: str, facts: Mapping[str, Any], tables: Mapping[str, Sequence[Mapping[str, Any]]], path: str | None
) -> None:
    """Print the tables and write all results as JSON."""
    print(f"\n{facts['device']}, {facts['threads']} threads, torch {facts['torch']}, {facts['dtype']}: ", end="")
    print(f"matmul {facts['matmul_flops'] / 1e9:.0f} GFLOP/s, memory {facts['read_bytes_per_second'] / 1e9:.1f} GB/s")
    for title, rows in tables.items():
        print(f"\n{title}")
        names = list(dict.fromkeys(name for row in rows for name in row))
        cells = [names] + [[_cell(row.get(name, "")) for name in names] for row in rows]
        widths = [max(len(line[column]) for line in cells) for column in range(len(names))]
        for line in cells:
            print("  " + "  ".join(cell.rjust(width) for cell, width in zip(line, widths, strict=True)).rstrip())
    target = Path(path) if path else Path(__file__).parent / "results" / f"{script}.json"
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(target.name + ".tmp")
    content = {"command": "python " + " ".join([f"benchmarks/{script}.py", *sys.argv[1:]]), "machine": facts, **tables}
    temporary.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")
    temporary.replace(target)
    print(f"\nwritten to {target}")


def _cell(value: Any) -> str:
    if isinstance(value, float):
        return f"{value:.2e}" if value and abs(value) < 1e-3 else f"{value:.3g}" if abs(value) < 100 else f"{value:.0f}"
    return str(value)
