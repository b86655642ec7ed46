"""Response bodies of OpenAI's completion and chat interfaces."""

from collections.abc import Sequence
from dataclasses import asdict
from typing import Any

from selftaught.rendering import completion_text
from selftaught.serving.jobs import LogProb
from selftaught.serving.requests import Generation
from selftaught.serving.server import ThoughtsMode
from selftaught.serving.text import UNFINISHED, CompletionText, Detokenizer, Piece


def summary(text: CompletionText) -> str:
    """Return the number and length of a completion's thoughts, without their text."""
    if not text.reasoning_tokens:
        return ""
    if text.hidden_tokens:
        return (
            f"{text.hidden_tokens} tokens of thoughts before {text.thinking_positions} of "
            f"{len(text.token_ids)} tokens."
        )
    return f"A thought of {text.reasoning_tokens} tokens."


def finish_reason(text: CompletionText) -> str | None:
    """Return why a completion ended, with OpenAI's name for content that was withheld."""
    return "content_filter" if text.filtered else text.finish_reason


def shown_reasoning(mode: ThoughtsMode, text: CompletionText) -> str | None:
    """Return what a client gets of the thoughts of a whole completion."""
    match mode:
        case "shown":
            return text.reasoning or None
        case "summary":
            return summary(text) or None
    return None


class Bodies:
    """Makes the bodies of one request.

    Args:
        kind: "chat" or "completion".
        identity: id, time and model of the response.
        tokenizer: the model's tokenizer.
        mode: what a client gets of thoughts.
    """

    def __init__(
        self, kind: str, identity: dict[str, Any], tokenizer: Any, mode: ThoughtsMode
    ) -> None:
        self._chat = kind == "chat"
        self._identity, self._tokenizer = identity, tokenizer
        self._mode: ThoughtsMode = mode
        self._texts: dict[int, str] = {}

    def whole(self, generation: Generation, choices: Sequence[dict[str, Any]]) -> dict[str, Any]:
        """Return the body of a response that is not streamed."""
        object_name = "chat.completion" if self._chat else "text_completion"
        return {
            **self._identity, "object": object_name, "choices": list(choices),
            "usage": generation.usage.body(),
        }  # fmt: skip

    def choice(
        self, index: int, text: CompletionText, *, log_probs: bool, prompt: "Echo | None" = None
    ) -> dict[str, Any]:
        """Return one choice of a response that is not streamed."""
        reasoning = shown_reasoning(self._mode, text)
        found: dict[str, Any] = {
            "index": index,
            "finish_reason": finish_reason(text),
            "logprobs": None,
        }
        if log_probs:
            unseen = bool(text.token_ids) and not text.log_probs
            found["logprobs"] = self.log_probs(text.log_probs, prompt, unseen=unseen)
        if self._chat:
            message: dict[str, Any] = {
                "role": "assistant",
                "content": text.content,
                "refusal": None,
            }
            if reasoning is not None:
                message["reasoning_content"] = reasoning
            if text.hidden and self._mode == "shown":
                message["hidden_thoughts"] = [asdict(one) for one in text.hidden]
            return {**found, "message": message}
        found["text"] = (prompt.text if prompt else "") + text.content
        if reasoning is not None:
            found["reasoning_content"] = reasoning
        if text.hidden and self._mode == "shown":
            found["hidden_thoughts"] = [asdict(one) for one in text.hidden]
        return found

    def chunk(
        self,
        index: int,
        piece: Piece,
        *,
        log_probs: bool,
        finish: str | None = None,
        first: bool = False,
    ) -> dict[str, Any]:
        """Return a chunk of a streamed response."""
        reasoning = piece.reasoning if self._mode != "hidden" else ""
        found: dict[str, Any] = {
            "index": index,
            "finish_reason": finish,
            "logprobs": self.log_probs(piece.log_probs) if log_probs and piece.log_probs else None,
        }
        if self._chat:
            delta: dict[str, Any] = {"role": "assistant", "content": ""} if first else {}
            if piece.content:
                delta["content"] = piece.content
            if reasoning:
                delta["reasoning_content"] = reasoning
            if piece.hidden and self._mode == "shown":
                delta["hidden_thoughts"] = [asdict(one) for one in piece.hidden]
            return self._chunk([{**found, "delta": delta}])
        found["text"] = piece.content
        if reasoning:
            found["reasoning_content"] = reasoning
        if piece.hidden and self._mode == "shown":
            found["hidden_thoughts"] = [asdict(one) for one in piece.hidden]
        return self._chunk([found])

    def usage_chunk(self, generation: Generation) -> dict[str, Any]:
        """Return the last chunk, with the number of tokens."""
        return {**self._chunk([]), "usage": generation.usage.body()}

    def _chunk(self, choices: list[dict[str, Any]]) -> dict[str, Any]:
        object_name = "chat.completion.chunk" if self._chat else "text_completion"
        return {**self._identity, "object": object_name, "choices": choices}

    def log_probs(
        self,
        found: Sequence[tuple[LogProb, int]],
        prompt: "Echo | None" = None,
        *,
        unseen: bool = False,
    ) -> dict[str, Any]:
        """Return log-probabilities of tokens.

        Args:
            found: log-probabilities of the tokens, and where they start.
            prompt: the prompt, if it is a part of the response.
            unseen: the completion has tokens, and none of them is shown. After a prompt, there is
                one entry without a value for them, because clients that measure prompts, such as
                lm-evaluation-harness, take the last entry for that of the new token.
        """
        if self._chat:
            return {"content": [self._token(one) for one, _ in found], "refusal": None}
        shift = len(prompt.text) if prompt else 0
        shifted = [(one, at + shift) for one, at in found]
        first = prompt.tokens if prompt else []
        every = [*first, *shifted]
        body: dict[str, list[Any]] = {
            "tokens": [self._text(one.token) for one, _ in every],
            # The first token of a prompt has no log-probability.
            "token_logprobs": [None if prompt and at == 0 else one.value for at, (one, _) in enumerate(every)],
            "top_logprobs": [
                None if prompt and at == 0
                else {self._text(token): value for token, value in reversed(one.top)}
                for at, (one, _) in enumerate(every)
            ],
            "text_offset": [at for _, at in every],
        }  # fmt: skip
        if prompt and unseen:
            values = {
                "tokens": "",
                "token_logprobs": None,
                "top_logprobs": None,
                "text_offset": shift,
            }
            for name, value in values.items():
                body[name].append(value)
        return body

    def _token(self, one: LogProb) -> dict[str, Any]:
        """Return a token of a chat completion."""
        top = [self._entry(token, value) for token, value in one.top]
        return {**self._entry(one.token, one.value), "top_logprobs": top}

    def _entry(self, token: int, value: float) -> dict[str, Any]:
        text = self._text(token)
        part = UNFINISHED in text  # the bytes of a part of a character are not those of its text
        own = None if part else list(text.encode("utf-8", "replace"))
        return {"token": text, "logprob": value, "bytes": own}

    def _text(self, token: int) -> str:
        """Return the text that a token has after another one.

        SentencePiece tokenizers leave out the space before the first token of a text.
        """
        if token not in self._texts:
            alone = completion_text(self._tokenizer, [token], ())
            twice = completion_text(self._tokenizer, [token, token], ())
            self._texts[token] = twice[len(alone) :]
        return self._texts[token]


class Echo:
    """A prompt that is sent back before its completion.

    Args:
        ids: token ids of the prompt.
        log_probs: log-probabilities of the tokens from the second on.
        tokenizer: the model's tokenizer.
    """

    def __init__(self, ids: Sequence[int], log_probs: Sequence[LogProb], tokenizer: Any) -> None:
        self.text = completion_text(tokenizer, ids, ())
        words = Detokenizer(tokenizer, ())
        starts, length = [], 0
        for token in ids:
            starts.append(length)
            length += len(words.add(token))
        every = [LogProb(ids[0], 0.0), *log_probs]
        self.tokens = list(zip(every, starts, strict=False))
