"""Difference of log-probabilities between a 4-bit trainer and a sampler with other weights, such as a vLLM server.

    python benchmarks/quantized_sampler.py

Samples completions from the sampler's weights, and scores them with these weights and with the trainer's. Reports the mean
absolute difference in nats a token, which ``logprob_tolerance`` limits in every step. All computation is in float32.
"""

from __future__ import annotations

import tempfile

import torch
from common import machine, model_folder, parser, report
from peft import PeftModel
from torch import Tensor
from transformers import BitsAndBytesConfig

from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.losses.objectives import token_logprobs
from opsd_lightning.models.dequantized import write_dequantized
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.models.scoring import score
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import Example, Sampling

#: Prompts besides the word problems, which ask for longer and freer text.
QUESTIONS = [
    "Explain why the sky is blue.",
    "Write a short story about a lighthouse keeper.",
    "What is the difference between a list and a tuple in Python?",
    "Give three tips for learning a language.",
    "Summarize the causes of the French Revolution.",
    "How does a refrigerator work?",
    "Solve for x: 3x + 7 = 22. Show every step.",
    "Write an email that declines a meeting politely.",
]


def logprobs(model: PeftModel, prompts: list[list[int]], completions: list[list[int]]) -> Tensor:
    """Return the log-probability of every completion token. Shape [T]."""
    with torch.no_grad():
        states, targets = score(model, prompts, completions)
        return token_logprobs(states, targets).double()


@torch.no_grad()
def rounded(model: PeftModel) -> PeftModel:
    """Round all weights to bfloat16, in place, and keep their data type."""
    for parameter in model.parameters():
        parameter.copy_(parameter.bfloat16())
    return model


def main() -> None:
    options = parser(__doc__)
    options.add_argument("--model", default=None)
    options.add_argument("--steps", type=int, default=4, help="steps of 16 completions of each kind of prompt")
    options.add_argument("--tokens", type=int, default=64, help="longest completion")
    args = options.parse_args()
    facts = machine(args.device)
    four_bits = BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
    )
    settings = {"model": model_folder(args.model), "lora": LoRA(r=1, alpha=1, dropout=0.0), "dtype": "float32"}
    policy = Policy(**settings)
    device = torch.device(args.device)
    trainer_16 = policy.build().to(device).eval()
    sampler_16 = rounded(policy.build()).to(device).eval()
    trainer_4 = Policy(**settings, quantization=four_bits).build(device).eval()
    with tempfile.TemporaryDirectory() as folder:
        write_dequantized(trainer_4, folder, torch.bfloat16)
        policy.load_tokenizer().save_pretrained(folder)
        sampler_4 = Policy(**settings | {"model": folder}).build().to(device).eval()
    pairs = {
        "float32, rounded to bfloat16": (trainer_16, sampler_16),
        "NF4, 16-bit checkpoint": (trainer_4, sampler_16),
        "NF4, NF4 dequantized to bfloat16": (trainer_4, sampler_4),
    }
    tokenizer = policy.load_tokenizer()
    free = [list(Prompts().student(tokenizer, Example(question, "", ""))) for question in QUESTIONS]
    data = OPSDDataModule(policy, train=WordProblems(size=16 * args.steps), batch_size=16, max_new_tokens=args.tokens)
    data.setup("fit")
    kinds = {"word problems": data.rows["train"].student, "open questions": free * (2 * args.steps)}
    found = []
    for kind, prompts in kinds.items():
        batches = [prompts[16 * step : 16 * (step + 1)] for step in range(args.steps)]
        sampling = Sampling(max_new_tokens=args.tokens, temperature=1.0)
        sampled = {
            sampler: [
                TransformersEngine().generate(sampler, batch, sampling, n).completions for n, batch in enumerate(batches)
            ]
            for sampler in (sampler_16, sampler_4)
        }
        for name, (trainer, sampler) in pairs.items():
            steps = [
                logprobs(trainer, batch, completions) - logprobs(sampler, batch, completions)
                for batch, completions in zip(batches, sampled[sampler], strict=True)
            ]
            tokens, means = torch.cat(steps), [float(step.abs().mean()) for step in steps]
            found.append(
                {
                    "prompts": kind,
                    "trainer, sampler": name,
                    "mean, nats": float(tokens.abs().mean()),
                    "largest step, nats": max(means),
                    "99 % of tokens below": float(tokens.abs().quantile(0.99)),
                    "KL(sampler || trainer)": -float(tokens.mean()),
                    "tokens": len(tokens),
                }
            )
            print(found[-1], flush=True)
    report("quantized_sampler", facts, {"log-probabilities of trainer and sampler": found}, args.json)


if __name__ == "__main__":
    main()
