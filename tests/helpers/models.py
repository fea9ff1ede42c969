"""Tiny models and their tokenizer, saved as ordinary Hugging Face folders, and token rows for them."""

from __future__ import annotations

import string

import torch
from peft import PeftModel
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers
from transformers import (
    GenerationConfig,
    GPT2Config,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedModel,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)

ARCHITECTURES = ["llama", "qwen3", "gpt2", "mistral"]  # rotary, tied, learned positions, sliding window
SPECIAL = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|end|>", "<think>", "</think>"]


EOS, SECOND_EOS = SPECIAL.index("<|im_end|>"), SPECIAL.index("<|end|>")


CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)
#: The same without a switch for thinking.
PLAIN = CHAT_TEMPLATE[: CHAT_TEMPLATE.index("{% if enable_thinking")] + "{% endif %}"


def make_tokenizer() -> PreTrainedTokenizerFast:
    """Return a tokenizer with one token for each character, whose EOS token is also its pad token."""
    vocabulary = {token: index for index, token in enumerate([*SPECIAL, *string.printable])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    inner.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    inner.decoder = decoders.Fuse()
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner,
        eos_token="<|im_end|>",
        pad_token="<|im_end|>",
        unk_token="<unk>",
        additional_special_tokens=[t for t in SPECIAL if t not in ("<unk>", "<|im_end|>")],
    )
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def make_model(architecture: str, seed: int = 0) -> PreTrainedModel:
    """Return a random model of a few thousand parameters whose next-token distribution is far from uniform."""
    torch.manual_seed(seed)
    vocabulary = len(SPECIAL) + len(string.printable)
    common = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": EOS}
    rotary = common | {
        # bitsandbytes quantizes in blocks of 64, on some CPUs wrongly if a row is not a multiple of them.
        "hidden_size": 64,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 512,
    }
    model: PreTrainedModel
    if architecture == "llama":
        model = LlamaForCausalLM(LlamaConfig(**rotary))
    elif architecture == "qwen3":
        model = Qwen3ForCausalLM(Qwen3Config(**rotary, head_dim=16, tie_word_embeddings=True))
    elif architecture == "mistral":  # every layer sees the last six tokens only
        model = MistralForCausalLM(MistralConfig(**rotary, head_dim=16, sliding_window=6))
    else:
        model = GPT2LMHeadModel(
            GPT2Config(**common, n_embd=32, n_layer=2, n_head=4, n_positions=512, resid_pdrop=0, embd_pdrop=0, attn_pdrop=0)
        )
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.3 * (32 / parameter.shape[-1]) ** 0.5)
    # Sampling defaults of a checkpoint, which must not leak into rollouts, and a second EOS id, which must.
    model.generation_config = GenerationConfig(
        eos_token_id=[EOS, SECOND_EOS], pad_token_id=EOS, do_sample=True, top_k=1, repetition_penalty=3.0
    )
    return model


def perturb(model: PeftModel, scale: float = 0.1, seed: int = 1) -> None:
    """Add noise to the trainable parameters."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += (scale * torch.randn(parameter.shape, generator=generator)).to(parameter.device)


# Ragged prompts and completions: the shortest and the longest of everything, and an empty completion.
PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50], [60, 61, 62]]
TEACHER_PROMPTS = [[70, 71, 40, 41, 42, 43, 44, 45, 46, 47, 48], [72, 50, 51], [60, 61, 62, 63, 64, 65]]
COMPLETIONS = [[20, 21, EOS], [22, 23, 24, 25, 26, EOS], []]
