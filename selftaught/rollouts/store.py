"""Sampling with a store that can be resumed.

`fill` samples completions and appends the rollouts to a store. `collect` also returns them.
`collect_up_to` samples only the completions that earlier stores do not have.

A store is a JSONL file; see `store_file`. The problems are divided into fixed batches. A batch is
appended when all of it is finished, and otherwise sampled again as a whole. So a resumed run
samples in the same batches as an uninterrupted one, and even its rounding errors are the same.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from threading import Lock
from typing import TypeVar

from selftaught.prompts import PromptStyle
from selftaught.records import Origin, Problem, Rollout, read_rollouts, to_json
from selftaught.rollouts.store_file import (
    FORMAT,
    append,
    damaged,
    digest,
    open_store,
    samples_stored,
    stored_rows,
)
from selftaught.samplers.base import STORE_BATCH, Sampler, SamplingParams, checked_prefix_tokens

T = TypeVar("T")
R = TypeVar("R")


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
        raise damaged(store)
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
        "answers": digest((problem.id, problem.gold) for problem in problems),
        "origin": origin,
        "unit": size,
        "params": params.stored(),
    }
    if prefix_tokens is not None:
        header["begun"] = digest(prefixes)
    stored, end = stored_rows(store, header, ids)
    done = stored // params.n  # number of problems
    batches = [slice(start, start + size) for start in range(done, len(problems), size)]
    for here in batches:
        sampler.check([prompt(problem) for problem in problems[here]], params, ids[here])
    open_store(store, header, end)
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
        append(store, "".join(to_json(rollout) + "\n" for rollout in fresh), stored)
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
        n = samples_stored(block) or params.n - first
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
