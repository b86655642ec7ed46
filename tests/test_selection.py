"""What stays and what comes out."""

import random
import re
from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selftaught.prompts import PromptStyle, chat, hinted
from selftaught.records import Example, FinishReason, Origin, Outcome, Preference, Problem, Rollout
from selftaught.rollouts.selection import (
    gold_rollouts,
    keep_at_most,
    keep_correct,
    keep_distinct,
    keep_sound,
    make_examples,
    make_preferences,
    most_distant,
    share_of,
    unsolved,
    why_dropped,
)

ONE, TWO, THREE = (Problem(name, f"{name}?", "1") for name in ("one", "two", "three"))
STYLE = PromptStyle("few_shot", shots=lambda problem: [Problem("s", "s?", "0", "shown 0")])


def rolled(
    problem: Problem, text: str, outcome: Outcome | None, origin: Origin = "sampled"
) -> Rollout:
    return Rollout(problem, "seen prompt", text, "stop", "m", 0, origin, outcome=outcome)


def test_only_right_answers_are_kept():
    right = rolled(ONE, "1", "right")
    rest = [rolled(TWO, "2", outcome) for outcome in
            ("wrong", "no answer", "cut by length", "ungradable")]  # fmt: skip
    assert keep_correct([*rest, right]) == [right]
    assert why_dropped([*rest, right]) == {
        "wrong": 1, "no answer": 1, "cut by length": 1, "ungradable": 1,
    }  # fmt: skip


def test_ungraded_rollouts_are_refused():
    with pytest.raises(ValueError, match="call grade"):
        keep_correct([rolled(ONE, "1", None)])


def test_copies_of_one_problem_go_and_those_of_two_problems_stay():
    first, copy = rolled(ONE, "a  b\n", "right"), rolled(ONE, "a b", "right")
    other = rolled(TWO, "a b", "right")
    assert keep_distinct([first, copy, other]) == [first, other]


def test_at_most_k_per_problem_keeps_the_first():
    several = [rolled(ONE, text, "right") for text in "abc"]
    other = rolled(TWO, "d", "right")
    assert keep_at_most([*several, other], 2) == [*several[:2], other]


def test_a_problem_is_unsolved_when_none_of_its_rollouts_is_right():
    rollouts = [rolled(ONE, "1", "wrong"), rolled(ONE, "1", "right"), rolled(TWO, "2", "wrong")]
    assert unsolved([ONE, TWO, THREE], rollouts) == [TWO, THREE]


def test_training_shows_the_bare_problem_whatever_was_shown_in_sampling():
    hint = hinted(STYLE, lambda p: Problem(p.id, f"{p.question} (1)", p.gold))
    shown = hint(ONE)
    assert isinstance(shown, str)
    assert "one? (1)" in shown
    rollout = Rollout(ONE, shown, " because 1", "stop", "m", 0, "rationalized", outcome="right")
    bare = PromptStyle("bare")
    assert make_examples([rollout], bare) == [Example("Q: one?\nA:", " because 1")]


def test_messages_stay_messages():
    style = chat(PromptStyle("bare"))
    (example,) = make_examples([rolled(ONE, "1", "right")], style)
    assert example.prompt == [{"role": "user", "content": "one?"}]
    assert example.completion == [{"role": "assistant", "content": "1"}]


def test_a_share_of_problems_is_repeatable_and_of_the_asked_size():
    problems = [Problem(str(i), "", "") for i in range(2000)]
    half = share_of(problems, 0.5, seed=3)
    assert half == share_of(problems, 0.5, seed=3)
    assert 900 < len(half) < 1100  # 1000 +- 4.5 standard deviations of a fair coin
    assert {p.id for p in half} != {p.id for p in share_of(problems, 0.5, seed=4)}
    assert share_of(problems, 0.0, seed=3) == []
    assert share_of(problems, 1.0, seed=3) == problems


def edits_between(left: str, right: str) -> int:
    """Levenshtein's distance, by its recurrence."""
    before = list(range(len(right) + 1))
    for i, one in enumerate(left, 1):
        row = [i]
        for j, other in enumerate(right, 1):
            row.append(min(before[j] + 1, row[-1] + 1, before[j - 1] + (one != other)))
        before = row
    return before[-1]


def algorithm_1(texts: list[str]) -> list[str]:
    """Algorithm 1 of Yuan et al. 2023 (arXiv:2308.01825), line by line."""

    def eq(text: str) -> str:
        return "|".join(re.findall("<<(.*?)>>", text))

    selected: list[str] = []
    equation_lists: list[str] = []
    for r in texts:
        if eq(r) not in equation_lists:
            selected.append(r)
            equation_lists.append(eq(r))
        else:
            (at,) = [i for i, r_s in enumerate(selected) if eq(r_s) == eq(r)]
            others = selected[:at] + selected[at + 1 :]
            own = sum(edits_between(r, r_i) for r_i in others)
            if own > sum(edits_between(selected[at], r_i) for r_i in others):
                selected[at] = r
    return selected


PIECES = ["<<1+1=2>>", "<<2+1=3>>", "<<1+2=3>>", "so ", "then we have it ", "of apples", "", "é"]


def kept_ways(texts: list[str]) -> list[str]:
    rollouts = [rolled(ONE, text, "right") for text in texts]
    return [one.completion for one in keep_distinct(rollouts, "equations")]


@given(
    st.lists(st.lists(st.sampled_from(PIECES), max_size=5).map("".join), max_size=14),
)
def test_paths_are_kept_as_algorithm_1_keeps_them(texts: list[str]):
    assert kept_ways(texts) == algorithm_1(texts)


@pytest.mark.parametrize("seed", range(4))
def test_paths_are_kept_as_algorithm_1_keeps_them_among_many(seed: int):
    draw = random.Random(seed)
    texts = ["".join(draw.choices(PIECES, k=draw.randint(0, 6))) for _ in range(80)]
    kept = algorithm_1(texts)
    first = {re.sub("[^<>0-9+=]", "", text): text for text in reversed(texts)}
    assert any(text not in first.values() for text in kept)  # some took the place of another
    assert kept_ways(texts) == kept


def test_a_farther_path_takes_the_place_of_the_one_that_was_kept():
    """Distances to 3+3=6: 1+1=2 has 3, its digits; "So 1+1=2" has those 3 and 3 letters more."""
    near, far, other = "1+1=2", "So 1+1=2", "3+3=6"
    assert kept_ways([near, other, far]) == [far, other]
    assert kept_ways([far, other, near]) == [far, other]
    assert kept_ways([near, far, other]) == [near, other]  # alone, neither is far from anything
    assert kept_ways([near, other, "2+1=3", far]) == [far, other, "2+1=3"]


def test_of_paths_that_are_equally_far_the_first_stays():
    assert kept_ways(["a 1+1=2", "3+3=6", "b 1+1=2"]) == ["a 1+1=2", "3+3=6"]


def test_paths_differ_in_the_order_of_equations_and_of_what_is_added():
    texts = ["3+4=7. 7*2=14.", "7*2=14. 3+4=7.", "4+3=7. 7*2=14.", "3+4=7."]
    assert kept_ways(texts) == texts
    assert kept_ways(["3 + 4 = 7.", "3+4=7."]) == ["3 + 4 = 7."]  # white space aside
    spans = ["It is 3+4=<<3+4=7>>7.", "We add: <<3+4=7>>", "<<3+4=7>> for 1+1=2 days"]
    assert len(kept_ways(spans)) == 1


def test_rationales_without_an_equation_are_one_path():
    assert kept_ways(["It is 7.", "Seven, by counting.", "7"]) == ["It is 7."]
    assert len(kept_ways(["It is 7.", "3+4=7", "Seven, by counting on one's fingers."])) == 2


def test_an_equation_that_does_not_hold_is_found():
    sound, unsound = rolled(ONE, "<<3+4=7>> 1+1=3", "right"), rolled(ONE, "<<3+4=8>>", "right")
    assert keep_sound([sound, unsound]) == [sound]


def test_thousands_of_rollouts_have_few_paths():
    draw = random.Random(0)
    problems = [Problem(str(at), "?", "1") for at in range(20)]
    rollouts = [
        rolled(
            problem,
            f"{'well, ' * draw.randrange(9)}{a}+{b}={a + b}. {draw.random()}",
            "right",
        )
        for _ in range(200)
        for problem in problems
        for a, b in [(draw.randrange(3), draw.randrange(3))]
    ]
    kept = keep_distinct(rollouts, "equations")
    ways = {(one.problem.id, re.findall("[0-9]\\+[0-9]", one.completion)[0]) for one in rollouts}
    assert len(kept) == len(ways) == 180
    assert [one.problem for one in kept] == [one for one in problems for _ in range(9)]


@pytest.mark.parametrize("by", ["text", "equations", "numbers", "edits"])
def test_distinct_rollouts_come_problem_by_problem_in_their_order(by):
    texts = ["9+9=18, so many words", "1+1=2", "5+2=7 for a start", "2+2=4!"]
    rollouts = [rolled(problem, text, "right") for text in texts for problem in (TWO, ONE)]
    expected = [rolled(problem, text, "right") for problem in (TWO, ONE) for text in texts]
    assert keep_distinct([*rollouts, *rollouts[3:5]], by) == expected


def test_the_same_numbers_in_the_same_order_are_one_path():
    texts = ["3 and 4 make 7", "3+4=7", "4 and 3 make 7", "3, 4, 7.0", "34 7", "seven", "VII"]
    rollouts = [rolled(ONE, text, "right") for text in texts]
    kept = [one.completion for one in keep_distinct(rollouts, "numbers")]
    assert kept == ["3 and 4 make 7", "4 and 3 make 7", "3, 4, 7.0", "34 7", "seven"]


def test_texts_a_few_edits_apart_are_one_path():
    """Of ten characters, two are a share of 0.2."""
    texts = ["abcdefghij", "abcdefghXY", "abcdefgXYZ", "abcdefghij", "abcdefgh", "abcdefg"]
    rollouts = [rolled(ONE, text, "right") for text in texts]
    kept = [one.completion for one in keep_distinct(rollouts, "edits")]
    assert kept == ["abcdefghij", "abcdefgXYZ", "abcdefg"]
    strict = [one.completion for one in keep_distinct(rollouts, "edits", edits=0.1)]
    # abcdefgXYZ is abcdefghXY with one letter in and one out; 2 of 10 is more than 0.1
    assert strict == ["abcdefghij", "abcdefghXY", "abcdefgXYZ", "abcdefgh", "abcdefg"]


@given(st.lists(st.text("ab", max_size=6), max_size=8), st.sampled_from([0.0, 0.2, 0.5]))
def test_edits_are_counted_against_every_text_kept_before(texts: list[str], edits: float):
    expected: list[str] = []
    for text in texts:
        if all(
            edits_between(text, other) > edits * max(len(text), len(other)) for other in expected
        ):
            expected.append(text)
    rollouts = [rolled(ONE, text, "right") for text in texts]
    assert [one.completion for one in keep_distinct(rollouts, "edits", edits=edits)] == expected


def test_the_most_distant_is_the_one_with_most_edits():
    near, far = rolled(ONE, "abd", "right"), rolled(ONE, "xyz", "right")
    assert most_distant([near, far], rolled(ONE, "abc", "wrong")) is far


# Preferences


def spelled(rollout: Rollout) -> tuple[int, ...]:
    return (*map(ord, rollout.completion), 0)


BARE = PromptStyle("bare")
RIGHT = {ONE: ["r1", "r2"], TWO: ["s1"], THREE: ["t1", "t2"]}
WRONG = {ONE: ["w1", "w2", "w3"], TWO: ["v1", "v2"], THREE: []}
SAMPLED = [
    rolled(problem, text, "right" if texts is RIGHT else "no answer" if at else "wrong")
    for at in range(3)
    for problem in (ONE, TWO, THREE)
    for texts in (WRONG, RIGHT)
    for text in texts[problem][at : at + 1]
]
"""Interleaved, as they come from a sampler: one's w1, r1, two's v1, s1, three's t1, one's w2, ..."""


def pairs_of(preferences: list[Preference]) -> list[tuple[str, str]]:
    return [(str(one.chosen), str(one.rejected)) for one in preferences]


def test_every_right_rollout_is_preferred_to_every_wrong_one_of_its_problem():
    found = make_preferences(SAMPLED, BARE, spelled)
    by_hand = [("r1", "w1"), ("r1", "w2"), ("r1", "w3"), ("r2", "w1"), ("r2", "w2"), ("r2", "w3"),
               ("s1", "v1"), ("s1", "v2")]  # fmt: skip
    assert sorted(pairs_of(found)) == by_hand
    assert found[0] == Preference(
        "Q: one?\nA:", "r1", "w1", chosen_ids=(114, 49, 0), rejected_ids=(119, 49, 0)
    )
    assert {str(one.prompt) for one in found[6:]} == {"Q: two?\nA:"}


def test_all_right_and_all_wrong_give_no_preference():
    right, wrong = rolled(ONE, "r", "right"), rolled(TWO, "w", "cut by length")
    assert make_preferences([right, right, wrong, wrong], BARE, spelled) == []
    assert make_preferences([], BARE, spelled) == []


def test_a_rollout_that_is_not_graded_is_no_wrong_one():
    with pytest.raises(ValueError, match="call grade"):
        make_preferences([*SAMPLED, rolled(ONE, "?", None)], BARE, spelled)


def test_of_too_many_pairs_some_are_drawn_by_the_seed():
    whole = pairs_of(make_preferences(SAMPLED, BARE, spelled))
    draws = [
        pairs_of(make_preferences(SAMPLED, BARE, spelled, at_most=2, seed=seed))
        for seed in range(60)
    ]
    again = pairs_of(make_preferences(SAMPLED, BARE, spelled, at_most=2, seed=7))
    assert draws[7] == again
    for draw in draws:
        assert len(set(draw)) == 4
        assert set(draw) <= set(whole)
        assert draw[2:] == whole[6:]  # two's pairs are not more than the two asked for
    # each of one's six pairs is drawn with the chance 2/6: 20 of 60, deviation 3.7
    counts = [sum(pair in draw for draw in draws) for pair in whole[:6]]
    assert all(6 <= count <= 34 for count in counts)
    assert make_preferences(SAMPLED, BARE, spelled, at_most=0) == []


def test_what_a_problem_draws_does_not_depend_on_the_others():
    alone = [one for one in SAMPLED if one.problem == ONE]
    for seed in range(5):
        together = make_preferences(SAMPLED, BARE, spelled, at_most=2, seed=seed)
        assert make_preferences(alone, BARE, spelled, at_most=2, seed=seed) == together[:2]


def test_a_problems_own_rationale_is_a_right_rollout():
    worked = Problem("four", "2+2?", "4", "2 and 2 are 4.")
    (gold,) = gold_rollouts([ONE, worked], BARE)
    assert (gold.correct, gold.origin, gold.answer) == (True, "gold", "4")
    assert (gold.prompt, gold.completion) == ("Q: 2+2?\nA:", " 2 and 2 are 4.")
    right, wrong = rolled(worked, "4", "right"), rolled(worked, "5", "wrong")
    found = make_preferences([gold, right, wrong], BARE, spelled)
    assert pairs_of(found) == list(product([" 2 and 2 are 4.", "4"], ["5"]))
    (message_text,) = gold_rollouts([worked], chat(BARE))
    assert message_text.completion == "2 and 2 are 4."


# The tokens that were sampled go with an example


def test_examples_have_the_tokens_of_the_rollouts_that_are_kept():
    problem = Problem("p", "1+1", "2")
    sampled: list[tuple[str, FinishReason, tuple[int, ...] | None]] = [
        ("2", "stop", (5, 0)),
        ("2 ", "stop", (6, 0)),
        ("two", "stop", None),
        ("22", "length", (7,)),
    ]
    made = [
        Rollout(problem, "Q", text, finish, "m", index, token_ids=ids, outcome="right")
        for index, (text, finish, ids) in enumerate(sampled)
    ]
    style = PromptStyle("bare")
    examples = make_examples(keep_distinct(made), style)
    assert [one.completion_ids for one in examples] == [(5, 0), None, None]
    talk = replace(style, as_messages=True, chat_template_kwargs={"enable_thinking": False})
    (first, *_) = make_examples(made, talk)
    assert first.completion == [{"role": "assistant", "content": "2"}]
    assert (first.completion_ids, first.chat_template_kwargs) == (
        (5, 0),
        {"enable_thinking": False},
    )
