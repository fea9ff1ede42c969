"""Tests that commands import no module from the working folder unless a setting names it."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from helpers.paths import ROOT
from opsd_lightning.runs.record import git_commit
from opsd_lightning.utils.import_path import add_current_folder, without_current_folder

pytestmark = pytest.mark.integration


# Modules of the standard library and of dependencies, some of which are absent from the environment.
ELSEWHERE = (
    "torch lightning yaml rich transformers peft datasets httpx jinja2 markupsafe jsonargparse numpy wandb tensorflow flax comet_ml vllm "
    "omegaconf neptune sitecustomize usercustomize bitsandbytes trl deepspeed config data runs argcomplete typeshed_client pydantic "
    "matplotlib PIL scipy pandas opsd_lightning kernels flash_attn docstring_parser shtab"
).split()


@pytest.fixture(scope="module")
def hostile(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with a run in it, whose modules leave a mark when they are imported."""
    folder = tmp_path_factory.mktemp("hostile")
    for number, name in enumerate([*sorted(sys.stdlib_module_names), *ELSEWHERE]):
        path = folder / f"{name}.py"
        if number % 3 == 1:
            (folder / name).mkdir()
            path = folder / name / "__init__.py"
        path.write_text(f"open({str(folder / 'MARK')!r}, 'a').write({name!r} + ' ')\n")
    (folder / "run" / "record").mkdir(parents=True)
    (folder / "run" / "record" / "run.json").write_text('{"starts": [{}], "logs": []}')
    (folder / "hostile_folder_parts.py").write_text(
        "import own_helper\nfrom opsd_lightning import LiveTeacher\nclass MyTeacher(LiveTeacher):\n    'Mine.'\n"
    )
    (folder / "own_helper.py").write_text("")
    (folder / "own.yaml").write_text("model: {init_args: {teacher: {class_path: hostile_folder_parts.MyTeacher}}}\n")
    return folder


def opsd(folder: Path, *words: str, path: str = str(ROOT), module: bool = False, status: int = 0) -> str:
    """Run the command as its script does: the script's own folder is first on the path."""
    script = folder.parent / "bin" / "opsd"
    script.parent.mkdir(exist_ok=True)
    script.write_text("import sys\nfrom opsd_lightning.__main__ import entry\nsys.exit(entry())\n")
    command = [sys.executable, *(["-P", "-m", "opsd_lightning"] if module else [str(script)]), *words]
    environment = os.environ | {"PYTHONPATH": path, "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True, timeout=400)
    mark = folder / "MARK"
    assert not mark.exists(), f"imported from the folder: {mark.read_text()}"
    assert done.returncode == status, done.stderr
    return done.stdout + done.stderr


@pytest.mark.parametrize("module", [False, True])
def test_report_imports_nothing_from_the_folder(hostile: Path, module: bool) -> None:
    assert "report.html" in opsd(hostile, "report", "run", module=module)


def test_named_part_is_the_only_import_from_the_folder(hostile: Path) -> None:
    """Named in YAML, it is imported from there, and nothing that the environment has."""
    assert "hostile_folder_parts.MyTeacher" in opsd(hostile, "fit", "--config", "own.yaml", "--print_config")


@pytest.mark.slow
@pytest.mark.parametrize("words", [["--version"], ["--help"], ["fit", "--print_config"], ["fit", "--help"]])
def test_other_commands_in_a_hostile_folder(hostile: Path, words: list[str]) -> None:
    opsd(hostile, *words)


@pytest.mark.slow
def test_the_doctor_in_a_hostile_folder(hostile: Path) -> None:
    assert "to fix" in opsd(hostile, "doctor", "--no-model", "--model.policy.model=absent", status=1)


# -- in this process -----------------------------------------------------------------------------------------------------


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("PYTHONPATH", raising=False)
    monkeypatch.setenv("PYTHONSAFEPATH", "")  # is put back at the end
    monkeypatch.delenv("PYTHONSAFEPATH")
    monkeypatch.setattr(sys, "path", [entry for entry in sys.path if entry not in ("", str(tmp_path))])
    return tmp_path


@pytest.mark.skipif(sys.flags.safe_path, reason="the interpreter leaves the folder out by itself")
@pytest.mark.parametrize(
    ("entry", "variable", "stays"), [("", None, False), (".", None, False), ("here", None, False), ("here", ".", True)]
)
def test_the_interpreters_entry_goes(
    here: Path, monkeypatch: pytest.MonkeyPatch, entry: str, variable: str | None, stays: bool
) -> None:
    first = str(here) if entry == "here" else entry
    sys.path.insert(0, first)
    if variable is not None:
        sys.path.insert(1, str(here))
        monkeypatch.setenv("PYTHONPATH", variable)
    before = list(sys.path)
    with without_current_folder():
        assert sys.path == (before[1:])
        assert (str(here) in sys.path) == stays
    assert sys.path == before


def test_processes_that_are_spawned_import_nothing_from_the_folder(here: Path) -> None:
    (here / "json.py").write_text("open('MARK', 'w').close()\n")
    with without_current_folder():
        subprocess.run([sys.executable, "-c", "import json"], check=True)
    assert not (here / "MARK").exists()


def test_removed_working_folder_is_tolerated(here: Path) -> None:
    gone = here / "gone"
    gone.mkdir()
    os.chdir(gone)
    gone.rmdir()
    with without_current_folder():
        add_current_folder(["fit", "--model=own.Part"])
    os.chdir(here)


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--model.teacher=my_own.Part"],
        ["fit", "--model.teacher", "my_own.inner.Part"],
        ["fit", '--trainer.callbacks=[{"class_path": "my_own.Part"}]'],
        ["fit", "--trainer.callbacks+=my_own.Part"],
        ["fit", "--config", "a.yaml"],
        ["fit", "--config=nested.yaml"],
        ["--config", "a.yaml", "fit"],
        ["fit", "--config", "sub/linked.yaml"],
    ],
)
def test_a_named_module_brings_the_folder_last(here: Path, words: list[str]) -> None:
    (here / "my_own.py").write_text("")
    (here / "a.yaml").write_text("model:\n  teacher:\n    class_path: my_own.Part\n")
    (here / "nested.yaml").write_text("model: a.yaml\n")
    (here / "sub").mkdir()
    (here / "sub" / "linked.yaml").write_text("model: ../a.yaml\n")
    before = list(sys.path)
    add_current_folder(words)
    assert sys.path == [*before, str(here)]


@pytest.mark.parametrize(
    "words",
    [
        ["fit", "--config", "config.yaml"],
        ["fit", "--data.train.init_args.path=data.jsonl"],
        ["fit", "--model=torch.optim.AdamW", "--trainer.logger=json.Thing"],
        ["fit", "--data.prompts.system=see notes. wandb is here"],
        ["fit", "--ckpt_path=runs/my.ckpt"],
        ["fit", "--config", "pipe", "--config", "folder", "--config", "absent.yaml", "--config", "binary"],
    ],
)
def test_nothing_else_brings_the_folder(here: Path, words: list[str]) -> None:
    for name in ("config", "torch", "json", "data", "my", "runs", "notes", "wandb", "opsd_lightning"):
        (here / f"{name}.py").write_text("")
    (here / "config.yaml").write_text(
        "# my.Part\ntrainer: {max_steps: 3}  # data.train: x\nmodel: opsd_lightning.OPSDModule\n"
    )
    (here / "folder").mkdir()
    (here / "binary").write_bytes(os.urandom(1000))
    os.mkfifo(here / "pipe")
    before = list(sys.path)
    add_current_folder(words)
    assert sys.path == before


@pytest.mark.parametrize("setting", ["fsmonitor", "hooks", "filter"])
def test_a_repository_whose_settings_name_commands(here: Path, monkeypatch: pytest.MonkeyPatch, setting: str) -> None:
    """A run asks git for the commit of its folder."""

    def git(*words: str) -> str:
        command = ["git", "-c", "user.name=a", "-c", "user.email=a@b.org", *words]
        return subprocess.run(command, check=True, capture_output=True, text=True).stdout.strip()

    git("init", "--quiet")
    (here / "file.txt").write_text("one")
    git("add", "file.txt")
    git("commit", "--quiet", "-m", "one")
    head = git("rev-parse", "HEAD")
    (here / "file.txt").write_text("two")
    assert git_commit() == f"{head} with uncommitted changes"
    script = here / "evil.sh"
    script.write_text("#!/bin/sh\ntouch MARK\ncat\n")
    script.chmod(0o755)
    if setting == "fsmonitor":
        git("config", "core.fsmonitor", str(script))
    elif setting == "hooks":
        (here / "hooks").mkdir()
        for name in ("post-index-change", "fsmonitor-watchman", "post-checkout"):
            (here / "hooks" / name).write_text(script.read_text())
            (here / "hooks" / name).chmod(0o755)
        git("config", "core.hooksPath", str(here / "hooks"))
    else:
        git("config", "filter.evil.clean", str(script))
        (here / ".gitattributes").write_text("* filter=evil\n")
    found = git_commit()
    assert found is not None and found.startswith(head) and not (here / "MARK").exists()
