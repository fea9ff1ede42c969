"""Count the calls between files of the package in one training step, for ``structure.py``.

python benchmarks/structure_step.py TREE FOLDER
"""

from __future__ import annotations

import sys
from collections import Counter
from pathlib import Path
from types import FrameType
from typing import Any

TREE = Path(sys.argv[1])
sys.path.insert(0, str(TREE))

import torch  # noqa: E402
from lightning.pytorch import Trainer  # noqa: E402
from tokenizers import Tokenizer, models, pre_tokenizers  # noqa: E402
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast  # noqa: E402

import opsd_lightning as opsd  # noqa: E402

PACKAGE = str(Path(opsd.__file__).parent)
calls: Counter[tuple[str, str]] = Counter()


def make_model(folder: Path) -> str:
    """Save a random two-layer Llama with a tokenizer of single characters."""
    letters = [*map(chr, range(32, 127)), "\n"]
    vocabulary = {letter: number for number, letter in enumerate(["<eos>", *letters])}
    inner = Tokenizer(models.WordLevel(vocabulary, unk_token=" "))
    inner.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=inner, eos_token="<eos>", pad_token="<eos>")
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}\n{% endfor %}"
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=len(vocabulary), hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=2048, eos_token_id=0, pad_token_id=0, bos_token_id=None,
    )  # fmt: skip
    LlamaForCausalLM(config).save_pretrained(folder)
    return str(folder)


def count(frame: FrameType, event: str, argument: Any) -> None:
    if event == "call" and frame.f_back is not None:
        here, there = frame.f_code.co_filename, frame.f_back.f_code.co_filename
        if here != there and here.startswith(PACKAGE) and there.startswith(PACKAGE):
            calls[there[len(PACKAGE) + 1 :], here[len(PACKAGE) + 1 :]] += 1


class Counted(opsd.OPSDModule):
    """OPSD whose step is traced."""

    def training_step(self, batch: Any, batch_idx: int) -> Any:
        sys.setprofile(count)
        try:
            return super().training_step(batch, batch_idx)
        finally:
            sys.setprofile(None)


def main() -> None:
    policy = opsd.Policy(make_model(Path(sys.argv[2]) / "model"))
    module = Counted(policy, sampling=opsd.Sampling(max_new_tokens=8))
    data = opsd.OPSDDataModule(policy, train=opsd.WordProblems(size=8), batch_size=2, max_new_tokens=8)
    trainer = Trainer(
        max_steps=1, accelerator="cpu", devices=1, logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False, default_root_dir=sys.argv[2],
    )  # fmt: skip
    trainer.fit(module, data)
    method = {"module.py", "methods/opsd.py"}
    base = {"training.py", "methods/base.py"}
    up = sum(count for (caller, callee), count in calls.items() if caller in base and callee in method)
    down = sum(count for (caller, callee), count in calls.items() if caller in method and callee in base)
    print(f"{len(calls)} pairs of files; base to method {up}, method to base {down}")


if __name__ == "__main__":
    main()
