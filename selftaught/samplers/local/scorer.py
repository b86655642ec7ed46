"""How likely completions are to a model: the log-probability of every token of every candidate.

What prompts share, as few-shot prompts do, is computed once, and so is the rest of each prompt,
which its candidates then begin with. Candidates are computed together with others of about their
length. Models that `shared_prefix` cannot serve read prompt and candidate as one text, texts of one
length at a time, so that nothing is padded.

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
    check_vocabulary,
    fingerprint,
    free_memory,
    opened,
)
from selftaught.samplers.local.prefix_loop import (
    Prefix,
    SharedPrefixLoop,
    Slots,
    plan,
    shared_prefix_loop,
    two_part,
)
from selftaught.samplers.tokens import prompt_tokens

logger = logging.getLogger(__name__)

TOGETHER = {"cpu": 512}
"""Candidate tokens computed at a time, 8192 on other devices; each has as many logits as the
vocabulary has tokens. A CPU is as fast with few, and fewer candidates at a time are padded less."""
STORED = 32768
"""Tokens whose keys are stored at a time, those of prompts and those of candidates."""
SORTED = 8
"""Candidates are sorted by length within so many batches of them: more pads less, and keeps the
keys of more prompts."""

Rows = list[tuple[int, ...]]


@dataclass(frozen=True)
class _Candidate:
    """Tokens to be scored after a prompt, given by number."""

    prompt: int
    tokens: tuple[int, ...]


Finished = Callable[[_Candidate, list[float]], None]


class TransformersScorer(Closing):
    """A causal language model as a judge of completions.

    Args:
        model: a model folder, a name on the Hugging Face hub, or a loaded model of transformers.
        batch_size: candidates computed at the same time.
        dtype: of the weights; "auto" is how they were saved.
        device: "auto" is the GPU where there is one.
        tokenizer: needed with a loaded model, read from the folder otherwise.

    Raises:
        ValueError: the folder has no model or no tokenizer.
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
                f"Expected a model of transformers, got {type(loaded.model).__name__}; score with "
                "its base, or with a model that is saved in a folder."
            )
        self.model, self.tokenizer = loaded.name, loaded.tokenizer
        self._model, self._context = loaded.model, loaded.context
        self._loop: SharedPrefixLoop | None = None
        self._tried = False

    @cached_property
    def fingerprint(self) -> str:
        """A hash of the weights: a model trained again keeps its folder but not this."""
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
        """The natural logarithm of every token's probability, as `[prompt][candidate][token]`.

        Args:
            completions: for every prompt its candidates, each the ids of its tokens. A token's
                probability is that after the prompt and the candidate's tokens before it.
            options: variables of the chat template (`chat_template_kwargs`), for messages.
            progress: called with the number of candidates that have just been scored.

        Raises:
            ValueError: a prompt and a candidate do not fit the model's context, a prompt is empty,
                or a token is none of the model's; says which.
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
                one = _Candidate(number_of[text], tuple(tokens))
                places.setdefault(one, []).append((at, place))
        scores: list[list[list[float]]] = [[[] for _ in candidates] for candidates in completions]

        def finished(one: _Candidate, score: list[float]) -> None:
            for at, place in places[one]:
                scores[at][place] = list(score)
            if progress is not None:
                progress(len(places[one]))

        for one in [one for one in places if not one.tokens]:
            finished(one, [])
        self._score(rows, [one for one in places if one.tokens], finished)
        return scores

    def _tokens(
        self,
        at: int,
        prompt: Text,
        candidates: Sequence[Sequence[int]],
        options: TemplateOptions | None,
    ) -> tuple[int, ...]:
        """The prompt as the model reads it, with room for its longest candidate."""
        ids = prompt_tokens(self.tokenizer, prompt, self.model, f"at index {at}", options)
        check_vocabulary(self._model, candidates)
        longest = max(map(len, candidates), default=0)
        if self._context is not None and len(ids) + longest > self._context:
            raise ValueError(
                f"The prompt at index {at} has {len(ids)} tokens and its longest candidate "
                f"{longest}; together that is more than the {self._context} that {self.model} can "
                "read. Use fewer worked examples or shorter candidates."
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
        """The shared-prefix loop if it gives this model's own logits on a prompt."""
        group = plan(rows, self._batch_size, 1)[0]
        loop = shared_prefix_loop(self._model, rows[group.numbers[0]], group.shared)
        if isinstance(loop, SharedPrefixLoop):
            return loop
        logger.warning(
            "%s reads every prompt anew for each of its candidates, which is slower: they cannot "
            "share it because %s.",
            self.model,
            loop,
        )
        return None

    def close(self) -> None:
        """Give the memory back."""
        self._loop = None
        self.__dict__.pop("_model", None)
        free_memory()


@dataclass(frozen=True)
class _Kept:
    """Prompts whose keys are stored, all but each one's last token, for their candidates."""

    loop: SharedPrefixLoop
    prefix: Prefix
    own: dict[int, tuple[int, ...]]
    """What each prompt has beside the prefix, shortest first."""
    slots: Slots
    """A row for each prompt, in the same order."""

    @classmethod
    def of(cls, loop: SharedPrefixLoop, prefix: Prefix, own: dict[int, tuple[int, ...]]) -> "_Kept":
        """Compute and store the keys."""
        # The last token of a prompt is read with each candidate, whose first it predicts.
        before = [tokens[:-1] for tokens in own.values()]
        slots = loop.slots(len(own), len(before[-1]))
        loop.prefill(slots, prefix, 0, before)
        return cls(loop, prefix, own, slots)

    @property
    def longest(self) -> int:
        """The most tokens stored for a prompt."""
        return max(map(len, self.own.values())) - 1


def _score_shared(
    loop: SharedPrefixLoop,
    rows: Rows,
    candidates: Sequence[_Candidate],
    finished: Finished,
    batch_size: int,
) -> None:
    """Score candidates of prompts that share what they begin with."""
    of_prompt: dict[int, list[_Candidate]] = {}
    for one in candidates:
        of_prompt.setdefault(one.prompt, []).append(one)
    asked = list(of_prompt)
    for group in plan([rows[number] for number in asked], batch_size, 1):
        numbers = sorted((asked[at] for at in group.numbers), key=lambda number: len(rows[number]))
        prefix = loop.prefix(rows[numbers[0]][: group.shared])
        own = {number: rows[number][group.shared :] for number in numbers}
        counts = {number: len(of_prompt[number]) for number in numbers}
        for part in _parts(own, counts, SORTED * batch_size):
            kept = _Kept.of(loop, prefix, {number: own[number] for number in part})
            some = [one for number in part for one in of_prompt[number]]
            some.sort(key=lambda one: len(one.tokens))
            for batch in _batches(some, batch_size, kept.longest, _together(loop.device)):
                for one, score in zip(batch, _scores(kept, batch), strict=True):
                    finished(one, score)


def _together(device: torch.device) -> int:
    return TOGETHER.get(device.type, 8192)


def _parts(
    own: dict[int, tuple[int, ...]], count: dict[int, int], most: int
) -> Iterator[list[int]]:
    """Prompts, given shortest first, as many at a time as have so many candidates."""
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
    """Candidates, given shortest first, as many at a time as there is room for."""
    batch: list[_Candidate] = []
    for one in candidates:
        rows, length = len(batch) + 1, len(one.tokens)
        full = rows > batch_size or rows * length > together or rows * (before + length) > STORED
        if batch and full:
            yield batch
            batch = []
        batch.append(one)
    yield batch


def _scores(kept: _Kept, batch: Sequence[_Candidate]) -> list[list[float]]:
    """The log-probabilities of candidates, given shortest first, of prompts that are kept."""
    row_of = {number: row for row, number in enumerate(kept.own)}
    before = [len(kept.own[one.prompt]) - 1 for one in batch]
    length = len(batch[-1].tokens)
    padded = [
        (kept.own[one.prompt][-1:] + one.tokens[:-1] + (0,) * length)[:length] for one in batch
    ]
    device = kept.loop.device
    token_BT = torch.tensor(padded, device=device)
    position_BT = torch.tensor(before, device=device)[:, None] + torch.arange(length, device=device)
    slots = kept.slots.picked(
        [row_of[one.prompt] for one in batch], max(before), max(before) + length
    )
    scores: list[list[float]] = [[] for _ in batch]
    wide = _together(device) // len(batch)  # less than the length only where a candidate is alone
    for start in range(0, length, wide):
        some = slice(start, start + wide)
        stored = int(position_BT[:, some].max()) + 1
        logits_BTV = kept.loop.forward(
            slots, kept.prefix, 0, token_BT[:, some], position_BT[:, some], stored, head=True
        )
        for logits_TV, one, score in zip(logits_BTV, batch, scores, strict=True):
            score += _chosen(logits_TV, one.tokens[some])
    return scores


def _chosen(logits_TV: Tensor, tokens: Sequence[int]) -> list[float]:
    """The log-probability of each token, given the logits of its place and perhaps of more."""
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
    """Score each candidate with its prompt as one text, texts of one length at a time."""

    def lengths(one: _Candidate) -> tuple[int, int]:
        return len(rows[one.prompt]), len(one.tokens)

    for (before, length), same in groupby(sorted(candidates, key=lengths), key=lengths):
        together = list(same)
        size = max(1, min(batch_size, _together(model.device) // (before + length)))
        for start in range(0, len(together), size):
            batch = together[start : start + size]
            texts = [rows[one.prompt] + one.tokens[:-1] for one in batch]
            logits_BCV = _last_logits(model, torch.tensor(texts, device=model.device), length)
            for logits_CV, one in zip(logits_BCV, batch, strict=True):
                finished(one, _chosen(logits_CV, one.tokens))


def _last_logits(model: PreTrainedModel, token_BT: Tensor, count: int) -> Tensor:
    """The logits at the last places of texts of one length; no others where the model allows it."""
    sparing = "logits_to_keep" in inspect.signature(model.forward).parameters
    options = {"logits_to_keep": count} if sparing else {}
    return model(token_BT, use_cache=False, **options).logits[:, -count:]
