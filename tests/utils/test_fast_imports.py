"""Imports that are deferred until a module is used."""

from __future__ import annotations

import gc
import sys
from pathlib import Path
from typing import Any

import pytest

from opsd_lightning.utils.fast_imports import deferred, fast_imports


@pytest.fixture
def library(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """A package that counts its imports."""
    name = "opsd_seldom_used"
    (tmp_path / name).mkdir()
    (tmp_path / name / "__init__.py").write_text(
        "import sys\nsys.modules.setdefault('opsd_imported', []).append(1)\nvalue = 3\n"
    )
    (tmp_path / name / "inner.py").write_text("value = 4\n")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(sys.modules, "opsd_imported", [])  # type: ignore[arg-type]
    yield name
    for module in [name, f"{name}.inner"]:
        sys.modules.pop(module, None)


def imports() -> int:
    return len(sys.modules["opsd_imported"])  # type: ignore[arg-type]


def test_a_deferred_module_is_imported_on_first_use(library: str) -> None:
    with deferred(library):
        module: Any = __import__(library)
    assert imports() == 0 and library not in sys.modules
    assert module.value == 3 and module.value == 3
    assert imports() == 1 and sys.modules[library].value == 3


def test_a_deferred_module_is_imported_with_its_submodule(library: str) -> None:
    with deferred(library):
        inner: Any = __import__(f"{library}.inner", fromlist=["value"])
    assert inner.value == 4 and imports() == 1


def test_inspecting_a_deferred_module_does_not_import_it(library: str) -> None:
    with deferred(library):
        module = __import__(library)
        assert not hasattr(module, "__file__")
        assert module.__spec__ is not None
    assert imports() == 0


def test_modules_imported_already_and_absent_ones_stay(library: str) -> None:
    module = __import__(library)
    with deferred(library), deferred("opsd_absent"):
        assert sys.modules[library] is module
        with pytest.raises(ModuleNotFoundError):
            __import__("opsd_absent")
    assert sys.modules[library] is module


def test_garbage_collection_is_on_again_after_an_error() -> None:
    def fail() -> None:
        with fast_imports():
            assert not gc.isenabled()
            raise ImportError

    with pytest.raises(ImportError):
        fail()
    assert gc.isenabled()
