"""System calls of Linux that Python's standard library does not have, through ctypes."""

import ctypes
import os
import platform

CLONE_NEWNS = 0x00020000
CLONE_NEWCGROUP = 0x02000000
CLONE_NEWUTS = 0x04000000
CLONE_NEWIPC = 0x08000000
CLONE_NEWUSER = 0x10000000
CLONE_NEWPID = 0x20000000
CLONE_NEWNET = 0x40000000

MS_RDONLY = 1
MS_NOSUID = 2
MS_NODEV = 4
MS_NOEXEC = 8
MS_REMOUNT = 32
MS_BIND = 4096
MS_REC = 16384
MS_PRIVATE = 1 << 18
MNT_DETACH = 2

PR_SET_PDEATHSIG = 1
PR_SET_DUMPABLE = 4
PR_SET_SECCOMP = 22
PR_CAPBSET_DROP = 24
PR_SET_CHILD_SUBREAPER = 36
PR_SET_NO_NEW_PRIVS = 38
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

_AT_RECURSIVE = 0x8000
_MOUNT_ATTR = 0x1 | 0x2 | 0x4  # read-only, no set-user-id programs, no devices
_SYSCALLS = {  # pivot_root, mount_setattr, capset
    "x86_64": (155, 442, 126),
    "aarch64": (41, 442, 91),
}
_libc = ctypes.CDLL(None, use_errno=True)


def machine() -> str:
    """Return the machine type in the kernel's words: `x86_64`, `aarch64`, or another one."""
    name = platform.machine().lower()
    return {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)


def _check(result: int, what: str) -> int:
    if result == -1:
        number = ctypes.get_errno()
        raise OSError(number, f"{what}: {os.strerror(number)}")
    return result


def syscall(number: int, *arguments: object, what: str) -> int:
    """Call the kernel directly. The error message says what was called."""
    return _check(_libc.syscall(ctypes.c_long(number), *arguments), what)


def unshare(flags: int, what: str) -> None:
    """Move this process to new namespaces."""
    _check(_libc.unshare(flags), f"new namespaces ({what})")


def mount(source: str, target: str, kind: str, flags: int, options: str = "") -> None:
    """Mount a file system, or change a mount."""
    result = _libc.mount(
        source.encode(), target.encode(), kind.encode(), ctypes.c_ulong(flags), options.encode()
    )
    _check(result, f"mount of {target}")


def make_read_only(target: str) -> None:
    """Make a mount and the mounts below it read-only, without devices and set-user-id programs."""
    attributes = (ctypes.c_uint64 * 4)(_MOUNT_ATTR, 0, 0, 0)
    result = _libc.syscall(
        _number(1), -1, target.encode(), _AT_RECURSIVE, attributes, ctypes.c_size_t(32)
    )
    _check(result, f"read-only mount of {target} (mount_setattr, Linux 5.12 or later)")


def pivot_root(new: str) -> None:
    """Make a mounted folder the root of this mount namespace, and detach the former root."""
    os.chdir(new)
    _check(_libc.syscall(_number(0), b".", b"."), "pivot_root")
    _check(_libc.umount2(b".", MNT_DETACH), "umount of the former root")
    os.chdir("/")


def prctl(option: int, *arguments: int) -> None:
    """Call `prctl`."""
    values = [ctypes.c_ulong(value) for value in (*arguments, 0, 0, 0, 0)[:4]]
    _check(_libc.prctl(option, *values), f"prctl {option}")


def drop_capabilities() -> None:
    """Give up every capability of this process, for ever."""
    header = (ctypes.c_uint32 * 2)(0x20080522, 0)
    data = (ctypes.c_uint32 * 6)()
    _check(_libc.syscall(_number(2), header, data), "capset")


def drop_bounding_set() -> None:
    """Remove every capability from the bounding set and the ambient set of this process."""
    for capability in range(64):
        try:
            prctl(PR_CAPBSET_DROP, capability)
        except OSError as error:
            if error.errno == 22:  # EINVAL: the kernel has no more capabilities
                break
            raise
    prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)


def _number(which: int) -> int:
    return _SYSCALLS[machine()][which]
