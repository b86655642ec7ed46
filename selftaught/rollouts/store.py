"""Sampling with a store that can be resumed.

`fill` samples completions and appends the rollouts to a store. `collect` also returns them.
`collect_up_to` samples only the completions that earlier stores do not have.

A store is a JSONL file: a header that describes how the rollouts were made, then one rollout per
line. The problems are divided into fixed batches. A batch is appended when all of it is finished,
and otherwise sampled again as a whole. So a resumed run samples in the same batches as an
uninterrupted one, and even its rounding errors are the same.

The number of stored rollouts follows from the last line, and only the last complete batch is
checked. So resuming takes the same time for every size of the store, and memory for one batch.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any, TypeVar

from selftaught.prompts import PromptStyle
from selftaught.records import (
    Origin,
    Problem,
    Rollout,
    iter_rollouts,
    parse_json_line,
    read_rollouts,
    rollouts_in,
    to_json,
)
from selftaught.samplers.base import STORE_BATCH, Sampler, SamplingParams, checked_prefix_tokens

T = TypeVar("T")
R = TypeVar("R")

FORMAT = "selftaught rollouts 1"
BLOCK = 2**22
"""Number of bytes at the end of a store that are read first."""


def collect(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompt: PromptStyle,
    params: SamplingParams,
    *,
    store: Path,
    origin: Origin = "sampled",
    prefix_tokens: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Sample `params.n` completions per problem and return all rollouts; stored ones are used
    again.

    Args:
        sampler: the sampler.
        problems: problems with unique ids.
        prompt: prompt style.
        params: sampling options.
        store: JSONL file, which is created with its folder if it does not exist.
        origin: "sampled", or "rationalized" if the prompts contain the gold answer as a hint.
        prefix_tokens: for every problem, the token ids of a completion that is continued; see
            `Sampler`.
        progress: called with the number of completions just finished; first with that of stored
            ones.

    Returns:
        The rollouts in the order of the problems, and those of a problem by index.

    Raises:
        ValueError: the store was made with another model, other prompts or other options.
        OSError: the store cannot be written; the stored rollouts are kept.
    """
    fill(sampler, problems, prompt, params, store=store, origin=origin, prefix_tokens=prefix_tokens,
         progress=progress)  # fmt: skip
    rollouts = read_rollouts(store)
    samples = range(params.first, params.first + params.n)
    wanted = [(problem.id, index) for problem in problems for index in samples]
    if [(one.problem.id, one.index) for one in rollouts] != wanted:
        raise _damaged(store)
    return rollouts


def fill(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompt: PromptStyle,
    params: SamplingParams,
    *,
    store: Path,
    origin: Origin = "sampled",
    prefix_tokens: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> int:
    """Sample into a store that may be larger than memory, and return its number of rollouts.

    Arguments and exceptions are those of `collect`.
    """
    check_ids(problems)
    params = params.for_prompt(prompt.stop, prompt.chat_template_kwargs)
    ids = [problem.id for problem in problems]
    prefixes = checked_prefix_tokens(prefix_tokens, ids, params.max_tokens)
    size = max(1, STORE_BATCH // params.n)
    header = {
        "format": FORMAT,
        "model": sampler.model,
        "fingerprint": sampler.fingerprint,
        "prompts": prompt.digest(problems),
        "problems": len(problems),
        "answers": _digest((problem.id, problem.gold) for problem in problems),
        "origin": origin,
        "unit": size,
        "params": params.stored(),
    }
    if prefix_tokens is not None:
        header["begun"] = _digest(prefixes)
    stored, end = _stored(store, header, ids)
    done = stored // params.n  # number of problems
    batches = [slice(start, start + size) for start in range(done, len(problems), size)]
    for here in batches:
        sampler.check([prompt(problem) for problem in problems[here]], params, ids[here])
    _open(store, header, end)
    if progress and stored:
        progress(stored)
    advance = _thread_safe(progress)

    def sampled(here: slice) -> list[Rollout]:
        shown = [prompt(problem) for problem in problems[here]]
        continued = {} if prefix_tokens is None else {"prefix_tokens": prefixes[here]}
        completions = sampler.sample(shown, params, keys=ids[here], progress=advance, **continued)
        return [
            Rollout(problem, seen, one.text, one.finish_reason, sampler.model, index, origin,
                    one.token_ids, thought_open=one.thought_open)
            for problem, seen, samples in zip(problems[here], shown, completions, strict=True)
            for index, one in enumerate(samples, params.first)
        ]  # fmt: skip

    for fresh in _concurrently(sampled, batches, sampler.at_once):
        _append(store, "".join(to_json(rollout) + "\n" for rollout in fresh), stored)
        stored += len(fresh)
    return stored


def _concurrently(
    sampled: Callable[[slice], list[Rollout]], batches: Sequence[slice], at_once: int
) -> Iterator[list[Rollout]]:
    """Yield the result of `sampled` for every batch, in order, with `at_once` batches at a time.

    An engine that processes many requests at a time would otherwise be idle at the end of every
    batch.
    """
    if at_once == 1:
        yield from map(sampled, batches)
        return
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="collect")
    try:
        yield from in_order(pool, sampled, batches, at_once)
    finally:
        # After an error, running batches are not awaited: they end when the sampler is closed.
        pool.shutdown(wait=False, cancel_futures=True)


def in_order(
    pool: Executor, function: Callable[[T], R], items: Iterable[T], most: int
) -> Iterator[R]:
    """Yield the result of a function for every item, in order.

    Args:
        pool: where the calls run.
        function: the function.
        items: its arguments; read only as far as calls are started.
        most: maximum number of calls that are started before the result of the first is yielded.
    """
    pending: deque[Future[R]] = deque()
    for item in items:
        pending.append(pool.submit(function, item))
        if len(pending) == most:
            yield pending.popleft().result()
    while pending:
        yield pending.popleft().result()


def _thread_safe(progress: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """Return a progress callback that several threads may call."""
    if progress is None:
        return None
    lock = Lock()

    def advance(finished: int) -> None:
        with lock:
            progress(finished)

    return advance


def collect_up_to(
    sampler: Sampler,
    problems: Sequence[Problem],
    prompt: PromptStyle,
    params: SamplingParams,
    *,
    store: Path,
    origin: Origin = "sampled",
    prefix_tokens: Sequence[Sequence[int]] | None = None,
    progress: Callable[[int], None] | None = None,
) -> list[Rollout]:
    """Return the first `params.n` completions of every problem, and sample only the missing ones.

    The store has the first completions of every problem. When more are needed, they are written to
    another store beside it, named by the index of its first completion: `rollouts.jsonl`,
    `rollouts-4.jsonl`. An incomplete store is finished first.

    Args:
        sampler, problems, prompt, params, store, origin, prefix_tokens, progress: as in `collect`.

    Returns:
        The rollouts in the order of the problems, and those of a problem by index.

    Raises:
        ValueError: `params.first` is not 0, or a store was made with another model, other prompts
            or other options.
        OSError: a store cannot be written; the stored rollouts are kept.
    """
    if params.first:
        raise ValueError(
            "first must be 0, because `collect_up_to` returns the first completions; got "
            f"{params.first}."
        )
    advance = _at_most(len(problems) * params.n, progress)
    blocks: list[tuple[int, list[Rollout]]] = []
    first = 0
    while first < params.n:
        block = store.with_name(f"{store.stem}-{first}{store.suffix}") if first else store
        n = _samples_stored(block) or params.n - first
        made_for = replace(params, n=n if params.temperature else 1, first=first)
        rollouts = collect(
            sampler, problems, prompt, made_for,
            store=block, origin=origin, prefix_tokens=prefix_tokens, progress=advance,
        )  # fmt: skip
        blocks.append((n, rollouts))
        first += n
    return [
        rollout
        for at in range(len(problems))
        for n, rollouts in blocks
        for rollout in rollouts[at * n : (at + 1) * n]
        if rollout.index < params.n
    ]


def _at_most(count: int, progress: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """Return a progress callback that reports at most `count` completions in total."""
    if progress is None:
        return None
    left = count

    def advance(finished: int) -> None:
        nonlocal left
        finished = min(finished, left)
        left -= finished
        if finished:
            progress(finished)

    return advance


def _samples_stored(store: Path) -> int | None:
    """Return the number of completions per problem in a store's header; None if unreadable."""
    first = _first_line(store) if store.exists() else b""
    with suppress(ValueError, LookupError, TypeError):
        n = json.loads(first)["params"]["n"]
        return n if isinstance(n, int) and n > 0 else None
    return None


def check_ids(problems: Sequence[Problem]) -> None:
    """Check that the ids of problems are unique, because random seeds and resuming depend on them.

    Raises:
        ValueError: an id is repeated; the message names the first ones.
    """
    seen: set[str] = set()
    twice = [p.id for p in problems if p.id in seen or seen.add(p.id)]
    if twice:
        shown = ", ".join(map(repr, twice[:5]))
        raise ValueError(
            f"Expected problems with unique ids; {len(twice)} problems repeat an earlier id, such "
            f"as {shown}. Rename them, or leave out the id column."
        )


def _stored(store: Path, header: dict[str, Any], ids: Sequence[str]) -> tuple[int, int]:
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
        raise _damaged(store)
    cut = 0 if rows == wanted else rows % batch
    end -= sum(map(len, lines[len(lines) - cut :]))
    rows -= cut
    if not rows:
        return 0, len(first)
    last = range(rows - 1 - (rows - 1) % batch, rows)
    there = lines[: len(lines) - cut][-len(last) :]
    if [_row(line, places, n, index) for line in there] != [row + 1 for row in last]:
        raise _damaged(store)
    return rows, end


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


def _damaged(store: Path) -> ValueError:
    """Return the error for a damaged store.

    Raises:
        ValueError: a line is not a rollout; the message names the line.
    """
    deque(iter_rollouts(store), maxlen=0)
    return ValueError(
        f"{store}: lines are missing, repeated or changed. Repair the file, or delete it to sample "
        "again."
    )


def _open(store: Path, header: dict[str, Any], end: int) -> None:
    """Truncate a store to its complete batches, at byte `end`; create it if `end` is 0."""
    if end:
        if store.stat().st_size > end:
            os.truncate(store, end)
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    store.unlink(missing_ok=True)
    _append(store, json.dumps(header, ensure_ascii=False) + "\n", 0)


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


def _digest(values: Iterable[object]) -> str:
    """Return a hash of a sequence of values, which need not fit into memory."""
    digest = hashlib.sha256(b"[")
    for number, value in enumerate(values):
        digest.update(((", " if number else "") + json.dumps(value, ensure_ascii=True)).encode())
    digest.update(b"]")
    return digest.hexdigest()[:16]


def _first_line(store: Path) -> bytes:
    with store.open("rb") as file:
        return file.readline()


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


def _append(store: Path, text: str, stored: int) -> None:
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
