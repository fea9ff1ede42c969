"""Runs on the imitated device: every teacher, method, part of an objective and engine, in every precision."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from lightning.pytorch import Trainer
from torch import Tensor
from transformers import BitsAndBytesConfig, Qwen3Config, Qwen3ForCausalLM, Qwen3Model

from helpers.covering import Case
from helpers.device_phases import StepCounts, step_phases
from helpers.models import make_tokenizer
from helpers.strict_device import Card, StrictDevice, strict_device
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.losses.clips import Clip, NoClip, PointwiseClip, RescaleClip, TokenClip
from opsd_lightning.losses.divergences import Divergence, ForwardKL, GeneralizedJSD, ReverseKL
from opsd_lightning.losses.objectives import (
    DivergenceObjective,
    NegativeLogLikelihood,
    Objective,
    SampledKLObjective,
    SampledTokenObjective,
)
from opsd_lightning.losses.position_weights import DecayingPositions, FirstPositions, PositionWeight
from opsd_lightning.losses.supports import FullVocabulary, Support, TopKRenormalized, TopKWithTail
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.base import PolicyModule
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.mixed import MixedOPSDModule
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import (
    EMATeacher,
    FixedTeacher,
    LiveTeacher,
    ModelTeacher,
    SyncTeacher,
    Teacher,
    TrustRegionTeacher,
)
from opsd_lightning.types import Sampling

#: Entries of the vocabulary. The tokenizer has fewer, as in many models.
VOCABULARY = 4096
NEW_TOKENS = 12
#: Rows of float32 logits above which a tensor counts as one of [tokens, vocabulary]. A step has more tokens than that. With
#: one MiB for logits, a chunk has at most 21 rows, or twice as many in bfloat16.
MOST_ROWS = 24
#: Synchronizations that a rollout may need for a decoded token, and for each pass over prompts.
A_TOKEN, A_PROMPT = 2, 16
#: Synchronizations that a micro-batch may need.
A_MICRO_BATCH = 3
#: Phases of a training step, in which no random number may come from the CPU.
IN_STEP = ("rollout", "comparison with the sampler", "teacher", "micro-batches", "optimizer", "metrics", "step, rest")


METHODS: dict[str, type[PolicyModule]] = {
    "opsd": OPSDModule, "mixed": MixedOPSDModule, "grpo": GRPOModule, "sft": SFTModule,
}  # fmt: skip
TEACHERS: dict[str, Callable[[str], Teacher]] = {
    "fixed": lambda folder: FixedTeacher(),
    "live": lambda folder: LiveTeacher(),
    "ema": lambda folder: EMATeacher(0.8),
    "sync": lambda folder: SyncTeacher(1),
    "trust region": lambda folder: TrustRegionTeacher(),
    "other model": lambda folder: ModelTeacher(folder),
    "copy": lambda folder: ModelTeacher(privileged=True),
}
DIVERGENCES: dict[str, Divergence] = {"forward": ForwardKL(), "reverse": ReverseKL(), "jsd": GeneralizedJSD(0.5)}
#: Objectives that compare both roles at the sampled token alone.
SAMPLED: dict[str, type[Objective]] = {"sampled token": SampledTokenObjective, "sampled kl": SampledKLObjective}
SUPPORTS: dict[str, Support] = {
    "full": FullVocabulary(), "top k": TopKRenormalized(5), "top k and tail": TopKWithTail(5),
}  # fmt: skip
CLIPS: dict[str, Clip] = {
    "none": NoClip(), "pointwise": PointwiseClip(0.05), "token": TokenClip(0.1), "rescale": RescaleClip(0.1),
}  # fmt: skip
POSITIONS: dict[str, PositionWeight | None] = {
    "equal": None, "decaying": DecayingPositions(8.0), "first": FirstPositions(4, 0.5),
}  # fmt: skip
ENGINES: dict[str, Callable[[], RolloutEngine]] = {
    "default": TransformersEngine,
    "two rows": lambda: TransformersEngine(max_rows=2),
    "not merged": lambda: TransformersEngine(merge_adapter=False),
    "no copy": lambda: TransformersEngine(rollout_copy=False),
    "static cache": lambda: TransformersEngine(static_cache=True),
    "importance weights": lambda: TransformersEngine(logprob_tolerance=0.5, max_importance_ratio=2.0),
}
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
WEIGHTS: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "nf4": {"dtype": "bfloat16", "quantization": NF4},
    "all trained": {"dtype": "float32", "lora": None},
}
PRECISIONS = ("32-true", "bf16-mixed")

#: Parts of the run.
RUN_FACTORS: dict[str, tuple[str, ...]] = {
    "method": tuple(METHODS),
    "teacher": tuple(TEACHERS),
    "engine": tuple(ENGINES),
    "weights": tuple(WEIGHTS),
    "precision": PRECISIONS,
    "checkpointing": ("no", "yes"),
}
#: Parts of the objective.
LOSS_FACTORS: dict[str, tuple[str, ...]] = {
    "divergence": (*DIVERGENCES, *SAMPLED),
    "support": tuple(SUPPORTS),
    "clip": tuple(CLIPS),
    "positions": tuple(POSITIONS),
}
#: Settings that change the course of a step.
STEP_FACTORS: dict[str, tuple[str, ...]] = {"updates": ("1", "2"), "anchor": ("no", "yes")}
FACTORS = RUN_FACTORS | LOSS_FACTORS | STEP_FACTORS
DEFAULT: Case = {name: values[0] for name, values in FACTORS.items()}


def valid(case: Case) -> bool:
    """Return True if a case can run. All other combinations are refused before training or would repeat another case."""
    case = DEFAULT | case
    trains_all = case["weights"] == "all trained"
    if trains_all and case["teacher"] in ("ema", "sync"):
        return False  # follow an adapter
    if case["teacher"] == "copy" and not trains_all:
        return False
    if case["divergence"] in SAMPLED and (case["support"] != "full" or case["clip"] != "none"):
        return False  # the sampled token alone
    if case["method"] in ("grpo", "sft"):  # without a teacher's objective
        parts = ("teacher", "divergence", "support", "clip")
        return all(case[name] == DEFAULT[name] for name in parts) and not (
            case["method"] == "sft" and case["anchor"] == "yes"
        )
    return True


def save_model(folder: Path) -> str:
    """Save a model of one layer whose vocabulary is much larger than its chunks of logits."""
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = Qwen3Config(
        vocab_size=VOCABULARY, hidden_size=64, intermediate_size=64, num_hidden_layers=1, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, max_position_embeddings=2048, tie_word_embeddings=True,
        eos_token_id=tokenizer.eos_token_id, bos_token_id=None,
    )  # fmt: skip
    model = Qwen3ForCausalLM(config)
    with torch.no_grad():  # predictions that depend on the prompt, so that student and teacher differ
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 * (32 / parameter.shape[-1]) ** 0.5)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def objective_of(case: Case, **settings: Any) -> Objective:
    """Return the objective of a case for methods with a teacher."""
    settings = {"logits_memory_mib": 1, "temperature": 1.1, "position_weight": POSITIONS[case["positions"]]} | settings
    if case["divergence"] in SAMPLED:
        return SAMPLED[case["divergence"]](**settings)
    parts = DIVERGENCES[case["divergence"]], SUPPORTS[case["support"]], CLIPS[case["clip"]]
    return DivergenceObjective(*parts, **settings)


def parts_of(
    case: Case, folder: str, policy: Mapping[str, Any] | None = None, **settings: Any
) -> tuple[PolicyModule, OPSDDataModule]:
    """Return the module and the data of a case.

    Args:
        case: Settings by factor. Factors that are left out have their first value.
        folder: Folder of the model.
        policy: Further settings of the policy.
        **settings: Further settings of the module.
    """
    case = DEFAULT | case
    torch.manual_seed(0)
    chosen = {"lora": LoRA(r=4, alpha=8, dropout=0.1), "gradient_checkpointing": case["checkpointing"] == "yes"}
    recipe = Policy(folder, **chosen | WEIGHTS[case["weights"]] | dict(policy or {}))
    common: dict[str, Any] = {
        "rollouts": ENGINES[case["engine"]](),
        "sampling": Sampling(NEW_TOKENS, 1.0, 0.95, 20, n=2),
        "eval_sampling": Sampling(2, temperature=0.0),
        "optimizer": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
        "max_grad_norm": 1.0,
        "token_budget": 128,
        "updates_per_batch": int(case["updates"]),
    }
    positions = POSITIONS[case["positions"]]
    anchor = Anchor(0.1, DivergenceObjective(ReverseKL(), logits_memory_mib=1)) if case["anchor"] == "yes" else None
    if case["method"] in ("opsd", "mixed"):
        common |= {"teacher": TEACHERS[case["teacher"]](folder), "objective": objective_of(case), "anchor": anchor}
    elif case["method"] == "grpo":
        likelihood = NegativeLogLikelihood(logits_memory_mib=1, position_weight=positions)
        common |= {"likelihood": likelihood, "anchor": anchor}
    else:
        common |= {"likelihood": NegativeLogLikelihood(logits_memory_mib=1, position_weight=positions)}
    data = OPSDDataModule(
        recipe, train=WordProblems(size=8, seed=1), val=WordProblems(size=2, seed=2), test=WordProblems(size=2, seed=3),
        prompts=Prompts("{question}", "{question} {context}"), batch_size=2, eval_batch_size=2, max_new_tokens=NEW_TOKENS,
    )  # fmt: skip
    return METHODS[case["method"]](recipe, **common | settings), data


def trainer_of(folder: Path, *callbacks: Any, **settings: Any) -> Trainer:
    """Return a trainer for one step on the device, with a validation after it."""
    defaults = {"max_steps": 1, "logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    settings = defaults | settings
    settings |= {"val_check_interval": 1, "check_val_every_n_epoch": None} if settings.get("limit_val_batches") != 0 else {}
    return Trainer(
        accelerator="gpu", devices=1, callbacks=list(callbacks), default_root_dir=folder,
        enable_model_summary=False, num_sanity_val_steps=0, log_every_n_steps=1, **settings,
    )  # fmt: skip


def is_logits_of_all_tokens(tensor: Tensor) -> bool:
    """Return True for a tensor of shape [tokens, vocabulary] with more rows than a chunk."""
    return tensor.dim() > 0 and tensor.shape[-1] == VOCABULARY and tensor.nbytes > 4 * MOST_ROWS * VOCABULARY


@contextlib.contextmanager
def watched_device(card: Card | None = None) -> Iterator[StrictDevice]:
    """Imitate a device that counts tensors of shape [tokens, vocabulary]."""
    with strict_device(card, large=is_logits_of_all_tokens) as device:
        yield device


@contextlib.contextmanager
def checked_steps(device: StrictDevice, module: PolicyModule) -> Iterator[None]:
    """Check the work of all training steps inside the context.

    Raises:
        AssertionError: A step makes a tensor of shape [tokens, vocabulary], synchronizes too often, draws random numbers on
            the CPU, or computes on the CPU.
    """
    forward, passes = Qwen3Model.forward, {"prompts": 0, "tokens": 0}

    def counted(model: Any, *args: Any, **kwargs: Any) -> Any:
        output = forward(model, *args, **kwargs)
        if device.where == "rollout":
            passes["tokens" if output.last_hidden_state.shape[1] == 1 else "prompts"] += 1
        return output

    with step_phases(device, module) as steps, mock.patch.object(Qwen3Model, "forward", counted):
        yield
    check_counts(device, steps, **passes)


def check_counts(device: StrictDevice, steps: StepCounts, prompts: int, tokens: int) -> None:
    """Check the counts of some training steps, as in `checked_steps`.

    Args:
        device: The device.
        steps: Number of steps and micro-batches.
        prompts: Passes of the rollouts over prompts.
        tokens: Passes of the rollouts over one token of each row.
    """
    assert steps.steps and steps.micro_batches, "no training step was counted"
    assert not device.mixes
    for phase in IN_STEP:
        counts = device.counts[phase]
        assert not counts.large, f"{phase}: tensors of all tokens and the vocabulary: {counts.large}"
        assert not device.cpu_random[phase], f"{phase}: random numbers of the CPU: {device.cpu_random[phase]}"
    rollouts, passes = device.counts["rollout"], device.counts["micro-batches"]
    assert not passes.on_cpu, f"work on the CPU: {passes.on_cpu}"
    found = passes.synchronizations
    assert found.total() <= A_MICRO_BATCH * steps.micro_batches, f"{steps.micro_batches} micro-batches: {found}"
    found = rollouts.synchronizations
    assert found.total() <= A_TOKEN * tokens + A_PROMPT * prompts, f"{tokens} tokens after {prompts} prompts: {found}"
