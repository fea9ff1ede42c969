"""Tests of tensor parallelism on gloo processes, against one process."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.strategies import Strategy
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from transformers import BitsAndBytesConfig, LlamaConfig, LlamaForCausalLM

from helpers.distributed import (
    NF4,
    ByReference,
    EndsOften,
    Scripted,
    Seen,
    assert_same,
    check_resumption,
    ddp,
    fsdp2,
    fsdp2_sharded,
    joined,
    parts,
    run,
    trainer,
)
from helpers.models import make_model, make_tokenizer
from helpers.processes import on_ranks
from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.rollouts import RolloutWriter
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.distributed.fsdp2 import FSDP2Strategy
from opsd_lightning.distributed.tensor_parallel import plan_of
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.rollouts.continuous_batching import ContinuousBatchingEngine
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher, FixedTeacher, Teacher
from opsd_lightning.types import Sampling, UserError

pytestmark = pytest.mark.integration


def tp2(**settings: Any) -> Strategy:
    return fsdp2(tensor_parallel_size=2, **settings)


@pytest.mark.parametrize(
    "teacher",
    [pytest.param(FixedTeacher, id="fixed"), pytest.param(lambda: EMATeacher(0.8), id="ema", marks=pytest.mark.slow)],
)
@pytest.mark.parametrize(
    ("world", "architecture"),
    [
        (2, "llama"),
        pytest.param(2, "qwen3", marks=pytest.mark.slow),
        pytest.param(4, "llama", marks=pytest.mark.slow),
    ],
)
def test_split_layers_equal_whole_ones(
    world: int, architecture: str, teacher: Callable[[], Teacher], make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    """Losses, gradients, weights and metrics of three steps, with micro-batches, clipping and ragged completions."""
    policy = make_policy(architecture)
    settings = {"teacher": teacher(), "rollouts": Scripted([3, 8, 1, 5, 0])}
    one = joined(policy, tmp_path, **settings)
    for rank in on_ranks(lambda rank: run(policy, tmp_path, world, tp2, **settings), tmp_path, world):
        assert_same(rank, one)
        for ours, theirs in zip(rank.logged, one.logged, strict=True):
            for name in theirs:
                assert ours[name] == pytest.approx(theirs[name], rel=2e-3, abs=1e-6), name


def biased(folder: Path) -> str:
    """A Llama whose linear layers all have biases."""
    model = make_model("llama")
    config = LlamaConfig(**model.config.to_dict() | {"attention_bias": True, "mlp_bias": True})
    torch.manual_seed(0)
    other = LlamaForCausalLM(config)
    other.load_state_dict(model.state_dict(), strict=False)
    with torch.no_grad():
        for name, parameter in other.named_parameters():
            if name.endswith("bias"):
                parameter.normal_(std=0.3)
    other.generation_config = model.generation_config
    other.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.mark.slow
@pytest.mark.parametrize(
    "lora",
    [
        LoRA(r=4, alpha=8, dropout=0.0, target_modules=["q_proj", "down_proj", "lm_head"], options={"lora_bias": True}),
        LoRA(r=3, alpha=8, dropout=0.2),
    ],
    ids=["some layers, biases", "dropout"],
)
def test_adapters_on_some_layers_biases_and_dropout(lora: LoRA, tmp_path: Path) -> None:
    """Dropout drops what one process drops; the adapter's rank need not divide; foreach is AdamW's choice on a GPU."""
    policy = Policy(biased(tmp_path / "model"), dtype="float32", lora=lora, gradient_checkpointing=lora.dropout > 0)
    settings: dict[str, Any] = {"rollouts": Scripted([3, 8, 1, 5])}
    one = joined(policy, tmp_path, **settings)
    settings["optimizer"] = lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True)
    assert_same(on_ranks(lambda rank: run(policy, tmp_path, 2, tp2, **settings), tmp_path)[1], one)


@pytest.mark.slow
@pytest.mark.parametrize(
    "engine",
    [TransformersEngine(), TransformersEngine(gather_weights=False, max_rows=5), TransformersEngine(static_cache=True)],
    ids=["gathered", "layer by layer", "static cache"],
)
def test_greedy_rollouts_do_not_depend_on_splitting(
    engine: TransformersEngine, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy("qwen3", lora=LoRA(r=4, alpha=8, dropout=0.0, options={"init_lora_weights": False}))
    settings: dict[str, Any] = {"sampling": Sampling(max_new_tokens=24, temperature=0, n=2), "steps": 2}
    settings["callbacks"] = [EndsOften()]
    one = joined(policy, tmp_path, **settings)
    assert len({len(row) for row in one.completions[0]}) > 1
    for rank in on_ranks(lambda rank: run(policy, tmp_path, 2, tp2, rollouts=engine, **settings), tmp_path):
        assert_same(rank, one)
        assert rank.completions == one.completions


@pytest.mark.slow
def test_ranks_that_split_layers_see_and_sample_the_same(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Sampled at temperature 1, on two data-parallel places of two ranks each; trainable parameters are on one mesh."""
    policy = make_policy()

    def work(rank: int) -> tuple[Seen, list[tuple[Any, ...]], set[bool]]:
        meshes = []

        class Watch(Callback):
            def on_train_end(self, trainer: Trainer, pl_module: Any) -> None:
                for name, p in pl_module.named_parameters():
                    assert isinstance(p, DTensor)
                    if p.requires_grad:
                        meshes.append(p.device_mesh.mesh_dim_names)
                    elif "proj" in name:
                        halves.add(p.to_local().numel() * 4 == p.numel())

        halves: set[bool] = set()
        sampling = Sampling(max_new_tokens=16, n=2)
        return run(policy, tmp_path, 4, tp2, callbacks=[Watch()], sampling=sampling), meshes, halves

    found = on_ranks(work, tmp_path, 4)
    (first, meshes, halves), (second, _, _), (third, _, _), (fourth, _, _) = found
    assert set(meshes) == {("data_parallel", "tensor_parallel")}
    assert halves == {True}
    assert first.completions == second.completions != third.completions == fourth.completions
    assert first.losses == second.losses == third.losses == fourth.losses
    for ours, theirs in zip(first.weights, second.weights, strict=True):
        assert all(torch.equal(weight, theirs[name]) for name, weight in ours.items())


def tp2_sharded(**settings: Any) -> Strategy:
    return tp2(save_distributed_checkpoint=True, **settings)


SAVED = {"one file": tp2, "sharded": tp2_sharded}
RESUMED = {  # where a checkpoint of each goes on: processes, strategy
    "one file": [(1, None), (2, ddp), (2, fsdp2), (2, tp2)],
    "sharded": [(2, tp2_sharded), (2, fsdp2_sharded), (4, tp2)],
}


@pytest.mark.slow
@pytest.mark.parametrize("saved", SAVED)
def test_checkpoints_of_four_processes_resume_split_and_whole(
    saved: str, make_policy: Callable[..., Policy], tmp_path: Path
) -> None:
    policy = make_policy(lora=LoRA(r=3, alpha=8, dropout=0.0))  # a rank that no number of processes divides
    settings: dict[str, Any] = {"teacher": EMATeacher(0.8), "rollouts": Scripted([3, 8, 1, 5])}
    check_resumption(policy, tmp_path, (4, SAVED[saved]), saved == "sharded", RESUMED[saved], **settings)


def test_a_checkpoint_of_one_process_resumes_split(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy()
    engine = Scripted([3, 8, 1, 5])
    whole_run = joined(policy, tmp_path, steps=4, rollouts=engine)
    keep = ModelCheckpoint(tmp_path / "saved", filename="one", every_n_train_steps=2)
    run(policy, tmp_path, 1, None, steps=2, callbacks=[keep], rollouts=engine)
    path = str(tmp_path / "saved" / "one.ckpt")
    again = on_ranks(lambda rank: run(policy, tmp_path, 2, tp2, steps=4, checkpoint=path, rollouts=engine), tmp_path)
    assert_same(again[0], Seen(*(list(v)[2:] for v in vars(whole_run).values())))


@pytest.mark.slow
def test_validation_counts_every_question_once(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Accuracy with its standard error, lengths, and the files of test and predict."""
    policy = make_policy(lora=LoRA(r=4, alpha=8, dropout=0.0, options={"init_lora_weights": False}))

    def work(world: int, folder: str, chosen: Any) -> dict[str, float]:
        greedy = Sampling(max_new_tokens=12, temperature=0)
        module, data = parts(policy, 2, eval_sampling=greedy, evaluate_teacher=True, teacher=EMATeacher())
        data.sources["val"] = data.sources["test"] = WordProblems(size=5, seed=2)
        module.evaluator.grader = ByReference()
        strategy = {"strategy": chosen()} if chosen else {}
        run = trainer(tmp_path, RolloutWriter(folder), devices=world, limit_val_batches=1.0, **strategy)
        (found,) = run.validate(module, data, verbose=False)
        run.predict(module, data)
        return found

    def written(folder: str) -> list[str]:
        files = (tmp_path / folder).glob("predict*.jsonl")
        return sorted(json.loads(line)["completion"] for file in files for line in file.read_text().splitlines())

    one = work(1, "one", None)
    assert 0 < one["val/avg@1"] < 1 and one["val/avg@1_se"] > 0
    for found in on_ranks(lambda rank: work(4, "four", tp2), tmp_path, 4):
        assert found == pytest.approx(one, abs=1e-6)
    assert len(written("one")) == 5 and written("four") == written("one")


@pytest.mark.slow
def test_the_adapter_is_exported(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy = make_policy("qwen3")
    settings: dict[str, Any] = {"rollouts": Scripted([3, 8, 1, 5]), "callbacks": [AdapterExport(merged_folder="merged")]}
    joined(policy, tmp_path / "one", **settings)
    on_ranks(lambda rank: run(policy, tmp_path / "two", 2, tp2, **settings), tmp_path)
    for folder, file in (("adapter", "adapter_model.safetensors"), ("merged", "model.safetensors")):
        ours, theirs = (load_file(tmp_path / run / folder / file) for run in ("two", "one"))
        assert ours.keys() == theirs.keys() and ours
        for name, weight in ours.items():
            torch.testing.assert_close(weight, theirs[name], rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize(
    ("architecture", "size", "settings", "message"),
    [
        ("gpt2", 2, {}, "no plan"),
        ("llama", 3, {}, "4 num_attention_heads"),
        ("llama", 4, {}, "2 num_key_value_heads"),
        ("llama", 2, {"quantization": BitsAndBytesConfig(**NF4)}, "quantization"),
        ("llama", 2, {"lora": LoRA(dropout=0.0, options={"use_dora": True})}, "plain LoRA"),
        ("llama", 2, {"lora": LoRA(dropout=0.0, target_modules=["q_proj", "embed_tokens"])}, "plain LoRA"),
        ("llama", 2, {"lora": LoRA(dropout=0.0, options={"modules_to_save": ["lm_head"]})}, "plain LoRA"),
    ],
)
def test_models_and_adapters_that_cannot_be_split_are_refused(
    architecture: str, size: int, settings: dict[str, Any], message: str, make_policy: Callable[..., Policy]
) -> None:
    with pytest.raises(UserError, match=f"trainer.strategy.tensor_parallel_size.*{message}"):
        plan_of(make_policy(architecture, **settings).build(), size)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"base_model_tp_plan": {"layers.*.self_attn.q_proj": "colwise_gather_output"}}, "colwise_gather_output"),
        ({"base_model_tp_plan": {"layers.*.input_layernorm.weight": "local_params"}}, "local_params"),
        ({"base_model_tp_plan": {"layers.*.mlp": "moe_tp_experts"}}, "moe_tp_experts"),
        ({"attention_dropout": 0.1}, "attention dropout"),
    ],
)
def test_plans_that_are_not_known_are_refused(
    change: dict[str, Any], message: str, make_policy: Callable[..., Policy]
) -> None:
    model = make_policy().build()
    for name, value in change.items():
        setattr(model.get_base_model().config, name, value)
    with pytest.raises(UserError, match=f"trainer.strategy.tensor_parallel_size.*{message}"):
        plan_of(model, 2)


def test_settings_that_do_not_go_together_are_refused(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    with pytest.raises(UserError, match="cpu_offload"):
        FSDP2Strategy(tensor_parallel_size=2, cpu_offload=True)
    strategy = FSDP2Strategy(tensor_parallel_size=2)
    strategy.parallel_devices = [torch.device("cpu")] * 3
    with pytest.raises(UserError, match=r"(?s)tensor_parallel_size.*\b2\b.*\b3\b"):
        strategy.setup_environment()

    def work(rank: int) -> None:
        with pytest.raises(UserError, match=r"(?s)tensor_parallel_size.*ContinuousBatchingEngine"):
            run(make_policy(), tmp_path, 2, tp2, rollouts=ContinuousBatchingEngine())

    on_ranks(work, tmp_path)
