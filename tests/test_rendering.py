"""Prompts and completions as tokens, with tokenizers of several kinds."""

import pytest
from narrowed import text, token_id
from small_tokenizers import (
    CHATML,
    NO_SYSTEM,
    SILENT_SYSTEM,
    THINKING,
    byte_level,
    sentencepiece_like,
)

from selftaught.records import Example
from selftaught.rendering import (
    completion_text,
    continuing_ids,
    opens_thought,
    prompt_ids,
    prompt_text,
    turn_ending,
)
from selftaught.samplers import SamplingParams
from selftaught.samplers.tokens import prompt_tokens
from selftaught.training import tokenized
from selftaught.training.completion_tokens import taught_ids

ASKED = [{"role": "user", "content": "3*7"}]
LLAMA = (
    "{% for m in messages %}{% if m.role == 'user' %}{{ bos_token + '[INST] ' + m.content + ' [/INST]' }}"
    "{% else %}{{ ' ' + m.content + ' ' + eos_token }}{% endif %}{% endfor %}"
)
"""As Llama 2's: it writes BOS itself, and its turns end with a space and EOS."""


def answered(text: str) -> list[dict[str, str]]:
    return [{"role": "assistant", "content": text}]


def learned(row) -> list[int]:
    return [label for label in row["labels"] if label != -100]


# ---------------------------------------------------------------- text prompts


@pytest.mark.parametrize("add_bos", [False, True])
@pytest.mark.parametrize("add_eos", [False, True])
@pytest.mark.parametrize("pad", ["<pad>", "</s>"])
def test_a_prompt_begins_as_the_tokenizer_begins_texts_and_is_not_ended(add_bos, add_eos, pad):
    tokenizer = byte_level(add_bos=add_bos, add_eos=add_eos, pad=pad)
    ids = prompt_ids(tokenizer, "Q: 2+5\nA:")
    assert tokenizer.decode(list(ids)) == "<s>" * add_bos + "Q: 2+5\nA:"
    assert prompt_tokens(tokenizer, "Q: 2+5\nA:", "tiny", "of 'p'") == ids
    (row,), _ = tokenized([Example("Q: 2+5\nA:", " 7")], tokenizer, None)
    assert tuple(row["input_ids"][: len(ids)]) == ids
    assert tokenizer.decode(learned(row)) == " 7</s>"
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1


def test_a_prompt_that_ends_with_the_end_token_as_text_keeps_it():
    tokenizer = byte_level(add_eos=True)
    assert tokenizer.decode(list(prompt_ids(tokenizer, "a</s>"))) == "a</s>"


def test_an_empty_prompt_has_what_is_put_before_a_text():
    assert prompt_ids(byte_level(add_bos=True, add_eos=True), "") == (0,)
    assert prompt_ids(byte_level(), "") == ()


def test_a_tokenizer_without_bos_adds_none():
    tokenizer = byte_level(bos=None)
    assert tokenizer.decode(list(prompt_ids(tokenizer, "Q:"))) == "Q:"


# ---------------------------------------------------------------- texts that continue


@pytest.mark.parametrize(
    "text", ["The answer", " The", "7", " 7", "\n\nThe", "7\n", "<|im_end|>", ""]
)
@pytest.mark.parametrize("kind", ["bytes", "sentencepiece"])
def test_a_continuing_text_gains_no_space(kind: str, text: str):
    tokenizer = byte_level() if kind == "bytes" else sentencepiece_like()
    before = tokenizer("Q:", add_special_tokens=False)["input_ids"]
    ids = continuing_ids(tokenizer, text)
    assert tokenizer.decode([*before, *ids]) == "Q:" + text


def test_without_care_such_a_tokenizer_does_add_a_space():
    """The reason for `continuing_ids`, and what tells that this tokenizer is of that kind."""
    tokenizer = sentencepiece_like()
    before, after = (
        tokenizer(text, add_special_tokens=False)["input_ids"] for text in ("Q:", "The")
    )
    assert tokenizer.decode([*before, *after]) == "Q: The"


def test_a_template_that_writes_bos_has_it_once_and_the_answer_gains_no_space():
    tokenizer = sentencepiece_like(LLAMA)
    ids = prompt_ids(tokenizer, ASKED)
    assert ids.count(tokenizer.bos_token_id) == 1
    (row,), _ = tokenized([Example(ASKED, answered("The answer is 7."))], tokenizer, None)
    assert tuple(row["input_ids"][: len(ids)]) == ids
    whole = text(tokenizer.decode(row["input_ids"]))
    assert whole.replace(" ", "").endswith("[/INST]Theansweris7.</s>")
    assert "[/INST]The" in whole
    assert row["input_ids"].count(tokenizer.eos_token_id) == 1
    assert learned(row)[-1] == tokenizer.eos_token_id


# ---------------------------------------------------------------- messages


def test_a_turn_ends_with_the_templates_own_token_and_nothing_after_it():
    tokenizer = byte_level(template=CHATML)
    assert tokenizer.decode(list(turn_ending(tokenizer, ASKED))) == "<|im_end|>"
    plain = byte_level(
        template="{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
    )
    assert tokenizer.decode(list(turn_ending(plain, ASKED))) == "</s>"


def test_an_end_token_that_is_not_marked_as_special_ends_a_turn_and_is_learned():
    """As in tokenizers that add <|im_end|> as an ordinary token; the end of a text is not learned."""
    tokenizer = byte_level(special=("<|im_start|>",), added=("<|im_end|>",), template=CHATML)
    end = token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    assert end not in tokenizer.all_special_ids
    assert turn_ending(tokenizer, ASKED) == (end,)
    sampled = (*tokenizer("12", add_special_tokens=False)["input_ids"], end)
    answer = [{"role": "assistant", "content": "12"}]
    assert taught_ids(ASKED, answer, sampled, tokenizer)[1] == sampled
    assert taught_ids("Q:", "12", sampled, tokenizer)[1] == sampled


def test_a_template_that_changes_every_answer_is_refused():
    tokenizer = byte_level(template="{% for m in messages %}{{ m.content | upper }}{% endfor %}")
    with pytest.raises(ValueError, match="does not write an assistant's message as it is"):
        turn_ending(tokenizer, ASKED)


@pytest.mark.parametrize(
    "completion",
    ["3*7=21\n</think>\n\n21.", "21.", "3*7  \n\n\n</think>\n21.", " 21", "a</think>b</think>\n"],
)
def test_what_is_learned_is_the_completion_whatever_the_template_makes_of_it(completion: str):
    tokenizer = byte_level(template=THINKING, added=("<think>", "</think>"))
    ids = tokenizer(completion, add_special_tokens=False)["input_ids"]
    end = token_id(tokenizer.convert_tokens_to_ids("<|im_end|>"))
    for sampled in (None, (*ids, end)):
        (row,), _ = tokenized([Example(ASKED, answered(completion), sampled)], tokenizer, None)
        assert tokenizer.decode(learned(row)) == completion + "<|im_end|>"
        assert tokenizer.decode(row["input_ids"]) == (
            "<|im_start|>user\n3*7<|im_end|>\n<|im_start|>assistant\n<think>\n"
            + completion
            + "<|im_end|>"
        )


def test_a_thought_that_the_template_opens_is_not_opened_twice():
    """A server gave the reasoning apart: its text begins with the mark that the template writes."""
    tokenizer = byte_level(template=THINKING)
    (row,), _ = tokenized([Example(ASKED, answered("<think>\nso\n</think>\n21"))], tokenizer, None)
    assert text(tokenizer.decode(row["input_ids"])).endswith(
        "<|im_start|>assistant\n<think>\nso\n</think>\n21<|im_end|>"
    )


def test_whether_a_prompt_opens_a_thought():
    thinking = byte_level(template=THINKING)
    assert opens_thought(thinking, ASKED)
    assert not opens_thought(thinking, ASKED, options={"enable_thinking": False})
    assert not opens_thought(byte_level(template=CHATML), ASKED)
    assert opens_thought(thinking, "Q: 1+1\nA: <think> \n")
    assert not opens_thought(thinking, "What is <think>?")
    assert opens_thought(thinking, "Q [T]", ("[T]", "[/T]"))
    plain = byte_level(template=CHATML)
    assert opens_thought(plain, [*ASKED, *answered("<think>\nthree times")])
    assert not opens_thought(plain, [*ASKED, *answered("<think>so</think> The")])
    assert not opens_thought(plain, [{"role": "user", "content": "<think>"}])


def test_template_variables_reach_the_prompt_in_training_too():
    tokenizer = byte_level(template=THINKING)
    off = {"enable_thinking": False}
    (row,), _ = tokenized([Example(ASKED, answered("21"), None, off)], tokenizer, None)
    assert text(tokenizer.decode(row["input_ids"])).endswith("<think>\n\n</think>\n\n21<|im_end|>")


def test_a_system_message_is_written_or_refused():
    asked = [{"role": "system", "content": "Be brief."}, *ASKED]
    assert "Be brief." in prompt_text(byte_level(template=CHATML), asked)
    with pytest.raises(ValueError, match=r"System role not supported.*remove --system-prompt"):
        prompt_text(byte_level(template=NO_SYSTEM), asked)
    with pytest.raises(ValueError, match="does not write the system message"):
        prompt_text(byte_level(template=SILENT_SYSTEM), asked)


def test_template_variables_that_do_nothing_are_refused():
    with pytest.raises(ValueError, match="does not use enable_thinking"):
        prompt_text(byte_level(template=CHATML), ASKED, {"enable_thinking": False})
    with pytest.raises(ValueError, match="add_generation_prompt is an argument"):
        SamplingParams(chat_template_kwargs={"add_generation_prompt": False})
    with pytest.raises(ValueError, match="chat template, got the model, which has none"):
        prompt_text(byte_level(), ASKED)


def test_special_tokens_inside_a_completion_are_part_of_its_text():
    tokenizer = byte_level(special=("<|think|>", "<|/think|>"))
    ids = tokenizer("<|think|>so<|/think|>21</s>", add_special_tokens=False)["input_ids"]
    assert (
        completion_text(tokenizer, ids, {token_id(tokenizer.eos_token_id)})
        == "<|think|>so<|/think|>21"
    )
