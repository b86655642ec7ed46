"""Thinking where the text matches: beside decoding every prefix and searching it with `re`."""

import json
import random
import re
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st
from naive_quiet import assert_equal_to_naive, drawn, quiet, texts, tiny
from narrowed import tensor
from small_tokenizers import byte_level, sentencepiece_like
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedTokenizerBase,
    PreTrainedTokenizerFast,
)

from selftaught.cli import main
from selftaught.models.embedded import embedded_model
from selftaught.quiet.checkpoint import make_quiet
from selftaught.quiet.config import QuietConfig
from selftaught.quiet.evaluation import score
from selftaught.quiet.explore import explored
from selftaught.quiet.gating import ALWAYS, ThinkWhen, ThoughtParams
from selftaught.quiet.linear_pattern import LinearPattern
from selftaught.quiet.model import QuietLM
from selftaught.quiet.spans import spans
from selftaught.quiet.training import quiet_arguments, train_quiet
from selftaught.quiet.transformers_model import QuietForCausalLM
from selftaught.quiet.where import Following, Matcher, training_matcher
from selftaught.tasks import open_task

# --- patterns ------------------------------------------------------------------------------------

ATOMS = ["a", "b", "-", " ", "\\n", "é", "[ab]", "[^a]", "\\w", "\\s", ".", "\\.", "\\x61", "\\d", "[]a]", "[\\]b]"]  # fmt: skip
REPEATS = ["*", "+", "?", "{2}", "{1,2}", "{,2}", "{1,}", "*?", "+?", "{0,3}?"]
BODIES = st.recursive(
    st.sampled_from(ATOMS),
    lambda part: st.one_of(
        st.tuples(part, part).map("".join),
        st.tuples(part, part).map(lambda two: f"({two[0]}|{two[1]})"),
        st.tuples(part, st.sampled_from(REPEATS)).map(lambda two: f"(?:{two[0]}){two[1]}"),
        st.tuples(st.sampled_from(["^", "\\b", "\\B", "\\A"]), part).map("".join),
        st.tuples(part, st.sampled_from(["^", "\\b", "\\B"]), part).map("".join),
    ),
    max_leaves=8,
)


@settings(max_examples=400, deadline=None)
@example("(?m)", "^a", "ba\na\nba")
@example("", "^a", "a\na")
@example("(?i)", "\\bA\\B", "ab a")
@given(
    st.sampled_from(["", "(?i)", "(?m)", "(?s)", "(?ims)", "(?a)"]),
    BODIES,
    st.text("abAB-. \né1", min_size=1, max_size=14),
)
def test_the_text_so_far_ends_with_a_match_if_re_finds_one_there(flags: str, body: str, text: str):
    at_end = re.compile(f"{flags}(?:{body})\\Z")
    try:
        pattern = LinearPattern(flags + body)
    except ValueError as error:
        assert "matches the empty text" in str(error)
        return
    expected = [bool(at_end.search(text, 0, end)) for end in range(1, len(text) + 1)]
    assert pattern.ends(text) == expected


def test_a_pattern_that_takes_re_exponential_time_takes_linear_time():
    started = time.monotonic()
    found = LinearPattern("(a+)+b").ends("a" * 100_000 + "b")
    assert found.index(True) == 100_000
    many = LinearPattern("(?:[a-m]|b.{0,40}|c)+=")  # thousands of different sets of states
    many.ends("".join(random.Random(0).choices("abcdefgh", k=5_000)))
    assert time.monotonic() - started < 30


@pytest.mark.parametrize(
    ("pattern", "message"),
    [
        ("(", "not a regular expression"),
        ("[0-9", "not a regular expression"),
        ("a*", "matches the empty text"),
        ("", "matches the empty text"),
        ("x|", "matches the empty text"),
        ("\\b", "matches the empty text"),
        ("=$", "the end of the text"),
        ("=(?=1)", "linear time"),
        ("(?<!a)=", "linear time"),
        ("(a)\\1", "back reference"),
        ("(a)(?P=x)", "not a regular expression"),
        ("a++", "possessive"),
        ("(?x)a", "flag 'x'"),
        ("(?:a{900}){900}", "too large"),
        ("a(?:){100000000}", "too large"),
    ],
)
def test_a_pattern_that_cannot_be_used_is_refused(pattern: str, message: str):
    with pytest.raises(ValueError, match=message):
        QuietConfig(positions="pattern", positions_pattern=pattern)


def test_options_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="needs positions_pattern"):
        QuietConfig(positions="pattern")
    with pytest.raises(ValueError, match="has an effect only with"):
        QuietConfig(positions_pattern="=")
    with pytest.raises(ValueError, match="takes no pattern"):
        ThinkWhen("always", pattern="=")


# --- positions of a text -------------------------------------------------------------------------

SAMPLES = ["The answer is 42.", "the answer is 你=你", "Привет, мир! 你好世界", "#### 72 = é", "x=1\ny=2 🙂🙂=", "答案是 7。", "7 + 7 = 14 hehe", "<|im_end|>="]  # fmt: skip
PATTERNS = ["=", "the", "[\u0430-я]+", "你", "世界|🙂", "is ?", "\\d", "#{4}", "\\w=", "^.", "h.", "。|7", "<\\|im_end\\|>"]  # fmt: skip
SIGNS = r"[\s:$*(\[{\"'`]+"


def split_characters() -> PreTrainedTokenizerBase:
    """A byte-level BPE tokenizer with tokens of a space and the first byte of a character."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("Ġ", "ä"), ("Ġ", "å"), ("=", "ä"), ("i", "s")]  # ä and å stand for E4 and E5
    names = [*alphabet, *("".join(pair) for pair in merges)]
    raw = Tokenizer(models.BPE(vocab={name: at for at, name in enumerate(names)}, merges=merges))
    raw.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    raw.decoder = decoders.ByteLevel()
    return PreTrainedTokenizerFast(tokenizer_object=raw)


@pytest.fixture(scope="module")
def tokenizers(tiny_model_dir: Path) -> dict[str, PreTrainedTokenizerBase]:
    return {
        "byte": byte_level(),
        "split characters": split_characters(),
        "byte-level BPE": AutoTokenizer.from_pretrained(tiny_model_dir),
        "byte fallback": sentencepiece_like(),
        "character": AutoTokenizer.from_pretrained(embedded_model()),
    }


def decoded(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> str:
    return str(tokenizer.decode(list(ids), clean_up_tokenization_spaces=False))


def naive_mask(
    tokenizer: PreTrainedTokenizerBase, pattern: str, ids: Sequence[int], *, answer: bool = False
) -> list[bool]:
    """Decode every prefix anew, and search every text that ends in a character of its last token."""
    found, longest = [], 0
    for count in range(1, len(ids) + 1):
        raw = decoded(tokenizer, ids[:count])
        text = raw.rstrip("\ufffd")  # the bytes of a character that is not complete
        ends = range(longest + 1, len(text) + 1)
        thinks = any(re.search(f"(?:{pattern})\\Z", text[:end]) for end in ends)
        if answer and ends and raw == text:
            thinks = thinks or re.search(f"(?:{pattern}){SIGNS}\\Z", text) is not None
        found.append(thinks)
        longest = max(longest, len(text))
    return found


@pytest.mark.parametrize(
    "name", ["byte", "split characters", "byte-level BPE", "byte fallback", "character"]
)
@pytest.mark.parametrize("answer", [False, True])
def test_positions_are_those_of_decoding_every_prefix(name: str, answer: bool, tokenizers: dict):
    tokenizer, draw, matching = tokenizers[name], random.Random(name), 0
    for number in range(150):
        if number % 2:
            ids = tokenizer("".join(draw.choices(SAMPLES, k=2))).input_ids
        else:  # bytes that are no characters, and characters that are not finished
            ids = [draw.randrange(len(tokenizer)) for _ in range(25)]
        pattern = draw.choice(PATTERNS)
        expected = naive_mask(tokenizer, pattern, ids, answer=answer)
        assert Matcher(pattern, tokenizer, answer=answer).mask(ids) == expected, (pattern, ids)
        matching += any(expected)
    assert matching > 20
    # A space and the first byte of the answer in one token.
    ids = tokenizer("the answer is 你", add_special_tokens=False).input_ids
    assert Matcher("is", tokenizer, answer=answer).mask(ids) == naive_mask(tokenizer, "is", ids, answer=answer)  # fmt: skip
    # A token that adds no text, such as one that only the model's vocabulary has.
    ids = [*tokenizer("the answer is", add_special_tokens=False).input_ids, 10**6]
    assert Matcher("is|n", tokenizer, answer=answer).mask(ids) == naive_mask(tokenizer, "is|n", ids, answer=answer)  # fmt: skip


def test_the_thought_comes_after_the_token_that_completes_the_match(tokenizers: dict):
    def thoughts(name: str, pattern: str, text: str) -> str:
        """The text with ^ where the model thinks."""
        tokenizer = tokenizers[name]
        ids = tokenizer(text, add_special_tokens=False).input_ids
        thinks = Matcher(pattern, tokenizer).mask(ids)
        return "".join(
            decoded(tokenizer, [one]) + "^" * here for one, here in zip(ids, thinks, strict=True)
        )

    assert thoughts("character", "=", "1+2=3;4=4") == "1+2=^3;4=^4"
    assert thoughts("character", "\\+2", "1+2=3") == "1+2^=3"
    # "The" is one token of this vocabulary: the match "h" ends inside it.
    assert thoughts("byte fallback", "h", "The") in ("The^", " The^")
    assert thoughts("byte", "答", "x答y").count("^") == 1
    assert thoughts("byte", "答", "x答y").endswith("^y")


@pytest.mark.parametrize("name", ["byte", "byte-level BPE"])
@pytest.mark.parametrize(
    ("task", "options", "gold"),
    [
        ("gsm8k", {}, "72"),
        ("arithmetic", {}, "86"),
        ("commonsense_qa", {}, "C"),
        ("competition_math", {}, "5"),
        ("gym", {"name": "chain_sum"}, "19"),
    ],
)
def test_before_an_answer_means_directly_before_its_first_token(
    name: str, task: str, options: dict, gold: str, tokenizers: dict
):
    tokenizer, opened = tokenizers[name], open_task(task, **options)
    text = f"One and one. {opened.direct.format(answer=gold)}"
    ids = tokenizer(text).input_ids
    for pattern in [re.escape(opened.answer_marker), *([] if task == "arithmetic" else [None])]:
        config = QuietConfig(positions="answer", positions_pattern=pattern)
        matcher = training_matcher(config, tokenizer)
        assert matcher is not None
        thinks = matcher.mask(ids)
        last = max(at for at, here in enumerate(thinks) if here)
        # A token of this vocabulary may be a space with the answer.
        assert decoded(tokenizer, ids[: last + 1]).rstrip() == text[: text.rindex(gold)].rstrip()
        assert decoded(tokenizer, ids[last + 1 :]).lstrip().startswith(gold)
        assert name != "byte" or decoded(tokenizer, ids[last + 1 :]).startswith(gold)


def test_texts_that_are_read_in_parts_give_the_positions_of_whole_texts(tokenizers: dict):
    tokenizer = tokenizers["byte-level BPE"]
    rows = [tokenizer(text).input_ids for text in SAMPLES]
    width = max(map(len, rows))
    for left in (False, True):
        padding = [[0] * (width - len(row)) for row in rows]
        ids = torch.tensor([p + r if left else r + p for p, r in zip(padding, rows, strict=True)])
        real = torch.tensor([
            [0] * len(p) + [1] * len(r) if left else [1] * len(r) + [0] * len(p)
            for p, r in zip(padding, rows, strict=True)
        ])  # fmt: skip
        pattern = "^.|=|the|你"
        matcher = Matcher(pattern, tokenizer)
        whole = matcher.masks(ids, real)
        assert not whole[real == 0].any()
        for row, text, mask in zip(rows, whole, real, strict=True):
            assert text[mask.bool()].tolist() == naive_mask(tokenizer, pattern, row)
        following, parts, order = Following(matcher, len(rows)), [], torch.arange(len(rows))
        for at, column in enumerate(ids.split(3, 1)):
            parts.append(following.read(column[order], real[order][:, : 3 * at + column.shape[1]]))
            order = order.flip(0)
            following.reorder(torch.arange(len(rows)).flip(0))
        flipped = [part if not at % 2 else part.flip(0) for at, part in enumerate(parts)]
        assert torch.equal(torch.cat(flipped, 1), whole)


def test_two_texts_that_were_one_go_on_for_themselves(tokenizers: dict):
    tokenizer = tokenizers["byte"]
    first, second = (tokenizer(text).input_ids for text in ("a你", "a佡"))
    assert first[:2] == second[:2] and len(first) == len(second) == 4
    following = Following(Matcher("佡", tokenizer), 1)
    following.read(torch.tensor([first[:2]]))  # the first byte of three
    following.reorder(torch.tensor([0, 0]))
    assert not following.read(torch.tensor([first[2:3], second[2:3]])).any()
    assert following.read(torch.tensor([first[3:], second[3:]])).tolist() == [[False], [True]]


# --- the loss ------------------------------------------------------------------------------------


def chosen(ids: Tensor, mask: Tensor, *, share: float = 0.4) -> Tensor:
    draw = torch.Generator().manual_seed(5)
    think = (torch.rand(ids.shape, generator=draw) < share) & mask.bool()
    think[1] = False  # a text without a match
    return think.long()


PRESETS: dict[str, Callable[..., QuietConfig]] = {
    "default": QuietConfig, "paper": QuietConfig.paper, "authors": QuietConfig.authors_code
}  # fmt: skip


@pytest.mark.parametrize(("preset", "left"), [
    ("default", False), ("default", True), ("paper", False), ("paper", True), ("authors", False),
])  # fmt: skip
def test_the_loss_of_given_positions_is_that_of_one_forward_pass_per_thought(
    preset: str, left: bool
):
    config = PRESETS[preset](
        thoughts=2, lookahead=3, thought_tokens=2, reinforce_weight=2.0, base_nll_weight=0.5,
        positions="answer", positions_per_chunk=2,
    )  # fmt: skip
    ids, mask = texts([9, 6, 8], left=left)
    assert_equal_to_naive(quiet(tiny(), config), ids, mask, chosen(ids, mask))


def test_a_mask_of_all_positions_is_thinking_at_all_positions():
    config = QuietConfig(thoughts=2, lookahead=2, thought_tokens=2, gate_weight=1.0)
    ids, mask = texts([9, 6])
    model, thoughts = quiet(tiny(), config), drawn(config, ids)
    everywhere = model(ids, mask, think_mask=torch.ones_like(ids), thoughts=thoughts)
    expected = model(ids, mask, thoughts=thoughts)
    torch.testing.assert_close(everywhere.loss, expected.loss, rtol=1e-12, atol=0)
    torch.testing.assert_close(everywhere.reward, expected.reward, rtol=1e-12, atol=1e-15)


def test_the_gate_s_loss_is_a_mean_over_the_positions_that_think():
    sizes: dict[str, Any] = {"thoughts": 2, "lookahead": 2, "thought_tokens": 2}
    ids, mask = texts([9, 6])
    think = chosen(ids, mask)
    gated = quiet(tiny(), QuietConfig(gate_weight=2.0, **sizes))
    assert gated.gate is not None
    torch.nn.init.normal_(tensor(gated.gate.layers[-1].weight))
    thoughts = drawn(gated.quiet_config, ids)
    plain = quiet(tiny(), QuietConfig(**sizes))
    whole = plain(ids, mask, thoughts=thoughts)
    gain = (whole.log_prob_with_BNJK[..., 0].mean(1) - whole.log_prob_without_BT[:, :-1]).detach()
    with torch.no_grad():
        hidden = gated.base(ids[:1], output_hidden_states=True).hidden_states[-1][0, :-1]
        errors = (gated.gate(hidden) - gain[0])[think[0, :-1].bool()] ** 2
    with torch.no_grad():
        extra = gated(ids, mask, think_mask=think, thoughts=thoughts).loss
        extra = extra - plain(ids, mask, think_mask=think, thoughts=thoughts).loss
    assert float(extra) == pytest.approx(2.0 * float(errors.mean()), rel=1e-9)


@pytest.mark.parametrize("base_nll_weight", [0.0, 0.5])
def test_a_batch_without_a_match_trains_the_rest_or_nothing(base_nll_weight: float):
    config = QuietConfig(
        thoughts=2, lookahead=2, thought_tokens=2, positions="answer", gate_weight=1.0,
        base_nll_weight=base_nll_weight,
    )  # fmt: skip
    ids, mask = texts([9, 6])
    model = quiet(tiny(), config)
    out = model(ids, mask, think_mask=torch.zeros_like(ids), seed=0)
    out.loss.backward()
    log_p = model.base(ids[:1]).logits.log_softmax(-1)[0, :-1].gather(1, ids[0, 1:, None])
    short = model.base(ids[1:, :6]).logits.log_softmax(-1)[0, :-1].gather(1, ids[1, 1:6, None])
    expected = -torch.cat([log_p, short]).mean() * base_nll_weight
    torch.testing.assert_close(out.loss.detach(), expected.detach(), rtol=1e-9, atol=1e-12)
    gradients = [one.grad for one in model.parameters() if one.grad is not None]
    assert all(bool(torch.isfinite(one).all()) for one in gradients)
    assert any(bool(one.any()) for one in gradients) == bool(base_nll_weight)
    for name, value in out.items():
        assert bool(torch.isfinite(value).all()), name
    assert out.entropy is None and not out.factor_BJ.any()


def test_a_mask_that_does_not_fit_is_refused():
    model = quiet(tiny(), QuietConfig(positions="pattern", positions_pattern="="))
    ids, mask = texts([9, 6])
    with pytest.raises(ValueError, match="positions='pattern' needs think_mask"):
        model(ids, mask)
    with pytest.raises(ValueError, match=r"shape of input_ids, \[2, 9\], got \[9\]"):
        model(ids, mask, think_mask=torch.ones(9))


# --- training ------------------------------------------------------------------------------------

ROWS = [f"Q: What is {a} + {b}?\nA: {a} + {b} = {a + b}." for a in range(4) for b in range(4)]


def made(folder: Path, **changes: Any) -> tuple[QuietLM, PreTrainedTokenizerBase]:
    torch.manual_seed(0)
    tokenizer = AutoTokenizer.from_pretrained(folder)
    base = AutoModelForCausalLM.from_pretrained(folder)
    sizes: dict = {"thought_tokens": 2, "lookahead": 2, "initial_text": "A"}
    model = make_quiet(base, tokenizer, QuietConfig(**(sizes | changes)))
    torch.nn.init.normal_(tensor(model.mixing.layers[-1].weight), std=2.0)
    return model, tokenizer


def train(folder: Path, out: Path, rows: list[str], **changes: Any) -> list[dict[str, float]]:
    model, tokenizer = made(folder, **changes)
    arguments = quiet_arguments(
        out / "checkpoints", max_steps=3, learning_rate=1e-3, per_device_train_batch_size=2, use_cpu=True
    )  # fmt: skip
    data = spans(rows, tokenizer, length=64, least=4)
    return train_quiet(model, tokenizer, data, arguments, out=out)


@pytest.mark.slow
def test_training_thinks_after_matches_only_and_leaves_other_batches_alone(
    tiny_model_dir: Path, tmp_path: Path
):
    log = train(
        tiny_model_dir, tmp_path / "some", ROWS, positions="pattern", positions_pattern="= "
    )
    assert all(row["nll_with"] > 0 and row["nll_without_text"] > 0 for row in log)
    rows = [ROWS[0]] + ["Nothing here at all, and nothing there."] * 7
    log = train(tiny_model_dir, tmp_path / "few", rows, positions="pattern", positions_pattern="=")
    assert len(log) == 3
    with_match = ["nll_with" in row for row in log]
    assert not all(with_match)
    for row in log:
        assert all(value == value for value in row.values())
        assert ("nll_with" in row) == ("reward" in row)


def test_texts_without_any_match_are_refused_before_the_first_step(
    tiny_model_dir: Path, tmp_path: Path
):
    with pytest.raises(
        ValueError, match=r"None of the 16 training texts matches the pattern 'xyz'"
    ):
        train(tiny_model_dir, tmp_path, ROWS, positions="pattern", positions_pattern="xyz")
    assert not (tmp_path / "checkpoints").exists()


# --- reading and writing -------------------------------------------------------------------------


def test_a_text_is_scored_with_thoughts_after_matches_only(tiny_model_dir: Path):
    model, tokenizer = made(tiny_model_dir, positions="pattern", positions_pattern="= ?")
    text = "Tom: 3 + 40 = 43, é = 你 = 1. Q: How many apples does he have? 3 + 40 = 43, or 40 + 3 = 43."
    ids = tokenizer(text, return_tensors="pt").input_ids
    assert ids.shape[1] > 40  # positions are scored in parts
    expected = torch.tensor(naive_mask(tokenizer, "= ?", ids[0].tolist()))[:-1]
    found = score(model, ids, think_when=ThinkWhen(tokenizer=tokenizer))
    always = score(model, ids, think_when=ALWAYS)
    assert torch.equal(found.thinks_BT[0], expected) and expected.any() and not expected.all()
    torch.testing.assert_close(found.with_BT[0][expected], always.with_BT[0][expected])
    assert torch.equal(found.with_BT[0][~expected], always.without_BT[0][~expected])
    assert not torch.allclose(always.with_BT, always.without_BT)
    # The same rule with another pattern, and the page's data.
    other = ThinkWhen("pattern", pattern="你", tokenizer=tokenizer)
    assert int(score(model, ids, think_when=other).thinks_BT.sum()) == 1
    _, tokens, measured = explored(model, tokenizer, "3 + 40 = 43", 20)
    assert [one.thinks for one in tokens] == naive_mask(tokenizer, "= ?", tokenizer("3 + 40 = 43").input_ids)[:-1]  # fmt: skip
    assert measured.gain_where_thinking == pytest.approx(
        sum(one.gain for one in tokens) / sum(one.thinks for one in tokens), rel=1e-4
    )


def greedy(
    model: QuietLM, tokenizer: PreTrainedTokenizerBase, text: list[int], new: int, pattern: str
) -> tuple[list[int], int]:
    """Greedy text with a thought where the decoded text so far matches, from whole passes."""
    tokens, count = list(text), 0
    for _ in range(new):
        matches = naive_mask(tokenizer, pattern, tokens)[-1]
        count += matches
        when = ALWAYS if matches else ThinkWhen("never")
        # The prediction after the last token, from the scores of a text with any token after it.
        ids = torch.tensor([[*tokens, 0]])
        found = score(model, ids, think_when=when, top=10).top_with
        assert found is not None
        likely = [int(one) for one in found[0, 0, -1] if int(one) not in model.marks.never]
        tokens.append(likely[0])
    return tokens[len(text) :], count


def test_writing_thinks_after_matches_and_nowhere_else(tiny_model_dir: Path):
    model, tokenizer = made(tiny_model_dir)
    tokenizer.padding_side = "left"
    prompts = tokenizer(["3 + 4 = 7, 12 = ", "A: "], return_tensors="pt", padding=True)
    free = model.generate(**prompts, max_new_tokens=16, eos_token_id=-1)[:, prompts.input_ids.shape[1] :]  # fmt: skip
    letters = sorted({char for char in decoded(tokenizer, free.flatten().tolist()) if char.isalnum() and char.isascii()})  # fmt: skip
    pattern = f"[{''.join(letters[::2])}]"
    when = ThinkWhen("pattern", pattern=pattern)
    ours = model.generate(
        **prompts, max_new_tokens=16, eos_token_id=-1, think_when=when, tokenizer=tokenizer
    )
    total = 0
    for row, ids, real in zip(ours, prompts.input_ids, prompts.attention_mask, strict=True):
        text = ids[real.bool()].tolist()
        expected, count = greedy(model, tokenizer, text, 16, pattern)
        assert row[len(ids) :].tolist() == expected
        total += count
    assert 0 < total < 32
    # The same in transformers' own loop, with and without a cache, and with beams.
    wrapped = QuietForCausalLM.from_quiet(model).eval()
    thinking = ThoughtParams(think_when=when)
    options: dict[str, Any] = {"max_new_tokens": 16, "do_sample": False, "eos_token_id": None,
                               "thinking": thinking, "tokenizer": tokenizer}  # fmt: skip
    for use_cache in (True, False):
        found = wrapped.generate(**prompts, use_cache=use_cache, **options)
        assert torch.equal(found, ours)
    for letter in letters:
        when = ThinkWhen("pattern", pattern=f"{letter}.", tokenizer=tokenizer)
        options["thinking"] = ThoughtParams(think_when=when)
        beams = [
            wrapped.generate(**prompts, num_beams=4, use_cache=on, **options)
            for on in (True, False)
        ]
        assert torch.equal(*beams)


def test_a_tokenizer_that_is_missing_is_asked_for(tiny_model_dir: Path):
    model, tokenizer = made(tiny_model_dir, positions="answer")
    ids = tokenizer("The answer is 4", return_tensors="pt").input_ids
    with pytest.raises(
        ValueError, match=r"needs the tokenizer: pass ThinkWhen\('trained', tokenizer"
    ):
        score(model, ids)
    with pytest.raises(ValueError, match="needs the tokenizer"):
        model.generate(ids, max_new_tokens=2)
    wrapped = QuietForCausalLM.from_quiet(model).eval()
    with pytest.raises(ValueError, match="needs the tokenizer"):
        wrapped(ids)
    wrapped.generate(ids, max_new_tokens=2, tokenizer=tokenizer)
    plain, _ = made(tiny_model_dir)
    with pytest.raises(ValueError, match="needs a pattern, because this model was not trained"):
        score(plain, ids, think_when=ThinkWhen("pattern", tokenizer=tokenizer))


def test_a_cache_is_not_continued_with_another_rule_that_reads_the_text(tiny_model_dir: Path):
    model, tokenizer = made(tiny_model_dir)
    wrapped = QuietForCausalLM.from_quiet(model).eval()
    ids = tokenizer("3 + 4 = 7", return_tensors="pt").input_ids
    cache = wrapped(ids, use_cache=True).past_key_values
    by_text = ThoughtParams(think_when=ThinkWhen("pattern", pattern="=", tokenizer=tokenizer))
    with pytest.raises(ValueError, match="must be the same from the first token"):
        wrapped(ids[:, -1:], past_key_values=cache, thinking=by_text)


# --- the command line ----------------------------------------------------------------------------


@pytest.mark.slow
def test_from_plain_text_to_a_seen_thought(tmp_path: Path, capsys):
    path = tmp_path / "sums.jsonl"
    rows = [f"{a}+{a}=b{a}+{a}+0=0{2 * a};#{2 * a}" for a in range(1, 5) for _ in range(5)]
    path.write_text("".join(json.dumps({"text": row}) + "\n" for row in rows))
    out, page = tmp_path / "run", tmp_path / "page.html"
    given = ["quiet", "train", "--text", str(path), "--quiet.thought_tokens", "2", "--max-steps", "2",
             "--quiet.lookahead", "1", "--training.use_cpu", "true"]  # fmt: skip
    answers = [*given, "--quiet.positions", "answer"]
    assert main([*answers, "--out", str(out)]) == 2
    assert "None of the 16 training texts matches" in capsys.readouterr().err
    assert main([*answers, "--task", "arithmetic", "--out", str(out), "--dry-run"]) == 0
    assert "in 16 of 16 training texts" in " ".join(capsys.readouterr().out.split())
    assert main([*answers, "--task", "arithmetic", "--out", str(out)]) == 0
    assert "where the model thinks" in capsys.readouterr().out
    model = str(out / "model")
    assert (
        main(["quiet", "explore", "--model", model, "--text", str(path), "--out", str(page)]) == 0
    )
    data = page.read_text(encoding="utf-8")
    assert data.count('"thinks": true') == 1 and data.count('"thinks": false') > 5
    # A pattern that YAML would read as a comment.
    assert main([*given, "--quiet.positions", "pattern", "--pattern", "#", "--out", str(out / "2"), "--dry-run"]) == 0  # fmt: skip
    assert main([*given, "--quiet.positions", "pattern", "--quiet.positions_pattern", "#", "--out", str(out)]) == 2  # fmt: skip
    assert "Use --pattern" in capsys.readouterr().err
    assert main([*given, "--task", "gsm8k", "--out", str(out)]) == 2
    assert "only with --quiet.positions answer" in capsys.readouterr().err
    assert main(["quiet", "generate", "1+1=", "--model", model, "--pattern", "="]) == 2
    assert "--think-when pattern" in capsys.readouterr().err
