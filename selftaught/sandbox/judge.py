"""The process that runs the tests of a program. It alone decides whether the program is right."""

import builtins
import os
import re
import sys
import traceback
import types
from collections.abc import Iterator
from typing import Any

import selftaught.sandbox.messages as messages
from selftaught.sandbox.candidate import LIBRARY
from selftaught.sandbox.remote import Remote, finish

_OF_THE_LIBRARY = (types.ModuleType, type, types.FunctionType, types.BuiltinFunctionType)


def judge(job_fd: int, remote: Remote) -> None:
    """Read a program with its tests, run the tests and write the result. Does not return."""
    job = messages.receive(job_fd, 2**31)
    os.close(job_fd)
    fd = remote.result_fd
    reply = remote.ask("load", job["code"])
    if reply[0] == "raised":
        finish(fd, "error", str(reply[-1]), None)
    if reply != ["loaded"]:
        finish(fd, "error", "the program sent invalid data", None)
    blocks: list[tuple[int | None, str, types.CodeType]] = []
    for index, source in [(None, job["setup"]), *enumerate(job["tests"])]:
        remote.test = index
        try:
            blocks.append((index, source, compile(source, "<test>", "exec")))
        except (SyntaxError, ValueError, MemoryError, RecursionError) as error:
            finish(fd, "refused", f"the test is not valid Python: {error}", index)
    _run(blocks, tuple(job["entry"]), remote)
    finish(fd, "right", "", None)


def _run(
    blocks: list[tuple[int | None, str, types.CodeType]], entry: tuple[str, ...], remote: Remote
) -> None:
    """Run the setup and the tests. The first failure ends the process."""
    used = {name for *_, code in blocks for name in _names(code)} | set(entry)
    found = remote.names({name for name in used if name in entry or not hasattr(builtins, name)})
    sources = "\n".join(source for _, source, _ in blocks)
    for name in found.keys() & set(LIBRARY) - set(entry):
        as_module = re.search(rf"\b{name}\s*\.", sources) is not None
        if as_module and not isinstance(found[name], _OF_THE_LIBRARY):
            found[name] = sys.modules[name]  # the tests mean the module
    namespace: dict[str, Any] = {"__name__": "tests", **found}
    for index, source, code in blocks:
        remote.test = index
        try:
            exec(code, namespace)
        except BaseException as error:
            outcome = "wrong" if isinstance(error, AssertionError) else "error"
            if index is None and isinstance(error, ImportError):
                outcome = "refused"  # whatever the program is
            finish(remote.result_fd, outcome, _detail(error, source), index)
        if index is None:
            for name in entry:
                namespace.pop(name, None)
                if name in found:
                    namespace[name] = found[name]


def _names(code: types.CodeType) -> Iterator[str]:
    yield from code.co_names
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            yield from _names(constant)


def _detail(error: BaseException, source: str) -> str:
    """Return the line of the tests that failed and the exception."""
    line = ""
    lines = source.splitlines()
    for frame, number in traceback.walk_tb(error.__traceback__):
        if frame.f_code.co_filename == "<test>" and 0 < number <= len(lines):
            line = lines[number - 1].strip()
    try:
        text = str(error)
    except Exception:
        text = ""
    name = type(error).__name__
    if isinstance(error, AssertionError):
        return f"{line}: {text}" if text else line
    return f"{name}: {text} (in: {line})" if line else f"{name}: {text}"
