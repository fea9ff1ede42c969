"""Facts that a result depends on: versions, revision, weights and machine."""

from __future__ import annotations

import hashlib
import os
import platform
import re
from contextlib import suppress
from pathlib import Path

import yaml
from huggingface_hub import constants
from huggingface_hub.file_download import repo_folder_name
from transformers.utils.hub import cached_file

from opsd_lightning.runs.record import git_commit, library_versions
from opsd_lightning.utils.yaml_limits import check_yaml


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


def weights_digest(path: Path) -> str | None:
    """Return the SHA-256 of a model file, or `model_digest` of a folder. None for a folder without safetensors."""
    if path.is_file():
        return file_digest(path)
    found = model_digest(path)
    return None if found == str(path) else found


def hub_license(name: str, revision: str | None = None, kind: str = "model") -> str | None:
    """Return the license of a hub repository as its README.md in the local cache gives it. None if it is not there.

    Args:
        name: Hub id.
        revision: Branch, tag or commit. Defaults to any, if all that are cached give the same license.
        kind: ``model`` or ``dataset``.
    """
    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=name, repo_type=kind)
    commit = revision
    with suppress(OSError, ValueError):  # not a branch or tag
        commit = (cache / "refs" / (revision or "main")).read_text().strip()
    exact = cache / "snapshots" / (commit or "main")
    folders = [exact] if exact.is_dir() else [] if revision else sorted(cache.glob("snapshots/*"))
    found = {license_in(folder) for folder in folders} - {None}
    return found.pop() if len(found) == 1 else None


def license_in(folder: Path) -> str | None:
    """Return the license that the metadata of a folder's README.md give, or None."""
    found = None
    with suppress(OSError, ValueError, AttributeError, yaml.YAMLError):
        text = (folder / "README.md").read_text(encoding="utf-8")
        metadata = re.match(r"---[ \t]*\n(.*?)\n---", text, re.DOTALL)
        check_yaml(metadata[1] if metadata else "")
        values = yaml.safe_load(metadata[1]) if metadata else {}
        found = values.get("license_name") if values.get("license") == "other" else values.get("license")
    return ", ".join(map(str, found)) if isinstance(found, list) else None if found is None else str(found)


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
