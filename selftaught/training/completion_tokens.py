"""Token ids of completions, as training examples use them."""

from collections.abc import Sequence
from typing import TYPE_CHECKING

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

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

LONGEST_ENDING = 16
"""Maximum number of tokens at the end of a completion that can belong to its stop string."""


def open_tokenizer(model: str) -> "PreTrainedTokenizerBase":
    """Load the tokenizer of a model folder or of a model on the Hugging Face Hub."""
    from transformers import AutoTokenizer

    check_model_name(model)
    return AutoTokenizer.from_pretrained(model)


def completion_ids(rollout: Rollout, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...]:
    """Return the sampled token ids of a rollout, with one end token.

    After a stop string, the end token is the one that ends a text or a chat turn. A completion that
    was cut at the token limit has no end token. If the stored ids do not decode to the completion,
    because they are those of another tokenizer, the text is tokenized.
    """
    own = rollout.token_ids or ()
    ids = written_ids(rollout, tokenizer)
    if rollout.finish_reason == "length" or tokenizer.eos_token_id is None:
        return tuple(continuing_ids(tokenizer, rollout.completion)) if ids is None else ids
    if ids is None:
        ids, own = tuple(continuing_ids(tokenizer, rollout.completion)), ()
    return ended_ids(ids, own, rollout.prompt, tokenizer)


def written_ids(rollout: Rollout, tokenizer: "PreTrainedTokenizerBase") -> tuple[int, ...] | None:
    """Return the sampled token ids of a completion without its ending; see `ids_of_text`."""
    return ids_of_text(rollout.completion, rollout.token_ids, tokenizer)


def ids_of_text(
    text: str, ids: Sequence[int] | None, tokenizer: "PreTrainedTokenizerBase"
) -> tuple[int, ...] | None:
    """Return the sampled token ids that decode to a text, without the end token or stop string.

    Stores from earlier versions, which left special tokens out of a completion's text, are
    supported.

    Args:
        text: The completion's text.
        ids: The sampled token ids. The last may be an end token or a stop string.
        tokenizer: The model's tokenizer.

    Returns:
        The ids, or None if there are none or they do not decode to the text with this tokenizer. In
        that case they were sampled with another tokenizer.
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
        # A stop string may begin inside a token, such as ".\n\n". The part of that token that is
        # text is tokenized separately. All tokens before it stay as sampled.
        before = _read(tokenizer, ids[:length], special=True)
        cut = length > 0 and text.startswith(before) and len(before) < len(text)
        if cut and _read(tokenizer, ids[: length + 1], special=True).startswith(text):
            return (*ids[:length], *continuing_ids(tokenizer, text[len(before) :]))
    special = set(tokenizer.all_special_ids)
    if not special & set(ids[:-1]):
        return None  # earlier versions wrote the same text unless special tokens are inside
    for length in lengths:
        ends = length and ids[length - 1] in special
        if not ends and _read(tokenizer, ids[:length], special=False) == text:
            return ids[:length]
    return None


def ended_ids(
    written: tuple[int, ...],
    sampled: Sequence[int],
    prompt: Text,
    tokenizer: "PreTrainedTokenizerBase",
    options: TemplateOptions | None = None,
) -> tuple[int, ...]:
    """Return the token ids of a completion followed by its end token or tokens.

    The end token that was sampled is used, if there is one. Otherwise the completion ended at a
    stop string or was tokenized from text, and gets the ending that the prompt requires: for
    messages, the tokens that the chat template writes after an answer; for text, the end-of-text
    token.

    Args:
        written: Token ids of the completion without its ending.
        sampled: All sampled token ids; empty if none are known.
        prompt: The prompt of the completion.
        tokenizer: The model's tokenizer.
        options: Variables of the chat template (`chat_template_kwargs`).
    """
    ending = tuple(sampled[len(written) : len(written) + 1])
    # The token that ends a chat turn may differ from the end-of-text token.
    if len(sampled) == len(written) + 1 and ending[0] in end_ids(tokenizer):
        return (*written, *ending)
    if isinstance(prompt, str):
        return (*written, end_token(tokenizer))
    return (*written, *turn_ending(tokenizer, prompt, options))


def taught_ids(
    prompt: Text,
    completion: Text,
    sampled: Sequence[int] | None,
    tokenizer: "PreTrainedTokenizerBase",
    options: TemplateOptions | None = None,
) -> tuple[tuple[int, ...], tuple[int, ...], bool]:
    """Return the token ids of a prompt and of the completion to train on.

    The completion's ids are the sampled ones if they decode to its text. Otherwise the text is
    tokenized without the chat template, which could change it: the template only writes the prompt
    and the ending.

    Args:
        prompt: Text or messages.
        completion: Text or messages, like the prompt.
        sampled: Sampled token ids of the completion, or None.
        tokenizer: The model's tokenizer.
        options: Variables of the chat template (`chat_template_kwargs`).

    Returns:
        The prompt's ids, the completion's ids with its ending, and whether the latter were sampled.

    Raises:
        ValueError: Prompt and completion are not both text or both messages.
    """
    head = prompt_ids(tokenizer, prompt, options)
    if isinstance(completion, list) and not isinstance(prompt, str):
        if [message["role"] for message in completion] != ["assistant"]:
            return head, _turns(prompt, completion, head, tokenizer, options), False
        text = completion[0]["content"]
    elif isinstance(completion, str) and isinstance(prompt, str):
        text = completion
    else:
        kinds = [type(part).__name__ for part in (prompt, completion)]
        raise ValueError(
            "Expected prompt and completion both as text or both as messages, got a prompt of type "
            f"{kinds[0]} and a completion of type {kinds[1]}. Convert one of them."
        )
    written = ids_of_text(text, sampled, tokenizer)
    if written is not None:
        return head, ended_ids(written, sampled or (), prompt, tokenizer, options), True
    if isinstance(prompt, str):
        combined = prompt_ids(tokenizer, prompt + text)
        if combined[: len(head)] == head:
            return head, (*combined[len(head) :], end_token(tokenizer)), False
    else:
        text = _without_opening(text, prompt, tokenizer, options)
    # A token would span the end of the prompt, or the prompt is messages. The prompt's tokens stay
    # as they were for sampling.
    fresh = tuple(continuing_ids(tokenizer, text))
    return head, ended_ids(fresh, (), prompt, tokenizer, options), False


def end_token(tokenizer: "PreTrainedTokenizerBase") -> int:
    """Return the id of the token that ends a completion.

    Raises:
        ValueError: The tokenizer has none.
    """
    end = tokenizer.eos_token_id
    if not isinstance(end, int):
        raise ValueError(
            "The tokenizer has no end-of-text token (eos_token), which is needed to end a "
            "rationale. Set eos_token in the tokenizer's files."
        )
    return end


def _turns(
    prompt: list[Message],
    completion: list[Message],
    head: Sequence[int],
    tokenizer: "PreTrainedTokenizerBase",
    options: TemplateOptions | None,
) -> tuple[int, ...]:
    """Return the token ids of several messages after a prompt, as the chat template writes them."""
    text = tokenizer.apply_chat_template(prompt + completion, tokenize=False, **(options or {}))
    ids = tokenizer(str(text), add_special_tokens=False)["input_ids"]
    if tuple(ids[: len(head)]) != tuple(head):
        raise ValueError(
            "The model's chat template changes the prompt when several messages follow it, so the "
            "loss cannot be limited to these messages. Put each assistant message into its own row."
        )
    return tuple(ids[len(head) :])


def _without_opening(
    text: str,
    prompt: list[Message],
    tokenizer: "PreTrainedTokenizerBase",
    options: TemplateOptions | None,
) -> str:
    """Return the text without its opening thought mark if the prompt already ends with that mark.

    Servers that return the reasoning in a separate field do not report whether the template wrote
    it.
    """
    begin = THINK[0]
    if not text.lstrip().startswith(begin) or not opens_thought(tokenizer, prompt, THINK, options):
        return text
    rendered = prompt_text(tokenizer, prompt, options)
    space = rendered[len(rendered.rstrip()) :]
    return text.lstrip()[len(begin) :].removeprefix(space)


def _read(tokenizer: "PreTrainedTokenizerBase", ids: Sequence[int], *, special: bool) -> str:
    text = tokenizer.decode(
        list(ids), skip_special_tokens=not special, clean_up_tokenization_spaces=False
    )
    return str(text)
