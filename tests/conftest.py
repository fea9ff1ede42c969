"""Tiny models and their tokenizer, made on the spot and saved as ordinary Hugging Face folders."""

from __future__ import annotations

import os

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import gc
import itertools
import json
import logging
import random
import socket
import string
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import lightning.pytorch  # noqa: F401 (sets its loggers up)
import pytest
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

from opsd_lightning.models.policy import LoRA, Policy

torch.set_num_threads(1)  # tiny models: threads would only wait for each other

ARCHITECTURES = ["llama", "qwen3", "gpt2", "mistral"]  # rotary, tied, learned positions, sliding window
SPECIAL = ["<unk>", "<pad>", "<|im_start|>", "<|im_end|>", "<|end|>", "<think>", "</think>"]
EOS, SECOND_EOS = SPECIAL.index("<|im_end|>"), SPECIAL.index("<|end|>")
CHAT_TEMPLATE = (
    "{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + message['content'] + '<|im_end|>' }}"
    "{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}"
    "{% if enable_thinking is defined and not enable_thinking %}{{ '<think></think>' }}{% endif %}{% endif %}"
)


def make_tokenizer() -> PreTrainedTokenizerFast:
    """One token a character; its EOS is also its pad, as in many chat models."""
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
    """A random model of a few thousand parameters whose next-token distribution is far from flat."""
    torch.manual_seed(seed)
    vocabulary = len(SPECIAL) + len(string.printable)
    common = {"vocab_size": vocabulary, "bos_token_id": None, "eos_token_id": EOS}
    rotary = common | {
        "hidden_size": 64,  # bitsandbytes quantizes in blocks of 64, and on some CPUs wrongly where a row holds no whole ones
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


def pytest_collection_finish() -> None:
    """What is imported by now stays: collecting garbage, as every Trainer and benchmark does, need not look at it."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Later tests fork: threads of a process group or of OpenMP would be missed there, and waited for, for ever. And they
    read what Lightning logs."""
    loggers = [logging.getLogger(name) for name in ("", "lightning", "lightning.pytorch", "lightning.fabric")]
    before = [(logger.level, logger.disabled, logger.propagate) for logger in loggers]
    yield
    for name in ("PL_GLOBAL_SEED", "PL_SEED_WORKERS"):  # of a command line; later ranks would seed themselves with it
        os.environ.pop(name, None)
    assert [(logger.level, logger.disabled, logger.propagate) for logger in loggers] == before, "this test mutes a logger"
    assert not torch.distributed.is_initialized(), "this test leaves a process group: run it with on_ranks"
    assert torch.get_num_threads() == 1, "this test leaves several threads: run it with on_ranks"


@pytest.fixture
def plain_four_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """What transformers alone loads in 4 bits is computed with as this package does: not repacked in bfloat16, as
    bitsandbytes does on some CPUs."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """A model folder for each architecture."""
    root = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        make_model(architecture).save_pretrained(root / architecture)
        make_tokenizer().save_pretrained(root / architecture)
    return {architecture: str(root / architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The tiny model with room for the package's own prompts, which are long where a token is a character."""
    folder = tmp_path_factory.mktemp("roomy")
    model = make_model("llama")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_policy(folders: dict[str, str]) -> Callable[..., Policy]:
    def make(architecture: str = "llama", **settings: object) -> Policy:
        settings.setdefault("lora", LoRA(r=4, alpha=8, dropout=0.0))
        return Policy(model=folders[architecture], dtype="float32", **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def built(make_policy: Callable[..., Policy]) -> Callable[..., PeftModel]:
    """A policy whose adapter already does something."""

    def build(architecture: str = "llama", **settings: object) -> PeftModel:
        torch.manual_seed(0)  # the adapter starts at random
        model = make_policy(architecture, **settings).build()
        perturb(model)
        return model

    return build


def perturb(model: PeftModel, scale: float = 0.1, seed: int = 1) -> None:
    """Move the trainable adapter off its start."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += scale * torch.randn(parameter.shape, generator=generator)


_ports = itertools.count()


def free_port() -> int:
    """A port of this machine that no other test asks for and that the system gives to no outgoing connection."""
    worker = int(os.environ.get("PYTEST_XDIST_WORKER", "gw0").removeprefix("gw"))
    while True:
        port = 20000 + 1000 * (worker % 10) + (os.getpid() + next(_ports)) % 1000
        with socket.socket() as found:
            try:
                found.bind(("127.0.0.1", port))
            except OSError:
                continue
        return port


def write_jsonl(path: Path, rows: Sequence[dict[str, object]]) -> Path:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


class Attack:
    """Number of tries of an attack of ``tests/attacks``, and their random numbers.

    `make test` tries a sample of each, always the same. `make attack` tries all, in rounds that differ, and adds up what was
    tried (``attacks/hour.py``).
    """

    def __init__(self, test: str) -> None:
        #: The round of `make attack`, from 1; 0 in `make test`.
        self.round = int(os.environ.get("OPSD_ATTACK_ROUND", "0"))
        self.random = random.Random(f"{test} {self.round}")
        self.counts: dict[str, int] = {}

    def tries(self, sample: int, whole: int) -> int:
        """Return the number of tries: ``sample`` times in `make test`, ``whole`` times in a round of `make attack`."""
        return whole if self.round else sample

    def tried(self, attack: str, count: int = 1) -> None:
        """Count tries of an attack, named as in the table of docs/reliability.md."""
        self.counts[attack] = self.counts.get(attack, 0) + count


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if call.when == "call":
        item.stash[_failed] = report.failed
    return report


_failed = pytest.StashKey[bool]()


@pytest.fixture
def attack(request: pytest.FixtureRequest) -> Iterator[Attack]:
    found = Attack(request.node.nodeid)
    yield found
    if path := os.environ.get("OPSD_ATTACK_REPORT"):
        failed = int(request.node.stash.get(_failed, True))
        lines = [json.dumps({"attack": name, "tried": n, "failed": failed}) for name, n in found.counts.items()]
        with open(path, "a", encoding="utf-8") as file:  # one write, so that processes do not mix
            file.write("".join(f"{line}\n" for line in lines))


# Ragged prompts and completions: the shortest and the longest of everything, and an empty completion.
PROMPTS = [[40, 41, 42, 43, 44, 45, 46], [50], [60, 61, 62]]
TEACHER_PROMPTS = [[70, 71, 40, 41, 42, 43, 44, 45, 46, 47, 48], [72, 50, 51], [60, 61, 62, 63, 64, 65]]
COMPLETIONS = [[20, 21, EOS], [22, 23, 24, 25, 26, EOS], []]
