"""Facts that a result depends on: versions, revision, weights and machine."""

from __future__ import annotations

import hashlib
import os
import platform
from contextlib import suppress
from pathlib import Path

from transformers.utils.hub import cached_file

from opsd_lightning.runs.record import git_commit, library_versions


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(model: str | Path) -> str:
    """Return the SHA-256 of the weights in a folder, of several files as one.

    Return the name itself for a hub id. It does not tell the revision: `hub_commit` does.
    """
    weights = sorted(Path(model).glob("*.safetensors"))
    if not weights:
        return str(model)
    digests = [file_digest(path) for path in weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def hub_commit(model: str | Path, revision: str | None = None) -> str | None:
    """Return the commit that a revision of a hub id is in the local cache. None for a folder, and if it is not there.

    Args:
        model: Folder or hub id of the model.
        revision: Branch, tag or commit. Defaults to ``main``.
    """
    if Path(model).is_dir():
        return None
    missing = {"_raise_exceptions_for_missing_entries": False, "_raise_exceptions_for_connection_errors": False}
    file = None
    with suppress(OSError):  # a folder that is gone
        file = cached_file(str(model), "config.json", revision=revision or "main", local_files_only=True, **missing)
    return None if file is None else Path(file).parent.name


def made_with(model: str | Path, revision: str | None = None) -> dict[str, str]:
    """Return the versions of all libraries, the revision of the current repository, the model's hash and the machine.

    Args:
        model: Folder or hub id of the model. ``model_sha256`` is the result of `model_digest`, and ``model_commit`` that of
            `hub_commit`, if it is known.
        revision: Branch, tag or commit of a hub id. Defaults to ``main``.
    """
    found = library_versions() | {"revision": git_commit() or "unknown", "model_sha256": model_digest(model)}
    commit = hub_commit(model, revision)
    if commit is not None:
        found["model_commit"] = commit
    return found | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
