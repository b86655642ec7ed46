"""vLLM in a child process. When the sampler is closed, the process ends and its memory is freed.

This process tokenizes prompts and decodes tokens, as for every other sampler; the child runs the
engine. They exchange lines of JSON: prompts as token ids with one seed per completion in one
direction, token ids in the other, in the order in which completions finish. If the child dies, it
is restarted once, and unfinished requests are sent again.
"""

import asyncio
import contextlib
import itertools
import json
import os
import signal
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from concurrent.futures import Future, as_completed
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import IO, Any

import torch
from transformers import AutoConfig, GenerationConfig

from selftaught.records import Completion, Text
from selftaught.samplers.base import (
    STORE_BATCH,
    Closing,
    SamplingParams,
    checked_keys,
    checked_prefix_tokens,
    draw_number,
)
from selftaught.samplers.local.token_choice import endings
from selftaught.samplers.stopping import Ending
from selftaught.samplers.tokens import (
    ContextWindow,
    check_vocabulary,
    end_tokens,
    fitting_tokens,
    folder_fingerprint,
    load_tokenizer,
)
from selftaught.samplers.vllm_arguments import DEFAULTS, check_engine
from selftaught.samplers.weights import (
    QUIET_MODEL_TYPE,
    check_names,
    refuse_adapter,
    refuse_old_quiet,
)

ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of the child without an accelerator; the caller's environment overrides it."""
OPTIONS_ON_A_CPU: dict[str, Any] = {"enforce_eager": True, "enable_chunked_prefill": False}
"""Engine arguments without an accelerator.

Compilation takes longer than it saves. With chunked prefill, vLLM rewinds the random generators of
requests, which CPU generators do not support (vLLM 0.32).
"""
HINTS = (
    (("Free memory on device", "out of memory", "No available memory", "OutOfMemory",
      "requested memory"),
     "The device's memory is in use or too small. Stop other programs on the device, or set "
     "--sampler-options.gpu-memory-utilization 0.5 (a fraction of the total) or a smaller "
     "--sampler-options.max-model-len. On a CPU, set VLLM_CPU_KVCACHE_SPACE, in GiB."),
    (("head size", "head_size", "head_dim"),
     "vLLM has no attention kernel for this model's head size on this device. "
     "Use --sampler transformers."),
    (("not supported", "unsupported"), "vLLM may not support this architecture or option. "
     "--sampler transformers supports every causal language model of transformers."),
)  # fmt: skip
"""Advice for an engine that does not start, by what it printed."""


class VllmSampler(Closing):
    """A sampler that runs a causal language model in vLLM, with prefix caching.

    Every completion is a separate request with its own seed, so sampling depends only on (seed,
    key, sample index); prefix caching makes this cheap. The composition of a batch can still
    change the rounding of logits and, rarely, a token.

    Args:
        model: A model folder or a name on the Hugging Face Hub. Adapters must be merged before.
        dtype: Data type of the weights; "auto" is the type in which they were saved.
        engine: Any of vLLM's engine arguments, such as `tensor_parallel_size`,
            `data_parallel_size`, `gpu_memory_utilization` or `max_model_len`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: The folder has no model or no tokenizer.
        ChildProcessError: The engine did not start. The message has the end of its output.
    """

    def __init__(self, model: str | Path, *, dtype: str = "auto", **engine: Any) -> None:
        check_engine({"dtype": dtype, **engine})
        self.model = str(model)
        folder = Path(self.model)
        refuse_old_quiet(folder)
        if not (folder / "config.json").exists():  # vLLM reads a folder that has both as a model
            refuse_adapter(folder)
        elif _model_type(folder) == QUIET_MODEL_TYPE:
            raise ValueError(
                f"{self.model} is a Quiet-STaR model, which vLLM cannot run. Use the sampler "
                "transformers, or the base model alone (`selftaught quiet export-base`)."
            )
        if engine.get("load_format", "auto") in ("auto", "safetensors"):
            check_names(self.model)
        self._tokenizer = load_tokenizer(self.model)
        self._eos = end_tokens(_generation_config(self.model), self._tokenizer)
        self._job = {
            "model": self.model,
            **DEFAULTS,
            "dtype": dtype,
            **engine,
        }
        self._fingerprint: str | None = None
        self._lock = threading.RLock()
        self._waiting: dict[int, _Request] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._error: ChildProcessError | None = None
        self._restarts_left = 1
        self._child = _Child(self._job)
        try:
            self._child.await_ready()
            self._child.ready = True
        except BaseException:
            self._child.close()
            raise
        settings = self._child.settings
        self.at_once = _calls_that_fill(settings["requests"] * settings["replicas"])
        self._reader = threading.Thread(target=self._read, name="vllm-answers", daemon=True)
        self._reader.start()

    @property
    def fingerprint(self) -> str:
        """A hash of the weight files and their data type in the engine."""
        if self._fingerprint is None:
            files = folder_fingerprint(self.model)
            self._fingerprint = f"{files}-{self._child.settings['dtype']}"
        return self._fingerprint

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
        prefixes = checked_prefix_tokens(prefix_tokens, keys, params.max_tokens)
        check_vocabulary(prefixes, self._child.settings["vocabulary"])
        ended_by = endings(self._tokenizer, self._eos, prompts, params)
        indices = range(params.first, params.first + params.n)
        requests: dict[tuple[int, int], _Request] = {}
        onward: dict[tuple[int, int], _Request] = {}
        done: dict[tuple[int, int], Completion] = {}
        try:
            for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
                own, ending = prefixes[place], ended_by[place]
                if ending.ended(own):
                    done |= {(place, index): ending.completion(own) for index in indices}
                    continue
                tokens = [*self._tokens(prompt, key, params), *own]
                options = {
                    "temperature": params.temperature, "top_p": params.top_p,
                    # The engine does not recognize thoughts and would stop inside them.
                    "stop": [] if ending.opened else ending.stop, "stop_token_ids": ending.eos,
                    "max_tokens": params.max_tokens - len(own),
                }  # fmt: skip
                fresh = {}
                for index in indices:
                    seed = draw_number(params.seed, key, index) if params.temperature else None
                    fresh[place, index] = _Request(next(self._numbers), tokens, options, seed)
                requests |= fresh
                self._send(fresh.values())  # the engine starts while the next prompt is tokenized
            if progress is not None and done:
                progress(len(done))
            for answered in as_completed([request.answer for request in requests.values()]):
                answered.result()
                if progress is not None:
                    progress(1)
            drawn = {
                at: _Drawn.of(request.answer.result(), prefixes[at[0]])
                for at, request in requests.items()
            }
            onward = self._onward(drawn, requests, ended_by, keys, params)
            self._send(onward.values())
            drawn |= {
                at: _Drawn.of(request.answer.result(), drawn[at].ids)
                for at, request in onward.items()
            }
        finally:
            self._forget([*requests.values(), *onward.values()])
        for (place, index), sample in drawn.items():
            done[place, index] = _completion(ended_by[place], sample)
        return [[done[place, index] for index in indices] for place in range(len(prompts))]

    def _onward(
        self,
        drawn: "Mapping[tuple[int, int], _Drawn]",
        requests: "Mapping[tuple[int, int], _Request]",
        ended_by: Sequence[Ending],
        keys: Sequence[str],
        params: SamplingParams,
    ) -> "dict[tuple[int, int], _Request]":
        """Return requests that continue the completions that the engine ended inside a thought.

        They continue from the sampled tokens without stop strings, which this process finds
        afterwards.
        """
        continuations = {}
        for (place, index), sample in drawn.items():
            remaining = params.max_tokens - len(sample.ids)
            if sample.reason != "stop" or remaining < 1 or not ended_by[place].ignored(sample.ids):
                continue
            if sample.ids[-1] in ended_by[place].eos:
                continue
            first, key = requests[place, index], f"{keys[place]}\0{len(sample.ids)}"
            seed = draw_number(params.seed, key, index) if params.temperature else None
            own = len(sample.ids) - sample.fresh
            tokens = [*first.tokens, *sample.ids[own:]]
            options = first.options | {"stop": [], "max_tokens": remaining}
            continuations[place, index] = _Request(next(self._numbers), tokens, options, seed)
        return continuations

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Check that all prompts fit the model's context; see `Sampler`."""
        for prompt, key in zip(prompts, keys, strict=True):
            self._tokens(prompt, key, params)

    def close(self) -> None:
        """End the child and all its processes. Unfinished requests raise an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._child.kill()
        self._reader.join()
        self._child.close()
        self._fail(ChildProcessError(f"The sampler of {self.model} was closed."))

    def _tokens(self, prompt: Text, key: str, params: SamplingParams) -> tuple[int, ...]:
        window = ContextWindow(self.model, self._tokenizer, self._child.settings["context"])
        return fitting_tokens(window, prompt, key, params.max_tokens, params.chat_template_kwargs)

    # ------------------------------------------------------------ the child

    def _send(self, requests: Iterable["_Request"]) -> None:
        fresh = list(requests)
        with self._lock:
            if self._closed:
                raise self._error or ChildProcessError(f"The sampler of {self.model} is closed.")
            self._waiting |= {request.number: request for request in fresh}
            child = self._child
            ready = (
                child.ready
            )  # a child that is starting gets all waiting requests when it is ready
        if ready:
            child.send(fresh)

    def _forget(self, requests: Iterable["_Request"]) -> None:
        with self._lock:
            for request in requests:
                self._waiting.pop(request.number, None)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for request in waiting.values():
            request.answer.set_exception(error)

    def _read(self) -> None:
        """Deliver results to the waiting callers; restart the child once if it dies."""
        while True:
            for line in self._child.answers():
                with self._lock:
                    request = self._waiting.pop(line["number"], None)
                if request is None:
                    continue
                if "error" in line:
                    request.answer.set_exception(
                        ValueError(f"vLLM failed a request: {line['error']}")
                    )
                else:
                    request.answer.set_result(line)
            if not self._restarted():
                return

    def _restarted(self) -> bool:
        """Restart a dead child and send the unfinished requests; return False if that failed."""
        dead = self._child
        dead.kill()
        printed = dead.printed()
        ending = f"{dead.ending()}. {_hint(printed)} The end of its output:\n{printed}"
        dead.close()
        try:
            with self._lock:
                if self._closed:
                    return False
                if not self._restarts_left:
                    raise ChildProcessError("it had already been restarted once")
                self._restarts_left -= 1
                child = self._child = _Child(
                    self._job
                )  # assigned first, so that `close` can end it
            child.await_ready()
        except (OSError, ValueError) as error:
            end = ChildProcessError(
                f"vLLM with {self.model} {ending}\nIt was not restarted: {error}. Stored "
                "completions are kept; repeat the command to resume."
            )
            with self._lock:
                closed, self._closed = self._closed, True  # later calls raise this error
                self._error = end
            self._child.kill()
            if not closed:
                self._fail(end)
            return False
        with self._lock:
            child.ready = True
            missing = list(self._waiting.values())
        threading.Thread(target=child.send, args=(missing,), daemon=True).start()
        return True


@dataclass(frozen=True, eq=False)
class _Request:
    """The request for one completion."""

    number: int
    tokens: list[int]
    options: dict[str, Any]
    seed: int | None
    answer: Future[dict[str, Any]] = field(default_factory=Future)


def _calls_that_fill(requests: int) -> int:
    """Return how many calls of `sample` keep an engine busy that runs `requests` concurrently.

    They contain twice as many requests, so that the engine always has requests waiting.
    """
    return max(4, -(-2 * requests // STORE_BATCH))


@dataclass(frozen=True)
class _Drawn:
    """The tokens of a completion so far, and why the engine ended it."""

    ids: tuple[int, ...]
    fresh: int
    """Number of ids, at the end, that the last request added."""
    reason: str
    """The engine's finish reason: "stop" or "length"."""

    @classmethod
    def of(cls, answer: dict[str, Any], before: tuple[int, ...]) -> "_Drawn":
        """Return the tokens of a result appended to the tokens before it."""
        return cls((*before, *answer["tokens"]), len(answer["tokens"]), answer["reason"])


def _completion(ending: Ending, drawn: _Drawn) -> Completion:
    """Return the whole completion.

    If this process finds no ending but the engine stopped, the finish reason is "stop", unless the
    engine stopped at a stop string inside a thought.
    """
    completion = ending.completion(drawn.ids)
    stopped = completion.finish_reason == "length" and drawn.reason == "stop"
    if stopped and not ending.ignored(drawn.ids):
        return replace(completion, finish_reason="stop")
    return completion


def _model_type(folder: Path) -> object:
    """Return the `model_type` in a model folder's `config.json`; None if it cannot be read."""
    with contextlib.suppress(OSError, ValueError, AttributeError):
        return json.loads((folder / "config.json").read_text(encoding="utf-8")).get("model_type")
    return None


def _generation_config(model: str) -> GenerationConfig:
    """Return a model's generation config, from its own file or from the model's config."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))


def _hint(printed: str) -> str:
    """Return advice for an engine that printed this and did not start; empty if there is none."""
    return next((advice for words, advice in HINTS if any(word in printed for word in words)), "")


class _Child:
    """The child process that runs the engine.

    Args:
        job: Engine arguments.
    """

    def __init__(self, job: dict[str, Any]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {
            "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a forked process would inherit our pipes
            **({} if torch.accelerator.is_available() else ON_A_CPU),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or os.curdir for entry in sys.path),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c",
             "from selftaught.samplers.vllm_engine import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
            start_new_session=True,  # so that all its processes can be ended together
        )  # fmt: skip
        self._sending = threading.Lock()
        self._model = job["model"]
        self.ready = False
        self.settings: dict[str, Any] = {}
        """The engine's limits, such as its context length; set when it has started."""
        self._write({"engine": job})

    def await_ready(self) -> None:
        """Wait until the engine has started.

        Raises:
            ChildProcessError: It did not start. The message has the end of its output.
            ValueError: It does not know an option.
        """
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if not first.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)  # to get its exit code before killing it
            self.kill()
            printed = self.printed()
            raise ChildProcessError(
                f"vLLM did not start with {self._model}: it {self.ending()}. {_hint(printed)} "
                f"The end of its output:\n{printed}"
            )
        self.settings = json.loads(first)
        if "error" in self.settings:
            raise ValueError(f"vLLM rejected its options: {self.settings['error']}")

    def send(self, requests: Sequence[_Request]) -> None:
        """Send requests. Nothing happens if the child has died."""
        for (tokens, options), same in itertools.groupby(
            requests, key=lambda request: (request.tokens, request.options)
        ):
            self._write({
                "prompt": tokens, "options": options,
                "asked": [(request.number, request.seed) for request in same],
            })  # fmt: skip

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._sending, contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def answers(self) -> Iterable[dict[str, Any]]:
        """Yield the child's messages until it ends. An incomplete last line is skipped."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):
                yield json.loads(line)

    def printed(self) -> str:
        """Return the end of the engine's output, without control characters."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        text = self._log.read().decode("utf-8", "replace")
        lines = ["".join(c for c in line if c.isprintable()) for line in text.splitlines()]
        return "\n".join(line for line in lines if line.strip())

    def ending(self) -> str:
        """Wait until the process has ended and describe how: by signal or with an exit code."""
        code = self._process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """Kill the child and all processes of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # The device's memory is freed only when the last process has ended, which takes a moment.
        deadline = time.monotonic() + 10
        while _lives(self._process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        """Kill the child and close its pipes. No thread may be reading from it."""
        self.kill()
        with self._sending:
            for pipe in (self._process.stdin, self._process.stdout, self._log):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _lives(session: int) -> bool:
    """Return whether a session has a running process; False on systems without /proc."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, _, of = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                return True
    return False


# ---------------------------------------------------------------- in the child


def serve() -> None:
    """Entry point of the child: run the requests on standard input, until it is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # the parent handles Ctrl-C
    # Duplicate the pipes: the engine's output must not be read as a result, and its use of standard
    # input must not wait for the thread that reads requests.
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    job = json.loads(asked.readline())["engine"]
    asyncio.run(_serve(job, asked, lambda message: _reply(answers, message)))


def _reply(answers: IO[bytes], message: dict[str, Any]) -> None:
    answers.write(json.dumps(message).encode() + b"\n")
    answers.flush()


async def _serve(
    job: dict[str, Any], asked: IO[bytes], reply: Callable[[dict[str, Any]], None]
) -> None:
    """Start the engine and run requests as they arrive."""
    loop = asyncio.get_running_loop()
    messages: asyncio.Queue[dict[str, Any]] = asyncio.Queue()
    threading.Thread(target=_listen, args=(asked, loop, messages), daemon=True).start()
    from vllm.engine.arg_utils import AsyncEngineArgs
    from vllm.usage.usage_lib import UsageContext
    from vllm.v1.engine.async_llm import AsyncLLM

    if not torch.accelerator.is_available():
        job = OPTIONS_ON_A_CPU | job
    try:
        arguments = AsyncEngineArgs(**job)
    except TypeError as error:
        reply({"error": str(error)})
        return
    # The scheduler limits of `LLM.generate`, for throughput. Those of a server allow fewer
    # requests.
    engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    config, limits = engine.model_config, engine.vllm_config.scheduler_config
    reply({"context": config.max_model_len, "vocabulary": config.get_vocab_size(),
           "dtype": str(config.dtype).removeprefix("torch."),
           "requests": limits.max_num_seqs, "tokens": limits.max_num_batched_tokens,
           "replicas": engine.vllm_config.parallel_config.data_parallel_size})  # fmt: skip
    running: set[asyncio.Task[None]] = set()
    while True:
        message = await messages.get()
        for number, seed in message["asked"]:
            task = asyncio.create_task(_sample(engine, message, number, seed, reply))
            running.add(task)
            task.add_done_callback(running.discard)


def _listen(
    asked: IO[bytes], loop: asyncio.AbstractEventLoop, messages: asyncio.Queue[dict[str, Any]]
) -> None:
    """Read requests; kill all processes of this session when the input ends or is invalid."""
    try:
        for line in asked:
            loop.call_soon_threadsafe(messages.put_nowait, json.loads(line))
    finally:
        os.killpg(os.getpgid(0), signal.SIGKILL)


async def _sample(
    engine: Any,
    message: dict[str, Any],
    number: int,
    seed: int | None,
    reply: Callable[[dict[str, Any]], None],
) -> None:
    """Sample one completion and send its tokens."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        params = VllmParams(
            **message["options"], seed=seed, output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=bool(message["options"]["stop"]),
            # Stop strings must be searched in the same text as in the parent, with thought marks.
            skip_special_tokens=False, spaces_between_special_tokens=False,
        )  # fmt: skip
        prompt = {"prompt_token_ids": message["prompt"]}
        async for output in engine.generate(prompt, params, str(number)):
            result = output.outputs[0]
            if result.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"unexpected finish reason {result.finish_reason!r}")
            reply({"number": number, "tokens": list(result.token_ids),
                   "reason": result.finish_reason})  # fmt: skip
    except EngineDeadError:
        os._exit(1)  # the parent starts another child
    except Exception as error:  # reported to the parent, which raises it in the caller
        reply({"number": number, "error": f"{type(error).__name__}: {error}"[:500]})
