"""Weak but real base models, made in minutes: pretrained on the task in both roles, the student's role mostly on easy rows.

    python -m benchmarks.learning.bases --count 3
    python -m benchmarks.learning.bases --strong                 the separate teacher, which solves the task alone

Half of the rows are a student's, 98 in 100 of them without carries, so that the student is weak where a result leaves
0 to 9. Half are a teacher's, unrestricted: the model can use a reference far better than it can do without. Lengths of
one to three operations are mixed. The questions are those of the pretraining split alone. A base depends on its seed, its
number of steps and the versions of the libraries, and is made once.
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
from opsd_lightning.grading.math_grader import MathGrader
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Example, Sampling
from opsd_lightning.utils.folders import check_replaceable, replace_folder

MAX_NEW_TOKENS = 26  # three operations worked are 22 tokens with their EOS
EASY_OPERATIONS = (1, 2)
STRONG = "strong"  # folder of the separate teacher, beside the bases


@dataclass(frozen=True)
class Base:
    """How one base model is made.

    Args:
        seed: Of its weights and rows.
        steps: Optimizer steps of the pretraining.
        rows: Rows of a step.
        learning_rate: The highest; it rises over the first 5 % and then falls to 0 on a cosine.
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
    """A model that solves the task without a reference: the separate teacher of on-policy distillation.

    It differs from a base in its student's rows, which are unrestricted, in more steps, and in its seed.
    """

    seed: int = 100
    steps: int = 800
    weak_share: float = 0.0

    @property
    def name(self) -> str:
        return STRONG


def row(rng: random.Random, weak_share: float) -> tuple[list[int], list[int]]:
    """A prompt and its completion, EOS included, as a student's or a teacher's row."""
    student = rng.random() < 0.5
    carries = not student or rng.random() >= weak_share
    while True:
        chain = draw(rng, rng.choice((1, 2, 3, 3, 3)), carries)
        if split_of(chain.question) == "pretrain":
            break
    context = ""
    if not student:  # mostly the terse reference; at times another kind of context, for ablations
        context = "R" + chain.example().columns[rng.choices(("terse", "answer", "worked"), (8, 1, 1))[0]]
    return encode(f"Q{chain.question}{context}>"), [*encode(chain.worked()), EOS]


def batches(base: Base) -> Iterator[tuple[torch.Tensor, torch.Tensor]]:
    """Token ids and targets of every step, both of shape [rows, longest]; -100 where there is no target."""
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
    """A model of about 145,000 parameters, trained with plain torch."""
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
        # Padding stands on the right, where causal attention never looks: no mask is needed.
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
    grader: MathGrader = GRADER,
) -> float:
    """Share of questions that greedy decoding answers rightly, as the student or with a column as context."""
    engine, sampling = engine or TransformersEngine(), Sampling(max_new_tokens=MAX_NEW_TOKENS, temperature=0)
    rollouts = engine.generate(model, prompts(examples, context), sampling, seed=0)
    texts = make_tokenizer().batch_decode(rollouts.completions, skip_special_tokens=True)
    return sum(grader.grade(text, e.answer) for text, e in zip(texts, examples, strict=True)) / len(examples)


@cache
def questions(split: Split, size: int) -> list[Example]:
    """The questions that accuracy is measured on: the same in every run."""
    return ChainProblems(split, size).examples()


@cache
def easier(operations: int, size: int) -> list[Example]:
    """Questions of fewer operations, outside the pretraining. Training has none of them: all of its split are here too."""
    found = [e for split in ("test", "validation", "train") for e in ChainProblems(split, size, operations).examples()]
    return found[:size]


def load(folder: Path) -> Any:
    """The base with an adapter that changes nothing."""
    return Policy(str(folder), LoRA(r=1), dtype="float32").build()


def measure(folder: Path, size: int = 500) -> dict[str, float]:
    """Greedy accuracy on held-out questions, both roles, and on easier ones."""
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
    """The folder of a base model, which is made where it does not exist."""
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
    options.add_argument("--count", type=int, default=3, help="base models, with seeds from 0")
    options.add_argument("--first", type=int, default=0, help="seed of the first")
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
