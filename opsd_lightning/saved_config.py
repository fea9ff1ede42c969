"""The ``config.yaml`` that Lightning leaves beside the logs, without secrets, and the refusal to run from hidden values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch.cli import SaveConfigCallback

from opsd_lightning.files import replace
from opsd_lightning.redaction import HIDDEN, hidden_names, redact
from opsd_lightning.terminal import message
from opsd_lightning.types import ConfigError


class SavedConfig(SaveConfigCallback):
    """Lightning's callback, whose file holds ``***`` in the place of secrets and lists them at its top."""

    def __init__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_Parser(parser), *args, **kwargs)  # type: ignore[arg-type]


class _Parser:
    """A parser that saves without secrets.

    Args:
        parser: Parser that does all else.
    """

    def __init__(self, parser: Any) -> None:
        self._parser = parser

    def __getattr__(self, name: str) -> Any:
        if name == "_parser":  # while it is copied
            raise AttributeError(name)
        return getattr(self._parser, name)

    def save(self, config: Any, path: str, **settings: Any) -> None:
        found = yaml.safe_load(self._parser.dump(config, skip_none=settings.get("skip_none", True)))
        redacted = redact(found, whole=True)
        if redacted == found:
            self._parser.save(config, path, **settings)
            return
        names = ", ".join(_changed(found, redacted))
        head = f"# Hidden here ({HIDDEN}): {message(names)}\n# Give these again to run from this file.\n"
        text = head.replace("\t", " ") + yaml.safe_dump(redacted, sort_keys=False, allow_unicode=True)
        files = get_filesystem(path)
        if "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,)):
            replace(Path(path), text)
        else:
            with files.open(path, "w") as file:
                file.write(text)


def _changed(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Dotted names of the values in which settings differ."""
    if isinstance(before, dict) and isinstance(after, dict) and len(before) == len(after):
        for (key, part), other in zip(before.items(), after.values(), strict=True):
            yield from _changed(part, other, f"{name}.{key}" if name else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (part, other) in enumerate(zip(before, after, strict=True)):
            yield from _changed(part, other, f"{name}.{place}")
    elif before != after:
        yield name


def check_hidden(settings: Any) -> None:
    """Refuse settings whose values are hidden, as those of a saved ``config.yaml`` or of a checkpoint.

    A value with a hidden part is hidden wholly there: ``***`` inside a longer text is the text's own.

    Raises:
        ConfigError: With the settings.
    """
    names = [name.replace("model.init_args.", "model.", 1) for name in hidden_names(settings)]
    if names:
        others = f" and those of {', '.join(names[1:])} are" if names[1:] else " is"
        problem = f"its value{others} hidden ({HIDDEN}), as secrets are in a saved config.yaml and in checkpoints"
        raise ConfigError(problem, names[0], "Give them again on the command line or in a further --config")
