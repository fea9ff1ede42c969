"""Tests of the commands, links, settings and classes that README and documentation name."""

from __future__ import annotations

import ast
import importlib.util
import inspect
import re
import runpy
import shlex
import textwrap
from pathlib import Path
from typing import Any, get_args, get_type_hints

import pytest
from lightning.pytorch import Trainer
from transformers import TrainingArguments

import opsd_lightning
import opsd_lightning.cli.command  # every class that YAML may name
from helpers.pages import PAGES, blocks, commands
from helpers.paths import ROOT
from opsd_lightning.cli.commands import COMMANDS
from opsd_lightning.data.datamodule import OPSDDataModule
from opsd_lightning.methods.base import PolicyModule

pytestmark = pytest.mark.filterwarnings("ignore:You are importing from 'trl.experimental':UserWarning")


SUBCOMMANDS = set(COMMANDS)
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def site() -> dict[str, Any]:
    """Return the names of the site's configuration."""
    return runpy.run_path(str(ROOT / "docs" / "conf.py"))


def mistake(command: str) -> str | None:
    """What is wrong with a command, as far as it can be told without running it."""
    words = [word for word in shlex.split(command) if not re.fullmatch(r"[A-Z_]+=.*", word) or command.startswith("make")]
    if not words:
        return None
    if words[0] == "make" and (names := [w for w in words[1:] if "=" not in w]) and names[0] not in TARGETS:
        return f"no target {names[0]} in the Makefile"
    if (words[0] == "opsd" or words[:2] == ["python", "cli.py"]) and len(words) > 1:
        name = words[1 if words[0] == "opsd" else 2]
        if not name.startswith(("-", "<")) and name not in SUBCOMMANDS:
            return f"no command opsd {name}"
    for word in words:
        path = word.split("=")[-1]
        if re.fullmatch(r"(configs|benchmarks|tests|notebooks|docs)/[\w./-]+\.\w+", path) and not (ROOT / path).exists():
            return f"no file {path}"
    if "-m" in words and words[0].startswith("python"):
        module = words[words.index("-m") + 1]
        if module.split(".")[0] in ("benchmarks", "opsd_lightning") and importlib.util.find_spec(module) is None:
            return f"no module {module}"
    return None


@pages
def test_commands_name_existing_files_and_targets(page: Path) -> None:
    assert {c: wrong for c in commands(page.read_text(encoding="utf-8")) if (wrong := mistake(c))} == {}


@pytest.mark.parametrize(
    "command",
    [
        "make nothing",
        "opsd train --config x.yaml",
        "opsd fit --config configs/none.yaml",
        "python benchmarks/none.py",
        "python -m benchmarks.learning.none",
    ],
)
def test_a_wrong_command_is_found(command: str) -> None:
    assert mistake(command) is not None


@pages
def test_python_blocks_parse_and_import_public_names(page: Path) -> None:
    for block in blocks(page.read_text(encoding="utf-8"), {"python"}):
        for node in ast.walk(ast.parse(textwrap.dedent(block), str(page))):
            if isinstance(node, ast.ImportFrom) and node.module == "opsd_lightning":
                assert [alias.name for alias in node.names if not hasattr(opsd_lightning, alias.name)] == []


def anchors(page: Path) -> set[str]:
    """Of a page's headings, as GitHub and the site make them."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    return {
        re.sub(r"[^\w\- ]", "", h.lower()).strip().replace(" ", "-") for h in re.findall(r"^#+ (.*)$", text, re.MULTILINE)
    }


@pages
def test_links_lead_to_files_and_headings(page: Path) -> None:
    text = re.sub(r"```.*?```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL)
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        if link.startswith(("http://", "https://")):
            continue
        path, _, anchor = link.partition("#")
        target = (page.parent / path).resolve() if path else page
        assert target.exists(), f"{page.name}: {link}"
        if anchor:
            assert anchor in anchors(target), f"{page.name}: {link}"


def test_every_page_is_in_the_site() -> None:
    trees = re.findall(r"```{toctree}\n(.*?)```", (ROOT / "docs" / "index.md").read_text(), re.DOTALL)
    listed = [page for tree in trees for page in re.findall(r"^([\w/]+)$", tree, re.MULTILINE)]
    own = {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"}
    made = {f"project/{Path(name).stem}" for name in site()["PROJECT_PAGES"].values()} | {"project/config_files"}
    assert set(listed) == own | made | {"api/index"} and len(listed) == len(set(listed))


def test_links_between_files_become_links_between_pages() -> None:
    linked, docs = site()["linked"], ROOT / "docs"
    assert linked("[Run it](gpu.md#check)", Path("docs"), docs) == "[Run it](gpu.md#check)"
    assert linked("[All](../configs/README.md)", Path("docs"), docs) == "[All](project/configs.md)"
    assert linked("[Scale](docs/scaling.md)", Path("."), docs / "project") == "[Scale](../scaling.md)"
    assert linked("[Scale](../docs/scaling.md#a)", Path("configs"), docs / "project") == "[Scale](../scaling.md#a)"
    assert (
        linked("[first](notebooks/01_opsd_from_scratch.ipynb)", Path("."), docs)
        == "[first](project/01_opsd_from_scratch.ipynb)"
    )
    assert linked("![x](images/tokens.png)", Path("docs"), docs) == "![x](images/tokens.png)"
    assert linked("[the test](../tests/conftest.py)", Path("docs"), docs) == "the test (`tests/conftest.py`)"
    assert (
        linked("[paper](https://arxiv.org/abs/2601.18734)", Path("docs"), docs)
        == "[paper](https://arxiv.org/abs/2601.18734)"
    )


def classes_of(hint: Any) -> list[type]:
    """The classes that a setting of this type may name, with all that derive from them; none for numbers and the like."""
    if isinstance(hint, type):
        own = [hint] if hint.__module__.startswith("opsd_lightning.") else []
        return own + [each for sub in hint.__subclasses__() if own for each in classes_of(sub)]
    return [each for argument in get_args(hint) for each in classes_of(argument)]


def is_setting(name: str) -> bool:
    """Whether a dotted name leads from the module, the data module or the trainer to a setting of some class."""
    root, *parts = name.split(".")
    found: list[type] = {"model": classes_of(PolicyModule), "data": [OPSDDataModule], "trainer": [Trainer]}[root]
    for part in parts:
        if part in ("class_path", "init_args"):
            continue
        kinds = [get_type_hints(kind.__init__)[part] for kind in found if part in inspect.signature(kind).parameters]
        if not kinds:
            return False
        found = [each for kind in kinds for each in classes_of(kind)]
        if not found and part != parts[-1]:  # somebody else's class, such as an optimizer, or a mapping
            return True
    return True


SHORT = {"objective.": "model.objective.init_args.", "rollouts.": "model.rollouts.init_args."}  # of docs/coming_from.md


def named(page: Path) -> set[str]:
    """Every setting that a page names, in full."""
    text = re.sub(r"^```.*?^```", "", page.read_text(encoding="utf-8"), flags=re.DOTALL | re.MULTILINE)
    short = "|".join(map(re.escape, SHORT)) if page.name == "coming_from.md" else "(?!)"
    found = re.findall(rf"`(?:--)?((?:model\.|data\.|trainer\.|{short})[a-z_.]+[a-z])(?=[`:\s\[])", text)
    return {next((SHORT[s] + name.removeprefix(s) for s in SHORT if name.startswith(s)), name) for name in found}


@pages
def test_named_settings_exist(page: Path) -> None:
    assert [name for name in sorted(named(page)) if not is_setting(name)] == []


#: Where a class that a page names may be, if it is none of the package's public ones.
ELSEWHERE = ("lightning.pytorch", "lightning.pytorch.callbacks", "lightning.pytorch.loggers", "lightning.pytorch.strategies",
             "lightning.pytorch.plugins", "transformers", "peft", "trl", "trl.experimental.sdft", "trl.experimental.sdpo", "torch.optim",
             "torch.optim.lr_scheduler", "bitsandbytes.optim", "opsd_lightning.methods.base", "opsd_lightning.prompts.templates")  # fmt: skip


@pages
def test_named_classes_exist(page: Path) -> None:
    page_text = page.read_text(encoding="utf-8")
    own = set(re.findall(r"^class (\w+)", page_text, re.MULTILINE))
    text = re.sub(r"^```.*?^```", "", page_text, flags=re.DOTALL | re.MULTILINE)
    words = set(re.findall(r"`(?:[a-z_.]+: )?([A-Z][A-Za-z0-9]*)(?:\([^`]*\))?`", text))
    names = {word for word in words if not word.isupper() and sum(letter.isupper() for letter in word) > 1}
    assert page.stem != "choosing" or len(names) > 15  # they are found
    unknown = {name for name in names - own if not hasattr(opsd_lightning, name)}
    assert {name for name in unknown if not any(hasattr(importlib.import_module(m), name) for m in ELSEWHERE)} == set()


@pytest.mark.parametrize(
    "name", ["model.nothing", "model.teacher.init_args.nothing", "data.context.init_args.decay", "trainer.x"]
)
def test_a_wrong_setting_is_found(name: str) -> None:
    assert (
        not is_setting(name) and is_setting("model.teacher.init_args.decay") and is_setting("model.optimizer.init_args.lr")
    )


def test_trl_names_and_defaults_are_current() -> None:
    """Every name in the left column of docs/coming_from.md is a setting of TRL's trainer, with the default that is told of."""
    sdft = pytest.importorskip("trl.experimental.sdft", reason="TRL is one of the extra dev")
    sdpo = pytest.importorskip("trl.experimental.sdpo", reason="TRL is one of the extra dev")
    _, own, feedback, _ = (ROOT / "docs" / "coming_from.md").read_text().split("## From")
    names, others = (
        {
            name
            for line in text.split("### Forms of data")[0].splitlines()
            if line.startswith("| `") and "(of the trainer)" not in line.split("|")[1]
            for name in re.findall(r"`(\w+)`", line.split("|")[1])
        }
        for text in (own, feedback)
    )
    fields, common = set(sdft.SDFTConfig.__dataclass_fields__), set(TrainingArguments.__dataclass_fields__)
    assert names <= fields and fields - common <= names
    assert set(sdpo.SDPOConfig.__dataclass_fields__) - common - fields == others
    assert "peft_config" in inspect.signature(sdft.SDFTTrainer.__init__).parameters
    assert "reward_funcs" in inspect.signature(sdpo.SDPOTrainer.__init__).parameters
    assert sdft.SDFTConfig.__dataclass_fields__["teacher_update_rate"].default == 0.05
    changed = {"distillation_mode": "sampled_token", "distillation_alpha": 1.0, "teacher_model_kind": "ema"}
    assert {name: sdpo.SDPOConfig.__dataclass_fields__[name].default for name in changed} == changed
