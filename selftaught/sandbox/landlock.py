"""Landlock: a limit on the files that a process may use, for the mode without namespaces.

It also denies access to processes outside, for example to their descriptors in /proc: without it, a
program could write into the pipe from which the caller reads results.
"""

import ctypes
import os
import struct
from pathlib import Path

import selftaught.sandbox.linux as linux

_CREATE, _ADD_RULE, _RESTRICT_SELF = 444, 445, 446  # x86_64 and aarch64
_EXECUTE, _WRITE, _READ, _READ_FOLDER, _TRUNCATE = 1, 2, 4, 8, 1 << 14
_RIGHTS = {1: (1 << 13) - 1, 2: (1 << 14) - 1, 3: (1 << 15) - 1, 5: (1 << 16) - 1}
"""All rights that the versions of Landlock know."""
_SCOPES = 3
"""No connections to abstract sockets and no signals to processes outside. Version 6 or later."""


def version() -> int:
    """Return the version of Landlock in this kernel. 0: there is none."""
    try:
        return linux.syscall(_CREATE, None, ctypes.c_size_t(0), 1, what="landlock")
    except OSError:
        return 0


def restrict(readable: list[str], writable: str) -> None:
    """Restrict this process to some folders and files, and to a folder that it may change.

    Does nothing where the kernel has no Landlock.
    """
    found = version()
    if found == 0:
        return
    rights = next(value for known, value in reversed(_RIGHTS.items()) if known <= found)
    attributes = struct.pack("=Q", rights)
    if found >= 6:
        attributes += struct.pack("=QQ", 0, _SCOPES)
    rules = linux.syscall(
        _CREATE, attributes, ctypes.c_size_t(len(attributes)), 0, what="landlock rules"
    )
    _allow(rules, writable, rights)
    for path in readable:
        right = _READ | _EXECUTE | (_READ_FOLDER if Path(path).is_dir() else 0)
        _allow(rules, path, right)
    for device in ("null", "zero", "urandom", "random"):
        _allow(rules, f"/dev/{device}", (_READ | _WRITE | _TRUNCATE) & rights)
    linux.prctl(linux.PR_SET_NO_NEW_PRIVS, 1)
    linux.syscall(_RESTRICT_SELF, rules, 0, what="landlock")
    os.close(rules)


def _allow(rules: int, path: str, rights: int) -> None:
    parent = os.open(path, os.O_PATH | os.O_CLOEXEC)
    rule = struct.pack("=Qi", rights, parent)
    linux.syscall(_ADD_RULE, rules, 1, rule, 0, what=f"landlock rule for {path}")
    os.close(parent)
