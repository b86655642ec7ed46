"""A pool of samplers on a Ray cluster, each in its own actor.

Prompts are split into chunks by their order only, so a chunk gives the same completions whichever
actor runs it, and when it is repeated. If an actor dies, it is replaced and its unfinished chunks
are run again; finished chunks are not. Completions are stored by the driver process, as with other
samplers.
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
    """Check the options of a `RaySampler`.

    Returns:
        The kind of sampler in each actor, and the options of that sampler.

    Raises:
        ImportError: Ray is not installed.
        ValueError: An option has the wrong type or is out of bounds.
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
            "engine must be the kind of sampler that each actor runs, transformers or vllm; got "
            f"engine={engine!r}."
        )
    own = inspect.signature(RaySampler).parameters.keys() - {"opener"}
    return engine, {name: value for name, value in options.items() if name not in own}


class RaySampler(Closing):
    """A sampler that distributes prompts over samplers of the same model on a Ray cluster.

    Args:
        model: A model folder that all nodes see at the same path, or a name on the Hugging Face
            Hub.
        opener: `open_sampler`, which the actors call.
        engine: The kind of sampler in each actor: transformers or vllm.
        workers: Number of actors.
        address: Address of the cluster's head node. Default: RAY_ADDRESS, or a cluster on this
            machine, or a new local instance.
        cpus: Number of CPUs per actor.
        gpus: Number of GPUs per actor. Default: the engine's `tensor_parallel_size` if the cluster
            has GPUs, otherwise 0.
        chunk: Number of completions sent to an actor at a time, and sampled again if it dies.
        options: Options of the engine.

    Raises:
        ImportError: Ray is not installed.
        ConnectionError: There is no cluster at the address.
        ValueError: The cluster has too few resources, a node does not see the model, the actors
            have different weights, or the engine raised it.
    """

    PATIENCE = 1800.0
    """Seconds to wait for the first actors, or for a new actor when all have died."""
    TRIES = 4
    """Number of actors that may die while running the same chunk."""

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
            # Chunks per actor: vLLM runs up to 1,024 completions concurrently, and a chunk
            # finishes only when its longest completion does.
            self._depth = 2 if engine == "transformers" else 32
            self._chunk = chunk
            self.at_once = 1 + -(-workers * self._depth * chunk // STORE_BATCH)
            actor_class = ray.remote(num_cpus=cpus, num_gpus=gpus)(_Engine)
            concurrency = 1 if self._depth == 2 else self._depth
            self._actor_class = actor_class.options(max_concurrency=concurrency)
            self._actor_arguments = (opener, engine, str(path or self.model), options)
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
        """Sample `params.n` completions for every prompt, as `[prompt][sample]`; see `Sampler`."""
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
            with self._lock:  # after an error, the remaining chunks are not needed
                self._queue = deque(chunk for chunk in self._queue if chunk not in chunks)
        return [samples for chunk in chunks for samples in chunk.answer.result()]

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Check that all prompts can be sampled; see `Sampler`."""
        import ray
        from ray.exceptions import RayActorError, RayTaskError

        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: (
                        self._error or self._closed or any(actor.ready for actor in self._actors)
                    )
                )
                if self._closed or self._error:
                    raise self._error or ConnectionError("The pool of samplers is closed.")
                actor = next(actor for actor in self._actors if actor.ready)
            try:
                ray.get(actor.handle.check.remote(list(prompts), params, list(keys)))
            except RayTaskError as error:
                raise _own(error) from None
            except RayActorError as error:
                self._replace(actor, error)
            else:
                return

    def close(self) -> None:
        """Stop the actors, and the local Ray instance if this process started it."""
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
        handle = self._actor_class.remote(*self._actor_arguments)
        return _Actor(handle, handle.open.remote())

    def _await_all(self) -> str:
        """Wait until all actors have loaded the model; return its fingerprint."""
        import ray
        from ray.exceptions import RayError, RayTaskError

        try:
            started = ray.get([actor.start for actor in self._actors], timeout=self.PATIENCE)
        except RayTaskError as error:
            raise _own(error) from None
        except TimeoutError:
            raise ConnectionError(
                f"Not all of the {len(self._actors)} actors were ready after {self.PATIENCE:.0f} "
                f"s. The cluster's free resources are {ray.available_resources()}. Use fewer "
                "workers, or stop other jobs on the cluster."
            ) from None
        except RayError as error:
            raise _why(error) from None
        for actor in self._actors:
            actor.ready = True
        fingerprints = {actor["fingerprint"] for actor in started}
        if len(fingerprints) > 1:
            raise ValueError(
                f"The nodes have different weights of {self.model} "
                f"({', '.join(sorted(fingerprints))}). Put the model into a folder that all nodes "
                "share."
            )
        return fingerprints.pop()

    @property
    def processes(self) -> list[int]:
        """The process id of every ready actor, on its own node."""
        import ray

        with self._lock:
            ready = [actor.start for actor in self._actors if actor.ready]
        return [started["process"] for started in ray.get(ready)]

    # ------------------------------------------------------------ chunks

    def _dispatch(self) -> None:
        try:
            self._run_chunks()
        except Exception as error:  # callers that wait for completions must get every error
            self._end(_why(error))

    def _run_chunks(self) -> None:
        """Send chunks to actors with free capacity, collect results, and replace dead actors."""
        import ray

        running: dict[Any, tuple[_Actor, _Chunk | None]] = {}
        alive = time.monotonic()
        while True:
            with self._lock:
                self._lock.wait_for(
                    lambda: self._closed or self._error or self._queue or running
                    or not all(actor.ready for actor in self._actors)
                )  # fmt: skip
                if self._closed or self._error:
                    return
                for actor, chunk in self._assigned():
                    running[actor.handle.sample.remote(*chunk.asked)] = (actor, chunk)
                for actor in self._actors:
                    if not actor.ready and actor.start not in running:
                        running[actor.start] = (actor, None)
            if any(actor.ready for actor in self._actors):
                alive = time.monotonic()
            elif time.monotonic() - alive > self.PATIENCE:
                self._end(ConnectionError(
                    f"All actors died, and none could be started within {self.PATIENCE:.0f} s. "
                    "Stored completions are kept; repeat the command to resume."
                ))  # fmt: skip
            # A short timeout, because another thread may add chunks meanwhile.
            finished, _ = ray.wait(list(running), num_returns=1, timeout=0.05)
            for ref in finished:
                self._take(ref, *running.pop(ref))

    def _assigned(self) -> Iterator[tuple["_Actor", "_Chunk"]]:
        """Yield queued chunks, each with the actor that runs it: the one with the fewest chunks."""
        while self._queue:
            actor = min(
                (
                    actor
                    for actor in self._actors
                    if actor.ready and len(actor.chunks) < self._depth
                ),
                key=lambda actor: len(actor.chunks),
                default=None,
            )
            if actor is None:
                return
            chunk = self._queue.popleft()
            actor.chunks.append(chunk)
            yield actor, chunk

    def _take(self, ref: Any, actor: "_Actor", chunk: "_Chunk | None") -> None:
        """Process the result of a chunk or of an actor's start, unless the actor was replaced."""
        import ray
        from ray.exceptions import RayActorError, RayError, RayTaskError

        try:
            result: Any = ray.get(ref)
        except RayTaskError as error:  # raised by the engine
            if chunk is None:
                self._end(_own(error))
            elif self._answered(actor, chunk):
                chunk.answer.set_exception(_own(error))
        except RayError as error:
            if chunk is None or isinstance(error, RayActorError):
                self._replace(actor, error)
            elif self._answered(actor, chunk):  # the result was lost with its node
                logger.warning("A chunk is sampled again: %s", error)
                self._again([chunk], error)
        else:
            if chunk is None:
                self._joined(actor, result["fingerprint"])
            elif self._answered(actor, chunk):  # False if the chunk is already queued again
                chunk.answer.set_result(result)

    def _joined(self, actor: "_Actor", fingerprint: str) -> None:
        """Mark a replacement actor as ready; it must have the same weights."""
        if fingerprint != self.fingerprint:
            self._end(ValueError(
                f"A replacement actor has other weights of {self.model} ({fingerprint}, not "
                f"{self.fingerprint}): its node has another copy. Put the model into a folder that "
                "all nodes share, and repeat the command to resume."
            ))  # fmt: skip
            return
        with self._lock:
            actor.ready = True
            self._failed_starts = 0
            self._lock.notify_all()

    def _answered(self, actor: "_Actor", chunk: "_Chunk | None") -> bool:
        """Remove a chunk from its actor; return whether the actor still had it."""
        with self._lock:
            if chunk in actor.chunks:
                actor.chunks.remove(chunk)
                return True
        return False

    def _replace(self, actor: "_Actor", error: Exception) -> None:
        """Start another actor, and queue the dead actor's chunks first."""
        import ray

        with self._lock:
            if actor not in self._actors:
                return  # already replaced, after an error of another chunk
            self._actors.remove(actor)
            chunks, actor.chunks = actor.chunks, []
        with suppress(Exception):  # an actor that is only unreachable would continue to run
            ray.kill(actor.handle)
        logger.warning("An actor died with %d unfinished chunks; replacing it.", len(chunks))
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
        """Queue chunks again, or fail those that have been tried too often."""
        for chunk in reversed(chunks):
            chunk.tries += 1
            if chunk.tries >= self.TRIES:
                chunk.answer.set_exception(ConnectionError(
                    f"{chunk.tries} actors died, one after the other, while sampling the same "
                    f"{len(chunk.asked[0])} prompts, of which the first is {chunk.asked[2][0]!r}: "
                    f"{_why(error)}"
                ))  # fmt: skip
            else:
                with self._lock:
                    self._queue.appendleft(chunk)

    def _end(self, error: Exception) -> None:
        """Stop after an error that cannot be repaired: raise it in all current and later calls."""
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
    """Prompts that are sampled together in one call."""

    asked: tuple[list[Text], SamplingParams, list[str], list[tuple[int, ...]] | None]
    """Prompts, parameters, keys and prefix tokens."""
    answer: Future[list[list[Completion]]] = field(default_factory=Future)
    tries: int = 0


@dataclass(eq=False)
class _Actor:
    """An actor with its unfinished chunks."""

    handle: Any
    start: Any
    """Ray reference to the result of `_Engine.open`."""
    ready: bool = False
    chunks: list[_Chunk] = field(default_factory=list)


class _Engine:
    """The class of the actors: one sampler."""

    def __init__(
        self, opener: Callable[..., Any], engine: str, model: str, options: dict[str, Any]
    ) -> None:
        self._options = (engine, model, options)
        self._sampler: Any = None
        self._open = opener

    def open(self) -> dict[str, Any]:
        """Load the model; return the fingerprint of its weights and the process id."""
        engine, model, options = self._options
        self._sampler = self._sampler or self._open(engine, model, **options)
        return {"fingerprint": self._sampler.fingerprint, "process": os.getpid()}

    def check(self, prompts: list[Text], params: SamplingParams, keys: list[str]) -> None:
        """Check that all prompts can be sampled."""
        self._sampler.check(prompts, params, keys)

    def sample(
        self,
        prompts: list[Text],
        params: SamplingParams,
        keys: list[str],
        prefix_tokens: list[tuple[int, ...]] | None,
    ) -> list[list[Completion]]:
        """Sample one chunk. If the engine's process has died, end the actor, to be replaced."""
        try:
            return self._sampler.sample(prompts, params, keys=keys, prefix_tokens=prefix_tokens)
        except ChildProcessError:
            os._exit(1)


def _own(error: Any) -> Exception:
    """Return the engine's own error, as it would be raised without a cluster."""
    cause = error.cause
    return cause if isinstance(cause, ValueError | OSError | ImportError) else _why(error)


def _why(error: Exception) -> ConnectionError:
    text = " ".join(str(error).split())
    return ConnectionError(f"The pool of samplers failed: {text[-600:]}")
