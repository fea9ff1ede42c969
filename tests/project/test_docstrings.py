"""Docstrings of the package: their examples run, and each opens with what the object does or is."""

from __future__ import annotations

import ast
import doctest
import importlib
import pkgutil
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

import opsd_lightning
from helpers.paths import ROOT

PACKAGE = ROOT / "opsd_lightning"
FILES = sorted(PACKAGE.rglob("*.py"))
MODULES = sorted(
    name for _, name, _ in pkgutil.walk_packages(opsd_lightning.__path__, "opsd_lightning.") if not name.endswith("__main__")
)
QUESTION = re.compile(r"(What|Whether|Which|How|Of|Where|Why)\b")
LEAST_EXAMPLES = 20


def docstrings(text: str) -> Iterator[tuple[str, str]]:
    """Yield the name and docstring of a module and of every class and function in it."""
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)) and (
            found := ast.get_docstring(node)
        ):
            yield getattr(node, "name", "module"), found


def arguments(docstring: str) -> Iterator[tuple[str, str]]:
    """Yield the name and description of every entry of ``Args:``."""
    section = re.search(r"^Args:\n((?:[ ]{4}.*\n?|\n)+)", docstring, re.MULTILINE)
    if section:
        yield from re.findall(r"^[ ]{4}(\*{0,2}\w+)(?: \([^)]*\))?:\s+(.*)", section[1], re.MULTILINE)


@pytest.mark.parametrize("path", FILES, ids=lambda path: str(path.relative_to(PACKAGE)))
def test_docstrings_open_with_a_verb_or_a_noun(path: Path) -> None:
    found = list(docstrings(path.read_text(encoding="utf-8")))
    assert [name for name, text in found if QUESTION.match(text)] == []
    assert [(name, entry) for name, text in found for entry, said in arguments(text) if said.startswith("Of ")] == []


def test_wrong_docstrings_are_found() -> None:
    text = '"""Whether it is."""\ndef f(a):\n    """Return a.\n\n    Args:\n        a: Of the run.\n            More.\n        b: A number.\n    """\n'
    found = dict(docstrings(text))
    assert [name for name, docstring in found.items() if QUESTION.match(docstring)] == ["module"]
    assert list(arguments(found["f"])) == [("a", "Of the run."), ("b", "A number.")]


@pytest.mark.parametrize("name", MODULES)
def test_examples_run(name: str) -> None:
    found = doctest.testmod(importlib.import_module(name), optionflags=doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE)
    assert found.failed == 0


def test_classes_that_users_touch_first_have_an_example() -> None:
    parts = [getattr(opsd_lightning, name) for name in opsd_lightning.__all__ if name != "__version__"]
    shown = [part.__name__ for part in parts if isinstance(part, type) and ">>>" in (part.__doc__ or "")]
    assert len(shown) >= LEAST_EXAMPLES, shown
