"""The parser of the command line: values below a class arrive as they were typed.

jsonargparse loads the value of an option below a class as YAML and writes it out again by ``str`` for the class's own
parser: ``null`` becomes the text ``None``, ``007`` becomes ``7``, and ``123e456``, a Git revision, becomes ``inf``.
"""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace, get_loader, set_loader
from lightning.pytorch.cli import LightningArgumentParser

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.terminal import safe_text
from opsd_lightning.utils.yaml_limits import check_yaml

# jsonargparse writes hundreds of debug records for each command to a logger without handlers. Creating them takes time.
logging.getLogger("jsonargparse_null_logger").setLevel(logging.CRITICAL)

# Options and their values, as the command line has them.
_typed: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("typed", default=())


class Parser(LightningArgumentParser):
    """`LightningArgumentParser` whose parsers of classes get the text of the command line."""

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        if _typed.get() and args is not None and len(args) == 1 and args[0].startswith("--") and "=" in args[0]:
            # A class's parser gets one option, with the value that was loaded and written out again.
            name, _, value = args[0][2:].partition("=")
            args = [f"--{name}={_as_typed(name, value)}"]
        else:
            args = qualified([str(argument) for argument in (sys.argv[1:] if args is None else args)])
        return super().parse_args(args, *more, **options)

    def error(self, text: str, ex: Exception | None = None) -> NoReturn:
        super().error(safe_text(text), ex)


@contextmanager
def remembering(arguments: Sequence[Any] | None) -> Iterator[None]:
    """Remember the text of these arguments, or of the process's own, while they are parsed."""
    texts = [str(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    token = _typed.set(tuple(_pairs(texts)))
    try:
        yield
    finally:
        _typed.reset(token)


def check_nulls(arguments: Sequence[str], config: Any) -> None:
    """Refuse ``null`` for a setting that takes a text: it would be the text ``null``.

    Raises:
        ConfigError: With the setting.
    """
    for option, text in _pairs(arguments):
        value = config
        for part in option.split("."):
            inner = value.get("init_args") if isinstance(value, Namespace) and part not in value else None
            value = value if inner is None else inner
            value = value.get(part) if isinstance(value, Namespace) else None
        if text.strip() == "null" and value == text:
            raise ConfigError("it takes a text and cannot be null", option, "Leave it out, or give an empty text")


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
    """Load a value, or with ``path`` a whole file, as jsonargparse does, but for three things.

    A value that is a YAML comment is that text: a system message ``# You are a tutor`` would otherwise become null. A key
    that stands twice in a mapping is an error. ``AdamW`` as an optimizer is torch's: bitsandbytes has one of that name, too.
    """
    check_yaml(text)
    try:
        loaded = _jsonargparse_loader(text)
    except (ValueError, RecursionError) as error:  # such as the date 2001-99-99, or an integer of too many digits
        raise yaml.YAMLError(str(error)) from None
    if loaded is None and path is None and text.lstrip().startswith("#"):
        return text
    if isinstance(loaded, (dict, list)):
        _check_keys(yaml.compose(text, Loader=yaml.SafeLoader))
        _qualify(loaded)
    return loaded


_jsonargparse_loader = get_loader("yaml")
set_loader("yaml", load_yaml, (yaml.YAMLError,))


def _check_keys(node: Any) -> None:
    """Raise ``yaml.YAMLError`` for a key that stands twice in a mapping."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"the key {key.value} stands twice", key.start_mark)
            seen.add(str(key.value))
            _check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value)


def _qualify(value: Any) -> None:
    """Write the full path of optimizers that are named by their class in torch alone, in place."""
    if isinstance(value, list):
        for part in value:
            _qualify(part)
    elif isinstance(value, dict):
        for key, part in value.items():
            if key == "optimizer" and isinstance(part, str):
                value[key] = _torch_optimizer(part)
            elif key == "optimizer" and isinstance(part, dict) and isinstance(part.get("class_path"), str):
                part["class_path"] = _torch_optimizer(part["class_path"])
            _qualify(part)


def _torch_optimizer(name: str) -> str:
    found = getattr(torch.optim, name, None) if name.isidentifier() else None
    return f"torch.optim.{name}" if isinstance(found, type) and issubclass(found, torch.optim.Optimizer) else name


def qualified(arguments: Sequence[str]) -> list[str]:
    """Arguments with the full path of an optimizer that is named by its class in torch alone."""
    found = list(arguments)
    for place, argument in enumerate(found):
        name, equals, value = argument.partition("=")
        if not name.startswith("--") or not name.endswith((".optimizer", ".optimizer.class_path")):
            continue
        if equals:
            found[place] = f"{name}={_torch_optimizer(value)}"
        elif place + 1 < len(found):
            found[place + 1] = _torch_optimizer(found[place + 1])
    return found
