"""What is taken from a process before it runs untrusted code."""

import math
import os
import random
import resource
import signal
import sys
from contextlib import suppress

import selftaught.sandbox.landlock as landlock
import selftaught.sandbox.linux as linux
import selftaught.sandbox.seccomp as seccomp
import selftaught.sandbox.view as view
from selftaught.sandbox.program import Limits

INSIDE_ID = 1000
"""User and group of programs in their user namespace."""


def confine(limits: Limits, *, folder: str, namespaces: bool, others: int) -> None:
    """Give up every right of this process that a program does not need.

    Args:
        limits: Limits of the program.
        folder: Working folder.
        namespaces: Whether the process is in its own namespaces.
        others: Number of processes of this library that count towards the limit of processes.
    """
    os.chdir(folder)
    os.environ.clear()
    os.environ.update({"TMPDIR": folder, "HOME": folder, "LANG": "C.UTF-8"})
    os.umask(0o077)
    if sys.platform == "linux":
        if namespaces or os.geteuid() == 0:
            # a root without capabilities, as in some containers, cannot do it and has none to drop
            with suppress(*() if namespaces else (PermissionError,)):
                linux.drop_bounding_set()
        if namespaces and os.geteuid() == 0:
            os.setgroups([])
            os.setresgid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
            os.setresuid(INSIDE_ID, INSIDE_ID, INSIDE_ID)
        linux.drop_capabilities()
        linux.prctl(linux.PR_SET_DUMPABLE, 0)
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    if sys.platform == "linux" and not namespaces:
        landlock.restrict(view.sources(), folder)
    _set_limits(limits, namespaces=namespaces, others=others)
    if seccomp.supported():
        seccomp.install(only_this_process=None if namespaces else os.getpid())
    for number in (signal.SIGINT, signal.SIGTERM, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN if number == signal.SIGPIPE else signal.SIG_DFL)
    random.seed(0)


def _set_limits(limits: Limits, *, namespaces: bool, others: int) -> None:
    seconds = math.ceil(limits.seconds)
    wanted = {
        "CPU": (seconds, seconds),
        "AS": (limits.memory_bytes, limits.memory_bytes),
        "FSIZE": (limits.file_bytes, limits.file_bytes),
        "NOFILE": (64, 64),
        "CORE": (0, 0),
        "MEMLOCK": (0, 0),
        "MSGQUEUE": (0, 0),
        "NICE": (0, 0),
        "RTPRIO": (0, 0),
    }
    if namespaces:
        processes = limits.processes + others
        wanted["NPROC"] = (processes, processes)
    for name, (soft, hard) in wanted.items():
        number = getattr(resource, f"RLIMIT_{name}", None)
        if number is None:
            continue
        _, most = resource.getrlimit(number)
        if most != resource.RLIM_INFINITY:
            soft, hard = min(soft, most), min(hard, most)
        try:
            resource.setrlimit(number, (soft, hard))
        except (OSError, ValueError):
            if sys.platform == "linux":  # macOS does not have all of these limits
                raise


def keep_descriptors(*fds: int) -> None:
    """Move descriptors to 3, 4, ... and close all others; standard streams become /dev/null."""
    high = [os.dup(fd) for fd in fds]
    while min(high) < 3 + len(fds):  # so that no copy is overwritten
        high = [os.dup(fd) for fd in high]
    null = os.open(os.devnull, os.O_RDWR)
    for number in range(3):
        os.dup2(null, number)
    for place, fd in enumerate(high):
        os.dup2(fd, 3 + place)
    os.closerange(3 + len(fds), max(resource.getrlimit(resource.RLIMIT_NOFILE)[0], 4096))
