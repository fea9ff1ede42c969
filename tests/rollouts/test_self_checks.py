"""Tests of the check at the start of a run: it passes consistent models and refuses inconsistent ones."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from transformers import (
    BertConfig,
    BertGenerationConfig,
    BertGenerationDecoder,
    BertLMHeadModel,
    BitsAndBytesConfig,
    Gemma2Config,
    Gemma2ForCausalLM,
    Lfm2Config,
    Lfm2ForCausalLM,
    OpenAIGPTConfig,
    OpenAIGPTLMHeadModel,
    OPTConfig,
    OPTForCausalLM,
    PegasusConfig,
    PegasusForCausalLM,
    PreTrainedModel,
    Qwen3NextConfig,
    Qwen3NextForCausalLM,
    RwkvConfig,
    RwkvForCausalLM,
    XLNetConfig,
    XLNetLMHeadModel,
)

from helpers.models import ARCHITECTURES, EOS, make_tokenizer
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.evaluation import evaluator as evaluation
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy, base_of
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.base import RolloutEngine
from opsd_lightning.rollouts.self_checks import TOLERANCES, check_policy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import ModelTeacher
from opsd_lightning.types import ConfigError, Rollouts, Sampling, UserError

SIZES: dict[str, Any] = {
    "vocab_size": 107, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 256, "bos_token_id": None, "eos_token_id": EOS, "pad_token_id": EOS,
}  # fmt: skip
GROUPED = SIZES | {"num_key_value_heads": 2}
OLD: dict[str, Any] = {"vocab_size": 107, "eos_token_id": EOS, "pad_token_id": EOS, "bos_token_id": EOS}
Models = dict[str, Callable[[], PreTrainedModel]]


def gemma2() -> PreTrainedModel:
    layers = ["sliding_attention", "full_attention"]
    config = Gemma2Config(**GROUPED, head_dim=16, sliding_window=8, layer_types=layers, final_logit_softcapping=20.0)
    return Gemma2ForCausalLM(config)


def linear_attention() -> PreTrainedModel:
    config = Qwen3NextConfig(
        **GROUPED, head_dim=16, layer_types=["linear_attention", "full_attention"], linear_num_value_heads=2,
        linear_num_key_heads=2, linear_key_head_dim=8, linear_value_head_dim=8, num_experts=2, num_experts_per_tok=1,
        moe_intermediate_size=16, shared_expert_intermediate_size=16,
    )  # fmt: skip
    return Qwen3NextForCausalLM(config)


RIGHT: Models = {
    "sliding and full layers": gemma2,
    "linear attention": linear_attention,
    "convolutions": lambda: Lfm2ForCausalLM(Lfm2Config(**GROUPED, layer_types=["conv", "full_attention"])),
    "learned positions": lambda: OPTForCausalLM(
        OPTConfig(vocab_size=107, hidden_size=64, ffn_dim=64, num_hidden_layers=2, num_attention_heads=4, eos_token_id=EOS,
                  pad_token_id=EOS, bos_token_id=EOS, word_embed_proj_dim=64, max_position_embeddings=256)
    ),
}  # fmt: skip
WRONG: Models = {
    "sees later tokens": lambda: BertGenerationDecoder(BertGenerationConfig(**OLD, hidden_size=32, intermediate_size=32,
                                                                            num_hidden_layers=1, num_attention_heads=2)),
    "another head": lambda: BertLMHeadModel(BertConfig(**OLD, hidden_size=32, intermediate_size=32, num_hidden_layers=1,
                                                       num_attention_heads=2)),
    "positions by the column": lambda: PegasusForCausalLM(PegasusConfig(**OLD, d_model=32, decoder_layers=1, decoder_ffn_dim=32,
                                                                        decoder_attention_heads=2, is_encoder_decoder=False)),
    "a state of its own": lambda: RwkvForCausalLM(RwkvConfig(**OLD, hidden_size=32, attention_hidden_size=32,
                                                             intermediate_size=32, num_hidden_layers=2)),
    "no cache": lambda: OpenAIGPTLMHeadModel(OpenAIGPTConfig(**OLD, n_embd=32, n_layer=1, n_head=2)),
    "permutations": lambda: XLNetLMHeadModel(XLNetConfig(**OLD, d_model=32, n_layer=1, n_head=2, d_inner=32)),
}  # fmt: skip


def built_of(make: Callable[[], PreTrainedModel], folder: Path) -> PeftModel:
    torch.manual_seed(0)
    model = make()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 * (32 / parameter.shape[-1]) ** 0.5)
    model.generation_config.eos_token_id = model.generation_config.pad_token_id = EOS  # type: ignore[union-attr]
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return Policy(str(folder), lora=LoRA(r=2, alpha=2, dropout=0.0), dtype="float32").build()


@pytest.mark.filterwarnings("ignore:The following (rank|alpha)_pattern keys:RuntimeWarning")
@pytest.mark.parametrize("name", RIGHT)
def test_consistent_models_pass(name: str, tmp_path: Path) -> None:
    found = check_policy(built_of(RIGHT[name], tmp_path), TransformersEngine(), every_adapter=True)
    assert found.agreed == found.tokens > 0 and found.rollout is not None
    assert max(found.batch, found.shared, found.rollout) < 1e-4


@pytest.mark.parametrize("name", WRONG)
def test_inconsistent_models_are_refused(name: str, tmp_path: Path) -> None:
    with pytest.raises(UserError):
        check_policy(built_of(WRONG[name], tmp_path), TransformersEngine())


@pytest.mark.parametrize("engine", [TransformersEngine(max_rows=1), TransformersEngine(static_cache=True)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_engines_pass(architecture: str, engine: RolloutEngine, built: Callable[..., PeftModel]) -> None:
    assert check_policy(built(architecture), engine).tokens > 0


def test_low_precision_passes_and_is_within_half_its_tolerance(make_policy: Callable[..., Policy]) -> None:
    def worst(model: PeftModel) -> float:
        found = check_policy(model, TransformersEngine())
        return max(found.batch, found.shared, found.rollout or 0.0) / found.tolerance

    four = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    assert worst(make_policy().build()) < 0.5 and worst(make_policy(quantization=four).build()) < 0.5
    with torch.autocast("cpu", torch.bfloat16):
        model = make_policy().build()
        assert check_policy(model).tolerance == TOLERANCES[torch.bfloat16]
        assert worst(model) < 0.5
    folder = make_policy().model
    assert worst(Policy(folder, lora=LoRA(r=2, alpha=2), dtype="bfloat16").build()) < 0.5


def test_eight_bit_layers_depend_on_their_batch_and_warn(make_policy: Callable[..., Policy]) -> None:
    model = make_policy(quantization=BitsAndBytesConfig(load_in_8bit=True)).build()
    with pytest.warns(UserWarning, match=r"model\.policy\.quantization: .*load_in_4bit"):
        found = check_policy(model, TransformersEngine())
    assert TOLERANCES[torch.float32] < found.batch < found.tolerance


# -- what differs ----------------------------------------------------------------------------------------------------------


@contextmanager
def changed(model: PeftModel, change: Callable[[dict[str, Any], torch.Tensor], torch.Tensor]) -> Iterator[None]:
    """The model with other hidden states."""

    def hook(module: Any, args: Any, kwargs: dict[str, Any], output: Any) -> None:
        output.last_hidden_state = change(kwargs, output.last_hidden_state)

    handle = base_of(model).base_model.register_forward_hook(hook, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def of_neighbours(inputs: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    return hidden + 0.05 * hidden.mean(0)


def of_the_width(inputs: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    return hidden + hidden.shape[1] * 0.01


def of_the_cache(inputs: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
    cached = inputs.get("past_key_values") is not None
    return hidden + 0.1 * hidden.roll(1, -1) if cached else hidden


@pytest.mark.parametrize("change", [of_neighbours, of_the_width, of_the_cache])
def test_a_row_that_depends_on_its_batch_is_refused(change: Any, built: Callable[..., PeftModel]) -> None:
    model = built()
    with changed(model, change), pytest.raises(ConfigError) as refused:
        check_policy(model)
    assert refused.value.setting == "model.policy.model"


class Other(TransformersEngine):
    """Samples with other weights than the policy's."""

    def __init__(self, by: float) -> None:
        super().__init__()
        self.by = by

    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        with changed(model, lambda inputs, hidden: hidden + self.by * hidden.roll(1, -1)):
            return super().generate(model, prompts, sampling, seed)


class Blind(TransformersEngine):
    """Shows no logits, and samples its own tokens."""

    def generate(self, model: PeftModel, prompts: Sequence[Sequence[int]], sampling: Sampling, seed: int) -> Rollouts:
        return Rollouts([[20, 21, 22, 23, 24, 25] for _ in prompts], [False] * len(prompts))


@pytest.mark.parametrize("engine", [Other(0.01), Other(1.0), Blind()], ids=["logits", "tokens", "no logits"])
def test_rollouts_that_are_not_scored_are_refused(engine: RolloutEngine, built: Callable[..., PeftModel]) -> None:
    model = built()
    assert check_policy(model).tokens == 0, "scoring alone is right"
    with pytest.raises(ConfigError):
        check_policy(model, engine)


def test_rounding_in_float32_is_no_difference(built: Callable[..., PeftModel]) -> None:
    check_policy(built(), Other(1e-5))


def test_an_error_of_the_model_names_the_setting(built: Callable[..., PeftModel]) -> None:
    def fail(inputs: dict[str, Any], hidden: torch.Tensor) -> torch.Tensor:
        raise TypeError("forward() got an unexpected keyword")

    model = built()
    with changed(model, fail), pytest.raises(ConfigError) as refused:
        check_policy(model, setting="model.teacher")
    assert refused.value.setting == "model.teacher.model" and "unexpected keyword" in refused.value.problem


def test_check_leaves_the_model_unchanged(make_policy: Callable[..., Policy]) -> None:
    """Weights, modes, gradients, hooks and random numbers."""
    model = make_policy(lora=LoRA(r=2, alpha=2, dropout=0.3), gradient_checkpointing=True).build()
    hooks = [len(module._forward_hooks) for module in model.modules()]
    state = {name: value.clone() for name, value in model.state_dict().items()}
    modes = [module.training for module in model.modules()]
    trains = [parameter.requires_grad for parameter in model.parameters()]
    torch.manual_seed(5)
    before = torch.get_rng_state()
    check_policy(model, TransformersEngine())
    assert torch.get_rng_state().equal(before)
    assert all(value.equal(state[name]) for name, value in model.state_dict().items())
    assert modes == [module.training for module in model.modules()]
    assert trains == [parameter.requires_grad for parameter in model.parameters()]
    assert all(parameter.grad is None for parameter in model.parameters())
    assert hooks == [len(module._forward_hooks) for module in model.modules()]


# -- when it runs ----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("stage", ["fit", "validate", "test", "predict"])
def test_every_stage_starts_with_the_check(
    stage: str, make_policy: Callable[..., Policy], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Once, under the run's precision, and before anything is sampled; the teacher's own network in training alone."""
    policy, asked = make_policy(), []

    def refuse(model: PeftModel, engine: Any = None, setting: str = "model.policy", **settings: Any) -> None:
        asked.append((setting, torch.is_autocast_enabled("cpu")))
        if engine is not None:
            raise ConfigError("planted", setting, "Nothing")

    monkeypatch.setattr(evaluation, "check_policy", refuse)
    module = OPSDModule(policy, teacher=ModelTeacher(policy.model), rollouts=Other(0.0), sampling=Sampling(max_new_tokens=4))
    split = {"fit": "train", "validate": "val"}.get(stage, "test")
    data = OPSDDataModule(
        policy,
        **{split: WordProblems(size=4)},
        prompts=Prompts("{question}", "{question} {context}"),
        batch_size=2,
        max_new_tokens=4,
    )  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="cpu", precision="bf16-mixed", max_steps=1, logger=False, enable_checkpointing=False,
        enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path,
    )  # fmt: skip
    monkeypatch.setattr(Other, "generate", lambda *rest: pytest.fail("sampled before the check"))
    with pytest.raises(ConfigError):
        getattr(trainer, stage)(module, data)
    teacher = [("model.teacher", True)] if stage == "fit" else []
    assert asked == [*teacher, ("model.policy", True)]
