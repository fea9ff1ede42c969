"""Fixtures of the tests against vLLM itself."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from helpers.models import EOS, SECOND_EOS, make_tokenizer


@pytest.fixture(scope="session")
def vllm_python() -> str:
    python = os.environ.get("OPSD_VLLM_PYTHON")
    if not python:
        pytest.skip("OPSD_VLLM_PYTHON names no Python that has vLLM: make test-vllm")
    return python


@pytest.fixture(scope="session")
def vllm_model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny model with heads of 32, the smallest that vLLM's CPU attention takes."""
    folder = tmp_path_factory.mktemp("vllm") / "model"
    torch.manual_seed(0)
    tokenizer = make_tokenizer()
    config = LlamaConfig(
        vocab_size=128, hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=1, max_position_embeddings=1024, bos_token_id=None, eos_token_id=EOS,
    )  # fmt: skip
    model = LlamaForCausalLM(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(std=0.15)
    # Sampling defaults of a checkpoint, which vLLM takes where a request leaves one out, and a second EOS id.
    model.generation_config.update(eos_token_id=[EOS, SECOND_EOS], do_sample=True, top_k=1, repetition_penalty=3.0)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder
