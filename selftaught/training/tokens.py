"""The tokens of a completion as a model is taught to write it."""

from collections.abc import Sequence
from typing import Any

from selftaught.records import Rollout

LONGEST_ENDING = 16
"""At most so many of a completion's last tokens are the stop string that ended it."""


def open_tokenizer(model: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def completion_ids(rollout: Rollout, tokenizer: Any) -> tuple[int, ...]:
    """The very tokens a rollout wrote, with the one end token that ended it.

    Where a stop string did, that is the tokenizer's end-of-text token; where the completion was cut by
    length, none. Tokens of another tokenizer, which do not read as the completion, are made anew from
    its text.
    """
    ids = written_ids(rollout, tokenizer)
    own = rollout.token_ids or ()
    if rollout.finish_reason == "length" or tokenizer.eos_token_id is None:
        return _anew(rollout, tokenizer) if ids is None else ids
    if ids is None:
        return (*_anew(rollout, tokenizer), tokenizer.eos_token_id)
    # A chat model ends a turn with a token of its own, which need not be the end of a text.
    ending = own[len(ids) : len(ids) + 1]
    silent = len(own) == len(ids) + 1 and not _read(tokenizer, ending)
    return (*ids, *ending) if silent else (*ids, tokenizer.eos_token_id)


def _anew(rollout: Rollout, tokenizer: Any) -> tuple[int, ...]:
    return tuple(tokenizer(rollout.completion, add_special_tokens=False)["input_ids"])


def _read(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(list(ids), skip_special_tokens=True, clean_up_tokenization_spaces=False)


def written_ids(rollout: Rollout, tokenizer: Any) -> tuple[int, ...] | None:
    """The tokens whose text is the completion, without what ended it; None where there are none."""
    ids = rollout.token_ids
    if ids is None or (ids and not 0 <= min(ids) <= max(ids) < len(tokenizer)):
        return None
    special = set(tokenizer.all_special_ids)
    for length in range(len(ids), max(-1, len(ids) - LONGEST_ENDING - 1), -1):
        ends = length and ids[length - 1] in special
        if not ends and _read(tokenizer, ids[:length]) == rollout.completion:
            return ids[:length]
    return None
