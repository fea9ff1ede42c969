"""`AdapterExport` and `merge_adapter` delete nothing: whatever their folder is, what was there is there afterwards."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from opsd_lightning.callbacks.export import AdapterExport
from opsd_lightning.callbacks.rollouts import RolloutTable
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.export import merge_adapter, write_adapter
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.reports.token_report import TokenReport
from opsd_lightning.types import ConfigError, Sampling

pytestmark = pytest.mark.integration


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def fit(model: str, root: Path, *callbacks: Callback, steps: int = 1, **settings: Any) -> OPSDModule:
    adapter = settings.pop("adapter", None)
    lora = LoRA() if adapter else LoRA(r=2, alpha=4, dropout=0.0)
    policy = Policy(model=model, dtype="float32", lora=lora, adapter=adapter)
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=4), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    data = OPSDDataModule(
        policy, train=WordProblems(size=8, seed=1), prompts=Prompts("{question}", "{question} {context}"), batch_size=2,
        max_new_tokens=4,
    )  # fmt: skip
    Trainer(
        accelerator="cpu", callbacks=list(callbacks), max_steps=steps, default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False, **{"logger": CSVLogger(root), "enable_checkpointing": False} | settings,
    ).fit(module, data)  # fmt: skip
    return module


@pytest.fixture
def world(folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder of runs: one with checkpoints, a sibling, a base model, an adapter."""
    for name in ("run/checkpoints/at.ckpt", "run/notes.txt", "sibling/results.csv", "other/checkpoints/best.ckpt"):
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(name)
    base = tmp_path / "base"
    base.mkdir()
    for path in Path(folders["llama"]).iterdir():
        (base / path.name).write_bytes(path.read_bytes())
    (tmp_path / "cwd" / "deep").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "cwd" / "deep")
    return tmp_path


OTHERS = [
    ".", "..", "../..", "checkpoints", "record", "lightning_logs", "results", "../sibling", "../base", "../other", "../cwd",
    "../cwd/deep", "{world}", "{world}/run", "/", "rollouts.csv", "report.html", "notes.txt", "../other/checkpoints", "",
    "checkpoints/..", "tokens.html", "saved", "~",
]  # fmt: skip


@pytest.mark.parametrize("setting", ["folder", "merged_folder"])
def test_export_over_other_files_is_refused_before_training(setting: str, world: Path) -> None:
    """Also over what the run is going to write itself."""
    home = Path("~").expanduser()
    for folder in OTHERS:
        given = str(home) if folder == "~" else folder.format(world=world)
        before = tree(world)
        callbacks = [
            AdapterExport(**{setting: given}), RunReport(), RolloutTable(), TokenReport(pictures=False),
            ModelCheckpoint(world / "run" / "saved", save_top_k=0),
        ]  # fmt: skip
        with pytest.raises(ConfigError) as caught:
            fit(str(world / "base"), world / "run", *callbacks, enable_checkpointing=True)
        assert caught.value.setting == f"trainer.callbacks.{setting}", folder
        after = tree(world)
        assert all(after.get(name, b"-") == content for name, content in before.items()), folder


@pytest.mark.parametrize(("folder", "merged"), [("a", "a"), ("a", "a/b"), ("a/b", "a"), ("a/../b", "b")])
def test_nested_exports_are_refused(folder: str, merged: str, world: Path) -> None:
    with pytest.raises(ConfigError) as caught:
        fit(str(world / "base"), world / "run", AdapterExport(folder, merged))
    assert caught.value.setting == "trainer.callbacks.merged_folder"


def test_hidden_files_do_not_block_an_export_and_are_kept(
    world: Path, folders: dict[str, str], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also without a home, and in a current folder that is gone."""
    model, place = Policy(model=folders["llama"], lora=LoRA(r=2)).build(), world / "export"
    write_adapter(model, place)
    for name in (
        ".DS_Store",
        "__pycache__/a.pyc",
        ".cache/huggingface/x.metadata",
        ".gitattributes",
        ".ipynb_checkpoints/a",
    ):
        (place / name).parent.mkdir(parents=True, exist_ok=True)
        (place / name).write_text("x")
    with pytest.warns(UserWarning, match=r"export\.old-"):
        write_adapter(model, place)
    (old,) = world.glob("export.old-*")
    assert {".gitattributes", ".ipynb_checkpoints/a"} <= tree(old).keys() and ".DS_Store" not in tree(old)
    assert not tree(place).keys() & {".gitattributes", ".DS_Store"}
    write_adapter(model, place)
    assert (old / ".gitattributes").exists()
    (place / "notes.pyc").write_text("mine")
    with pytest.raises(ConfigError):
        write_adapter(model, place)
    assert (place / "notes.pyc").exists()

    def no_home() -> Path:
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "home", no_home)
    (world / "cwd" / "deep").rmdir()
    write_adapter(model, world / "another")


def test_exports_replace_earlier_ones_but_not_the_starting_adapter(world: Path) -> None:
    base, root = str(world / "base"), world / "run"
    for _ in range(2):
        fit(base, root, AdapterExport(merged_folder="merged"))
        assert {"adapter", "merged"} <= {path.name for path in root.iterdir()}
        assert not [
            path.name for path in root.iterdir() if path.name.startswith((".adapter", ".merged", "adapter-", "adapter."))
        ]
    before = tree(world)
    with pytest.raises(ConfigError):  # goes on from the adapter that it would replace
        fit(base, root, AdapterExport(), adapter=str(root / "adapter"))
    with pytest.raises(ConfigError):  # the base model is an export itself
        fit(str(root / "merged"), root, AdapterExport("adapter-of-merged", "merged"))
    after = tree(world)
    assert all(after.get(name, b"-") == content for name, content in before.items())


def test_blocked_export_is_written_to_a_folder_beside(world: Path) -> None:
    class Spoils(Callback):
        def on_train_end(self, trainer: Any, pl_module: Any) -> None:
            (world / "run" / "adapter").mkdir()
            (world / "run" / "adapter" / "mine").write_text("mine")

    with pytest.warns(UserWarning, match="adapter-1"):
        fit(str(world / "base"), world / "run", Spoils(), AdapterExport())
    assert [path.name for path in (world / "run" / "adapter").iterdir()] == ["mine"]
    assert (world / "run" / "adapter-1" / "adapter_model.safetensors").exists()


@pytest.mark.parametrize(
    "folder",
    [lambda w: w / "base", lambda w: w / "adapter", lambda w: w, lambda w: Path("."), lambda w: Path(".."), lambda w: w / "run",
     lambda w: Path.home(), lambda w: Path("/"), lambda w: w / "linked"],
)  # fmt: skip
def test_merging_deletes_nothing(folder: Callable[[Path], Path], world: Path) -> None:
    policy = Policy(str(world / "base"), dtype="float32", lora=LoRA(r=2, alpha=4, dropout=0.0))
    model = policy.build()
    adapter = write_adapter(model, world / "adapter")
    (world / "linked").symlink_to(world / "sibling")
    before = tree(world)
    with pytest.raises(ConfigError):
        merge_adapter(policy, adapter, folder(world))
    with pytest.raises(ConfigError):
        write_adapter(model, folder(world) if folder(world) != world / "adapter" else world / "sibling")
    assert tree(world) == before


def test_files_of_others_are_not_overwritten(world: Path) -> None:
    root = world / "run"
    for name, callback in [
        ("report.html", RunReport()), ("tokens.html", TokenReport(pictures=False)), ("rollouts.csv", RolloutTable()),
        ("../sibling/results.csv", RolloutTable(path="../sibling/results.csv")), ("record/notes.txt", RunReport()),
    ]:  # fmt: skip
        (root / name).parent.mkdir(exist_ok=True)
        (root / name).write_text("mine,\nand mine\n")
        before = tree(world)
        with pytest.raises(ConfigError):
            fit(str(world / "base"), root, callback)
        after = tree(world)
        assert all(after.get(name, b"-") == content for name, content in before.items()), name
        (root / name).unlink()
