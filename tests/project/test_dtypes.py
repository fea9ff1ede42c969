"""Test that the package's tensors do not take torch's default dtype, which a half precision of the trainer changes."""

from __future__ import annotations

import ast
from pathlib import Path

import pytest

from helpers.paths import ROOT

FACTORIES = {"zeros", "ones", "empty", "rand", "randn", "linspace", "logspace", "eye"}
MODULES = sorted((ROOT / "opsd_lightning").rglob("*.py"))


def without_dtype(source: str) -> list[int]:
    """Return the lines of calls of torch that make a floating-point tensor of the default dtype."""
    found = []
    for node in ast.walk(ast.parse(source)):
        if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute)):
            continue
        if not (isinstance(node.func.value, ast.Name) and node.func.value.id == "torch"):
            continue
        if any(keyword.arg == "dtype" for keyword in node.keywords):
            continue
        arguments = ast.dump(ast.Module([ast.Expr(arg) for arg in node.args], []))
        floats = "'float'" in arguments or any(
            isinstance(part, ast.Constant) and isinstance(part.value, float) for arg in node.args for part in ast.walk(arg)
        )
        if node.func.attr in FACTORIES or (node.func.attr in ("tensor", "full", "as_tensor", "arange") and floats):
            found.append(node.lineno)
    return found


@pytest.mark.parametrize("path", MODULES, ids=lambda path: str(path.relative_to(ROOT)))
def test_tensors_have_their_own_dtype(path: Path) -> None:
    assert without_dtype(path.read_text(encoding="utf-8")) == []


def test_calls_without_a_dtype_are_found() -> None:
    lines = [
        "torch.zeros(3)", "torch.zeros(3, dtype=torch.float32)", "torch.tensor([1.0])", "torch.tensor([1, 2])",
        "torch.tensor([float(x) for x in y])", "torch.full((2,), 0.5)", "torch.full((2,), 1)", "torch.zeros_like(x)",
    ]  # fmt: skip
    assert without_dtype("\n".join(lines)) == [1, 3, 5, 6]
