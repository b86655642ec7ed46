"""Conversion of prompts and completions to token ids, shared by sampling, scoring and training.

A tokenizer is one of transformers. Template options are `chat_template_kwargs`: variables of the
chat template, such as `enable_thinking`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selftaught.records import Message, Text
from selftaught.thought_marks import THINK, ThoughtMarks, after_thought

TemplateOptions = Mapping[str, Any]

OUR_OWN = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "conversation",
     "conversations", "documents", "max_length", "messages", "padding",
     "return_assistant_tokens_mask", "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs",
     "tools", "truncation")
)  # fmt: skip
"""Arguments of `apply_chat_template` that template options may not set."""
PROBE = "selftaught-probe-text"
"""Placeholder answer used to find out what a chat template writes after an answer."""
ANCHORS = ("\n", "a", ":", "0")
"""Texts put before another text so that it is tokenized as a continuation."""


def check_template_options(options: TemplateOptions) -> None:
    """Check that template options are variables of the template, not arguments for applying it.

    Raises:
        ValueError: An option is an argument of `apply_chat_template`. The message names it.
    """
    if taken := sorted(OUR_OWN & set(options)):
        raise ValueError(
            f"chat_template_kwargs must contain variables of the model's chat template, such as "
            f"enable_thinking; {', '.join(taken)} is an argument of apply_chat_template and is set "
            "by selftaught. Remove it."
        )


def prompt_text(tokenizer: Any, prompt: Text, options: TemplateOptions | None = None) -> str:
    """Return the text of a prompt: messages rendered with the chat template, text unchanged.

    If the last message is from the assistant, it is left open so that the completion continues it.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text or messages.
        options: Variables of the chat template (`chat_template_kwargs`). Used only for messages.

    Raises:
        ValueError: The tokenizer has no chat template, or the template rejects the messages, does
            not write the system message, or does not use an option.
    """
    if isinstance(prompt, str):
        return prompt
    continued = prompt[-1]["role"] == "assistant"
    text = _rendered(
        tokenizer,
        prompt,
        dict(options or {}),
        add_generation_prompt=not continued,
        continue_final_message=continued,
    )
    first = prompt[0]
    if first["role"] == "system" and first["content"].strip() not in text:
        raise ValueError(
            f"The chat template of {_name(tokenizer)} does not write the system message. Remove "
            "--system-prompt, or use a model whose template supports a system role."
        )
    return text


def prompt_ids(
    tokenizer: Any, prompt: Text, options: TemplateOptions | None = None
) -> tuple[int, ...]:
    """Return the token ids of a prompt, ready to be followed by a completion.

    No special tokens are added to messages, because the chat template writes them. For text, tokens
    that the tokenizer adds before it (BOS) are kept. Tokens that it adds after it (`add_eos_token`)
    are removed, because a completion follows.

    Args:
        tokenizer: The model's tokenizer.
        prompt: Text or messages.
        options: Variables of the chat template (`chat_template_kwargs`). Used only for messages.

    Raises:
        ValueError: See `prompt_text`.
    """
    text = prompt_text(tokenizer, prompt, options)
    if not isinstance(prompt, str):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(own) + 1):
        if own and ids[start : start + len(own)] == own:
            return tuple(ids[: start + len(own)])
    # The text itself has no tokens. Keep what the tokenizer adds before it, remove trailing EOS.
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return tuple(ids)


def opens_thought(
    tokenizer: Any,
    prompt: Text,
    marks: ThoughtMarks = THINK,
    options: TemplateOptions | None = None,
) -> bool:
    """Return whether a prompt ends inside a thought, so that the completion continues it.

    This is the case if the text ends with the opening mark, followed at most by white space, or if
    the last message is an assistant's message with an unclosed thought.
    """
    if prompt_text(tokenizer, prompt, options).rstrip().endswith(marks[0]):
        return True
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return False
    return after_thought(prompt[-1]["content"], marks) is None


def continuing_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that continues another text.

    SentencePiece tokenizers add a space before a text. It is left out here, so that the ids decode
    to exactly the given text after the ids of the preceding text.
    """
    alone = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for anchor in ANCHORS:
        before = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
        if _read(tokenizer, [*before, *alone]) == _read(tokenizer, before) + text:
            return alone
        both = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if both[: len(before)] == before and _read(tokenizer, both) == (
            _read(tokenizer, before) + text
        ):
            return both[len(before) :]
    return alone


def turn_ending(
    tokenizer: Any, prompt: Sequence[Message], options: TemplateOptions | None = None
) -> tuple[int, ...]:
    """Return the token ids that end an assistant's answer to these messages.

    These are the tokens that the chat template writes after an answer, up to and including the
    first special token, at which sampling stops. If there is no special token, the answer ends
    with the tokenizer's end-of-text token.

    Raises:
        ValueError: The template does not write answers unchanged, or there is no end token.
    """
    messages = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    text = _rendered(
        tokenizer,
        [*messages, {"role": "assistant", "content": PROBE}],
        dict(options or {}),
        add_generation_prompt=False,
    )
    _, found, rest = text.rpartition(PROBE)
    if not found:
        raise ValueError(
            f"The chat template of {_name(tokenizer)} does not write an assistant's message as it "
            "is, so the end of an answer cannot be determined. Use a text prompt (--prompt "
            "few_shot or bare)."
        )
    tail = continuing_ids(tokenizer, rest)
    ends = end_ids(tokenizer)
    for length, token in enumerate(tail, 1):
        if token in ends:
            return tuple(tail[:length])
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"Neither the chat template nor the tokenizer of {_name(tokenizer)} has a token that "
            "ends an answer; set the tokenizer's eos_token."
        )
    return (tokenizer.eos_token_id,)


def end_ids(tokenizer: Any) -> Collection[int]:
    """Return the ids of the tokens that can end an assistant's turn.

    These are the special tokens, and the added tokens that are not white space: some tokenizers add
    the token that ends a turn without marking it as special.
    """
    added = tokenizer.added_tokens_decoder.items()
    visible = {token for token, one in added if one.special or one.content.strip()}
    return {*tokenizer.all_special_ids, *visible}


def silent_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the BOS, EOS and padding tokens."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {token for token in named if token is not None}


def completion_text(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    """Return the text of a completion's token ids, without trailing tokens that are in `ends`.

    Other special tokens are part of the text, because they may be thought marks.
    """
    last = len(ids)
    while last and ids[last - 1] in ends:
        last -= 1
    return _read(tokenizer, ids[:last])


def _read(tokenizer: Any, ids: Sequence[int]) -> str:
    return tokenizer.decode(
        list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False
    )


def _rendered(
    tokenizer: Any, messages: Sequence[Message], options: dict[str, Any], **how: bool
) -> str:
    """Return the text that the chat template writes for the messages."""
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            f"Expected a model with a chat template, got {_name(tokenizer)}, which has none. Use a "
            "text prompt (--prompt few_shot or bare), or an instruction-tuned model."
        )
    check_template_options(options)
    unused = [name for name in options if not re.search(rf"\b{re.escape(name)}\b", str(template))]
    if unused:
        raise ValueError(
            f"The chat template of {_name(tokenizer)} does not use {', '.join(sorted(unused))}; "
            "correct or remove --chat-template-kwargs."
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **how, **options))
    except Exception as error:  # a template is code and may raise anything
        roles = ", ".join(dict.fromkeys(message["role"] for message in messages))
        raise ValueError(
            f"The chat template of {_name(tokenizer)} rejected the messages (roles: {roles}): "
            f"{error}"
            + (". If it has no system role, remove --system-prompt." if "system" in roles else "")
        ) from error


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path or "the model"
