"""Tests of the layers: units import only lower units, and the lowest import no framework."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from pathlib import Path

import pytest

import opsd_lightning
from helpers.paths import ROOT

PACKAGE = ROOT / "opsd_lightning"
# A unit is a subpackage or a module at the top. It imports units that stand before it.
UNITS = [
    "types",
    "utils",
    "grading",
    "losses",
    "prompts",
    "models",
    "checkpoints",
    "distributed",
    "runs",
    "teachers",
    "rollouts",
    "data",
    "evaluation",
    "methods",
    "callbacks",
    "reports",
    "cli",
    "doctor",
    "chat",
    "quickstart",
    "__main__",
]
FREE_OF_FRAMEWORKS = {"types", "grading", "losses", "prompts"}


def unit_of(path: Path) -> str:
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


MODULES = [path for path in sorted(PACKAGE.rglob("*.py")) if path != PACKAGE / "__init__.py"]


def imports(path: Path, top_level_only: bool = False) -> set[str]:
    tree = ast.parse(path.read_text(encoding="utf-8"))
    nodes = tree.body if top_level_only else list(ast.walk(tree))
    found: set[str] = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            assert node.level == 0, f"{path} has a relative import"
            found |= {f"{node.module}.{a.name}" for a in node.names} if node.module == "opsd_lightning" else {node.module}
    return found


def test_every_unit_has_a_layer() -> None:
    assert {unit_of(path) for path in MODULES} == set(UNITS)


@pytest.mark.parametrize("unit", UNITS)
def test_units_import_only_lower_units(unit: str) -> None:
    for path in MODULES:
        for module in imports(path) if unit_of(path) == unit else ():
            if module.startswith("opsd_lightning."):
                other = module.split(".")[1]
                assert other == "__version__" or UNITS.index(other) <= UNITS.index(unit), f"{path} imports {other}"


@pytest.mark.parametrize("unit", sorted(FREE_OF_FRAMEWORKS))
def test_lower_units_import_no_framework(unit: str) -> None:
    heavy = {"transformers", "peft", "lightning", "datasets", "bitsandbytes"}
    for path in MODULES:
        if unit_of(path) == unit:
            assert not {module.split(".")[0] for module in imports(path, top_level_only=True)} & heavy, path


def test_contributing_lists_every_unit_in_order() -> None:
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    assert re.findall(r"^\| `(\w+)/?` \|", text, re.MULTILINE) == UNITS


def test_the_package_alone_imports_nothing_heavy() -> None:
    code = "import sys, opsd_lightning; assert 'torch' not in sys.modules; print(opsd_lightning.__version__)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=ROOT)


def test_public_names_exist_and_are_documented() -> None:
    for name in opsd_lightning.__all__:
        part = getattr(opsd_lightning, name)
        assert name == "__version__" or (part.__doc__ and not part.__doc__.startswith(f"{name}(")), name


SANDBOXED = PACKAGE / "grading" / "sandbox_worker.py"  # executes the code of completions, as a script in a sandbox


def test_safe_by_default() -> None:
    for path in MODULES:
        text = path.read_text(encoding="utf-8")
        if path == SANDBOXED:
            text = text.replace("exec(code, namespace)", "")
        assert not re.search(r"\b(eval|exec)\(|pickle|weights_only=False", text.replace("model.eval()", "")), path


def test_the_docs_name_tests_that_exist() -> None:
    tests = "\n".join(path.read_text(encoding="utf-8") for path in (ROOT / "tests").rglob("test_*.py"))
    for path in [*(ROOT / "docs").glob("*.md"), ROOT / "README.md"]:
        for name in re.findall(r"\b(test_\w+)(?:\[[^\]]*\])?`", path.read_text(encoding="utf-8")):
            assert f"def {name}(" in tests or any((ROOT / "tests").rglob(f"{name}.py")), (path, name)


def test_test_files_share_code_only_through_helpers() -> None:
    for path in (ROOT / "tests").rglob("*.py"):
        modules = {module.split(".")[0] for module in imports(path)}
        assert not [name for name in modules if name in ("conftest", "tests") or name.startswith("test_")], path


def test_test_files_mirror_the_package() -> None:
    folders = {path.name for path in PACKAGE.rglob("*") if path.is_dir() and (path / "__init__.py").exists()}
    for path in (ROOT / "tests").rglob("test_*.py"):
        parts = path.relative_to(ROOT / "tests").parts[:-1]
        assert not parts or parts[0] in ("attacks", "device", "gpu", "project") or set(parts) <= folders, path
