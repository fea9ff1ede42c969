"""Run all notebooks and store their outputs: ``make notebooks``.

The notebooks run in an empty folder, with SmolLM2-135M-Instruct on a CPU instead of larger models, for few steps. The stored
outputs are text and pictures, without the error stream, progress bars, execution times and local paths.
"""

from __future__ import annotations

import os
import re
import shutil
import sys
import tempfile
from pathlib import Path

import nbformat
from nbclient import NotebookClient

ROOT = Path(__file__).resolve().parents[1]
SETTINGS = {"OPSD_STEPS": "3", "OPSD_NEW_TOKENS": "32", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
MODEL = "runs/models/SmolLM2-135M-Instruct"


def execute(path: Path, folder: Path) -> None:
    """Run a notebook in a folder, and write it back with its outputs."""
    notebook = nbformat.read(path, as_version=4)
    place = {"metadata": {"path": str(folder)}}
    NotebookClient(notebook, timeout=1800, kernel_name="python3", coalesce_streams=True, resources=place).execute()
    for cell in notebook.cells:
        cell.metadata.pop("execution", None)
        if cell.cell_type == "code":
            cell.outputs = [clean(output, folder) for output in cell.outputs if output.get("name") != "stderr"]
    notebook.metadata["language_info"] = {"name": "python"}
    temporary = path.with_suffix(".tmp")
    nbformat.write(notebook, temporary)
    temporary.replace(path)


def clean(output: nbformat.NotebookNode, folder: Path) -> nbformat.NotebookNode:
    """Return an output without carriage returns, escape sequences and paths of this machine."""

    def plain(text: str) -> str:
        lines = [line.rpartition("\r")[2] for line in text.split("\n")]
        text = re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", "\n".join(lines))
        for place in (str(folder), str(ROOT), sys.prefix, str(Path.home())):
            text = text.replace(place, "...")
        return text

    if output.output_type == "stream":
        output.text = plain(output.text)
    for kind, value in output.get("data", {}).items():
        if kind.startswith("text/"):
            output.data[kind] = plain(value)
    return output


def main() -> None:
    model = ROOT / MODEL
    if not model.exists():
        raise SystemExit(f"error: {MODEL} is missing: run make quickstart first")
    asked = [Path(name) for name in sys.argv[1:]] or sorted((ROOT / "notebooks").glob("*.ipynb"))
    for path in asked:
        folder = Path(tempfile.mkdtemp(prefix="notebook-"))
        try:
            (folder / "runs").mkdir()
            (folder / "runs" / "models").symlink_to(model.parent)
            os.environ.update(SETTINGS, OPSD_MODEL=MODEL)
            execute(path.resolve(), folder)
        finally:
            shutil.rmtree(folder)
        print(f"{path.name} has its outputs", flush=True)


if __name__ == "__main__":
    main()
