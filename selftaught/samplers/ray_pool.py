"""A pool of samplers on a Ray cluster, each in an actor of its own.

What is asked is cut into chunks by its order alone, so a chunk holds the same completions whichever
actor gets it, and when it is asked again. An actor that dies is replaced, and the chunks it had not
finished are asked again; finished ones never are. Stores are the driver's affair, as everywhere.
"""

import inspect
import itertools
import logging
import os
import threading
import time
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, as_completed
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from selftaught.options import check_options
from selftaught.processes import ray_cluster as cluster
from selftaught.records import Completion, Text
from selftaught.samplers.base import (
    STORE_BATCH,
    Closing,
    SamplingParams,
    checked_keys,
    checked_prefix_tokens,
)

logger = logging.getLogger(__name__)


def check_pool(options: Mapping[str, Any]) -> tuple[str, dict[str, Any]]:
    """Check the options of a `RaySampler`; returns the kind of sampler in it, and that one's options.

    Raises:
        ImportError: Ray is not installed.
        ValueError: an option is of another type or out of bounds.
    """
    cluster.check_installed()
    check_options("The sampler 'ray'", RaySampler, options)
    for name, least in (("workers", 1), ("chunk", 1), ("cpus", 0), ("gpus", 0)):
        value = options.get(name)
        if value is not None and value < least:
            raise ValueError(f"{name} must be at least {least}; got {value}.")
    engine = options.get("engine", "transformers")
    if engine not in ("transformers", "vllm"):
        raise ValueError(
            "engine must be the kind of sampler that each actor holds, transformers or vllm; got "
            f"engine={engine!r}."
        )
    own = inspect.signature(RaySampler).parameters.keys() - {"opener"}
    return engine, {name: value for name, value in options.items() if name not in own}


class RaySampler(Closing):
    """Several samplers of one kind and model, on a Ray cluster, as one.

    Args:
        model: a model folder that every node sees at the same path, or a name on the hub.
        opener: `open_sampler`, which the actors call.
        engine: the kind of sampler in each actor, such as transformers or vllm.
        workers: actors.
        address: of the cluster's head; default: RAY_ADDRESS, or a cluster that runs on this machine, or
            one that is started here.
        cpus, gpus: what each actor takes of the cluster; gpus by default as many as the engine's
            `tensor_parallel_size` where the cluster has any.
        chunk: completions that an actor is handed at a time, and at most asked again when it dies.
        options: the engine's own.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: there is no cluster at the address.
        ValueError: the cluster has too little, a node does not see the model, the actors hold
            different weights, or what the engine itself refuses.
    """

    PATIENCE = 1800.0
    """Seconds to wait for the first actors, or for a new one when all have died."""
    TRIES = 4
    """Actors that may die with the same chunk in hand."""

    def __init__(
        self,
        model: str | Path,
        opener: Callable[..., Any],
        *,
        engine: str = "transformers",
        workers: int = 2,
        address: str | None = None,
        cpus: float = 1.0,
        gpus: float | None = None,
        chunk: int = 64,
        **options: Any,
    ) -> None:
        check_pool(
            {"engine": engine, "workers": workers, "cpus": cpus, "gpus": gpus, "chunk": chunk}
        )
        self.model = str(model)
        path = Path(self.model).resolve() if Path(self.model).is_dir() else None
        self._connected = cluster.connect(address)
        self._lock = threading.Condition()
        self._queue: deque[_Chunk] = deque()
        self._actors: list[_Actor] = []
        self._closed = False
        self._error: Exception | None = None
        self._failed_starts = 0
        self._dispatcher: threading.Thread | None = None
        try:
            import ray

            if gpus is None:
                each = int(options.get("tensor_parallel_size", 1))
                gpus = float(each) if ray.cluster_resources().get("GPU") else 0.0
            needs = {"CPU": cpus} | ({"GPU": gpus} if gpus else {})
            cluster.check_resources(workers, needs)
            if path is not None:
                cluster.check_visible([str(path)])
            # Chunks in hand: vLLM takes up to 1,024 completions at a time, and a chunk waits for its last.
            self._depth = 2 if engine == "transformers" else 32
            self._chunk = chunk
            self.at_once = 1 + -(-workers * self._depth * chunk // STORE_BATCH)
            made = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Engine)
            self._made = made.options(max_concurrency=1 if self._depth == 2 else self._depth)
            self._given = (opener, engine, str(path or self.model), options)
            self._actors = [self._started() for _ in range(workers)]
            self.fingerprint = self._await_all()
        except BaseException:
            self.close()
            raise
        self._dispatcher = threading.Thread(target=self._dispatch, name="ray-pool", daemon=True)
        self._dispatcher.start()

    def sample(
        self,
        prompts: Sequence[Text],
        params: SamplingParams,
        *,
        keys: Sequence[str] | None = None,
        prefix_tokens: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """`params.n` completions for every prompt, as `[prompt][sample]`; see `Sampler`."""
        keys = checked_keys(keys, prompts)
        checked_prefix_tokens(prefix_tokens, keys, params.max_tokens)
        size = max(1, self._chunk // params.n)
        chunks = []
        for start in range(0, len(prompts), size):
            part = slice(start, start + size)
            own = (
                None if prefix_tokens is None else [tuple(tokens) for tokens in prefix_tokens[part]]
            )
            chunks.append(_Chunk((list(prompts[part]), params, list(keys[part]), own)))
        with self._lock:
            if self._closed or self._error:
                raise self._error or ConnectionError("The pool of samplers is closed.")
            self._queue += chunks
            self._lock.notify_all()
        try:
            for answered in as_completed([chunk.answer for chunk in chunks]):
                done = answered.result()
                if progress is not None:
                    progress(sum(map(len, done)))
        finally:
            with self._lock:  # after an error nobody waits for the others
                self._queue = deque(one for one in self._queue if one not in chunks)
        return [samples for chunk in chunks for samples in chunk.answer.result()]

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Refuse what could not be sampled; see `Sampler`."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._error or self._closed or any(one.ready for one in self._actors)
                )
                if self._closed or self._error:
                    raise self._error or ConnectionError("The pool of samplers is closed.")
                actor = next(one for one in self._actors if one.ready)
            try:
                ray.get(actor.handle.check.remote(list(prompts), params, list(keys)))
            except RayTaskError as error:
                raise _own(error) from None
            except RayActorError as error:
                self._replace(actor, error)
            else:
                return

    def close(self) -> None:
        """End the actors, and the cluster if it was started here."""
        import ray

        with self._lock:
            if self._closed:
                return
            self._closed = True
            self._lock.notify_all()
        if self._dispatcher is not None:
            self._dispatcher.join()
        for actor in self._actors:
            ray.kill(actor.handle)
        self._fail(ConnectionError("The pool of samplers was closed."))
        if self._connected:
            cluster.disconnect()

    # ------------------------------------------------------------ actors

    def _started(self) -> "_Actor":
        handle = self._made.remote(*self._given)
        return _Actor(handle, handle.told.remote())

    def _await_all(self) -> str:
        """Wait for every actor; the fingerprint they all tell."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            told = ray.get([actor.told for actor in self._actors], timeout=self.PATIENCE)
        except RayTaskError as error:
            raise _own(error) from None
        except TimeoutError:
            raise ConnectionError(
                f"Not all of {len(self._actors)} actors were ready after {self.PATIENCE:.0f} s; the "
                f"cluster has {ray.available_resources()} free. Ask for fewer workers, or end what else "
                "runs there."
            ) from None
        except RayError as error:
            raise _why(error) from None
        for actor in self._actors:
            actor.ready = True
        prints = {told_by["fingerprint"] for told_by in told}
        if len(prints) > 1:
            raise ValueError(
                f"The nodes hold different weights of {self.model} ({', '.join(sorted(prints))}). Put "
                "the model into a folder that all nodes share."
            )
        return prints.pop()

    @property
    def processes(self) -> list[int]:
        """The process of every actor that is ready, on its own node."""
        import ray

        with self._lock:
            ready = [actor.told for actor in self._actors if actor.ready]
        return [told["process"] for told in ray.get(ready)]

    # ------------------------------------------------------------ chunks

    def _dispatch(self) -> None:
        try:
            self._hand_and_take()
        except Exception as error:  # whatever it was, those who wait are told
            self._end(_why(error))

    def _hand_and_take(self) -> None:
        """Hand chunks to actors with room, take what is finished, replace who died."""
        import ray

        out: dict[Any, tuple[_Actor, _Chunk | None]] = {}
        alive = time.monotonic()
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._closed or self._error or self._queue or out
                    or not all(actor.ready for actor in self._actors)
                )  # fmt: skip
                if self._closed or self._error:
                    return
                for actor, chunk in self._handed():
                    out[actor.handle.sample.remote(*chunk.asked)] = (actor, chunk)
                for actor in self._actors:
                    if not actor.ready and actor.told not in out:
                        out[actor.told] = (actor, None)
            if any(actor.ready for actor in self._actors):
                alive = time.monotonic()
            elif time.monotonic() - alive > self.PATIENCE:
                self._end(ConnectionError(
                    f"No actor was left, and none could be started within {self.PATIENCE:.0f} s. What "
                    "is stored is kept; repeat the command to continue."
                ))  # fmt: skip
            # Not for long, because another thread may have asked meanwhile.
            finished, _ = ray.wait(list(out), num_returns=1, timeout=0.05)
            for ref in finished:
                self._take(ref, *out.pop(ref))

    def _handed(self) -> Iterator[tuple["_Actor", "_Chunk"]]:
        """Chunks and the actors that get them, in turn, so that all have some before one has more."""
        while self._queue:
            actor = min(
                (one for one in self._actors if one.ready and len(one.chunks) < self._depth),
                key=lambda one: len(one.chunks),
                default=None,
            )
            if actor is None:
                return
            chunk = self._queue.popleft()
            actor.chunks.append(chunk)
            yield actor, chunk

    def _take(self, ref: Any, actor: "_Actor", chunk: "_Chunk | None") -> None:
        """What came back for a chunk, or from an actor that has started; from a dead one, nothing."""
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

        try:
            result: Any = ray.get(ref)
        except RayTaskError as error:  # the engine itself refused
            if chunk is None:
                self._end(_own(error))
            elif self._answered(actor, chunk):
                chunk.answer.set_exception(_own(error))
        except RayError as error:
            if chunk is None or isinstance(error, RayActorError):
                self._replace(actor, error)
            elif self._answered(actor, chunk):  # an answer lost with its node
                logger.warning("A chunk is asked again: %s", error)
                self._again([chunk], error)
        else:
            if chunk is None:
                self._joined(actor, result["fingerprint"])
            elif self._answered(actor, chunk):  # not one that came late, and is asked again already
                chunk.answer.set_result(result)

    def _joined(self, actor: "_Actor", fingerprint: str) -> None:
        """An actor that replaces another has started; it must hold the same weights."""
        if fingerprint != self.fingerprint:
            self._end(ValueError(
                f"An actor that was started later holds other weights of {self.model} ({fingerprint}, not "
                f"{self.fingerprint}): its node has another copy. Put the model into a folder that all "
                "nodes share, and repeat the command to continue."
            ))  # fmt: skip
            return
        with self._lock:
            actor.ready = True
            self._failed_starts = 0
            self._lock.notify_all()

    def _answered(self, actor: "_Actor", chunk: "_Chunk | None") -> bool:
        with self._lock:
            if chunk in actor.chunks:
                actor.chunks.remove(chunk)
                return True
        return False

    def _replace(self, actor: "_Actor", error: Exception) -> None:
        """Start another actor, and put what the dead one had in hand before all else."""
        import ray

        with self._lock:
            if actor not in self._actors:
                return  # another of its chunks told so already
            self._actors.remove(actor)
            chunks, actor.chunks = actor.chunks, []
        with suppress(Exception):  # one that only cannot be reached would live on
            ray.kill(actor.handle)
        logger.warning("An actor died with %d chunks in hand, and is replaced.", len(chunks))
        if not actor.ready:
            self._failed_starts += 1
            if self._failed_starts >= self.TRIES:
                self._again(chunks, error)
                self._end(_why(error))
                return
        self._again(chunks, error)
        fresh = self._started()
        with self._lock:
            self._actors.append(fresh)
            self._lock.notify_all()

    def _again(self, chunks: Sequence["_Chunk"], error: Exception) -> None:
        for chunk in reversed(chunks):
            chunk.tries += 1
            if chunk.tries >= self.TRIES:
                chunk.answer.set_exception(ConnectionError(
                    f"{chunk.tries} actors died, one after the other, with the same {len(chunk.asked[0])} "
                    f"prompts in hand, the first of which is {chunk.asked[2][0]!r}: {_why(error)}"
                ))  # fmt: skip
            else:
                with self._lock:
                    self._queue.appendleft(chunk)

    def _end(self, error: Exception) -> None:
        """Nothing more can be done: whoever waits is told, and so is who asks later."""
        with self._lock:
            self._error = error
            self._lock.notify_all()
        self._fail(error)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            waiting = [*self._queue, *itertools.chain(*(actor.chunks for actor in self._actors))]
            self._queue.clear()
        for chunk in waiting:
            if not chunk.answer.done():
                chunk.answer.set_exception(error)


@dataclass(eq=False)
class _Chunk:
    """Prompts that are asked together: prompts, params, keys, begun."""

    asked: tuple[list[Text], SamplingParams, list[str], list[tuple[int, ...]] | None]
    answer: Future[list[list[Completion]]] = field(default_factory=Future)
    tries: int = 0


@dataclass(eq=False)
class _Actor:
    """An actor, what it tells of itself when it has started, and what it has in hand."""

    handle: Any
    told: Any
    ready: bool = False
    chunks: list[_Chunk] = field(default_factory=list)


class _Engine:
    """What runs in an actor."""

    def __init__(
        self, opener: Callable[..., Any], engine: str, model: str, options: dict[str, Any]
    ) -> None:
        self._options = (engine, model, options)
        self._sampler: Any = None
        self._open = opener

    def told(self) -> dict[str, Any]:
        """The fingerprint of the weights, and which process this is."""
        engine, model, options = self._options
        self._sampler = self._sampler or self._open(engine, model, **options)
        return {"fingerprint": self._sampler.fingerprint, "process": os.getpid()}

    def check(self, prompts: list[Text], params: SamplingParams, keys: list[str]) -> None:
        """Refuse what could not be sampled."""
        self._sampler.check(prompts, params, keys)

    def sample(
        self,
        prompts: list[Text],
        params: SamplingParams,
        keys: list[str],
        prefix_tokens: list[tuple[int, ...]] | None,
    ) -> list[list[Completion]]:
        """One chunk; an engine that is gone for good takes its actor along, which is then replaced."""
        try:
            return self._sampler.sample(prompts, params, keys=keys, prefix_tokens=prefix_tokens)
        except ChildProcessError:
            os._exit(1)


def _own(error: Any) -> Exception:
    """The engine's own error, as it would have come without a cluster."""
    cause = error.cause
    return cause if isinstance(cause, ValueError | OSError | ImportError) else _why(error)


def _why(error: Exception) -> ConnectionError:
    text = " ".join(str(error).split())
    return ConnectionError(f"The pool of samplers failed: {text[-600:]}")
