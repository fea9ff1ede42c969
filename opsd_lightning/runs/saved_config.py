"""Save ``config.yaml`` without secrets, and reject settings with hidden values."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from lightning.fabric.utilities.cloud_io import get_filesystem
from lightning.pytorch import LightningModule, Trainer
from lightning.pytorch.cli import SaveConfigCallback

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import atomic_write
from opsd_lightning.utils.folders import free_name
from opsd_lightning.utils.redaction import HIDDEN, hidden_names, redact
from opsd_lightning.utils.terminal import safe_text


class SavedConfig(SaveConfigCallback):
    """Lightning's `SaveConfigCallback`, with secrets replaced by ``***`` and listed at the top of the file.

    An existing file with other contents is renamed to ``config-1.yaml`` and so on. If ``config.yaml`` differs, an evaluation
    writes ``config-test.yaml``, ``config-validate.yaml`` or ``config-predict.yaml`` instead.
    """

    def __init__(self, parser: Any, *args: Any, **kwargs: Any) -> None:
        super().__init__(_RedactingParser(parser), *args, **kwargs)  # type: ignore[arg-type]

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        self.parser.stage = stage  # type: ignore[attr-defined]
        super().setup(trainer, pl_module, stage)


class _RedactingParser:
    """Parser whose `save` redacts secrets and keeps existing files.

    Args:
        parser: Wrapped parser.
    """

    def __init__(self, parser: Any) -> None:
        self._parser, self.stage = parser, "fit"

    def __getattr__(self, name: str) -> Any:
        if name == "_parser":  # not set yet while the object is copied
            raise AttributeError(name)
        return getattr(self._parser, name)

    def save(self, config: Any, path: str, **settings: Any) -> None:
        skip_none = settings.get("skip_none", True)
        text = self._parser.dump(config, skip_none=skip_none, skip_validation=True)  # it is valid since it was parsed
        found = yaml.safe_load(text)
        redacted = redact(found, whole=True)
        if redacted != found:
            names = ", ".join(_changed_names(found, redacted))
            head = f"# Hidden values ({HIDDEN}): {safe_text(names)}\n# Give them again to run from this file.\n"
            text = head.replace("\t", " ") + yaml.safe_dump(redacted, sort_keys=False, allow_unicode=True)
        files = get_filesystem(path)
        if "file" in (files.protocol if isinstance(files.protocol, tuple) else (files.protocol,)):
            _write(Path(path), text.encode("utf-8", "backslashreplace"), self.stage)
        else:
            with files.open(path, "w") as file:
                file.write(text)


def _write(path: Path, content: bytes, stage: str) -> None:
    if stage != "fit" and _differs(path, content):
        path = path.with_name(f"{path.stem}-{stage}{path.suffix}")
    if _differs(path, content):
        before = path.read_bytes()
        copies = path.parent.glob(f"{path.stem}-*{path.suffix}")
        if not any(copy.is_file() and copy.read_bytes() == before for copy in copies):
            atomic_write(free_name(path), before)
    atomic_write(path, content)


def _differs(path: Path, content: bytes) -> bool:
    return path.is_file() and path.read_bytes() != content


def _changed_names(before: Any, after: Any, name: str = "") -> Iterator[str]:
    """Yield the dotted names of values that differ between two versions of the settings."""
    if isinstance(before, dict) and isinstance(after, dict) and len(before) == len(after):
        for (key, part), other in zip(before.items(), after.values(), strict=True):
            yield from _changed_names(part, other, f"{name}.{key}" if name else str(key))
    elif isinstance(before, list) and isinstance(after, list) and len(before) == len(after):
        for place, (part, other) in enumerate(zip(before, after, strict=True)):
            yield from _changed_names(part, other, f"{name}.{place}")
    elif before != after:
        yield name


def check_no_hidden_values(settings: Any) -> None:
    """Check that no value is ``***``, as in a saved ``config.yaml`` or a checkpoint.

    Only whole values are checked: a value with a secret part is saved as ``***`` as a whole.

    Raises:
        ConfigError: Values are hidden. The problem lists the settings.
    """
    names = [name.replace("model.init_args.", "model.", 1) for name in hidden_names(settings)]
    if names:
        others = f" and of {', '.join(names[1:])} are" if names[1:] else " is"
        problem = f"the value{others} hidden ({HIDDEN}), as secrets are in a saved config.yaml and in checkpoints"
        raise ConfigError(problem, names[0], "Give it again on the command line or in another --config")
