"""Decoding of jobs that arrive at any time, for models that the shared-prefix loop supports.

A lane is a set of rows that are decoded together. All rows of a lane share the keys and values of a
prefix, which is empty for the lane of prompts that share nothing. A prompt enters a lane between
two decoding steps, as soon as a row is free; its keys and values are computed in pieces, so that
the other rows continue in the meantime.

Shapes: B rows, T new tokens, P prefix tokens, D head width, V vocabulary.
"""

from collections import deque
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from selftaught.samplers.local.prefix_loop import CHUNK, Prefix, SharedPrefixLoop, Slots
from selftaught.serving.choice import choose_tokens, log_prob
from selftaught.serving.jobs import Delivery, Job, LogProb, Row, Step, failed
from selftaught.serving.prompt_cache import PromptCache, RecentPrompts

LANES = 4
"""Maximum number of prefixes in use at the same time."""
FIRST_ROWS = 4
"""Number of rows for which a new lane has memory; it grows when more are needed."""
CAPACITY = 256
"""The memory per row is a multiple of this number of tokens."""


class Lane:
    """Rows that share a prefix, in the first slots of a cache of keys and values.

    Args:
        loop: the loop of the model.
        tokens: the tokens of the prefix.
        prefix: the first of these tokens, with their keys and values; `extend` computes the others.
    """

    def __init__(self, loop: SharedPrefixLoop, tokens: tuple[int, ...], prefix: Prefix) -> None:
        self._loop, self.tokens, self.prefix = loop, tokens, prefix
        self.rows: list[Row] = []
        self.expected = 0
        """Number of rows whose prompts are being computed."""
        self._slots: Slots | None = None
        self._size = self._capacity = 0

    @property
    def used(self) -> bool:
        """Whether the lane has rows or expects some."""
        return bool(self.rows or self.expected)

    @property
    def ready(self) -> bool:
        """Whether the keys and values of the whole prefix have been computed."""
        return len(self.prefix.tokens) == len(self.tokens)

    def extend(self) -> None:
        """Compute the keys and values of the next `CHUNK` tokens of the prefix."""
        start = len(self.prefix.tokens)
        self.prefix = self._loop.extended(self.prefix, self.tokens[start : start + CHUNK])

    def add(self, job: Job, computed: Slots, own: tuple[int, ...]) -> None:
        """Add the rows of a job whose prompt has been computed.

        Args:
            job: the job.
            computed: one slot with the keys and values of the prompt, without its last token.
            own: the prompt's tokens after the prefix.
        """
        first, count = len(self.rows), job.n
        self._reserve(first + count, len(own))
        assert self._slots is not None
        if len(own) > 1:
            self._slots.receive(computed, range(first, first + count), len(own) - 1)
        for index in range(count):
            row = Row(job, index)
            row.last, row.stored = job.prompt[-1], len(own) - 1
            self.rows.append(row)

    def _reserve(self, rows: int, capacity: int) -> None:
        """Enlarge the key-value cache to at least `rows` rows of `capacity` tokens."""
        if self._slots is not None and rows <= self._size and capacity <= self._capacity:
            return
        while self._size < rows:
            self._size = max(FIRST_ROWS, 2 * self._size)
        self._capacity = max(self._capacity, -(-capacity // CAPACITY) * CAPACITY)
        new = self._loop.slots(self._size, self._capacity)
        if self._slots is not None and self.rows:
            stored = max(row.stored for row in self.rows)
            new.receive_all(self._slots, len(self.rows), stored)
        self._slots = new

    def step(self) -> list[tuple[Row, Step]]:
        """Compute one token of every row; rows that end are removed."""
        stored = max(row.stored for row in self.rows) + 1
        self._reserve(len(self.rows), stored)
        assert self._slots is not None
        device = self._loop.device
        position_B = torch.tensor([row.stored for row in self.rows], device=device)
        token_B = torch.tensor([row.last for row in self.rows], device=device)
        logits_BTV = self._loop.forward(
            self._slots, self.prefix, 0, token_B[:, None], position_B[:, None], stored, head=True
        )
        tokens, log_probs = choose_tokens(logits_BTV[:, -1], self.rows)
        done: list[tuple[Row, Step]] = []
        for row, token, value in zip(self.rows, tokens, log_probs, strict=True):
            row.stored += 1
            row.last = token
            done.append((row, row.accept(token, value)))
        self.remove({at for at, row in enumerate(self.rows) if row.finished})
        return done

    def remove_job(self, job: Job) -> None:
        """Remove the rows of a job."""
        self.remove({at for at, row in enumerate(self.rows) if row.job is job})

    def remove(self, gone: set[int]) -> None:
        """Remove rows; the last ones move into their slots. An empty lane frees its memory."""
        if not gone:
            return
        left = len(self.rows) - len(gone)
        targets = sorted(at for at in gone if at < left)
        sources = [at for at in range(left, len(self.rows)) if at not in gone]
        if targets:
            assert self._slots is not None
            stored = max(self.rows[at].stored for at in sources)
            self._slots.copy(sources, targets, stored)
            for source, target in zip(sources, targets, strict=True):
                self.rows[target] = self.rows[source]
        del self.rows[left:]
        if not self.rows:
            self._slots, self._size, self._capacity = None, 0, 0


@dataclass
class _Prompt:
    """A prompt whose keys and values are being computed."""

    job: Job
    lane: Lane
    own: tuple[int, ...]
    slots: Slots
    done: int = 0
    """Number of tokens that have been computed."""
    log_probs: list[LogProb] = field(default_factory=list)


class ContinuousDecoder:
    """Decodes jobs that are added at any time, at most `max_rows` completions at once.

    Args:
        loop: the loop of the model, inside `two_part(model)`.
        max_rows: maximum number of completions that are decoded at the same time.
        cache_bytes: memory for the keys and values of earlier prompts.
        kv_bytes: memory for the keys and values of completions in progress. A job for which it does
            not suffice waits until others have ended.
    """

    def __init__(
        self, loop: SharedPrefixLoop, max_rows: int, cache_bytes: int, kv_bytes: int
    ) -> None:
        self._loop, self._max_rows, self._kv_bytes = loop, max_rows, kv_bytes
        self._cache, self._recent = PromptCache(cache_bytes), RecentPrompts()
        self._lanes = [Lane(loop, (), Prefix(()))]
        self._prompts: deque[_Prompt] = deque()

    @property
    def rows(self) -> int:
        """Number of rows in use, including those whose prompts are being computed."""
        return sum(len(lane.rows) + lane.expected for lane in self._lanes)

    def fits(self, job: Job) -> bool:
        """Return whether there are enough free rows and memory for a job."""
        rows = self.rows
        if not rows:
            return True  # `add` refuses a job that never fits
        return (
            rows + job.n <= self._max_rows and self._needed([*self._jobs(), job]) <= self._kv_bytes
        )

    def _jobs(self) -> list[Job]:
        """Return the jobs in progress."""
        jobs = {row.job: None for lane in self._lanes for row in lane.rows}
        return list(jobs | {prompt.job: None for prompt in self._prompts})

    def _needed(self, jobs: Sequence[Job]) -> int:
        """Return the bytes that jobs can need: every row has the length of the longest one."""
        longest = max(len(job.prompt) + job.max_tokens for job in jobs)
        return sum(job.n for job in jobs) * longest * self._loop.bytes_per_token

    def add(self, job: Job) -> None:
        """Start a job: choose its lane, and queue its prompt.

        Raises:
            ValueError: the memory does not suffice for the job alone.
        """
        if self._needed([job]) > self._kv_bytes:
            raise ValueError(
                f"{job.n} x {len(job.prompt) + job.max_tokens} tokens need "
                f"{self._needed([job]) / 2**20:.0f} MB; this server has {self._kv_bytes / 2**20:.0f} MB "
                "for requests in progress. Set a smaller n or max_tokens."
            )
        lane = self._lanes[0] if job.prompt_log_probs else self._lane(job.prompt)
        own = job.prompt[len(lane.tokens) :]
        slots = self._loop.slots(1, len(own))
        prompt = _Prompt(job, lane, own, slots)
        if not lane.tokens and not job.prompt_log_probs:
            known = self._cache.longest(own, len(own) - 1)
            if known.tokens:
                slots.load(known.key_KPD, known.value_KPD)
                prompt.done = len(known.tokens)
        self._prompts.append(prompt)
        lane.expected += job.n

    def _lane(self, prompt: tuple[int, ...]) -> Lane:
        """Return the lane for a prompt, a new one if it shares many tokens with earlier prompts."""
        shared = self._recent.shared(prompt)
        fitting = [
            lane for lane in self._lanes
            if len(lane.tokens) < len(prompt) and prompt[: len(lane.tokens)] == lane.tokens
        ]  # fmt: skip
        longest = max(len(lane.tokens) for lane in fitting)
        if shared and longest < 0.8 * shared:
            for lane in [one for one in self._lanes[1:] if not one.used]:
                if len(self._lanes) > LANES:
                    self._lanes.remove(lane)
            if len(self._lanes) <= LANES:
                tokens = prompt[:shared]
                new = Lane(self._loop, tokens, self._cache.longest(tokens, shared))
                self._lanes.append(new)
                return new
        similar = [lane for lane in fitting if len(lane.tokens) >= 0.8 * longest]
        return max(similar, key=lambda lane: len(lane.rows) + lane.expected)

    def step(self) -> Iterator[Delivery]:
        """Compute the next piece of a prompt and the next token of every row.

        An error ends the jobs of the prompt or the lane in which it happens, and no others.
        """
        yield from self._read_prompts()
        for lane in self._lanes:
            if not lane.rows:
                continue
            steps: dict[Job, list[Step]] = {}
            try:
                for row, step in lane.step():
                    steps.setdefault(row.job, []).append(step)
            except Exception as error:
                jobs = dict.fromkeys(row.job for row in lane.rows)
                lane.remove(set(range(len(lane.rows))))
                yield from failed(jobs, error)
            else:
                yield from steps.items()

    def _read_prompts(self) -> Iterator[Delivery]:
        """Compute at most `CHUNK` tokens of waiting prompts, at least one prompt's next piece."""
        budget = CHUNK
        while self._prompts and budget > 0:
            prompt = self._prompts[0]
            before = len(prompt.own) - 1
            end = min(before, (prompt.done // CHUNK + 1) * CHUNK)
            size = end - prompt.done if prompt.lane.ready else CHUNK
            if size > budget:
                return
            budget -= size
            try:
                if not prompt.lane.ready:
                    prompt.lane.extend()
                    continue
                if size:
                    self._read(prompt, end)
                    prompt.done = end
                if prompt.done < before:
                    continue
                deliveries = self._start(prompt)
            except Exception as error:
                prompt.lane.remove_job(prompt.job)
                deliveries = failed([prompt.job], error)
            self._prompts.popleft()
            prompt.lane.expected -= prompt.job.n
            yield from deliveries

    def _read(self, prompt: _Prompt, end: int) -> None:
        """Compute the keys and values of a prompt's tokens up to `end`."""
        own, device = prompt.own, self._loop.device
        token_BT = torch.tensor([own[prompt.done : end]], device=device)
        position_BT = torch.arange(prompt.done, end, device=device)[None]
        wanted = prompt.job.prompt_log_probs
        out_BTX = self._loop.forward(
            prompt.slots, prompt.lane.prefix, 0, token_BT, position_BT, end, head=wanted
        )
        if wanted:
            prompt.log_probs += _prompt_log_probs(out_BTX[0], own[prompt.done + 1 : end + 1], prompt.job)  # fmt: skip

    def _start(self, prompt: _Prompt) -> list[Delivery]:
        """Begin decoding after a prompt has been computed, and return the prompt's log-probabilities
        if they were asked for."""
        job, lane = prompt.job, prompt.lane
        if not lane.tokens and not job.prompt_log_probs and len(prompt.own) > CHUNK:
            self._cache.put(prompt.own[:-1], *prompt.slots.row(len(prompt.own) - 1))
        if job.max_tokens:
            lane.add(job, prompt.slots, prompt.own)
        if not job.prompt_log_probs:
            return []
        finished = None if job.max_tokens else "length"
        found = tuple(prompt.log_probs)
        return [(job, [Step(at, prompt=found, finished=finished)]) for at in range(job.n)]

    def drop_cancelled(self) -> None:
        """Free the rows of jobs that were cancelled."""
        for prompt in [one for one in self._prompts if one.job.cancelled]:
            self._prompts.remove(prompt)
            prompt.lane.expected -= prompt.job.n
        for lane in self._lanes:
            for job in {row.job for row in lane.rows if row.job.cancelled}:
                lane.remove_job(job)

    def clear(self) -> list[Job]:
        """Drop everything after an error, and return the jobs that were in progress."""
        jobs = self._jobs()
        self._prompts.clear()
        self._lanes = [Lane(self._loop, (), Prefix(()))]
        self._recent = RecentPrompts()
        return jobs


def _prompt_log_probs(logits_TV: Tensor, targets: tuple[int, ...], job: Job) -> list[LogProb]:
    """Return the log-probabilities of tokens, given the logits before each of them."""
    top = job.log_probs or 0
    return [log_prob(logits_V, token, top) for logits_V, token in zip(logits_TV, targets, strict=True)]  # fmt: skip
