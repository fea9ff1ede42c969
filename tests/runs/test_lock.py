"""Tests of the lock of a run's folder: a second run is refused, and a killed run leaves no lock."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import signal
import time
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import Callback, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger

from helpers.distributed import ddp, fsdp2
from helpers.processes import on_ranks
from opsd_lightning.callbacks.rollouts import RolloutWriter
from opsd_lightning.cli.command import main
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.data.sources import WordProblems
from opsd_lightning.methods.opsd import OPSDModule
from opsd_lightning.models.policy import LoRA, Policy
from opsd_lightning.prompts.templates import Prompts
from opsd_lightning.reports.run_report import RunReport
from opsd_lightning.runs import lock as run_lock
from opsd_lightning.types import ConfigError, Sampling, UserError
from opsd_lightning.utils.disk_errors import guard_loggers

pytestmark = pytest.mark.integration


def tree(root: Path) -> dict[str, bytes | None]:
    return {str(path.relative_to(root)): path.read_bytes() if path.is_file() else None for path in root.rglob("*")}


def parts(model: str) -> tuple[OPSDModule, OPSDDataModule]:
    torch.manual_seed(0)
    policy = Policy(model=model, dtype="float32", lora=LoRA(r=2, alpha=4, dropout=0.0))
    module = OPSDModule(policy, sampling=Sampling(max_new_tokens=4), optimizer=lambda p: torch.optim.SGD(p, lr=1e-3))
    data = OPSDDataModule(
        policy, train=WordProblems(size=8, seed=1), test=WordProblems(size=2, seed=2), batch_size=2, max_new_tokens=4,
        prompts=Prompts("{question}", "{question} {context}"),
    )  # fmt: skip
    return module, data


def trainer(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    if not any(isinstance(callback, RunReport) for callback in callbacks):
        callbacks = RunReport(), *callbacks  # which writes to the root
    return plain(root, *callbacks, **settings)


def plain(root: Path, *callbacks: Callback, **settings: Any) -> Trainer:
    return Trainer(
        accelerator="cpu", callbacks=list(callbacks), default_root_dir=root, enable_progress_bar=False,
        enable_model_summary=False,
        **{"logger": CSVLogger(root), "enable_checkpointing": any(isinstance(c, ModelCheckpoint) for c in callbacks),
           "max_steps": 2} | settings,
    )  # fmt: skip


@contextmanager
def elsewhere(work: Callable[[Callable[[], None]], None], tmp_path: Path) -> Iterator[int]:
    """Work in another process, which calls its argument once it is at work; it is killed at the end."""
    ready = tmp_path / f"ready{time.monotonic_ns()}"
    child = os.fork()
    if not child:
        try:
            work(ready.touch)
        except BaseException:
            traceback.print_exc()
        finally:
            os._exit(0)
    try:
        deadline = time.monotonic() + 60
        while not ready.exists():
            assert time.monotonic() < deadline and os.waitpid(child, os.WNOHANG)[0] == 0, "the other process has ended"
            time.sleep(0.02)
        ready.unlink()
        yield child
    finally:
        try:
            os.kill(child, signal.SIGKILL)
            os.waitpid(child, 0)
        except (ProcessLookupError, ChildProcessError):
            pass


class Waits(Callback):
    """Stays in its first step; with a forked child of its own, as data loader workers are."""

    def __init__(self, ready: Callable[[], None], child: Path | None = None) -> None:
        self.ready, self.child = ready, child

    def on_train_batch_start(self, *args: Any) -> None:
        if self.child is not None:
            pid = os.fork()
            if not pid:
                time.sleep(60)
                os._exit(0)
            self.child.write_text(str(pid))
        self.ready()
        time.sleep(60)


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "WAIT_SECONDS", 0.2)


def command(model: str, root: Path) -> list[str]:
    return ["fit", f"--model.policy.model={model}", "--model.policy.dtype=float32", f"--trainer.default_root_dir={root}",
            "--trainer.accelerator=cpu", "--data.train.init_args.size=8", "--trainer.max_steps=1", "--trainer.callbacks+=opsd_lightning.RunReport"]  # fmt: skip


def test_a_second_run_is_refused_and_one_after_a_kill_is_not(
    folders: dict[str, str], tmp_path: Path, impatient: None, capsys: pytest.CaptureFixture[str]
) -> None:
    """In Python and on the command line; a forked child that outlives the first run does not matter."""
    root, model, orphan = tmp_path / "run", folders["llama"], tmp_path / "orphan"
    with elsewhere(lambda ready: trainer(root, Waits(ready, orphan)).fit(*parts(model)), tmp_path) as first:
        before = tree(root)
        with pytest.raises(ConfigError) as caught:
            trainer(root, RunReport(), ModelCheckpoint(root / "saved")).fit(*parts(model))
        assert caught.value.setting == "trainer.default_root_dir"
        assert str(first) in caught.value.problem and tree(root) == before
        with pytest.raises(SystemExit) as ended:
            main(command(model, root))
        assert ended.value.code == 2 and tree(root) == before
        lines = [line for line in capsys.readouterr().err.splitlines() if line.startswith("error: ")]
        assert len(lines) == 1 and "trainer.default_root_dir" in lines[0]
        os.kill(first, signal.SIGKILL)
        os.waitpid(first, 0)
        os.kill(int(orphan.read_text()), 0)  # lives
        assert (root / run_lock.LOCK_NAME).exists()
        trainer(root, RunReport()).fit(*parts(model))
        os.kill(int(orphan.read_text()), signal.SIGKILL)
    assert not list(tmp_path.rglob("*.lock"))


def test_a_run_waits_for_one_that_is_ending(folders: dict[str, str], tmp_path: Path) -> None:
    """As the old process of a requeued job is."""
    root = tmp_path / "run"
    owner = trainer(root, logger=False)

    def work(ready: Callable[[], None]) -> None:
        run_lock.lock_fit(owner)
        ready()
        time.sleep(1)
        os._exit(0)

    with elsewhere(work, tmp_path):
        started = time.monotonic()
        run_lock.lock_fit(owner)
        assert time.monotonic() - started < 4
    run_lock.release(owner)


@pytest.mark.parametrize("shared", ["checkpoints", "log"])
def test_runs_of_two_folders_share_no_checkpoints_and_no_log(
    shared: str, folders: dict[str, str], tmp_path: Path, impatient: None
) -> None:
    def run(root: Path, *callbacks: Callback) -> Trainer:
        if shared == "checkpoints":
            return trainer(root, *callbacks, ModelCheckpoint(tmp_path / "shared"))
        return trainer(root, *callbacks, logger=CSVLogger(tmp_path / "logs", version=3))

    with elsewhere(lambda ready: run(tmp_path / "a", Waits(ready)).fit(*parts(folders["llama"])), tmp_path):
        before = tree(tmp_path)
        with pytest.raises(ConfigError) as caught:
            run(tmp_path / "b").fit(*parts(folders["llama"]))
        assert caught.value.setting == ("trainer.callbacks.dirpath" if shared == "checkpoints" else "trainer.logger")
        after = tree(tmp_path)
        assert {name: content for name, content in after.items() if not name.startswith("b")} == before
        trainer(tmp_path / "c", logger=CSVLogger(tmp_path / "logs")).fit(*parts(folders["llama"]))  # a version of its own


def test_evaluations_may_run_beside_a_fit(folders: dict[str, str], tmp_path: Path, impatient: None) -> None:
    """They are not refused, but a second one of the same completions is."""
    root, model = tmp_path / "run", folders["llama"]
    with elsewhere(lambda ready: trainer(root, Waits(ready)).fit(*parts(model)), tmp_path):
        module, data = parts(model)
        trainer(root, RolloutWriter(), logger=False).test(module, data, verbose=False)
    assert (root / "test.jsonl").exists()
    (results,) = (root / "results").iterdir()

    def work(ready: Callable[[], None]) -> None:
        owner = Trainer(logger=False, default_root_dir=root, enable_checkpointing=False)
        run_lock.lock_file(results.with_name(f".{results.name}.lock"), results, "writer.folder", owner)
        ready()
        time.sleep(60)

    with elsewhere(work, tmp_path):
        before = tree(root)
        with pytest.raises(ConfigError) as caught:
            trainer(root, RolloutWriter(resume=False), logger=False).test(*parts(model), verbose=False)
        assert caught.value.setting == "writer.folder" and tree(root) == before
    trainer(root, RolloutWriter(resume=False), logger=False).test(*parts(model), verbose=False)
    assert sorted(path.name for path in (root / "results").iterdir()) == [results.name]


def test_consecutive_runs_in_one_process_are_allowed(folders: dict[str, str], tmp_path: Path) -> None:
    """As in a notebook: also after an exception, twice with one trainer, and with an evaluation behind."""

    class Fails(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("no")

    root, model = tmp_path / "run", folders["llama"]
    with pytest.raises(RuntimeError):
        trainer(root, Fails()).fit(*parts(model))
    assert not list(tmp_path.rglob("*.lock"))
    again, (module, data) = trainer(root, RunReport()), parts(model)
    again.fit(module, data)
    again.fit_loop.epoch_loop.max_steps = 4
    again.fit(module, data)
    again.test(module, data, verbose=False)
    trainer(root).fit(*parts(model))
    assert not list(tmp_path.rglob("*.lock"))


@pytest.mark.parametrize("strategy", [ddp, fsdp2])
def test_every_rank_ends_where_the_first_is_refused(
    strategy: Callable[[], Any], folders: dict[str, str], tmp_path: Path, impatient: None
) -> None:
    root, model = tmp_path / "run", folders["llama"]
    with elsewhere(lambda ready: trainer(root, Waits(ready)).fit(*parts(model)), tmp_path):
        before = tree(root)

        def work(rank: int) -> str:
            try:
                trainer(root, RunReport(), strategy=strategy(), devices=2).fit(*parts(model))
            except UserError as error:
                return str(error)
            return ""

        started = time.monotonic()
        assert all("trainer.default_root_dir" in told for told in on_ranks(work, tmp_path))
        assert time.monotonic() - started < 30 and tree(root) == before
    on_ranks(lambda rank: trainer(root, strategy=strategy(), devices=2).fit(*parts(model)), tmp_path)
    assert not list(root.rglob("*.lock"))


def test_ranks_that_the_trainer_forks_hold_the_lock(folders: dict[str, str], tmp_path: Path, impatient: None) -> None:
    root, model = tmp_path / "run", folders["llama"]

    def work(ready: Callable[[], None]) -> None:
        trainer(root, Waits(ready), strategy="ddp_fork", devices=2).fit(*parts(model))

    with elsewhere(work, tmp_path):
        holder = json.loads((root / run_lock.LOCK_NAME).read_text())["pid"]
        with pytest.raises(ConfigError):
            trainer(root).fit(*parts(model))
        os.kill(holder, signal.SIGKILL)


def test_a_file_system_without_locks_is_warned_of(
    folders: dict[str, str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuses(*args: Any) -> None:
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", refuses)
    with pytest.warns(UserWarning, match="No locks available"):
        trainer(tmp_path / "run").fit(*parts(folders["llama"]))


def test_config_file_given_to_a_run_is_kept(folders: dict[str, str], tmp_path: Path) -> None:
    """Without a logger the run's own ``config.yaml`` goes to the same place."""
    mine = tmp_path / "config.yaml"
    mine.write_text("# mine\ntrainer:\n  logger: false\n  enable_checkpointing: false\n  enable_progress_bar: false\n")
    content = mine.read_bytes()
    for _ in range(2):
        rest = ["--data.batch_size=2", "--model.sampling.max_new_tokens=4"]
        rest += ["--data.prompts.student_template={question}", "--data.prompts.teacher_template={question} {context}"]
        main([*command(folders["llama"], tmp_path)[:1], f"--config={mine}", *command(folders["llama"], tmp_path)[1:], *rest])
        assert (tmp_path / "config-1.yaml").read_bytes() == content and mine.read_bytes() != content
        mine.write_bytes(content)
    assert not (tmp_path / "config-2.yaml").exists()


def test_runs_that_share_nothing_are_not_refused(folders: dict[str, str], tmp_path: Path, impatient: None) -> None:
    """Versions that Lightning chooses differ, and `fast_dev_run` writes nothing."""
    model, late = folders["llama"], CSVLogger(tmp_path)
    assert late.version == 0
    late._version = None
    with elsewhere(lambda ready: plain(tmp_path, Waits(ready)).fit(*parts(model)), tmp_path):
        log = plain(tmp_path, logger=late)
        log.fit(*parts(model))
        assert late.version == 1 and not (tmp_path / run_lock.LOCK_NAME).exists()
    with elsewhere(lambda ready: trainer(tmp_path, Waits(ready)).fit(*parts(model)), tmp_path):
        trainer(tmp_path, fast_dev_run=True).fit(*parts(model))


def test_concurrent_runs_get_different_log_versions(tmp_path: Path) -> None:
    one, other = (plain(tmp_path, logger=CSVLogger(tmp_path)) for _ in range(2))
    assert not (tmp_path / "lightning_logs").exists()

    def work(ready: Callable[[], None]) -> None:
        run_lock.lock_fit(one)
        ready()
        time.sleep(60)

    with elsewhere(work, tmp_path), pytest.warns(UserWarning, match="version_1"):
        run_lock.lock_fit(other)
    run_lock.release(other)
    assert other.logger is not None and other.logger.version == 1


@pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.runs.lock")
def test_an_evaluation_beside_a_fit_leaves_its_log(folders: dict[str, str], tmp_path: Path, impatient: None) -> None:
    """Though it was given the same version."""
    model, log = folders["llama"], CSVLogger(tmp_path, version=0)
    own = tmp_path / "lightning_logs" / "version_0"

    def run(ready: Callable[[], None]) -> None:
        own.mkdir(parents=True)
        (own / "metrics.csv").write_text("a,step\n1,0\n")
        os.utime(own / "metrics.csv", (1, 1))
        plain(tmp_path, Waits(ready), logger=CSVLogger(tmp_path, version=0)).fit(*parts(model))

    with elsewhere(run, tmp_path):
        before = tree(own)
        plain(tmp_path, logger=log).test(*parts(model), verbose=False)
        assert tree(own) == before and log.version == 1 and (own.with_name("version_1") / "metrics.csv").exists()
    assert not list(tmp_path.rglob(".version_1.lock"))


def test_csv_columns_of_another_writer_stay(tmp_path: Path) -> None:
    log = CSVLogger(tmp_path, version=0)
    guard_loggers([log])
    log.log_metrics({"a": 1.0}, 0)
    log.save()
    path = Path(log.log_dir) / "metrics.csv"
    path.write_text("b,step\n2.0,0\n")
    for step in (1, 2):
        log.log_metrics({"a": 3.0}, step)
        log.save()
    assert path.read_text().split() == ["a,b,step", ",2.0,0", "3.0,,1", "3.0,,2"]


@pytest.mark.parametrize("kind", ["file", "link", "folder"])
def test_what_is_no_lock_stays(kind: str, tmp_path: Path) -> None:
    path, mine = tmp_path / run_lock.LOCK_NAME, tmp_path / "mine"
    mine.write_text("mine")
    if kind == "file":
        mine.rename(path)
    elif kind == "link":
        path.symlink_to(mine)
    else:
        path.mkdir()
    before = tree(tmp_path)
    with pytest.raises(ConfigError) as caught:
        run_lock.lock_fit(trainer(tmp_path, logger=False))
    assert caught.value.setting == "trainer.default_root_dir" and tree(tmp_path) == before
    assert path.is_symlink() == (kind == "link")


def test_a_checkpoint_of_a_failing_run_is_saved_under_its_lock(folders: dict[str, str], tmp_path: Path) -> None:
    class Fails(Callback):
        def on_train_batch_end(self, *args: Any) -> None:
            raise RuntimeError("no")

    class Saves(ModelCheckpoint):
        locked = False

        def on_exception(self, *args: Any) -> None:
            self.locked = (tmp_path / run_lock.LOCK_NAME).exists() and (tmp_path / ".saved.lock").exists()

    saves = Saves(tmp_path / "saved")
    with pytest.raises(RuntimeError):
        trainer(tmp_path, Fails(), saves).fit(*parts(folders["llama"]))
    assert saves.locked and not list(tmp_path.rglob("*.lock"))
