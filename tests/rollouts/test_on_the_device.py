"""Tests of rollouts on the imitated CUDA device: kernels, waits, memory, and the same completions as on the CPU."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from peft import PeftModel
from transformers import BitsAndBytesConfig, Gemma2Config, Gemma2ForCausalLM, Qwen3Config, Qwen3ForCausalLM

from helpers.models import EOS, PROMPTS, make_tokenizer, perturb
from helpers.strict_device import StrictDevice, strict_device, unavailable
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy, base_of, evaluating
from opsd_lightning.models.scoring import uses_flash_attention
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.rollouts.attention import additive_mask, rollout_attention
from opsd_lightning.rollouts.decoding import Decoder
from opsd_lightning.rollouts.draws import RowDraws
from opsd_lightning.rollouts.rollout_copy import RMSNorm, rollout_copy
from opsd_lightning.rollouts.self_checks import check_policy
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.teachers import EMATeacher
from opsd_lightning.types import ConfigError, Sampling

pytestmark = [
    pytest.mark.integration,
    pytest.mark.skipif(unavailable() is not None, reason=str(unavailable())),
]

LAYERS = 28  # of Qwen3-1.7B
NF4 = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.bfloat16
)
AUTOCAST: dict[str, Any] = {"device_type": "cuda", "dtype": torch.bfloat16}


@pytest.fixture
def device() -> Iterator[StrictDevice]:
    with strict_device() as found:
        yield found


@pytest.fixture(scope="module")
def deep(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a narrow model with the layers of Qwen3-1.7B."""
    folder = tmp_path_factory.mktemp("deep")
    torch.manual_seed(0)
    config = Qwen3Config(
        vocab_size=107, hidden_size=64, intermediate_size=64, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, tie_word_embeddings=True, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    Qwen3ForCausalLM(config).save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


def on_device(policy: Policy) -> PeftModel:
    torch.manual_seed(0)
    model = policy.build(torch.device("cuda", 0))
    perturb(model)
    return model.to("cuda:0")


def kernels_a_token(device: StrictDevice, model: PeftModel, engine: TransformersEngine, sampling: dict[str, Any]) -> float:
    """Return the kernels of a decoded token: the difference between long and short rollouts in which no row ends."""
    base_of(model).generation_config.eos_token_id = [107]  # no token
    counts = []
    for tokens in (2, 4):
        with device.phase(f"{tokens} tokens {id(engine)}"), torch.autocast(**AUTOCAST):
            rollouts = engine.generate(model, PROMPTS[:2], Sampling(tokens, **sampling), 0)
        assert rollouts.tokens == 2 * tokens
        counts.append(sum(device.counts[f"{tokens} tokens {id(engine)}"].kernels.values()))
    return (counts[1] - counts[0]) / 2


def test_kernels_and_waits_of_a_decoded_token(deep: str, device: StrictDevice) -> None:
    policy = Policy(deep, lora=LoRA(r=4, alpha=8, dropout=0.0), dtype="bfloat16", quantization=NF4)
    model, sampling = on_device(policy), {"temperature": 1.1, "top_p": 0.95, "top_k": 20}
    apart = kernels_a_token(device, model, TransformersEngine(), sampling)
    with model.disable_adapter():
        without = kernels_a_token(device, model, TransformersEngine(), sampling)
    assert without <= 1000 and apart <= 1000
    short, long = ([n for name, n in device.counts.items() if name.startswith(f"{tokens} tokens")] for tokens in (2, 4))
    assert len(short) == len(long) == 2
    for few, many in zip(short, long, strict=True):
        assert many.synchronizations.total() - few.synchronizations.total() <= 2 * 2


MODES: dict[str, dict[str, Any]] = {
    "float32": {"dtype": "float32"},
    "bfloat16": {"dtype": "bfloat16"},
    "NF4": {"dtype": "bfloat16", "quantization": NF4},
    "full": {"dtype": "float32", "lora": None},
}


@pytest.mark.parametrize("name", MODES)
@pytest.mark.parametrize("architecture", ["qwen3", "mistral"])
def test_completions_are_those_of_the_copy_on_the_cpu(
    name: str, architecture: str, folders: dict[str, str], plain_four_bits: None
) -> None:
    """The same draws, and on this device the same rounding."""
    policy = Policy(folders[architecture], **({"lora": LoRA(r=4, alpha=8, dropout=0.0)} | MODES[name]))
    sampling = Sampling(max_new_tokens=10, top_p=0.95, n=2)
    with strict_device() as device:
        model = on_device(policy)
        with torch.autocast(**AUTOCAST):
            found = TransformersEngine().generate(model, PROMPTS, sampling, 3)
            assert torch.is_autocast_enabled("cuda")
        state = {key: value.cpu() for key, value in model.state_dict().items() if "lora" in key}
    assert not device.mixes
    torch.manual_seed(0)
    here = policy.build()
    perturb(here)
    assert all(torch.equal(value, here.state_dict()[key]) for key, value in state.items())
    rows = [prompt for prompt in PROMPTS for _ in range(2)]
    with torch.no_grad(), evaluating(here):
        expected = Decoder(rollout_copy(here), rows, sampling, 6, RowDraws(3, 6, 10)).in_segments()
    assert found.completions == [row.tokens for row in expected]
    assert found.terminated == [row.terminated for row in expected]


@pytest.mark.parametrize("quantization", [NF4, None], ids=["NF4", "float32"])
def test_the_check_at_the_start_of_a_run_covers_the_copy(
    quantization: Any, folders: dict[str, str], device: StrictDevice, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its hooks run on the copy: logits of the rollout agree with scoring within the tolerance, or are refused."""
    lora = LoRA(r=4, alpha=8, dropout=0.0)
    model = on_device(Policy(folders["qwen3"], lora=lora, dtype="float32", quantization=quantization))
    with torch.autocast(**AUTOCAST):
        found = check_policy(model, TransformersEngine())
        assert found.rollout is not None and 0 < found.rollout < found.tolerance / 2
        monkeypatch.setattr(RMSNorm, "forward", lambda self, x: x)  # a faulty copy
        with pytest.raises(ConfigError):
            check_policy(model, TransformersEngine())


def test_attention_of_rollouts_is_restored(folders: dict[str, str], device: StrictDevice) -> None:
    model = on_device(Policy(folders["qwen3"], lora=LoRA(r=4, alpha=8), dtype="float32"))
    base, inside = base_of(model), []
    base.register_forward_hook(lambda module, args, output: inside.append(module.config._attn_implementation))
    for name in ("eager", "sdpa", "flash_attention_2", "kernels-community/flash-attn2"):
        base.config._attn_implementation = name  # flash attention itself cannot run here
        assert uses_flash_attention(base) == ("flash" in name)
        TransformersEngine().generate(model, PROMPTS, Sampling(max_new_tokens=2), 0)
        assert base.config._attn_implementation == name
        assert set(inside) == ({"eager"} if name == "eager" else {"sdpa_additive"})
        inside.clear()
    base.config._attn_implementation = "sdpa"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_masks_are_finite_where_autocast_rounds_them(dtype: torch.dtype) -> None:
    """A row of padding sees nothing: with -inf alone its attention is NaN, or what a kernel makes of it."""
    seen = torch.tensor([[False, True, True], [True, True, True]])
    mask = additive_mask(2, 3, 3, attention_mask=seen, dtype=dtype)
    assert mask.dtype == dtype and mask.bfloat16().isfinite().all()
    assert mask[:, 0].softmax(-1)[0, 1:].tolist() == [[0, 1, 0], [0, 0.5, 0.5]]


def test_a_model_with_a_soft_cap_keeps_its_attention() -> None:
    sizes = {"vocab_size": 107, "hidden_size": 64, "intermediate_size": 64, "num_hidden_layers": 1, "num_attention_heads": 4}
    base = Gemma2ForCausalLM(Gemma2Config(**sizes, num_key_value_heads=2, head_dim=16, attn_logit_softcapping=50.0))
    base.config._attn_implementation = "flash_attention_2"
    with rollout_attention(base):
        assert base.config._attn_implementation == "flash_attention_2"


def test_the_difference_to_the_trainer_is_logged_and_corrected(
    folders: dict[str, str], device: StrictDevice, tmp_path: Path
) -> None:
    """In a fit with validation, which Lightning runs in inference mode, and with the teacher's own weights."""
    policy = Policy(folders["llama"], lora=LoRA(r=4, alpha=8, dropout=0.1), dtype="bfloat16", quantization=NF4)
    engine = TransformersEngine(logprob_tolerance=0.1, max_importance_ratio=2.0)
    module = OPSDModule(
        policy, teacher=EMATeacher(0.5), evaluate_teacher=True, rollouts=engine, sampling=Sampling(8, 1.1, 0.95, 20, n=2)
    )
    rows = {"train": WordProblems(size=4, seed=1), "val": WordProblems(size=2, seed=2)}
    prompts = Prompts("{question}", "{question} {context}")
    data = OPSDDataModule(policy, **rows, prompts=prompts, batch_size=2, max_new_tokens=8)  # type: ignore[arg-type]
    trainer = Trainer(
        accelerator="gpu", devices=1, precision="bf16-mixed", max_steps=1, val_check_interval=1, check_val_every_n_epoch=None,
        logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False,
        default_root_dir=tmp_path,
    )  # fmt: skip
    trainer.fit(module, data)
    found = trainer.callback_metrics
    assert not device.mixes and "val/teacher_avg@2" in found
    assert 0 < float(found["train/rollout_logprob_difference"]) < 0.05
    assert 0.9 < float(found["train/importance_ratio"]) < 1.1
