"""Steps and their values: against naive twins, a policy that can be enumerated, and sums by hand."""

import itertools
import json
import math
import random
from collections.abc import Sequence
from fractions import Fraction
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

from selftaught.records import Problem, Rollout, Text
from selftaught.rollouts.steps import (
    Chosen,
    Decode,
    SplitBy,
    ValuedRollout,
    advantages,
    first_pit,
    prefix_pair,
    split_steps,
    step_pair,
    step_preferences,
    step_value,
    text_after,
    truncated_pair,
)

END = 0
CORPUS = ["3 + 4 = 7\nThe answer is 7.\n\n", "Step 1: add. Step 2: carry.\n", "  1. So\n2) then; "]


def character_decode(ids):
    """A tokenizer of one token per character; 0 is the end token and has no text."""
    return "".join(chr(one) for one in ids if one != END)


def characters(text):
    return tuple(ord(one) for one in text)


@pytest.fixture(scope="module")
def bpe():
    """A byte-level BPE as GPT-2's: a character may lie across tokens."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=320,
        special_tokens=["<|end|>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    tokenizer.train_from_iterator(CORPUS, trainer)
    return tokenizer


@pytest.fixture(scope="module")
def pieces():
    """A tokenizer as Llama 2's: blanks as a mark, bytes where a character is unknown, and a decoder
    that takes the first blank of a text away."""
    vocab = {"<unk>": 0} | {f"<0x{byte:02X}>": 1 + byte for byte in range(256)}
    for one in ["▁", *"aeinorstTxh0123456789+=.;:", "▁=", "▁+", "▁T", "Th", "▁Th", "e▁"]:
        vocab.setdefault(one, len(vocab))
    merges = [("▁", "="), ("▁", "+"), ("▁", "T"), ("T", "h"), ("▁T", "h"), ("e", "▁")]
    tokenizer = Tokenizer(models.BPE(vocab, merges, byte_fallback=True, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(split=False)
    tokenizer.decoder = decoders.Sequence(
        [
            decoders.Replace("▁", " "),
            decoders.ByteFallback(),
            decoders.Fuse(),
            decoders.Strip(" ", 1, 0),
        ]
    )
    return tokenizer


def texts_of(ids, ends, decode=character_decode):
    return [decode(ids[first:end]) for first, end in itertools.pairwise([0, *ends])]


def split(text, by: SplitBy = "newline", separator=";"):
    ids = characters(text)
    return texts_of(ids, split_steps(ids, character_decode, by, separator))


# Where steps end


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("3+4=7\n7*2=14\nSo 14", ["3+4=7\n", "7*2=14\n", "So 14"]),
        ("a\n\n  b\n", ["a\n\n  ", "b\n"]),
        ("a \r\n b", ["a \r\n ", "b"]),
        ("\n\n a\nb", ["\n\n a\n", "b"]),
        ("one step", ["one step"]),
        ("a\n \t\n", ["a\n \t\n"]),
        (" \n ", [" \n "]),
        ("", []),
    ],
)
def test_a_step_is_a_line_with_the_blanks_after_it(text, steps):
    assert split(text) == steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("It is 3.5 + 2. So 5.5! Why? Yes", ["It is 3.5 + 2. ", "So 5.5! ", "Why? ", "Yes"]),
        ("Dr. Lee has 3. He (e.g. today) buys 4.\n7", ["Dr. Lee has 3. ", "He (e.g. today) buys 4.\n", "7"]),
        ('He said "No." Then **left.** So', ['He said "No." ', "Then **left.** ", "So"]),
        ("1. Add them. 2. Carry.\n3. Done", ["1. Add them. ", "2. Carry.\n", "3. Done"]),
        ("Wait... 1.5.2 no", ["Wait... ", "1.5.2 no"]),
        ("so x = 7. Then 8.", ["so x = 7. ", "Then 8."]),
    ],
)  # fmt: skip
def test_a_step_is_a_sentence_and_a_decimal_point_ends_none(text, steps):
    assert split(text, "sentence") == steps


@pytest.mark.parametrize(
    ("text", "steps"),
    [
        ("So:\n1. Add\n the ones\n2) Carry\n10) Done", ["So:\n", "1. Add\n the ones\n", "2) Carry\n", "10) Done"]),
        ("Step 1: a\nstep 2 b\n\n**Step 3:** c\n### Step 4\nd", ["Step 1: a\n", "step 2 b\n\n", "**Step 3:** c\n", "### Step 4\nd"]),
        ("a\n3.5 is half of 7\n40 + 3\nStepping 3\n  1. b", ["a\n3.5 is half of 7\n40 + 3\nStepping 3\n  ", "1. b"]),
        ("1. only", ["1. only"]),
    ],
)  # fmt: skip
def test_a_step_begins_with_a_number_or_the_word_step(text, steps):
    assert split(text, "numbered") == steps


def test_a_step_ends_with_a_string_of_ones_own():
    assert split("a; b;;c ; ", "separator") == ["a; ", "b;;", "c ; "]
    assert split("a.b(c.b(", "separator", ".b(") == ["a.b(", "c.b("]
    assert split("a\n\nb\nc", "separator", "\n\n") == ["a\n\n", "b\nc"]


@pytest.mark.parametrize("separator", ["", "\ufffd"])
def test_what_separates_nothing_is_refused(separator):
    with pytest.raises(ValueError, match="separator must have"):
        split("a", "separator", separator)
    with pytest.raises(ValueError, match="newline, sentence, numbered, separator; got 'word'"):
        split("a", "word")  # pyright: ignore[reportArgumentType]


def test_an_end_token_without_text_belongs_to_the_last_step():
    ids = (*characters("a\nb\n"), END)
    assert split_steps(ids, character_decode) == [2, 5]
    assert split_steps((END,), character_decode) == [1]


def chunk_decode(chunks: Sequence[bytes]) -> Decode:
    """Decode of a tokenizer with any bytes as its tokens; a token id is an index of `chunks`."""
    return lambda ids: b"".join(chunks[one] for one in ids).decode("utf-8", "replace")


def chunk_ends(*chunks: bytes) -> list[int]:
    return split_steps([*range(len(chunks))], chunk_decode(chunks))


def test_a_token_that_reaches_into_the_next_step_belongs_to_the_one_before():
    assert chunk_ends(b"a\nb", b"c\n", b"d") == [1, 2, 3]
    assert chunk_ends(b"a", b"\nb", b"\n", b"c") == [3, 4]  # "\n" alone is no step
    assert chunk_ends(b"a\nb\nc", b"d") == [1, 2]
    emoji = "\U0001f600".encode()
    # the line break and half a character in one token; whole characters only count as settled
    assert chunk_ends(b"a", b"\n" + emoji[:2], emoji[2:], b"\nb") == [2, 4]


def test_a_line_break_that_a_decoder_takes_back_for_a_while_ends_a_step(pieces):
    """Llama 2's decoder makes U+FFFD of all bytes in a row, a line break too, while one is missing."""
    ids = pieces.encode("0\n\x80").ids  # a blank, 0, and the bytes 0A C2 80
    assert [pieces.decode(ids[:n]) for n in (3, 4, 5)] == ["0\n", "0\ufffd\ufffd", "0\n\x80"]
    assert split_steps(ids, pieces.decode) == [3, 5]


def runs_with_a_line_break(text):
    """Where lines end, by walking: after each run of blanks with a line break in it."""
    found, run = [], ""
    for place, one in enumerate(text):
        if not one.isspace() and "\n" in run:
            found.append(place)
        run = run + one if one.isspace() else ""
    return found


def naive_ends(ids, decode):
    """The ends of lines, with the whole prefix decoded for every number of tokens."""
    settled = [len(decode(ids[:n]).rstrip("\ufffd")) for n in range(len(ids) + 1)]
    text, ends = decode(ids), []
    for place in runs_with_a_line_break(text):
        covering = next((n for n, count in enumerate(settled) if count >= place), len(ids))
        before = settled[ends[-1]] if ends else 0
        if before >= place or not text[:place].strip():
            continue
        if ends and not text[before:place].strip():
            ends[-1] = covering
        else:
            ends.append(covering)
    if ends and (ends[-1] == len(ids) or not text[settled[ends[-1]] :].strip()):
        ends.pop()
    return [*ends, len(ids)] if ids else []


TEXTS = st.text(
    st.one_of(st.sampled_from("\n\n\n .;aTh1=+é€\U0001f600"), st.characters(codec="utf-8"))
)


@given(st.data())
def test_steps_of_any_bytes_are_those_of_the_naive_twin(data):
    whole = data.draw(st.one_of(TEXTS.map(str.encode), st.binary(max_size=60)))
    cuts = sorted(data.draw(st.sets(st.integers(0, len(whole)), max_size=20)))
    chunks = [whole[a:b] for a, b in itertools.pairwise([0, *cuts, len(whole)]) if a < b]
    assert chunk_ends(*chunks) == naive_ends([*range(len(chunks))], chunk_decode(chunks))


@given(text=TEXTS, by=st.sampled_from(["newline", "sentence", "numbered", "separator"]))
@settings(max_examples=200)
def test_steps_put_together_are_the_tokens_whatever_the_tokenizer(bpe, pieces, text, by):
    for tokenizer in (bpe, pieces):
        ids = tokenizer.encode(text).ids
        ends = split_steps(ids, tokenizer.decode, by)
        assert ends == sorted(set(ends)) and (ends[-1:] == [len(ids)] or ids == ends == [])
        steps = [ids[first:end] for first, end in itertools.pairwise([0, *ends])]
        assert [one for step in steps for one in step] == ids and all(steps)
        if by == "newline":
            assert ends == naive_ends(ids, tokenizer.decode)
    ids = characters(text)
    together = "".join(texts_of(ids, split_steps(ids, character_decode, by)))
    assert together == character_decode(ids)


@pytest.mark.parametrize("by", ["newline", "sentence", "numbered", "separator"])
@pytest.mark.parametrize("unit", ["\n", " ", ".", "a. ", "1.\n", ";", "\n1", "))) ", "Step ", "\ufffd", "a"])  # fmt: skip
def test_a_hostile_text_costs_little_more_than_its_length(by, unit):
    ids, decoded = characters(unit * (60_000 // len(unit))), 0

    def counting(some):
        nonlocal decoded
        decoded += len(some)
        return character_decode(some)

    ends = split_steps(ids, counting, by)
    assert ends[-1] == len(ids)
    assert decoded < 4 * len(ids) * math.log2(len(ids))


def test_a_text_stands_after_another_with_its_first_space(bpe, pieces):
    for tokenizer in (bpe, pieces):
        ids = tokenizer.encode("The = 1 + 2 = 3").ids
        for cut in range(len(ids) + 1):
            before = tokenizer.decode(ids[:cut])
            after = text_after(tokenizer.decode, ids[:cut], ids[cut:])
            assert before + after == tokenizer.decode(ids)
    emoji = "\U0001f600".encode()
    decode = chunk_decode([emoji[:2], emoji[2:], b"a"])
    assert text_after(decode, [0], [1, 2]).endswith("a")


# What a step is worth


def test_the_value_of_a_prefix_by_hand():
    """Of 4 continuations 1 right: of its 6 pairs 3 hold it. With n = k it is the paper's 0 or 1."""
    assert step_value(1, 4, 2) == pytest.approx(3 / 6)
    assert [step_value(right, 5, 5) for right in range(6)] == [0, 1, 1, 1, 1, 1]
    assert step_value(3, 8, 1) == pytest.approx(3 / 8)
    with pytest.raises(ValueError, match="1 <= k <= n"):
        step_value(1, 4, 5)


@pytest.mark.parametrize(("n", "k"), [(5, 5), (5, 2), (6, 1)])
def test_the_estimate_is_unbiased_over_every_possible_draw(n, k):
    q = Fraction(3, 10)
    mean = 0
    for draws in itertools.product([True, False], repeat=n):
        chance = math.prod(q if right else 1 - q for right in draws)
        mean += float(chance) * step_value(sum(draws), n, k)
    assert mean == pytest.approx(float(1 - (1 - q) ** k), abs=1e-12)


F = Fraction
TREE = {  # a policy that can be enumerated: step -> (its chance, what may follow; True is right)
    "40 + 3": (F(4, 5), {
        "= 43": (F(9, 10), True),
        "= 34": (F(1, 10), False),
    }),
    "40 - 3": (F(1, 5), {
        "= 37": (F(1, 2), {"no: 43": (F(1, 10), True), "yes: 37": (F(9, 10), False)}),
        "= 47": (F(1, 2), {"no: 43": (F(1, 2), True), "yes: 47": (F(1, 2), False)}),
    }),
}  # fmt: skip
WRONG = ("40 - 3", "= 37", "yes: 37")


def node(prefix):
    found = TREE
    for step in prefix:
        found = found[step][1]
    return found


def completions(tree, chance):
    """Every way to go on, as (chance, right)."""
    if isinstance(tree, bool):
        return [(chance, tree)]
    return [c for part, after in tree.values() for c in completions(after, chance * part)]


def exact(prefix, k=1) -> Any:
    """The value as a fraction; the package computes with floating-point numbers."""
    q = sum(chance for chance, right in completions(node(prefix), F(1)) if right)
    return 1 - (1 - q) ** k


def drawn(prefix, rng):
    tree = node(prefix)
    while not isinstance(tree, bool):
        tree = rng.choices([after for _, after in tree.values()], [c for c, _ in tree.values()])[0]
    return tree


def prefixes(path):
    return [path[:steps] for steps in range(len(path) + 1)]


def test_values_and_pits_of_a_policy_known_in_full():
    """By hand: q is 4/5*9/10 + 1/5*(1/2*1/10 + 1/2*1/2) = 78/100 before any step, 3/10 after the
    first of the wrong completion, 1/10 after the second, 0 at its end. Best-of-2 makes of these
    1 - (22/100)^2, 51/100, 19/100, 0."""
    values = [exact(prefix) for prefix in prefixes(WRONG)]
    assert values == [F(78, 100), F(3, 10), F(1, 10), 0]
    assert advantages(values) == [F(-48, 100), F(-2, 10), F(-1, 10)]
    best_of_2 = [exact(prefix, 2) for prefix in prefixes(WRONG)]
    assert best_of_2 == [1 - F(22, 100) ** 2, F(51, 100), F(19, 100), 0]
    for exactly in (values, best_of_2):
        assert first_pit([*map(float, exactly)], "lowest_advantage") == 0
        assert first_pit([*map(float, exactly)], "lowest_value") == 2
        assert first_pit([*map(float, exactly)], "first_zero") == 2


@pytest.mark.parametrize("k", [1, 2, 5])
def test_estimates_from_many_draws_reach_the_exact_values(k):
    """4,000 draws in fours of k: within five standard errors of the enumerated value."""
    rng, groups, n = random.Random(0), 4_000 // (4 * k), 4 * k
    for prefix in prefixes(WRONG):
        found = [step_value(sum(drawn(prefix, rng) for _ in range(n)), n, k) for _ in range(groups)]
        mean = sum(found) / groups
        spread = math.sqrt(sum((one - mean) ** 2 for one in found) / (groups - 1))
        assert abs(mean - exact(prefix, k)) <= 5 * spread / math.sqrt(groups) + 1e-12


def test_the_mean_advantage_of_the_next_step_is_nothing():
    """Averaged over the policy's own next step, Q after it is the value before it, when k = 1."""
    for prefix in [(), ("40 + 3",), ("40 - 3",), ("40 - 3", "= 47")]:
        ways = node(prefix)
        gained = sum(
            part * advantages([exact(prefix), exact((*prefix, step))])[0]
            for step, (part, _) in ways.items()
        )
        assert gained == 0


@pytest.mark.parametrize(
    ("values", "lowest_value", "lowest_advantage", "first_zero"),
    [
        ([1, 1, 0, 0], 1, 1, 1),  # one fall: all agree, and the first of two zeros
        ([0.9, 0.3, 0.2, 0], 2, 0, 2),
        ([1, 0.4, 0.8, 0.2, 0], 3, 0, 3),  # two falls of 0.6, equal but for rounding: the first
        ([0, 0, 0], None, None, 0),  # lost before it began
        ([0, 1, 0], None, 1, 1),
        ([0.5, 0.6, 1], None, None, None),  # a right completion that only gains
        ([0.5, 0.2, 1], 0, 0, None),
        ([1, 0.2, 0.2 + 1e-15, 1], 0, 0, None),
        ([0.5], None, None, None),
    ],
)
def test_the_first_pit_by_hand(values, lowest_value, lowest_advantage, first_zero):
    assert first_pit(values, "lowest_value") == lowest_value
    assert first_pit(values, "lowest_advantage") == lowest_advantage
    assert first_pit(values, "first_zero") == first_zero


def test_no_values_and_no_rule_are_refused():
    with pytest.raises(ValueError, match="must contain the value before the first step"):
        advantages([])
    with pytest.raises(ValueError, match="first_zero; got 'lowest'"):
        first_pit([1, 0], "lowest")  # pyright: ignore[reportArgumentType]


def valued(steps=WRONG, prompt: Text = "Q: 40 + 3\nA:"):
    """The wrong completion of the enumerable policy, a line per step, with exact values."""
    texts = [f"{step}\n" for step in steps]
    ids = (*characters("".join(texts)), END)
    ends = [*itertools.accumulate(map(len, texts))]
    ends[-1] += 1
    rollout = Rollout(Problem("p", "40 + 3", "43"), prompt, "".join(texts), "stop", "m", 0,
                      token_ids=ids, answer="37", outcome="wrong")  # fmt: skip
    values = tuple(float(exact(prefix)) for prefix in prefixes(steps))
    return ValuedRollout(rollout, tuple(ends), values, ((78, 100), (30, 100), (10, 100), (0, 0)))


def test_a_valued_rollout_comes_back_from_json():
    one = valued()
    assert ValuedRollout.from_dict(json.loads(json.dumps(one.to_dict()))) == one
    assert one.prefix(0) == () and one.prefix(3) == one.token_ids
    assert [character_decode(one.step(index)) for index in range(3)] == [f"{s}\n" for s in WRONG]
    assert list(one.ends) == split_steps(one.token_ids, character_decode)
    assert one.advantages == pytest.approx([-0.48, -0.2, -0.1])
    assert (one.pit("lowest_advantage"), one.pit("lowest_value")) == (0, 2)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"ends": (7, 12)}, r"end with 21, the number of tokens; got \(7, 12\)"),
        ({"ends": (12, 7, 21)}, "must increase and end with 21"),
        ({"values": (1.0, 0.0)}, "Expected 4 values and counts for 3 steps; got 2 values"),
    ],
)
def test_ends_and_values_that_do_not_fit_are_refused(changed, said):
    row = valued().to_dict() | changed
    with pytest.raises(ValueError, match=said):
        ValuedRollout.from_dict(row)
    row["rollout"]["token_ids"] = None
    with pytest.raises(ValueError, match="slices of the sampled token ids"):
        ValuedRollout.from_dict(row)


# What to prefer

RIGHT_IDS = (*characters("40 + 3\n= 43\nso 43\n"), END)
RIGHT = Chosen(RIGHT_IDS, (7, 12, 19))


def test_a_prefix_pair_is_a_whole_right_completion_against_the_prefix_to_the_pit():
    pair = prefix_pair(valued(), 1, RIGHT, decode=character_decode, end=END)
    assert pair is not None
    assert (pair.prefix_tokens, pair.prompt) == ((), "Q: 40 + 3\nA:")
    assert pair.chosen_ids == RIGHT_IDS and pair.chosen == "40 + 3\n= 43\nso 43\n"
    assert pair.rejected_ids == characters("40 - 3\n= 37\n") and pair.rejected == "40 - 3\n= 37\n"
    unended = Chosen(RIGHT_IDS[:-1], (7, 12, 18))
    assert prefix_pair(valued(), 1, unended, decode=character_decode, end=END) == pair
    last = prefix_pair(valued(), 2, RIGHT, decode=character_decode, end=END)
    assert last is not None and last.rejected_ids == valued().token_ids  # its end token included


def test_a_step_pair_shares_the_prefix_before_the_pit_and_has_one_step_each():
    going_on = Chosen((*characters("= 47\nno: 43\n"), END), (5, 13))
    pair = step_pair(valued(), 1, going_on, decode=character_decode)
    assert pair is not None
    assert pair.prefix_tokens == characters("40 - 3\n")
    assert (pair.chosen, pair.rejected) == ("= 47\n", "= 37\n")
    assert (pair.chosen_ids, pair.rejected_ids) == (characters("= 47\n"), characters("= 37\n"))
    first = step_pair(valued(), 0, RIGHT, decode=character_decode)
    assert first is not None and first.prefix_tokens == () and first.chosen == "40 + 3\n"
    # the last step of a completion keeps the token that ends it
    ending = Chosen((*characters("no: 43\n"), END), (8,))
    last = step_pair(valued(), 2, ending, decode=character_decode)
    assert last is not None and last.chosen_ids == ending.token_ids
    assert last.rejected_ids == (*characters("yes: 37\n"), END)


def test_a_truncated_pair_ends_neither_side_unless_all_is_kept():
    message_text = {"decode": character_decode, "end": END}
    pair = truncated_pair(valued(), 1, RIGHT, **message_text)
    assert pair is not None and pair.prefix_tokens == ()
    assert (pair.chosen, pair.rejected) == ("40 + 3\n= 43\n", "40 - 3\n= 37\n")
    assert pair.chosen_ids is not None and pair.rejected_ids is not None
    assert END not in (*pair.chosen_ids, *pair.rejected_ids)
    shorter = truncated_pair(valued(), 1, RIGHT, kept=1, **message_text)
    assert shorter is not None and shorter.chosen == "40 + 3\n"
    whole = truncated_pair(valued(), 1, Chosen(RIGHT_IDS[:-1], (7, 12, 18)), kept=9, **message_text)
    assert whole is not None and whole.chosen_ids == RIGHT_IDS
    with pytest.raises(ValueError, match="kept must be at least 1 step"):
        truncated_pair(valued(), 1, RIGHT, kept=0, **message_text)


def test_two_sides_that_are_the_same_make_no_preference():
    same = Chosen((*characters("= 37\nno: 43\n"), END), (5, 13))
    assert step_pair(valued(), 1, same, decode=character_decode) is None
    assert step_pair(valued(), 1, Chosen((), ()), decode=character_decode) is None
    wrong = Chosen(valued().token_ids, valued().ends)
    assert truncated_pair(valued(), 1, wrong, decode=character_decode, end=END) is None


def test_every_right_text_makes_a_preference_in_each_form():
    going_on = Chosen((*characters("= 47\nno: 43\n"), END), (5, 13))
    same = Chosen((*characters("40 - 3\nno: 43\n"), END), (7, 15))
    message_text = {"rule": "lowest_advantage", "decode": character_decode, "end": END}
    pairs = step_preferences(valued(), form="step", chosen=[RIGHT, going_on, same], **message_text)
    assert [(p.prefix_tokens, p.chosen, p.rejected) for p in pairs] == [
        ((), "40 + 3\n", "40 - 3\n"),
        ((), "= 47\n", "40 - 3\n"),
    ]
    (pair,) = step_preferences(valued(), form="prefix", chosen=[RIGHT], **message_text)
    assert pair == prefix_pair(valued(), 0, RIGHT, decode=character_decode, end=END)
    (pair,) = step_preferences(valued(), form="truncated", chosen=[RIGHT], kept=2, **message_text)
    assert (pair.chosen, pair.rejected) == ("40 + 3\n= 43\n", "40 - 3\n")
    with pytest.raises(ValueError, match="form must be one of prefix, step, truncated; got 'both'"):
        step_preferences(valued(), form="both", chosen=[], **message_text)  # pyright: ignore[reportArgumentType]


def test_a_completion_without_a_pit_makes_no_preference():
    row = valued().to_dict() | {"values": (0.5, 0.6, 0.7, 1.0)}
    one = ValuedRollout.from_dict(row)
    message_text = {"rule": "lowest_value", "decode": character_decode, "end": END}
    assert step_preferences(one, form="prefix", chosen=[RIGHT], **message_text) == []


def test_a_chat_is_answered_by_a_message():
    asked: Text = [{"role": "user", "content": "40 + 3"}]
    pair = prefix_pair(valued(prompt=asked), 0, RIGHT, decode=character_decode, end=END)
    assert pair is not None
    assert pair.rejected == [{"role": "assistant", "content": "40 - 3\n"}]


def test_sides_of_a_pair_are_slices_of_what_the_model_produced(bpe):
    """Tokenized again, a prefix may come out differently; the tokens here are cut, never made."""
    ids = tuple(bpe.encode("The answer\nis\n\n7 + 4 = 7\nThe end").ids)
    ends = split_steps(ids, bpe.decode)
    rollout = Rollout(Problem("p", "q", "7"), "Q", bpe.decode(ids), "length", "m", 0, token_ids=ids)
    one = ValuedRollout(rollout, tuple(ends), (1.0, 1.0, 0.0, 0.0, 0.0), ((5, 5),) * 5)
    right = Chosen(tuple(bpe.encode("4 + 3 = 7\n").ids), (1,))
    pair = step_pair(one, 1, right, decode=bpe.decode)
    assert pair is not None and pair.rejected_ids is not None
    assert (*pair.prefix_tokens, *pair.rejected_ids) == ids[: ends[1]]
    assert pair.rejected == "is\n\n"
