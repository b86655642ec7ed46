"""The model of a server: prompts from requests, and the thread that completes them."""

import json
import time
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from pathlib import Path
from threading import Lock
from typing import Any, Literal

import torch
from transformers import GenerationConfig, PreTrainedModel

from selftaught.prompts import PromptStyle
from selftaught.quiet.attention import thoughtful
from selftaught.quiet.gating import ThoughtParams
from selftaught.quiet.model import QuietLM
from selftaught.records import Message, Problem, Text
from selftaught.rendering import completion_text, prompt_ids
from selftaught.samplers.base import Closing, SamplingParams
from selftaught.samplers.local.model_loading import Opened, free_memory, opened, vocabulary_size
from selftaught.samplers.local.prefix_loop import SharedPrefixLoop, shared_prefix_loop, two_part
from selftaught.samplers.local.token_choice import endings
from selftaught.samplers.tokens import end_tokens
from selftaught.serving.best_of_n import Chooser
from selftaught.serving.continuous import ContinuousDecoder
from selftaught.serving.conversation import check_options, cleaned, without_thoughts
from selftaught.serving.engine import DecodingEngine
from selftaught.serving.interleaved import InterleavedDecoder, plain_predictions, quiet_predictions
from selftaught.serving.protocol import ApiError
from selftaught.serving.requests import Generation, Prompt, Wanted
from selftaught.serving.review import Reviewer
from selftaught.thought_marks import THINK, ThoughtMarks

ThoughtsMode = Literal["hidden", "shown", "summary"]
"""What a client gets of thoughts: nothing, their text, or their number and length."""
MAX_NEW = 65_536
"""Maximum number of new tokens of a model whose context has no limit."""
ENDINGS = 256
"""Number of sets of stop strings whose tables are kept."""


@dataclass(frozen=True)
class ServerSettings:
    """How a model is served."""

    name: str
    """Name of the model in requests."""
    thoughts: ThoughtsMode = "hidden"
    max_rows: int = 32
    """Maximum number of completions that are decoded at the same time."""
    max_waiting: int = 128
    """Maximum number of completions that wait for a free row."""
    max_tokens: int = 1024
    """Maximum number of new tokens of a chat completion that gives none."""
    cache_bytes: int = 256 * 2**20
    """Memory for the keys and values of earlier prompts."""
    kv_bytes: int | None = None
    """Memory for the keys and values of completions in progress. None: half of the free memory."""
    pauses: str = ""
    """Text that is appended to prompts: the pause tokens."""
    style: PromptStyle | None = None
    """Prompt style for the question of a chat; None: the model's chat template is used."""
    marks: ThoughtMarks = THINK
    """Texts that open and close a thought."""
    candidates: int = 16
    """Number of completions among which `chooser` chooses."""
    log_thoughts: Path | None = None
    """File to which thoughts are appended."""


class ModelServer(Closing):
    """A model with its decoding thread.

    Args:
        model: the loaded model with its tokenizer.
        settings: how it is served.
        how: how a Quiet-STaR model thinks.
        chooser: chooses among several completions; None: requests get all of them.
        reviewer: checks completions before a client gets them; None: no checks.
    """

    def __init__(
        self,
        model: Opened,
        settings: ServerSettings,
        how: ThoughtParams,
        chooser: Chooser | None = None,
        reviewer: Reviewer | None = None,
    ) -> None:
        self.settings, self.chooser, self.reviewer = settings, chooser, reviewer
        self.tokenizer = model.tokenizer
        self.created = int(time.time())
        self._context, self._vocabulary = model.context, vocabulary_size(model.described)
        self._beside: int = getattr(model.model, "tokens_beside", 0)
        self._eos = end_tokens(model.described.generation_config, model.tokenizer)
        self._log_lock = Lock()
        self.marks = [settings.marks]
        self._mark_ids: frozenset[int] = frozenset()
        if isinstance(model.model, QuietLM):
            ids = model.model.marks
            texts = [str(self.tokenizer.convert_ids_to_tokens(one)) for one in (ids.start, ids.end)]
            self.marks.append((texts[0], texts[1]))
            self._mark_ids = frozenset((ids.start, ids.end))
            how = replace(how, think_when=replace(how.think_when, tokenizer=self.tokenizer))
        decoder, inside = _decoder(model, settings, how, list(self._eos))
        self.engine = DecodingEngine(
            decoder, inside, max_rows=settings.max_rows, max_waiting=settings.max_waiting
        )
        self._ending = lru_cache(ENDINGS)(self._new_ending)

    @property
    def chats(self) -> bool:
        """Whether the server answers messages: with a chat template, or the prompt of a task."""
        if self.settings.style is not None:
            return True
        return self.tokenizer.chat_template is not None and not self.settings.pauses

    @property
    def one_turn(self) -> bool:
        """Whether a chat is a single question, which is put into the prompt of a task."""
        return self.settings.style is not None and not self.settings.style.as_messages

    def _new_ending(self, opened: bool, chat: str | None, stop: tuple[str, ...]) -> Any:
        """Return what ends completions; `chat` is a JSON list of messages and template options."""
        text: Text = self.settings.marks[0] if opened else "a"
        options: dict[str, Any] = {}
        if chat is not None:
            text, options = json.loads(chat)
        params = SamplingParams(
            stop=stop, thought_marks=self.settings.marks, chat_template_kwargs=options
        )
        return endings(self.tokenizer, self._eos, [text], params)[0]

    def chat_prompt(
        self, messages: Sequence[Message], stop: tuple[str, ...], options: dict[str, Any]
    ) -> Prompt:
        """Return the prompt of a conversation, without the thoughts of earlier turns.

        Raises:
            ApiError: the model has no chat template and the server no task, the template rejects the
                messages, or an option contains a thought mark.
        """
        messages = cleaned(messages, self.marks)
        check_options(options, self.marks)
        style = self.settings.style
        if self.settings.pauses and style is None:
            raise ApiError(
                "This server appends pause tokens to prompts, which the chat template ends otherwise. "
                "Use /v1/completions, or start the server with --task.",
                param="messages",
            )
        if style is not None and self.one_turn:
            if options:
                raise ApiError("chat_template_kwargs needs a model with a chat template.", param="chat_template_kwargs")  # fmt: skip
            asked = [one for one in messages if one["role"] == "user"]
            if len(asked) != 1 or len(messages) != 1:
                raise ApiError(
                    "This server puts one question into the prompt of its task; expected one message "
                    f"of the user, got the roles {', '.join(one['role'] for one in messages)}.",
                    param="messages",
                )  # fmt: skip
            text = style(Problem("", asked[0]["content"], ""))
            return self.prompt(text, (*stop, *style.stop), {})
        if style is not None:
            options = {**style.chat_template_kwargs, **options}
            messages = _asked(messages, style)
        if self.tokenizer.chat_template is None:
            raise ApiError(
                f"The model {self.settings.name} has no chat template. Use /v1/completions, or start "
                "the server with --task NAME, which puts the question into the prompt of a task.",
                param="messages",
            )  # fmt: skip
        return self.prompt(list(messages), stop, options)

    def text_prompt(self, text: str, stop: tuple[str, ...]) -> Prompt:
        """Return the prompt of a text. Special tokens of hidden thoughts are removed from it."""
        if len(self.marks) > 1:
            text = without_thoughts(text, self.marks[1:], assistant=False)
        return self.prompt(text + self.settings.pauses, stop, {})

    def token_prompt(self, ids: Sequence[int], stop: tuple[str, ...]) -> Prompt:
        """Return the prompt of token ids.

        Raises:
            ApiError: an id is not in the vocabulary or marks a hidden thought, or there are none.
        """
        if not ids or min(ids) < 0 or max(ids) >= self._vocabulary:
            raise ApiError(
                f"Expected a list of token ids from 0 to {self._vocabulary - 1}, got "
                f"{'an empty one' if not ids else f'{min(ids)} to {max(ids)}'}.",
                param="prompt",
            )  # fmt: skip
        if self.settings.pauses:
            raise ApiError(
                "This server appends pause tokens to prompts; send the prompt as text, not as token "
                "ids.",
                param="prompt",
            )
        if found := self._mark_ids.intersection(ids):
            raise ApiError(
                f"Expected a prompt without hidden thoughts, got the token id {min(found)}, which "
                "marks one.",
                param="prompt",
            )
        start = int(ids[0] == self.tokenizer.bos_token_id and len(ids) > 1)
        text = completion_text(self.tokenizer, ids[start:], ())  # for a verifier
        return Prompt(tuple(ids), text, self._ending(False, None, stop), {})

    def prompt(self, text: Text, stop: tuple[str, ...], options: dict[str, Any]) -> Prompt:
        """Return the prompt of a text or of messages."""
        try:
            ids = prompt_ids(self.tokenizer, text, options)
        except (ValueError, TypeError) as error:  # TypeError: text that the tokenizer cannot encode
            raise ApiError(str(error), param="messages") from None
        if not ids:
            raise ApiError("The prompt is empty: expected at least one token.", param="prompt")
        if isinstance(text, str):
            opens = text.rstrip().endswith(self.settings.marks[0])
            ending = self._ending(opens, None, stop)
        else:
            ending = self._new_ending(False, json.dumps([text, options]), stop)
        return Prompt(ids, text, ending, options)

    def checked(self, prompt: Prompt, max_tokens: int | None) -> int:
        """Return the maximum number of new tokens after a prompt.

        Raises:
            ApiError: the prompt with them is longer than the model's context.
        """
        if self._context is None:
            new = self.settings.max_tokens if max_tokens is None else max_tokens
            if new > MAX_NEW:
                raise ApiError(f"max_tokens must be at most {MAX_NEW:,}; got {new}.", param="max_tokens")  # fmt: skip
            return new
        left = self._context - self._beside - len(prompt.ids)
        new = max(1, min(self.settings.max_tokens, left)) if max_tokens is None else max_tokens
        if new > left:
            raise ApiError(
                f"The prompt has {len(prompt.ids)} tokens; with {new} new ones that is more than the "
                f"{self._context - self._beside} tokens of the model's context. Send a shorter "
                "prompt, or set a smaller max_tokens.",
                param="max_tokens", code="context_length_exceeded",
            )  # fmt: skip
        return new

    def generation(self, prompts: Sequence[Prompt], wanted: Wanted) -> Generation:
        """Start completing prompts.

        Raises:
            ApiError: more completions than the server decodes at the same time, or too many
                requests.
        """
        if wanted.n > self.settings.max_rows:
            raise ApiError(f"n must be at most {self.settings.max_rows}; got {wanted.n}.", param="n")  # fmt: skip
        return Generation(self.engine, self.tokenizer, prompts, wanted, self.settings.marks)

    def log(self, request: str, texts: Sequence[str]) -> None:
        """Append the thoughts of a request to the log of thoughts, if there is one."""
        path = self.settings.log_thoughts
        if path is None or not any(texts):
            return
        line = json.dumps({"time": time.time(), "request": request, "thoughts": list(texts)})
        with self._log_lock, path.open("a", encoding="utf-8") as file:
            file.write(line + "\n")

    def close(self) -> None:
        """Stop decoding, and free the memory."""
        self.engine.close()
        for one in (self.chooser, self.reviewer):
            if one is not None:
                one.close()
        free_memory()


def _asked(messages: Sequence[Message], style: PromptStyle) -> list[Message]:
    """Return a conversation whose last question is asked in the style of a task.

    The task's system message is added if the conversation has none, and its worked examples before
    the first turn.
    """
    if messages[-1]["role"] != "user":
        return list(messages)
    built = style(Problem("", messages[-1]["content"], ""))
    assert not isinstance(built, str)
    own = [one for one in messages[:-1] if one["role"] == "system"]
    turns = [one for one in messages[:-1] if one["role"] != "system"]
    before = [one for one in built[:-1] if not (own and one["role"] == "system")]
    return [*own, *before, *turns, built[-1]]


def _decoder(
    model: Opened, settings: ServerSettings, how: ThoughtParams, ends: list[int]
) -> tuple[Any, Any]:
    """Return the decoder for a model, and the context in which the model must run."""
    rows = settings.max_rows
    if isinstance(model.model, QuietLM):
        predict = partial(quiet_predictions, model.model, how, ends)
        return InterleavedDecoder(predict, rows), partial(thoughtful, model.model.base)
    plain = model.model
    assert isinstance(plain, PreTrainedModel)
    probe = prompt_ids(model.tokenizer, "Q: How many? A: 1 + 1 = 2. Q: How many?")
    with torch.inference_mode():
        loop = shared_prefix_loop(plain, probe, len(probe) // 2)
    if isinstance(loop, SharedPrefixLoop):
        kv_bytes = settings.kv_bytes or free_bytes(plain.device) // 2
        decoder = ContinuousDecoder(loop, rows, settings.cache_bytes, kv_bytes)
        return decoder, partial(two_part, plain)
    # `generate` applies the model's own settings, such as a repetition penalty.
    plain.generation_config = GenerationConfig()
    nothing: Any = nullcontext
    return InterleavedDecoder(partial(plain_predictions, plain), rows), nothing


def free_bytes(device: torch.device) -> int:
    """Return the free memory of a device."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    meminfo = Path("/proc/meminfo")
    for line in meminfo.read_text().splitlines() if meminfo.exists() else ():
        if line.startswith("MemAvailable:"):
            return 1024 * int(line.split()[1])
    return 8 * 2**30  # not Linux


def open_server(
    model: str,
    settings: ServerSettings,
    how: ThoughtParams,
    chooser: Chooser | None = None,
    reviewer: Reviewer | None = None,
    *,
    dtype: str = "auto",
    device: str = "auto",
) -> ModelServer:
    """Load a model and start its decoding thread.

    Args:
        model: model folder or Hugging Face name.
        settings: how it is served.
        how: how a Quiet-STaR model thinks.
        chooser: chooses among several completions; None: requests get all of them.
        reviewer: checks completions before a client gets them; None: no checks.
        dtype: data type of the weights; "auto" is the type in which they were saved.
        device: name of a device; "auto" is the GPU if there is one.

    Raises:
        ValueError: the folder has no model or no tokenizer.
    """
    return ModelServer(opened(model, None, dtype, device), settings, how, chooser, reviewer)
