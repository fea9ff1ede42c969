"""Memory of the Qwen3 recipes by part, with validation, on the cards that they name.

    python benchmarks/memory.py                   configs/qwen3_*.yaml, and a benchmark of configs/eval/ with each of them
    python benchmarks/memory.py --device cuda     the checks of the estimate on a GPU

The estimates are those of ``opsd doctor`` (opsd_lightning/doctor/memory.py, which says how each part is computed), for the
published shapes of the models and a card that nothing else uses. ``rows`` are the completions that are sampled at one time:
the number that fits beside the weights, up to all. A card of N GB has N x 10^9 bytes here, a little less than most have.

Two numbers are compared with measurements: the bytes of an NF4 weight with double quantization, on a layer of the real
shape; and the peak of one decoder layer with a LoRA of rank 64, gradient checkpointing and bfloat16 autocast, for each token
of a pass. It is the difference between two lengths, on a GPU by its allocator and without one on an imitated device.
"""

from __future__ import annotations

import argparse
import re
import tempfile
import warnings
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import yaml
from bitsandbytes.functional import quantize_4bit
from common import machine, parser, report
from peft import LoraConfig, get_peft_model
from transformers import Qwen3Config, Qwen3ForCausalLM

from helpers.qwen3 import qwen3_config, qwen3_folder
from helpers.strict_device import strict_device
from opsd_lightning.doctor.examination import build_parts
from opsd_lightning.doctor.memory import GIB, DeviceMemory, Estimator, Step, kept_bytes_per_token
from opsd_lightning.doctor.run_memory import estimator_of, step_of

CONFIGS = Path(__file__).parents[1] / "configs"
RECIPES = [path.stem for path in sorted(CONFIGS.glob("qwen3_*.yaml"))]


def estimate(recipe: str, folder: Path, prompt: int) -> tuple[Estimator, Step, int]:
    """Return the estimator of a recipe, its step, and the gigabytes of its card."""
    path = CONFIGS / f"{recipe}.yaml"
    text = path.read_text(encoding="utf-8")
    card = int(re.findall(r"^#.*\b(\d+) GB\b", text, re.MULTILINE)[0])
    model = qwen3_folder(yaml.safe_load(text)["model"]["policy"]["model"], folder)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        parts, problems = build_parts([f"--config={path}", f"--model.policy.model={model}"], with_model=False)
    if parts is None:
        raise SystemExit(str(problems))
    precision = str(parts.config[parts.subcommand].trainer.precision)
    estimator = estimator_of(parts.model, DeviceMemory.card(card), precision)
    return estimator, step_of(parts.model, parts.datamodule, prompt), card


def phase(estimator: Estimator, step: Step, name: str) -> dict[str, Any]:
    """Return the bytes of a phase of sampling, and the completions at one time."""
    parts = {key.partition(": ")[2]: size for key, size in estimator.parts(step).items() if key.startswith(f"{name}: ")}
    rows = step.rows, step.completion
    if name == "validation":
        rows = step.eval_rows, step.eval_completion
    at_once = estimator.rows_at_once(step._replace(rows=rows[0], completion=rows[1]))
    return {
        "rows": f"{at_once} of {rows[0]}",
        "copy": parts["copies of weights"] / GIB,
        "keys, values": parts["keys and values"] / GIB,
        "logits, prompts": parts["logits and prompts"] / GIB,
    }


def recipe_rows(recipe: str, folder: Path, args: argparse.Namespace) -> tuple[list[dict[str, Any]], ...]:
    """Return the rows of a recipe in the tables: kept and scoring, sampling, and completions of other lengths."""
    estimator, step, card = estimate(recipe, folder, args.prompt)
    parts = estimator.parts(step)
    adapter = parts["trainable weights"] + parts["gradients"] + parts["optimizer state"]
    kept = {
        "recipe": recipe,
        "weights": parts["base weights"] / GIB,
        "adapter": adapter / GIB,
        "reserve": parts["reserve"] / GIB,
        "activations": parts["scoring: activations"] / GIB,
        "states": parts["scoring: states of teachers"] / GIB,
        "logits": parts["scoring: logits"] / GIB,
        "vLLM": parts.get("rollout: vLLM", 0) / GIB,
        "peak": parts["total"] / GIB,
        "card": f"{card} GB: {estimator.device.total / GIB:.1f}",
    }
    if "rollout: vLLM" in parts:  # it divides its share by itself
        return [kept], [], []
    sampling = [
        {"recipe": recipe, "phase": name, "completion": completion} | phase(estimator, step, name)
        for name, completion in (("rollout", step.completion), ("validation", step.eval_completion))
    ]
    settings = yaml.safe_load((CONFIGS / "eval" / "aime24.yaml").read_text(encoding="utf-8"))
    wanted = settings["model"]["eval_sampling"]
    rows = settings["data"]["eval_batch_size"] * wanted["n"]
    bench = step._replace(eval_rows=rows, eval_completion=wanted["max_new_tokens"], rows_at_once=rows)
    row = {"recipe": recipe, "phase": "benchmark", "completion": bench.eval_completion}
    sampling.append(row | phase(estimator, bench, "validation"))
    lengths = []
    for length in args.lengths:
        longer = step._replace(completion=length, eval_rows=0)
        parts = estimator.parts(longer)
        scoring = sum(size for part, size in parts.items() if part.startswith("scoring"))
        row = {"recipe": recipe, "completion": length, "rows at one time": estimator.rows_at_once(longer)}
        lengths.append(row | {"scoring": scoring / GIB, "peak": parts["total"] / GIB})
    return [kept], sampling, lengths


def nf4_bytes_per_weight(config: Qwen3Config, device: str) -> float:
    """Measure the bytes per weight of the widest layer in NF4 with double quantization, including scales."""
    shape = (config.hidden_size, config.intermediate_size)
    packed, state = quantize_4bit(torch.randn(shape, device=device), compress_statistics=True, quant_type="nf4")
    parts = [packed, state.absmax, state.code, state.state2.absmax, state.state2.code]
    return sum(part.numel() * part.element_size() for part in parts) / (shape[0] * shape[1])


def layer_peak(config: Qwen3Config, device: str, lengths: tuple[int, int] = (64, 192)) -> tuple[float, float]:
    """Return the peak bytes of a model of one decoder layer for each token of a pass, measured and estimated."""
    one = Qwen3Config(**(config.to_dict() | {"vocab_size": 64, "num_hidden_layers": 1, "layer_types": None}))
    lora = LoraConfig(r=64, target_modules="all-linear", exclude_modules=["lm_head"], lora_dropout=0.05)

    def build(where: str) -> Any:
        with torch.device(where):
            base = Qwen3ForCausalLM(one).to(torch.bfloat16).requires_grad_(False)
            return get_peft_model(base, lora).train()

    estimated = 2 * config.hidden_size + kept_bytes_per_token(build("meta")) + 2 * 2 * config.intermediate_size
    model = build("cpu")
    base = model.get_base_model()
    name = "activation" if hasattr(base, "activation_checkpointing_enable") else "gradient"  # as `Policy.build`
    getattr(base, f"{name}_checkpointing_enable")({"use_reentrant": False})
    base.enable_input_require_grads()
    found = []
    with nullcontext() if device.startswith("cuda") else strict_device():
        target = torch.device("cuda", 0)
        base.model.to(target)
        for tokens in lengths:
            ids = torch.zeros(1, tokens, dtype=torch.long).to(target)
            before = torch.cuda.memory_allocated()
            torch.cuda.reset_peak_memory_stats()
            with torch.autocast("cuda", dtype=torch.bfloat16):
                out = base.model(input_ids=ids, use_cache=False).last_hidden_state
            out.backward(torch.ones_like(out))
            found.append(torch.cuda.max_memory_allocated() - before)
            del out
            model.zero_grad()
    return (found[1] - found[0]) / (lengths[1] - lengths[0]), estimated


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--recipes", nargs="+", default=RECIPES, choices=RECIPES)
    options.add_argument("--prompt", type=int, default=512, help="tokens of a long student's prompt")
    options.add_argument("--lengths", type=int, nargs="+", default=[1024, 2048, 4096, 8192])
    args = options.parse_args()
    tables: tuple[list[dict[str, Any]], ...] = ([], [], [])
    checks: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as folder:
        for recipe in args.recipes:
            for table, rows in zip(tables, recipe_rows(recipe, Path(folder), args), strict=True):
                table.extend(rows)
            name = yaml.safe_load((CONFIGS / f"{recipe}.yaml").read_text(encoding="utf-8"))["model"]["policy"]["model"]
            if name in {check["model"] for check in checks}:
                continue
            config = qwen3_config(name)
            measured, estimated = layer_peak(config, args.device)
            checks.append(
                {
                    "model": name,
                    "NF4 bytes a weight": nf4_bytes_per_weight(config, args.device),
                    "KiB a token and layer": measured / 1024,
                    "estimated": estimated / 1024,
                    "ratio": estimated / measured,
                }
            )
    titles = (
        f"GiB that a step keeps and that scoring needs, prompts of {args.prompt} (calculated)",
        "GiB of sampling beside what is kept (calculated)",
        "GiB by the length of completions (calculated)",
    )
    facts = machine(args.device) | {"layer_measured_on": args.device if args.device != "cpu" else "an imitated CUDA device"}
    report("memory", facts, {"the estimate's checks": checks} | dict(zip(titles, tables, strict=True)), args.json)


if __name__ == "__main__":
    main()
