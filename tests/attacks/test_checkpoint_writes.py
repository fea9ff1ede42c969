"""Attacks on checkpoints while they are written: kills, full disks and names in use."""

from __future__ import annotations

import os
import resource
import shutil
import signal
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Trainer
from lightning.pytorch.callbacks import ModelCheckpoint, OnExceptionCheckpoint
from lightning.pytorch.plugins.io import AsyncCheckpointIO

from helpers.attack import Attack
from helpers.distributed import fsdp2, parts
from helpers.processes import on_ranks
from opsd_lightning.checkpoints.io import AtomicCheckpointIO, is_checkpoint, link_checkpoint, read_adapters, recover
from opsd_lightning.models.policy import Policy
from opsd_lightning.types import ConfigError

pytestmark = [
    pytest.mark.integration,
    pytest.mark.filterwarnings("ignore:torch.distributed is disabled:UserWarning"),
    pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.checkpoints"),
]


MEGABYTES = 4


def state(number: int, megabytes: int = MEGABYTES) -> dict[str, Any]:
    """A checkpoint whose every value tells its number."""
    return {
        "pytorch-lightning_version": "2.6.0", "epoch": 0, "global_step": number,
        "state_dict": {str(i): torch.full((2**18,), float(number)) for i in range(megabytes)},
    }  # fmt: skip


def number_of(path: Path) -> int:
    """The state that a checkpoint holds, whole."""
    found = AtomicCheckpointIO().load_checkpoint(path)
    number = int(found["global_step"])
    assert len(found["state_dict"]) == MEGABYTES
    assert all(bool((value == number).all()) for value in found["state_dict"].values())
    return number


def killed(work: Callable[[Callable[[], None]], None], wait: float) -> None:
    """Fork a process that works for ever, and kill it some seconds after it said that it began."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            os.close(reading)
            work(lambda: os.write(writing, b"."))  # type: ignore[arg-type, return-value]
        finally:
            os._exit(1)
    os.close(writing)
    assert os.read(reading, 1) == b"."
    os.close(reading)
    time.sleep(wait)
    os.kill(child, signal.SIGKILL)
    _, status = os.waitpid(child, 0)
    assert os.WIFSIGNALED(status), "it ended by itself"


@pytest.fixture
def other_file_system(monkeypatch: pytest.MonkeyPatch) -> None:
    """TMPDIR where renaming to a test's folder is not possible, as on clusters."""
    if Path("/dev/shm").is_dir():
        monkeypatch.setenv("TMPDIR", "/dev/shm")
        monkeypatch.setattr("tempfile.tempdir", None)


def test_kills_while_a_checkpoint_is_written(attack: Attack, tmp_path: Path, other_file_system: None) -> None:
    """Under each name there is a whole checkpoint, one of those that were saved, and never an older one than before."""
    folder = tmp_path / "a name\nof two lines"
    files = AtomicCheckpointIO()
    last = folder / "last.ckpt"
    files.save_checkpoint(state(0), last)
    started = time.monotonic()
    files.save_checkpoint(state(0), last)
    one, earlier, newest = time.monotonic() - started, 0, 0
    for _ in range(attack.tries(sample=8, whole=60)):

        def save(began: Callable[[], None], first: int = newest + 1) -> None:
            began()
            number = first
            while True:
                files.save_checkpoint(state(number), folder / f"{number}.ckpt")
                files.save_checkpoint(state(number), last)
                files.remove_checkpoint(folder / f"{number - 1}.ckpt")
                number += 1

        wait = attack.random.uniform(0, 4 * one)
        killed(save, wait)
        case = f"killed after {wait:.4f} s of saves that take {one:.4f} s"
        recover(last)
        numbers = {path.name: number_of(path) for path in folder.glob("*.ckpt")}
        assert numbers["last.ckpt"] >= earlier, case
        earlier, newest = numbers["last.ckpt"], max(numbers.values())
        assert all(int(name.split(".")[0]) == n for name, n in numbers.items() if name != "last.ckpt"), case
    files.save_checkpoint(state(newest), last)
    left = [path.name for path in folder.iterdir() if path.name.startswith(".last")]
    assert not left, "what killed processes left of a name goes with the next write to it"
    assert newest, "no checkpoint was ever finished"
    attack.tried("SIGKILL while a checkpoint is written", attack.tries(sample=8, whole=60))


def test_kills_while_shards_take_a_name(attack: Attack, tmp_path: Path) -> None:
    """A folder's name holds a whole folder at every instant, the earlier or the new."""
    from opsd_lightning.checkpoints.io import replace_checkpoint
    from opsd_lightning.checkpoints.shards import write_meta, write_shards

    target = tmp_path / "last.ckpt"
    tensors = {str(i): torch.zeros(2**14) for i in range(8)}

    def write(number: int) -> None:
        with replace_checkpoint(target, folder=True) as temporary:
            write_shards({"state_dict": {name: value + number for name, value in tensors.items()}}, temporary)
            write_meta({"pytorch-lightning_version": "2.6.0", "global_step": number}, temporary)

    write(0)
    newest = 0
    for _ in range(attack.tries(sample=8, whole=60)):

        def save(began: Callable[[], None], first: int = newest + 1) -> None:
            began()
            number = first
            while True:
                write(number)
                number += 1

        wait = attack.random.uniform(0, 0.15)
        killed(save, wait)
        assert is_checkpoint(target), f"killed after {wait:.4f} s"  # nothing needs to be brought back
        values = {float(value) for tensor in read_adapters(target).values() for value in tensor.unique()}
        assert len(values) == 1 and values.pop() >= newest, f"killed after {wait:.4f} s"
        newest = int(next(iter(read_adapters(target).values()))[0])
    assert newest, "no checkpoint was ever finished"
    attack.tried("SIGKILL while shards are written", attack.tries(sample=8, whole=60))


def test_kills_of_two_ranks_that_write_shards(attack: Attack, make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    policy, target = make_policy(), tmp_path / "last.ckpt"
    tries = attack.tries(sample=1, whole=6)
    for place in range(tries):
        wait = attack.random.uniform(0, 0.5)

        def work(rank: int, wait: float = wait) -> None:
            module, data = parts(policy, 2)
            trainer = Trainer(
                accelerator="cpu", devices=2, strategy=fsdp2(save_distributed_checkpoint=True), logger=False, max_steps=1,
                enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
                limit_val_batches=0, enable_checkpointing=False,
            )  # fmt: skip
            trainer.fit(module, data)
            trainer.save_checkpoint(target)
            if os.fork() == 0:  # kills this rank while it saves
                time.sleep(wait)
                os.kill(os.getppid(), signal.SIGKILL)
                os._exit(0)
            while True:
                trainer.save_checkpoint(target)

        with pytest.raises(AssertionError):
            on_ranks(work, tmp_path)
        assert is_checkpoint(target), f"killed after {wait:.4f} s"
        found = read_adapters(target)
        assert found and all(bool(torch.isfinite(value).all()) for value in found.values()), (place, wait)
    attack.tried("SIGKILL of two ranks that write shards", tries)


def limited(size: int, work: Callable[[], None]) -> str:
    """Do something in a process whose files may not grow beyond a size, as on a full disk; its message."""
    reading, writing = os.pipe()
    child = os.fork()
    if child == 0:
        try:
            signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
            resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))
            try:
                work()
                told = "done"
            except ConfigError as error:
                told = f"refused {error.setting} {error}"
            except BaseException as error:
                told = f"{type(error).__name__} {error}"
            os.write(writing, told.encode())
        finally:
            os._exit(0)
    os.close(writing)
    with os.fdopen(reading) as file:
        told = file.read()
    os.waitpid(child, 0)
    return told


def test_a_full_disk_leaves_the_earlier_checkpoint(attack: Attack, tmp_path: Path) -> None:
    files, last = AtomicCheckpointIO(), tmp_path / "last.ckpt"
    files.save_checkpoint(state(7), last)
    size = last.stat().st_size
    for _ in range(attack.tries(sample=4, whole=60)):
        room = attack.random.randrange(size)
        told = limited(room, lambda: files.save_checkpoint(state(8), last))
        assert told.startswith("refused") and str(last) in told and told.count("\n") == 0, (room, told)
        assert number_of(last) == 7 and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], room
        told = limited(room, lambda: files.save_checkpoint(state(8), tmp_path / "new.ckpt"))
        assert told.startswith("refused") and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"], (room, told)
    assert limited(size + 2**16, lambda: files.save_checkpoint(state(8), last)) == "done" and number_of(last) == 8
    attack.tried("full disk during a checkpoint", 2 * attack.tries(sample=4, whole=60))


def test_a_full_disk_ends_both_ranks(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """The rank that does not write would wait for ever for the one that failed."""
    policy = make_policy()

    def work(rank: int) -> str:
        from helpers.distributed import ddp

        module, data = parts(policy, 2)
        keep = ModelCheckpoint(tmp_path / "kept", "{step}", every_n_train_steps=1, save_top_k=-1)
        trainer = Trainer(
            accelerator="cpu", devices=2, strategy=ddp(), logger=False, max_steps=3, callbacks=[keep],
            enable_progress_bar=False, enable_model_summary=False, default_root_dir=tmp_path, num_sanity_val_steps=0,
            limit_val_batches=0,
        )  # fmt: skip

        class Full(ModelCheckpoint):
            def on_train_batch_end(self, trainer: Any, *args: Any) -> None:
                if trainer.global_step == 2 and trainer.is_global_zero:
                    resource.setrlimit(resource.RLIMIT_FSIZE, (1000, resource.RLIM_INFINITY))

        trainer.callbacks.insert(0, Full(tmp_path / "none", save_top_k=0))
        signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
        try:
            trainer.fit(module, data)
        except ConfigError as error:
            return f"refused: {error}"
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        return "done"

    told = on_ranks(work, tmp_path)
    assert all(each.startswith("refused") for each in told), told
    assert [path.name for path in (tmp_path / "kept").iterdir()] == ["step=1.ckpt"]
    assert read_adapters(tmp_path / "kept" / "step=1.ckpt")


def test_a_plain_trainer_writes_whole_files(make_policy: Callable[..., Policy], tmp_path: Path) -> None:
    """Nothing but the module: links, several best, exceptions. Of ``AsyncCheckpointIO`` one message."""
    policy, seen = make_policy(), []

    class Kept(ModelCheckpoint):
        def _remove_checkpoint(self, trainer: Any, filepath: str) -> None:
            super()._remove_checkpoint(trainer, filepath)
            seen.append(bool(read_adapters(tmp_path / "last.ckpt")))  # also between the two halves of Lightning's save

    def trainer(*callbacks: Any, **settings: Any) -> Trainer:
        return Trainer(
            accelerator="cpu", logger=False, callbacks=list(callbacks), default_root_dir=tmp_path, max_steps=4,
            enable_progress_bar=False, enable_model_summary=False, num_sanity_val_steps=0, limit_val_batches=0, **settings,
        )  # fmt: skip

    keep = Kept(tmp_path, "{step}", every_n_train_steps=1, save_top_k=1, save_last="link")
    fit = trainer(keep, OnExceptionCheckpoint(tmp_path))
    module, data = parts(policy, 2)
    fit.fit(module, data)
    assert isinstance(fit.strategy.checkpoint_io, AtomicCheckpointIO)
    assert seen and all(seen) and (tmp_path / "last.ckpt").is_symlink()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["last.ckpt", "step=4.ckpt"]
    evaluation = trainer()
    evaluation.validate(*parts(policy, 2), ckpt_path=tmp_path / "last.ckpt", verbose=False)
    assert isinstance(evaluation.strategy.checkpoint_io, AtomicCheckpointIO)
    with pytest.raises(ConfigError) as refused:
        trainer(plugins=[AsyncCheckpointIO()]).fit(*parts(policy, 2))
    assert refused.value.setting == "trainer.plugins"


def test_only_checkpoints_are_removed_and_replaced(tmp_path: Path) -> None:
    files = AtomicCheckpointIO()
    thesis = tmp_path / "thesis.ckpt"
    thesis.mkdir()
    (thesis / "chapter.txt").write_text("years of work")
    (tmp_path / "notes.ckpt").write_text("notes")
    files.save_checkpoint(state(1), tmp_path / "own.ckpt")
    (tmp_path / "linked.ckpt").symlink_to(tmp_path / "notes.ckpt")
    for name in ("thesis.ckpt", "notes.ckpt", "linked.ckpt", "own.ckpt", "nowhere.ckpt"):
        files.remove_checkpoint(tmp_path / name)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.ckpt", "thesis.ckpt"]
    for broken in (lambda: files.save_checkpoint(state(1), thesis), lambda: link_checkpoint(_Alone, "x", str(thesis))):
        with pytest.raises(ConfigError):
            broken()
    assert (thesis / "chapter.txt").read_text() == "years of work"
    assert sorted(path.name for path in tmp_path.iterdir()) == ["notes.ckpt", "thesis.ckpt"]
    # A link in the way of the temporary name, or as the target, is not written through.
    (tmp_path / ".own.ckpt.partial").symlink_to(tmp_path / "notes.ckpt")
    (tmp_path / "own.ckpt").symlink_to(tmp_path / "notes.ckpt")
    files.save_checkpoint(state(2), tmp_path / "own.ckpt")
    assert number_of(tmp_path / "own.ckpt") == 2 and (tmp_path / "notes.ckpt").read_text() == "notes"
    # A link to a folder is followed, and a long name is written.
    (tmp_path / "real").mkdir()
    (tmp_path / "kept").symlink_to(tmp_path / "real")
    files.save_checkpoint(state(3), tmp_path / "kept" / f"{'n' * 250}.ckpt")
    assert [number_of(path) for path in (tmp_path / "real").iterdir()] == [3]
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError):
        files.save_checkpoint(state(4), tmp_path / "file" / "last.ckpt")


class _Alone:
    is_global_zero = True


def test_a_checkpoint_that_was_put_aside_comes_back(tmp_path: Path) -> None:
    """A kill leaves the checkpoint beside its name if names cannot be exchanged in one step."""
    last = tmp_path / "last.ckpt"
    AtomicCheckpointIO().save_checkpoint(state(5), last)
    shutil.move(last, tmp_path / ".last.ckpt.old")
    assert number_of(last) == 5 and [path.name for path in tmp_path.iterdir()] == ["last.ckpt"]
