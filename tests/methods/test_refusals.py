"""Tests that conflicting parts and settings without effect are refused before training, with the setting's name."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import GPT2Config, GPT2LMHeadModel

from helpers.files import write_jsonl
from helpers.fixed_completions import BATCH, Fixed, sgd
from helpers.messages import mentions
from helpers.models import EOS, make_model, make_tokenizer
from helpers.steps import fit, one_step
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.drop_reasons import DropReason
from opsd_lightning.data.sources import FileSource
from opsd_lightning.losses.objectives import DivergenceObjective, NegativeLogLikelihood
from opsd_lightning.losses.supports import TopKWithTail
from opsd_lightning.methods.anchor import Anchor
from opsd_lightning.methods.grpo import GRPOModule
from opsd_lightning.methods.mixed import MixedOPSDModule
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.methods.sft import SFTModule
from opsd_lightning.models.policy import Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.teachers import EMATeacher, ModelTeacher, SyncTeacher, Teacher
from opsd_lightning.types import ConfigError, Sampling, UserError

MakePolicy = Callable[..., Policy]
SHORT = 64  # tokens of the shorter teacher's context


def saved(path: Path, model: Any, tokenizer: Any = None) -> str:
    model.save_pretrained(path)
    (tokenizer or make_tokenizer()).save_pretrained(path)
    return str(path)


def padded(path: Path) -> str:
    """A model with more logits than tokens."""
    model = make_model("llama")
    model.resize_token_embeddings(128)
    return saved(path, model)


def other_tokens(path: Path) -> str:
    model, tokenizer = make_model("llama"), make_tokenizer()
    tokenizer.add_tokens(["hello"])
    model.resize_token_embeddings(108)
    return saved(path, model, tokenizer)


def short(path: Path) -> str:
    torch.manual_seed(0)
    config = GPT2Config(
        vocab_size=107, n_embd=32, n_layer=1, n_head=2, n_positions=SHORT, bos_token_id=None, eos_token_id=EOS
    )
    return saved(path, GPT2LMHeadModel(config))


def with_teacher(method: str, policy: Policy, teacher: Teacher) -> OPSDModule | GRPOModule:
    settings: dict[str, Any] = {"rollouts": Fixed(), "optimizer": sgd, "sampling": Sampling(max_new_tokens=8, n=2)}
    if method == "teacher":
        return OPSDModule(policy, teacher, **settings)
    if method == "anchor":
        return OPSDModule(policy, ModelTeacher() if policy.trains_all else None, anchor=Anchor(teacher=teacher), **settings)
    return GRPOModule(policy, anchor=Anchor(teacher=teacher), **settings)


WHERE = {"teacher": "model.teacher", "anchor": "model.anchor.teacher", "grpo": "model.anchor.teacher"}
everywhere = pytest.mark.parametrize("method", WHERE)


@everywhere
def test_teacher_with_fewer_logits_is_refused(method: str, tmp_path: Path) -> None:
    policy = Policy(padded(tmp_path / "policy"), dtype="float32")
    teacher = ModelTeacher(saved(tmp_path / "teacher", make_model("llama")))
    with pytest.raises(UserError, match=mentions(f"{WHERE[method]}.model", 107, "model.policy.model", 128)):
        with_teacher(method, policy, teacher).configure_model()


@everywhere
def test_teacher_with_more_logits_is_accepted(method: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    teacher = ModelTeacher(padded(tmp_path / "teacher"))
    fit(with_teacher(method, make_policy(), teacher), 1, tmp_path, BATCH)  # type: ignore[arg-type]


@everywhere
def test_teacher_with_other_tokens_is_refused(method: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    module = with_teacher(method, make_policy(), ModelTeacher(other_tokens(tmp_path / "other")))
    with pytest.raises(UserError, match=mentions(f"{WHERE[method]}.model")):
        module.configure_model()


@everywhere
def test_missing_teacher_is_refused(method: str, make_policy: MakePolicy) -> None:
    module = with_teacher(method, make_policy(), ModelTeacher("./nowhere"))
    with pytest.raises(UserError, match=mentions(f"{WHERE[method]}.model", "./nowhere")):
        module.configure_model()


@everywhere
def test_a_teacher_needs_no_chat_template(method: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = None
    teacher = ModelTeacher(saved(tmp_path / "base", make_model("llama"), tokenizer))
    fit(with_teacher(method, make_policy(), teacher), 1, tmp_path, BATCH)  # type: ignore[arg-type]


@pytest.mark.parametrize("teacher", [EMATeacher, SyncTeacher])
def test_adapter_teachers_need_lora(teacher: Any, make_policy: MakePolicy) -> None:
    with pytest.raises(ConfigError) as caught:
        with_teacher("teacher", make_policy(lora=None), teacher()).configure_model()
    assert caught.value.setting == "model.teacher" and "FixedTeacher" in caught.value.fix


@everywhere
def test_rows_beyond_the_teachers_context_are_left_out(method: str, make_policy: MakePolicy, tmp_path: Path) -> None:
    """Rows that do not fit it are left out; where nothing else looks, scoring refuses them."""
    policy, folder = make_policy(), short(tmp_path / "short")
    rows = [
        {"problem": "q" * (50 if n % 2 else 5), "solution": "so it is the answer of all \\boxed{1}", "gold": "1"}
        for n in range(8)
    ]
    source = FileSource(str(write_jsonl(tmp_path / "rows.jsonl", rows)))
    prompts = Prompts(student_template="{question}", teacher_template="{question} {context}")
    data = OPSDDataModule(policy, train=source, prompts=prompts, batch_size=2, max_new_tokens=8)
    trainer = one_step(tmp_path)
    trainer.fit(with_teacher(method, policy, ModelTeacher(folder)), data)
    assert len(data.rows["train"].examples) == 4
    assert data.dropped["train"] == {DropReason.TEACHER_TOO_LONG: 4}
    text = data.limits["train"].text(DropReason.TEACHER_TOO_LONG)
    assert WHERE[method] in text and str(SHORT) in text
    batch = BATCH._replace(student=[[20] * 80, *BATCH.student[1:]])
    with pytest.raises(UserError, match=mentions(WHERE[method])):
        fit(with_teacher(method, policy, ModelTeacher(folder)), 1, tmp_path, batch)  # type: ignore[arg-type]


def test_anchor_support_larger_than_the_vocabulary_is_refused(make_policy: MakePolicy) -> None:
    anchor = Anchor(objective=DivergenceObjective(support=TopKWithTail(500)))
    for module in (OPSDModule(make_policy(), anchor=anchor), GRPOModule(make_policy(), anchor=anchor)):
        with pytest.raises(UserError, match=mentions("model.anchor.objective.support.k", 500)):
            module.configure_model()


def test_greedy_sampling_is_refused_for_grpo(make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=mentions("model.sampling.temperature")):
        GRPOModule(make_policy(), sampling=Sampling(n=2, temperature=0.0))
    GRPOModule(make_policy(), sampling=Sampling(n=2), eval_sampling=Sampling(temperature=0.0))


def test_objective_without_a_teacher_is_refused(make_policy: MakePolicy) -> None:
    for method in (OPSDModule, MixedOPSDModule):
        with pytest.raises(UserError, match=mentions("model.objective", "NegativeLogLikelihood")):
            method(make_policy(), objective=NegativeLogLikelihood())
    with pytest.raises(UserError, match=mentions("model.anchor.objective", "NegativeLogLikelihood")):
        Anchor(objective=NegativeLogLikelihood())


class Weighing(Fixed):
    max_importance_ratio = 1.5


def test_importance_ratio_without_effect_is_refused(make_policy: MakePolicy) -> None:
    with pytest.raises(UserError, match=mentions("model.max_importance_ratio")):
        OPSDModule(make_policy(), rollouts=Fixed(), max_importance_ratio=1.5)
    assert OPSDModule(make_policy(), max_importance_ratio=1.5, updates_per_batch=2).max_importance_ratio == 1.5
    assert OPSDModule(make_policy(), rollouts=Weighing()).max_importance_ratio == 2.0


@pytest.mark.parametrize("method", ["data alone", "opsd", "sft", "sft, no EOS at all", "mixed"])
def test_tokenizer_without_eos_is_refused_where_texts_are_trained_on(method: str, tmp_path: Path) -> None:
    """Only texts that are trained on must end with one."""
    tokenizer, model = make_tokenizer(), make_model("llama")
    tokenizer.eos_token = None
    if method == "sft, no EOS at all":
        model.config.eos_token_id = model.generation_config.eos_token_id = None
    policy = Policy(saved(tmp_path / "model", model, tokenizer), dtype="float32", pad_token="<pad>")
    source = FileSource(
        str(write_jsonl(tmp_path / "rows.jsonl", [{"problem": "1?", "solution": "so \\boxed{1}"}] * 2)),
    )
    held_out = source if method == "data alone" else None
    data = OPSDDataModule(policy, train=source, test=held_out, batch_size=2, max_new_tokens=4)
    if method == "data alone":
        data.setup("test")
        return
    sampling = Sampling(max_new_tokens=4)
    module: Any = {"opsd": OPSDModule, "mixed": MixedOPSDModule}.get(method, SFTModule)(policy, sampling=sampling)
    trainer = one_step(tmp_path)
    if method == "sft, no EOS at all":
        with pytest.raises(UserError, match="EOS"):
            trainer.fit(module, data)
        return
    trainer.fit(module, data)
    assert [trace[-1:] for trace in data.rows["train"].traces] == ([] if method == "opsd" else [[EOS]] * 2)
