"""Chat templates of published models, read from the installed trl, and tokenizers for them."""

from __future__ import annotations

import functools
import importlib.util
import re
from pathlib import Path

from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

# DeepSeek writes its tokens with a wide bar, U+FF5C.
_CONTROL = re.compile(
    r"<[|\uff5c][^<>|\uff5c\s]{1,40}[|\uff5c]>|<(?:start|end)_of_turn>|</?think>|</?tool_(?:call|response)>|\[gMASK\]|<sop>"
)
_TAG = re.compile(r"</?(think|tool_call|tool_response)>")


def template(name: str) -> str:
    """Return a chat template by the name of its file, such as ``qwen3``."""
    found = importlib.util.find_spec("trl")
    assert found is not None and found.submodule_search_locations, "trl is a dependency of the tests"
    return (Path(found.submodule_search_locations[0]) / "chat_templates" / f"{name}.jinja").read_text(encoding="utf-8")


@functools.cache
def tokenizer_for(name: str) -> PreTrainedTokenizerFast:
    """Return a tokenizer of bytes and a few words, with a template and its control tokens. Thinking tags are not special."""
    text = template(name)
    inner = Tokenizer(models.BPE())
    inner.pre_tokenizer, inner.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    words = ["the weather system user assistant is a question in a tool with {context} <|im_ (end) |> start of turn"] * 9
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    inner.train_from_iterator(words, trainers.BpeTrainer(vocab_size=300, initial_alphabet=alphabet, show_progress=False))
    control = [*dict.fromkeys(_CONTROL.findall(text)), "<|bos|>", "<|eos|>"]
    end = next(token for token in ("<|im_end|>", "<|eot_id|>", "<end_of_turn>", "<|end|>", "<|eos|>") if token in control)
    special = [token for token in control if not _TAG.fullmatch(token)]
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=inner, bos_token="<|bos|>", eos_token=end, pad_token="<|eos|>", additional_special_tokens=special,
        clean_up_tokenization_spaces=False,
    )  # fmt: skip
    tokenizer.add_tokens([AddedToken(token, special=False, normalized=False) for token in control if _TAG.fullmatch(token)])
    tokenizer.chat_template = text
    return tokenizer
