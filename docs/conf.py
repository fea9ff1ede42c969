"""The documentation site: ``make docs``. API pages are made of the package's list of public names: none is missing."""

from __future__ import annotations

import os
import re
import sys
from abc import ABC
from collections.abc import Iterable
from pathlib import Path

from docutils.nodes import SkipNode
from latex2mathml.converter import convert
from sphinx.application import Sphinx

HERE = Path(__file__).parent
sys.path.insert(0, str(HERE.parent))

import opsd_lightning  # noqa: E402

project, author = "opsd-lightning", "opsd-lightning contributors"
version = release = opsd_lightning.__version__
extensions = ["myst_nb", "sphinx.ext.autodoc", "sphinx.ext.napoleon", "sphinx_copybutton", "sphinx_design"]
myst_heading_anchors, myst_enable_extensions = 3, ["colon_fence", "dollarmath"]
nb_execution_mode = "off"  # notebooks are shown with the outputs that are stored in them
copybutton_exclude = ".linenos, .gp, .go"
html_math_renderer = "mathml"  # browsers draw it without a script and without a network
html_theme, html_title = "furo", f"opsd-lightning {release}"
html_static_path, html_css_files = ["_static"], ["site.css"]
pygments_dark_style = "github-dark"  # the theme's own style underlines names, which then look like links
exclude_patterns = ["_build", "_static"]
default_role = "code"  # as docstrings use single backticks
autodoc_member_order, autodoc_typehints = "bysource", "description"
autodoc_default_options = {"members": True}
toc_object_entries = False  # each class has a heading already
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

#: Pages of the site whose source is elsewhere in the repository, by that source.
PROJECT_PAGES = {
    "CHANGELOG.md": "changelog.md",
    "CODE_OF_CONDUCT.md": "code_of_conduct.md",
    "CONTRIBUTING.md": "contributing.md",
    "SECURITY.md": "security.md",
    "configs/README.md": "configs.md",
} | {f"notebooks/{path.name}": path.name for path in sorted((HERE.parent / "notebooks").glob("*.ipynb"))}


def page_of(module: str) -> str:
    """Return the title of a module's page: the page that names the module, or else its subpackage."""
    for name in (module, module.partition(".")[0]):
        for title, members in GROUPS.items():
            if name in members:
                return title
    return REST


def public_bases(bases: Iterable[type]) -> list[type]:
    """Return base classes without `object` and `ABC`. Private ones are replaced by their own bases."""
    found: list[type] = []
    for base in bases:
        if base.__name__.startswith("_"):
            found += public_bases(base.__bases__)
        elif base not in (object, ABC):
            found.append(base)
    return found


def show_public_bases(app: Sphinx, name: str, found: type, options: object, bases: list[type]) -> None:
    bases[:] = public_bases(bases)


def write_api() -> None:
    """Write the pages of the public names."""
    folder = HERE / "api"
    folder.mkdir(exist_ok=True)
    pages: dict[str, list[str]] = {title: [title, "=" * len(title), ""] for title in (*GROUPS, REST)}
    for name, module in opsd_lightning._MODULE_OF.items():
        found = getattr(opsd_lightning, name)
        kind = "class" if isinstance(found, type) else "function" if callable(found) else "data"
        pages[page_of(module)] += [name, "-" * len(name), "", f".. auto{kind}:: opsd_lightning.{name}"]
        if isinstance(found, type) and public_bases(found.__bases__):
            pages[page_of(module)].append("   :show-inheritance:")
        pages[page_of(module)].append("")
    files = {re.sub(r"\W+", "-", title.lower()).strip("-"): lines for title, lines in pages.items()}
    for page, lines in files.items():
        _write(folder / f"{page}.rst", "\n".join(lines))
    lines = ["API", "===", "", ".. toctree::", "   :maxdepth: 2", ""] + [f"   {page}" for page in files]
    _write(folder / "index.rst", "\n".join(lines) + "\n")


def _write(path: Path, text: str) -> None:
    if not path.exists() or path.read_text(encoding="utf-8") != text:
        path.write_text(text, encoding="utf-8")


def write_project_pages() -> None:
    """Write the pages that lie outside of this folder: notebooks, configurations, changelog and others."""
    folder = HERE / "project"
    folder.mkdir(exist_ok=True)
    for source, name in PROJECT_PAGES.items():
        _write(folder / name, linked((HERE.parent / source).read_text(encoding="utf-8"), Path(source).parent, folder))
    lines = [
        "# Configuration files",
        "",
        "The whole text of each file. The [overview](configs.md) says what they are for.",
        "",
    ]
    for path in sorted((HERE.parent / "configs").rglob("*.yaml")):
        name = path.relative_to(HERE.parent).as_posix()
        lines += [f"## {name}", "", f"```{{literalinclude}} ../../{name}", ":language: yaml", "```", ""]
    _write(folder / "config_files.md", "\n".join(lines))


def linked(text: str, source: Path, folder: Path) -> str:
    """Return Markdown with its links between files of the repository as links between pages of the site.

    Links to files that are no page of the site become the names of these files.

    Args:
        text: Markdown. Its links are relative to ``source``.
        source: Folder of the text, relative to the root of the repository.
        folder: Folder of the page that gets the text.
    """

    def replace(match: re.Match[str]) -> str:
        title, target, anchor = match[1], match[2], match[3] or ""
        if ":" in target or not target:
            return match[0]
        root = HERE.parent
        path = (root / source / target).resolve()
        name = path.relative_to(root).as_posix() if path.is_relative_to(root) else ""
        page = HERE / "project" / PROJECT_PAGES[name] if name in PROJECT_PAGES else path
        if page.is_relative_to(HERE) and page.suffix in (".md", ".ipynb", ".png"):
            return f"[{title}]({os.path.relpath(page, folder)}{anchor})"
        return f"`{name or target}`" if title.strip("`") in (name, path.name) else f"{title} (`{name or target}`)"

    return re.sub(r"\[([^\]\n]*(?:\n[^\]\n]*)?)\]\(([^)#\s]*)(#[^)\s]*)?\)", replace, text)


def link_pages(app: Sphinx, name: str, source: list[str]) -> None:
    path = Path(app.env.doc2path(name))
    if path.suffix == ".md" and path.parent == HERE:
        source[0] = linked(source[0], Path("docs"), HERE)


def inline_math(translator: object, node: object) -> None:
    translator.body.append(convert(node.astext()))  # type: ignore[attr-defined]
    raise SkipNode


def block_math(translator: object, node: object) -> None:
    shown = convert(node.astext(), display="block")
    translator.body.append(f'<div class="math" style="padding: 0.4em 0">{shown}</div>')  # type: ignore[attr-defined]
    raise SkipNode


def setup(app: Sphinx) -> None:
    write_api()
    write_project_pages()
    app.add_html_math_renderer("mathml", (inline_math, None), (block_math, None))  # type: ignore[attr-defined]
    app.connect("autodoc-process-bases", show_public_bases)
    app.connect("source-read", link_pages)  # type: ignore[attr-defined]
