"""Measure the structure of the package: modules, imports, public names, and the files that one training step passes through.

    python benchmarks/structure.py                     this tree
    python benchmarks/structure.py --tree ../before    another checkout, such as `git worktree add ../before COMMIT` makes

A unit is a subpackage or a module at the top of the package. The last row is of one ``training_step`` of OPSD on a random
two-layer model: the pairs of files of which one calls the other, and the calls between the files of the method and of its
base class, in each direction.
"""

from __future__ import annotations

import argparse
import ast
import subprocess
import sys
import tempfile
from collections import Counter
from pathlib import Path
from typing import Any

STEP = Path(__file__).with_name("structure_step.py")


def modules(package: Path) -> dict[str, Path]:
    """Return the modules of a package by dotted name, without that of the package itself."""
    found = {}
    for path in sorted(package.rglob("*.py")):
        name = ".".join(path.relative_to(package).with_suffix("").parts).removesuffix("__init__").rstrip(".")
        if name:
            found[name] = path
    return found


def imports(path: Path, known: set[str]) -> set[str]:
    """Return the modules of the package that a file imports, by dotted name."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        names: list[str] = []
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "opsd_lightning":
            inner = node.module.partition(".")[2]
            names = [f"{inner}.{alias.name}".lstrip(".") for alias in node.names] + [inner]
        elif isinstance(node, ast.Import):
            names = [alias.name.partition(".")[2] for alias in node.names if alias.name.startswith("opsd_lightning.")]
        found |= {name for name in names if name in known}
    return found


def lines(paths: list[Path]) -> int:
    return sum(len(path.read_text(encoding="utf-8").splitlines()) for path in paths)


def upward(edges: Counter[tuple[str, str]]) -> int:
    """Return the number of imports that no order of the units avoids: those within cycles of units."""
    left = {unit for edge in edges for unit in edge}
    while True:
        below = {unit for unit in left if not any(a == unit and b in left for a, b in edges)}
        if not below:
            break
        left -= below
    return sum(count for (a, b), count in edges.items() if a in left and b in left)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tree", type=Path, default=Path(__file__).parents[1], help="the checkout to measure")
    tree = parser.parse_args().tree.resolve()
    package = tree / "opsd_lightning"
    found = modules(package)
    code = {name: path for name, path in found.items() if path.name != "__init__.py"}
    folders = Counter(path.parent.relative_to(package).as_posix() for path in code.values())
    pairs = {(name, other) for name, path in code.items() for other in imports(path, set(code)) if other != name}
    edges = Counter((a.split(".")[0], b.split(".")[0]) for a, b in pairs)
    between: Counter[tuple[str, str]] = Counter({edge: count for edge, count in edges.items() if edge[0] != edge[1]})
    names = subprocess.run(
        [sys.executable, "-c", "import opsd_lightning; print(len(opsd_lightning.__all__))"],
        cwd=tree, check=True, capture_output=True, text=True,
    ).stdout  # fmt: skip
    with tempfile.TemporaryDirectory() as folder:
        step = subprocess.run(
            [sys.executable, str(STEP), str(tree), folder], cwd=tree, check=True, capture_output=True, text=True
        ).stdout.splitlines()[-1]
    rows: dict[str, Any] = {
        "modules": len(code),
        "units": len({name.split(".")[0] for name in code}),
        "most modules in a folder": f"{max(folders.values())} ({folders.most_common(1)[0][0]})",
        "imports between modules": len(pairs),
        "imports between units (pairs)": len(between),
        "imports in cycles of units": upward(between),
        "lines of the package": lines(list(found.values())),
        "lines of the tests": lines(sorted((tree / "tests").rglob("*.py"))),
        "public names": int(names),
        "calls between files in a step": step,
    }
    for name, value in rows.items():
        print(f"{name:32} {value}")


if __name__ == "__main__":
    main()
