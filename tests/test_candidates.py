"""Choosing among candidates, on sums done by hand."""

import pytest

from selftaught.evaluation.candidates import candidates_of, chosen, powers, share, vote
from selftaught.metrics import share_interval
from selftaught.records import Problem, Rollout

ONE, TWO = Problem("one", "1?", "1000"), Problem("two", "2?", "yes")


def rolled(problem: Problem, answer: str | None, outcome) -> Rollout:
    return Rollout(problem, "seen", str(answer), "stop", "m", 0, answer=answer, outcome=outcome)


ROLLOUTS = [
    rolled(ONE, "1,000", "right"), rolled(TWO, "No.", "wrong"),
    rolled(ONE, "7", "wrong"), rolled(TWO, "YES", "right"),
    rolled(ONE, "1000.0", "right"), rolled(TWO, None, "no answer"),
    rolled(ONE, "7.0", "wrong"), rolled(TWO, "no", "wrong"),
]  # fmt: skip
# of one: -1, -2, -4, -1.5; of two: -9, -8, -1, -9
SCORES = [-1.0, -9.0, -2.0, -8.0, -4.0, -1.0, -1.5, -9.0]


@pytest.mark.parametrize(
    ("left", "right"),
    [("1,000", "1000.0"), ("1000", " 1000. "), ("1e3", "1000"), ("1/2", "0.5"), ("Yes.", "yes"),
     ("$7$", "7"), ("$7", "7 dollars"), ("50%", "50 %"), ("two  words", "Two words"),
     ("-0", "0")],
)  # fmt: skip
def test_answers_that_are_the_same_have_one_vote(left: str, right: str):
    assert vote(left) == vote(right) is not None


@pytest.mark.parametrize(
    ("left", "right"), [("1,000", "100"), ("5", "-5"), ("50%", "0.5"), ("a", "b"), ("3 cm", "3 m")]
)
def test_answers_that_differ_do_not(left: str, right: str):
    assert vote(left) != vote(right)


def test_no_answer_has_no_vote():
    assert vote(None) is None


def test_candidates_stand_by_problem_in_their_order():
    found = candidates_of(ROLLOUTS, SCORES)
    assert found.right == [[True, False, True, False], [False, True, False, False]]
    assert found.scores == [[-1.0, -2.0, -4.0, -1.5], [-9.0, -8.0, -1.0, -9.0]]
    assert found.answers[0] == ["1000", "7", "1000", "7"]
    assert found.answers[1] == ["no", "yes", None, "no"]
    assert found.n == 4
    assert candidates_of(ROLLOUTS[:-1]).n == 3
    with pytest.raises(ValueError, match="problem 'one' has no outcome"):
        candidates_of([rolled(ONE, "7", None)])
    with pytest.raises(ValueError, match="got none"):
        candidates_of([])


@pytest.mark.parametrize(
    ("way", "k", "expected"),
    [
        ("sample", 1, [2 / 4, 1 / 4]),
        ("sample", 4, [2 / 4, 1 / 4]),
        ("pass", 1, [2 / 4, 1 / 4]),
        ("pass", 2, [1 - 1 / 6, 1 - 3 / 6]),  # one pair of one's wrong ones, three of two's
        ("pass", 4, [1, 1]),
        ("majority", 1, [2 / 4, 1 / 4]),
        # a tie in one; in two no, no -> no; yes with none -> yes; yes with no (twice) -> a tie
        ("majority", 2, [1 / 2, (1 + 1 / 2 + 1 / 2) / 6]),
        ("majority", 4, [1 / 2, 0]),
        ("best", 1, [2 / 4, 1 / 4]),
        # of one: the pairs with the -1, and none of -1.5, -2, -4; of two: those with -8, not with -1
        ("best", 2, [3 / 6, 2 / 6]),
        ("best", 4, [1, 0]),
        # one: e^0 + e^-3 = 1.05 against e^-1 + e^-0.5 = 0.97; two: None, the highest, has no vote, and
        # e^-7 is more than 2 e^-8
        ("weighted", 4, [1, 1]),
    ],
)
def test_each_rule_of_choice_is_right_as_often_as_by_hand(way, k, expected):
    assert chosen(candidates_of(ROLLOUTS, SCORES), way, k) == pytest.approx(expected)


def test_a_weighted_choice_of_one_is_near_the_accuracy():
    """100 draws; 4 deviations of 1/2 over their root are 0.2."""
    found = chosen(candidates_of(ROLLOUTS, SCORES), "weighted", 1)
    assert found == pytest.approx([0.5, 0.25], abs=0.2)


def test_weights_are_relative_so_that_small_probabilities_stay():
    """exp(-5000) is 0 in floating point."""
    far = [score - 5000 for score in SCORES]
    assert chosen(candidates_of(ROLLOUTS, far), "weighted", 4) == [1, 1]


@pytest.mark.parametrize("way", ["best", "weighted"])
def test_scores_are_wanted_where_they_choose(way):
    with pytest.raises(ValueError, match=f"scores for the choice '{way}'"):
        chosen(candidates_of(ROLLOUTS), way, 2)


def test_a_share_has_its_interval():
    assert share([0.25, 0.75]) == (0.5, *share_interval([0.25, 0.75]))


@pytest.mark.parametrize(
    ("n", "ks"),
    [(1, [1]), (2, [1, 2]), (3, [1, 2, 3]), (4, [1, 2, 4]), (48, [1, 2, 4, 8, 16, 32, 48]),
     (64, [1, 2, 4, 8, 16, 32, 64])],
)  # fmt: skip
def test_powers_of_two_end_with_all(n: int, ks: list[int]):
    assert powers(n) == ks


def test_weights_of_any_size_are_relative_to_their_own_subset():
    """Right, wrong, wrong at 0, -800 and -900: of two candidates the higher scored one decides."""
    one = Problem("p", "q", "1")
    rollouts = [rolled(one, "1", "right"), rolled(one, "2", "wrong"), rolled(one, "3", "wrong")]
    among = candidates_of(rollouts, [0.0, -800.0, -900.0])
    shares = chosen(among, "weighted", 2)
    pairs_with_the_right_one = shares[0]
    # of the pairs (0, 1), (0, 2), (1, 2) the first two are right; 100 drawn ones come near 2/3
    assert 0.5 < pairs_with_the_right_one < 0.85
    wrong = [rolled(one, "1", "wrong"), rolled(one, "2", "right"), rolled(one, "3", "wrong")]
    # right only in the pair (1, 2): with weights that vanish there, it would be half right
    assert 0.2 < chosen(candidates_of(wrong, [0.0, -800.0, -900.0]), "weighted", 2)[0] < 0.47
