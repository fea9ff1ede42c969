"""Size of a model's keys and values, from its configuration."""

from __future__ import annotations

from typing import Any

from transformers import DynamicCache, PretrainedConfig


def cache_bytes(config: PretrainedConfig, tokens: int, element_size: int) -> int:
    """Return the bytes of keys and values of one row with this many tokens, prompt included.

    A layer with a sliding window keeps the tokens of its window only.
    """
    text: Any = config.get_text_config()
    if (heads := getattr(text, "num_attention_heads", None)) is None:  # a recurrent state, whatever the length
        return 0
    width = getattr(text, "head_dim", None) or text.hidden_size // heads
    each = 2 * (getattr(text, "num_key_value_heads", None) or heads) * width * element_size
    windows = [getattr(layer, "sliding_window", None) for layer in DynamicCache(config=config).layers]
    windows = windows or [None] * text.num_hidden_layers
    return sum(each * (tokens if window is None else min(tokens, window - 1)) for window in windows)
