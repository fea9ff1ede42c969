"""The parser of the command line: values below a class arrive as they were typed.

jsonargparse loads the value of an option below a class as YAML and writes it out again by ``str`` for the class's own
parser: ``null`` becomes the text ``None``, ``007`` becomes ``7``, and ``123e456``, a Git revision, becomes ``inf``.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any

import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

# Options and their values, as the command line has them.
_typed: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("typed", default=())


class Parser(LightningArgumentParser):
    """`LightningArgumentParser` whose parsers of classes get the text of the command line."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        if _typed.get() and args is not None and len(args) == 1 and args[0].startswith("--") and "=" in args[0]:
            # A class's parser gets one option, with the value that was loaded and written out again.
            name, _, value = args[0][2:].partition("=")
            args = [f"--{name}={_as_typed(name, value)}"]
        return super().parse_args(args, *more, **options)


@contextmanager
def remembering(arguments: Sequence[Any] | None) -> Iterator[None]:
    """Remember the text of these arguments, or of the process's own, while they are parsed."""
    texts = [str(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    token = _typed.set(tuple(_pairs(texts)))
    try:
        yield
    finally:
        _typed.reset(token)


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        if name.startswith("--"):
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            yield name[2:].rstrip("+"), value if equals else following


def _as_typed(name: str, value: str) -> str:
    """The text behind an option that ends in ``name`` and is loaded as ``value``, or else ``value`` itself."""
    for option, text in _typed.get():
        if text != value and (option.endswith(f".{name}") or option.endswith(f".{name.replace('.init_args.', '.')}")):
            with suppress(yaml.YAMLError):
                loaded = get_loader("yaml")(text)
                if not isinstance(loaded, str) and str(loaded) == value:
                    return text
    return value


def load_yaml(text: str, path: str | None = None) -> Any:
    """Load a value, or with ``path`` a whole file, as jsonargparse does; but a value that is a YAML comment is that text.

    A setting's text is loaded, too: a system message ``# You are a tutor`` would otherwise become null.
    """
    loaded = _jsonargparse_loader(text)
    return text if loaded is None and path is None and text.lstrip().startswith("#") else loaded


_jsonargparse_loader = get_loader("yaml")
set_loader("yaml", load_yaml, (yaml.YAMLError,))
