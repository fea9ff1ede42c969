"""Kernels a decoded token, and synchronizations of host and device in a training step.

    python benchmarks/device_counts.py                        without a GPU: on an imitated CUDA device
    python benchmarks/device_counts.py --device cuda          on a GPU: kernels by torch's profiler
    PYTHONPATH=OTHER python benchmarks/device_counts.py       the same counts for another checkout of the project

The model has the layers of Qwen3-1.7B and a tiny width, random weights and a LoRA adapter on all linear layers. The counts
depend on the number of layers and not on the width. The imitation (tests/helpers/strict_device.py) counts operations that
launch at least one kernel: a lower bound of the kernels that a GPU counts. A synchronization is a read of a value, a copy to
the CPU, or a blocking copy to the device. Kernels a token are the difference of two sampled rollouts of different lengths,
divided by the difference of their lengths. The counts of a training step come from a model of two layers.
"""

from __future__ import annotations

import inspect
import tempfile
import warnings
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import torch
from common import machine, parser, report
from lightning.pytorch import Trainer
from transformers import BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM

from helpers.device_phases import step_phases
from helpers.models import make_tokenizer
from helpers.strict_device import Counts, strict_device
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy, base_of
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import without_adapter
from opsd_lightning.types import Sampling

#: Settings of `TransformersEngine` to count. A checkout without one of the settings leaves its row out.
ENGINES: dict[str, dict[str, Any]] = {
    "default": {},
    "no rollout copy": {"rollout_copy": False},
    "adapter not merged": {"merge_adapter": False},
    "static cache": {"static_cache": True},
}
WEIGHTS = ("nf4", "bfloat16", "float32")


class Gpu:
    """Counts of a real GPU: synchronizations by torch's warnings, and kernels by its profiler where asked for."""

    def __init__(self) -> None:
        self.counts: dict[str, Counts] = {}

    @contextmanager
    def phase(self, name: str) -> Iterator[Counts]:
        counts = self.counts.setdefault(name, Counts())
        before = torch.cuda.get_sync_debug_mode()
        torch.cuda.set_sync_debug_mode("warn")
        try:
            with warnings.catch_warnings(record=True) as caught:
                warnings.simplefilter("always")
                yield counts
        finally:
            torch.cuda.set_sync_debug_mode(before)
            for warning in caught:
                if "synchroniz" in str(warning.message):
                    counts.waits[f"{Path(warning.filename).name}:{warning.lineno}"] += 1

    def kernels(self, work: Callable[[], Any]) -> Counter[str]:
        from torch.profiler import ProfilerActivity, profile

        with profile(activities=[ProfilerActivity.CUDA]) as profiler:
            work()
            torch.cuda.synchronize()
        names = [event.name for event in profiler.events() if event.device_type == torch.autograd.DeviceType.CUDA]
        return Counter(name for name in names if not name.startswith(("Memcpy", "Memset")))


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--layers", type=int, default=28)
    options.add_argument("--tokens", type=int, default=2, help="length of the shorter rollout, the longer has twice as many")
    options.add_argument("--greedy", action="store_true", help="decode greedily (default: top-p 0.95, top-k 20)")
    options.add_argument("--weights", nargs="+", default=list(WEIGHTS), choices=WEIGHTS)
    options.add_argument("--engines", nargs="+", default=list(ENGINES), choices=list(ENGINES))
    options.add_argument("--by-operation", action="store_true", help="print the kernels of each row by operation")
    args = options.parse_args()
    imitated = not args.device.startswith("cuda")
    facts = machine(args.device)
    facts |= {"layers": args.layers, "counted_on": "an imitated CUDA device" if imitated else facts["device"]}
    with tempfile.TemporaryDirectory() as folder, strict_device() if imitated else nullcontext(Gpu()) as device:
        save_model(f"{folder}/deep", args.layers)
        tokens = [row for weights in args.weights for row in decoding(device, f"{folder}/deep", weights, args)]
        save_model(f"{folder}/shallow", 2)
        steps = [row for weights in args.weights for row in synchronizations(device, f"{folder}/shallow", weights)]
    print(f"\nCounted on {facts['counted_on']}.", end="")
    title = f"kernels and synchronizations a decoded token, {args.layers} layers, bf16-mixed unless the weights are float32"
    report("device_counts", facts, {title: tokens, "synchronizations of a training step": steps}, args.json)


def save_model(folder: str, layers: int) -> None:
    """Save a model with the layers of Qwen3 and a tiny width."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=len(tokenizer), hidden_size=64, intermediate_size=64, num_hidden_layers=layers, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=True,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)


def policy_of(folder: str, weights: str) -> Policy:
    quantization = None
    if weights == "nf4":
        quantization = BitsAndBytesConfig(
            load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True,
            bnb_4bit_compute_dtype=torch.bfloat16,
        )  # fmt: skip
    dtype: Any = "float32" if weights == "float32" else "bfloat16"
    return Policy(folder, lora=LoRA(r=8, alpha=16, dropout=0.0), dtype=dtype, quantization=quantization)


def decoding(device: Any, folder: str, weights: str, args: Any) -> list[dict[str, Any]]:
    """Count kernels and synchronizations a decoded token, for each engine, with the adapter and without."""
    target = torch.device("cuda", 0)
    model = policy_of(folder, weights).build(target)
    model.to(target)
    # No row ends early, so that all rollouts have the same length.
    base_of(model).generation_config.eos_token_id = [base_of(model).config.vocab_size + 1]
    prompts = [[20, 21, 22, 23], [30, 31]]
    rows = []
    sampling = {"temperature": 0.0} if args.greedy else {"temperature": 1.0, "top_p": 0.95, "top_k": 20}
    known = inspect.signature(TransformersEngine.__init__).parameters
    for name in args.engines:
        if not set(ENGINES[name]) <= set(known):
            continue
        for adapter in (True, False):
            row: dict[str, Any] = {"weights": weights, "engine": name, "adapter": "yes" if adapter else "no"}
            engine = TransformersEngine(**ENGINES[name])
            lengths = (args.tokens, 2 * args.tokens)
            try:
                short, long = (
                    one_rollout(device, engine, model, adapter, prompts, Sampling(length, **sampling), weights)
                    for length in lengths
                )
            except Exception as error:  # a setting that this checkout should refuse
                rows.append(row | {"kernels": f"fails: {type(error).__name__}"})
                continue
            row["kernels"] = (long[0].total() - short[0].total()) / args.tokens
            row["synchronizations"] = (long[1] - short[1]) / args.tokens
            if args.by_operation:
                print(row, {name: count / args.tokens for name, count in (long[0] - short[0]).most_common()})
            rows.append(row)
    return rows


def one_rollout(
    device: Any, engine: RolloutEngine, model: Any, adapter: bool, prompts: Any, sampling: Sampling, weights: str
) -> tuple[Counter[str], int]:
    """Return the kernels of a rollout by operation, and its number of synchronizations."""

    def work() -> None:
        autocast = torch.autocast("cuda", torch.bfloat16, enabled=weights != "float32", cache_enabled=False)
        with nullcontext() if adapter else without_adapter(model), autocast:
            rollouts = engine.generate(model, prompts, sampling, 0)
        assert {len(row) for row in rollouts.completions} == {sampling.max_new_tokens}

    device.counts.pop("decoding", None)
    if isinstance(device, Gpu):
        work()
        kernels = device.kernels(work)
    with device.phase("decoding") as counts:
        work()
    return kernels if isinstance(device, Gpu) else Counter(counts.kernels), counts.synchronizations.total()


def synchronizations(device: Any, folder: str, weights: str) -> list[dict[str, Any]]:
    """Count the synchronizations of a training step by phase, after a first step that warms up."""
    torch.manual_seed(0)
    policy = policy_of(folder, weights)
    data = OPSDDataModule(
        policy, train=WordProblems(size=8, seed=1), prompts=Prompts("{question}", "{question} {context}"), batch_size=2,
        max_new_tokens=16,
    )  # fmt: skip
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=16, n=2), token_budget=128, max_grad_norm=1.0)
    trainer = Trainer(
        accelerator="gpu", devices=1, max_steps=2, precision="32-true" if weights == "float32" else "bf16-mixed",
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=folder, num_sanity_val_steps=0,
    )  # fmt: skip
    for name in list(device.counts):
        del device.counts[name]
    with warnings.catch_warnings(), step_phases(device, module) as steps:
        warnings.simplefilter("ignore")
        trainer.fit(module, data)
    rows = []
    for phase in ("rollout", "teacher", "micro-batches", "optimizer", "metrics", "step, rest"):
        counts = device.counts.get(phase, Counts())
        row: dict[str, Any] = {"weights": weights, "phase": phase, "a step": counts.synchronizations.total() / steps.steps}
        row["reads"], row["uploads"] = counts.waits.total() / steps.steps, counts.uploads.total() / steps.steps
        if phase == "micro-batches":
            row["a micro-batch"] = counts.synchronizations.total() / steps.micro_batches
        rows.append(row)
    return rows


if __name__ == "__main__":
    main()
