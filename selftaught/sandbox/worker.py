"""Worker process of the sandbox: starts the processes of one program at a time.

The tree of processes, in the mode `namespaces`:

- The outer process makes namespaces and the view of the file system. It waits for
- the worker, first process of a process namespace, which gets two pipes per program and forks
- the keeper, which makes a process namespace for the tests and forks
- the test process (`judge`), which forks
- the program (`candidate`) in one more process namespace, before it reads the tests.

The worker never reads programs or tests, so that no program finds those of others in its memory.
When the caller or any process of this chain is killed, the kernel kills what is below it.
"""

import gc
import importlib
import json
import os
import random
import resource
import select
import shutil
import signal
import socket
import sys
import tempfile
import time
from contextlib import suppress
from typing import NoReturn

import selftaught.sandbox.linux as linux
import selftaught.sandbox.messages as messages
import selftaught.sandbox.seccomp as seccomp
import selftaught.sandbox.view as view
from selftaught.sandbox.candidate import LIBRARY, Server
from selftaught.sandbox.confinement import INSIDE_ID, confine, keep_descriptors
from selftaught.sandbox.judge import judge
from selftaught.sandbox.program import Limits
from selftaught.sandbox.remote import Remote, finish

PRELOADED = (
    *LIBRARY, "abc", "contextlib", "dataclasses", "enum", "hashlib", "numbers", "pprint", "queue",
    "textwrap", "threading", "time", "traceback", "unicodedata", "weakref",
)  # fmt: skip
"""Modules that are imported once, before programs are run."""
_HIGHEST_ID = 0x7FFFFFF0
_LATE = 3
"""Exit code of the keeper if the tests used up their CPU time."""


def main() -> None:
    """Run a worker. Standard input is a socket to the caller."""
    options = json.loads(sys.argv[1])
    limits, namespaces = Limits(**options["limits"]), options["isolation"] == "namespaces"
    control = socket.socket(fileno=os.dup(0))
    for name in PRELOADED:
        importlib.import_module(name)
    sys.path[:] = options["path"]
    sys.argv[:] = [""]
    os.environ.clear()
    others = 0
    if namespaces:
        try:
            others = _enter_namespaces()
        except (OSError, AttributeError, KeyError) as error:
            control.sendall(json.dumps({"missing": f"{_STEP[-1]}: {error}"}).encode() + b"\n")
            return
        if pid := os.fork():
            control.close()
            os.dup2(os.open(os.devnull, os.O_RDWR), 0)
            os.waitpid(pid, 0)
            return
        linux.prctl(linux.PR_SET_PDEATHSIG, signal.SIGKILL)
    elif sys.platform == "linux":
        linux.prctl(linux.PR_SET_CHILD_SUBREAPER, 1)
    os.dup2(os.open(os.devnull, os.O_RDWR), 0)
    problem = _seccomp_problem()
    if problem and namespaces:
        control.sendall(json.dumps({"missing": problem}).encode() + b"\n")
        return
    random.seed(0)
    gc.collect()
    gc.freeze()
    control.sendall(json.dumps({"ready": True}).encode() + b"\n")
    Worker(control, limits, namespaces, others).serve()


_STEP = ["start"]
"""The step of the isolation that is being taken, last, in words."""


def _enter_namespaces() -> int:
    """Enter new namespaces with a reduced file system.

    Returns:
        Number of processes of a worker that count towards the limit of processes of a program.
    """
    if not hasattr(os, "setresuid"):
        raise OSError("this system is not Linux")
    _STEP.append("user namespaces")
    mapped = _enter_user_namespace()
    for flag, what in (
        (linux.CLONE_NEWNS, "mount namespaces"), (linux.CLONE_NEWPID, "process namespaces"),
        (linux.CLONE_NEWNET, "network namespaces"), (linux.CLONE_NEWIPC, "IPC namespaces"),
        (linux.CLONE_NEWUTS, "host name namespaces"),
    ):  # fmt: skip
        _STEP.append(what)
        linux.unshare(flag, what)
    with suppress(OSError):
        linux.unshare(linux.CLONE_NEWCGROUP, "cgroup namespaces")
    _STEP.append("a reduced file system")
    view.make_root()
    return 2 if mapped else 5


def _enter_user_namespace() -> bool:
    """Enter a user namespace.

    Returns:
        Whether programs have a user of their own, which needs the rights of root. Otherwise
        they have the user of the caller, without any capability.
    """
    user, group = os.geteuid(), os.getegid()
    users, groups = f"{INSIDE_ID} {user} 1", f"{INSIDE_ID} {group} 1"
    free = [_free_id(kind) for kind in ("uid", "gid")] if user == 0 else [0, 0]
    if not all(free):
        linux.unshare(linux.CLONE_NEWUSER, "user namespaces")
        _write_own_map("setgroups", "deny")
        _write_own_map("uid_map", users)
        _write_own_map("gid_map", groups)
        return False
    read_fd, write_fd = os.pipe()
    parent = os.getpid()
    if not (helper := os.fork()):
        os.close(write_fd)
        os.read(read_fd, 1)  # until the parent is in its namespace
        try:
            for kind, own, other in (("uid", user, free[0]), ("gid", group, free[1])):
                with open(f"/proc/{parent}/{kind}_map", "w") as file:  # noqa: PTH123
                    file.write(f"0 {own} 1\n{INSIDE_ID} {other} 1\n")
        except OSError:
            os._exit(1)
        os._exit(0)
    linux.unshare(linux.CLONE_NEWUSER, "user namespaces")
    os.close(read_fd)
    os.close(write_fd)
    if os.waitpid(helper, 0)[1] != 0:
        raise OSError("the user map of the namespace cannot be written")
    os.setresgid(0, 0, 0)
    os.setresuid(0, 0, 0)
    return True


def _free_id(kind: str) -> int:
    """Return an id that no account has: the highest one of this user namespace. 0: there is none."""
    with open(f"/proc/self/{kind}_map") as file:  # noqa: PTH123
        ranges = [tuple(map(int, line.split())) for line in file]
    return min(max(first + count - 1 for first, _, count in ranges), _HIGHEST_ID)


def _write_own_map(name: str, text: str) -> None:
    with open(f"/proc/self/{name}", "w") as file:  # noqa: PTH123
        file.write(text)


def _seccomp_problem() -> str | None:
    """Return why system calls cannot be filtered, tried in a child process."""
    if not seccomp.supported():
        return f"seccomp: there is no filter for {linux.machine()} machines"
    if not (pid := os.fork()):
        try:
            seccomp.install()
        except BaseException:
            os._exit(1)
        os._exit(0)
    return "seccomp: the kernel refuses the filter" if os.waitpid(pid, 0)[1] else None


class Worker:
    """Runs programs, one at a time."""

    def __init__(self, control: socket.socket, limits: Limits, namespaces: bool, others: int):
        self.control, self.limits, self.namespaces, self.others = (
            control,
            limits,
            namespaces,
            others,
        )
        if namespaces and os.getpid() != 1:
            raise RuntimeError("Expected the worker to be the first process of its namespace.")
        self.group = 0

    def serve(self) -> None:
        """Run programs until the caller closes its end of the socket."""
        while True:
            data, fds, _, _ = socket.recv_fds(self.control, 1, 2)
            if not data or len(fds) != 2:
                break
            self.control.sendall(b"late\n" if self.run(*fds) else b"done\n")
        self.end()

    def run(self, job_fd: int, result_fd: int) -> bool:
        """Run one program.

        Returns:
            Whether it was killed because of the time limit.
        """
        folder = "/tmp" if self.namespaces else tempfile.mkdtemp(prefix="selftaught-")
        life, life_end = os.pipe()
        pid = os.fork()
        if pid == 0:
            try:
                os.close(life)
                self.control.close()
                self.keep((job_fd, result_fd, life_end), folder)
            finally:
                os._exit(1)
        self.group = pid
        for fd in (job_fd, result_fd, life_end):
            os.close(fd)
        late = self.wait(life)
        os.close(life)
        late = self.kill(pid) or late
        if not self.namespaces:
            shutil.rmtree(folder, ignore_errors=True)
        return late

    def wait(self, life: int) -> bool:
        """Wait until the tests have ended. Returns whether the time limit came first."""
        deadline = time.monotonic() + self.limits.wall
        while True:
            left = deadline - time.monotonic()
            if left <= 0:
                return True
            ready, _, _ = select.select([life, self.control], [], [], left)
            if life in ready:
                return False
            if ready:  # the caller has ended: nothing is sent while a program runs
                self.end()

    def kill(self, pid: int) -> bool:
        """Kill what is left of a program and wait until it is gone.

        Returns:
            Whether the tests used up their CPU time.
        """
        if self.namespaces:
            with suppress(ProcessLookupError):
                os.kill(-1, signal.SIGKILL)  # everything in the namespace but this first process
        else:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(pid, signal.SIGKILL)
        late = False
        with suppress(ChildProcessError):
            while True:
                child, status, usage = os.wait4(-1, 0)
                if child == pid:
                    late = status == _LATE << 8 or (
                        not self.namespaces and self.late(status, usage)
                    )
        return late

    def late(self, status: int, usage: resource.struct_rusage) -> bool:
        """Return whether a process was killed because it used up its CPU time."""
        killed = os.WIFSIGNALED(status) and os.WTERMSIG(status) in (signal.SIGKILL, signal.SIGXCPU)
        return killed and usage.ru_utime + usage.ru_stime >= 0.5 * self.limits.seconds

    def end(self) -> NoReturn:
        """End this process, and with it everything that runs in its namespace or group."""
        if self.group and not self.namespaces:
            with suppress(ProcessLookupError, PermissionError):
                os.killpg(self.group, signal.SIGKILL)
        os._exit(0)

    def keep(self, fds: tuple[int, int, int], folder: str) -> None:
        """Start the test process and wait for it. Runs in a child process.

        The last descriptor stays open until the test process has ended.
        """
        if not self.namespaces:
            os.setsid()
            self.test(fds, folder)
        linux.unshare(linux.CLONE_NEWPID | linux.CLONE_NEWNS, "process and mount namespaces")
        if pid := os.fork():
            _, status, usage = os.wait4(pid, 0)
            os._exit(_LATE if self.late(status, usage) else 0)
        self.test(fds[:2], folder)

    def test(self, fds: tuple[int, ...], folder: str) -> None:
        """Start the program, then run the tests in this process."""
        read_fd, program_end = os.pipe()
        program_start, write_fd = os.pipe()
        if self.namespaces:
            linux.unshare(linux.CLONE_NEWPID, "process namespaces")
        program = os.fork()
        if program == 0:
            try:
                self.program(program_start, program_end, folder)
            finally:
                os._exit(0)
        keep_descriptors(read_fd, write_fd, *fds)
        remote = Remote((3, 4, 6), program, self.limits.message_bytes, self.limits.seconds)
        try:
            self.confine(folder)
            ready = messages.receive(3, self.limits.message_bytes)
        except Exception as error:
            finish(6, "broken", f"{type(error).__name__}: {error}", None)
        if ready != "ready":
            finish(6, "broken", str(ready), None)
        try:
            judge(5, remote)
        finally:
            os._exit(1)

    def program(self, read_fd: int, write_fd: int, folder: str) -> None:
        """Run the program in this process."""
        keep_descriptors(read_fd, write_fd)
        try:
            if self.namespaces:
                linux.unshare(linux.CLONE_NEWNS, "mount namespaces")
            self.confine(folder)
        except Exception as error:
            messages.send(4, str(error), self.limits.message_bytes)
            return
        messages.send(4, "ready", self.limits.message_bytes)
        Server(3, 4, self.limits.message_bytes).serve()

    def confine(self, folder: str) -> None:
        """Give up the rights of this process."""
        if self.namespaces:
            view.mount_private_tmp(self.limits.file_bytes)
        confine(self.limits, folder=folder, namespaces=self.namespaces, others=self.others)
