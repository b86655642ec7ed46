"""The tokens of a completion as a model is taught to write it."""

from collections.abc import Sequence
from typing import Any

from selftaught.hub import check_model_name
from selftaught.records import Message, Rollout, Text
from selftaught.rendering import (
    TemplateOptions,
    continuing_ids,
    end_ids,
    opens_thought,
    prompt_ids,
    prompt_text,
    silent_ids,
    turn_ending,
)
from selftaught.thought_marks import THINK

LONGEST_ENDING = 16
"""At most so many of a completion's last tokens are the stop string that ended it."""


def open_tokenizer(model: str) -> Any:
    """The tokenizer of a model."""
    from transformers import AutoTokenizer

    check_model_name(model)
    return AutoTokenizer.from_pretrained(model)


def completion_ids(rollout: Rollout, tokenizer: Any) -> tuple[int, ...]:
    """The very tokens a rollout wrote, with the one end token that ended it.

    Where a stop string did, that is the token that ends a text or a turn; where the completion was cut
    by length, none. Tokens of another tokenizer, which do not read as the completion, are made anew
    from its text.
    """
    own = rollout.token_ids or ()
    ids = written_ids(rollout, tokenizer)
    if rollout.finish_reason == "length" or tokenizer.eos_token_id is None:
        return tuple(continuing_ids(tokenizer, rollout.completion)) if ids is None else ids
    if ids is None:
        ids, own = tuple(continuing_ids(tokenizer, rollout.completion)), ()
    return ended_ids(ids, own, rollout.prompt, tokenizer)


def written_ids(rollout: Rollout, tokenizer: Any) -> tuple[int, ...] | None:
    """The tokens whose text is the completion, without what ended it; None where there are none."""
    return ids_of_text(rollout.completion, rollout.token_ids, tokenizer)


def ids_of_text(text: str, ids: Sequence[int] | None, tokenizer: Any) -> tuple[int, ...] | None:
    """Return the sampled tokens that read as the text, without what ended them.

    Args:
        ids: the tokens that were sampled; the last may be an end token or a stop string.

    Returns:
        None where there are no tokens, or they do not read as the text to this tokenizer: then
        another tokenizer wrote them. Texts of stores that were made when special tokens were left
        out of a completion's text are read too.
    """
    if ids is None or (ids and not 0 <= min(ids) <= max(ids) < len(tokenizer)):
        return None
    ids = tuple(ids)
    silent = silent_ids(tokenizer)
    lengths = range(len(ids), max(-1, len(ids) - LONGEST_ENDING - 1), -1)
    for length in lengths:
        ends = length and ids[length - 1] in silent
        if not ends and _read(tokenizer, ids[:length], special=True) == text:
            return ids[:length]
    for length in lengths[1:]:
        # A stop string may begin inside a token, such as ".\n\n": what of that token is text is
        # tokenized by itself, and all tokens before it stay as sampled.
        before = _read(tokenizer, ids[:length], special=True)
        cut = length > 0 and text.startswith(before) and len(before) < len(text)
        if cut and _read(tokenizer, ids[: length + 1], special=True).startswith(text):
            return (*ids[:length], *continuing_ids(tokenizer, text[len(before) :]))
    special = set(tokenizer.all_special_ids)
    if not special & set(ids[:-1]):
        return None  # without special tokens inside, the texts of old stores are the same
    for length in lengths:
        ends = length and ids[length - 1] in special
        if not ends and _read(tokenizer, ids[:length], special=False) == text:
            return ids[:length]
    return None


def ended_ids(
    written: tuple[int, ...],
    sampled: Sequence[int],
    prompt: Text,
    tokenizer: Any,
    options: TemplateOptions | None = None,
) -> tuple[int, ...]:
    """Return the tokens of a completion with what ends it.

    That is the end token that was sampled after them, if one was; otherwise a stop string ended them,
    or no tokens are known, and it is what ends an answer to the prompt: of messages, what the chat
    template writes; of text, the end-of-text token.
    """
    ending = tuple(sampled[len(written) : len(written) + 1])
    # A chat model ends a turn with a token of its own, which need not be the end of a text.
    if len(sampled) == len(written) + 1 and ending[0] in end_ids(tokenizer):
        return (*written, *ending)
    if isinstance(prompt, str):
        return (*written, end_token(tokenizer))
    return (*written, *turn_ending(tokenizer, prompt, options))


def taught_ids(
    prompt: Text,
    completion: Text,
    sampled: Sequence[int] | None,
    tokenizer: Any,
    options: TemplateOptions | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Return the tokens of a prompt, those to learn after it, and whether these were sampled.

    They are the tokens that were sampled wherever those read as the completion. Otherwise the text is
    tokenized as it is: a chat template only writes the prompt and the ending, never the completion,
    which it might change.

    Raises:
        ValueError: one of prompt and completion is text and the other messages.
    """
    head = prompt_ids(tokenizer, prompt, options)
    if isinstance(completion, list) and not isinstance(prompt, str):
        if [one["role"] for one in completion] != ["assistant"]:
            return head, _turns(prompt, completion, head, tokenizer, options), False
        text = completion[0]["content"]
    elif isinstance(completion, str) and isinstance(prompt, str):
        text = completion
    else:
        raise ValueError("Expected prompt and completion both as text or both as messages.")
    written = ids_of_text(text, sampled, tokenizer)
    if written is not None:
        return head, ended_ids(written, sampled or (), prompt, tokenizer, options), True
    if isinstance(prompt, str):
        whole = prompt_ids(tokenizer, prompt + text)
        if whole[: len(head)] == head:
            return head, (*whole[len(head) :], end_token(tokenizer)), False
    else:
        text = _without_opening(text, prompt, tokenizer, options)
    # The border falls inside a token, or the prompt is messages: the prompt stays as sampled.
    fresh = tuple(continuing_ids(tokenizer, text))
    return head, ended_ids(fresh, (), prompt, tokenizer, options), False


def end_token(tokenizer: Any) -> int:
    """The token that ends a completion.

    Raises:
        ValueError: the tokenizer has none.
    """
    if tokenizer.eos_token_id is None:
        raise ValueError(
            "The tokenizer has no end-of-text token (eos_token), which ends a rationale."
        )
    return tokenizer.eos_token_id


def _turns(
    prompt: list[Message],
    completion: list[Message],
    head: Sequence[int],
    tokenizer: Any,
    options: TemplateOptions | None,
) -> tuple[int, ...]:
    """Return the tokens of several messages after a prompt, as the template writes them."""
    text = tokenizer.apply_chat_template(prompt + completion, tokenize=False, **(options or {}))
    whole = tokenizer(text, add_special_tokens=False)["input_ids"]
    if tuple(whole[: len(head)]) != tuple(head):
        raise ValueError(
            "The model's chat template changes the prompt once several messages follow it, so the "
            "loss cannot be kept to these. Give each assistant message a row of its own."
        )
    return tuple(whole[len(head) :])


def _without_opening(
    text: str, prompt: list[Message], tokenizer: Any, options: TemplateOptions | None
) -> str:
    """Return the text without the mark that opens its thought, where the prompt writes it already.

    Servers that return the reasoning apart do not tell whether the template opened it.
    """
    begin = THINK[0]
    if not text.lstrip().startswith(begin) or not opens_thought(tokenizer, prompt, THINK, options):
        return text
    asked = prompt_text(tokenizer, prompt, options)
    space = asked[len(asked.rstrip()) :]
    return text.lstrip()[len(begin) :].removeprefix(space)


def _read(tokenizer: Any, ids: Sequence[int], *, special: bool) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
