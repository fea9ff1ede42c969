"""The parser of the command line, which passes values to classes as they were typed.

jsonargparse loads the value of a class's option as YAML and converts it by ``str`` for the parser of that class: ``null``
becomes the text ``None``, ``007`` becomes ``7``, and ``123e456``, a Git revision, becomes ``inf``.

It also gives a class that replaces another one the former class's settings, even those that nobody set: `ChoiceGrader` in
place of `MathGrader` would get its default ``answer_pattern: auto``. Here only settings that differ from the former class's
defaults stay.
"""

from __future__ import annotations

import inspect
import logging
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from pathlib import Path
from typing import Any, NoReturn

import torch
import yaml
from jsonargparse import Namespace, _typehints, get_loader, set_loader
from jsonargparse._util import import_object
from lightning.pytorch.cli import LightningArgumentParser

from opsd_lightning.cli.mistakes import ConfigFile, ParserError, describe
from opsd_lightning.types import ConfigError
from opsd_lightning.utils.terminal import say
from opsd_lightning.utils.yaml_limits import check_yaml

# jsonargparse writes hundreds of debug records for each command to a logger without handlers. Creating them takes time.
logging.getLogger("jsonargparse_null_logger").setLevel(logging.CRITICAL)

# Options and their values, as on the command line.
_typed: ContextVar[tuple[tuple[str, str], ...]] = ContextVar("typed", default=())
# The configuration file that is being read.
_file: ContextVar[ConfigFile | None] = ContextVar("file", default=None)


class Parser(LightningArgumentParser):
    """`LightningArgumentParser` that passes the text of the command line to the parsers of classes.

    A mistake gets a message of a few lines. Names of settings cannot be abbreviated: an abbreviation is a misspelt name.
    """

    def __init__(self, *args: Any, **options: Any) -> None:
        super().__init__(*args, **{"allow_abbrev": False} | options)

    def parse_args(self, args: Sequence[str] | None = None, *more: Any, **options: Any) -> Namespace:  # type: ignore[override]
        if _typed.get() and args is not None and len(args) == 1 and args[0].startswith("--") and "=" in args[0]:
            # The parser of a class is given one option, with the converted value.
            name, _, value = args[0][2:].partition("=")
            args = [f"--{name}={_as_typed(name, value)}"]
        else:
            args = qualified([str(argument) for argument in (sys.argv[1:] if args is None else args)])
            for name in (argument.partition("=")[0] for argument in args):
                if len(name) > 2 and name[:2] != "--" and f"-{name}" in self._option_string_actions:
                    self.error(f"unrecognized arguments: {name}")  # argparse would read -ckpt_path as -c kpt_path
        return super().parse_args(args, *more, **options)

    def parse_path(self, path: Any, *more: Any, **options: Any) -> Namespace:
        token = _file.set(ConfigFile(str(path), Path(str(path)).absolute()))  # jsonargparse changes the current folder
        try:
            return super().parse_path(path, *more, **options)
        finally:
            _file.reset(token)

    def error(self, text: str, ex: Exception | None = None) -> NoReturn:
        """Refuse the arguments: exit with status 2 after a message of a few lines. The parser of a class raises instead."""
        if not self.exit_on_error:
            raise ParserError(self, text) from ex
        say(f"error: {describe(self, text, ex, _file.get(), _typed.get())}", error=True)
        self.exit(2)


@contextmanager
def remembering(arguments: Sequence[Any] | None) -> Iterator[None]:
    """Remember the text of arguments while they are parsed.

    Args:
        arguments: The arguments. None for those of the process.
    """
    texts = [str(argument) for argument in (sys.argv[1:] if arguments is None else arguments)]
    token = _typed.set(tuple(_pairs(texts)))
    try:
        yield
    finally:
        _typed.reset(token)


def check_nulls(arguments: Sequence[str], config: Any) -> None:
    """Check that no setting that takes a string is ``null``, which would become the string ``null``.

    Raises:
        ConfigError: A setting is such a string.
    """
    for option, text in _pairs(arguments):
        value = config
        for part in option.split("."):
            inner = value.get("init_args") if isinstance(value, Namespace) and part not in value else None
            value = value if inner is None else inner
            value = value.get(part) if isinstance(value, Namespace) else None
        if text.strip() == "null" and value == text:
            raise ConfigError("it takes a string and cannot be null", option, "Leave it out, or give an empty string")


def _pairs(arguments: Sequence[str]) -> Iterator[tuple[str, str]]:
    for place, argument in enumerate(arguments):
        name, equals, value = argument.partition("=")
        name = "--config" if name == "-c" else name
        if name.startswith("--"):
            following = arguments[place + 1] if place + 1 < len(arguments) else ""
            yield name[2:].rstrip("+"), value if equals else following


def _as_typed(name: str, value: str) -> str:
    """Return the text of the option that ends in ``name`` and loads as ``value``; ``value`` if there is none."""
    for option, text in _typed.get():
        if text != value and (option.endswith(f".{name}") or option.endswith(f".{name.replace('.init_args.', '.')}")):
            with suppress(yaml.YAMLError):
                loaded = get_loader("yaml")(text)
                if not isinstance(loaded, str) and str(loaded) == value:
                    return text
    return value


def load_yaml(text: str, path: str | None = None) -> Any:
    """Load a value, or with ``path`` a whole file, as jsonargparse does, with three differences.

    - A value that is a YAML comment is a string: a system message ``# You are a tutor`` would otherwise become null.
    - A duplicate key in a mapping is an error.
    - An optimizer ``AdamW`` is torch's, although bitsandbytes has a class of that name, too.
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


def _discard_settings(parser_or_action: Any, previous: Any, value: Any) -> None:
    """Remove the settings of a former class that have its defaults, and those that the new class does not take."""
    if previous and previous.get("init_args") and previous["class_path"] != value["class_path"]:
        former = previous["init_args"]
        with suppress(ValueError, TypeError, ImportError, AttributeError):  # a callable without a signature
            for name, parameter in inspect.signature(import_object(previous["class_path"])).parameters.items():
                if name in former and former[name] == parameter.default:
                    former.pop(name)
    _jsonargparse_discard(parser_or_action, previous, value)


_jsonargparse_discard = _typehints.discard_init_args_on_class_path_change
_typehints.discard_init_args_on_class_path_change = _discard_settings


def _check_keys(node: Any) -> None:
    """Raise ``yaml.YAMLError`` for a duplicate key in a mapping."""
    if isinstance(node, yaml.MappingNode):
        seen: set[str] = set()
        for key, value in node.value:
            if str(key.value) in seen:
                raise yaml.constructor.ConstructorError(None, None, f"duplicate key {key.value}", key.start_mark)
            seen.add(str(key.value))
            _check_keys(value)
    elif isinstance(node, yaml.SequenceNode):
        for value in node.value:
            _check_keys(value)


def _qualify(value: Any) -> None:
    """Replace the class names of torch's optimizers by their full paths, in place."""
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
    """Return arguments in which the class names of torch's optimizers are replaced by their full paths."""
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
