"""Prompts and completions as tokens: the same for sampling, scoring and training.

A tokenizer here is one of transformers, and template options are `chat_template_kwargs`: values that
a chat template reads, such as `enable_thinking`.
"""

import re
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from selftaught.records import Message, Text
from selftaught.thought_marks import THINK, ThoughtMarks, after_thought

TemplateOptions = Mapping[str, Any]

OUR_OWN = frozenset(
    ("add_generation_prompt", "chat_template", "continue_final_message", "conversation",
     "conversations", "documents", "max_length", "messages", "padding", "return_assistant_tokens_mask",
     "return_dict", "return_tensors", "tokenize", "tokenizer_kwargs", "tools", "truncation")
)  # fmt: skip
"""Arguments of `apply_chat_template` that no template option may set."""
PROBE = "selftaught-probe-text"
"""Stands in for an answer where a template is asked what follows one."""
ANCHORS = ("\n", "a", ":", "0")
"""Texts that stand before a text, so that it is tokenized as a continuation."""


def check_template_options(options: TemplateOptions) -> None:
    """Refuse options that would change how the template is applied, not what it writes.

    Raises:
        ValueError: names the option.
    """
    if taken := sorted(OUR_OWN & set(options)):
        raise ValueError(
            f"chat_template_kwargs must hold variables of the model's chat template, such as "
            f"enable_thinking; {', '.join(taken)} is an argument of apply_chat_template and is set "
            "by selftaught. Leave it out."
        )


def prompt_text(tokenizer: Any, prompt: Text, options: TemplateOptions | None = None) -> str:
    """Return the text of a prompt: messages rendered by the chat template, text as it is.

    A last message by the assistant is left open, to be continued.

    Raises:
        ValueError: the tokenizer has no chat template, the template refuses the messages, does not
            write the system message, or does not use an option.
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
            f"The chat template of {_name(tokenizer)} does not write the system message. Leave "
            "--system-prompt out, or use a model whose template has a system role."
        )
    return text


def prompt_ids(
    tokenizer: Any, prompt: Text, options: TemplateOptions | None = None
) -> tuple[int, ...]:
    """Return the token ids of a prompt, which a completion can follow directly.

    A template writes its special tokens itself, so none is added to messages. Tokens that the
    tokenizer adds before a text (BOS) are kept; those that it adds after a text (`add_eos_token`)
    are left out, because the text goes on.

    Raises:
        ValueError: see `prompt_text`.
    """
    text = prompt_text(tokenizer, prompt, options)
    if not isinstance(prompt, str):
        return tuple(tokenizer(text, add_special_tokens=False)["input_ids"])
    ids = tokenizer(text)["input_ids"]
    own = tokenizer(text, add_special_tokens=False)["input_ids"]
    for start in range(len(ids) - len(own) + 1):
        if own and ids[start : start + len(own)] == own:
            return tuple(ids[: start + len(own)])
    # Without tokens of its own, a text keeps what is added before it.
    while len(ids) > 1 and ids[-1] == tokenizer.eos_token_id:
        ids = ids[:-1]
    return tuple(ids)


def opens_thought(
    tokenizer: Any,
    prompt: Text,
    marks: ThoughtMarks = THINK,
    options: TemplateOptions | None = None,
) -> bool:
    """Return whether a prompt ends inside a thought, which the completion then continues.

    It does where its text ends with the opening mark, white space aside, or where its last message
    is an assistant's unfinished thought.
    """
    if prompt_text(tokenizer, prompt, options).rstrip().endswith(marks[0]):
        return True
    if isinstance(prompt, str) or prompt[-1]["role"] != "assistant":
        return False
    return after_thought(prompt[-1]["content"], marks) is None


def continuing_ids(tokenizer: Any, text: str) -> list[int]:
    """Return the token ids of a text that continues another one.

    Tokenizers made with SentencePiece add a space before a text; here it is left out, so that the
    text after the tokens before it is the text given.
    """
    alone = list(tokenizer(text, add_special_tokens=False)["input_ids"])
    for anchor in ANCHORS:
        before = list(tokenizer(anchor, add_special_tokens=False)["input_ids"])
        if _read(tokenizer, [*before, *alone]) == _read(tokenizer, before) + text:
            return alone
        whole = list(tokenizer(anchor + text, add_special_tokens=False)["input_ids"])
        if whole[: len(before)] == before and _read(tokenizer, whole) == (
            _read(tokenizer, before) + text
        ):
            return whole[len(before) :]
    return alone


def turn_ending(
    tokenizer: Any, prompt: Sequence[Message], options: TemplateOptions | None = None
) -> tuple[int, ...]:
    """Return the token ids that end an assistant's answer to these messages.

    They are what the chat template writes after an answer, up to and including its first special
    token, with which sampling stops. Where it writes none, the answer ends with the tokenizer's
    end-of-text token.

    Raises:
        ValueError: the template does not write answers as they are, or there is no token to end with.
    """
    asked = prompt[:-1] if prompt[-1]["role"] == "assistant" else prompt
    text = _rendered(
        tokenizer,
        [*asked, {"role": "assistant", "content": PROBE}],
        dict(options or {}),
        add_generation_prompt=False,
    )
    _, found, rest = text.rpartition(PROBE)
    if not found:
        raise ValueError(
            f"The chat template of {_name(tokenizer)} does not write an assistant's message as it "
            "is, so it cannot be told where an answer ends. Use a text prompt (--prompt few_shot or "
            "bare)."
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
    """Return the ids of the special tokens, which are those that can end an assistant's turn."""
    added = tokenizer.added_tokens_decoder.items()
    return {*tokenizer.all_special_ids, *(token for token, one in added if one.special)}


def silent_ids(tokenizer: Any) -> set[int]:
    """Return the ids of the tokens that mark where a text begins or ends, and of padding."""
    named = (tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.pad_token_id)
    return {token for token in named if token is not None}


def completion_text(tokenizer: Any, ids: Sequence[int], ends: Collection[int]) -> str:
    """Return the text of a completion's tokens without the tokens at its end that are in `ends`.

    Other special tokens are part of the text: they may be the marks around a thought.
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
    """Return the messages as the chat template writes them."""
    template = tokenizer.chat_template
    if template is None:
        raise ValueError(
            f"Expected a model with a chat template, got {_name(tokenizer)}, which has none; use a "
            "text prompt (--prompt few_shot or bare), or an instruction-tuned model."
        )
    check_template_options(options)
    unused = [name for name in options if not re.search(rf"\b{re.escape(name)}\b", str(template))]
    if unused:
        raise ValueError(
            f"The chat template of {_name(tokenizer)} does not use {', '.join(sorted(unused))}; "
            "correct or leave out --chat-template-kwargs."
        )
    try:
        return str(tokenizer.apply_chat_template(list(messages), tokenize=False, **how, **options))
    except Exception as error:  # whatever the code of a template may raise
        roles = ", ".join(dict.fromkeys(one["role"] for one in messages))
        raise ValueError(
            f"The chat template of {_name(tokenizer)} refused the messages (roles: {roles}): {error}"
            + (". Leave --system-prompt out if it has no system role." if "system" in roles else "")
        ) from error


def _name(tokenizer: Any) -> str:
    return tokenizer.name_or_path or "the model"
