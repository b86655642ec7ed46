"""Messages over pipes: a length of four bytes, then JSON."""

import json
import os
import struct
from typing import Any, NoReturn

from selftaught.sandbox.values import Violation


class Ended(EOFError):
    """The other process closed its end."""


def send(fd: int, message: Any, limit: int) -> None:
    """Write a message.

    Raises:
        ValueError: it is larger than the limit.
        BrokenPipeError: the other process has ended.
    """
    data = json.dumps(message, allow_nan=False, separators=(",", ":")).encode()
    if len(data) > limit:
        raise ValueError(f"a message of {len(data):,} bytes is above the limit of {limit:,} bytes")
    view = memoryview(struct.pack(">I", len(data)) + data)
    while view:
        view = view[os.write(fd, view) :]


def receive(fd: int, limit: int) -> Any:
    """Read a message.

    Raises:
        Ended: the other process has ended.
        Violation: the message is too large or is not JSON.
    """
    (size,) = struct.unpack(">I", _read(fd, 4))
    if size > limit:
        raise Violation(f"a message of {size:,} bytes is above the limit of {limit:,} bytes")
    data = _read(fd, size)
    try:
        return json.loads(data, parse_constant=_no_constant)
    except (ValueError, RecursionError):
        raise Violation("a message is not JSON") from None


def _read(fd: int, size: int) -> bytes:
    data = bytearray()
    while len(data) < size:
        part = os.read(fd, min(size - len(data), 2**20))
        if not part:
            raise Ended("the other process has ended")
        data += part
    return bytes(data)


def _no_constant(name: str) -> NoReturn:
    raise Violation(f"{name} is not JSON")
