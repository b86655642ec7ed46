from itertools import combinations
from math import comb, inf, isinf, nan, sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selftaught.metrics import (
    accuracy,
    best_of_k,
    clustered_interval,
    difference_interval,
    efficiency,
    majority_at_k,
    mean_interval,
    pass_at_k,
    share_interval,
    weighted_majority_at_k,
    wilson,
)

NEWCOMBE = [  # Newcombe 1998, Statistics in Medicine 17, Table I, method 3
    (81, 263, 0.2553, 0.3662),
    (15, 148, 0.0624, 0.1605),
    (0, 20, 0.0000, 0.1611),
    (1, 29, 0.0061, 0.1718),
]


@pytest.mark.parametrize(("right", "n", "low", "high"), NEWCOMBE)
def test_wilson_gives_the_published_intervals(right, n, low, high):
    assert wilson(right, n) == pytest.approx((low, high), abs=5e-5)


@given(st.integers(1, 400).flatmap(lambda n: st.tuples(st.integers(0, n), st.just(n))))
def test_wilson_holds_the_shares_that_a_score_test_would_not_reject(counts):
    """The ends solve (p - x)^2 = 1.96^2 x (1 - x) / n, the definition of the score interval."""
    right, n = counts
    for end in wilson(right, n):
        assert (right / n - end) ** 2 == pytest.approx(1.959964**2 * end * (1 - end) / n, abs=1e-6)
    low, high = wilson(right, n)
    assert 0 <= low <= right / n <= high <= 1
    mirrored = wilson(n - right, n)
    assert mirrored == pytest.approx((1 - high, 1 - low))


def test_without_a_sample_nothing_is_known():
    assert wilson(0, 0) == clustered_interval([]) == mean_interval([]) == (0, 1)


def test_accuracy_is_a_share_and_refuses_what_is_none():
    assert accuracy(3, 4) == 0.75
    with pytest.raises(ValueError, match="n at least 1; got right=0, n=0"):
        accuracy(0, 0)
    with pytest.raises(ValueError, match="got right=5, n=4"):
        accuracy(5, 4)
    with pytest.raises(ValueError, match="got right=5, n=4"):
        wilson(5, 4)


@pytest.mark.parametrize(("right", "n", "low", "high"), NEWCOMBE)
def test_one_sample_per_problem_is_the_plain_wilson_interval(right, n, low, high):
    samples = [[True]] * right + [[False]] * (n - right)
    assert clustered_interval(samples) == pytest.approx((low, high), abs=5e-5)


def test_samples_that_always_agree_count_once_per_problem():
    """Five equal copies of each of 263 problems: the interval is nearly that of 263 samples.

    Not quite: the estimates of the two variances divide by 262 and by 1314, so the effective size
    is 1315 * (262 / 1314) = 262.2 rather than 263.
    """
    copies = [[True] * 5] * 81 + [[False] * 5] * (263 - 81)
    assert clustered_interval(copies) == pytest.approx((0.2553, 0.3662), abs=2e-4)


def test_the_clustered_interval_matches_the_clustered_standard_error():
    """Half the problems 3/4 right, half 1/4 right, 4 samples each, C = 2000 problems: p = 1/2.

    Each problem's residual sum is 4 (3/4 - 1/2) = 1 or -1, so var = C / (4 C)^2 = 1 / (16 C),
    SE = 1 / (4 sqrt(C)). Wilson differs from p +- 1.96 SE by O(1/n).
    """
    problems = 2000
    samples = [[True, True, True, False], [True, False, False, False]] * (problems // 2)
    error = 1 / (4 * sqrt(problems))
    # the clusters are *less* spread than independent samples would be: 1/(16C) = p(1-p)/n exactly
    assert clustered_interval(samples) == pytest.approx(
        (0.5 - 1.96 * error, 0.5 + 1.96 * error), abs=1e-4
    )
    apart = [[True] * 4, [False] * 4] * (problems // 2)
    assert clustered_interval(apart) == pytest.approx(
        (0.5 - 1.96 * 2 * error, 0.5 + 1.96 * 2 * error), abs=1e-4
    )


def test_at_zero_and_at_one_hundred_percent_a_problem_counts_once():
    """All right: Wilson's low end is n / (n + 1.96^2), here with n = 20 problems."""
    assert clustered_interval([[True] * 8] * 20) == pytest.approx((20 / (20 + 3.8415), 1), abs=1e-5)
    assert clustered_interval([[False] * 8] * 20) == pytest.approx((0, 0.1611), abs=5e-5)
    assert clustered_interval([[True, False]])[1] == pytest.approx(wilson(0.5, 1)[1])


@given(st.lists(st.lists(st.booleans(), max_size=4), max_size=12))
def test_a_clustered_interval_encloses_its_accuracy_and_never_beats_independent_samples(samples):
    low, high = clustered_interval(samples)
    n, right = sum(map(len, samples)), sum(map(sum, samples))
    assert 0 <= low <= high <= 1
    if n:
        assert low <= right / n + 1e-12 and right / n - 1e-12 <= high
        alone = wilson(right, n)
        assert low <= alone[0] + 1e-12 and alone[1] - 1e-12 <= high


def test_the_mean_of_groups_has_the_stratified_error():
    """Symmetric intervals of half width h in G groups give h / sqrt(G)."""
    assert mean_interval([(0.2, 0.1, 0.3)] * 4) == pytest.approx((0.15, 0.25))
    assert mean_interval([(0.5, 0.2, 0.6), (0.9, 0.5, 0.9)]) == pytest.approx((0.7 - 0.25, 0.75))


def test_one_group_keeps_its_own_interval_also_at_the_ends():
    low, high = wilson(20, 20)
    assert mean_interval([(1.0, low, high)]) == pytest.approx((low, high))
    low, high = mean_interval([(1.0, low, high)] * 5)
    assert 1 - low == pytest.approx((1 - wilson(20, 20)[0]) / sqrt(5)) and high == 1


@pytest.mark.parametrize("n", range(1, 7))
def test_pass_at_k_is_the_share_of_subsets_with_a_right_one(n):
    for right in range(n + 1):
        verdicts = [True] * right + [False] * (n - right)
        for k in range(1, n + 1):
            subsets = list(combinations(verdicts, k))
            assert pass_at_k(n, right, k) == pytest.approx(sum(map(any, subsets)) / len(subsets))


def test_pass_at_k_at_the_sizes_of_the_paper():
    """200 samples, 1 right: pass@100 is the chance that the one is among the hundred."""
    assert pass_at_k(200, 1, 100) == pytest.approx(0.5)
    assert pass_at_k(200, 50, 1) == pytest.approx(0.25)
    assert pass_at_k(100_000, 10, 50_000) == pytest.approx(1 - 2**-10, abs=1e-5)
    with pytest.raises(ValueError, match="1 <= k <= n; got n=4, right=2, k=5"):
        pass_at_k(4, 2, 5)


def vote(subset):
    """The chance that the leader of one subset is right, ties split evenly."""
    votes = {}
    for answer, holds in subset:
        if answer is not None:
            votes.setdefault(answer, []).append(holds)
    most = max(map(len, votes.values()), default=0)
    leaders = [sum(holds) / len(holds) for holds in votes.values() if len(holds) == most]
    return sum(leaders) / len(leaders) if leaders else 0.0


@given(
    st.lists(
        st.tuples(st.sampled_from(["1", "2", "3", None]), st.booleans()), min_size=1, max_size=7
    ),
    st.data(),
)
def test_majority_at_k_is_the_mean_vote_over_all_subsets(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(combinations(samples, k))
    answers, right = zip(*samples, strict=True)
    # a sample without an answer is never right
    assert majority_at_k(answers, right, k) == pytest.approx(sum(map(vote, subsets)) / len(subsets))


def test_majority_at_k_on_cases_done_by_hand():
    assert majority_at_k(["7", "7", "8"], [True, True, False], 3) == 1
    assert majority_at_k(["7", "8", "8"], [True, False, False], 3) == 0
    assert majority_at_k(["7", "8"], [True, False], 2) == 0.5
    assert majority_at_k([None, None], [False, False], 2) == 0
    assert majority_at_k(["7", "8", "8"], [True, False, False], 1) == pytest.approx(1 / 3)
    with pytest.raises(ValueError, match="got 2 answers, 1 verdicts, k=1"):
        majority_at_k(["7", "8"], [True], 1)


def best(subset):
    """The chance that the highest-scored of one subset is right, equal scores being as likely."""
    highest = max(score for score, _ in subset)
    top = [holds for score, holds in subset if score == highest]
    return sum(top) / len(top)


@given(
    st.lists(
        st.tuples(st.sampled_from([-inf, -7.25, 0.0, 1e-9, 3.0]), st.booleans()),
        min_size=1,
        max_size=7,
    ),
    st.data(),
)
def test_best_of_k_is_the_mean_over_all_subsets_of_their_highest(samples, data):
    k = data.draw(st.integers(1, len(samples)))
    subsets = list(combinations(samples, k))
    scores, right = zip(*samples, strict=True)
    assert best_of_k(scores, right, k) == pytest.approx(sum(map(best, subsets)) / len(subsets))


@given(st.lists(st.tuples(st.integers(0, 3), st.booleans()), min_size=1, max_size=40))
def test_best_of_one_is_the_accuracy_and_best_of_all_the_highest(samples):
    scores, right = zip(*samples, strict=True)
    assert best_of_k(scores, right, 1) == pytest.approx(sum(right) / len(right))
    assert best_of_k(scores, right, len(right)) == pytest.approx(best(samples))


@pytest.mark.parametrize(("n", "k"), [(3, 1), (5, 3), (16, 4), (128, 64)])
def test_best_of_k_has_the_last_term_that_the_papers_prose_leaves_out(n, k):
    """With all right it is 1, the sum to n - k of C(n-i-1, k-1) being C(n, k). The prose's limit,
    n - k - 1, leaves out the term C(k-1, k-1) = 1 of the subset of the k lowest."""
    scores = [float(-at) for at in range(n)]
    assert best_of_k(scores, [True] * n, k) == 1
    only_the_kth_lowest = [at == n - k for at in range(n)]
    assert best_of_k(scores, only_the_kth_lowest, k) == pytest.approx(1 / comb(n, k))
    only_the_highest = [at == 0 for at in range(n)]  # among k of n it is with the chance k/n
    assert best_of_k(scores, only_the_highest, k) == pytest.approx(k / n)


def test_best_of_k_on_cases_done_by_hand():
    # {3,2} right, {3,1} right, {2,1} wrong
    assert best_of_k([1.0, 3.0, 2.0], [False, True, False], 2) == pytest.approx(2 / 3)
    assert best_of_k([5.0, 5.0], [True, False], 2) == 0.5
    with pytest.raises(ValueError, match="got 2 scores, 1 verdicts, k=1"):
        best_of_k([1.0, 2.0], [True], 1)
    with pytest.raises(ValueError, match="1 <= k <= n; got 1 scores, 1 verdicts, k=2"):
        best_of_k([1.0], [True], 2)
    with pytest.raises(ValueError, match="not a number"):
        best_of_k([1.0, nan], [True, False], 1)


def weighted_vote(subset):
    """The chance that the answer with the most weight is right, ties split evenly."""
    names = {answer for answer, _, _ in subset if answer is not None}
    weight = {name: sum(one[2] for one in subset if one[0] == name) for name in names}
    shares = []
    for name in names:
        if weight[name] == max(weight.values()):
            holds = [one[1] for one in subset if one[0] == name]
            shares.append(sum(holds) / len(holds))
    return sum(shares) / len(shares) if shares else 0.0


WEIGHED = st.lists(
    st.tuples(st.sampled_from(["1", "2", "3", None]), st.booleans(), st.sampled_from([0.25, 1.0, 2.0])),
    min_size=1,
    max_size=8,
)  # fmt: skip


@given(WEIGHED)
def test_a_weighted_majority_of_all_is_the_vote_with_weights(samples):
    answers, right, weights = zip(*samples, strict=True)
    n = len(samples)
    found = weighted_majority_at_k(answers, right, weights, n)
    assert found == pytest.approx(weighted_vote(samples))
    equal = weighted_majority_at_k(answers, right, [0.125] * n, n)
    assert equal == pytest.approx(majority_at_k(answers, right, n))


def test_a_weighted_majority_of_k_comes_near_the_mean_over_all_subsets():
    """A verdict of 0 to 1 has a deviation of 1/2 at most: 4 of them over 4000 draws are 0.032."""
    samples = [("7", True, 0.9), ("8", False, 0.5), ("8", False, 0.3), ("9", False, 0.85),
               (None, False, 4.0), ("7", True, 0.2), ("8", False, 0.1)]  # fmt: skip
    answers, right, weights = zip(*samples, strict=True)
    for k in (1, 2, 4):
        subsets = list(combinations(samples, k))
        found = weighted_majority_at_k(answers, right, weights, k, draws=4000)
        assert found == pytest.approx(sum(map(weighted_vote, subsets)) / len(subsets), abs=0.032)
        again = weighted_majority_at_k(answers, right, weights, k, draws=4000)
        assert again == found
        other = weighted_majority_at_k(answers, right, weights, k, draws=4000, seed=1)
        assert other != found


def test_weight_beats_numbers():
    answers, right = ["7", "8", "8"], [True, False, False]
    assert majority_at_k(answers, right, 3) == 0
    assert weighted_majority_at_k(answers, right, [3.0, 1.0, 1.0], 3) == 1
    assert weighted_majority_at_k(answers, right, [2.0, 1.0, 1.0], 3) == 0.5
    assert weighted_majority_at_k([None, None], [False, False], [1.0, 1.0], 2) == 0
    with pytest.raises(ValueError, match="2 answers, 2 verdicts, 1 weights, k=1"):
        weighted_majority_at_k(["7", "8"], [True, False], [1.0], 1)


@pytest.mark.parametrize(("right", "n"), [(81, 263), (15, 148), (1, 29), (3, 4)])
def test_shares_of_zero_and_one_have_the_wilson_interval_of_one_sample_less(right, n):
    """A sample variance divides by n - 1, so n p (1-p) / variance is n - 1."""
    shares = [1.0] * right + [0.0] * (n - right)
    expected = wilson(right / n * (n - 1), n - 1)
    assert share_interval(shares) == pytest.approx(expected)
    if right in (0, n):
        assert share_interval(shares) == wilson(right, n)


def test_shares_that_spread_less_than_verdicts_tell_more():
    """Mean 1/2, variance 0.2/3, so the effective size is 4 * 0.25 / (0.2/3) = 15; Wilson's interval
    of 7.5 in 15 is 0.5 -+ 1.95996 sqrt(0.25/15 + 3.84146/900) / (1 + 3.84146/15) = 0.5 -+ 0.22577."""
    found = share_interval([0.2, 0.8, 0.4, 0.6])
    assert found == pytest.approx((0.5 - 0.22577, 0.5 + 0.22577), abs=1e-5)


@pytest.mark.parametrize("share", [0.1, 0.2, 0.3, 1 / 3, 0.5, 0.7, 0.9])
@pytest.mark.parametrize("n", [2, 3, 6, 7, 50])
def test_shares_that_are_all_equal_count_once_per_problem(share, n):
    """Also where the rounded mean is not quite the share."""
    assert share_interval([share] * n) == pytest.approx(wilson(share * n, n))


def test_without_shares_nothing_is_known_and_other_numbers_are_refused():
    assert share_interval([]) == (0, 1)
    assert share_interval([1.0] * 20) == pytest.approx((20 / (20 + 3.8415), 1), abs=1e-5)
    assert share_interval([0.3]) == pytest.approx(wilson(0.3, 1))
    with pytest.raises(ValueError, match="from 0 to 1"):
        share_interval([0.5, 1.5])


@given(st.lists(st.floats(0, 1), max_size=12))
def test_the_interval_of_shares_encloses_their_mean(shares):
    low, high = share_interval(shares)
    assert 0 <= low <= high <= 1
    if shares:
        assert low - 1e-12 <= sum(shares) / len(shares) <= high + 1e-12


def test_a_difference_is_taken_problem_by_problem():
    """Differences 1, 0, 0, 0: mean 1/4, variance (9/16 + 3/16) / 3 = 1/4, error sqrt(1/4 / 4) = 1/4."""
    found = difference_interval([0, 0.5, 1, 1], [1, 0.5, 1, 1])
    assert found == pytest.approx((0.25, 0.25 - 1.959964 / 4, 0.25 + 1.959964 / 4))
    assert difference_interval([1, 0], [0, 1]) == pytest.approx((0, -1.959964, 1.959964))
    assert difference_interval([0.5, 0.25], [0.75, 0.5]) == (0.25, 0.25, 0.25)
    with pytest.raises(ValueError, match="at least 2; got 2 and 3"):
        difference_interval([1, 0], [1, 0, 1])
    with pytest.raises(ValueError, match="at least 2; got 1 and 1"):
        difference_interval([1], [1])


def wrong(count, n=20):
    """Verdicts on n problems, the first so many of them wrong."""
    return [False] * count + [True] * (n - count)


CURVE = [(100, wrong(8)), (200, wrong(4)), (400, wrong(2))]
"""Errors of 0.4, 0.2 and 0.1: half as many with twice the data, but for the first."""


@pytest.mark.parametrize(
    ("own", "size", "expected"),
    [
        (4, 100, 2.0),
        (4, 50, 4.0),
        (2, 100, 4.0),
        (2, 400, 1.0),
        (3, 100, 8 / 3),  # 0.1 * 2^x = 0.15 where the size is 400 / 2^x, so 400 / 1.5
        (6, 100, 4 / 3),  # as 0.2 * 2^x = 0.3 gives 200 / 1.5
        (8, 100, 1.0),
        (9, 100, 1.0),  # worse than at the smallest size, which is taken
        (1, 100, inf),
        (0, 100, inf),
    ],
)
def test_efficiency_is_the_size_at_which_the_baseline_is_as_good(own, size, expected):
    assert efficiency(CURVE, size, wrong(own), draws=20)[0] == pytest.approx(expected)
    shuffled = [CURVE[2], CURVE[0], CURVE[1]]
    assert efficiency(shuffled, size, wrong(own), draws=20)[0] == pytest.approx(expected)


def test_a_baseline_that_gets_worse_with_more_is_taken_to_stay_as_it_was():
    """Errors 0.4, 0.2, 0.3 (taken for 0.2), 0.1: 0.15 lies between 400 and 800, at 800 / 1.5."""
    curve = [*CURVE[:2], (400, wrong(6)), (800, wrong(2))]
    assert efficiency(curve, 100, wrong(3), draws=20)[0] == pytest.approx(16 / 3)
    assert efficiency(curve, 100, wrong(4), draws=20)[0] == pytest.approx(2)


def test_an_error_of_none_is_taken_for_half_a_problem():
    """0.5 / 20 = 0.025 at 400, 0.1 at 100; 0.05 is in the middle of their logarithms, at 200."""
    curve = [(100, wrong(2)), (400, wrong(0))]
    assert efficiency(curve, 100, wrong(0), draws=20)[0] == pytest.approx(4)
    assert efficiency(curve, 100, wrong(1), draws=20)[0] == pytest.approx(2)


def test_the_interval_of_efficiency_draws_the_same_problems_for_all():
    """As good as at 200 on the very same problems, so at most 2 in every draw."""
    point, low, high = efficiency(CURVE, 100, wrong(4))
    assert (point, high) == (2, 2)
    assert 1 <= low <= 2
    assert efficiency(CURVE, 100, wrong(3)) == efficiency(CURVE, 100, wrong(3))
    point, low, high = efficiency(CURVE, 100, wrong(1))
    assert isinf(point) and isinf(high) and low <= point
    with pytest.raises(ValueError, match="the same test problems for every size"):
        efficiency([(100, wrong(8, 19))], 100, wrong(8))
    with pytest.raises(ValueError, match="the same test problems for every size"):
        efficiency([], 100, wrong(8))
