"""HTML pages from the templates of this package, and the filters that format values in them."""

from __future__ import annotations

import json
import os
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING, Any

from opsd_lightning.types import ConfigError

if TYPE_CHECKING:
    from jinja2 import Environment

_MISSING = "\N{EN DASH}"


def render_template(name: str, data: str, **values: Any) -> str:
    """Render a page.

    All values are escaped, and an undefined name in the template is an error.

    Args:
        name: File name of the template.
        data: Data for the page's script, as JSON from `script_json`.
        **values: Values that the template shows.
    """
    from markupsafe import Markup

    return _environment().get_template(name).render(data=Markup(data), **values)


@cache
def _environment() -> Environment:
    from jinja2 import Environment, PackageLoader, StrictUndefined

    environment = Environment(
        loader=PackageLoader("opsd_lightning.reports"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
        keep_trailing_newline=True,
    )
    environment.filters |= {"percent": percent, "count": count, "duration": duration, "shown": shown, "when": when}
    return environment


def check_extension(path: str, callback: str) -> None:
    """Refuse a path of a page without the extension of HTML files.

    Raises:
        ConfigError: The path does not end in ``.html`` or ``.htm``.
    """
    if not path.endswith((".html", ".htm")):
        problem = f"{callback} writes an HTML page, and {path} has another extension"
        raise ConfigError(problem, "trainer.callbacks.path", "Choose a path that ends in .html")


def relative_path(path: Path, start: Path) -> str:
    """Return a path relative to a folder, with forward slashes. On another drive, return the path itself."""
    try:
        return Path(os.path.relpath(path, start)).as_posix()
    except ValueError:
        return path.as_posix()


def percent(value: float | None) -> str:
    """Format a share in percent, with one decimal place."""
    return _MISSING if value is None else f"{100 * value:.1f} %"


def count(value: float | None) -> str:
    """Format a whole number, with thin spaces between groups of three digits."""
    return _MISSING if value is None else f"{int(value):,}".replace(",", "\u202f")


def duration(seconds: float | None) -> str:
    """Format a duration in seconds, minutes or hours."""
    if seconds is None:
        return _MISSING
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    return f"{minutes} min" if minutes < 90 else f"{minutes // 60} h {minutes % 60:02} min"


def shown(value: Any) -> str:
    """Format the value of a setting: a text as it is, any other value as JSON."""
    return _MISSING if value is None else value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


def when(text: str | None) -> str:
    """Format a time in ISO 8601 format, without seconds."""
    return _MISSING if not text else text[:16].replace("T", " ")
