"""Qwen3's published shapes, as model folders that hold a configuration alone."""

from __future__ import annotations

from pathlib import Path

from transformers import Qwen3Config

#: Hidden size, layers, heads, intermediate size, and True if the head shares the embeddings' weights.
SHAPES = {
    "Qwen/Qwen3-1.7B": (2048, 28, 16, 6144, True),
    "Qwen/Qwen3-4B": (2560, 36, 32, 9728, True),
    "Qwen/Qwen3-8B": (4096, 36, 32, 12_288, False),
}


def qwen3_config(name: str) -> Qwen3Config:
    """Return the configuration of a published model, from its config.json."""
    hidden, layers, heads, intermediate, tied = SHAPES[name]
    return Qwen3Config(
        vocab_size=151_936, hidden_size=hidden, num_hidden_layers=layers, num_attention_heads=heads, num_key_value_heads=8,
        head_dim=128, intermediate_size=intermediate, tie_word_embeddings=tied, max_position_embeddings=40_960,
        architectures=["Qwen3ForCausalLM"], dtype="bfloat16",
    )  # fmt: skip


def qwen3_folder(name: str, root: Path) -> str:
    """Write the configuration into a folder below ``root``, and return the folder."""
    folder = root / name.rpartition("/")[2]
    qwen3_config(name).save_pretrained(folder)
    return str(folder)
