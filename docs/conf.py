"""The documentation site: ``make docs``. API pages are made of the package's list of public names: none is missing."""

from __future__ import annotations

import re
import sys
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import opsd_lightning  # noqa: E402

project, author = "opsd-lightning", "opsd-lightning contributors"
version = release = opsd_lightning.__version__
extensions = ["myst_parser", "sphinx.ext.autodoc", "sphinx.ext.napoleon"]
myst_heading_anchors, myst_enable_extensions = 3, ["dollarmath"]
html_math_renderer = "mathml"  # browsers draw it without a script and without a network
html_theme, html_title = "furo", f"opsd-lightning {release}"
exclude_patterns = ["_build"]
default_role = "code"  # as docstrings use single backticks
autodoc_member_order, autodoc_typehints = "bysource", "description"
autodoc_default_options = {"members": True, "show-inheritance": True}
# Lightning's and PyTorch's own docstrings are inherited otherwise, whose markup is theirs.
autodoc_inherit_docstrings = False
# A type named in a signature may be in two public places.
suppress_warnings = ["ref.python"]

# Modules of each page, or subpackages with all their modules.
GROUPS = {
    "Methods and data": ("methods", "data", "prompts.templates", "models.policy", "types"),
    "The loss": ("losses", "methods.anchor"),
    "Teachers and contexts": ("teachers", "prompts"),
    "Rollouts and evaluation": ("rollouts", "grading", "evaluation"),
    "Reports and health": ("reports", "runs", "callbacks.health", "callbacks.health_metrics", "callbacks.collapse_guard"),
    "Before training": ("doctor",),
}
REST = "Callbacks, strategies and the rest"


def page_of(module: str) -> str:
    """Return the title of a module's page: the page that names the module, or else its subpackage."""
    for name in (module, module.partition(".")[0]):
        for title, members in GROUPS.items():
            if name in members:
                return title
    return REST


def write_api() -> None:
    """Write the pages of the public names."""
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    pages: dict[str, list[str]] = {title: [title, "=" * len(title), ""] for title in (*GROUPS, REST)}
    for name, module in opsd_lightning._MODULE_OF.items():
        found = getattr(opsd_lightning, name)
        kind = "class" if isinstance(found, type) else "function" if callable(found) else "data"
        pages[page_of(module)] += [name, "-" * len(name), "", f".. auto{kind}:: opsd_lightning.{module}.{name}", ""]
    files = {re.sub(r"\W+", "-", title.lower()).strip("-"): lines for title, lines in pages.items()}
    for page, lines in files.items():
        _write(folder / f"{page}.rst", "\n".join(lines))
    lines = ["API", "===", "", ".. toctree::", "   :maxdepth: 2", ""] + [f"   {page}" for page in files]
    _write(folder / "index.rst", "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def outside(app: object, name: str, source: list[str]) -> None:
    """Links to files of the repository that are no page of the site become their names."""
    source[0] = re.sub(r"\[([^\]]*)\]\(\.\./([^)#]*)[^)]*\)", lambda m: f"`{m[2]}`", source[0])


def inline_math(translator: object, node: object) -> None:
    translator.body.append(convert(node.astext()))  # type: ignore[attr-defined]
    raise SkipNode


def block_math(translator: object, node: object) -> None:
    shown = convert(node.astext(), display="block")
    translator.body.append(f'<div class="math" style="padding: 0.4em 0">{shown}</div>')  # type: ignore[attr-defined]
    raise SkipNode


def setup(app: object) -> None:
    write_api()
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))  # type: ignore[attr-defined]
    app.connect("source-read", outside)  # type: ignore[attr-defined]
