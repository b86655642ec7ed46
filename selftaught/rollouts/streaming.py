"""Grading and choosing of more rollouts than memory holds: in blocks of lines, over processes.

A block of a store goes to a process as it stands in the file; what comes back is a few counts and
lines ready to be written, in the order of the blocks. The processes are plain ones, as in `grading`.
A few rollouts are not worth a process: the same function does them in this one.
"""

import glob
import hashlib
import io
import json
import os
from collections import Counter, deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager
from dataclasses import replace
from itertools import chain, groupby
from pathlib import Path
from queue import SimpleQueue
from typing import Any, Literal, NamedTuple

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
from selftaught.tasks import open_task

Filter = Literal["correct", "sound", "distinct"]

BLOCK = 2**20
"""Bytes of lines that go to a process at a time: a few hundred rollouts."""
WORTH_A_PROCESS = 2**25
"""Bytes of stores for each process: reading them takes longer than the process takes to start."""


class Block(NamedTuple):
    """Whole lines of a store."""

    where: str
    """What stands before a line's number in an error."""
    first: int
    """The number of the first line."""
    lines: bytes


class Done(NamedTuple):
    """What came of a block."""

    counts: dict[str, int]
    lines: bytes


Job = dict[str, Any]
"""What is done with every block, as JSON: `{"grade": task, "options": ...}` or `{"keep": filters}`."""


def grade_stores(
    stores: Sequence[Path],
    out: Path,
    task: str,
    options: dict[str, object],
    *,
    workers: int | None = None,
) -> dict[str, int]:
    """Grade all rollouts of some stores into one file, and count them by outcome.

    The file appears when all is graded. A kill leaves what was graded beside it, and repeating the call
    goes on from there, unless the stores or the task are others by then.

    Args:
        task, options: as `open_task` takes them; every process opens the task for itself.
        workers: processes; default: as many as the stores repay.

    Raises:
        ValueError: there is no such task or no rollout, or a line is none; says the file and which.
        OSError: the file cannot be written, or a process ended; what is graded is kept.
    """
    opened = open_task(task, **options)
    with closing(Grader(opened)):
        pass  # refused here, and not in every process
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
        raise ValueError(f"There are no rollouts in {', '.join(map(str, stores))}.")
    partial.replace(out)
    return dict(counts)


def _graded(partial: Path) -> tuple[Counter[str], int]:
    """The outcomes of the whole graded lines of a file that may be torn, and the byte after them."""
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
) -> tuple[int, int]:
    """Make examples of those graded rollouts of some stores that pass the filters, in one file.

    What comes out is what `keep_correct`, `keep_sound`, `keep_distinct` and `keep_at_most` would leave of
    all rollouts at once, in the same order. Held are the texts and token ids of those that `keep_distinct`
    keeps.

    Args:
        keep: the filters, in order.
        style: the prompt of the examples.
        at_most: at most so many rollouts per problem.
        workers: processes; default: as many as the stores repay.

    Returns:
        How many rollouts were kept, and how many there were.

    Raises:
        NothingToLearn: none passed; the file is not touched.
        ValueError: a rollout has not been graded, or a line is no rollout.
    """
    cut = keep.index("distinct") if "distinct" in keep else len(keep)
    counts: Counter[str] = Counter()
    done = _done({"keep": list(keep[:cut])}, _blocks(stores), workers or _repaid(stores))

    def lines() -> Iterator[bytes]:
        for block in done:
            counts.update(block.counts)
            yield from io.BytesIO(block.lines)

    kept: Iterable[Rollout] = rollouts_in(lines(), "kept rollout ", 2)
    if cut < len(keep):
        kept = _distinct(kept, distinct_by)
        for name in keep[cut + 1 :]:
            kept = keep_distinct(kept, distinct_by) if name == "distinct" else FILTERS[name](kept)
    if at_most is not None:
        kept = iter_at_most(kept, at_most)
    kept = iter(kept)
    first = next(kept, None)
    if first is None:
        raise NothingToLearn(f"None of {counts['rollouts']} rollouts passed: {', '.join(keep)}.")
    count = write_jsonl(out, (example_of(style, one) for one in chain([first], kept)))
    return count, counts["rollouts"]


FILTERS: dict[str, Callable[[Iterable[Rollout]], list[Rollout]]] = {
    "correct": keep_correct,
    "sound": keep_sound,
}
"""Those that look at one rollout at a time."""


def _distinct(rollouts: Iterable[Rollout], by: DistinctBy) -> Iterator[Rollout]:
    """`keep_distinct`, which may forget at any time what it has not kept.

    A problem's rollouts are looked at whenever they end; they may go on in another store.
    """
    by_problem: dict[str, list[Rollout]] = {}
    for name, same in groupby(rollouts, lambda one: one.problem.id):
        by_problem[name] = keep_distinct([*by_problem.get(name, ()), *same], by)
    return chain.from_iterable(by_problem.values())


# ---------------------------------------------------------------- blocks


def _repaid(stores: Sequence[Path]) -> int:
    """How many processes the stores are worth."""
    size = sum(store.stat().st_size for store in stores)
    return max(1, min(os.cpu_count() or 1, size // WORTH_A_PROCESS))


def _blocks(stores: Sequence[Path], skipped: int = 0) -> Iterator[Block]:
    """The stores in blocks of lines, without the first so many rollouts."""
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
    """Whether a line is neither blank nor a store's header."""
    return bool(line.strip()) and not (number == 1 and "format" in parse_json_line(line, ""))


Work = Callable[[Block], Done]


@contextmanager
def _work(job: Job, workers: int | None) -> Iterator[Work]:
    """The function that does an job to a block."""
    if "keep" in job:
        yield lambda block: _kept(block, job["keep"])
        return
    task = open_task(job["grade"], **job["options"])
    with closing(Grader(task, workers=workers)) as grader:

        def grade(block: Block) -> Done:
            graded = grader.grade(list(_rollouts(block)))
            counts = Counter(str(one.outcome) for one in graded)
            return Done(counts, _written(graded))

        yield grade


def _kept(block: Block, filters: Sequence[str]) -> Done:
    """What passes the filters, without prompts, which examples do not need."""
    kept = found = list(_rollouts(block))
    for name in filters:
        kept = FILTERS[name](kept)
    slim = [replace(one, prompt="") for one in kept]
    return Done({"rollouts": len(found)}, _written(slim))


def _rollouts(block: Block) -> Iterator[Rollout]:
    return rollouts_in(io.BytesIO(block.lines), block.where, block.first)


def _written(rollouts: Iterable[Rollout]) -> bytes:
    text = "".join(to_json(one) + "\n" for one in rollouts)
    return text.encode("utf-8", "backslashreplace")


# ---------------------------------------------------------------- processes


def _done(job: Job, blocks: Iterable[Block], workers: int) -> Iterator[Done]:
    """What comes of every block, in their order."""
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
    pending: deque[Future[Done]] = deque()
    try:
        for block in blocks:
            pending.append(pool.submit(ask, block))
            if len(pending) == 2 * workers:
                yield pending.popleft().result()
        while pending:
            yield pending.popleft().result()
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
        """The result for a block.

        Raises:
            ValueError: a line of it is no rollout.
            ChildProcessError: the process ended.
        """
        if self._job is not None:
            job, self._job = self._job, None
            self._child.ask(job)
        reply = self._child.ask([block.where, block.first], block.lines)
        if reply.message is None:
            raise ChildProcessError(
                f"A process that was reading {block.where.removesuffix(', line ')} "
                f"{self._child.how_it_ended()}; what it printed stands above. Repeat the command, with "
                "fewer --workers if memory was short."
            )
        if "error" in reply.message:
            raise ValueError(reply.message["error"])
        return Done(reply.message["counts"], reply.data)

    def stop(self) -> None:
        """Kill the process at once, from any thread."""
        self._child.stop()

    def close(self) -> None:
        """End the process; only when no thread is waiting for it."""
        self._child.close()


def serve() -> None:
    """Run in a worker process: do a job for one block of lines per message."""
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
