"""Weak base models, pretrained within minutes on the task in both roles, the student's role mostly on easy rows.

    python -m benchmarks.learning.bases --count 3
    python -m benchmarks.learning.bases --strong                 the separate teacher, which solves the task alone

Half of the rows are the student's, of which 98 % have no carries. The student is therefore weak where a result is outside 0
to 9. The other half are the teacher's, without restriction: the model is much better with a reference than without one.
Questions have one to three operations and are from the pretraining split only. A base depends on its seed, its number of
steps and the versions of the libraries, and is made once.
"""

from __future__ import annotations

import argparse
import json
import math
import random
import time
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.nn import functional
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.learning.task import (
    EOS,
    GRADER,
    PAD,
    VOCABULARY,
    ChainProblems,
    Split,
    draw,
    encode,
    make_tokenizer,
    prompts,
    runs_folder,
    split_of,
)
from opsd_lightning.grading.base import Grader
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Example, Sampling
from opsd_lightning.utils.folders import check_replaceable, replace_folder

MAX_NEW_TOKENS = 26  # a worked answer of three operations has 22 tokens with its EOS
EASY_OPERATIONS = (1, 2)
STRONG = "strong"  # folder of the separate teacher, beside the bases


@dataclass(frozen=True)
class Base:
    """Settings of a base model.

    Args:
        seed: Seed of the weights and rows.
        steps: Optimizer steps of the pretraining.
        rows: Number of rows per step.
        learning_rate: Peak learning rate, with a warm-up over the first 5 % of the steps and a cosine decay to 0.
        weak_share: Share of the student's rows without carries.
    """

    seed: int = 0
    steps: int = 400
    rows: int = 64
    learning_rate: float = 3e-3
    weak_share: float = 0.98

    @property
    def name(self) -> str:
        return f"base{self.seed}"


@dataclass(frozen=True)
class Strong(Base):
    """Settings of the separate teacher of on-policy distillation, which solves the task without a reference.

    It differs from a base model in unrestricted student rows, more steps and its seed.
    """

    seed: int = 100
    steps: int = 800
    weak_share: float = 0.0

    @property
    def name(self) -> str:
        return STRONG


def row(rng: random.Random, weak_share: float) -> tuple[list[int], list[int]]:
    """Return the prompt and completion, including EOS, of a student's or a teacher's row."""
    student = rng.random() < 0.5
    carries = not student or rng.random() >= weak_share
    while True:
        chain = draw(rng, rng.choice((1, 2, 3, 3, 3)), carries)
        if split_of(chain.question) == "pretrain":
            break
    context = ""
    if not student:  # mostly the terse reference, sometimes another context for the ablations
        context = "R" + chain.example().columns[rng.choices(("terse", "answer", "worked"), (8, 1, 1))[0]]
    return encode(f"Q{chain.question}{context}>"), [*encode(chain.worked()), EOS]


def batches(base: Base) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Yield token ids and targets of each step, of shape [rows, longest]. The target is -100 where there is none."""
    rng = random.Random(f"base {base.seed}")
    for _ in range(base.steps):
        found = [row(rng, base.weak_share) for _ in range(base.rows)]
        longest = max(len(prompt) + len(completion) for prompt, completion in found)
        ids = torch.full((base.rows, longest), PAD)
        targets = torch.full((base.rows, longest), -100)
        for i, (prompt, completion) in enumerate(found):
            both = torch.tensor(prompt + completion)
            ids[i, : len(both)] = both
            targets[i, len(prompt) : len(both)] = both[len(prompt) :]
        yield ids, targets


def pretrain(base: Base) -> LlamaForCausalLM:
    """Train a model of about 145,000 parameters with plain torch."""
    torch.manual_seed(base.seed)
    config = LlamaConfig(
        vocab_size=len(VOCABULARY),
        hidden_size=64,
        intermediate_size=160,
        num_hidden_layers=3,
        num_attention_heads=4,
        num_key_value_heads=4,
        max_position_embeddings=128,
        pad_token_id=PAD,
        bos_token_id=None,
        eos_token_id=EOS,
    )
    model = LlamaForCausalLM(config)
    optimizer = torch.optim.AdamW(model.parameters(), lr=base.learning_rate, weight_decay=0.01, betas=(0.9, 0.98))
    warmup = max(base.steps // 20, 1)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda n: min((n + 1) / warmup, 0.5 + 0.5 * math.cos(math.pi * n / base.steps))
    )
    for step, (ids, targets) in enumerate(batches(base)):
        # Padding on the right needs no mask under causal attention.
        logits = model(input_ids=ids[:, :-1], use_cache=False).logits
        loss = functional.cross_entropy(logits.flatten(0, 1), targets[:, 1:].flatten(), ignore_index=-100)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        if step % 250 == 0 or step == base.steps - 1:
            print(f"{base.name}: pretraining step {step + 1}/{base.steps}, loss {loss.item():.3f} nats a token", flush=True)
    return model


def greedy_accuracy(
    model: Any,
    examples: Sequence[Example],
    context: str | None = None,
    engine: RolloutEngine | None = None,
    grader: Grader = GRADER,
) -> float:
    """Return the share of correct greedy answers, as the student or with a column as context."""
    engine, sampling = engine or TransformersEngine(), Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0)
    rollouts = engine.generate(model, prompts(examples, context), sampling, seed=0)
    texts = make_tokenizer().batch_decode(rollouts.completions, skip_special_tokens=True)
    return sum(grade.score for grade in grader.grades(texts, examples)) / len(examples)


@cache
def questions(split: Split, size: int) -> list[Example]:
    """Return the questions for accuracy, which are the same in all runs."""
    return ChainProblems(split, size).examples()


@cache
def easier(operations: int, size: int) -> list[Example]:
    """Return questions with fewer operations, which are in neither pretraining nor training."""
    found = [e for split in ("test", "validation", "train") for e in ChainProblems(split, size, operations).examples()]
    return found[:size]


def load(folder: Path) -> Any:
    """Load the base model with an adapter that does not change it."""
    return Policy(str(folder), LoRA(r=1), dtype="float32").build()


def measure(folder: Path, size: int = 500) -> dict[str, float]:
    """Measure the greedy accuracy on held-out questions in both roles, and on easier questions."""
    model = load(folder)
    validation = questions("validation", size)
    found = {
        "student": greedy_accuracy(model, validation),
        "teacher": greedy_accuracy(model, validation, "terse"),
        "teacher_answer_only": greedy_accuracy(model, validation, "answer"),
        "teacher_wrong": greedy_accuracy(model, validation, "wrong"),
    }
    for operations in EASY_OPERATIONS:
        found[f"student_{operations}_operations"] = greedy_accuracy(model, easier(operations, size))
    return found


def make(base: Base, root: Path) -> Path:
    """Return the folder of a base model, and make the model if the folder does not exist."""
    folder = (root / base.name).resolve()
    record = folder / "base.json"
    if record.exists() and json.loads(record.read_text(encoding="utf-8"))["settings"] == asdict(base):
        return folder
    check_replaceable(folder, "--output", "pretrained model")
    started = time.perf_counter()
    model = pretrain(base)
    seconds = time.perf_counter() - started
    facts = {"settings": asdict(base), "parameters": sum(p.numel() for p in model.parameters()), "seconds": seconds}
    with replace_folder(folder, "--output", "pretrained model") as partial:
        model.save_pretrained(partial)
        make_tokenizer().save_pretrained(partial)
        facts |= {"torch": torch.__version__, "accuracy": measure(partial)}
        (partial / "base.json").write_text(json.dumps(facts, indent=1) + "\n", encoding="utf-8")
    print(f"{base.name}: {facts}", flush=True)
    return folder


def main() -> None:
    options = argparse.ArgumentParser(prog="python -m benchmarks.learning.bases", description="Make the base models.")
    options.add_argument("--count", type=int, default=3, help="number of base models, with seeds from 0")
    options.add_argument("--first", type=int, default=0, help="seed of the first base model")
    options.add_argument("--steps", type=int, default=Base.steps, help="pretraining steps")
    options.add_argument("--strong", action="store_true", help="only the separate teacher, with its own settings")
    options.add_argument("--output", type=Path, default=runs_folder() / "bases")
    chosen = options.parse_args()
    torch.set_num_threads(1)
    seeds = range(chosen.first, chosen.first + chosen.count)
    for base in [Strong()] if chosen.strong else [Base(seed=seed, steps=chosen.steps) for seed in seeds]:
        make(base, chosen.output)


if __name__ == "__main__":
    main()
