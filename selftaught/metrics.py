"""Numbers over graded samples: accuracy with its interval, pass@k, majority@k.

All intervals are 95% and are Wilson's at heart: p ± 1.96 sqrt(p(1-p)/n) has no width at 0% and at
100%, which is where a self-training run begins and where it hopes to end.
"""

import math
from collections import Counter
from collections.abc import Sequence
from fractions import Fraction
from statistics import NormalDist

Interval = tuple[float, float]

Z = NormalDist().inv_cdf(0.975)
"""How many standard errors a 95% interval reaches to each side."""


def accuracy(right: int, n: int) -> float:
    """The share of `n` samples that are right."""
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"expected 0 <= right <= n with n at least 1; got right={right}, n={n}.")
    return right / n


def wilson(right: float, n: float) -> Interval:
    """The score interval of a proportion (Wilson 1927, p. 209); `n` may be an effective size.

    Nothing is known without a sample: n = 0 gives (0, 1).
    """
    if not 0 <= right <= n:
        raise ValueError(f"expected 0 <= right <= n; got right={right}, n={n}.")
    if n == 0:
        return 0.0, 1.0
    share, weight = right / n, Z * Z / n
    centre = (share + weight / 2) / (1 + weight)
    reach = Z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # rounding must not move the ends past the point they enclose
    return max(0.0, min(centre - reach, share)), min(1.0, max(centre + reach, share))


def clustered_interval(samples: Sequence[Sequence[bool]]) -> Interval:
    """The interval of the accuracy over several samples per problem, as `[problem][sample]`.

    Samples of one problem succeed and fail together, so they tell less than as many problems
    would. The standard error clustered by problem says how much less: Wilson's interval is taken
    at the effective sample size (Dean and Pagano 2015). With one sample per problem this is
    Wilson's interval itself; where all samples agree, a problem counts as one sample.
    """
    samples = [problem for problem in samples if problem]
    clusters, n = len(samples), sum(map(len, samples))
    if n == 0:
        return 0.0, 1.0
    share = sum(map(sum, samples)) / n
    if share in (0, 1) or clusters == 1:
        return wilson(share * clusters, clusters)
    residuals = math.fsum((sum(problem) - share * len(problem)) ** 2 for problem in samples)
    clustered = residuals / n**2 * clusters / (clusters - 1)
    independent = share * (1 - share) / (n - 1)
    effective = n / max(1.0, clustered / independent)
    return wilson(share * effective, effective)


def mean_interval(parts: Sequence[tuple[float, float, float]]) -> Interval:
    """The interval of the unweighted mean of independent accuracies, each as (accuracy, low, high).

    The variance of a stratified mean, sum of var_g / G^2, with each variance recovered from its
    group's interval, below and above apart (Zou and Donner 2008): so a group at 100% adds its
    uncertainty too.
    """
    if not parts:
        return 0.0, 1.0
    mean = math.fsum(part[0] for part in parts) / len(parts)
    below = math.hypot(*(at - low for at, low, _ in parts)) / len(parts)
    above = math.hypot(*(high - at for at, _, high in parts)) / len(parts)
    return max(0.0, mean - below), min(1.0, mean + above)


def pass_at_k(n: int, right: int, k: int) -> float:
    """The chance that k of a problem's n samples hold a right one, 1 - C(n - right, k) / C(n, k).

    Unbiased (Chen et al. 2021, arXiv:2107.03374, Eq. 1); average it over the problems.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(
            f"expected 0 <= right <= n and 1 <= k <= n; got n={n}, right={right}, k={k}."
        )
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """The chance that the commonest answer among k of a problem's n samples is right.

    Exact over all subsets of k samples. A tie is split evenly, a missing answer (None) has no
    vote, and k samples without any answer are wrong.
    """
    n = len(answers)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(
            f"expected one verdict per answer and 1 <= k <= n; got {n} answers, {len(right)} "
            f"verdicts, k={k}."
        )
    votes = Counter(answer for answer in answers if answer is not None)
    hits = Counter(a for a, holds in zip(answers, right, strict=True) if holds and a is not None)
    silent = n - votes.total()
    chance = Fraction(0)
    for answer, count in hits.items():
        rivals = [votes[rival] for rival in votes if rival != answer]
        chance += Fraction(count, votes[answer]) * _winning(votes[answer], rivals, silent, k)
    return float(chance / math.comb(n, k))


def _winning(own: int, rivals: Sequence[int], silent: int, k: int) -> Fraction:
    """How many k-subsets an answer with `own` votes wins; a tie of m counts 1/m."""
    won = Fraction(0)
    for votes in range(1, min(own, k) + 1):
        ways = Counter({(votes, 1): math.comb(own, votes)})
        """(samples chosen so far, answers in the lead) -> number of choices."""
        for rival in rivals:
            longer: Counter[tuple[int, int]] = Counter()
            for (chosen, leaders), count in ways.items():
                for taken in range(min(rival, votes, k - chosen) + 1):
                    state = chosen + taken, leaders + (taken == votes)
                    longer[state] += count * math.comb(rival, taken)
            ways = longer
        for (chosen, leaders), count in ways.items():
            won += Fraction(count * math.comb(silent, k - chosen), leaders)
    return won
