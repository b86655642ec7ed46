"""The file of a store: a header that describes how the rollouts were made, then one rollout per
line.

The number of stored rollouts follows from the last line, and only the last complete batch is
checked. So resuming takes the same time for every size of the store, and memory for one batch.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from selftaught.records import iter_rollouts, parse_json_line, rollouts_in

FORMAT = "selftaught rollouts 1"
BLOCK = 2**22
"""Number of bytes at the end of a store that are read first."""


def stored_rows(store: Path, header: dict[str, Any], ids: Sequence[str]) -> tuple[int, int]:
    """Return the number of rows in complete batches, and the byte after the last; change nothing.

    The problem and index of the last line give the number of rows. Only the last complete batch is
    checked: the batches before it were on disk before it was started.

    Raises:
        ValueError: the store was made with other options, or its last complete batch is damaged.
    """
    if not store.exists() or _torn_header(store):
        return 0, 0
    first = _first_line(store)
    _refuse_another(store, header, parse_json_line(first, f"{store}, line 1"))
    n, index = header["params"]["n"], header["params"].get("first", 0)
    batch, wanted = header["unit"] * n, len(ids) * n
    lines, end = _last_lines(store, len(first), 2 * batch)
    places = {name: place for place, name in enumerate(ids)}
    rows, torn = 0, 0
    while lines and torn < batch and not (rows := _row(lines[-1], places, n, index)):
        end -= len(lines.pop())  # a line of an incomplete batch
        torn += 1
    if lines and not rows:
        raise damaged(store)
    cut = 0 if rows == wanted else rows % batch
    end -= sum(map(len, lines[len(lines) - cut :]))
    rows -= cut
    if not rows:
        return 0, len(first)
    last = range(rows - 1 - (rows - 1) % batch, rows)
    there = lines[: len(lines) - cut][-len(last) :]
    if [_row(line, places, n, index) for line in there] != [row + 1 for row in last]:
        raise damaged(store)
    return rows, end


def samples_stored(store: Path) -> int | None:
    """Return the number of completions per problem in a store's header; None if unreadable."""
    first = _first_line(store) if store.exists() else b""
    with suppress(ValueError, LookupError, TypeError):
        n = json.loads(first)["params"]["n"]
        return n if isinstance(n, int) and n > 0 else None
    return None


def open_store(store: Path, header: dict[str, Any], end: int) -> None:
    """Truncate a store to its complete batches, at byte `end`; create it if `end` is 0."""
    if end:
        if store.stat().st_size > end:
            os.truncate(store, end)
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    store.unlink(missing_ok=True)
    append(store, json.dumps(header, ensure_ascii=False) + "\n", 0)


def append(store: Path, text: str, stored: int) -> None:
    """Append complete lines to the store and flush them to disk."""
    data = text.encode("utf-8", "backslashreplace")
    try:
        with store.open("ab") as file:
            file.write(data)
            file.flush()
            os.fsync(file.fileno())
    except OSError as error:
        raise OSError(
            error.errno,
            f"Could not write {len(data):,} bytes to {store}: {error.strerror}. The {stored:,} "
            "rollouts already stored are safe. Free space on that disk, then repeat the command to "
            "continue",
        ) from error


def damaged(store: Path) -> ValueError:
    """Return the error for a damaged store.

    Raises:
        ValueError: a line is not a rollout; the message names the line.
    """
    deque(iter_rollouts(store), maxlen=0)
    return ValueError(
        f"{store}: lines are missing, repeated or changed. Repair the file, or delete it to sample "
        "again."
    )


def digest(values: Iterable[object]) -> str:
    """Return a hash of a sequence of values, which need not fit into memory."""
    digest = hashlib.sha256(b"[")
    for number, value in enumerate(values):
        digest.update(((", " if number else "") + json.dumps(value, ensure_ascii=True)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _torn_header(store: Path) -> bool:
    """Return whether the store ends within its header, so that it has no rollouts and can be
    replaced.

    Raises:
        ValueError: the file is not a store.
    """
    first = _first_line(store)
    if first.endswith(b"\n"):
        return False
    opening = json.dumps({"format": FORMAT}).removesuffix("}").encode()
    if not (first.startswith(opening) or opening.startswith(first)):
        raise ValueError(
            f"{store} is not a store of rollouts. Give another file name, or move this file."
        )
    return True


def _first_line(store: Path) -> bytes:
    with store.open("rb") as file:
        return file.readline()


def _last_lines(store: Path, header: int, count: int) -> tuple[list[bytes], int]:
    """Return at least the last `count` lines that end in a newline, and the byte after them.

    Args:
        header: number of bytes of the header, which is not returned.
    """
    with store.open("rb") as file:
        size, block = file.seek(0, os.SEEK_END), BLOCK
        while True:
            start = max(header, size - block)
            file.seek(start)
            read = file.read(size - start)
            if start == header or read.count(b"\n") > count:
                break
            block *= 2
    *lines, torn = read.split(b"\n")
    if start > header:
        del lines[0]  # may be incomplete: the block may start within this line
    return [line + b"\n" for line in lines], size - len(torn)


def _row(line: bytes, places: Mapping[str, int], n: int, index: int) -> int:
    """Return the row number of a line, counted from 1; 0 if the line cannot be read."""
    try:
        (rollout,) = rollouts_in([line], "", 2)
        sample = rollout.index - index
        return places[rollout.problem.id] * n + sample + 1 if 0 <= sample < n else 0
    except (ValueError, LookupError, TypeError):
        return 0


def _refuse_another(store: Path, wanted: dict[str, Any], found: dict[str, Any]) -> None:
    names = {
        "format": "the format of the store",
        "fingerprint": "the model's weights",
        "prompts": "the prompts (problems, worked examples or template)",
        "problems": "the number of problems",
        "answers": "the ids or gold answers of the problems",
        "origin": "whether the answer was given as a hint",
        "unit": "the batch size of the store",
        "params": "the sampling options",
        "begun": "the prefix tokens of the completions",
    }
    differing = [key for key in names if wanted.get(key) != found.get(key)]
    if differing:
        differences = "; ".join(
            f"{names[key]} (stored: {found.get(key)}, now: {wanted.get(key)})" for key in differing
        )
        raise ValueError(
            f"{store} contains rollouts that were made with other settings. Different: "
            f"{differences}. Give another folder, or delete this store to sample again."
        )
