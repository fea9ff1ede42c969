"""Optimizer step against TRL's SDFTTrainer, with the same model, prompts, lengths, LoRA, precision, loss and teacher.

    pip install trl==1.16.0
    python benchmarks/step.py                                          equal lengths: 16 completions of 128 tokens
    python benchmarks/step.py --lengths ragged                         log-uniform from 16 to 128
    python benchmarks/step.py --batch 8 --completion 256 --steps 1     peak memory at long completions

Each side runs in its own process, and their steps alternate. Each trains SmolLM2-135M-Instruct (`make quickstart` downloads
it to runs/models) with its own trainer: rollouts, the teacher's pass without the adapter, the student's pass, forward KL
over the full vocabulary averaged by sequence, and AdamW. Both decode greedily, so that the first losses are comparable. Both
train without gradient checkpointing.
"""

from __future__ import annotations

import argparse
import multiprocessing
import statistics
import tempfile
import time
import warnings
from multiprocessing.connection import Connection
from typing import Any

import torch
from common import EndAt, PeakMemory, log_uniform, machine, model_folder, parser, report, wait
from transformers import AutoConfig, AutoModelForCausalLM


class Turn:
    """Waits for its turn before each step, and reports after the step."""

    def __init__(self, pipe: Connection, device: str) -> None:
        self.pipe, self.device = pipe, device
        self.phases: dict[str, float] = {}

    def start(self) -> None:
        self.pipe.recv()
        self.phases = {}
        self.memory = PeakMemory(self.device)
        self.memory.__enter__()
        wait(self.device)
        self.began = time.perf_counter()

    def end(self, loss: float) -> None:
        wait(self.device)
        seconds = time.perf_counter() - self.began
        self.memory.__exit__()
        self.pipe.send({"seconds": seconds, "peak_bytes": self.memory.peak_bytes, "loss": loss, **self.phases})

    def timed(self, name: str, function: Any) -> Any:
        def call(*args: Any, **kwargs: Any) -> Any:
            wait(self.device)
            start = time.perf_counter()
            result = function(*args, **kwargs)
            wait(self.device)
            self.phases[name] = self.phases.get(name, 0.0) + time.perf_counter() - start
            return result

        return call


def plan(args: argparse.Namespace, vocabulary: int) -> tuple[list[list[int]], list[list[int]], list[int]]:
    """Return the prompts of student and teacher and the lengths of the completions."""
    generator = torch.Generator().manual_seed(0)
    student = torch.randint(10, vocabulary, (args.batch, args.prompt), generator=generator).tolist()
    teacher = torch.randint(10, vocabulary, (args.batch, args.teacher_prompt), generator=generator).tolist()
    ragged = args.lengths == "ragged"
    lengths = log_uniform(args.batch, args.shortest, args.completion) if ragged else [args.completion] * args.batch
    return student, teacher, lengths


def end_at(base: Any, prompts: list[list[int]], lengths: list[int], eos: list[int], pad: int) -> None:
    EndAt({tuple(p): n for p, n in zip(prompts, lengths, strict=True)}, eos, [0, pad]).install(base)


def ours(pipe: Connection, args: argparse.Namespace) -> None:
    import lightning

    from opsd_lightning.losses.objectives import DivergenceObjective
    from opsd_lightning.methods.opsd import OPSDModule
    from opsd_lightning.models.policy import LoRA, Policy, base_of
    from opsd_lightning.types import Example, PromptBatch, Sampling

    turn = Turn(pipe, args.device)
    policy = Policy(model_folder(args.model), lora=LoRA(r=16, alpha=32, dropout=0.0), dtype=args.dtype)
    vocabulary = policy.load_config().get_text_config().vocab_size
    student, teacher, lengths = plan(args, vocabulary)
    example = Example("", "", "")
    batch = PromptBatch(student, teacher, [example] * args.batch, [True] * args.batch)

    class InTurn(lightning.Callback):
        def on_train_start(self, trainer: Any, module: Any) -> None:
            base = base_of(module.model)
            eos = list(base.generation_config.eos_token_id)
            end_at(base, student, lengths, eos, base.generation_config.pad_token_id)
            module.rollouts.generate = turn.timed("rollouts", module.rollouts.generate)
            module.teacher.score = turn.timed("teacher", module.teacher.score)
            pipe.send("ready")

        def on_train_batch_start(self, trainer: Any, module: Any, batch: Any, batch_idx: int) -> None:
            turn.start()

        def on_train_batch_end(self, trainer: Any, module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
            turn.end(float(outputs["loss"]))

    module = OPSDModule(
        policy,
        objective=DivergenceObjective(reduction="sequence_mean"),
        sampling=Sampling(max_new_tokens=args.completion, top_k=1),
        optimizer=lambda p: torch.optim.AdamW(p, lr=1e-5, weight_decay=0.0),
        max_grad_norm=1.0,
        token_budget=args.token_budget,
    )
    trainer = lightning.Trainer(
        accelerator="gpu" if args.device.startswith("cuda") else "cpu",
        devices=1,
        max_steps=args.steps + 1,
        precision="32-true" if args.dtype == "float32" else "bf16-mixed",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        callbacks=[InTurn()],
    )
    loader = torch.utils.data.DataLoader([batch] * (args.steps + 1), batch_size=None)  # type: ignore[arg-type]
    trainer.fit(module, loader)


def theirs(pipe: Connection, args: argparse.Namespace) -> None:
    from datasets import Dataset
    from peft import LoraConfig
    from transformers import AutoTokenizer, TrainerCallback
    from trl.experimental.sdft import SDFTConfig, SDFTTrainer

    turn = Turn(pipe, args.device)
    folder = model_folder(args.model)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=args.dtype)
    student, teacher, lengths = plan(args, model.config.vocab_size)
    ids = {f"{i}": row for i, row in enumerate(student)} | {f"{i}|": row for i, row in enumerate(teacher)}

    class InTurn(TrainerCallback):  # type: ignore[misc]
        def on_step_begin(self, *args: Any, **kwargs: Any) -> None:
            turn.start()

        def on_step_end(self, *args: Any, **kwargs: Any) -> None:
            turn.end(self.loss)

        loss = 0.0

    callback = InTurn()
    with tempfile.TemporaryDirectory() as folder_out:
        config = SDFTConfig(
            output_dir=folder_out,
            use_cpu=not args.device.startswith("cuda"),
            per_device_train_batch_size=args.batch,
            gradient_accumulation_steps=1,
            max_steps=args.steps + 1,
            num_generations=1,
            max_prompt_length=None,
            max_completion_length=args.completion,
            temperature=1.0,
            top_k=1,
            teacher_model_kind="base",
            teacher_prompt_template="{prompt}|{privileged_context}",
            distillation_mode="full_logits",
            distillation_alpha=0.0,
            distillation_topk=None,
            distillation_is_clip=None,
            shuffle_dataset=False,
            bf16=args.dtype == "bfloat16",
            gradient_checkpointing=False,
            learning_rate=1e-5,
            lr_scheduler_type="constant",
            max_grad_norm=1.0,
            report_to="none",
            save_strategy="no",
            logging_strategy="no",
            disable_tqdm=True,
        )
        trainer = SDFTTrainer(
            model=model,
            args=config,
            train_dataset=Dataset.from_list([{"prompt": f"{i}", "privileged_context": ""} for i in range(args.batch)]),
            processing_class=AutoTokenizer.from_pretrained(folder, padding_side="left"),
            peft_config=LoraConfig(r=16, lora_alpha=32, target_modules="all-linear", task_type="CAUSAL_LM"),
            callbacks=[callback],
        )
        trainer._tokenize_prompts = lambda prompts: [ids[prompt] for prompt in prompts]
        trainer._generate_transformers = turn.timed("rollouts", trainer._generate_transformers)
        forward = trainer._forward_logits

        def logits(*args: Any, **kwargs: Any) -> Any:
            return forward(*args, **kwargs) if torch.is_grad_enabled() else turn.timed("teacher", forward)(*args, **kwargs)

        trainer._forward_logits = logits
        original = trainer.compute_loss

        def compute_loss(*args: Any, **kwargs: Any) -> Any:
            loss = original(*args, **kwargs)
            callback.loss = float(loss.detach())
            return loss

        trainer.compute_loss = compute_loss
        end_at(model, student, lengths, list(trainer.eos_token_ids), trainer._tokenizer.pad_token_id)
        pipe.send("ready")
        trainer.train()


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--dtype", default="float32", choices=["float32", "bfloat16"])
    options.add_argument("--batch", type=int, default=16, help="questions per step, with one completion each")
    options.add_argument("--lengths", default="equal", choices=["equal", "ragged"])
    options.add_argument("--shortest", type=int, default=16, help="shortest of the ragged lengths")
    options.add_argument(
        "--completion", type=int, default=128, help="length of a completion, or of the longest one, in tokens"
    )
    options.add_argument("--prompt", type=int, default=64)
    options.add_argument("--teacher-prompt", type=int, default=128)
    options.add_argument("--token-budget", type=int, default=1024, help="our model.token_budget")
    options.add_argument("--steps", type=int, default=3, help="steps to time, after one warm-up step")
    args = options.parse_args()
    facts = machine(args.device, getattr(torch, args.dtype))
    context = multiprocessing.get_context("spawn")
    results: dict[str, list[dict[str, float]]] = {}
    pipes: dict[str, Connection] = {}
    workers = []
    for name, target in {"opsd_lightning": ours, "TRL SDFTTrainer": theirs}.items():
        pipes[name], other = context.Pipe()
        worker = context.Process(target=target, args=(other, args), daemon=True)
        worker.start()
        workers.append(worker)
        other.close()
        assert pipes[name].recv() == "ready"
        results[name] = []
    for _ in range(args.steps + 1):
        for name, pipe in pipes.items():
            pipe.send("go")
            results[name].append(pipe.recv())
    for worker in workers:
        worker.join(60)
    # Decoding reads all weights for each token of the longest completion. Scoring is 2 FLOP per weight and token forward and
    # 2 more backward (base weights get no gradient). The head is left out.
    with torch.device("meta"):
        frozen = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(model_folder(args.model)))
    body = sum(p.numel() for p in frozen.parameters()) - frozen.get_input_embeddings().weight.numel()
    weights = sum(p.numel() for p in frozen.parameters()) * getattr(torch, args.dtype).itemsize
    first = {name: rows[0]["loss"] for name, rows in results.items()}
    _, _, lengths = plan(args, 1000)
    flops = 4 * (sum(lengths) + args.batch * args.prompt) + 2 * (sum(lengths) + args.batch * args.teacher_prompt)
    rows = []
    for name, steps in results.items():
        median = {key: statistics.median(step.get(key, 0.0) for step in steps[1:]) for key in steps[-1]}
        rest = median["seconds"] - median["rollouts"] - median["teacher"]
        rows.append(
            {
                "trainer": name,
                "step s": median["seconds"],
                "rollouts s": median["rollouts"],
                "teacher s": median["teacher"],
                "student and update s": rest,
                "peak MiB": max(step["peak_bytes"] for step in steps) / 2**20,
                "rollouts of bandwidth": max(lengths) * weights / median["rollouts"] / facts["read_bytes_per_second"],
                "scoring of matmul peak": flops * body / (median["teacher"] + rest) / facts["matmul_flops"],
                "first loss": f"{first[name]:.5f}",
            }
        )
    a, b = rows
    ratio: dict[str, Any] = {"trainer": "ratio"}
    ratio |= {key: a[key] / b[key] for key in a if isinstance(a[key], float) and " of " not in key}
    title = f"one step: {args.batch} completions, {args.lengths} lengths up to {args.completion} ({sum(lengths)} tokens)"
    report("step", facts, {title: [*rows, ratio]}, args.json)


if __name__ == "__main__":
    warnings.filterwarnings("ignore")
    main()
