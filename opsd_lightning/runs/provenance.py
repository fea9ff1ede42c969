"""Facts that a result depends on: versions, revision, weights and machine."""

from __future__ import annotations

import hashlib
import os
import platform
from pathlib import Path

from opsd_lightning.runs.record import git_commit, library_versions


def file_digest(path: Path) -> str:
    """Return the SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def model_digest(model: str | Path) -> str:
    """Return the SHA-256 of the weights in a folder, of several files as one, or the name itself for a hub id."""
    weights = sorted(Path(model).glob("*.safetensors"))
    if not weights:
        return str(model)
    digests = [file_digest(path) for path in weights]
    return digests[0] if len(digests) == 1 else hashlib.sha256("".join(digests).encode()).hexdigest()


def made_with(model: str | Path) -> dict[str, str]:
    """Return the versions of all libraries, the revision of the current repository, the model's hash and the machine."""
    found = library_versions() | {"revision": git_commit() or "unknown", "model_sha256": model_digest(model)}
    return found | {"machine": f"{platform.machine()}, {os.cpu_count()} cores"}
