"""Loading, adapters, quantization, and what is refused."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from transformers import (
    AutoModelForCausalLM,
    BitsAndBytesConfig,
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GraniteConfig,
    GraniteForCausalLM,
)

from helpers.models import COMPLETIONS, EOS, PROMPTS, SECOND_EOS, make_model, make_tokenizer, perturb
from opsd_lightning.models.export import merge_adapter, write_adapter
from opsd_lightning.models.policy import LoRA, Policy, eos_ids
from opsd_lightning.models.scoring import check_head, has_adapted_head, score
from opsd_lightning.rollouts.transformers_engine import TransformersEngine
from opsd_lightning.types import ConfigError, Sampling, UserError

TINY = {
    "vocab_size": 107, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 1, "num_attention_heads": 4,
    "num_key_value_heads": 2, "bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip


def logits(model: PeftModel) -> torch.Tensor:
    with torch.no_grad():
        states, _ = score(model.eval(), PROMPTS, COMPLETIONS)
        return states.head(states.hidden)


def test_trainable_weights_are_the_adapter_alone(make_policy: Callable[..., Policy]) -> None:
    model = make_policy(lora=LoRA(r=3, alpha=6, dropout=0.1, target_modules=["q_proj"])).build()
    trainable = [name for name, p in model.named_parameters() if p.requires_grad]
    assert len(trainable) == 2 * 2 and all("q_proj.lora_" in name for name in trainable)
    assert model.peft_config["default"].r == 3 and model.peft_config["default"].lora_alpha == 6


def test_eos_ids_are_all_of_them_and_sampling_defaults_none(make_policy: Callable[..., Policy]) -> None:
    model = make_policy().build()
    assert eos_ids(model) == {EOS, SECOND_EOS}
    config = model.get_base_model().generation_config
    assert not config.top_k and not config.do_sample and not config.repetition_penalty


@pytest.mark.parametrize(
    ("model_class", "config"),
    [
        (CohereForCausalLM, CohereConfig(**TINY, logit_scale=0.3)),
        (GraniteForCausalLM, GraniteConfig(**TINY, logits_scaling=7.0)),
        (Gemma2ForCausalLM, Gemma2Config(**TINY, head_dim=8, final_logit_softcapping=1.5)),
    ],
    ids=["logit scale", "logits scaling", "soft cap"],
)
def test_heads_that_do_more_than_multiply(model_class: type, config: object, tmp_path: Path) -> None:
    torch.manual_seed(0)
    base = model_class(config)
    with torch.no_grad():
        for parameter in base.parameters():
            parameter.add_(0.2 * torch.randn_like(parameter))
    base.save_pretrained(tmp_path)
    tokenizer = make_tokenizer()
    tokenizer.save_pretrained(tmp_path)
    model = Policy(str(tmp_path), lora=LoRA(r=2, alpha=2), dtype="float32").build()
    check_head(model)
    states, _ = score(model.eval(), [[5, 6]], [[7, 8, 9]])
    expected = model(input_ids=torch.tensor([[5, 6, 7, 8, 9]])).logits[0, 1:4]
    torch.testing.assert_close(states.head(states.hidden), expected, atol=1e-5, rtol=1e-5)


def test_a_head_that_we_do_not_know_is_refused(built: Callable[..., PeftModel]) -> None:
    model = built()
    head = model.get_base_model().get_output_embeddings()
    head.register_forward_hook(lambda module, args, output: output * 2 if args[0].dim() == 3 else output)
    with pytest.raises(UserError, match=r"^model\.policy\.model: "):
        check_head(model)


def test_adapted_head_is_scored(make_policy: Callable[..., Policy]) -> None:
    model = make_policy(lora=LoRA(r=2, alpha=4, dropout=0.0, target_modules=["lm_head", "q_proj"])).build()
    perturb(model)
    assert has_adapted_head(model)
    check_head(model)


def gradients(model: PeftModel) -> dict[str, torch.Tensor]:
    states, targets = score(model, PROMPTS, COMPLETIONS)
    torch.nn.functional.cross_entropy(states.head(states.hidden), targets).backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("settings", [{"gradient_checkpointing": True}, {"attn_implementation": "eager"}], ids=str)
def test_settings_that_save_memory_or_time_change_no_number(
    settings: dict[str, object], built: Callable[..., PeftModel]
) -> None:
    torch.manual_seed(0)
    expected = gradients(built())
    torch.manual_seed(0)
    model = built(**settings)
    base = model.get_base_model()
    if "gradient_checkpointing" in settings:
        assert base.is_gradient_checkpointing
        assert base.training
    else:
        assert base.config._attn_implementation == "eager"
    found = gradients(model)
    assert found.keys() == expected.keys() and len(found) > 0
    for name, value in found.items():
        torch.testing.assert_close(value, expected[name], atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    "quantization",
    [
        BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True),
        BitsAndBytesConfig(load_in_8bit=True),
    ],
    ids=["nf4", "int8"],
)
def test_quantized_layers_are_quantized(quantization: BitsAndBytesConfig, make_policy: Callable[..., Policy]) -> None:
    """bitsandbytes on the CPU: the base is quantized, the adapter is not, and rollout, scores and gradients work."""
    model = make_policy(quantization=quantization).build()
    base = model.get_base_model().model.layers[0].mlp.up_proj.base_layer
    assert type(base).__module__.startswith("bitsandbytes")
    assert all(p.dtype == torch.float32 for p in model.parameters() if p.requires_grad)
    check_head(model)
    plain = make_policy().build()
    error = (logits(model) - logits(plain)).norm() / logits(plain).norm()
    assert 0 < float(error) < 0.5
    rollouts = TransformersEngine().generate(model, PROMPTS, Sampling(max_new_tokens=5), seed=0)
    model.train()
    states, targets = score(model, PROMPTS, rollouts.completions)
    torch.nn.functional.cross_entropy(states.head(states.hidden), targets).backward()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


def test_exported_adapter_loads_with_plain_peft(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    from opsd_lightning.teachers import EMATeacher

    policy = make_policy()
    model = policy.build()
    EMATeacher().attach(model)
    perturb(model)
    folder = write_adapter(model, tmp_path / "out" / "adapter")
    write_adapter(model, folder)  # again: replaced, not mixed
    names = ["README.md", "adapter_config.json", "adapter_model.safetensors", "opsd_export.json"]
    assert sorted(p.name for p in folder.iterdir()) == names
    assert [p.name for p in folder.parent.iterdir()] == ["adapter"], "no temporary left behind"
    base = AutoModelForCausalLM.from_pretrained(policy.model, dtype=torch.float32)
    torch.testing.assert_close(logits(PeftModel.from_pretrained(base, folder)), logits(model))
    again = make_policy(adapter=str(folder), lora=LoRA()).build()
    torch.testing.assert_close(logits(again), logits(model))
    merged = AutoModelForCausalLM.from_pretrained(merge_adapter(policy, folder, tmp_path / "merged"))
    ids = torch.tensor([PROMPTS[0] + COMPLETIONS[0]])
    torch.testing.assert_close(merged(ids).logits, model(input_ids=ids).logits, atol=1e-4, rtol=1e-4)
    assert merged.generation_config.eos_token_id == [EOS, SECOND_EOS]


@pytest.mark.filterwarnings("ignore:Could not find a config file:UserWarning:peft")
def test_gguf_model_loads_and_exports(tmp_path: Path) -> None:
    """A GGUF file written here, with a vocabulary that transformers rebuilds a tokenizer from."""
    gguf = pytest.importorskip("gguf")
    path = tmp_path / "tiny.gguf"
    writer = gguf.GGUFWriter(path, "llama")
    hidden, heads, layers, middle = 32, 4, 1, 48
    tokens = [f"<0x{n:02X}>" for n in range(256)] + ["<|im_start|>", "<|im_end|>", "Ġa"]
    letters = gpt2_bytes()
    tokens[:256] = [letters[n] for n in range(256)]
    writer.add_context_length(128)
    writer.add_embedding_length(hidden)
    writer.add_block_count(layers)
    writer.add_feed_forward_length(middle)
    writer.add_head_count(heads)
    writer.add_head_count_kv(heads)
    writer.add_rope_dimension_count(hidden // heads)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_vocab_size(len(tokens))
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(tokens)
    writer.add_token_types([1] * 256 + [3, 3, 1])
    writer.add_token_merges(["Ġ a"])
    writer.add_bos_token_id(256)
    writer.add_eos_token_id(257)
    writer.add_pad_token_id(257)
    writer.add_chat_template(make_tokenizer().chat_template)
    generator = torch.Generator().manual_seed(0)

    def add(name: str, *shape: int) -> None:
        writer.add_tensor(name, (torch.randn(*shape, generator=generator) * 0.3).numpy())

    add("token_embd.weight", len(tokens), hidden)
    add("output_norm.weight", hidden)
    add("output.weight", len(tokens), hidden)
    for name, shape in {
        "attn_q": (hidden, hidden), "attn_k": (hidden, hidden), "attn_v": (hidden, hidden), "attn_output": (hidden, hidden),
        "ffn_gate": (middle, hidden), "ffn_up": (middle, hidden), "ffn_down": (hidden, middle), "attn_norm": (hidden,),
        "ffn_norm": (hidden,),
    }.items():  # fmt: skip
        add(f"blk.0.{name}.weight", *shape)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()

    policy = Policy(str(path), lora=LoRA(r=2, alpha=2, dropout=0.0), dtype="float32")
    assert policy.context_length() == 128
    model = policy.build()
    check_head(model)
    folder = write_adapter(model, tmp_path / "adapter")
    assert merge_adapter(policy, folder, tmp_path / "merged").joinpath("model.safetensors").exists()
    tokenizer = policy.load_tokenizer()
    assert tokenizer.decode(tokenizer.encode("a", add_special_tokens=False)) == "a" and 257 in eos_ids(model)


def gpt2_bytes() -> dict[int, str]:
    """The printable stand-ins of byte-level BPE."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    return {b: chr(b) for b in visible} | {b: chr(256 + n) for n, b in enumerate(b for b in range(256) if b not in visible)}


def test_refusals(folders: dict[str, str], make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    def refused(setting: str, policy: Policy) -> None:
        with pytest.raises(ConfigError) as caught:
            policy.build()
        assert caught.value.setting == f"model.policy.{setting}"

    refused("model", Policy("./nowhere"))
    refused("model", Policy("nobody/nothing"))
    (tmp_path / "empty").mkdir()
    refused("model", Policy(str(tmp_path / "empty")))
    refused("lora", make_policy(lora=LoRA(target_modules=["nonesuch"])))
    refused("lora", make_policy(lora=LoRA(options={"nonesuch": 1})))
    refused("lora.options.bias", make_policy("gpt2", lora=LoRA(options={"bias": "all"})))
    refused("lora.options.init_lora_weights", make_policy(lora=LoRA(options={"init_lora_weights": "pissa"})))
    refused("adapter", make_policy(adapter=str(tmp_path / "empty")))
    other = write_adapter(make_policy("gpt2").build(), tmp_path / "gpt2")
    refused("adapter", make_policy("llama", adapter=str(other)))
    wider = make_model("llama")
    wider.config.intermediate_size = 96
    type(wider)(wider.config).save_pretrained(tmp_path / "wider")
    make_tokenizer().save_pretrained(tmp_path / "wider")
    wide = write_adapter(Policy(str(tmp_path / "wider"), lora=LoRA(r=4, alpha=8)).build(), tmp_path / "wide")
    refused("adapter", make_policy("llama", adapter=str(wide), lora=LoRA()))
    refused("lora", make_policy("llama", adapter=str(wide), lora=LoRA(r=5)))
    bare = make_tokenizer()
    bare.chat_template = None
    bare.save_pretrained(tmp_path / "empty")
    make_model("llama").save_pretrained(tmp_path / "empty")
    refused("chat_template", Policy(str(tmp_path / "empty")))
    refused("chat_template", Policy(str(tmp_path / "empty"), chat_template="missing.jinja"))
    (tmp_path / "t.jinja").write_text("{{ messages[0]['content'] }}")
    padless = make_tokenizer()
    padless.pad_token = None
    padless.save_pretrained(tmp_path / "empty")
    refused("pad_token", Policy(str(tmp_path / "empty")))
    refused("pad_token", Policy(str(tmp_path / "empty"), pad_token="<nonesuch>"))
    fine = Policy(str(tmp_path / "empty"), pad_token="<pad>", chat_template=str(tmp_path / "t.jinja")).load_tokenizer()
    assert fine.pad_token == "<pad>" and fine.chat_template == "{{ messages[0]['content'] }}"
