"""The texts of thoughts at the positions of texts, stored in a file that can be continued.

The file starts with a header that names what it was made from. Each further line has the thoughts
of one span, so that an interrupted run continues after the last complete line.
"""

import hashlib
import json
import os
import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from selftaught.quiet.evaluation import predictions
from selftaught.quiet.fingerprints import fingerprint
from selftaught.quiet.gating import ThoughtParams
from selftaught.quiet.generation import generate
from selftaught.quiet.thought_ends import content_lengths
from selftaught.quiet.where import matcher_of, resolved

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

    from selftaught.quiet.model import QuietLM

FORMAT = "selftaught thoughts 1"
BEFORE = 48
"""Number of tokens of text before a thought that are stored with it."""


@dataclass(frozen=True)
class SpanThoughts:
    """The thoughts at positions of one span of a text."""

    text: int
    """Number of the text."""
    span: int
    """Number of the span, over all texts."""
    positions: list[int]
    """Position after which each thought stands, counted in tokens of the span from 0."""
    before: list[str]
    """Text before each thought."""
    thoughts: list[str]
    prompt: str = ""
    """Prompt of the completion."""
    completion: str | None = None
    """Continuation of the first half of the span. None: none was generated."""


def thoughts_in(
    model: "QuietLM",
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    how: ThoughtParams,
    positions: int | None = None,
) -> tuple[list[int], list[str]]:
    """Return positions of a text, and the text of every thought at them, as in generation.

    Args:
        model: a Quiet-STaR model.
        tokenizer: its tokenizer.
        ids: token ids of the text.
        how: how the model thinks. Positions without a thought are left out.
        positions: maximum number of positions, drawn at random. None means all.
    """
    how = replace(how, think_when=replace(how.think_when, tokenizer=tokenizer))
    matcher = matcher_of(how.think_when, model.quiet_config)
    matches = [True] * len(ids) if matcher is None else matcher.mask(ids)
    chosen = [at for at in range(len(ids) - 1) if matches[at]]
    if resolved(how.think_when, model.quiet_config).rule == "never" or not chosen:
        return [], []
    if positions is not None and positions < len(chosen):
        chosen = sorted(random.Random(how.seed).sample(chosen, positions))
    ids_1T = torch.tensor([list(ids)], device=model.base.device)
    position_1J = torch.tensor([chosen], device=model.base.device)
    places: list[int] = []
    texts: list[str] = []
    for position_BJ, at in predictions(model, ids_1T, None, how, position_1J):
        length_NJ = content_lengths(at.thought_BNJS[0], model.marks.end)
        for column, position in enumerate(position_BJ[0].tolist()):
            if not bool(at.thinks_BJ[0, column]):
                continue
            for number in range(how.thoughts):
                thought = at.thought_BNJS[0, number, column, : int(length_NJ[number, column])]
                places.append(position)
                texts.append(_text(tokenizer, thought.tolist()))
    return places, texts


def completed(
    model: "QuietLM",
    tokenizer: "PreTrainedTokenizerBase",
    ids: Sequence[int],
    how: ThoughtParams,
    new_tokens: int,
) -> str:
    """Return a greedy continuation of a text, with thoughts.

    Args:
        model: a Quiet-STaR model.
        tokenizer: its tokenizer.
        ids: token ids of the prompt.
        how: how the model thinks.
        new_tokens: maximum number of new tokens.
    """
    ids_1T = torch.tensor([list(ids)], device=model.base.device)
    whole = generate(
        model, ids_1T, torch.ones_like(ids_1T), max_new_tokens=new_tokens, do_sample=False,
        thoughts=how.thoughts, thought_temperature=how.temperature, seed=how.seed,
        think_when=replace(how.think_when, tokenizer=tokenizer), tokenizer=tokenizer,
    )  # fmt: skip
    return str(tokenizer.decode(whole[0, len(ids) :], skip_special_tokens=True))


def collect_thoughts(
    model: "QuietLM",
    tokenizer: "PreTrainedTokenizerBase",
    spans: Sequence[tuple[int, Sequence[int]]],
    how: ThoughtParams,
    store: Path,
    *,
    positions: int | None = None,
    new_tokens: int = 0,
    progress: Callable[[int], object] | None = None,
) -> Iterator[SpanThoughts]:
    """Yield the thoughts of spans, from a file as far as it has them, and append the others to it.

    Args:
        model: a Quiet-STaR model.
        tokenizer: its tokenizer.
        spans: spans as (number of the text, token ids).
        how: how the model thinks. Every span has a random seed of its own.
        store: the file. One that was made from another model, other texts or other options is
            written anew.
        positions: maximum number of positions per span. None means all.
        new_tokens: number of new tokens of a completion of the first span of every text. 0: none.
        progress: called with the number of spans, also for those that were read.
    """
    made_from = _made_from(model, spans, how, positions, new_tokens)
    count, end = 0, _end_of_header(store, made_from)
    with store.open("r+b" if end else "w+b") as file:
        if not end:
            header = json.dumps({"format": FORMAT, "made_from": made_from})
            file.write(header.encode() + b"\n")
            end = file.tell()
        file.seek(end)
        while (line := file.readline()).endswith(b"\n"):
            yield SpanThoughts(**json.loads(line))
            count, end = count + 1, file.tell()
            if progress:
                progress(1)
        file.seek(end)
        file.truncate()
        for number in range(count, len(spans)):
            found = _thoughts_of(model, tokenizer, spans, number, how, positions, new_tokens)
            file.write(json.dumps(asdict(found)).encode() + b"\n")
            file.flush()
            yield found
            if progress:
                progress(1)
        os.fsync(file.fileno())


def _thoughts_of(
    model: "QuietLM",
    tokenizer: "PreTrainedTokenizerBase",
    spans: Sequence[tuple[int, Sequence[int]]],
    number: int,
    how: ThoughtParams,
    positions: int | None,
    new_tokens: int,
) -> SpanThoughts:
    text, ids = spans[number]
    how = replace(how, seed=how.seed + number)
    places, thoughts = thoughts_in(model, tokenizer, ids, how, positions)
    before = [_text(tokenizer, list(ids[max(0, at + 1 - BEFORE) : at + 1])) for at in places]
    found = SpanThoughts(text, number, places, before, thoughts)
    if not new_tokens or (number and spans[number - 1][0] == text):
        return found
    prompt = list(ids[: max(1, len(ids) // 2)])
    written = completed(model, tokenizer, prompt, how, new_tokens)
    return replace(found, prompt=_text(tokenizer, prompt[-BEFORE:]), completion=written)


def _made_from(
    model: "QuietLM", spans: Sequence[tuple[int, Sequence[int]]], how: ThoughtParams,
    positions: int | None, new_tokens: int,
) -> str:  # fmt: skip
    """Return a hash of everything that the thoughts depend on."""
    when = how.think_when
    rule = [when.rule, when.threshold, when.pattern]
    whole: list[Any] = [
        fingerprint(model), asdict(model.quiet_config), how.thoughts, how.temperature, how.seed, rule,
        positions, new_tokens, [[text, list(ids)] for text, ids in spans],
    ]  # fmt: skip
    return hashlib.sha256(json.dumps(whole, default=str).encode()).hexdigest()[:16]


def _end_of_header(store: Path, made_from: str) -> int:
    """Return where the header of a file ends; 0 if the file was made from something else."""
    if not store.exists():
        return 0
    with store.open("rb") as file:
        line = file.readline()
        try:
            header = json.loads(line)
        except ValueError:
            return 0
        same = isinstance(header, dict) and header == {"format": FORMAT, "made_from": made_from}
        return file.tell() if same and line.endswith(b"\n") else 0


def _text(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))
