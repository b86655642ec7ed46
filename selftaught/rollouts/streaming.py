"""Grading and selecting more rollouts than fit into memory, in blocks of lines and several
processes.

A block of lines is sent to a worker process as it is in the file. The worker returns counts and
lines that are ready to be written; results are in the order of the blocks. Workers are
subprocesses, as in `grading`. Small stores are processed by the same function in this process.
"""

import glob
import hashlib
import io
import json
import os
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from queue import SimpleQueue
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

from selftaught.processes.child import Child, conversation
from selftaught.prompts import PromptStyle
from selftaught.records import Rollout, parse_json_line, rollouts_in, to_json, write_jsonl
from selftaught.rollouts.grading import Grader
from selftaught.rollouts.selection import (
    DistinctBy,
    NothingToLearn,
    example_of,
    iter_at_most,
    keep_correct,
    keep_distinct,
    keep_sound,
)
from selftaught.rollouts.store import in_order
from selftaught.tasks import open_task

if TYPE_CHECKING:
    from selftaught.rollouts.flags import FlagFilter

Filter = Literal["correct", "sound", "distinct"]

BLOCK = 2**20
"""Number of bytes that are sent to a worker at a time: a few hundred rollouts."""
WORTH_A_PROCESS = 2**25
"""Number of bytes of stores per worker. Reading them takes longer than starting a process."""


class Block(NamedTuple):
    """Complete lines of a store."""

    where: str
    """Text before a line number in an error message."""
    first: int
    """Number of the first line, counted from 1."""
    lines: bytes


class Done(NamedTuple):
    """The result for a block."""

    counts: dict[str, int]
    """Numbers of rollouts by outcome, or under "rollouts" in total."""
    lines: bytes
    """Lines of rollouts that are ready to be written."""


Job = dict[str, Any]
"""The work on every block, as JSON: `{"grade": task, "options": ...}` or `{"keep": filters, "prompts": bool}`."""


def grade_stores(
    stores: Sequence[Path],
    out: Path,
    task: str,
    options: dict[str, object],
    *,
    workers: int | None = None,
) -> dict[str, int]:
    """Grade all rollouts of several stores into one file, and return their numbers by outcome.

    The output file is written when all rollouts are graded. Until then the graded rollouts are in a
    partial file beside it. Repeating an interrupted call continues from there, unless the stores or
    the task have changed.

    Args:
        stores: files of rollouts.
        out: output file.
        task, options: name and options of the task; see `open_task`. Every worker opens it.
        workers: number of worker processes. Default: chosen from the size of the stores.

    Raises:
        ValueError: the task does not exist, there are no rollouts, or a line is not a rollout; the
            message names the file and the line.
        OSError: the file cannot be written, or a worker ended; the graded rollouts are kept.
    """
    opened = open_task(task, **options)
    with closing(Grader(opened)):
        pass  # raises an error for a bad task here, and not in every worker
    job = {"grade": task, "options": options}
    made_of = [job, opened.grading_key, [[str(path.resolve()), path.stat().st_size, path.stat().st_mtime_ns] for path in stores]]  # fmt: skip
    digest = hashlib.sha256(json.dumps(made_of, sort_keys=True).encode()).hexdigest()[:16]
    partial = out.with_name(f"{out.name}.{digest}.partial")
    out.parent.mkdir(parents=True, exist_ok=True)
    for other in out.parent.glob(glob.escape(out.name) + ".????????????????.partial"):
        if other != partial:
            other.unlink()
    counts, end = _graded(partial)
    with partial.open("ab") as file:
        file.truncate(end)
        for done in _done(job, _blocks(stores, counts.total()), workers or _repaid(stores)):
            file.write(done.lines)
            counts.update(done.counts)
        file.flush()
        os.fsync(file.fileno())
    if not counts:
        partial.unlink()
        raise ValueError(
            f"Expected rollouts in {', '.join(map(str, stores))}; got none. Check the file names."
        )
    partial.replace(out)
    return dict(counts)


def _graded(partial: Path) -> tuple[Counter[str], int]:
    """Return the counts by outcome of a partial file's complete lines, and the byte after."""
    counts: Counter[str] = Counter()
    end = 0
    if not partial.exists():
        return counts, end
    with partial.open("rb") as file:
        for line in file:
            try:
                (found,) = rollouts_in([line], "", 2)
            except ValueError:
                break
            if not line.endswith(b"\n"):
                break
            counts[str(found.outcome)] += 1
            end += len(line)
    return counts, end


def choose(
    stores: Sequence[Path],
    out: Path,
    keep: Sequence[Filter],
    style: PromptStyle,
    *,
    distinct_by: DistinctBy = "text",
    at_most: int | None = None,
    workers: int | None = None,
    flags: "FlagFilter | None" = None,
) -> tuple[int, int]:
    """Filter the graded rollouts of several stores, and write training examples of them to one
    file.

    The result is that of `keep_correct`, `keep_sound`, `keep_distinct` and `keep_at_most` on all
    rollouts at once, in the same order. Only the texts and token ids of the rollouts that
    `keep_distinct` keeps are in memory.

    Args:
        stores: files of graded rollouts.
        out: output file.
        keep: filters, applied in order: "correct", "sound", "distinct".
        style: prompt style of the examples.
        distinct_by: criterion of "distinct"; see `keep_distinct`.
        at_most: maximum number of rollouts per problem. None means no limit.
        workers: number of worker processes. Default: chosen from the size of the stores.
        flags: also drops the rollouts that a check flags, before "distinct" chooses among duplicates. It
            counts them.

    Returns:
        The number of rollouts that were kept, and the number of all rollouts.

    Raises:
        NothingToLearn: no rollout passed the filters; the output file is not changed.
        ValueError: a rollout is not graded, or a line is not a rollout.
    """
    cut = keep.index("distinct") if "distinct" in keep else len(keep)
    counts: Counter[str] = Counter()
    job = {"keep": list(keep[:cut]), "prompts": flags is not None}
    done = _done(job, _blocks(stores), workers or _repaid(stores))

    def lines() -> Iterator[bytes]:
        for block in done:
            counts.update(block.counts)
            yield from io.BytesIO(block.lines)

    kept: Iterable[Rollout] = rollouts_in(lines(), "kept rollout ", 2)
    if flags is not None:
        kept = flags(kept)
    if cut < len(keep):
        kept = _distinct(kept, distinct_by)
        for name in keep[cut + 1 :]:
            kept = keep_distinct(kept, distinct_by) if name == "distinct" else FILTERS[name](kept)
    if at_most is not None:
        kept = iter_at_most(kept, at_most)
    kept = iter(kept)
    first = next(kept, None)
    if first is None:
        raise NothingToLearn(
            f"None of {counts['rollouts']} rollouts passed the filters: {', '.join(keep)}."
            + (f" Dropped: {flags}." if flags is not None and flags.dropped else "")
        )
    count = write_jsonl(out, (example_of(style, one) for one in chain([first], kept)))
    return count, counts["rollouts"]


FILTERS: dict[str, Callable[[Iterable[Rollout]], list[Rollout]]] = {
    "correct": keep_correct,
    "sound": keep_sound,
}
"""The filters that decide on each rollout independently of the others."""


def _distinct(rollouts: Iterable[Rollout], by: DistinctBy) -> Iterator[Rollout]:
    """Apply `keep_distinct` incrementally, with only the kept rollouts in memory.

    The filter is applied at the end of each run of rollouts of the same problem. Rollouts of one
    problem may be in several stores.
    """
    by_problem: dict[str, list[Rollout]] = {}
    for name, same in groupby(rollouts, lambda one: one.problem.id):
        by_problem[name] = keep_distinct([*by_problem.get(name, ()), *same], by)
    return chain.from_iterable(by_problem.values())


# ---------------------------------------------------------------- blocks


def _repaid(stores: Sequence[Path]) -> int:
    """Return the number of worker processes for the size of the stores."""
    size = sum(store.stat().st_size for store in stores)
    return max(1, min(os.cpu_count() or 1, size // WORTH_A_PROCESS))


def _blocks(stores: Sequence[Path], skipped: int = 0) -> Iterator[Block]:
    """Yield the lines of the stores in blocks, without the first `skipped` rollouts."""
    for store in stores:
        with store.open("rb") as file:
            number = 1
            while lines := file.readlines(BLOCK):
                first, number = number, number + len(lines)
                if skipped:
                    left = 0
                    while left < len(lines) and skipped:
                        skipped -= _is_rollout(lines[left], first + left)
                        left += 1
                    first, lines = first + left, lines[left:]
                if lines:
                    yield Block(f"{store}, line ", first, b"".join(lines))


def _is_rollout(line: bytes, number: int) -> bool:
    """Return whether a line is neither blank nor the header of a store."""
    return bool(line.strip()) and not (number == 1 and "format" in parse_json_line(line, ""))


Work = Callable[[Block], Done]


@contextmanager
def _work(job: Job, workers: int | None) -> Iterator[Work]:
    """Yield the function that does a job for one block."""
    if "keep" in job:
        yield lambda block: _kept(block, job["keep"], prompts=job["prompts"])
        return
    task = open_task(job["grade"], **job["options"])
    with closing(Grader(task, workers=workers)) as grader:

        def grade(block: Block) -> Done:
            graded = grader.grade(list(_rollouts(block)))
            counts = Counter(str(one.outcome) for one in graded)
            return Done(counts, _written(graded))

        yield grade


def _kept(block: Block, filters: Sequence[str], *, prompts: bool) -> Done:
    """Return the rollouts that pass the filters, with or without prompts (not needed in examples)."""
    kept = found = list(_rollouts(block))
    for name in filters:
        kept = FILTERS[name](kept)
    slim = kept if prompts else [replace(one, prompt="") for one in kept]
    return Done({"rollouts": len(found)}, _written(slim))


def _rollouts(block: Block) -> Iterator[Rollout]:
    return rollouts_in(io.BytesIO(block.lines), block.where, block.first)


def _written(rollouts: Iterable[Rollout]) -> bytes:
    text = "".join(to_json(one) + "\n" for one in rollouts)
    return text.encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- processes


def _done(job: Job, blocks: Iterable[Block], workers: int) -> Iterator[Done]:
    """Yield the result of a job for every block, in order."""
    if workers == 1:
        with _work(job, None) as work:
            yield from map(work, blocks)
        return
    processes = [_Process(job) for _ in range(workers)]
    free: SimpleQueue[_Process] = SimpleQueue()
    for process in processes:
        free.put(process)

    def ask(block: Block) -> Done:
        process = free.get()
        try:
            return process.done(block)
        finally:
            free.put(process)

    pool = ThreadPoolExecutor(workers, thread_name_prefix="bulk")
    try:
        yield from in_order(pool, ask, blocks, 2 * workers)
    finally:
        for process in processes:
            process.stop()
        pool.shutdown(cancel_futures=True)
        for process in processes:
            process.close()


class _Process:
    """A worker process that does the same job for one block after another."""

    def __init__(self, job: Job) -> None:
        self._child = Child(__name__)
        self._job: Job | None = job

    def done(self, block: Block) -> Done:
        """Return the result for a block.

        Raises:
            ValueError: a line is not a rollout.
            ChildProcessError: the process ended unexpectedly.
        """
        if self._job is not None:
            job, self._job = self._job, None
            self._child.ask(job)
        reply = self._child.ask([block.where, block.first], block.lines)
        if reply.message is None:
            raise ChildProcessError(
                f"A worker process that was reading {block.where.removesuffix(', line ')} "
                f"{self._child.how_it_ended()}; its output is above. Repeat the command, with "
                "fewer --workers if it ran out of memory."
            )
        if "error" in reply.message:
            raise ValueError(reply.message["error"])
        return Done(reply.message["counts"], reply.data)

    def stop(self) -> None:
        """Kill the process immediately. May be called from any thread."""
        self._child.stop()

    def close(self) -> None:
        """End the process. May be called only when no thread is waiting for it."""
        self._child.close()


def serve() -> None:
    """Main function of a worker: receive a job, then process one block of lines per message."""
    messages, answer = conversation()
    job, _ = next(messages)
    with _work(job, 1) as work:
        answer(True, b"")
        for (where, first), lines in messages:
            try:
                done = work(Block(where, first, lines))
            except ValueError as error:
                answer({"error": str(error)}, b"")
            else:
                answer({"counts": done.counts}, done.lines)
