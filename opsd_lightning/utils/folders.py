"""Atomic replacement of folders (exports, model folders) and checks before pages are overwritten.

A folder is replaced only if no other files can be lost. Each folder that is written here contains `MANIFEST`, which lists
its files. An existing folder is replaced if it is empty, or if it contains only the files of its manifest and files that
systems, Git and notebooks add. ``.DS_Store``, ``__pycache__`` and ``.cache/huggingface`` are removed with the folder.
``.gitattributes`` and ``.ipynb_checkpoints`` stay in the renamed old folder, with a warning.

The new folder is written under a temporary name. The old one is renamed to ``NAME.old-...``, the new one takes its name,
and the files of the old one are removed. If the process is killed in between, the old or the new folder is complete, under
its own name or next to it.
"""

from __future__ import annotations

import errno
import fcntl
import glob
import hashlib
import json
import os
import secrets
import shutil
import stat
import tempfile
import warnings
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from opsd_lightning.types import ConfigError
from opsd_lightning.utils.files import atomic_write, fsync_path

#: File that marks a folder as written by this package and lists its files.
MANIFEST = "opsd_export.json"
_MADE_BY = "opsd_lightning"
_EMPTY = -1  # stands for the size of an empty folder
_GENERATOR = b'<meta name="generator" content="opsd-lightning">'
_EARLIER_PAGE = (b"Content-Security-Policy", b'<script type="application/json" id="data">')
_FIX = "Choose a folder that does not exist yet, or move this one away"

#: A file or folder that must not be replaced, after its description, such as "the base model".
Protected = tuple[str, str | Path]


def resolve_parent(folder: str | Path) -> Path:
    """Resolve symbolic links in the parents of a folder, but not the folder itself."""
    folder = Path(folder).absolute()
    return folder.resolve() if folder.name in ("", "..") else folder.parent.resolve() / folder.name


def check_replaceable(folder: str | Path, setting: str, kind: str, protected: Iterable[Protected] = ()) -> Path:
    """Check that `replace_folder` may write a folder.

    Args:
        folder: The folder to be written.
        setting: Setting that names the folder, for errors.
        kind: Kind of export, such as ``adapter``. An existing export must be of the same kind.
        protected: Files and folders that the run uses otherwise. The folder must not be or contain any of them.

    Returns:
        The folder with the links in its parents resolved.

    Raises:
        ConfigError: The folder is in use, a link, a file or a mount point, cannot be written, or contains other files than
            an earlier export.
    """
    place = resolve_parent(folder)
    here: list[Protected] = []
    with suppress(FileNotFoundError):  # the current folder was removed
        here.append(("the current folder", os.getcwd()))
    with suppress(RuntimeError):  # no home folder is known
        here.append(("the home folder", Path.home()))
    for words, path in [*here, *protected]:
        for other in (resolve_parent(path), Path(path).resolve()):
            if place == other or place in other.parents:
                problem = f"{place} is {words}" if place == other else f"{place} contains {words} ({other})"
                raise ConfigError(problem, setting, "Choose a separate folder")
    if (reason := _refusal_reason(place, kind)) is not None:
        raise ConfigError(reason, setting, _FIX)
    parent = next(path for path in place.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to {parent}", setting, "Choose a folder that can be written")
    return place


@contextmanager
def replace_folder(
    folder: str | Path, setting: str, kind: str, protected: Iterable[Protected] = (), durable: bool = True
) -> Iterator[Path]:
    """Write a folder atomically: yield a temporary folder and rename it to the final name at the end.

    Args:
        folder: See `check_replaceable`.
        setting: See `check_replaceable`.
        kind: See `check_replaceable`.
        protected: See `check_replaceable`.
        durable: If True, wait until the files are on disk, and list the digest of each file in the manifest to detect later
            changes. If False, list sizes only, which suits folders that are deleted with their process.

    Raises:
        ConfigError: The folder must not be replaced, before or after the new one was written. The old one stays.
    """
    place = check_replaceable(folder, setting, kind, protected)
    place.parent.mkdir(parents=True, exist_ok=True)
    _remove_leftovers(place)
    temporary, descriptor = _make_temporary(place, kind)
    try:
        yield temporary
        temporary.chmod(0o755)
        _write_manifest(temporary, kind, durable)
        _rename_into_place(temporary, place, setting, kind)
        if durable:
            fsync_path(place.parent)
    finally:
        _remove_temporary(temporary)
        if descriptor is not None:
            os.close(descriptor)


def remove_export(folder: str | Path) -> bool:
    """Remove the files that the manifest of a folder lists, then the folder if it is empty.

    Returns:
        True if the folder no longer exists.
    """
    place = resolve_parent(folder)
    if place.is_symlink() or not place.is_dir():
        return not os.path.lexists(place)
    manifest = _read_manifest(place)
    if manifest is None:
        return False
    found = _file_sizes(place)
    return _remove_files(
        place, [name for name, size in found.items() if _matches_manifest(place, name, size, manifest["files"], False)]
    )


def remove_tree(folder: Path) -> None:
    """Remove a folder with all its contents. Call only for a folder that this run has created and locked."""
    shutil.rmtree(folder, ignore_errors=True)


def check_page(path: str | Path, setting: str) -> None:
    """Check that a file does not exist or is an HTML page written by this package.

    Args:
        path: The file to be overwritten.
        setting: Setting that names the file, for the error.

    Raises:
        ConfigError: The file is something else.
    """
    path = Path(path)
    if not os.path.lexists(path):
        return
    ours = False
    if path.is_file() and not path.is_symlink():
        content = path.read_bytes()
        # Pages of earlier versions do not name their generator.
        ours = not content or _GENERATOR in content[:1000] or all(part in content for part in _EARLIER_PAGE)
    if not ours:
        problem = f"{path} exists and is not a page that this package wrote"
        raise ConfigError(problem, setting, "Choose another file or move this one away")


def free_name(folder: Path) -> Path:
    """Return the first unused name of ``NAME-1``, ``NAME-2``, ... next to a folder or file."""
    ending = "" if folder.is_dir() else folder.suffix
    stem = folder.name.removesuffix(ending)
    names = (folder.with_name(f"{stem}-{n}{ending}") for n in range(1, 10**6))
    return next(path for path in names if not os.path.lexists(path))


def _refusal_reason(place: Path, kind: str) -> str | None:
    """Return the reason why a path must not be replaced, or None."""
    if place.is_symlink():
        return f"{place} is a symbolic link"
    if not place.exists():
        return None
    if not place.is_dir():
        return f"{place} is a file"
    if os.path.ismount(place):
        return f"{place} is a mount point, which cannot be replaced"
    try:
        found = _file_sizes(place)
    except OSError as error:
        return f"{place} cannot be read ({error.strerror})"
    found = {name: size for name, size in found.items() if size is None or not (_is_generated(name) or _is_kept_aside(name))}
    if not found:
        return None
    manifest = _read_manifest(place)
    if manifest is None:
        return (
            f"{place} is not empty and has no {MANIFEST} of an earlier export (exports of old versions have none): "
            f"it contains {_some_names(found)}"
        )
    if manifest["kind"] != kind:
        return f"{place} contains an export of another kind ({manifest['kind']}, not {kind})"
    if others := [name for name, size in found.items() if not _matches_manifest(place, name, size, manifest["files"], True)]:
        return f"{place} contains an earlier export with files that were added or changed later: {_some_names(others)}"
    return None


def _some_names(names: Iterable[str]) -> str:
    names = sorted(names)
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def _read_manifest(place: Path) -> dict[str, Any] | None:
    path = place / MANIFEST
    try:
        if path.is_symlink() or path.stat().st_size > 10**7:
            return None
        found = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError):
        return None
    whole = isinstance(found, dict) and found.get("made_by") == _MADE_BY and isinstance(found.get("kind"), str)
    return found if whole and isinstance(found.get("files"), dict) else None


def _file_sizes(place: Path) -> dict[str, int | None]:
    """Map the relative names below a folder to sizes in bytes, `_EMPTY` for empty folders, and None for links and so on."""
    found: dict[str, int | None] = {}
    pending = [place]
    while pending:
        folder = pending.pop()
        with os.scandir(folder) as entries:
            inside = list(entries)
        if not inside and folder != place:
            found[folder.relative_to(place).as_posix()] = _EMPTY
        for entry in inside:
            if entry.is_dir(follow_symlinks=False):
                pending.append(Path(entry.path))
            else:
                status = entry.stat(follow_symlinks=False)
                name = Path(entry.path).relative_to(place).as_posix()
                found[name] = status.st_size if stat.S_ISREG(status.st_mode) else None
    return found


def _matches_manifest(place: Path, name: str, size: int | None, files: dict[str, Any], thorough: bool) -> bool:
    """Return True if a file has the size, and with ``thorough`` the digest, that the manifest lists."""
    if name == MANIFEST:
        return size is not None
    if size == _EMPTY:  # left by an interrupted removal
        return any(other.startswith(f"{name}/") for other in files)
    listed = files.get(name)
    if size is None or not isinstance(listed, list) or len(listed) != 2 or listed[0] != size:
        return False
    return not thorough or listed[1] is None or listed[1] == _digest(place / name)


def _is_generated(name: str) -> bool:
    """Return True for a file that systems or tools create again. It is removed with an export."""
    path = Path(name)
    compiled = "__pycache__" in path.parts and path.suffix in (".pyc", "")
    return path.name == ".DS_Store" or compiled or path.is_relative_to(".cache/huggingface")


def _is_kept_aside(name: str) -> bool:
    """Return True for a file that does not prevent replacement and is kept in the old folder."""
    return name == ".gitattributes" or ".ipynb_checkpoints" in Path(name).parts


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _write_manifest(folder: Path, kind: str, durable: bool, partial: bool = False) -> None:
    files: dict[str, Any] = {}
    for name, size in sorted(_file_sizes(folder).items()):
        if name != MANIFEST and size is not None and size != _EMPTY:
            files[name] = [size, _digest(folder / name) if durable else None]
            if durable:
                fsync_path(folder / name)
    content: dict[str, Any] = {"made_by": _MADE_BY, "kind": kind, "files": files} | ({"partial": True} if partial else {})
    atomic_write(folder / MANIFEST, json.dumps(content, indent=1) + "\n", durable=durable)
    if durable:
        fsync_path(folder)


def _make_temporary(place: Path, kind: str) -> tuple[Path, int | None]:
    """Create a temporary folder next to a path. It is locked while its process lives, so that no other one removes it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_manifest(folder, kind, durable=False, partial=True)
        except (BlockingIOError, FileNotFoundError):  # another process is removing it as a leftover
            os.close(descriptor)
            continue
        except OSError as error:
            os.close(descriptor)
            if error.errno not in (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL):
                _remove_temporary(folder)
                raise
            return folder, None
        return folder, descriptor


def _remove_leftovers(place: Path) -> None:
    """Remove the temporary folders and renamed old exports of processes that were killed."""
    name = glob.escape(place.name)
    for folder in place.parent.glob(f".{name}.partial-????????"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        manifest = _read_manifest(folder)
        if manifest is None and {path.name for path in folder.iterdir()} - {f".{MANIFEST}.partial"}:
            continue
        try:
            descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        except OSError:
            continue
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            if manifest is None or manifest.get("partial") or place.exists():
                _remove_temporary(folder)
        except OSError:
            pass  # its process is alive, or the file system has no locks
        finally:
            os.close(descriptor)
    if not place.exists():
        return  # a renamed old export may be the only copy
    for folder in place.parent.glob(f"{name}.old-????????"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        manifest = _read_manifest(folder)
        if manifest is None:
            with suppress(OSError):
                folder.rmdir()  # succeeds only if it is empty
        else:
            found = _file_sizes(folder)
            if all(
                _is_generated(name) or _matches_manifest(folder, name, size, manifest["files"], True)
                for name, size in found.items()
            ):
                _remove_files(folder, list(found))


def _remove_temporary(folder: Path) -> None:
    """Remove a temporary folder, its manifest last, so that an interrupted removal is recognized later."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MANIFEST:
                path.unlink()
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()


def _rename_into_place(temporary: Path, place: Path, setting: str, kind: str) -> None:
    """Rename a folder to its final name. An existing folder is first renamed to ``NAME.old-...``, then removed."""
    aside: Path | None = None
    files: list[str] = []
    try:
        for _ in range(100):  # another process may create one at the same time
            try:
                os.rename(temporary, place)  # succeeds if there is none or an empty one
                break
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
            before = _file_stamps(place)
            if (problem := _refusal_reason(place, kind)) is not None:
                raise ConfigError(problem, setting, _FIX)
            mine = place.with_name(f"{place.name}.old-{secrets.token_hex(4)}")
            try:
                os.rename(place, mine)
            except FileNotFoundError:
                continue
            if _file_stamps(mine) != before:  # changed since the check
                _rename_back(mine, place)
                raise ConfigError(f"{place} is being changed by another process", setting, _FIX)
            if aside is not None:
                _remove_files(aside, files)
            aside, files = mine, [name for name in before if not _is_kept_aside(name)]
        else:
            raise ConfigError(
                f"{place} is constantly replaced by other processes", setting, "Give each process its own folder"
            )
    except BaseException:
        if aside is not None:
            _rename_back(aside, place)
        raise
    if aside is not None and not _remove_files(aside, files):
        warnings.warn(f"the old folder at {place} was not removed completely. The rest is in {aside}", stacklevel=4)


def _rename_back(aside: Path, place: Path) -> None:
    """Rename a folder back if its former name is still free."""
    if not os.path.lexists(place):
        os.rename(aside, place)


def _file_stamps(place: Path) -> dict[str, tuple[int, ...]]:
    """Return inode, size and modification time of the files below a folder, to detect changes."""
    try:
        found = {name: os.lstat(place / name) for name in _file_sizes(place)}
    except OSError:
        return {}
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found.items()}


def _remove_files(place: Path, names: Iterable[str]) -> bool:
    """Remove files, then the folders that became empty. The manifest goes last, so that a partial removal is recognized.

    Returns:
        True if the folder no longer exists.
    """
    names = list(names)
    with suppress(OSError):
        for name in names:
            if name != MANIFEST and not (place / name).is_dir():
                (place / name).unlink(missing_ok=True)
    folders = {place / parent for name in names for parent in (Path(name), *Path(name).parents)} - {place}
    for folder in sorted(folders, key=lambda folder: len(folder.parts), reverse=True):
        with suppress(OSError):
            folder.rmdir()
    with suppress(OSError):
        if MANIFEST in names and not _file_sizes(place).keys() - {MANIFEST}:
            (place / MANIFEST).unlink(missing_ok=True)
        place.rmdir()
    return not os.path.lexists(place)
