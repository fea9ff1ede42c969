"""Versions of adapters on disk, for vLLM to load: each in a folder of its own, in a folder of the run, which ends with it.

A run's folder holds ``owner.json``, whose lock ends with the process. What a dead run left is removed at the next run's
start. Nothing else in ``adapter_folder`` is touched, whatever it is called, and no path that a server names is.
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
from opsd_lightning.types import ConfigError, UserError
from opsd_lightning.utils import folders

try:
    import fcntl
except ImportError:  # no POSIX system, where vLLM does not run
    fcntl = None  # type: ignore[assignment]

_OWNER = "owner.json"
_RUN = re.compile(r"opsd-run-(?P<run>[0-9a-f]{16})")
_VERSION = re.compile(r"(?P<role>[A-Za-z0-9][\w.\-]*)-(?P<run>[0-9a-f]{16})-(?P<count>[0-9]{1,9})", re.ASCII)
_NAME = re.compile(r"[A-Za-z0-9][\w.\-]{0,63}", re.ASCII)
_OTHER_HOST_SECONDS = 24 * 3600.0  # some network file systems lock within a host alone

# What peft can and vLLM cannot (its lora/peft_helper.py); it would ignore some of these without a word.
_NOT_IN_VLLM = (
    "use_dora",
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
    """The adapters' versions of one run, of each adapter the newest and those still in use.

    Args:
        parent: Where the run's folder is made, at the first version.
        name: First part of the adapters' names.

    Raises:
        ConfigError: The name cannot be that of a folder.
    """

    def __init__(self, parent: Path, name: str) -> None:
        if not _NAME.fullmatch(name):
            raise ConfigError(
                f"{name[:80]!r} is no name for a folder",
                "model.rollouts.init_args.adapter_name",
                "Use letters, digits, '.', '_' and '-', and begin with a letter or digit",
            )
        self.parent, self.name = parent, name
        self.run = secrets.token_hex(8)  # another run may share the folder and the servers
        self.folder = parent / f"opsd-run-{self.run}"
        self.count = 0
        self.newest: dict[str, tuple[str, Adapter]] = {}
        self.written: list[Adapter] = []
        self._own: set[str] = set()  # names of all versions there ever were
        self._judged: dict[tuple[str, str], bool] = {}
        self._owner: int | None = None
        self._process = os.getpid()
        _living.add(self)

    def write(self, model: PeftModel, role: str, weights: dict[str, Tensor]) -> Adapter:
        """The version with these weights; a new one if they have changed.

        Raises:
            UserError: It is no adapter that vLLM can serve, or cannot be written.
        """
        config = model.peft_config[role]
        if wrong := [name for name in _NOT_IN_VLLM if getattr(config, name, None)]:
            raise UserError(
                f"vLLM does not serve adapters with {', '.join(wrong)}: leave it out of model.policy.lora.options, or take "
                "another model.rollouts than vLLM's"
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
            if self._owner is None or not (self.folder / _OWNER).exists():
                if self._owner is not None:
                    os.close(self._owner)
                    self._owner = None
                self._owner = _claim(self.folder)
            os.utime(self.folder / _OWNER)  # the run is alive, for other hosts to see
            write_weights(config, weights, folder)
        except (OSError, SafetensorError) as error:
            raise ConfigError(
                f"cannot write {folder} ({getattr(error, 'strerror', None) or error})",
                "model.rollouts.init_args.adapter_folder",
                "Name a folder on a disk with space that this process may write to",
            ) from None
        adapter = Adapter(name, str(folder))
        self.newest[role] = digest.hexdigest(), adapter
        self.written.append(adapter)
        self._own.add(name)
        return adapter

    def outdated(self, keep: Sequence[Adapter | None] = ()) -> list[Adapter]:
        """Versions that nothing asks for any more."""
        newest = [adapter for _, adapter in self.newest.values()]
        return [adapter for adapter in self.written if adapter not in newest and adapter not in keep]

    def stale(self, keep: Sequence[Adapter | None] = ()) -> Callable[[str, str], bool]:
        """Return a test of an adapter's name and folder as a server lists them. True for outdated versions of this run and
        for versions of dead runs in the same ``parent``."""
        living = {adapter.name for adapter in self.written} - {adapter.name for adapter in self.outdated(keep)}

        def found(name: str, root: str) -> bool:
            if name in self._own:
                return name not in living
            if (name, root) not in self._judged:
                parts = _VERSION.fullmatch(name)
                # The path is made from the name, and compared: what a server says is never opened.
                folder = None if parts is None else self.parent / f"opsd-run-{parts['run']}"
                listed = folder is not None and parts is not None and parts["run"] != self.run and root == str(folder / name)
                self._judged[name, root] = listed and folder is not None and _is_dead(folder)
            return self._judged[name, root]

        return found

    def remove(self, adapters: Sequence[Adapter]) -> None:
        for adapter in adapters:
            folders.remove_export(self.folder / adapter.name)
            self.written.remove(adapter)

    def remove_all(self) -> list[str]:
        """Remove the run's folder; returns the names of the versions that were in it."""
        if os.getpid() != self._process:  # a forked copy of the run
            return []
        names = [adapter.name for adapter in self.written]
        self.written, self.newest = [], {}
        if self._owner is not None:
            folders.remove_tree(self.folder)
            os.close(self._owner)
            self._owner = None
        return names

    def sweep(self) -> None:
        """Remove what dead runs left in ``parent``."""
        try:
            entries = [entry.name for entry in os.scandir(self.parent) if _RUN.fullmatch(entry.name)]
        except OSError:
            return
        for name in entries:
            if name != self.folder.name:
                _is_dead(self.parent / name, remove=True)


_living: weakref.WeakSet[AdapterVersions] = weakref.WeakSet()


def _in_child() -> None:
    """Close the locks that a forked process shares: one that outlives the run must not hold its folder."""
    for versions in _living:
        if versions._owner is not None:
            os.close(versions._owner)  # not unlocked: that would unlock the parent's
            versions._owner = None


if hasattr(os, "register_at_fork"):
    os.register_at_fork(after_in_child=_in_child)


def _claim(folder: Path) -> int:
    """Make a run's folder, and hold its lock; returns the open file, whose end is the lock's."""
    folder.mkdir(parents=True, exist_ok=True)
    handle = os.open(folder / _OWNER, os.O_RDWR | os.O_CREAT | os.O_EXCL | getattr(os, "O_CLOEXEC", 0), 0o644)
    host: str | None = _host()
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX)
        except (OSError, AttributeError):  # no locks here: nobody could tell a dead run, and none is removed
            host = None
        # The process only informs; the lock says if the run is alive.
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
    """Tell if a run's folder is absent or its run has ended, without a doubt.

    Args:
        folder: Its path.
        remove: Remove it if its run has ended.
    """
    try:
        if folder.name not in os.listdir(folder.parent):
            return True
        found = os.lstat(folder)
        if not stat.S_ISDIR(found.st_mode) or found.st_uid != os.geteuid():
            return False  # not ours
        handle = os.open(folder / _OWNER, os.O_RDWR | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_CLOEXEC", 0))
    except (OSError, AttributeError):  # another sweeps it, or it is none of ours
        return False
    try:
        if fcntl is None:
            return False
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        owner = json.loads(os.read(handle, 4096).decode("utf-8"))
        if owner["package"] != "opsd_lightning" or owner["run"] != folder.name or owner["host"] is None:
            return False
        if owner["host"] != _host() and time.time() - os.fstat(handle).st_mtime < _OTHER_HOST_SECONDS:
            return False
        if remove:
            folders.remove_tree(folder)
        return True
    except (OSError, ValueError, KeyError, TypeError):  # locked by its run, or not written by this package
        return False
    finally:
        os.close(handle)


def _host() -> str:
    """This system's present start, as far as it is known: within it a lock holds for sure."""
    try:
        return Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
    except OSError:
        return platform.node()
