"""Check the settings in a checkpoint before jsonargparse builds objects from them.

Settings from an untrusted checkpoint must not import modules, call functions or read files.
"""

from __future__ import annotations

import inspect
import os
import sys
import types
from collections.abc import Container, Iterator, Mapping
from enum import Enum
from importlib import import_module
from typing import Annotated, Any, Literal, Union, get_args, get_origin, get_type_hints

import yaml

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.redaction import HIDDEN

_FIX = "Give a checkpoint that ModelCheckpoint wrote"
#: Settings that name a class or a function to call, at any depth.
_CLASS_SETTINGS = ("class_path", "optimizer", "lr_scheduler")
#: Packages whose classes the settings may name. Other classes must already be imported.
_KNOWN_PACKAGES = ("opsd_lightning", "torch.optim", "lightning.pytorch", "transformers", "bitsandbytes.optim")
#: Types whose values jsonargparse takes unchanged, without parsing YAML or reading files.
_PLAIN = (str, int, float, bool, Enum, os.PathLike, type(None))


def check_settings(settings: Any, given: Container[str] = (), kind: type | None = None) -> None:
    """Check that the settings of a checkpoint do not import modules, read files or run code from a model repository.

    Args:
        settings: Hyperparameters of the checkpoint.
        given: Names of settings that the caller overrides.
        kind: Class that is built from the settings.

    Raises:
        ConfigError: A setting is not allowed. The error names it.
    """
    if not isinstance(settings, Mapping):
        raise ConfigError("the settings in the checkpoint are not a mapping", "checkpoint_path", _FIX)
    settings = {key: value for key, value in settings.items() if key not in given}
    for name, value in walk_settings(settings):
        name = name.rpartition(".")[2]  # jsonargparse reads "policy.model" as a setting of "policy"
        if name == "trust_remote_code" and value not in (False, None):
            raise ConfigError(
                "the settings in the checkpoint enable code from a model repository (trust_remote_code)",
                "checkpoint_path",
                "Give policy=Policy(...) with a model that you trust",
            )
        if name in _CLASS_SETTINGS and isinstance(value, str):
            _check_class(value)
        if name == "__path__":
            raise _refused(f"name the file {value!r}")
    kinds = [kind] if kind is not None else []
    named = settings.get("_class_path")
    if isinstance(named, str) and named:
        _check_class(named)
        kinds.append(_class_of(named))
    own = {key: value for key, value in settings.items() if key not in ("_class_path", "_instantiator")}
    for one in kinds:
        _check_arguments(one, own)
    if not kinds:
        _check_arguments(None, own)


def walk_settings(value: Any, depth: int = 0) -> Iterator[tuple[str, Any]]:
    """Yield every key in nested mappings and lists with its value.

    Raises:
        ConfigError: The settings are nested too deeply.
    """
    if depth > 32:
        raise ConfigError("the settings in the checkpoint are nested too deeply", "checkpoint_path", _FIX)
    if isinstance(value, Mapping):
        for key, part in value.items():
            yield str(key), part
            yield from walk_settings(part, depth + 1)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            yield from walk_settings(part, depth + 1)


def _refused(what: str) -> ConfigError:
    return ConfigError(
        f"the settings in the checkpoint {what}",
        "checkpoint_path",
        "Import the module of the class first if you trust it, or give the part as an argument",
    )


def _check_class(path: str) -> None:
    if not _is_known_class(path):
        raise _refused(f"name {path!r}, which is not a class of this package, of torch.optim or of an imported module")


def _check_arguments(kind: Any, values: Mapping[Any, Any]) -> None:
    """Check the arguments of a class, or of an unknown class (None)."""
    hints = _hints(kind)
    for name, value in values.items():
        if not isinstance(name, str) or "." in name:
            raise _refused(f"contain the name {name!r}")
        _check_value(hints.get(name, Any), value)


def _check_value(hint: Any, value: Any) -> None:
    if isinstance(value, str):
        if _is_plain(hint) or value == HIDDEN:  # hidden values are rejected later, with the name of the setting
            return
        if parts := [part for part in _classes_in_hint(hint) if part is not Any]:
            if not (value in ("", "null") or _is_known_class(value)) or _is_file(value):
                raise _refused(f"contain {value[:80]!r} in place of a {getattr(parts[0], '__name__', parts[0])}")
        elif _is_collection(value) or _is_file(value):
            raise _refused(f"contain {value[:80]!r}, which would be read as YAML or as a file")
    elif isinstance(value, Mapping):
        named = value.get("class_path")
        if isinstance(named, str):
            _check_class(named)
            for group in ("init_args", "dict_kwargs"):
                arguments = value.get(group) or {}
                if not isinstance(arguments, Mapping):
                    raise _refused(f"contain {str(arguments)[:80]!r} as the arguments of {named}")
                _check_arguments(_class_of(named), arguments)
            _check_arguments(None, {k: v for k, v in value.items() if k not in ("class_path", "init_args", "dict_kwargs")})
        elif classes := [part for part in _classes_in_hint(hint) if isinstance(part, type)]:
            for one in classes:
                _check_arguments(one, {k: v for k, v in value.items() if k != "init_args"})
                if "init_args" in value:
                    _check_value(one, value["init_args"])
        else:
            for part in value.values():  # keys may be module names, with dots
                _check_value(Any, part)
    elif isinstance(value, (list, tuple, set)):
        for part in value:
            _check_value(_element_hint(hint), part)


def _element_hint(hint: Any) -> Any:
    """Return the type hint of a list's elements, or Any."""
    hints = [hint, *get_args(hint)]
    found = [part for one in hints if get_origin(one) in (list, tuple, set) for part in get_args(one) if part is not ...]
    return Union[tuple(found)] if found else Any  # noqa: UP007


def _hints(kind: Any) -> dict[str, Any]:
    """Return the type hints of the arguments of a class and its bases, as far as they can be resolved."""
    hints: dict[str, Any] = {}
    for one in reversed(getattr(kind, "__mro__", (kind,))):
        function = one if inspect.isfunction(one) else vars(one).get("__init__") if isinstance(one, type) else None
        if inspect.isfunction(function):
            try:
                hints |= get_type_hints(function)
            except Exception:  # names that are imported for type checkers only
                continue
    return hints


def _is_plain(hint: Any) -> bool:
    if hint is None or get_origin(hint) is Literal:
        return True
    if get_origin(hint) in (Union, types.UnionType):
        return all(_is_plain(part) for part in get_args(hint))
    if get_origin(hint) is Annotated:
        return _is_plain(get_args(hint)[0])
    return isinstance(hint, type) and issubclass(hint, _PLAIN)


def _classes_in_hint(hint: Any) -> Iterator[Any]:
    """Yield the classes and callable types in a type hint for which jsonargparse builds an object."""
    origin = get_origin(hint)
    if origin in (Union, types.UnionType, Annotated, list, tuple, set):
        for part in get_args(hint):
            yield from _classes_in_hint(part)
    elif origin is not None and (origin is type or "Callable" in str(origin)):
        yield hint
    elif isinstance(hint, type) and not issubclass(hint, (*_PLAIN, list, tuple, set, dict, bytes)):
        yield from [hint] if hint is not object and hint.__module__ != "collections.abc" else []


def _is_collection(text: str) -> bool:
    """Return True if a text is a YAML mapping or list, or is too long or malformed to exclude it."""
    if len(text) > 10_000:
        return True
    try:
        event = [type(one) for _, one in zip(range(3), yaml.parse(text, yaml.SafeLoader), strict=False)]
    except yaml.YAMLError:
        return text.lstrip().startswith(("{", "["))
    return yaml.MappingStartEvent in event or yaml.SequenceStartEvent in event


def _is_file(text: str) -> bool:
    try:
        path = os.path.expanduser(text)
        return text.strip() == "-" or (os.path.lexists(path) and not os.path.isdir(path))
    except ValueError:  # a null byte
        return True


def _class_of(path: str) -> Any:
    module, _, name = path.rpartition(".")
    return getattr(sys.modules.get(module), name, None)


def _is_known_class(path: str) -> bool:
    """Return True for a class of a known package or an imported module. Only known packages are imported."""
    module, _, name = path.rpartition(".")
    if not all(part.isidentifier() and not part.startswith("__") for part in path.split(".")):
        return False
    if not module:
        return True  # jsonargparse searches the imported subclasses for it
    if any(path.startswith(f"{known}.") for known in _KNOWN_PACKAGES):
        try:
            found = getattr(import_module(module), name)
        except Exception:  # importing a module may raise any error
            return False
        return any(f"{getattr(found, '__module__', '')}.".startswith(f"{known}.") for known in _KNOWN_PACKAGES)
    return isinstance(_class_of(path), type)
