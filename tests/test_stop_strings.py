"""Stop strings end a completion outside its thoughts only."""

from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from narrowed import token_id
from small_tokenizers import byte_level
from transformers import AutoTokenizer

from selftaught.records import Completion
from selftaught.samplers import SamplingParams
from selftaught.samplers.base import stop_at, without_stop
from selftaught.samplers.local.sampler import TransformersSampler
from selftaught.samplers.scripted import ScriptedSampler
from selftaught.samplers.stopping import Ending


@pytest.mark.parametrize(
    ("text", "opened", "left"),
    [
        ("7.\n\nQ: next", False, "7."),
        ("<think>a\n\nb</think>7.\n\nQ:", False, "<think>a\n\nb</think>7."),
        ("a\n\nb</think>7.\n\nQ:", True, "a\n\nb</think>7."),
        ("a\n\nb</think>\n\n7.\n\nQ:", True, "a\n\nb</think>\n\n7."),  # white space after a thought
        ("a\n\nb</think>\n\n7.", True, None),
        ("a\n\nb", True, None),
        ("<think>a\n\nb", False, None),
        ("7.\n\n<think>a\n\nb</think>8", False, "7."),
        ("x<think>a\n\nb</think>8\n\n", False, "x<think>a\n\nb</think>8"),
        ("x<think>a\n\nb</think>8<think>c\n\nd</think>9\n\n!", False,
         "x<think>a\n\nb</think>8<think>c\n\nd</think>9"),
        ("a\n\nb</think>7.", False, None),  # the prompt opened the thought, and nobody said so
        ("\n\n7", False, ""),
        ("", True, None),
    ],
)  # fmt: skip
def test_a_stop_string_in_a_thought_does_not_end_a_completion(text, opened, left):
    assert without_stop(text, ["\n\n"], opened=opened) == left


def test_a_stop_string_that_touches_a_mark_does():
    assert without_stop("so</think>7", ["</think>"], opened=True) == "so"
    assert without_stop("7<think>so", ["<think>"]) == "7"
    assert without_stop("so</think>\n\nQ: 8", ["\n\nQ:"], opened=True) == "so</think>"
    assert without_stop("[T]a\n\nb[/T]7\n\n", ["\n\n"], ("[T]", "[/T]")) == "[T]a\n\nb[/T]7"


@settings(max_examples=300, deadline=None)
@given(
    st.lists(st.sampled_from(["<think>", "</think>", "a", "\n\n", "\n", " ", "#"]), max_size=10),
    st.booleans(),
    st.sampled_from([("\n\n",), ("#", "\n\n"), ("a", "a#")]),
)
def test_it_agrees_with_a_naive_reading(pieces: list[str], opened: bool, stop: tuple[str, ...]):
    text = "".join(pieces)
    assert stop_at(text, stop, opened=opened) == _naive(text, stop, opened)


def _naive(text: str, stop: tuple[str, ...], opened: bool) -> int | None:
    """Every character is labelled: in a thought, in the white space after one, a mark's, or outside."""
    labels: list[str] = []
    inside, after, at = opened, False, 0
    while at < len(text):
        if text.startswith("</think>", at):
            if not inside:  # all before was a thought
                labels = ["t" for _ in labels]
            labels += ["m"] * 8
            inside, after, at = False, True, at + 8
        elif text.startswith("<think>", at):
            labels += ["t" if inside else "m"] * 7
            inside, after, at = True, False, at + 7
        else:
            after = after and text[at].isspace()
            labels.append("t" if inside else "w" if after else "o")
            at += 1
    for start in range(len(text)):
        for one in stop:
            if text.startswith(one, start):
                kinds = set(labels[start : start + len(one)])
                if kinds not in ({"t"}, {"w"}):
                    return start
    return None


def test_tokens_after_the_stop_string_are_left_out():
    tokenizer = byte_level(special=("<|think|>", "<|/think|>"))
    marks = ("<|think|>", "<|/think|>")
    ending = Ending(tokenizer, [token_id(tokenizer.eos_token_id)], ["\n\n"], marks)
    ids = tokenizer("<|think|>a\n\nb<|/think|>7.\n\nQ: more").input_ids
    made = ending.completion(ids)
    assert made.text == "<|think|>a\n\nb<|/think|>7."
    assert tokenizer.decode(list(made.token_ids or ())) == "<|think|>a\n\nb<|/think|>7.\n\n"
    assert made.finish_reason == "stop"
    assert not ending.ended(tokenizer("<|think|>a\n\nb").input_ids)
    assert ending.ignored(tokenizer("<|think|>a\n\nb").input_ids)
    opened = Ending(tokenizer, [], ["\n\n"], marks, opened=True)
    assert opened.completion(tokenizer("a\n\nb").input_ids) == Completion(
        "a\n\nb", "length", tuple(tokenizer("a\n\nb").input_ids), True
    )


def test_the_sampler_goes_on_where_a_thought_has_a_stop_string(tiny_model_dir: Path):
    """The same begun completion, after a prompt that opens a thought and after one that does not."""
    tokenizer = AutoTokenizer.from_pretrained(tiny_model_dir)
    prefix_tokens = tuple(tokenizer("12 + 7\n\nso")["input_ids"])
    params = SamplingParams(max_tokens=len(prefix_tokens) + 8, stop=("\n\n",))
    prompts = ["Q: What is 12 + 7?\nA:", "Q: What is 12 + 7?\nA: <think>"]
    with TransformersSampler(tiny_model_dir) as sampler:
        (plain,), (thinking,) = sampler.sample(
            prompts, params, prefix_tokens=[prefix_tokens, prefix_tokens]
        )
    assert (plain.text, plain.finish_reason, plain.thought_open) == ("12 + 7", "stop", False)
    assert thinking.text.startswith("12 + 7\n\nso") and thinking.thought_open
    assert len(thinking.token_ids or ()) > len(prefix_tokens)


def test_the_scripted_sampler_reads_thoughts_too():
    with ScriptedSampler(lambda prompt, index: "a\n\nb</think>7\n\nQ:") as sampler:
        params = SamplingParams(stop=("\n\n",))
        ((one,), (other,)) = sampler.sample(["Q <think>\n", "Q"], params)
    assert one == Completion("a\n\nb</think>7", "stop", thought_open=True)
    # As a model writes it piece by piece, nothing said that a thought was open; the text tells later.
    assert other == Completion("a\n\nb</think>7", "stop")
