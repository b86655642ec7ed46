"""Sampling from a server with an OpenAI-compatible API: vLLM, llama.cpp, TGI, `transformers
serve`, or a hosted service.

Text prompts go to /completions, messages to /chat/completions. Responses are validated: their size
and types are checked, and invalid responses are requested again. The fingerprint cannot depend on
the weights, because a server does not expose them.

Reasoning that a server returns in a separate field (`reasoning_content` or `reasoning`) is put
before the answer, between thought marks. A server that hides the reasoning is an error. A
completion that the server ended at a stop string inside a thought is requested again without stop
strings, which are then found on this side.
"""

import hashlib
import json
import logging
import math
import time
from collections.abc import Callable, Sequence
from concurrent.futures import CancelledError, Future, as_completed
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeGuard, TypeVar

from selftaught.records import Completion, FinishReason, Text
from selftaught.samplers.base import (
    Closing,
    SamplingParams,
    Usage,
    checked_prefix_tokens,
    without_stop,
)
from selftaught.samplers.openai_client import Refused, ServerLine, Wrong, check_url, is_count
from selftaught.thought_marks import ThoughtMarks, after_thought

logger = logging.getLogger(__name__)

T = TypeVar("T")

PLAIN = {
    # Special tokens may be thought marks. Other servers have no option to keep them.
    "vllm": {"top_k": -1, "min_p": 0.0, "repetition_penalty": 1.0, "skip_special_tokens": False},
    "llamacpp": {"top_k": 0, "min_p": 0.0, "typical_p": 1.0, "repeat_penalty": 1.0},
}
"""Options that disable a server's own defaults, which would change the sampling distribution or the
returned text."""
FINISHED: dict[str, FinishReason] = {"stop": "stop", "length": "length", "content_filter": "length"}


class OpenAISampler(Closing):
    """A sampler for a model on a server with an OpenAI-compatible API.

    Every sample is a separate request with a seed derived from (seed, key, sample index). A sample
    therefore depends neither on the number of samples nor on retries. The repeated prompt costs
    little if the server caches prefixes. Whether equal seeds give equal samples depends on the
    server.

    Args:
        model: Name of the model on the server.
        base_url: Base URL of the server, such as http://localhost:8000/v1. The API key is read from
            the environment variable OPENAI_API_KEY only.
        concurrency: Maximum number of requests in flight, over all threads.
        timeout: Time limit of one attempt of a request, in seconds.
        retries: Maximum number of retries of a request, with exponential back-off.
        n_per_request: Number of samples per request, for servers that bill the prompt of each
            request. The samples of a request share the seed of the first one. If the server
            returns fewer samples, they are requested one at a time.
        price_in: Price of a million prompt tokens, to compute the cost in `usage`.
        price_out: Price of a million completion tokens.

    Raises:
        ValueError: The URL is invalid or contains a password, the server does not have the model,
            or it rejects the API key.
        ConnectionError: No server responds at the URL.
        ImportError: The package openai is not installed.
    """

    def __init__(
        self,
        model: str,
        *,
        base_url: str = "",
        concurrency: int = 32,
        timeout: float = 600.0,
        retries: int = 8,
        n_per_request: int = 1,
        price_in: float | None = None,
        price_out: float | None = None,
    ) -> None:
        check_values(
            base_url=base_url, concurrency=concurrency, timeout=timeout, retries=retries,
            n_per_request=n_per_request, price_in=price_in, price_out=price_out,
        )  # fmt: skip
        self.model = str(model)
        self.at_once = 2 + concurrency // 256
        self._url = base_url.rstrip("/")
        self._n_per_request = n_per_request
        self._prices = (price_in, price_out)
        self._limit_name = "max_tokens"
        self._unsent: set[str] = set()
        self._ends: dict[int, bool] = {}
        self._line = ServerLine(self._url, concurrency, timeout, retries)
        try:
            entry = self._entry()
        except BaseException:
            self.close()
            raise
        self._kind = entry.get("owned_by")
        known = [
            self.model,
            *(entry[key] for key in ("root", "parent") if _is_text(entry.get(key))),
        ]
        self.fingerprint = hashlib.sha256(json.dumps(known).encode()).hexdigest()[:16]
        """A hash of the model's name and, if the server reports it, its folder."""

    @property
    def usage(self) -> Usage:
        """Requests, tokens and seconds since the sampler was opened."""
        line, (price_in, price_out) = self._line, self._prices
        cost = None
        if price_in is not None or price_out is not None:
            bill = line.prompt_tokens * (price_in or 0) + line.completion_tokens * (price_out or 0)
            cost = bill / 1e6
        return Usage(
            requests=line.requests,
            retries=line.retried,
            prompt_tokens=line.prompt_tokens,
            completion_tokens=line.completion_tokens,
            seconds=round(time.monotonic() - line.opened, 3),
            cost=cost,
        )

    def sample(
        self,
        prompts: Sequence[Text],
        params: SamplingParams,
        *,
        keys: Sequence[str] | None = None,
        prefix_tokens: Sequence[Sequence[int]] | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[Completion]]:
        """Sample `params.n` completions for every prompt, as `[prompt][sample]`; see `Sampler`.

        Completions have token ids only from a vLLM server. Other servers do not return them, and
        cannot continue prefix tokens.

        Raises:
            ValueError: The server rejects a request, or cannot continue prefix tokens.
            ConnectionError: All attempts of a request failed. The message has the last error.
            RuntimeError: The sampler was closed.
        """
        keys = [_default_key(prompt) for prompt in prompts] if keys is None else keys
        if len(keys) != len(prompts):
            raise ValueError(f"Expected one key per prompt, got {len(keys)} for {len(prompts)}.")
        prefixes = checked_prefix_tokens(prefix_tokens, keys, params.max_tokens)
        self.check(prompts, params, keys)
        if any(prefixes) and self._kind != "vllm":
            raise ValueError(
                "Prefix tokens are sent as token ids, which of the servers only vLLM is known to "
                f"take, and {self._url} is not a vLLM server. Use the sampler transformers or vllm."
            )
        pending: dict[Future[list[Completion]], tuple[int, range]] = {}
        done: dict[tuple[int, int], Completion] = {}
        try:
            for prompt, (text, key, tokens) in enumerate(zip(prompts, keys, prefixes, strict=True)):
                size = 1 if tokens else self._n_per_request
                for part in _parts(params.first, params.n, size):
                    ask = _Ask(text, key, tokens, part, params)
                    pending[self._line.submit(self._completions, ask)] = prompt, part
            for future in as_completed(pending):
                prompt, part = pending[future]
                completions = zip(part, future.result(), strict=True)
                done |= {(prompt, index): completion for index, completion in completions}
                if progress is not None:
                    progress(len(part))
        except CancelledError:
            raise RuntimeError("The sampler was closed while requests were in flight.") from None
        finally:
            for future in pending:
                future.cancel()
        indices = range(params.first, params.first + params.n)
        return [[done[prompt, index] for index in indices] for prompt in range(len(prompts))]

    def check(self, prompts: Sequence[Text], params: SamplingParams, keys: Sequence[str]) -> None:
        """Check that all prompts can be sent. The server checks whether they fit the context.

        Raises:
            ValueError: A prompt ends with an assistant's message, which only vLLM is known to
                continue, or cannot be encoded as UTF-8. The message names the key.
        """
        for prompt, key in zip(prompts, keys, strict=True):
            if _is_open(prompt) and self._kind != "vllm":
                raise ValueError(
                    f"The prompt of {key!r} ends with a message of the assistant, which must be "
                    f"continued. Only vLLM servers are known to do so, and {self._url} is not one; "
                    "other servers would start a new answer. Use the sampler transformers or vllm."
                )
            try:
                json.dumps(prompt, ensure_ascii=False).encode()
            except UnicodeEncodeError:
                raise ValueError(
                    f"The prompt of {key!r} has a lone surrogate, which is not a valid character "
                    "and cannot be sent. Correct the question."
                ) from None

    def close(self) -> None:
        """Cancel all requests and end the thread. `sample` raises an error in other threads."""
        self._line.close()

    # ------------------------------------------------------------ requests, on the client's thread

    async def _completions(self, ask: "_Ask") -> list[Completion]:
        """Return the completions of some samples of one prompt, in order."""
        if ask.prefix_tokens:
            return [await self._continued(ask)]
        while True:
            path, body = self._request(ask)
            n = len(ask.part) if self._n_per_request > 1 else 1
            if n < len(ask.part):
                return [
                    completion
                    for at in ask.part
                    for completion in await self._completions(ask.only(at))
                ]
            read = partial(_choices, n=n, marks=ask.params.thought_marks)
            try:
                choices = await self._line.ask(path, body, read, ask.key)
            except Refused as refused:
                if self._switched(body, refused):
                    continue
                if n > 1 and refused.status in (400, 422):
                    choices = []
                else:
                    raise self._refusal(refused, ask, path) from None
            if choices:
                self._refuse_hidden(choices, ask)
                return [
                    await self._whole(choice, ask, at)
                    for choice, at in zip(choices, ask.part, strict=True)
                ]
            logger.warning(
                "%s does not return %d samples per request; requesting them one at a time.",
                self._url,
                n,
            )
            self._n_per_request = 1

    def _request(self, ask: "_Ask") -> tuple[str, dict[str, Any]]:
        """Return the path and the JSON body of a request."""
        params, chat = ask.params, not isinstance(ask.prompt, str)
        body: dict[str, Any] = {
            "model": self.model,
            "messages" if chat else "prompt": ask.prompt,
            self._limit_name if chat else "max_tokens": params.max_tokens,
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed_of(params.seed, ask.key, ask.part[0]),
            **PLAIN.get(str(self._kind), {}),
        }
        for name in self._unsent:
            body.pop(name, None)
        if len(ask.part) > 1:
            body["n"] = len(ask.part)
        if params.stop and not ask.stops_here:
            body["stop"] = list(params.stop)
        if chat and params.chat_template_kwargs:
            body["chat_template_kwargs"] = dict(params.chat_template_kwargs)
        if self._kind == "vllm":
            body["return_token_ids"] = True
        if _is_open(ask.prompt):
            body |= {"add_generation_prompt": False, "continue_final_message": True}
        return ("chat/completions" if chat else "completions"), body

    async def _whole(self, choice: "_Choice", ask: "_Ask", index: int) -> Completion:
        """Return a completion; request it again if the server ended it inside a thought."""
        by_string = choice.by_string or (self._kind != "vllm" and choice.finish_reason == "stop")
        if by_string and not ask.stops_here and _in_thought(choice.text, ask):
            (completion,) = await self._completions(replace(ask.only(index), stop_here=True))
            return completion
        return await self._completion(choice, ask)

    async def _completion(self, choice: "_Choice", ask: "_Ask") -> Completion:
        if choice.finish_reason == "content_filter":
            logger.warning("A completion of %r was cut by the server's content filter.", ask.key)
        self._line.check_secret(choice.text)
        text = _cut(choice.text, ask)
        finish = FINISHED[choice.finish_reason] if text is None else "stop"
        ids = choice.token_ids if self._kind == "vllm" and not choice.reasoned else None
        if ids and text is not None and ask.stops_here:
            ids = await self._up_to_stop(ids, len(ids), ask)
        return Completion(choice.text if text is None else text, finish, ids, ask.opened)

    def _refuse_hidden(self, choices: "Sequence[_Choice]", ask: "_Ask") -> None:
        """Raise if the server counts reasoning tokens but does not return them.

        Raises:
            ValueError: It does. The message names the server and the model.
        """
        hidden = max(choice.hidden for choice in choices)
        if hidden:
            raise ValueError(
                f"The server at {self._url} counts {hidden} reasoning tokens of {self.model} for "
                f"{ask.key!r} but does not return their text, so stored completions would be "
                "answers without the reasoning to learn. Use a server that returns the reasoning, "
                "disable it (--chat-template-kwargs.enable_thinking false, if the model's template "
                "supports it), or use another model."
            )

    async def _continued(self, ask: "_Ask") -> Completion:
        """Continue prefix tokens with a vLLM server and return the whole completion."""
        before = await self._text(ask.prefix_tokens, ask)
        if (text := _cut(before, ask)) is not None:
            ids = await self._up_to_stop(ask.prefix_tokens, len(ask.prefix_tokens), ask)
            return Completion(text, "stop", ids, ask.opened)
        if await self._ends_a_text(ask.prefix_tokens[-1], ask):
            text = await self._text(ask.prefix_tokens[:-1], ask)
            return Completion(text, "stop", ask.prefix_tokens, ask.opened)
        options = ask.params.chat_template_kwargs
        request = (
            {"prompt": ask.prompt}
            if isinstance(ask.prompt, str)
            else {
                "messages": ask.prompt,
                "add_generation_prompt": not _is_open(ask.prompt),
                "continue_final_message": _is_open(ask.prompt),
                **({"chat_template_kwargs": dict(options)} if options else {}),
            }
        )
        tokens = await self._at_root(
            "tokenize", request, ask, lambda answer: _ids(answer["tokens"])
        )
        ids = ask.prefix_tokens
        if _in_thought(before, ask):
            ask = replace(ask, stop_here=True)
        while True:
            choice = await self._one(self._continuation(ask, tokens, ids), ask)
            fresh = choice.token_ids or ()
            ids += fresh
            text = await self._text(ids[:-1] if choice.by_token else ids, ask)
            before_stop = _cut(text, ask)
            # If a prompt ends within a character, vLLM counts that character as part of the
            # completion and may find a stop string there. Such a completion has not ended.
            if before_stop is not None or not choice.by_string or len(ids) == ask.params.max_tokens:
                break
            if _in_thought(text, ask):
                ask = replace(ask, stop_here=True)
        if before_stop is None:
            return Completion(text, "stop" if choice.by_token else "length", ids, ask.opened)
        ids = await self._up_to_stop(ids, len(fresh), ask)
        return Completion(before_stop, "stop", ids, ask.opened)

    def _continuation(
        self, ask: "_Ask", tokens: Sequence[int], ids: tuple[int, ...]
    ) -> dict[str, Any]:
        """Return the request body to continue token ids. Its seed depends on their number too."""
        params = ask.params
        body: dict[str, Any] = {
            "model": self.model,
            "prompt": [*tokens, *ids],
            "max_tokens": params.max_tokens - len(ids),
            "temperature": params.temperature,
            "top_p": params.top_p,
            "seed": seed_of(params.seed, f"{ask.key}\0{len(ids)}", ask.part[0]),
            "return_token_ids": True,
            **PLAIN["vllm"],
        }
        return body | ({"stop": list(params.stop)} if params.stop and not ask.stops_here else {})

    async def _up_to_stop(self, ids: tuple[int, ...], fresh: int, ask: "_Ask") -> tuple[int, ...]:
        """Return the shortest prefix of token ids whose text contains a stop string.

        At most the last `fresh` ids are removed. The server does not find a stop string that
        starts in the prefix tokens, and continues after it.
        """
        few, enough, middle = len(ids) - fresh, len(ids), len(ids) - 1
        while enough - few > 1:
            if _cut(await self._text(ids[:middle], ask), ask) is None:
                few = middle
            else:
                enough = middle
            middle = (few + enough) // 2
        return ids[:enough]

    async def _ends_a_text(self, token: int, ask: "_Ask") -> bool:
        """Return whether a token is an end token, by letting the server sample only this token."""
        if token not in self._ends:
            body = {
                "model": self.model,
                "prompt": [token],
                "max_tokens": 1,
                "temperature": 0,
                "allowed_token_ids": [token],
                "return_token_ids": True,
            }
            self._ends[token] = (await self._one(body, ask)).finish_reason == "stop"
        return self._ends[token]

    async def _one(self, body: dict[str, Any], ask: "_Ask") -> "_Choice":
        """Send a request with token ids and return its only choice, which must have token ids."""

        def read(answer: dict[str, Any]) -> _Choice:
            (choice,) = _choices(answer, 1, ask.params.thought_marks)
            if choice.token_ids is None:
                raise Wrong("token ids are missing")
            return choice

        try:
            return await self._line.ask("completions", body, read, ask.key)
        except Refused as refused:
            raise self._refusal(refused, ask, "completions") from None

    async def _text(self, tokens: Sequence[int], ask: "_Ask") -> str:
        """Return the text of token ids, including special tokens, as the server decodes them."""
        request = {"tokens": list(tokens)}
        text = await self._at_root(
            "detokenize", request, ask, lambda answer: _text(answer["prompt"])
        )
        self._line.check_secret(text)
        return text

    async def _at_root(
        self, verb: str, request: dict[str, Any], ask: "_Ask", read: Callable[[dict[str, Any]], T]
    ) -> T:
        """Call an endpoint of vLLM that is not part of OpenAI's API, such as /tokenize."""
        path = f"{self._url.removesuffix('/v1')}/{verb}"
        try:
            return await self._line.ask(path, {"model": self.model} | request, read, ask.key)
        except Refused as refused:
            raise self._refusal(refused, ask, path) from None

    def _switched(self, body: dict[str, Any], refused: Refused) -> bool:
        """Return whether a rejected request can be sent in another form, used from now on.

        The other form has another name for the token limit, or omits options that are 1, the
        default.
        """
        if refused.status not in (400, 422):
            return False
        if "max_completion_tokens" in refused.words and "messages" in body and "max_tokens" in body:
            self._limit_name = "max_completion_tokens"
            return True
        rejected = {name for name in ("temperature", "top_p") if name in refused.words}
        switched = {name for name in rejected if body.get(name) == 1}
        self._unsent |= switched
        return bool(switched)

    def _entry(self) -> dict[str, Any]:
        """Return the model's entry in the server's list of models; empty if there is no list."""
        try:
            entries = self._line.submit(self._line.ask, "models", None, _entries, None).result()
        except Refused as refused:
            if refused.status in (404, 405):
                return {}
            raise self._refusal(refused, None, "models") from None
        found = [entry for entry in entries if entry["id"] == self.model]
        if entries and not found:
            served = ", ".join(
                repr(self._line.without_key(entry["id"])[:200]) for entry in entries[:20]
            )
            more = f" and {len(entries) - 20} more" if len(entries) > 20 else ""
            raise ValueError(
                f"The server at {self._url} does not have the model {self.model!r}; it serves "
                f"{served}{more}. Give --model one of these names."
            )
        return found[0] if found else {}

    def _refusal(self, refused: "Refused", ask: "_Ask | None", path: str) -> ValueError:
        """Return the error for a rejected request, with advice."""
        status, words = refused.status, refused.words
        about = f"of {ask.key!r}" if ask else f"for /{path}"
        message = f"The server at {self._url} rejected the request {about} ({status}: {words})."
        stop = ask.params.stop if ask else ()
        if status in (401, 403):
            key = "Set the environment variable OPENAI_API_KEY to a valid key."
            return ValueError(f"{message} {key}")
        if status == 404 and path == "completions":
            return ValueError(
                f"{message} If the server has no text completions, use --prompt chat. Also check "
                "the base URL: most end in /v1."
            )
        if ask and "context" in words.lower() and status in (400, 413, 422):
            return ValueError(
                f"{message} The prompt and max_tokens={ask.params.max_tokens} do not fit into the "
                f"context of {self.model}. Use fewer worked examples, a shorter question, or a "
                "smaller max_tokens."
            )
        if len(stop) > 4 and "stop" in words.lower():
            return ValueError(
                f"{message} {len(stop)} stop strings were sent; many hosted servers allow 4. Use "
                "fewer, or use --prompt chat, which needs none."
            )
        return ValueError(message)


def check_values(
    *,
    base_url: str = "",
    concurrency: int = 1,
    timeout: float = 1.0,
    retries: int = 0,
    n_per_request: int = 1,
    price_in: float | None = None,
    price_out: float | None = None,
    **others: object,
) -> None:
    """Check the values of an `OpenAISampler`'s options. Options that are not given are valid.

    Raises:
        ValueError: A value has the wrong type or is out of bounds.
    """
    del others
    check_url(base_url)
    for name, value, least in (
        ("concurrency", concurrency, 1),
        ("retries", retries, 0),
        ("n_per_request", n_per_request, 1),
    ):
        if not is_count(value) or value < least:
            raise ValueError(f"{name} must be a whole number of at least {least}; got {value!r}.")
    if not (_is_number(timeout) and timeout > 0):
        raise ValueError(f"timeout must be a number of seconds above 0; got {timeout!r}.")
    for name, price in (("price_in", price_in), ("price_out", price_out)):
        if price is not None and not (_is_number(price) and price >= 0):
            raise ValueError(f"{name} must be a number of at least 0; got {price!r}.")


def seed_of(seed: int, key: str, index: int) -> int:
    """Return the 31-bit seed of a request, from (seed, key, sample index)."""
    name = f"{seed}\0{key}\0{index}".encode("utf-8", "surrogatepass")
    return int.from_bytes(hashlib.sha256(name).digest()[:4], "big") >> 1


def _cut(text: str, ask: "_Ask") -> str | None:
    """Return the text before the first stop string outside thoughts, or None if there is none."""
    params = ask.params
    return without_stop(text, params.stop, params.thought_marks, opened=ask.opened)


def _in_thought(text: str, ask: "_Ask") -> bool:
    """Return whether a completion that ended at a stop string ended in a thought or directly after.

    Servers do not return the stop string itself.
    """
    if not ask.params.stop:
        return False
    return not (
        after_thought(text, ask.params.thought_marks, opened=ask.opened) or ""
    ).strip() and (ask.opened or any(mark in text for mark in ask.params.thought_marks))


# ---------------------------------------------------------------- requests and responses


@dataclass(frozen=True)
class _Ask:
    """Some samples of one prompt."""

    prompt: Text
    key: str
    prefix_tokens: tuple[int, ...]
    part: range
    """Indices of the samples."""
    params: SamplingParams
    stop_here: bool = False
    """Whether stop strings are not sent to the server, but found on this side."""

    @property
    def stops_here(self) -> bool:
        """Whether stop strings are found on this side, because the server ignores thoughts."""
        return self.stop_here or self.opened

    @property
    def opened(self) -> bool:
        """Whether the prompt ends inside a thought; known only for text prompts."""
        return isinstance(self.prompt, str) and self.prompt.rstrip().endswith(
            self.params.thought_marks[0]
        )

    def only(self, index: int) -> "_Ask":
        """Return the same request for one sample."""
        return replace(self, part=range(index, index + 1))


@dataclass(frozen=True)
class _Choice:
    """One choice in a server's response, with checked types."""

    text: str
    finish_reason: str
    token_ids: tuple[int, ...] | None
    by_string: bool
    """Whether a stop string ended it. Only vLLM reports this."""
    reasoned: bool = False
    """Whether the reasoning was in a separate field."""
    hidden: int = 0
    """Number of reasoning tokens that the server counts but does not return."""

    @property
    def by_token(self) -> bool:
        """Whether an end token ended it."""
        return self.finish_reason == "stop" and not self.by_string


def _choices(answer: dict[str, Any], n: int, marks: ThoughtMarks) -> list[_Choice]:
    """Parse the n choices of a response, in order of index.

    Returns:
        The choices; an empty list if n > 1 and the server returned fewer.
    """
    choices = answer.get("choices")
    if not isinstance(choices, list) or not all(isinstance(choice, dict) for choice in choices):
        raise Wrong("choices are missing")
    if 1 < n > len(choices):
        return []
    if len(choices) != n:
        raise Wrong(f"{len(choices)} choices instead of {n}")
    by_index = {choice.get("index"): choice for choice in choices}
    if sorted(map(str, by_index)) != sorted(map(str, range(n))):
        raise Wrong("the indices of the choices are wrong")
    parsed = [_choice(by_index[at], marks) for at in range(n)]
    hidden = _reasoning_tokens(answer)
    if not hidden or any(choice.reasoned or _marked(choice.text, marks) for choice in parsed):
        return parsed
    return [replace(choice, hidden=hidden) if "message" in by_index[at] else choice
            for at, choice in enumerate(parsed)]  # fmt: skip


def _marked(text: str, marks: ThoughtMarks) -> bool:
    return any(mark in text for mark in marks)


def _reasoning_tokens(answer: dict[str, Any]) -> int:
    """Return the number of reasoning tokens in a response's usage; 0 if it is not reported."""
    usage = answer.get("usage")
    details = usage.get("completion_tokens_details") if isinstance(usage, dict) else None
    count = details.get("reasoning_tokens") if isinstance(details, dict) else None
    return count if is_count(count) and count > 0 else 0


def _with_reasoning(message: dict[str, Any], text: str, reason: str, marks: ThoughtMarks) -> str:
    """Return a message's content with the reasoning from a separate field put before it.

    The field is `reasoning_content` (vLLM, SGLang, llama.cpp, DeepSeek) or `reasoning` (later vLLM,
    OpenRouter). A thought that was cut at the token limit is not closed.
    """
    begin, end = marks
    found = (message.get(name) for name in ("reasoning_content", "reasoning"))
    thought = next((field for field in found if isinstance(field, str) and field), None)
    if thought is None or text.lstrip().startswith(begin):
        return text
    cut = reason != "stop" and not text
    return f"{begin}{thought}" if cut else f"{begin}{thought}{end}{text}"


def _choice(choice: dict[str, Any], marks: ThoughtMarks) -> _Choice:
    reason = choice.get("finish_reason")
    if reason not in FINISHED:
        raise Wrong(f"an unknown finish_reason: {str(reason)[:50]}")
    if "message" in choice:
        message = choice["message"]
        if not isinstance(message, dict) or "content" not in message:
            raise Wrong("a message has no content")
        content = _text("" if message["content"] is None else message["content"])
        text = _with_reasoning(message, content, reason, marks)
    else:
        content = text = choice.get("text")
    ids = choice.get("token_ids")
    by_string = reason == "stop" and isinstance(choice.get("stop_reason"), str)
    reasoned = text != content
    return _Choice(_text(text), reason, None if ids is None else _ids(ids), by_string, reasoned)


def _entries(answer: dict[str, Any]) -> list[dict[str, Any]]:
    """Return the entries of a server's list of models."""
    entries = answer.get("data")
    if not isinstance(entries, list):
        raise Wrong("expected a list of models; check that the base URL ends in /v1")
    return [entry for entry in entries if isinstance(entry, dict) and _is_text(entry.get("id"))]


def _text(value: object) -> str:
    if not isinstance(value, str):
        raise Wrong(f"expected a string, got {type(value).__name__}")
    return value


def _ids(value: object) -> tuple[int, ...]:
    if not isinstance(value, list) or not all(
        is_count(token) and 0 <= token < 2**31 for token in value
    ):
        raise Wrong("expected a list of token ids")
    return tuple(value)


def _is_text(value: object) -> TypeGuard[str]:
    return isinstance(value, str)


def _is_number(value: object) -> TypeGuard[float]:
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def _is_open(prompt: Text) -> bool:
    """Return whether a prompt ends with an assistant's message, which the completion continues."""
    return not isinstance(prompt, str) and prompt[-1]["role"] == "assistant"


def _parts(first: int, n: int, size: int) -> list[range]:
    """Split sample indices into ranges whose boundaries are multiples of `size`."""
    ends = [*range((first // size + 1) * size, first + n, size), first + n]
    return [range(start, end) for start, end in zip([first, *ends], ends, strict=False)]


def _default_key(prompt: Text) -> str:
    return prompt if isinstance(prompt, str) else json.dumps(prompt, ensure_ascii=False)
