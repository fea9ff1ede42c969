"""What README, documentation and notebooks' neighbours tell a reader to type, and where their links lead."""

from __future__ import annotations

import ast
import importlib.util
import re
import shlex
import textwrap
from collections.abc import Iterator
from pathlib import Path

import pytest

import opsd_lightning
from opsd_lightning.__main__ import COMMANDS

ROOT = Path(__file__).parents[1]
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", ROOT / "configs" / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
SUBCOMMANDS = {"fit", "validate", "test", "predict", *COMMANDS}
TARGETS = set(re.findall(r"^([\w-]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
pages = pytest.mark.parametrize("page", PAGES, ids=lambda path: str(path.relative_to(ROOT)))


def blocks(text: str, languages: set[str]) -> Iterator[str]:
    for match in re.finditer(r"^[ ]*```(\w*)\n(.*?)^[ ]*```", text, re.DOTALL | re.MULTILINE):
        if match[1] in languages:
            yield match[2]


def commands(text: str) -> Iterator[str]:
    """The commands of a page: lines of shell blocks, continued ones put together, and code in the text that begins as one."""
    for block in blocks(text, {"bash", "sh", "shell"}):
        for line in block.replace("\\\n", " ").splitlines():
            line = re.sub(r"(^|\s)#.*", "", line).strip()
            yield from (part.strip() for part in line.split("&&") if part.strip())
    yield from re.findall(r"`((?:opsd|make) [^`\n]+)`", text)


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
def test_commands(page: Path) -> None:
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
def test_python_is_python_and_its_imports_exist(page: Path) -> None:
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
def test_links(page: Path) -> None:
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
    listed = re.findall(r"^([\w/]+)$", (ROOT / "docs" / "index.md").read_text().split("{toctree}")[1], re.MULTILINE)
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - {"index"} == set(listed) - {"api/index"}
