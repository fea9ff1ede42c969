"""Adapter folders for vLLM to load: one folder for each version of an adapter, in a temporary folder of the run.

The run's folder contains ``owner.json``, which the run locks while its process lives. The next run removes the folders of
dead runs. Nothing else in ``adapter_folder`` is changed, and paths that a server sends are never opened.
"""

from __future__ import annotations

import errno
import hashlib
import json
import os
import platform
import re
import secrets
import stat
import time
import weakref
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from peft import PeftModel
from safetensors import SafetensorError
from torch import Tensor

from opsd_lightning.models.export import write_weights
from opsd_lightning.models.policy import TEACHER
from opsd_lightning.rollouts.vllm.client import Adapter
from opsd_lightning.types import ConfigError
from opsd_lightning.utils import folders

try:
    import fcntl
except ImportError:  # not a POSIX system, on which vLLM does not run
    fcntl = None  # type: ignore[assignment]

_OWNER = "owner.json"
_RUN = re.compile(r"opsd-run-(?P<run>[0-9a-f]{16})")
_VERSION = re.compile(r"(?P<role>[A-Za-z0-9][\w.\-]*)-(?P<run>[0-9a-f]{16})-(?P<count>[0-9]{1,9})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,63}", re.ASCII)
_OTHER_HOST_SECONDS = 24 * 3600.0  # some network file systems lock only within a host

# Options of peft that vLLM does not support (lora/peft_helper.py). It silently ignores some of them. Ranks and scales of
# single layers are ignored up to 0.30, and the difference stays within the tolerance while the adapter is small.
_NOT_IN_VLLM = (
    "use_dora",
    "rank_pattern",
    "alpha_pattern",
    "kasa_config",
    "monteclora_config",
    "lora_bias",
    "modules_to_save",
    "trainable_token_indices",
    "layer_replication",
    "alora_invocation_tokens",
    "use_bdlora",
    "use_qalora",
    "arrow_config",
)


class AdapterVersions:
    """Versions of the adapters of one run on disk: the newest version of each adapter, and those still in use.

    Args:
        parent: Folder in which the run's folder is created, together with the first version.
        name: First part of the adapters' names.

    Raises:
        ConfigError: The name cannot be the name of a folder.
    """

    def __init__(self, parent: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name[:80]!r} is not a valid name",
                "model.rollouts.init_args.adapter_name",
                "Use letters, digits, '.', '_' and '-', and start with a letter or digit",
            )
        self.parent, self.name = parent, name
        self.run = secrets.token_hex(8)  # distinguishes runs that share the folder and the servers
        self.folder = parent / f"opsd-run-{self.run}"
        self.count = 0
        self.newest: dict[str, tuple[str, Adapter]] = {}
        self.written: list[Adapter] = []
        self._own: set[str] = set()  # names of all versions of this run, removed ones included
        self._dead: dict[tuple[str, str], bool] = {}
        self._owner: int | None = None
        self._process = os.getpid()
        _instances.add(self)

    def write(self, model: PeftModel, role: str, weights: dict[str, Tensor]) -> Adapter:
        """Write a new version of an adapter if its weights have changed, and return the current version.

        Args:
            model: The policy.
            role: Name of the adapter in the policy.
            weights: Weights of the adapter.

        Raises:
            ConfigError: vLLM does not support the adapter, or its folder cannot be written.
        """
        config = model.peft_config[role]
        if unsupported := [name for name in _NOT_IN_VLLM if getattr(config, name, None)]:
            raise ConfigError(
                f"vLLM does not support adapters with {', '.join(unsupported)}",
                "model.policy.lora.options",
                "Remove it, or set model.rollouts to TransformersEngine",
            )
        digest = hashlib.blake2b(repr(sorted(weights)).encode())
        for _, value in sorted(weights.items()):
            digest.update(value.view(-1).view(torch.uint8).numpy().data)
        known = self.newest.get(role)
        if known is not None and known[0] == digest.hexdigest():
            return known[1]
        self.count += 1
        role_name = self.name + ("-teacher" if role == TEACHER else "")
        name = f"{role_name}-{self.run}-{self.count}"
        folder = self.folder / name
        try:
            self._ensure_folder()
            os.utime(self.folder / _OWNER)  # tells other hosts that the run is alive
            write_weights(config, weights, folder)
        except (OSError, SafetensorError) as error:
            raise _cannot_write(folder, error) from None
        adapter = Adapter(name, str(folder))
        self.newest[role] = digest.hexdigest(), adapter
        self.written.append(adapter)
        self._own.add(name)
        return adapter

    def scratch(self, name: str) -> Path:
        """Return a new, empty subfolder of the run's folder.

        Args:
            name: Name of the subfolder.

        Raises:
            ConfigError: The folder cannot be written.
        """
        folder = self.folder / name
        try:
            self._ensure_folder()
            folder.mkdir()
        except OSError as error:
            raise _cannot_write(folder, error) from None
        return folder

    def _ensure_folder(self) -> None:
        """Create and lock the run's folder if it does not exist."""
        if self._owner is None or not (self.folder / _OWNER).exists():
            if self._owner is not None:
                os.close(self._owner)
                self._owner = None
            self._owner = _create_run_folder(self.folder)

    def outdated(self, keep: Sequence[Adapter | None] = ()) -> list[Adapter]:
        """Return the versions that are neither the newest nor in ``keep``."""
        newest = [adapter for _, adapter in self.newest.values()]
        return [adapter for adapter in self.written if adapter not in newest and adapter not in keep]

    def stale(self, keep: Sequence[Adapter | None] = ()) -> Callable[[str, str], bool]:
        """Return a function that is given the name and the folder of an adapter and returns True if the version is outdated.

        Outdated versions are those that `outdated` returns, removed versions of this run, and versions of dead runs in
        ``parent``.

        Args:
            keep: Versions of this run that are in use.
        """
        living = {adapter.name for adapter in self.written} - {adapter.name for adapter in self.outdated(keep)}

        def found(name: str, root: str) -> bool:
            if name in self._own:
                return name not in living
            if (name, root) not in self._dead:
                parts = _VERSION.fullmatch(name)
                # The path is built from the name and compared: a path that a server sends is never opened.
                folder = None if parts is None else self.parent / f"opsd-run-{parts['run']}"
                listed = folder is not None and parts is not None and parts["run"] != self.run and root == str(folder / name)
                self._dead[name, root] = listed and folder is not None and _is_dead(folder)
            return self._dead[name, root]

        return found

    def remove(self, adapters: Sequence[Adapter]) -> None:
        """Remove the folders of some versions."""
        for adapter in adapters:
            folders.remove_export(self.folder / adapter.name)
            self.written.remove(adapter)

    def remove_all(self) -> list[str]:
        """Remove the run's folder, and return the names of the versions in it."""
        if os.getpid() != self._process:  # a forked child of the run
            return []
        names = [adapter.name for adapter in self.written]
        self.written, self.newest = [], {}
        if self._owner is not None:
            folders.remove_tree(self.folder)
            os.close(self._owner)
            self._owner = None
        return names

    def remove_dead_runs(self) -> None:
        """Remove the folders of dead runs in ``parent``."""
        try:
            entries = [entry.name for entry in os.scandir(self.parent) if _RUN.fullmatch(entry.name)]
        except OSError:
            return
        for name in entries:
            if name != self.folder.name:
                _is_dead(self.parent / name, remove=True)


def _cannot_write(folder: Path, error: Exception) -> ConfigError:
    return ConfigError(
        f"cannot write {folder} ({getattr(error, 'strerror', None) or error})",
        "model.rollouts.init_args.adapter_folder",
        "Name a folder on a disk with space that this process may write to",
    )


_instances: weakref.WeakSet[AdapterVersions] = weakref.WeakSet()


def _close_locks_after_fork() -> None:
    """Close the inherited locks in a forked process, which may outlive the run."""
    for versions in _instances:
        if versions._owner is not None:
            os.close(versions._owner)  # unlocking would release the parent's lock as well
            versions._owner = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_close_locks_after_fork)


def _create_run_folder(folder: Path) -> int:
    """Create a run's folder and lock it. Return the open lock file. Closing it releases the lock."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
    host: str | None = _boot_id()
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except (OSError, AttributeError):  # without locks dead runs cannot be detected, so the folder is never removed
            host = None
        # The process id is for information only. The lock tells whether the run is alive.
        owner = {"package": "opsd_lightning", "run": folder.name, "host": host, "process": os.getpid()}
        data = json.dumps(owner).encode()
        if os.write(handle, data) != len(data):
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        os.fsync(handle)
    except OSError:
        os.close(handle)
        folders.remove_tree(folder)
        raise
    return handle


def _is_dead(folder: Path, remove: bool = False) -> bool:
    """Return True if a run's folder does not exist or its run has certainly ended.

    Args:
        folder: Folder of the run.
        remove: If True, remove the folder of a run that has ended.
    """
    try:
        if folder.name not in os.listdir(folder.parent):
            return True
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False  # belongs to another user
        handle = os.open(folder / _OWNER, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, AttributeError):  # another run removes it, or it is not a run's folder
        return False
    try:
        if fcntl is None:
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = json.loads(os.read(handle, 4096).decode("utf-8"))
        if owner["package"] != "opsd_lightning" or owner["run"] != folder.name or owner["host"] is None:
            return False
        if owner["host"] != _boot_id() and time.time() - os.fstat(handle).st_mtime < _OTHER_HOST_SECONDS:
            return False
        if remove:
            folders.remove_tree(folder)
        return True
    except (OSError, ValueError, KeyError, TypeError):  # locked by its run, or not written by this package
        return False
    finally:
        os.close(handle)


def _boot_id() -> str:
    """Return the identifier of the system's boot, or the host name. Locks are reliable within one boot."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()
