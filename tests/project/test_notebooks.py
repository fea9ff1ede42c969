"""Tests that every notebook runs from top to bottom on a tiny model, with the results that it states."""

from __future__ import annotations

import ast
import json
import re
import sys
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

import nbformat
import pytest
import torch
from IPython.core.interactiveshell import InteractiveShell
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError
from safetensors.torch import load_file
from traitlets.config import Config

from helpers.paths import ROOT
from opsd_lightning.data.drop_reasons import DropReason

pytestmark = [
    pytest.mark.integration,
    # The first notebook compares two steps with a learning rate of 0.
    pytest.mark.filterwarnings("ignore::UserWarning:opsd_lightning.methods.optimization"),
]


FOLDER = ROOT / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))


@pytest.fixture
def settings(roomy: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What a reader would set, made tiny, and an empty folder to work in."""
    values = {"OPSD_MODEL": roomy, "OPSD_STEPS": "3", "OPSD_NEW_TOKENS": "16", "MPLBACKEND": "agg"}
    for name, value in values.items():
        monkeypatch.setenv(name, value)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run(path: Path) -> dict[str, Any]:
    """Run a notebook's cells in this process, which has all libraries loaded, as IPython does. Returns its names."""
    module = ModuleType(path.stem)  # a name of its own, so that pytest's own __main__ stays
    shell = InteractiveShell(user_module=module, config=Config({"HistoryManager": {"enabled": False}}))
    for number, cell in enumerate(nbformat.read(path, as_version=4).cells):
        if cell.cell_type == "code":
            result = shell.run_cell(cell.source)
            error = result.error_before_exec or result.error_in_exec
            if error is not None:
                raise AssertionError(f"{path.name}, cell {number}: {type(error).__name__}: {error}") from error
    return vars(module)


@pytest.mark.usefixtures("plain_four_bits")
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run(
    path: Path, settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(sys, "argv", ["pytest"])
    monkeypatch.syspath_prepend(settings)  # as Jupyter has the notebook's folder
    before = set(sys.modules)
    try:
        names = run(path)
    finally:
        for name in set(sys.modules) - before:
            if name == path.stem or str(getattr(sys.modules[name], "__file__", None) or "").startswith(str(settings)):
                del sys.modules[name]
    CHECKS[path.stem](names, "".join(capsys.readouterr()), settings)


def test_reading_notebook_runs_on_a_users_run(
    settings: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The third notebook made a run; told of it, it reads it and trains nothing."""
    path = FOLDER / "03_reading_a_run.ipynb"
    first = run(path)
    monkeypatch.setenv("OPSD_RUN", str(settings / "runs" / "reading"))
    monkeypatch.setenv("OPSD_MODEL", "nowhere/no-model")
    monkeypatch.chdir(settings / "runs")
    second = run(path)
    del sys.modules[path.stem]
    assert [tuple(token) for token in second["tokens"]] == [tuple(token) for token in first["tokens"]]
    assert second["run"].train == first["run"].train and second["trainer"].global_step == 0


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_run_in_jupyter(path: Path, settings: Path) -> None:
    """The same in a kernel of its own, which takes longest to import the libraries."""
    notebook = nbformat.read(path, as_version=4)
    try:
        NotebookClient(
            notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(settings)}}
        ).execute()
    except CellExecutionError as error:
        pytest.fail(f"{path.name}: {error}")
    assert any(cell.get("outputs") for cell in notebook.cells)


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebooks_are_kept_clean(path: Path) -> None:
    """Valid, with outputs that show no error and no path, of short cells, and by the public names alone."""
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    public = __import__("opsd_lightning").__all__
    for number, cell in enumerate(notebook.cells):
        where = f"{path.name}, cell {number}"
        if cell.cell_type != "code":
            continue
        assert not any(output.output_type == "error" or output.get("name") == "stderr" for output in cell.outputs), where
        assert len(cell.source.splitlines()) <= (60 if "reference" in cell.metadata.get("tags", []) else 40), where
        code = "\n".join(line for line in cell.source.splitlines() if not line.startswith(("%", "!")))
        if cell.source.startswith("%%writefile") and ".py" not in cell.source.splitlines()[0]:
            continue
        for node in ast.walk(ast.parse(code)):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("opsd_lightning"):
                assert node.module in ("opsd_lightning", "opsd_lightning.cli.command"), where
                assert {alias.name for alias in node.names} <= {*public, "main"}, where
            if isinstance(node, ast.Attribute) and ast.unparse(node.value) != "self":
                assert not node.attr.startswith("_") or node.attr.startswith("__"), f"{where}: {node.attr} is private"
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1)), "run: make notebooks"
    shown = json.dumps([cell.outputs for cell in cells])
    assert len(shown) > 200 and not re.search(r"/(home|root|tmp|work|usr)/", shown), "run: make notebooks"
    text = "".join(cell.source for cell in notebook.cells if cell.cell_type == "markdown")
    assert "**What you will see**" in text


def test_a_broken_cell_is_named(tmp_path: Path) -> None:
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_markdown_cell("# A"), nbformat.v4.new_code_cell("a = 1"), nbformat.v4.new_code_cell("a / 0")]
    )
    nbformat.write(notebook, tmp_path / "broken.ipynb")
    with pytest.raises(AssertionError, match=r"broken\.ipynb, cell 2: ZeroDivisionError"):
        run(tmp_path / "broken.ipynb")
    del sys.modules["broken"]


def test_the_algorithm_is_under_a_hundred_lines() -> None:
    """Lines of code, without blank ones and comments; docstrings count."""
    cells = nbformat.read(FOLDER / "01_opsd_from_scratch.ipynb", as_version=4).cells
    (cell,) = [cell for cell in cells if "reference" in cell.metadata.get("tags", [])]
    lines = [line for line in cell.source.splitlines() if line.strip() and not line.strip().startswith("#")]
    assert "opsd_lightning" not in cell.source
    assert len(lines) < 100


def from_scratch(names: dict[str, Any], printed: str, folder: Path) -> None:
    assert "step 2:" in printed
    # Again, and closer than the notebook asks for a model of any size; both factors of the adapter have a gradient.
    assert names["package"].loss == pytest.approx(names["loss"], rel=1e-5)
    torch.testing.assert_close(names["package"].gradient, names["gradient"], atol=1e-6, rtol=1e-3)
    trained = [(name, p.grad) for name, p in names["model"].named_parameters() if p.requires_grad]
    assert all(bool(grad.any()) for _, grad in trained) and any("lora_A" in name for name, _ in trained)


def qlora(names: dict[str, Any], printed: str, folder: Path) -> None:
    run = folder / "runs" / "qlora"
    weights = load_file(run / "adapter" / "adapter_model.safetensors")
    assert any(bool(value.any()) for name, value in weights.items() if "lora_B" in name)  # it learned something
    assert (run / "report.html").exists() and str(DropReason.WRONG_ANSWER) in printed
    assert names["data"].dropped["train"].total() == 1  # the row with the mistake, and no other
    assert names["plain"].base_model.model.model.layers[0].mlp.up_proj.base_layer.weight.dtype == torch.uint8
    assert names["apart"] == pytest.approx(0, abs=1e-4)  # in float32


def reading(names: dict[str, Any], printed: str, folder: Path) -> None:
    assert (folder / "runs" / "reading" / "report.html").exists()
    assert [point.step for point in names["run"].validations] == [0, 3] and len(names["run"].train) == 3
    assert {token.step for token in names["tokens"]} == {1, 2, 3}
    # Of the page's steps each mean, not the last alone, is what was logged.
    for point in names["run"].train:
        shown = [token.kl for token in names["tokens"] if token.step == point.step]
        assert sum(shown) / len(shown) == pytest.approx(point.values["train/forward_kl"], rel=2e-3)
    assert (
        len(names["verdicts"]) == 6
        and len(names["health"]) == 3
        and "trace_overlap" in printed
        and len(names["figure"].axes) == 6
    )
    assert all(len(axis.lines[0].get_xdata()) == 3 for axis in names["figure"].axes)


def own_parts(names: dict[str, Any], printed: str, folder: Path) -> None:
    assert "0.20122302 and 0.20122302" in printed  # by hand, in float64
    assert "gradcheck: True" in printed and names["status"] == 2
    assert {path.name for path in (folder / "runs" / "own").iterdir()} >= {
        "divergence",
        "sharp",
        "context",
        "callback",
        "yaml",
    }
    assert "temperature" in printed[printed.rindex("error: ") :]  # what the mistake was
    assert len(names["measured"](names["read_run"]("runs/own/yaml"), "concentration")) == 2


#: What is looked at beside a notebook's own assertions: its names, what it printed, its folder.
CHECKS: dict[str, Callable[[dict[str, Any], str, Path], None]] = {
    "01_opsd_from_scratch": from_scratch,
    "02_qlora_on_one_gpu": qlora,
    "03_reading_a_run": reading,
    "04_your_own_parts": own_parts,
}
