"""What stays and what comes out."""

import pytest

from selftaught.prompts import PromptStyle, chat, hinted
from selftaught.records import Example, Problem, Rollout
from selftaught.selection import (
    keep_at_most,
    keep_correct,
    keep_distinct,
    make_examples,
    share_of,
    unsolved,
    why_dropped,
)

ONE, TWO, THREE = (Problem(name, f"{name}?", "1") for name in ("one", "two", "three"))
STYLE = PromptStyle("few_shot", shots=lambda problem: [Problem("s", "s?", "0", "shown 0")])


def rolled(problem: Problem, text: str, outcome, origin="sampled") -> Rollout:
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
