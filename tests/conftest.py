"""Fixtures that several test files use.

Heavy libraries are imported in the fixtures: pytest-xdist loads this file once more, in a process that runs no test.
"""

from __future__ import annotations

import gc
import json
import logging
import os
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml

if TYPE_CHECKING:
    from peft import PeftModel

    from helpers.attack import Attack
    from opsd_lightning.models.policy import Policy

os.environ["HF_HUB_OFFLINE"] = "1"
os.environ["OMP_NUM_THREADS"] = "1"  # tiny models: threads would only wait for each other
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
pytest.register_assert_rewrite("helpers")


def pytest_collection_finish() -> None:
    """Exclude everything imported so far from garbage collection, which every Trainer and benchmark triggers."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def leaves_nothing_behind() -> Iterator[None]:
    """Check that a test leaves no process group, no threads and no changed loggers: later tests fork and read logs."""
    import lightning.pytorch  # noqa: F401 (sets its loggers up)
    import torch

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
    """Keep bitsandbytes from repacking 4-bit weights in bfloat16, as it does on some CPUs."""
    monkeypatch.setattr("bitsandbytes.nn.modules.has_avx512bf16", lambda: False)


@pytest.fixture
def cpu_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    """Show continuous batching no device but the CPU. The imitated CUDA device stays registered in the process."""
    name = "transformers.generation.continuous_batching.input_outputs.get_available_devices"
    monkeypatch.setattr(name, lambda: frozenset({"cpu"}))


@pytest.fixture(scope="session")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, str]:
    """Return a model folder for each architecture."""
    from helpers.models import ARCHITECTURES, make_model, make_tokenizer

    root = tmp_path_factory.mktemp("models")
    for architecture in ARCHITECTURES:
        make_model(architecture).save_pretrained(root / architecture)
        make_tokenizer().save_pretrained(root / architecture)
    return {architecture: str(root / architecture) for architecture in ARCHITECTURES}


@pytest.fixture(scope="session")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> str:
    """Return the folder of a tiny model whose context holds the package's own prompts."""
    from helpers.models import make_model, make_tokenizer

    folder = tmp_path_factory.mktemp("roomy")
    model = make_model("llama")
    model.config.max_position_embeddings = 2048
    model.save_pretrained(folder)
    make_tokenizer().save_pretrained(folder)
    return str(folder)


@pytest.fixture
def make_policy(folders: dict[str, str]) -> Callable[..., Policy]:
    from opsd_lightning.models.policy import LoRA, Policy

    def make(architecture: str = "llama", **settings: object) -> Policy:
        settings.setdefault("lora", LoRA(r=4, alpha=8, dropout=0.0))
        return Policy(model=folders[architecture], dtype="float32", **settings)  # type: ignore[arg-type]

    return make


@pytest.fixture
def built(make_policy: Callable[..., Policy]) -> Callable[..., PeftModel]:
    """Return a function that builds a policy whose adapter is not at its start."""

    import torch

    from helpers.models import perturb

    def build(architecture: str = "llama", **settings: object) -> PeftModel:
        torch.manual_seed(0)  # the adapter starts at random
        model = make_policy(architecture, **settings).build()
        perturb(model)
        return model

    return build


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item, call: pytest.CallInfo[None]) -> Iterator[None]:
    report: Any = yield
    if call.when == "call":
        item.stash[_failed] = report.failed
    return report


_failed = pytest.StashKey[bool]()


@pytest.fixture
def attack(request: pytest.FixtureRequest) -> Iterator[Attack]:
    from helpers.attack import Attack

    found = Attack(request.node.nodeid)
    yield found
    if path := os.environ.get("OPSD_ATTACK_REPORT"):
        failed = int(request.node.stash.get(_failed, True))
        lines = [json.dumps({"attack": name, "tried": n, "failed": failed}) for name, n in found.counts.items()]
        with open(path, "a", encoding="utf-8") as file:  # one write, so that processes do not mix
            file.write("".join(f"{line}\n" for line in lines))


@pytest.fixture
def base(folders: dict[str, str], tmp_path: Path) -> list[str]:
    """Return the arguments of a tiny run."""
    from helpers.files import write_jsonl

    rows = [{"problem": f"{n}+1?", "solution": f"The answer is {n + 1}.", "gold": str(n + 1)} for n in range(8)]
    path = write_jsonl(tmp_path / "rows.jsonl", rows)
    config = {
        "model": {
            "policy": {"model": folders["llama"], "dtype": "float32", "lora": {"r": 4, "alpha": 8.0}},
            "sampling": {"max_new_tokens": 6},
            "eval_sampling": {"max_new_tokens": 6},
        },
        "data": {
            split: {"class_path": "FileSource", "init_args": {"path": str(path), "columns": {"answer": "gold"}}}
            for split in ("train", "val", "test")
        }
        | {"batch_size": 2, "eval_batch_size": 4},
        "trainer": {
            "accelerator": "cpu",
            "max_steps": 2,
            "logger": {"class_path": "CSVLogger", "init_args": {"save_dir": str(tmp_path)}},
            "default_root_dir": str(tmp_path),
            "enable_progress_bar": False,
            "enable_model_summary": False,
        },
    }
    config["data"]["train"]["init_args"]["split"] = "train[4:]"
    config["data"]["val"]["init_args"]["split"] = config["data"]["test"]["init_args"]["split"] = "train[:4]"
    (tmp_path / "base.yaml").write_text(yaml.safe_dump(config))
    return [f"--config={tmp_path / 'base.yaml'}"]


@pytest.fixture
def hub(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """A stand-in of the hub that huggingface_hub talks to."""
    from huggingface_hub import constants

    from helpers.hub_server import TOKEN, HubServer

    server = HubServer()
    monkeypatch.setattr(constants, "ENDPOINT", server.url)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    monkeypatch.setenv("HF_TOKEN", TOKEN)
    yield server
    server.close()
