"""Log-probabilities of completions: one value for every token of every candidate.

The keys and values of tokens that prompts share, such as few-shot examples, are computed once, and
so is the rest of each prompt, which its candidates share. Candidates of similar length are computed
together. Models that `prefix_loop` does not support process prompt and candidate as one text, with
texts of equal length in a batch, so that there is no padding.

Shapes: B rows, T tokens of a row, C tokens of a candidate, V vocabulary.
"""

import inspect
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import groupby
from pathlib import Path
from typing import Literal

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from selftaught.records import Text
from selftaught.rendering import TemplateOptions
from selftaught.samplers.base import Closing
from selftaught.samplers.local.model_loading import (
    fingerprint,
    free_memory,
    opened,
    vocabulary_size,
)
from selftaught.samplers.local.prefix_loop import (
    Prefix,
    SharedPrefixLoop,
    Slots,
    plan,
    shared_prefix_loop,
    two_part,
)
from selftaught.samplers.tokens import check_vocabulary, prompt_tokens

logger = logging.getLogger(__name__)

TOGETHER = {"cpu": 512}
"""Maximum number of candidate tokens computed at a time; 8192 on other devices.

It limits the memory for logits. A CPU is as fast with few tokens, which need less padding.
"""
STORED = 32768
"""Maximum number of tokens whose keys are stored at a time, for prompts and for candidates."""
SORTED = 8
"""Number of batches within which candidates are sorted by length.

A larger number gives less padding but stores the keys of more prompts.
"""

Rows = list[tuple[int, ...]]


@dataclass(frozen=True)
class _Candidate:
    """Tokens to score after a prompt, which is given by its index."""

    prompt: int
    tokens: tuple[int, ...]


Finished = Callable[[_Candidate, list[float]], None]


class TransformersScorer(Closing):
    """Computes log-probabilities of completions under a causal language model.

    Args:
        model: A model folder, a name on the Hugging Face Hub, or a loaded transformers model.
        batch_size: Number of candidates computed at the same time.
        dtype: Data type of the weights; "auto" is the type in which they were saved.
        device: Name of a device; "auto" is the GPU if there is one.
        tokenizer: Required with a loaded model; otherwise loaded from the folder.

    Raises:
        ValueError: The folder has no model or no tokenizer.
    """

    def __init__(
        self,
        model: str | Path | PreTrainedModel,
        *,
        batch_size: int = 64,
        dtype: Literal["auto", "float32", "bfloat16"] = "auto",
        device: str = "auto",
        tokenizer: PreTrainedTokenizerBase | None = None,
    ) -> None:
        if batch_size < 1:
            raise ValueError(f"batch_size must be at least 1; got {batch_size}.")
        self._batch_size = batch_size
        loaded = opened(model, tokenizer, dtype, device)
        if not isinstance(loaded.model, PreTrainedModel):
            raise ValueError(
                f"Expected a transformers model, got {type(loaded.model).__name__}. Score with its "
                "base model, or with a model that is saved in a folder."
            )
        self.model, self.tokenizer = loaded.name, loaded.tokenizer
        self._model, self._context = loaded.model, loaded.context
        self._loop: SharedPrefixLoop | None = None
        self._tried = False

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights. It changes when a model is trained again into the same folder."""
        return fingerprint(self._model)

    @torch.inference_mode()
    def log_probs(
        self,
        prompts: Sequence[Text],
        completions: Sequence[Sequence[Sequence[int]]],
        *,
        options: TemplateOptions | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> list[list[list[float]]]:
        """Return the log-probability of every token of every candidate.

        A token's probability is conditional on the prompt and the candidate's tokens before it.

        Args:
            prompts: Texts or messages.
            completions: For every prompt, its candidates, each as token ids.
            options: Variables of the chat template (`chat_template_kwargs`). Used only for
                messages.
            progress: Called with the number of candidates just scored.

        Returns:
            Natural logarithms of probabilities, as `[prompt][candidate][token]`.

        Raises:
            ValueError: A prompt with a candidate exceeds the model's context, a prompt is empty,
                or a token is not in the vocabulary.
        """
        if len(prompts) != len(completions):
            raise ValueError(
                f"Expected one list of candidates per prompt, got {len(completions)} for "
                f"{len(prompts)}."
            )
        pairs = zip(prompts, completions, strict=True)
        texts = [self._tokens(at, *pair, options) for at, pair in enumerate(pairs)]
        rows = list(dict.fromkeys(texts))
        number_of = {row: number for number, row in enumerate(rows)}
        places: dict[_Candidate, list[tuple[int, int]]] = {}
        for at, (text, candidates) in enumerate(zip(texts, completions, strict=True)):
            for place, tokens in enumerate(candidates):
                candidate = _Candidate(number_of[text], tuple(tokens))
                places.setdefault(candidate, []).append((at, place))
        scores: list[list[list[float]]] = [[[] for _ in candidates] for candidates in completions]

        def finished(candidate: _Candidate, score: list[float]) -> None:
            for at, place in places[candidate]:
                scores[at][place] = list(score)
            if progress is not None:
                progress(len(places[candidate]))

        for candidate in [candidate for candidate in places if not candidate.tokens]:
            finished(candidate, [])
        self._score(rows, [candidate for candidate in places if candidate.tokens], finished)
        return scores

    def _tokens(
        self,
        at: int,
        prompt: Text,
        candidates: Sequence[Sequence[int]],
        options: TemplateOptions | None,
    ) -> tuple[int, ...]:
        """Return the token ids of a prompt after checking that its candidates fit the context."""
        ids = prompt_tokens(self.tokenizer, prompt, self.model, f"at index {at}", options)
        check_vocabulary(candidates, vocabulary_size(self._model))
        longest = max(map(len, candidates), default=0)
        if self._context is not None and len(ids) + longest > self._context:
            raise ValueError(
                f"The prompt at index {at} has {len(ids)} tokens and its longest candidate "
                f"{longest}; together that is more than the {self._context} tokens in the context "
                f"of {self.model}. Use fewer worked examples or shorter candidates."
            )
        return ids

    def _score(self, rows: Rows, candidates: list[_Candidate], finished: Finished) -> None:
        if not candidates:
            return
        if not self._tried:
            self._loop, self._tried = self._open_loop(rows), True
        if self._loop is None:
            _score_plainly(self._model, rows, candidates, finished, self._batch_size)
        else:
            with two_part(self._model):
                _score_shared(self._loop, rows, candidates, finished, self._batch_size)

    def _open_loop(self, rows: Rows) -> SharedPrefixLoop | None:
        """Return the shared-prefix loop if it reproduces the model's logits, otherwise None."""
        group = plan(rows, self._batch_size, 1)[0]
        loop = shared_prefix_loop(self._model, rows[group.numbers[0]], group.shared)
        if isinstance(loop, SharedPrefixLoop):
            return loop
        logger.warning(
            "%s processes every prompt again for each of its candidates, which is slower: the "
            "shared-prefix loop does not support it because %s.",
            self.model,
            loop,
        )
        return None

    def close(self) -> None:
        """Free the memory of the model."""
        self._loop = None
        self.__dict__.pop("_model", None)
        free_memory()


@dataclass(frozen=True)
class _Kept:
    """Prompts with their stored keys and values, without each prompt's last token."""

    loop: SharedPrefixLoop
    prefix: Prefix
    own: dict[int, tuple[int, ...]]
    """Each prompt's tokens after the prefix, shortest first."""
    slots: Slots
    """One row for each prompt, in the same order."""

    @classmethod
    def of(cls, loop: SharedPrefixLoop, prefix: Prefix, own: dict[int, tuple[int, ...]]) -> "_Kept":
        """Compute and store the keys and values."""
        # The last token of a prompt is processed with each candidate, because it predicts its
        # first.
        before = [tokens[:-1] for tokens in own.values()]
        slots = loop.slots(len(own), len(before[-1]))
        loop.prefill(slots, prefix, 0, before)
        return cls(loop, prefix, own, slots)

    @property
    def longest(self) -> int:
        """Number of stored tokens of the longest prompt."""
        return max(map(len, self.own.values())) - 1


def _score_shared(
    loop: SharedPrefixLoop,
    rows: Rows,
    candidates: Sequence[_Candidate],
    finished: Finished,
    batch_size: int,
) -> None:
    """Score candidates with the shared-prefix loop."""
    of_prompt: dict[int, list[_Candidate]] = {}
    for candidate in candidates:
        of_prompt.setdefault(candidate.prompt, []).append(candidate)
    prompts = list(of_prompt)
    for group in plan([rows[number] for number in prompts], batch_size, 1):
        numbers = sorted(
            (prompts[at] for at in group.numbers), key=lambda number: len(rows[number])
        )
        prefix = loop.prefix(rows[numbers[0]][: group.shared])
        own = {number: rows[number][group.shared :] for number in numbers}
        counts = {number: len(of_prompt[number]) for number in numbers}
        for part in _parts(own, counts, SORTED * batch_size):
            kept = _Kept.of(loop, prefix, {number: own[number] for number in part})
            some = [candidate for number in part for candidate in of_prompt[number]]
            some.sort(key=lambda candidate: len(candidate.tokens))
            for batch in _batches(some, batch_size, kept.longest, _together(loop.device)):
                for candidate, score in zip(batch, _scores(kept, batch), strict=True):
                    finished(candidate, score)


def _together(device: torch.device) -> int:
    return TOGETHER.get(device.type, 8192)


def _parts(
    own: dict[int, tuple[int, ...]], count: dict[int, int], most: int
) -> Iterator[list[int]]:
    """Split prompts, given shortest first, so that each part has at most `most` candidates."""
    part: list[int] = []
    for number in own:
        candidates = sum(count[at] for at in part) + count[number]
        if part and (candidates > most or (len(part) + 1) * len(own[number]) > STORED):
            yield part
            part = []
        part.append(number)
    yield part


def _batches(
    candidates: Sequence[_Candidate], batch_size: int, before: int, together: int
) -> Iterator[list[_Candidate]]:
    """Split candidates, given shortest first, into batches within the limits on rows and tokens."""
    batch: list[_Candidate] = []
    for candidate in candidates:
        rows, length = len(batch) + 1, len(candidate.tokens)
        full = rows > batch_size or rows * length > together or rows * (before + length) > STORED
        if batch and full:
            yield batch
            batch = []
        batch.append(candidate)
    yield batch


def _scores(kept: _Kept, batch: Sequence[_Candidate]) -> list[list[float]]:
    """Return the log-probabilities of candidates, given shortest first, of prompts in `kept`."""
    row_of = {number: row for row, number in enumerate(kept.own)}
    before = [len(kept.own[candidate.prompt]) - 1 for candidate in batch]
    length = len(batch[-1].tokens)
    padded = [
        (kept.own[candidate.prompt][-1:] + candidate.tokens[:-1] + (0,) * length)[:length]
        for candidate in batch
    ]
    device = kept.loop.device
    token_BT = torch.tensor(padded, device=device)
    position_BT = torch.tensor(before, device=device)[:, None] + torch.arange(length, device=device)
    slots = kept.slots.picked(
        [row_of[candidate.prompt] for candidate in batch], max(before), max(before) + length
    )
    scores: list[list[float]] = [[] for _ in batch]
    width = _together(device) // len(batch)  # less than the length only for a single candidate
    for start in range(0, length, width):
        some = slice(start, start + width)
        stored = int(position_BT[:, some].max()) + 1
        logits_BTV = kept.loop.forward(
            slots, kept.prefix, 0, token_BT[:, some], position_BT[:, some], stored, head=True
        )
        for logits_TV, candidate, score in zip(logits_BTV, batch, scores, strict=True):
            score += _chosen(logits_TV, candidate.tokens[some])
    return scores


def _chosen(logits_TV: Tensor, tokens: Sequence[int]) -> list[float]:
    """Return the log-probability of each token; `logits_TV` may have further rows at the end."""
    token_C1 = torch.tensor(tokens, dtype=torch.long, device=logits_TV.device)[:, None]
    log_prob_CV = torch.log_softmax(logits_TV[: len(tokens)].float(), -1)
    return log_prob_CV.gather(1, token_C1)[:, 0].tolist()


def _score_plainly(
    model: PreTrainedModel,
    rows: Rows,
    candidates: Sequence[_Candidate],
    finished: Finished,
    batch_size: int,
) -> None:
    """Score each candidate together with its prompt, in batches of equal length."""

    def lengths(candidate: _Candidate) -> tuple[int, int]:
        return len(rows[candidate.prompt]), len(candidate.tokens)

    for (before, length), same in groupby(sorted(candidates, key=lengths), key=lengths):
        together = list(same)
        size = max(1, min(batch_size, _together(model.device) // (before + length)))
        for start in range(0, len(together), size):
            batch = together[start : start + size]
            texts = [rows[candidate.prompt] + candidate.tokens[:-1] for candidate in batch]
            logits_BCV = _last_logits(model, torch.tensor(texts, device=model.device), length)
            for logits_CV, candidate in zip(logits_BCV, batch, strict=True):
                finished(candidate, _chosen(logits_CV, candidate.tokens))


def _last_logits(model: PreTrainedModel, token_BT: Tensor, count: int) -> Tensor:
    """Return the logits at the last `count` positions of texts of equal length."""
    # Where the model supports it, the other logits are not computed, to save memory.
    supported = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": count} if supported else {}
    return model(token_BT, use_cache=False, **options).logits[:, -count:]
