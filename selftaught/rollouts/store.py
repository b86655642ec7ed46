"""Ask, store, resume: `fill` asks a sampler and appends its rollouts to a store; `collect` also reads
them; `collect_up_to` asks only for the samples that earlier stores do not have.

A store is a JSONL file: a header that says how the rollouts were made, then one rollout per line.
The work is cut into closed units over the whole list of problems. A unit is appended when all of
it is done and made again as a whole otherwise, so a continued run asks in the same batches as an
undisturbed one, and even its rounding is the same.

How much is stored is read off the last line; only the last whole unit is looked at. So a store of a
million rollouts is continued as soon as a small one, and the memory it takes is that of a unit.
"""

import hashlib
import json
import os
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import Any

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

FORMAT = "selftaught rollouts 1"
BLOCK = 2**22
"""Bytes of a store's end looked at first."""


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
    """Ask every problem `params.n` times and return all rollouts; what the store holds is kept.

    Args:
        store: a JSONL file, made with its folder if it is not there.
        begun: for every problem the token ids of a completion that is continued; see `Sampler`.
        progress: called with the number of completions just finished, those already stored first.

    Raises:
        ValueError: the store was made with another model, other prompts or other options.
        OSError: the store cannot be written; what it holds stays.
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
    """`collect`, for a store that need not fit into memory: how many rollouts it holds at the end.

    Args and errors are those of `collect`.
    """
    check_ids(problems)
    params = params.for_prompt(prompt.stop, prompt.chat_template_kwargs)
    ids = [problem.id for problem in problems]
    written = checked_prefix_tokens(prefix_tokens, ids, params.max_tokens)
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
        header["begun"] = _digest(written)
    stored, end = _stored(store, header, ids)
    done = -(-stored // (size * params.n))  # the last unit may be shorter than the others
    batches = [problems[start : start + size] for start in range(0, len(problems), size)]
    for number, batch in enumerate(batches[done:], done):
        here = slice(number * size, (number + 1) * size)
        sampler.check([prompt(problem) for problem in batch], params, ids[here])
    _open(store, header, end)
    if progress and stored:
        progress(stored)
    told = _one_at_a_time(progress)

    def asked(number: int) -> list[Rollout]:
        batch, here = batches[number], slice(number * size, (number + 1) * size)
        shown = [prompt(problem) for problem in batch]
        continued = {} if prefix_tokens is None else {"prefix_tokens": written[here]}
        completions = sampler.sample(shown, params, keys=ids[here], progress=told, **continued)
        return [
            Rollout(problem, seen, one.text, one.finish_reason, sampler.model, index, origin,
                    one.token_ids, thought_open=one.thought_open)
            for problem, seen, samples in zip(batch, shown, completions, strict=True)
            for index, one in enumerate(samples, params.first)
        ]  # fmt: skip

    for fresh in _in_order(asked, range(done, len(batches)), sampler.at_once):
        _append(store, "".join(to_json(rollout) + "\n" for rollout in fresh), stored)
        stored += len(fresh)
    return stored


def _in_order(
    asked: Callable[[int], list[Rollout]], numbers: range, at_once: int
) -> Iterator[list[Rollout]]:
    """What `asked` gives for every number, in their order, with the next `at_once - 1` begun already.

    An engine that answers many requests at a time would otherwise run empty at the end of every unit.
    """
    if at_once == 1:
        yield from map(asked, numbers)
        return
    pool = ThreadPoolExecutor(at_once, thread_name_prefix="collect")
    prefix_tokens: deque[Future[list[Rollout]]] = deque()
    try:
        for number in numbers:
            prefix_tokens.append(pool.submit(asked, number))
            if len(prefix_tokens) == at_once:
                yield prefix_tokens.popleft().result()
        while prefix_tokens:
            yield prefix_tokens.popleft().result()
    finally:
        # After an error the others are not waited for: they end when the sampler is closed.
        pool.shutdown(wait=False, cancel_futures=True)


def _one_at_a_time(progress: Callable[[int], None] | None) -> Callable[[int], None] | None:
    """Progress that may be told by several threads."""
    if progress is None:
        return None
    lock = Lock()

    def told(finished: int) -> None:
        with lock:
            progress(finished)

    return told


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
    """The first `params.n` samples of every problem, of which only the missing ones are asked for.

    The store holds the first samples of every problem, as many as it was made for. Later ones stand
    beside it, in a store for each time that more were wanted, named by its first sample:
    `rollouts.jsonl`, `rollouts-4.jsonl`. Where one is not whole, it is finished first.

    Args:
        store, begun, progress: as in `collect`.

    Returns:
        The rollouts by problem, and those of a problem by index.

    Raises:
        ValueError: `params.first` is not 0, or a store was made with another model, other prompts
            or other options.
        OSError: a store cannot be written; what it holds stays.
    """
    if params.first:
        raise ValueError(f"first must be 0, because samples are counted up; got {params.first}.")
    told = _at_most(len(problems) * params.n, progress)
    blocks: list[tuple[int, list[Rollout]]] = []
    first = 0
    while first < params.n:
        block = store.with_name(f"{store.stem}-{first}{store.suffix}") if first else store
        n = _samples_stored(block) or params.n - first
        made_for = replace(params, n=n if params.temperature else 1, first=first)
        rollouts = collect(
            sampler, problems, prompt, made_for,
            store=block, origin=origin, prefix_tokens=prefix_tokens, progress=told,
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
    """Progress that is told of no more than `count` completions: a store may hold more."""
    if progress is None:
        return None
    left = count

    def told(finished: int) -> None:
        nonlocal left
        finished = min(finished, left)
        left -= finished
        if finished:
            progress(finished)

    return told


def _samples_stored(store: Path) -> int | None:
    """How many samples of each problem a store was made for, if it says so."""
    first = _first_line(store) if store.exists() else b""
    with suppress(ValueError, LookupError, TypeError):
        n = json.loads(first)["params"]["n"]
        return n if isinstance(n, int) and n > 0 else None
    return None


def check_ids(problems: Sequence[Problem]) -> None:
    """Refuse problems that share an id, because draws and resuming go by it.

    Raises:
        ValueError: names the first ids that stand twice.
    """
    seen: set[str] = set()
    twice = [p.id for p in problems if p.id in seen or seen.add(p.id)]
    if twice:
        shown = ", ".join(map(repr, twice[:5]))
        raise ValueError(
            f"Expected every problem to have an id of its own; {len(twice)} repeat one, "
            f"such as {shown}. Rename them or leave the id column out."
        )


def _stored(store: Path, header: dict[str, Any], ids: Sequence[str]) -> tuple[int, int]:
    """How many rows stand in whole units, and the byte after the last; nothing is changed.

    What the last line is a sample of says how many rows there are. Only the last whole unit is read:
    those before it were on the disk when it was begun.

    Raises:
        ValueError: the store was made otherwise, or its last whole unit is not what it should be.
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
        end -= len(lines.pop())  # of a unit that was never whole
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
    """The last lines that end in a newline, at least so many if there are, and the byte after them."""
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
        del lines[0]  # its beginning was not read
    return [line + b"\n" for line in lines], size - len(torn)


def _row(line: bytes, places: Mapping[str, int], n: int, index: int) -> int:
    """Which row of the store a line is, counted from 1; 0 where it cannot be read."""
    try:
        (rollout,) = rollouts_in([line], "", 2)
        sample = rollout.index - index
        return places[rollout.problem.id] * n + sample + 1 if 0 <= sample < n else 0
    except (ValueError, LookupError, TypeError):
        return 0


def _damaged(store: Path) -> ValueError:
    """What is told of a store whose lines are not those that were written; names the first if it can."""
    deque(iter_rollouts(store), maxlen=0)  # a line that is no rollout is an error of its own
    return ValueError(
        f"{store}: lines are missing, stand twice or were changed. Mend it, or delete it to sample "
        "anew."
    )


def _open(store: Path, header: dict[str, Any], end: int) -> None:
    """Cut a store back to its whole units, which end at a byte; make a new one where that is 0."""
    if end:
        if store.stat().st_size > end:
            os.truncate(store, end)
        return
    store.parent.mkdir(parents=True, exist_ok=True)
    store.unlink(missing_ok=True)
    _append(store, json.dumps(header, ensure_ascii=False) + "\n", 0)


def _torn_header(store: Path) -> bool:
    """Whether the store ends within its header; a file that is no store is refused.

    Nothing is lost with such a header, so it may be another's, with other options.

    Raises:
        ValueError: the file holds something else.
    """
    first = _first_line(store)
    if first.endswith(b"\n"):
        return False
    opening = json.dumps({"format": FORMAT}).removesuffix("}").encode()
    if not (first.startswith(opening) or opening.startswith(first)):
        raise ValueError(f"{store} is not a store of rollouts; give another file, or move it away.")
    return True


def _digest(values: Iterable[object]) -> str:
    """A hash of the list of values, which is not held as a whole."""
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
        "unit": "the size of a unit",
        "params": "the sampling options",
        "begun": "the completions begun",
    }
    differing = [key for key in names if wanted.get(key) != found.get(key)]
    if differing:
        told = "; ".join(
            f"{names[key]} (stored: {found.get(key)}, now: {wanted.get(key)})" for key in differing
        )
        raise ValueError(
            f"{store} holds rollouts made otherwise, and adding to it would mix two experiments. "
            f"What differs: {told}. Give another folder, or delete this store to sample anew."
        )


def _append(store: Path, text: str, stored: int) -> None:
    """Add whole lines to the store and see them onto the disk."""
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
            "rollouts already stored are safe; make room and repeat the command to continue",
        ) from error
