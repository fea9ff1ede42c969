"""A private folder of files named by the fingerprint of their content's origin."""

from __future__ import annotations

import hashlib
import os
import stat
import tempfile
import time
from contextlib import suppress
from pathlib import Path

#: Value of a setting that selects the user's cache folder.
AUTO = "auto"

_DIGEST_BYTES = 32
_LEFTOVER_SECONDS = 24 * 3600.0
_PRUNINGS = 16  # prune after each such part of the limit


def user_folder() -> Path:
    """Return ``$XDG_CACHE_HOME/opsd_lightning``, by default ``~/.cache/opsd_lightning``."""
    # The same on every platform, as for Hugging Face's cache. The specification says to ignore a relative path.
    base = os.environ.get("XDG_CACHE_HOME", "")
    return (Path(base) if os.path.isabs(base) else Path("~/.cache").expanduser()) / "opsd_lightning"


class FileCache:
    """A cache of files in a folder that only its owner can read.

    A file is written under a temporary name and renamed. Its content is stored with a digest of the key and the content.
    A file with another digest is ignored.

    Args:
        setting: Folder in which the cache makes its own folder. ``auto`` selects `user_folder`.
        kind: Name of its own folder, and the ending of its files.
        most_bytes: Limit on the size of all files in bytes. The files that were unused for longest are removed.

    Raises:
        OSError: The home folder is not known.

    Example::

        >>> import tempfile
        >>> from opsd_lightning.utils.file_cache import FileCache
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     cache = FileCache(folder, "rows", 1 << 30)
        ...     _ = cache.store("0123", b"content")
        ...     cache.load("0123"), cache.load("4567")
        (b'content', None)
    """

    def __init__(self, setting: str, kind: str, most_bytes: int) -> None:
        self.kind, self.most_bytes = kind, most_bytes
        self._magic = f"opsd-{kind} 1\n".encode()
        self._unpruned = most_bytes  # bytes that were stored since files were last removed
        try:
            self.folder = (user_folder() if setting == AUTO else Path(setting).expanduser().absolute()) / kind
        except RuntimeError as error:
            raise OSError(str(error)) from None

    def path(self, key: str) -> Path:
        """Return the file of a key."""
        return self.folder / f"{key}.{self.kind}"

    def load(self, key: str) -> bytes | None:
        """Return the content that was stored under a key, or None if there is none or its file is damaged.

        Raises:
            OSError: The folder belongs to another user, or the file cannot be read.
        """
        if not self.folder.exists():
            return None
        self._check_folder()
        try:
            with self.path(key).open("rb") as file:
                magic, digest = file.read(len(self._magic)), file.read(_DIGEST_BYTES)
                content = file.read()
        except FileNotFoundError:
            return None
        if magic != self._magic or digest != _digest(key, content):
            return None
        with suppress(OSError):
            os.utime(self.path(key))  # its time of last use
        return content

    def store(self, key: str, content: bytes) -> Path:
        """Store content under a key, and remove the files that were unused for longest if the cache is too large.

        Raises:
            OSError: The folder belongs to another user, or the file cannot be written.
        """
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._check_folder()
        descriptor, temporary = tempfile.mkstemp(".partial", ".", self.folder)  # only its owner can read it
        try:
            with open(descriptor, "wb") as file:
                file.write(self._magic + _digest(key, content))
                file.write(content)
            os.replace(temporary, self.path(key))
        except BaseException:
            with suppress(OSError):
                os.unlink(temporary)
            raise
        self._unpruned += len(content)
        if self._unpruned * _PRUNINGS >= self.most_bytes:  # not after every small file: this reads the whole folder
            self._unpruned = 0
            self._prune()
        return self.path(key)

    def _check_folder(self) -> None:
        """Make the folder private.

        Raises:
            OSError: It is no folder of this user.
        """
        found = self.folder.lstat()
        if not stat.S_ISDIR(found.st_mode) or (hasattr(os, "getuid") and found.st_uid != os.getuid()):
            raise PermissionError(f"{self.folder} is not a folder of this user")
        if stat.S_IMODE(found.st_mode) != 0o700:
            self.folder.chmod(0o700)

    def _prune(self) -> None:
        files: list[tuple[float, int, Path]] = []
        with os.scandir(self.folder) as entries:
            for entry in entries:
                with suppress(OSError):  # another run may remove it
                    found = entry.stat(follow_symlinks=False)
                    if entry.name.endswith(f".{self.kind}"):
                        files.append((found.st_mtime, found.st_size, Path(entry.path)))
                    elif entry.name.endswith(".partial") and found.st_mtime < time.time() - _LEFTOVER_SECONDS:
                        os.unlink(entry.path)  # left by a killed process
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files)[:-1]:
            if total <= self.most_bytes:
                break
            with suppress(OSError):
                path.unlink()
            total -= size


def _digest(key: str, content: bytes) -> bytes:
    digest = hashlib.blake2b(f"{key}\n".encode(), digest_size=_DIGEST_BYTES)
    digest.update(content)
    return digest.digest()
