"""Describe a mistake on the command line or in a configuration file: its setting, problem, fix and line.

jsonargparse parses the settings of a class with a parser of that class. It wraps an error of that parser in a long message
with one part for each type that the setting may have. This module finds the error of the innermost parser, and describes
only that.
"""

from __future__ import annotations

import argparse
import dataclasses
import inspect
import os
import re
import types
import typing
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from jsonargparse import _typehints
from jsonargparse._util import import_object

from opsd_lightning.utils.near_names import near_names, question
from opsd_lightning.utils.redaction import HIDDEN, is_secret
from opsd_lightning.utils.yaml_limits import check_yaml

#: Maximum number of lines of a message.
MOST_LINES = 5
_MOST_CHOICES = 10  # classes to list
_LONGEST_VALUE = 60  # characters of a value to show

# Settings of other programs, and the last part of the name of the setting that corresponds to each.
_SYNONYMS = {
    "epochs": "max_epochs",
    "gradient_accumulation_steps": "accumulate_grad_batches",
    "gpus": "devices",
    "learning_rate": "lr",
    "lora_alpha": "alpha",
    "lora_dropout": "dropout",
    "lora_r": "r",
    "max_completion_length": "max_new_tokens",
    "model_name_or_path": "model",
    "num_generations": "n",
    "num_train_epochs": "max_epochs",
    "output_dir": "default_root_dir",
    "per_device_train_batch_size": "batch_size",
    "rank": "r",
    "torch_dtype": "dtype",
}


#: Options and their values, as on the command line.
Typed = Sequence[tuple[str, str]]


class ConfigFile(NamedTuple):
    """A configuration file.

    Args:
        name: Its name, as it was given.
        path: Its path.
    """

    name: str
    path: Path


class ParserError(argparse.ArgumentError):
    """An error of the parser of a class.

    Args:
        parser: The parser.
        text: The message of jsonargparse.
    """

    def __init__(self, parser: Any, text: str) -> None:
        super().__init__(None, text)
        self.parser = parser


class _Level(NamedTuple):
    """A setting whose value is a class. The mistake is in the settings of that class.

    Args:
        key: Name of the setting in the parser of the class above.
        owner: Path of the class, or None if it is unknown.
        typehint: Type of the setting.
    """

    key: str
    owner: str | None
    typehint: Any = None

    @property
    def separator(self) -> str:
        """The text between the setting and one below it."""
        kind: Any = None
        with suppress(ImportError, AttributeError, ValueError):
            kind = import_object(self.owner) if self.owner else None
        return "." if self.key == "model" or dataclasses.is_dataclass(kind) else ".init_args."


class _Mistake(NamedTuple):
    """A described mistake.

    Args:
        setting: Full name of the setting.
        problem: The problem, as a clause without a final period. May be empty.
        fix: One or more sentences.
    """

    setting: str
    problem: str
    fix: str = ""

    def __str__(self) -> str:
        return ". ".join(part for part in (f"{self.setting}: {self.problem}".removeprefix(": "), self.fix) if part)


def describe(parser: Any, text: str, error: BaseException | None, file: ConfigFile | None, typed: Typed) -> str:
    """Return the message for a mistake. It has at most `MOST_LINES` lines.

    Args:
        parser: The parser of the whole command line, or of a command.
        text: The message of jsonargparse.
        error: The exception with this message.
        file: Configuration file that was being read. None if the parser was reading options.
        typed: Options and their values, as on the command line.
    """
    parser = _of_command(parser, getattr(error, "subcommand_parser", None))
    mistake = _find(parser, text, error, file)
    lines = str(mistake).strip().splitlines()[: MOST_LINES - 1]
    if mistake.setting and not _is_typed(mistake.setting, typed):
        files = [file] if file else [ConfigFile(value, Path(value)) for name, value in typed if name == "config"]
        for each in reversed(files):
            if (line := _line_of(each.path, mistake.setting)) is not None:
                lines.append(f"In {each.name}, line {line}.")
                break
    return "\n".join(lines)


def shortened(text: str) -> str:
    """Return a message with at most `MOST_LINES` lines."""
    lines = [line for line in text.splitlines() if line.strip()]
    return "\n".join(lines if len(lines) <= MOST_LINES else [*lines[: MOST_LINES - 1], "..."])


# -- the innermost error -------------------------------------------------------------------------------------------------


def _of_command(parser: Any, known: Any = None) -> Any:
    """Return the parser of the command that the arguments name, or the parser itself."""
    commands = getattr(getattr(parser, "_subcommands_action", None), "_name_parser_map", {})
    named = next((commands[word] for word in getattr(parser, "args", None) or () if word in commands), parser)
    return known or named


def _chain(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__ or (None if error.__suppress_context__ else error.__context__)


def _find(parser: Any, text: str, error: BaseException | None, file: ConfigFile | None) -> _Mistake:
    levels: list[_Level] = []
    top = parser
    while True:
        key = found[1] if (found := re.match(r'Parser key "([^"]+)"', text)) else None
        owner: str | None = None
        inner: ParserError | None = None
        chain: list[BaseException] = []
        for each in _chain(error):
            if isinstance(each, ParserError) and each.parser is not parser:
                inner = each
                break
            chain.append(each)
            pattern = r"Problem with given class_path '([^']+)'|Got value: Namespace\(class_path='([^']+)'"
            if named := re.search(pattern, str(each)):
                owner = named[1] or named[2]
        if key is None or inner is None:
            return _leaf(top, parser, levels, key, text, chain, file)
        levels.append(_Level(key, owner, _typehint(parser, key)))
        parser, text, error = inner.parser, str(inner), inner.__cause__


def _leaf(
    top: Any,
    parser: Any,
    levels: list[_Level],
    key: str | None,
    text: str,
    chain: Sequence[BaseException],
    file: ConfigFile | None,
) -> _Mistake:
    if key == "config" or text.startswith(("Problems parsing config", "Unexpected config")):
        return _file_mistake(text, chain, file)
    if found := re.search(r"(?s)the following arguments are required: ([\w., ]+)", text):
        return _missing(levels, key, found[1].split(", "))
    if key is not None:
        return _value_mistake(_name(levels, key), _typehint(parser, key), text)
    if found := re.match(r'Linked "([^"]+)" must be given via "([^"]+)"', text):
        others = found[2].replace("model.init_args.", "model.").replace(", ", " or ")
        return _Mistake(found[1], "it follows from other settings", f"Set {others}")
    if found := re.match(r"unrecognized arguments: (.*)", text, re.DOTALL):
        word = next((each for each in found[1].split() if each.startswith("-")), None)
        if word and f"-{word}" in parser._option_string_actions:
            return _Mistake(word, "there is no such option", question([f"-{word}"]))
        if word is None:
            shown = _cut(found[1].split()[0])
            return _Mistake("", f"there is an argument {shown} without a setting", "Write --SETTING VALUE")
        return _unknown_key(top, parser, levels, word.partition("=")[0].lstrip("-").rstrip("+"))
    if found := re.search(r"(?:accept option|Option) '([^']+)'", text):
        group = re.match(r"Group '([^']+)'", text)
        return _unknown_key(top, parser, levels, f"{group[1]}.{found[1]}" if group else found[1])
    if found := re.match(r"argument (?:-\w/)?--?(\S+?)(?:/\S+)?: expected (.*)", text):
        return _Mistake(found[1], f"the value is missing, and it expects {found[2]}", "Write --SETTING VALUE")
    if found := re.search(r"(?:^|[\s-])([\w.]+)\.help: ", text):
        classes = _classes(_typehint(parser, found[1]))
        if mistake := _class_mistake(f"{_name(levels, found[1])}.help", classes, text):
            return mistake
    if "subcommand" in text and (found := re.search(r"\{([\w,]+)", text)):
        return _Mistake("", "a subcommand is missing", f"Name one of {found[1].replace(',', ', ')}")
    setting = _name(levels[:-1], levels[-1].key) if levels else ""
    return _Mistake(setting, _first_line(text))


def _typehint(parser: Any, key: str) -> Any:
    action = next((each for each in parser._actions if each.dest == key), None)
    return getattr(action, "_typehint", None)


def _name(levels: Sequence[_Level], key: str) -> str:
    return "".join(f"{level.key}{level.separator}" for level in levels) + key


def _first_line(text: str) -> str:
    lines = [line.strip(" -") for line in text.splitlines() if line.strip(" -")]
    return (lines or ["it is wrong"])[0][:300]


def _cut(value: str) -> str:
    value = value.strip()
    return repr(value if len(value) <= _LONGEST_VALUE else f"{value[:_LONGEST_VALUE]}...")


# -- files ---------------------------------------------------------------------------------------------------------------


def _file_mistake(text: str, chain: Sequence[BaseException], file: ConfigFile | None) -> _Mistake:
    shown = file.name if file else "it"
    for error in chain:
        if isinstance(error, yaml.MarkedYAMLError) and error.problem_mark is not None:
            mark = error.problem_mark
            problem = f"line {mark.line + 1}, column {mark.column + 1}: {error.problem or error.context}"
            return _Mistake("config", f"{shown} is not valid YAML ({problem})", "Correct the line or the one above it")
        if isinstance(error, yaml.YAMLError):
            return _Mistake("config", f"{shown} cannot be read ({_first_line(str(error))})", "Correct the file")
    if text.startswith("Unexpected config"):
        return _Mistake("config", f"{shown} is not a mapping of settings to values", "Write one setting a line: NAME: VALUE")
    if (found := re.search(r"does not exist: '?([^'\n]+)'?", text)) or (found := re.search(r"Given value: (.*)", text)):
        path = Path(found[1])
        with suppress(ValueError):
            path = path.relative_to(Path.cwd())
        stems = {each.stem: each for each in _files(path.parent)}
        near = [str(stems[stem]) for stem in near_names(path.stem, stems)]
        return _Mistake("config", f"there is no file {path}", question(near) or "Give the path of a YAML file")
    return _Mistake("config", _first_line(text.partition(":")[2]))


def _files(folder: Path) -> list[Path]:
    try:
        return sorted(each for each in folder.iterdir() if each.suffix in (".yaml", ".yml", ".json"))[:1000]
    except OSError:
        return []


def _line_of(file: Path, setting: str) -> int | None:
    """Return the line of a setting in a configuration file, or None if it is not there."""
    try:
        text = file.read_text(encoding="utf-8")
        check_yaml(text)
        node = yaml.compose(text, Loader=yaml.SafeLoader)
    except (OSError, ValueError, RecursionError, yaml.YAMLError):
        return None
    return _line_below(node, setting.split("."))


def _line_below(node: Any, keys: Sequence[str]) -> int | None:
    if isinstance(node, yaml.SequenceNode):
        lines = (_line_below(each, keys) for each in node.value)
        return next((line for line in lines if line is not None), None)
    if not isinstance(node, yaml.MappingNode):
        return None
    held = {str(key.value): (key, value) for key, value in node.value}
    for size in range(1, len(keys) + 1):  # a key may hold dots
        key, value = held.get(".".join(keys[:size]), (None, None))
        if key is not None:
            line = key.start_mark.line + 1 if size == len(keys) else _line_below(value, keys[size:])
            if line is not None:
                return line
    if keys[0] == "init_args":
        return _line_below(node, keys[1:]) if len(keys) > 1 else None
    return _line_below(held["init_args"][1], keys) if "init_args" in held else None


def _is_typed(setting: str, typed: Typed) -> bool:
    short = setting.replace(".init_args", "")
    return any(name.replace(".init_args", "") == short for name, _ in typed)


# -- settings ------------------------------------------------------------------------------------------------------------


def _missing(levels: list[_Level], key: str | None, names: Sequence[str]) -> _Mistake:
    levels = [*levels, _Level(key, None)] if key else levels
    if [level.key for level in levels][-2:] == ["model", "grader"]:  # linked to `data.grader`, and parsed first
        levels = [_Level("data.grader", levels[-1].owner)]
    settings = [_name(levels, name.strip()) for name in names]
    owner = levels[-1].owner if levels else None
    needs = f", and {owner.rpartition('.')[2]} needs {'it' if len(settings) == 1 else 'them'}" if owner else ""
    return _Mistake(" and ".join(settings), f"missing{needs}", "Set it" if len(settings) == 1 else "Set them")


def _unknown_key(top: Any, parser: Any, levels: list[_Level], key: str) -> _Mistake:
    owner = (levels[-1].owner or "").rpartition(".")[2] if levels else ""
    if key.rpartition(".")[2] == "class_path" and levels:
        setting = _name(levels[:-1], levels[-1].key)
        return _Mistake(setting, "there are other keys next to class_path", "Move the settings of the class below init_args")
    setting = _name(levels, key)
    problem = f"{owner} has no such setting" if owner else "there is no such setting"
    own = _settings(parser)
    first = key.partition(".")[0]
    known = {"class_path", "init_args", *(each.partition(".")[0] for each in own)}
    if levels and first not in known and (keys := near_names(first, ["class_path", "init_args"])):
        return _Mistake(_name(levels[:-1], levels[-1].key), f"there is no key {first}", question(keys))
    head, _, last = key.rpartition(".")
    beside = [each.rpartition(".")[2] for each in own if each.rpartition(".")[0] == head]
    near: Sequence[str]
    if near := near_names(last, beside):
        return _Mistake(setting, problem, question(near if levels else [f"{head}.{each}".lstrip(".") for each in near]))
    if levels and (others := _classes_with(levels[-1].typehint, last)):
        return _Mistake(setting, problem, f"It is a setting of {' and '.join(others[:3])}")
    if not levels and (others := _commands_with(parser, key)):
        command = str(getattr(parser, "subcommand", "the command"))
        return _Mistake(setting, f"{command} has no such setting", f"It is a setting of {' and '.join(others)}")
    everywhere = _all_settings(top)
    wanted = _SYNONYMS.get(last, last)
    near = [each for each in everywhere if each.rpartition(".")[2] == wanted]
    near = sorted(near, key=lambda each: (not each.startswith(setting.partition(".")[0] + "."), len(each)))[:3]
    if not near and not levels:
        near = near_names(setting, everywhere)
    if near:
        return _Mistake(setting, problem, question(near))
    command = str(getattr(top, "subcommand", "fit"))
    if owner:
        help_of = ".".join(level.key for level in levels)
        return _Mistake(setting, problem, f"`opsd {command} --{help_of}.help {owner}` lists its settings")
    return _Mistake(setting, problem, f"`opsd {command} --help` lists all settings")


def _classes_with(typehint: Any, name: str) -> list[str]:
    """Return the names of the classes that a setting may have and that take an argument."""
    found = []
    for path in _classes(typehint):
        with suppress(ImportError, AttributeError, ValueError, TypeError):
            if name in inspect.signature(import_object(path)).parameters:
                found.append(path.rpartition(".")[2])
    return found


def _settings(parser: Any) -> list[str]:
    """Return the names of the settings of a parser."""
    found = [str(action.dest) for action in parser._actions if action.option_strings]
    return [name for name in found if name not in ("help", "==SUPPRESS==") and not name.endswith(".help")]


def _all_settings(parser: Any) -> list[str]:
    """Return the names of all settings of a command, with those of its default classes."""
    found = _settings(parser)
    with suppress(Exception):  # a default that cannot be completed only gives fewer names
        config = parser.get_defaults(skip_validation=True)
        _typehints.ActionTypeHint.add_sub_defaults(parser, config)
        owners = {name.removesuffix("class_path"): path for name, path in config.items() if name.endswith(".class_path")}
        plain = ["model.", *(prefix for prefix, path in owners.items() if dataclasses.is_dataclass(import_object(path)))]
        for name, _ in config.items():
            for prefix in sorted(plain, key=len, reverse=True):
                name = name.replace(f"{prefix}init_args.", prefix)
            found.append(name.removesuffix(".class_path"))
    return list(dict.fromkeys(found))


def _commands_with(parser: Any, key: str) -> list[str]:
    """Return the other commands that have a setting."""
    commands = getattr(getattr(parser, "parent_parser", None), "_subcommands_action", None)
    found = getattr(commands, "_name_parser_map", {})
    return [name for name, other in found.items() if other is not parser and key in _settings(other)]


# -- values --------------------------------------------------------------------------------------------------------------


def _value_mistake(setting: str, typehint: Any, text: str) -> _Mistake:
    members = list(_members(typehint))
    value = _value(text)
    if not any(_is_plain(each) for each in members):
        classes = _classes(typehint)
        if classes and (found := _class_mistake(setting, classes, text)):
            return found
    choices = [_written(each) for member in members for each in _choices(member)]
    allowed = list(dict.fromkeys(filter(None, map(_described, members))))
    if value is None and not choices and not allowed:
        return _Mistake(setting, _first_line(text.partition("\n")[2] or text))
    if value is None:
        return _Mistake(setting, "it has another type", f"Give {' or '.join([*choices, *allowed])}")
    fix = question(near_names(value, choices)) if choices else ""
    if not fix and choices:
        fix = f"Choose one of {', '.join([*choices, *allowed])}"
    if not fix and allowed:
        fix = f"Give {' or '.join(allowed)}"
    if value.strip() == "None" and type(None) in members:
        fix = "Write null"
    return _Mistake(setting, f"it is {HIDDEN if is_secret(setting) else _cut(value)}", fix)


def _class_mistake(setting: str, classes: Sequence[str], text: str) -> _Mistake | None:
    short = [each.rpartition(".")[2] for each in classes]
    listed = f"Choose one of {', '.join(short[:_MOST_CHOICES])}{', ...' if len(short) > _MOST_CHOICES else ''}"
    if found := re.search(r"Expected a dot import path string: (\S+)", text):
        near = near_names(found[1], short)
        fix = f"Write the settings of {short[0]} below it" if len(short) == 1 else f"{listed}, or give the path of a class"
        return _Mistake(setting, f"there is no class {found[1]}", question(near) or fix)
    # jsonargparse removes the value, between spaces, from the errors of a union.
    if found := re.search(r"Import path (?:(\S+) )?does not \w+ (?:to a subclass of )?(\w+)", text):
        name = found[1] or _value(text) or "it"
        return _Mistake(setting, f"{name.rpartition('.')[2]} is not a subclass of {found[2]}", listed)
    if found := re.search(r"Problem with given class_path '([^']+)':\s+(.*)", text):
        near = near_names(found[1].rpartition(".")[2], short)
        fix = question(near) or "Check the spelling, and that its package is installed or its file is in this folder"
        return _Mistake(setting, f"cannot import {found[1]} ({found[2].strip()[:200]})", fix)
    if re.search(r"but (\S+) is abstract", text):
        return _Mistake(setting, "it has no class yet", f"Name one first. {listed}")
    if "Not a valid subclass of" in text or "Dict must include a class_path" in text:
        return _Mistake(setting, "it names no class", f"Write class_path and init_args. {listed}")
    return None


def _value(text: str) -> str | None:
    patterns = (
        r"(?s)Given value: (.*)\Z",
        r"(?s)Got value: (.*)\Z",
        r": (\S+) does not conform to restriction",
        r": '([^'\n]*)'\Z",
        r"(?s)Expected a path but (.*?) either not accessible",
    )
    return next((found[1].strip() for pattern in patterns if (found := re.search(pattern, text.strip()))), None)


def _members(typehint: Any) -> Iterator[Any]:
    """Yield the types of a union, or the type itself."""
    if typing.get_origin(typehint) in (typing.Union, types.UnionType):
        for each in typing.get_args(typehint):
            yield from _members(each)
    elif typehint is not None:
        yield typehint


def _is_plain(kind: Any) -> bool:
    return isinstance(kind, type) and issubclass(kind, (int, float, str)) and kind is not bool


def _choices(kind: Any) -> Sequence[Any]:
    if typing.get_origin(kind) is typing.Literal:
        return typing.get_args(kind)
    return (True, False) if kind is bool else ()


def _written(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else str(value)


def _described(kind: Any) -> str | None:
    """Return a type in words. None for types whose values are listed."""
    if kind is type(None):
        return "null"
    if kind is bool or typing.get_origin(kind) is typing.Literal:
        return None
    origin = typing.get_origin(kind) or kind
    if not isinstance(origin, type):
        return None
    plain = {int: "an integer", float: "a number", str: "a text"}
    if origin in plain:
        return plain[origin]
    if issubclass(origin, (int, float)):  # a restricted number
        return f"{'an' if issubclass(origin, int) else 'a'} {origin.__doc__}"
    if issubclass(origin, Mapping):
        return "a mapping"
    if issubclass(origin, os.PathLike):
        return "a path"
    return "a list" if origin in (list, tuple, set, Sequence, Iterable) else None


def _classes(typehint: Any) -> list[str]:
    """Return the paths of the classes that a setting may name."""
    found: list[str] = []
    for each in _members(typehint):
        parts = [each, *(part for part in typing.get_args(each) if isinstance(part, type))]
        for part in parts:
            with suppress(Exception):  # a type without classes
                found += _typehints.get_all_subclass_paths(part)
    return list(dict.fromkeys(found))
