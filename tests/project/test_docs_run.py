"""Tests that the commands, Python and YAML blocks of README and documentation run, on tiny models and few rows.

A short run made here stands for the placeholders CONFIG.yaml, CHECKPOINT and RUN. Settings that make a run small come last on
the command line; all other settings are used as the page gives them. The targets of `make` are not run (``.ci/run`` runs them).
Arguments of benchmarks are only parsed: ``test_benchmarks.py`` and ``test_learning.py`` run the scripts.
"""

from __future__ import annotations

import argparse
import importlib
import io
import json
import re
import runpy
import shlex
import shutil
import subprocess
import sys
import threading
import urllib.request
from collections.abc import Callable
from contextlib import redirect_stdout
from pathlib import Path
from typing import Any

import pytest
import yaml
from datasets import Dataset, DatasetDict

from helpers.configs import parsed, shrunk_skills
from helpers.files import write_jsonl
from helpers.pages import PAGES, blocks, commands
from helpers.paths import ROOT
from helpers.vllm_stand_in import VERSIONS, make_vllm
from opsd_lightning.__main__ import entry
from opsd_lightning.reports.loopback import LoopbackServer

pytestmark = [
    pytest.mark.integration,
    # The commands share one run, whose data other pages change.
    pytest.mark.filterwarnings("ignore:ckpt_path. "),
    # The control of a teacher that thinks and reads nothing else than the student (docs/reproducing.md).
    pytest.mark.filterwarnings("ignore:data.context is NoContext"),
]


CONFIG, QWEN = "configs/quickstart.yaml", "configs/qwen3_1.7b_qlora.yaml"
NOTEBOOKS = sorted((ROOT / "notebooks").glob("*.ipynb"))
HUB = "HuggingFaceTB/SmolLM2-135M-Instruct"


def _text(page: Path) -> str:
    return page.read_text(encoding="utf-8")


def _prose(notebook: Path) -> str:
    cells = json.loads(_text(notebook))["cells"]
    return "\n\n".join("".join(cell["source"]) for cell in cells if cell["cell_type"] == "markdown")


def everywhere(*starts: str, least: int = 3) -> list[str]:
    """Every command of all pages that begins so, once; not those that are only named (``opsd report``) or cut short."""
    found = dict.fromkeys(command for text in (*map(_text, PAGES), *map(_prose, NOTEBOOKS)) for command in commands(text))
    return [c for c in found if c.startswith(starts) and len(c.split()) >= least and not c.endswith((" ...", "--config"))]


def snippets(language: str) -> dict[str, str]:
    """Every block of a language, under its page and number."""
    found = {}
    for page in PAGES:
        for number, block in enumerate(blocks(_text(page), {language})):
            found[f"{page.stem}-{number}"] = "\n".join(
                line.removeprefix("  ") if block.startswith("  ") else line for line in block.splitlines()
            )
    return found


def opsd_commands() -> list[Any]:
    """Return every ``opsd`` command of all pages; of those that differ only in the folder they write to, the first.

    Marked slow are recipes without further settings, as test_configs.py trains a step of each, and trainings of a recipe with
    further settings outside the pages that a beginner follows. `test_other_trainings_parse` parses the latter.
    """
    found: dict[str, str] = {}
    for command in everywhere("opsd", "python cli.py"):
        same = command.replace("CONFIG.yaml", CONFIG).replace("RECIPE", QWEN)
        found.setdefault(re.sub(r" --trainer\.default_root_dir \S+$", "", same), command)
    recipe = re.compile(r"opsd fit --config configs/\w[\w.]*\.yaml")
    slow = {text for same, text in found.items() if recipe.fullmatch(same)} | {*OTHER_TRAININGS}
    return [pytest.param(text, id=text, marks=[pytest.mark.slow] * (text in slow)) for text in found.values()]


BEGINNERS_PAGES = [ROOT / "README.md", *(ROOT / "docs" / name for name in ("start.md", "commands.md"))]
OTHER_TRAININGS = [
    command
    for command in everywhere("opsd fit --config configs/quickstart.yaml", f"opsd fit --config {QWEN}")
    if not any(command in set(commands(_text(page))) for page in BEGINNERS_PAGES)
]
PYTHON, YAML = snippets("python"), snippets("yaml")
PARTS = {name: code for name, code in PYTHON.items() if code.startswith("# my_parts.py")}


def opsd(*words: str) -> None:
    """The command line's own door, in this process. Ends well, or raises."""
    before, path = sys.argv, list(sys.path)
    sys.argv = ["opsd", *words]
    try:
        entry()
    except SystemExit as end:
        if end.code not in (0, None):
            raise AssertionError(f"status {end.code}") from end
    finally:
        sys.argv, sys.path[:] = before, path
        sys.modules.pop("my_parts", None)  # another test's is another file


@pytest.fixture(scope="session")
def small(roomy: str, folders: dict[str, str], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], list[str]]:
    """The settings that make a command small, which depend on the recipe that it names and on what it sets itself."""
    folder = tmp_path_factory.mktemp("rows")
    rows = [{"problem": f"{n}+1?", "solution": rf"\boxed{{{n + 1}}}"} for n in range(8)]
    file = write_jsonl(folder / "rows.jsonl", rows)
    DatasetDict({"train": Dataset.from_list([{"problem": "1+1?", "answer": "2"}])}).save_to_disk(folder / "set")

    def settings(command: str) -> list[str]:
        qwen = "qwen3" in command
        found = [
            f"--model.policy.model={folders['qwen3'] if qwen else roomy}",
            "--data.eval_batch_size=2",
            "--model.sampling.max_new_tokens=8",
            "--model.eval_sampling.max_new_tokens=8",
            "--trainer.accelerator=cpu",
            "--trainer.max_steps=1",
            "--trainer.val_check_interval=1",
            *(f"--trainer.limit_{stage}_batches=2" for stage in ("val", "test", "predict")),
        ]
        if "--model.sampling.n" not in command:
            found += ["--data.batch_size=2"]
        if "mine.yaml" in command:
            wanted = ()
        elif qwen:
            wanted = ("train", "val") if "eval/" in command else ("train", "val", "test")
        else:
            sized = ("train", "val", "test")[: 1 if command == "full.yaml" else 2 if "eval/" in command else 3]
            found += [f"--data.{split}.init_args.size=8" for split in sized]
            wanted = ()
        for split in wanted:
            found += [f"--data.{split}=FileSource", f"--data.{split}.init_args.path={file}"]
            found += [f"--data.{split}.init_args.split={'train[4:]' if split == 'train' else 'train[:2]'}"]
        if "eval/" in command:
            found += [f"--data.test.init_args.path={folder / 'set'}", "--data.test.init_args.split=train"]
        return found

    return settings


@pytest.fixture(scope="session")
def trained(small: Callable[[str], list[str]], tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The folder of a short run of a recipe, made when it is first asked for."""
    made: dict[str, Path] = {}

    def run(recipe: str) -> Path:
        if recipe not in made:
            made[recipe] = folder = tmp_path_factory.mktemp("run")
            keep = ["--trainer.callbacks+=ModelCheckpoint", "--trainer.callbacks.filename=checkpoint"]
            keep += [f"--trainer.callbacks.dirpath={folder}", f"--trainer.default_root_dir={folder}"]
            keep += [] if "qwen3" in recipe else [f"--trainer.logger.init_args.save_dir={folder}"]
            opsd("fit", "--config", str(ROOT / recipe), *small(recipe), "--model.evaluate_teacher=true", *keep)
        return made[recipe]

    return run


def chat(number: int) -> list[dict[str, str]]:
    return [
        {"role": "system", "content": "You add."},
        {"role": "user", "content": f"{number}+1?"},
        {"role": "assistant", "content": rf"\boxed{{{number + 1}}}"},
    ]


@pytest.fixture
def desk(trained: Callable[[str], Path], roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder as a reader has it: the checkout's files, rows of one's own, parts of one's own, and runs."""
    for name in ("configs", "benchmarks"):
        (tmp_path / name).symlink_to(ROOT / name)
    for name in ("quickstart", "a", "b", "grpo", "sft", "reading", "qlora"):
        shutil.copytree(trained(CONFIG), tmp_path / "runs" / name)
    shutil.copytree(trained(QWEN), tmp_path / "runs" / "mine")  # as docs/start.md makes it
    (tmp_path / "runs" / "models").mkdir()
    (tmp_path / "runs" / "models" / "SmolLM2-135M-Instruct").symlink_to(roomy)
    rows = [{"problem": f"{n}+1?", "solution": rf"\boxed{{{n + 1}}}", "gold": str(n + 1)} for n in range(40)]
    write_jsonl(tmp_path / "questions.jsonl", rows)
    write_jsonl(tmp_path / "chats.jsonl", [{"messages": chat(n), "tools": None} for n in range(40)])
    (tmp_path / "solution.txt").write_text("1 + 1 = 2.", encoding="utf-8")
    (tmp_path / "my_parts.py").write_text("\n\n".join(PARTS.values()), encoding="utf-8")
    for notebook in NOTEBOOKS:
        for source in ("".join(cell["source"]) for cell in json.loads(_text(notebook))["cells"]):
            if named := re.match(r"%%writefile (\S+\.py)\n", source):
                (tmp_path / named[1]).write_text(source.partition("\n")[2], encoding="utf-8")
    for block in YAML.values():
        if named := re.match(r"# (\S+\.yaml)\n", block):
            (tmp_path / named[1]).write_text(block, encoding="utf-8")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def _one_visit(server: LoopbackServer) -> None:
    """Serve the page once, then end as Ctrl-C does."""
    thread = threading.Thread(target=server.handle_request)
    thread.start()
    page = urllib.request.urlopen(server.address, timeout=20).read()
    thread.join()
    assert b"<html" in page
    raise KeyboardInterrupt


@pytest.mark.parametrize("command", opsd_commands())
def test_opsd_commands_run(
    command: str,
    desk: Path,
    small: Callable[[str], list[str]],
    trained: Callable[[str], Path],
    roomy: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    for module, stand_in in make_vllm(VERSIONS[-1], []).items():
        monkeypatch.setitem(sys.modules, module, stand_in)
    recipe = QWEN if QWEN in command or "RECIPE" in command else CONFIG
    line = re.sub(r"\[[A-Z_]+ \.\.\.\]", "runs/b", command)  # more of the same
    for placeholder, meant in {
        "CONFIG.yaml": CONFIG,
        "RECIPE": QWEN,
        "RUN/checkpoint.ckpt": str(trained(recipe) / "checkpoint.ckpt"),
        "CHECKPOINT": str(trained(recipe) / "checkpoint.ckpt"),
        "RUN/record-1": "runs/a",
        "RUN/adapter": "runs/a/adapter",
        "RUN": "runs/a",
        "PAGE.html": "page.html",
        "OWNER/LARGER-MODEL": roomy,
    }.items():
        line = re.sub(rf"(?<![\w/]){re.escape(placeholder)}(?![\w/])", meant, line)
    if "kept_skills" in line:
        line = line.replace("configs/presets/kept_skills.yaml", str(shrunk_skills(desk)))
    line, _, target = line.partition(" > ")
    words = shlex.split(line)[1 if line.startswith("opsd") else 2 :]
    trains = words[0] != "show" and not any("help" in word or word == "--print_config" for word in words)
    if words[0] == "chat":
        words += ["--max_new_tokens=8"]
        monkeypatch.setattr(sys, "stdin", io.StringIO("1+1?\n"))
    elif words[0] == "show":
        words += ["--device=cpu"]
        monkeypatch.setattr(LoopbackServer, "serve_forever", _one_visit)
    elif trains and words[0] != "report":
        words += small(line)
        if "ckpt_path" in line and words[0] == "fit":
            # The run made here stands for the reader's own, with these settings.
            words += ["--trainer.max_steps=2", "--model.allow_checkpoint_changes=true"]
    printed, before = io.StringIO(), set(desk.rglob("*"))
    with redirect_stdout(printed):
        opsd(*words)
    made = {path.name for path in set(desk.rglob("*")) - before}
    left = {"fit": ".ckpt", "test": "test.jsonl", "predict": "predict.jsonl", "report": ".html"}
    if trains and words[0] in left:
        assert any(name.endswith(left[words[0]]) for name in made), made
    else:
        assert len(printed.getvalue()) > (0 if words[0] == "chat" else 100)
    if target:
        (desk / target).write_text(printed.getvalue(), encoding="utf-8")
        opsd("fit", "--config", target, *small(target), "--trainer.default_root_dir=printed")


@pytest.mark.parametrize("command", OTHER_TRAININGS)
def test_other_trainings_parse(command: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.syspath_prepend(desk)  # as the command does
    line = command.replace("OWNER/LARGER-MODEL", "model")
    config = parsed(shlex.split(line)[1:], monkeypatch)
    sys.modules.pop("my_parts", None)  # another test's is another file
    assert config["method"].startswith("opsd_lightning.")


@pytest.mark.parametrize("name", [name for name in PYTHON if name not in PARTS])
def test_python_blocks_run(name: str, desk: Path, roomy: str) -> None:
    assert "HuggingFaceTB" not in PYTHON[name].replace(HUB, "")
    exec(compile(PYTHON[name].replace(HUB, roomy), f"{name}.py", "exec"), {"__name__": name})


@pytest.mark.parametrize("name", PARTS)
def test_user_defined_parts_import_what_they_use(name: str) -> None:
    """Each names all that it uses."""
    names: dict[str, object] = {"__name__": "my_parts"}
    exec(compile(PARTS[name], "my_parts.py", "exec"), names)


@pytest.mark.parametrize("name", [name for name, block in YAML.items() if "VLLM" in block])
def test_server_yaml_parses(name: str, desk: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is parsed: a step of its own needs vLLM (rollouts/vllm/test_engines.py)."""
    (desk / "snippet.yaml").write_text(YAML[name], encoding="utf-8")
    config = parsed(["fit", f"--config={CONFIG}", "--config=snippet.yaml"], monkeypatch)
    assert "VLLM" in config["model"]["rollouts"]["class_path"]


def merged(one: Any, other: Any) -> Any:
    """Return both configurations in one, with the callbacks of both; None if they set the same setting."""
    if isinstance(one, dict) and isinstance(other, dict):
        found = one | other
        for name in one.keys() & other.keys():
            found[name] = merged(one[name], other[name])
        return None if None in [found[name] for name in one.keys() & other.keys()] else found
    if isinstance(one, list) and isinstance(other, list):
        return None if {each["class_path"] for each in one} & {each["class_path"] for each in other} else one + other
    return None


def yaml_together() -> dict[str, dict[str, Any]]:
    """Return the YAML blocks of all pages, those that set different things in one, under the names of all."""
    groups: list[tuple[list[str], dict[str, Any]]] = []
    for name, block in YAML.items():
        if "VLLM" in block:
            continue
        config = yaml.safe_load(block)
        if "callbacks+" in (trainer := config.get("trainer", {})):
            trainer["callbacks"] = trainer.pop("callbacks+")
        for number, (names, others) in enumerate(groups):
            if (both := merged(others, config)) is not None:
                groups[number] = ([*names, name], both)
                break
        else:
            groups.append(([name], config))
    order = {"Health": 0, "RunReport": 2}  # the guard reads the values of the first, the report those of all
    for _, config in groups:
        callbacks = config.get("trainer", {}).get("callbacks", [])
        callbacks.sort(key=lambda callback: order.get(callback["class_path"], 1))
    return {" ".join(names): config for names, config in groups}


YAML_TOGETHER = yaml_together()


@pytest.mark.parametrize("names", YAML_TOGETHER)
def test_yaml_blocks_train_a_step(names: str, desk: Path, small: Callable[[str], list[str]]) -> None:
    """Laid over the quick start."""
    config = YAML_TOGETHER[names]
    (desk / "snippet.yaml").write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
    settings = small("mine.yaml" if "train" in config.get("data", {}) else "")
    opsd("fit", "--config", CONFIG, "--config", "snippet.yaml", *settings, "--trainer.default_root_dir=snippet")


class _Parsed(Exception):
    pass


@pytest.mark.parametrize("command", everywhere("python benchmarks", "python -m benchmarks"))
def test_benchmark_arguments_parse(command: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """They are its own; what it does with them is run elsewhere."""
    original = argparse.ArgumentParser.parse_args

    def parse_args(self: argparse.ArgumentParser, args: list[str] | None = None, namespace: object = None) -> None:
        original(self, args)
        raise _Parsed

    monkeypatch.setattr(argparse.ArgumentParser, "parse_args", parse_args)
    monkeypatch.syspath_prepend(str(ROOT / "benchmarks"))
    words = shlex.split(command)
    if words[1] == "-m":
        monkeypatch.setattr(sys, "argv", words[2:])
        module = importlib.import_module(words[2])
        program = module if hasattr(module, "main") else importlib.import_module(f"{words[2]}.__main__")
        with pytest.raises(_Parsed):
            program.main()
    else:
        monkeypatch.setattr(sys, "argv", words[1:])
        with pytest.raises((_Parsed, SystemExit)) as end:
            runpy.run_path(str(ROOT / words[1]), run_name="__main__")
        assert end.type is _Parsed or end.value.code == 0  # --help


@pytest.mark.parametrize("command", everywhere("make ", least=2))
def test_make_targets_exist(command: str) -> None:
    subprocess.run(
        [*command.partition(" ARGS")[0].split(), "--dry-run"], cwd=ROOT, check=True, capture_output=True, timeout=60
    )


def test_named_metrics_are_logged(trained: Callable[[str], Path]) -> None:
    """Every metric that a page names is one of the quick start's run, or of another method's, in whose file it stands."""
    (log,) = trained(CONFIG).rglob("metrics.csv")
    logged = set(log.read_text(encoding="utf-8").splitlines()[0].split(","))
    source = "".join(path.read_text(encoding="utf-8") for path in (ROOT / "opsd_lightning").rglob("*.py"))
    pages = "".join(map(_text, PAGES))
    named = set(re.findall(r"`((?:train|val|health|time)/[\w@]+)`", pages))
    assert len(named) > 20
    # Of other methods, of callbacks that were not there, and of completions that ended or are right, of which there may be none.
    elsewhere = {"context_missing_fraction", "importance_ratio", "clipped_fraction", "terminated_tokens"}
    elsewhere |= {"update_ratio", "update_ratio_max", "update_ratio_clipped"}
    elsewhere |= {"rollout_logprob_difference", "teacher_gap_correct", "selected_fraction"}
    assert all(re.search(rf'[/"]{name}["{{]', source) or f'"{name}"' in source for name in elsewhere)
    logged |= {f"{stage}/{name}" for stage in ("train", "health") for name in elsewhere}
    logged |= {"val/nll", "val/divergence"}  # of data without answers (tests/evaluation/test_demonstrations.py)
    # MLflow's name, other k, and a ratio to tokens of style, which no single character is.
    other_k = {"val/avg@k", "val/pass@k", "val/maj@k", "val/avg@4"}
    assert named - logged <= {"val/avg1", "health/forward_kl_style_over_math", *other_k}
