"""Folders and pages that the package replaces and removes: exports, model folders, reports.

A folder is replaced only where nothing else can be lost. Each folder that is written here holds `MANIFEST`, which lists its
files. A folder that exists is replaced if it is empty, or if it holds the files of its manifest and nothing else but what
systems, Git and notebooks leave: ``.DS_Store``, ``__pycache__`` and ``.cache/huggingface`` are removed with the folder,
``.gitattributes`` and ``.ipynb_checkpoints`` stay in the folder that was renamed aside, with a warning. The new
folder is written beside it, the old one is renamed aside (``NAME.old-...``) and removed file by file once the new one is in
its place. A process that is killed in between leaves the old or the new folder whole, under its name or beside it.
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

#: The file that marks a folder as written by this package, and lists what it holds.
MANIFEST = "opsd_export.json"
_MADE_BY = "opsd_lightning"
_EMPTY = -1  # in the place of a size
_GENERATOR = b'<meta name="generator" content="opsd-lightning">'
_EARLIER_PAGE = (b"Content-Security-Policy", b'<script type="application/json" id="data">')
_FIX = "Choose a folder that does not exist yet, or move this one away"

#: A file or folder that must stay, with words for it, such as "the base model".
Protected = tuple[str, str | Path]


def resolve_parent(folder: str | Path) -> Path:
    """Return where a folder really lies. Links on the way are followed; the folder itself may be a link."""
    folder = Path(folder).absolute()
    return folder.resolve() if folder.name in ("", "..") else folder.parent.resolve() / folder.name


def check_replaceable(folder: str | Path, setting: str, kind: str, kept: Iterable[Protected] = ()) -> Path:
    """Refuse a folder that `replace_folder` would not replace.

    Args:
        folder: The folder to be written.
        setting: Name of the setting that it comes from.
        kind: Kind of export, such as ``adapter``. A folder of another kind is refused.
        kept: Files and folders that the run reads or writes elsewhere. The folder is none of them and holds none of them.

    Returns:
        Where the folder really lies.

    Raises:
        ConfigError: It is in use, a link, a file or a mount point, cannot be written, or holds more than an earlier export.
    """
    place = resolve_parent(folder)
    here: list[Protected] = []
    with suppress(FileNotFoundError):  # it was removed
        here.append(("the current folder", os.getcwd()))
    with suppress(RuntimeError):  # the system knows of none
        here.append(("the home folder", Path.home()))
    for words, path in [*here, *kept]:
        for other in (resolve_parent(path), Path(path).resolve()):
            if place == other or place in other.parents:
                problem = f"{place} is {words}" if place == other else f"{place} holds {words} ({other})"
                raise ConfigError(problem, setting, "Choose a folder of its own")
    if (reason := _refusal_reason(place, kind)) is not None:
        raise ConfigError(reason, setting, _FIX)
    parent = next(path for path in place.parents if path.exists())
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise ConfigError(f"cannot write to {parent}", setting, "Choose a folder that can be written")
    return place


@contextmanager
def replace_folder(
    folder: str | Path, setting: str, kind: str, kept: Iterable[Protected] = (), durable: bool = True
) -> Iterator[Path]:
    """Write a folder whole, or leave the earlier one: yields a temporary folder, which takes its name at the end.

    Args:
        folder: See `check_replaceable`.
        setting: See `check_replaceable`.
        kind: See `check_replaceable`.
        kept: See `check_replaceable`.
        durable: Wait until the disk has it, and list the digest of each file, so that one that was changed later is told
            from one that was not. If False, for folders that live no longer than their process, files are listed by size.

    Raises:
        ConfigError: The folder may not be replaced, before or after it was written. The earlier one stays.
    """
    place = check_replaceable(folder, setting, kind, kept)
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
    """Remove a folder that `replace_folder` wrote: the files of its manifest, and nothing else.

    Returns:
        True if the folder is gone. What is not of the manifest stays, and the folder with it.
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
    """Remove a folder with all that is in it. For folders of a run that has locked them under a name of its own."""
    shutil.rmtree(folder, ignore_errors=True)


def check_page(path: str | Path, setting: str) -> None:
    """Refuse to replace a file that exists and is no page of this package.

    Raises:
        ConfigError: With the setting that names the file.
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
        fix = "Choose another file, or move this one away"
        raise ConfigError(f"{path} is no page that this package wrote, and would be replaced", setting, fix)


def free_name(folder: Path) -> Path:
    """Return the first of ``NAME-1``, ``NAME-2``, ... beside a folder or file that nothing has yet."""
    ending = "" if folder.is_dir() else folder.suffix
    stem = folder.name.removesuffix(ending)
    names = (folder.with_name(f"{stem}-{n}{ending}") for n in range(1, 10**6))
    return next(path for path in names if not os.path.lexists(path))


def _refusal_reason(place: Path, kind: str) -> str | None:
    """Return why what lies at a place may not be replaced; None where it may."""
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
            f"{place} is not empty, and no earlier export ({MANIFEST} is missing, as in exports of earlier versions): "
            f"it holds {_some_names(found)}"
        )
    if manifest["kind"] != kind:
        return f"{place} holds an export of another kind ({manifest['kind']}, not {kind})"
    if others := [name for name, size in found.items() if not _matches_manifest(place, name, size, manifest["files"], True)]:
        return f"{place} holds an earlier export and files that were added or changed since: {_some_names(others)}"
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
    """Return the sizes of all below a folder, by relative name: of regular files; `_EMPTY` for empty folders, None for links
    and other things."""
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
    """Return True if a file is as the manifest lists it."""
    if name == MANIFEST:
        return size is not None
    if size == _EMPTY:  # left by a removal that was cut short
        return any(other.startswith(f"{name}/") for other in files)
    listed = files.get(name)
    if size is None or not isinstance(listed, list) or len(listed) != 2 or listed[0] != size:
        return False
    return not thorough or listed[1] is None or listed[1] == _digest(place / name)


def _is_generated(name: str) -> bool:
    """Return True for a file that its program makes again, and that is removed with an export."""
    path = Path(name)
    compiled = "__pycache__" in path.parts and path.suffix in (".pyc", "")
    return path.name == ".DS_Store" or compiled or path.is_relative_to(".cache/huggingface")


def _is_kept_aside(name: str) -> bool:
    """Return True for a file beside an export that hinders no other, and is kept."""
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
    """Make a temporary folder beside a place, locked as long as its process lives, so that no other sweeps it."""
    while True:
        folder = Path(tempfile.mkdtemp(prefix=f".{place.name}.partial-", dir=place.parent))
        descriptor = os.open(folder, os.O_RDONLY | os.O_DIRECTORY)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
            _write_manifest(folder, kind, durable=False, partial=True)
        except BlockingIOError:  # just being swept
            os.close(descriptor)
            continue
        except FileNotFoundError:
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
    """Remove temporary folders of processes that were killed, and old exports that they had put aside."""
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
            pass  # of a process that lives, or a file system without locks
        finally:
            os.close(descriptor)
    if not place.exists():
        return  # an old export may be the only one
    for folder in place.parent.glob(f"{name}.old-????????"):
        if folder.is_symlink() or not folder.is_dir():
            continue
        manifest = _read_manifest(folder)
        if manifest is None:
            with suppress(OSError):
                folder.rmdir()  # only where it is empty
        else:
            found = _file_sizes(folder)
            if all(
                _is_generated(name) or _matches_manifest(folder, name, size, manifest["files"], True)
                for name, size in found.items()
            ):
                _remove_files(folder, list(found))


def _remove_temporary(folder: Path) -> None:
    """Remove a temporary folder of `replace_folder`; its manifest last, so that a rest is still known for one."""
    with suppress(OSError):
        for path in folder.iterdir():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path, ignore_errors=True)
            elif path.name != MANIFEST:
                path.unlink()
        (folder / MANIFEST).unlink(missing_ok=True)
        folder.rmdir()


def _rename_into_place(temporary: Path, place: Path, setting: str, kind: str) -> None:
    """Rename a folder to its place, and what is there aside, which is then removed."""
    aside: Path | None = None
    files: list[str] = []
    try:
        for _ in range(100):  # another process may put one there at the same time
            try:
                os.rename(temporary, place)  # where there is none, or an empty one
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
            if _file_stamps(mine) != before:  # changed since it was looked at
                _rename_back(mine, place)
                raise ConfigError(f"{place} is being changed by another process", setting, _FIX)
            if aside is not None:
                _remove_files(aside, files)
            aside, files = mine, [name for name in before if not _is_kept_aside(name)]
        else:
            raise ConfigError(
                f"{place} is replaced by other processes all the time", setting, "Give each a folder of its own"
            )
    except BaseException:
        if aside is not None:
            _rename_back(aside, place)
        raise
    if aside is not None and not _remove_files(aside, files):
        warnings.warn(f"the folder that was at {place} before was not removed whole: {aside}", stacklevel=4)


def _rename_back(aside: Path, place: Path) -> None:
    """Rename a folder back, if its place is still free."""
    if not os.path.lexists(place):
        os.rename(aside, place)


def _file_stamps(place: Path) -> dict[str, tuple[int, ...]]:
    """Return what changes with the files below a folder."""
    try:
        found = {name: os.lstat(place / name) for name in _file_sizes(place)}
    except OSError:
        return {}
    return {name: (status.st_ino, status.st_size, status.st_mtime_ns) for name, status in found.items()}


def _remove_files(place: Path, names: Iterable[str]) -> bool:
    """Remove files, then the folders that are empty without them; the manifest last, so that a rest is still known for ours.

    Returns:
        True if the folder is gone.
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
