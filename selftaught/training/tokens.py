"""The tokens of a completion as a model is taught to write it."""

from typing import Any

from selftaught.records import Rollout

LONGEST_ENDING = 16
"""At most so many of a completion's last tokens are the stop string that ended it."""


def open_tokenizer(model: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(model)


def completion_ids(rollout: Rollout, tokenizer: Any) -> tuple[int, ...]:
    """The very tokens a rollout wrote, with an end-of-text token in place of what ended it.

    None is added where the completion was cut by length. Tokens of another tokenizer, which do not
    read as the completion, are made anew from its text.
    """
    ids = written_ids(rollout, tokenizer)
    if ids is None:
        ids = tuple(tokenizer(rollout.completion, add_special_tokens=False)["input_ids"])
    if rollout.finish_reason == "length" or tokenizer.eos_token_id is None:
        return ids
    return (*ids, tokenizer.eos_token_id)


def written_ids(rollout: Rollout, tokenizer: Any) -> tuple[int, ...] | None:
    """The tokens whose text is the completion, without what ended it; None where there are none."""
    ids = rollout.token_ids
    if ids is None or any(not 0 <= one < len(tokenizer) for one in ids):
        return None
    for length in range(len(ids), max(-1, len(ids) - LONGEST_ENDING - 1), -1):
        text = tokenizer.decode(
            list(ids[:length]), skip_special_tokens=True, clean_up_tokenization_spaces=False
        )
        special = ids[length - 1] in tokenizer.all_special_ids if length else False
        if text == rollout.completion and not special:
            return ids[:length]
    return None
