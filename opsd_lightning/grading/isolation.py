"""Isolation of the current process from its machine, with Linux namespaces, seccomp and resource limits.

``sandbox_worker`` calls these functions in a process of its own. They change the process for good. Nothing here imports
this package, and ``ctypes`` calls the system, because Python has no functions for mounts and seccomp, and none for
namespaces before 3.12.
"""

from __future__ import annotations

import ctypes
import os
import platform
import resource
import signal
import struct
import sys
from collections.abc import Iterable
from contextlib import suppress
from itertools import pairwise

NOBODY = 65534
"""User and group id inside the sandbox."""

_NEWNS, _NEWUTS, _NEWIPC, _NEWUSER, _NEWPID, _NEWNET = 0x20000, 0x4000000, 0x8000000, 0x10000000, 0x20000000, 0x40000000
_MS_NOSUID, _MS_NODEV, _MS_BIND, _MS_REC, _MS_PRIVATE = 2, 4, 4096, 16384, 1 << 18
_MNT_DETACH = 2
_MOUNT_SETATTR, _AT_RECURSIVE, _ATTR_READ_ONLY, _ATTR_NOSUID, _ATTR_NODEV = 442, 0x8000, 1, 2, 4
_PR_SET_PDEATHSIG, _PR_SET_DUMPABLE, _PR_SET_SECCOMP, _PR_CAPBSET_DROP, _PR_SET_NO_NEW_PRIVS = 1, 4, 22, 24, 38
_DEVICES = ("/dev/null", "/dev/zero", "/dev/random", "/dev/urandom")
# Shared libraries, their cache, and time zones. Python's own folders are added to these.
_SYSTEM = (
    "/lib",
    "/lib64",
    "/usr/lib",
    "/usr/lib64",
    "/usr/local/lib",
    "/etc/ld.so.cache",
    "/usr/share/zoneinfo",
    "/nix/store",
)

_libc = ctypes.CDLL(None, use_errno=True)


def _check(result: int, action: str) -> None:
    if result != 0:
        number = ctypes.get_errno()
        raise OSError(number, f"{action}: {os.strerror(number)}")


def end_with_parent() -> None:
    """Have the system kill this process when its parent ends. To be called again after a change of user."""
    if sys.platform == "linux":
        _check(_libc.prctl(_PR_SET_PDEATHSIG, signal.SIGKILL, 0, 0, 0), "prctl(PR_SET_PDEATHSIG)")


def _mount(source: str, target: str, kind: str, flags: int, data: str = "") -> None:
    arguments = (source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), data.encode())
    _check(_libc.mount(*arguments), f"mount({target})")


def _restrict_mount(target: str, recursive: bool) -> None:
    attributes = struct.pack("=QQQQ", _ATTR_READ_ONLY | _ATTR_NOSUID | _ATTR_NODEV, 0, 0, 0)
    flags = _AT_RECURSIVE if recursive else 0
    result = _libc.syscall(
        ctypes.c_long(_MOUNT_SETATTR), -100, target.encode(), ctypes.c_uint(flags), attributes, ctypes.c_size_t(32)
    )
    _check(result, f"mount_setattr({target})")


def _pivot(new: str, old: str) -> None:
    _check(_libc.pivot_root(new.encode(), old.encode()), "pivot_root")


def _visible_paths() -> list[tuple[str, str]]:
    """Return the paths that the sandbox shows, each with the path that it really is."""
    python = {
        sys.prefix,
        sys.exec_prefix,
        sys.base_prefix,
        sys.base_exec_prefix,
        *map(os.path.realpath, (sys.base_prefix, sys.prefix)),
    }
    found: list[tuple[str, str]] = []
    for path in sorted({*map(os.path.abspath, python), *_SYSTEM}, key=len):
        covered = any(path == above or path.startswith(above.rstrip("/") + "/") for above, _ in found)
        if os.path.exists(path) and not covered:
            found.append((path, os.path.realpath(path)))
    return found


def _scratch_folder(shown: Iterable[str]) -> str:
    """Return the folder that can be written: ``/tmp``, or another one if Python or its packages lie there."""
    paths = list(shown)
    choices = ("/tmp", "/var/tmp", "/scratch")  # Python's tempfile tries the first two
    return next(each for each in choices if not any(f"{path}/".startswith(f"{each}/") for path in paths))


def _make_root(scratch_bytes: int) -> None:
    """Replace the root folder by one that holds Python, libraries and a scratch folder, all but the last read-only."""
    shown = _visible_paths()
    scratch = _scratch_folder(path for path, _ in shown)
    _mount("none", "/", "", _MS_REC | _MS_PRIVATE)
    _mount("tmpfs", "/tmp", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    os.mkdir("/tmp/old")
    os.mkdir("/tmp/new")
    _pivot("/tmp", "/tmp/old")
    os.chdir("/")
    _mount("tmpfs", "/new", "tmpfs", _MS_NOSUID | _MS_NODEV, "mode=755")
    for path, source in shown:
        target = "/new" + path
        if os.path.isdir("/old" + source):
            os.makedirs(target, exist_ok=True)
        else:
            _make_file(target)
        _mount("/old" + source, target, "", _MS_BIND | _MS_REC)
        _restrict_mount(target, recursive=True)
    for path in _DEVICES:
        _make_file("/new" + path)
        _mount("/old" + path, "/new" + path, "", _MS_BIND)
    os.makedirs("/new" + scratch, exist_ok=True)
    _restrict_mount("/new", recursive=False)
    _mount("tmpfs", "/new" + scratch, "tmpfs", _MS_NOSUID | _MS_NODEV, f"mode=777,size={scratch_bytes},nr_inodes=2000")
    _check(_libc.umount2(b"/old", _MNT_DETACH), "umount2")
    os.chdir("/new")
    _pivot(".", ".")
    _check(_libc.umount2(b".", _MNT_DETACH), "umount2")
    os.chdir(scratch)


def _make_file(path: str) -> None:
    os.makedirs(os.path.dirname(path), exist_ok=True)
    os.close(os.open(path, os.O_CREAT | os.O_WRONLY, 0o644))


def enter_namespaces(scratch_bytes: int) -> None:
    """Enter new user, PID, mount, network, IPC and UTS namespaces, with a root folder of their own.

    The next child process is the first one of the PID namespace. All others in it are killed when it ends. A process of
    root becomes one of ``NOBODY`` first if it may, so that it owns no files of root.

    Args:
        scratch_bytes: Size of the only folder that can be written (see `_scratch_folder`), which becomes the current one. It
            is in memory, and ends with the namespace.

    Raises:
        OSError: The system or its settings do not allow it.
    """
    if sys.platform != "linux":
        raise OSError(f"{sys.platform} has no namespaces")
    proc = os.open("/proc", os.O_PATH | os.O_DIRECTORY)
    others = _NEWPID | _NEWNET | _NEWIPC | _NEWUTS | _NEWNS | _NEWUSER
    # Root of a container may not do this, and then goes on like any other user.
    is_root = os.geteuid() == 0 and _libc.unshare(_NEWNS) == 0
    if is_root:  # Python may lie in a folder of root, which only root can make visible
        _make_root(scratch_bytes)
        with suppress(OSError):  # root of a namespace with few users
            os.setgroups([])
            os.setresgid(NOBODY, NOBODY, NOBODY)
            os.setresuid(NOBODY, NOBODY, NOBODY)
        _check(_libc.prctl(_PR_SET_DUMPABLE, 1, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")  # it may write its uid_map
    user, group = os.geteuid(), os.getegid()
    _check(_libc.unshare(others), "unshare")
    for name, text in (("setgroups", "deny"), ("uid_map", f"{NOBODY} {user} 1"), ("gid_map", f"{NOBODY} {group} 1")):
        file = os.open(f"self/{name}", os.O_WRONLY, dir_fd=proc)
        os.write(file, text.encode())
        os.close(file)
    os.close(proc)
    if not is_root:
        _make_root(scratch_bytes)


def drop_capabilities() -> None:
    """Give up all capabilities, also those that an executed file would bring back."""
    for number in range(64):
        _libc.prctl(_PR_CAPBSET_DROP, number, 0, 0, 0)  # fails beyond the last capability
    header, none = struct.pack("=Ii", 0x20080522, 0), struct.pack("=6I", *[0] * 6)
    _check(_libc.capset(header, none), "capset")
    _check(_libc.prctl(_PR_SET_DUMPABLE, 0, 0, 0, 0), "prctl(PR_SET_DUMPABLE)")


def limit_resources(memory_bytes: int, cpu_seconds: int, file_bytes: int, open_files: int) -> None:
    """Set limits of this process and its children. Limits that the system does not have are left out."""
    limits = {
        "RLIMIT_AS": memory_bytes, "RLIMIT_CPU": cpu_seconds, "RLIMIT_FSIZE": file_bytes, "RLIMIT_NOFILE": open_files,
        "RLIMIT_CORE": 0, "RLIMIT_MSGQUEUE": 0, "RLIMIT_MEMLOCK": 0, "RLIMIT_SIGPENDING": 64,
    }  # fmt: skip
    for name, most in limits.items():
        with suppress(AttributeError, OSError, ValueError):
            number = getattr(resource, name)
            hard = resource.getrlimit(number)[1]
            most = most if hard == resource.RLIM_INFINITY else min(most, hard)
            resource.setrlimit(number, (most, most))


# -- seccomp -------------------------------------------------------------------------------------------------------------

# Numbers of system calls on x86-64 and on 64-bit ARM. Those from 424 on are the same on both.
_REFUSED = {
    "fork": (57,), "vfork": (58,), "execve": (59, 221), "execveat": (322, 281), "socket": (41, 198), "ptrace": (101, 117),
    "tkill": (200, 130), "rt_sigqueueinfo": (129, 138), "rt_tgsigqueueinfo": (297, 240), "process_vm_readv": (310, 270),
    "process_vm_writev": (311, 271), "unshare": (272, 97), "setns": (308, 268), "mount": (165, 40), "umount2": (166, 39),
    "pivot_root": (155, 41), "chroot": (161, 51), "bpf": (321, 280), "perf_event_open": (298, 241), "kcmp": (312, 272),
    "userfaultfd": (323, 282), "keyctl": (250, 219), "add_key": (248, 217), "request_key": (249, 218), "syslog": (103, 116),
    "memfd_create": (319, 279), "shmget": (29, 194), "msgget": (68, 186), "semget": (64, 190), "mq_open": (240, 180),
    "personality": (135, 92), "name_to_handle_at": (303, 264), "open_by_handle_at": (304, 265), "fanotify_init": (300, 262),
    "setpriority": (141, 140), "sched_setaffinity": (203, 122), "sched_setscheduler": (144, 119), "ioprio_set": (251, 30),
    "pidfd_send_signal": (424, 424), "io_uring_setup": (425, 425), "io_uring_enter": (426, 426), "open_tree": (428, 428),
    "io_uring_register": (427, 427), "move_mount": (429, 429), "fsopen": (430, 430), "fsconfig": (431, 431),
    "fsmount": (432, 432), "fspick": (433, 433), "pidfd_open": (434, 434), "pidfd_getfd": (438, 438),
    "setsid": (112, 157), "setpgid": (109, 154), "process_madvise": (440, 440), "mount_setattr": (442, 442),
    "memfd_secret": (447, 447),
}  # fmt: skip
_CLONE, _CLONE3, _KILL, _TGKILL, _PRLIMIT = (56, 220), 435, (62, 129), (234, 131), (302, 261)
_CLONE_THREAD = 0x10000
_ARCHITECTURES = {"x86_64": (0, 0xC000003E), "aarch64": (1, 0xC00000B7)}
_LOAD, _EQUAL, _AT_LEAST, _ANY_BIT, _RETURN = 0x20, 0x15, 0x35, 0x45, 0x06
_ALLOW, _ERROR = 0x7FFF0000, 0x00050000
_EPERM, _ENOSYS = 1, 38


def can_filter() -> bool:
    """Return True if the numbers of system calls of this machine are known."""
    return sys.platform == "linux" and platform.machine() in _ARCHITECTURES and sys.maxsize > 2**32


def filter_system_calls() -> None:
    """Refuse system calls that start processes, open sockets, signal other processes, or reach into the kernel.

    Refused calls fail with ``EPERM``. Threads can be started, and this process can signal itself.

    Raises:
        OSError: The system or its settings do not allow it.
    """
    place, architecture = _ARCHITECTURES[platform.machine()]
    code: list[tuple[int, int, int, int]] = []  # operation, jump if true, jump if false, value

    def refuse_unless(number: int, argument: int, operation: int, value: int) -> None:
        """Refuse a call unless its argument passes a comparison. Only the lower 32 bits are compared."""
        checks = [(_LOAD, 0, 0, 16 + 8 * argument), (operation, 1, 0, value), (_RETURN, 0, 0, _ERROR | _EPERM)]
        code.extend([(_EQUAL, 0, len(checks) + 1, number), *checks, (_RETURN, 0, 0, _ALLOW)])

    code += [(_LOAD, 0, 0, 4), (_EQUAL, 1, 0, architecture), (_RETURN, 0, 0, _ERROR | _EPERM), (_LOAD, 0, 0, 0)]
    code += [(_AT_LEAST, 0, 1, 0x40000000), (_RETURN, 0, 0, _ERROR | _EPERM)]  # x32
    code += [(_EQUAL, 0, 1, _CLONE3), (_RETURN, 0, 0, _ERROR | _ENOSYS)]  # libraries then call clone
    for numbers in _REFUSED.values():
        if place < len(numbers):
            code += [(_EQUAL, 0, 1, numbers[place]), (_RETURN, 0, 0, _ERROR | _EPERM)]
    refuse_unless(_CLONE[place], 0, _ANY_BIT, _CLONE_THREAD)
    refuse_unless(_KILL[place], 0, _EQUAL, os.getpid())
    refuse_unless(_TGKILL[place], 0, _EQUAL, os.getpid())
    refuse_unless(_PRLIMIT[place], 0, _EQUAL, 0)
    code.append((_RETURN, 0, 0, _ALLOW))
    program = b"".join(struct.pack("=HBBI", operation, yes, no, value) for operation, yes, no, value in code)
    buffer = ctypes.create_string_buffer(program, len(program))
    header = struct.pack("@HP", len(code), ctypes.addressof(buffer))
    _check(_libc.prctl(_PR_SET_NO_NEW_PRIVS, 1, 0, 0, 0), "prctl(PR_SET_NO_NEW_PRIVS)")
    _check(_libc.prctl(_PR_SET_SECCOMP, 2, header, 0, 0), "prctl(PR_SET_SECCOMP)")


def close_all_but(kept: Iterable[int]) -> None:
    """Close all file descriptors but these."""
    end = max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 1024)
    borders = [-1, *sorted(kept), end]
    for below, above in pairwise(borders):
        if below + 1 < above:  # closerange would take an empty range for all of them
            os.closerange(below + 1, above)
