"""Measurements behind design decisions: matrix products of few rows, packed weights for prompts, chunk sizes.

python benchmarks/attempts.py                  CPU only; SmolLM2-135M-Instruct: `make quickstart` leaves it in runs/models
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from common import in_turn, machine, model_folder, parser, report
from torch import Tensor, nn
from torch.nn import functional
from transformers import AutoModelForCausalLM, DynamicCache

from opsd_lightning.rollouts import fast_weights as inference
from opsd_lightning.rollouts.fast_weights import packed_linears

Forward = Callable[[Tensor], Tensor]


@contextmanager
def using(forwards: dict[nn.Linear, Forward], thin_rows: int = inference._MAX_ROWS) -> Iterator[None]:
    """Replace the forward functions of linear layers, with packed weights for products of few rows only."""
    limit, inference._MAX_ROWS = inference._MAX_ROWS, thin_rows
    for layer, forward in forwards.items():
        layer.forward = forward  # type: ignore[method-assign]
    try:
        yield
    finally:
        inference._MAX_ROWS = limit
        for layer in forwards:
            del layer.forward  # type: ignore[method-assign]


def transposed(layer: nn.Linear, x: Tensor) -> Tensor:
    """Compute x W' as (W x')'."""
    return (layer.weight @ x.reshape(-1, x.shape[-1]).T).T.reshape(*x.shape[:-1], -1)


def pack(model: nn.Module) -> dict[nn.Linear, Forward]:
    """Return packed weights of a model's layers, as `packed_linears` makes them."""
    with packed_linears(model):
        return {m: m.forward for m in model.modules() if isinstance(m, nn.Linear) and "forward" in vars(m)}


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--vocabulary", type=int, default=151_936)
    args = options.parse_args()
    facts = machine("cpu")
    model: Any = AutoModelForCausalLM.from_pretrained(model_folder(args.model), dtype="float32").eval()
    tables: dict[str, list[dict[str, Any]]] = {}

    def cost(sides: dict[str, Callable[[], object]]) -> dict[str, float]:
        return in_turn(sides, args.repeats)

    with torch.no_grad():
        out, inner = 1536, 576
        weights = [torch.randn(out, inner) for _ in range(30)]  # more than the cache holds, as in a real model
        rows = []
        for count in (1, 8, 32):
            x = torch.randn(count, inner)
            mkl = [torch.ops.mkl._mkl_reorder_linear_weight(w, count) for w in weights]
            onednn = [torch.ops.mkldnn._reorder_linear_weight(w, count) for w in weights]
            pairs = list(zip(mkl, weights, strict=True))
            seconds = cost(
                {
                    "x W'": lambda x=x: [functional.linear(x, w) for w in weights],
                    "(W x')'": lambda x=x: [w @ x.T for w in weights],
                    "MKL packed": lambda x=x, p=pairs, n=count: [
                        torch.ops.mkl._mkl_linear(x, packed, w, None, n) for packed, w in p
                    ],
                    "oneDNN packed": lambda x=x, p=onednn: [
                        torch.ops.mkldnn._linear_pointwise(x, packed, None, "none", [], "") for packed in p
                    ],
                }
            )
            rows.append({"rows": count} | {f"{name}, us": second / len(weights) * 1e6 for name, second in seconds.items()})
        tables[f"one product with a weight of {out} x {inner}"] = rows

        packed = pack(model)
        ways: dict[str, dict[nn.Linear, Forward]] = {
            "plain": {},
            "(W x')'": {layer: partial(transposed, layer) for layer in packed},
            "oneDNN packed": packed,
        }
        rows = []
        for count in (1, 4, 16, 32):
            ids = torch.randint(10, model.config.vocab_size, (count, 64))
            sides = {}
            for name, way in ways.items():
                cache = DynamicCache(config=model.config)
                model(input_ids=ids, past_key_values=cache, use_cache=True)

                def steps(way: Any = way, ids: Tensor = ids, cache: DynamicCache = cache) -> None:
                    with using(way):
                        for _ in range(8):
                            model(input_ids=ids[:, :1], past_key_values=cache, use_cache=True)

                sides[name] = steps
            rows.append({"rows": count} | {f"{name}, s": second / 8 for name, second in cost(sides).items()})
        tables["a decoding step, by rows, 64 tokens or more cached"] = rows
        tables["packing all weights, once a rollout"] = [{"s": cost({"pack": lambda: pack(model)})["pack"]}]

        ids = torch.randint(10, model.config.vocab_size, (16, 64))
        sides = {}
        for name, way in {"plain": {}, "oneDNN packed": packed}.items():

            def prompts(way: Any = way, ids: Tensor = ids) -> None:
                with using(way, thin_rows=2**31):
                    model.model(input_ids=ids)

            sides[name] = prompts
        tables["16 prompts of 64 tokens"] = [{f"{name}, s": second for name, second in cost(sides).items()}]

        weight = torch.randn(args.vocabulary, 1024)
        rows = []
        for count in (16, 128, 296, 512):
            x, gradient = torch.randn(count, 1024), torch.randn(count, args.vocabulary)
            seconds = cost({"logits": lambda x=x: x @ weight.T, "back": lambda g=gradient: g @ weight})
            flops = 2 * count * 1024 * args.vocabulary
            rows.append(
                {"rows": count}
                | {f"{name}, of matmul peak": flops / s / facts["matmul_flops"] for name, s in seconds.items()}
            )
        tables[f"the head's products by the rows of a chunk, vocabulary {args.vocabulary}, hidden 1024"] = rows
    report("attempts", facts, tables, args.json)


if __name__ == "__main__":
    main()
