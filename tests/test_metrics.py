from itertools import combinations
from math import sqrt

import pytest
from hypothesis import given
from hypothesis import strategies as st

from selftaught.metrics import (
    accuracy,
    clustered_interval,
    majority_at_k,
    mean_interval,
    pass_at_k,
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
