"""Metrics of graded samples: accuracy with confidence interval, pass@k, majority@k, best-of-k.

All intervals are 95% confidence intervals based on Wilson's score interval. The normal
approximation p ± 1.96 sqrt(p(1-p)/n) has zero width at 0% and 100%, values that occur in
self-training runs.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
from fractions import Fraction
from statistics import NormalDist

Interval = tuple[float, float]

Z = NormalDist().inv_cdf(0.975)
"""Half width of a 95% interval in standard errors (1.96)."""


def accuracy(right: int, n: int) -> float:
    """Return the fraction of `n` samples that are right.

    Raises:
        ValueError: `n` is 0, or `right` is not between 0 and `n`.
    """
    if not 0 <= right <= n or n == 0:
        raise ValueError(f"expected 0 <= right <= n with n at least 1; got right={right}, n={n}.")
    return right / n


def wilson(right: float, n: float) -> Interval:
    """Return Wilson's 95% score interval of a proportion (Wilson 1927, p. 209).

    Args:
        right: Number of successes.
        n: Number of samples, or an effective sample size. 0 gives the interval (0, 1).

    Raises:
        ValueError: `right` is not between 0 and `n`.
    """
    if not 0 <= right <= n:
        raise ValueError(f"expected 0 <= right <= n; got right={right}, n={n}.")
    if n == 0:
        return 0.0, 1.0
    share, weight = right / n, Z * Z / n
    centre = (share + weight / 2) / (1 + weight)
    reach = Z * math.sqrt(share * (1 - share) / n + weight / (4 * n)) / (1 + weight)
    # Rounding errors may not exclude the proportion itself from the interval.
    return max(0.0, min(centre - reach, share)), min(1.0, max(centre + reach, share))


def clustered_interval(samples: Sequence[Sequence[bool]]) -> Interval:
    """Return the 95% interval of the accuracy with several samples per problem.

    Samples of the same problem are correlated, so they carry less information than the same number
    of problems. The standard error clustered by problem gives an effective sample size, at which
    Wilson's interval is computed (Dean and Pagano 2015). With one sample per problem, this is
    Wilson's interval. If all samples agree, each problem counts as one sample.

    Args:
        samples: Whether each sample is right, as `[problem][sample]`.
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
    """Return the 95% interval of the unweighted mean of independent accuracies.

    It is based on the variance of a stratified mean, sum of var_g / G^2. Each variance is recovered
    from its group's interval, separately below and above (Zou and Donner 2008), so a group at 100%
    contributes uncertainty too.

    Args:
        parts: One (accuracy, lower bound, upper bound) per group.
    """
    if not parts:
        return 0.0, 1.0
    mean = math.fsum(part[0] for part in parts) / len(parts)
    below = math.hypot(*(at - low for at, low, _ in parts)) / len(parts)
    above = math.hypot(*(high - at for at, _, high in parts)) / len(parts)
    return max(0.0, mean - below), min(1.0, mean + above)


def pass_at_k(n: int, right: int, k: int) -> float:
    """Return pass@k of one problem: 1 - C(n - right, k) / C(n, k).

    This is the unbiased estimator of the probability that at least one of k samples is right (Chen
    et al. 2021, arXiv:2107.03374, Eq. 1). Average it over the problems.

    Args:
        n: Number of samples of the problem.
        right: Number of right samples.
        k: Number of samples drawn.

    Raises:
        ValueError: Not 0 <= right <= n and 1 <= k <= n.
    """
    if not (0 <= right <= n and 1 <= k <= n):
        raise ValueError(
            f"expected 0 <= right <= n and 1 <= k <= n; got n={n}, right={right}, k={k}."
        )
    return 1 - math.comb(n - right, k) / math.comb(n, k)


def majority_at_k(answers: Sequence[str | None], right: Sequence[bool], k: int) -> float:
    """Return majority@k: the probability that the most frequent answer among k samples is right.

    The value is exact over all subsets of k of the n samples. Ties count fractionally. A missing
    answer (None) has no vote. A subset without any answer counts as wrong.

    Args:
        answers: The answers of one problem's samples. Equivalent answers must be equal strings.
        right: Whether each sample is right.
        k: Number of samples drawn.

    Raises:
        ValueError: The lengths differ, or k is not between 1 and n.
    """
    n = len(answers)
    if len(right) == n == k:
        return _outweighs(answers, right, [1.0] * n, range(n))
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(
            f"expected one verdict per answer and 1 <= k <= n; got {n} answers, {len(right)} "
            f"verdicts, k={k}."
        )
    votes = Counter(answer for answer in answers if answer is not None)
    hits = Counter(
        a for a, is_right in zip(answers, right, strict=True) if is_right and a is not None
    )
    unanswered = n - votes.total()
    chance = Fraction(0)
    for answer, count in hits.items():
        rivals = [votes[rival] for rival in votes if rival != answer]
        chance += Fraction(count, votes[answer]) * _winning(votes[answer], rivals, unanswered, k)
    return float(chance / math.comb(n, k))


def best_of_k(scores: Sequence[float], right: Sequence[bool], k: int) -> float:
    """Return best-of-k: the probability that the highest-scored of k samples is right.

    With samples sorted by descending score, this is the sum over i of C(n-i-1, k-1) right_i / C(n,
    k), which is exact over all subsets (Hosseini et al. 2024, arXiv:2402.06457, Eq. 3). Samples
    with equal scores are equally likely to be chosen.

    Args:
        scores: Verifier scores of one problem's n samples.
        right: Whether each sample is right.
        k: Number of samples drawn.

    Raises:
        ValueError: The lengths differ, k is not between 1 and n, or a score is NaN.
    """
    n = len(scores)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(
            f"expected one verdict per score and 1 <= k <= n; got {n} scores, {len(right)} "
            f"verdicts, k={k}."
        )
    if any(math.isnan(score) for score in scores):
        raise ValueError("expected numbers as scores; got a score that is not a number (NaN).")
    tied: dict[float, list[bool]] = {}
    for score, is_right in zip(scores, right, strict=True):
        tied.setdefault(score, []).append(is_right)
    shares = [
        Fraction(sum(tied[score]), len(tied[score]))
        for score in sorted(tied, reverse=True)
        for _ in tied[score]
    ]
    chosen = sum(math.comb(n - i - 1, k - 1) * share for i, share in enumerate(shares[: n - k + 1]))
    return float(chosen / math.comb(n, k))


def weighted_majority_at_k(
    answers: Sequence[str | None],
    right: Sequence[bool],
    weights: Sequence[float],
    k: int,
    *,
    logs: bool = False,
    draws: int = 100,
    seed: int = 0,
) -> float:
    """Return the probability that the answer with the largest total weight among k samples is
    right.

    Votes are counted as in `majority_at_k`, with the sum of the samples' weights instead of their
    number. The value is an average over `draws` random subsets of k samples, drawn without
    replacement. For k = n there is only one subset.

    Args:
        answers: The answers of one problem's n samples. Equivalent answers must be equal strings.
        right: Whether each sample is right.
        weights: One weight per sample.
        k: Number of samples drawn.
        logs: Whether the weights are logarithms, such as log-probabilities. They may be of any
            size.
        draws: Number of random subsets.
        seed: Random seed for the subsets.

    Raises:
        ValueError: The lengths differ, or k is not between 1 and n.
    """
    n = len(answers)
    if not (len(right) == len(weights) == n and 1 <= k <= n):
        raise ValueError(
            f"expected one verdict and one weight per answer and 1 <= k <= n; got {n} answers, "
            f"{len(right)} verdicts, {len(weights)} weights, k={k}."
        )
    rng = random.Random(seed)
    subsets = [range(n)] if k == n else [rng.sample(range(n), k) for _ in range(draws)]
    shares = [
        _outweighs(answers, right, _exponentials(weights, subset) if logs else weights, subset)
        for subset in subsets
    ]
    return math.fsum(shares) / len(subsets)


def _exponentials(logs: Sequence[float], chosen: Sequence[int]) -> dict[int, float]:
    """Return the weights of the chosen samples relative to the largest, to avoid underflow."""
    highest = max(logs[index] for index in chosen)
    return {index: math.exp(logs[index] - highest) for index in chosen}


def _outweighs(
    answers: Sequence[str | None],
    right: Sequence[bool],
    weights: Sequence[float] | Mapping[int, float],
    chosen: Sequence[int],
) -> float:
    """Return the fraction right of the samples with the highest-weighted answer, mean over ties."""
    votes: dict[str, float] = {}
    verdicts: dict[str, list[bool]] = {}
    for index in chosen:
        answer = answers[index]
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weights[index]
            verdicts.setdefault(answer, []).append(right[index])
    most = max(votes.values(), default=0.0)
    leaders = [answer for answer, weight in votes.items() if weight == most]
    shares = [sum(verdicts[answer]) / len(verdicts[answer]) for answer in leaders]
    return math.fsum(shares) / len(shares) if shares else 0.0


def share_interval(shares: Sequence[float]) -> Interval:
    """Return the 95% interval of the mean of per-problem values from 0 to 1, such as pass@k.

    This is Wilson's interval at the effective sample size given by the variance of the values. For
    values that are all 0 or 1 it equals Wilson's interval, except for the n - 1 in the sample
    variance.

    Args:
        shares: One value from 0 to 1 per problem.

    Raises:
        ValueError: A value is outside 0 to 1.
    """
    n = len(shares)
    if n == 0:
        return 0.0, 1.0
    if not all(0 <= share <= 1 for share in shares):
        low, high = min(shares), max(shares)
        raise ValueError(f"expected shares from 0 to 1; got values from {low} to {high}.")
    mean = math.fsum(shares) / n
    if n == 1 or mean in (0, 1):
        return wilson(mean * n, n)
    variance = math.fsum((share - mean) ** 2 for share in shares) / (n - 1)
    # Equal shares may differ from their mean by a rounding error.
    effective = n * mean * (1 - mean) / variance if variance > 1e-20 else n
    return wilson(mean * effective, effective)


def difference_interval(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float, float, float]:
    """Return the mean paired difference `second` - `first` with its 95% interval.

    The interval is the mean plus and minus 1.96 standard errors of the paired differences. It uses
    the normal instead of Student's t distribution, which is adequate for a few dozen problems or
    more.

    Args:
        first: One value per problem.
        second: One value per problem, for the same problems in the same order.

    Returns:
        Mean, lower bound and upper bound.

    Raises:
        ValueError: The lengths differ, or there are fewer than 2 problems.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"expected two equally long lists of at least 2; got {len(first)} and {len(second)}."
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    error = math.sqrt(math.fsum((d - mean) ** 2 for d in differences) / (n - 1) / n)
    return mean, mean - Z * error, mean + Z * error


def efficiency(
    curve: Sequence[tuple[float, Sequence[bool]]],
    size: float,
    own: Sequence[bool],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """Return a method's data efficiency: how many times more data the baseline needs to be as good.

    The baseline's error is interpolated linearly in log-log space between its data sizes and made
    non-increasing. The result is infinite if the baseline is worse even at its largest size. If the
    baseline is as good at its smallest size, that size is used. The 95% interval is a bootstrap
    over the test problems, with the same resample for the method and all baselines.

    Args:
        curve: For each data size of the baseline: the size, and whether each test problem was
            solved.
        size: Data size of the method.
        own: Whether the method solved each test problem, in the same order.
        draws: Number of bootstrap resamples.
        seed: Random seed for the resamples.

    Returns:
        Efficiency, lower bound and upper bound.

    Raises:
        ValueError: The lists of test problems are empty or differ in length.
    """
    n = len(own)
    if not curve or any(len(verdicts) != n for _, verdicts in curve) or n == 0:
        lengths = ", ".join(str(len(verdicts)) for _, verdicts in curve)
        raise ValueError(
            "expected verdicts on the same test problems for every size; got lists of length "
            f"{lengths or '(no sizes)'} and {n}."
        )
    rng = random.Random(seed)
    resampled = sorted(
        _needed(
            [(at, _error_of(verdicts, chosen)) for at, verdicts in curve], _error_of(own, chosen)
        )
        / size
        for chosen in ([rng.randrange(n) for _ in range(n)] for _ in range(draws))
    )
    everything = range(n)
    needed = _needed(
        [(at, _error_of(verdicts, everything)) for at, verdicts in curve],
        _error_of(own, everything),
    )
    low, high = resampled[round(0.025 * (draws - 1))], resampled[round(0.975 * (draws - 1))]
    return needed / size, low, high


def _error_of(verdicts: Sequence[bool], chosen: Sequence[int]) -> float:
    """Return the error rate, at least half a problem, so that its logarithm is finite."""
    wrong = sum(not verdicts[index] for index in chosen)
    return max(wrong, 0.5) / len(chosen)


def _needed(curve: Sequence[tuple[float, float]], error: float) -> float:
    """Return the data size at which a decreasing error curve reaches `error`."""
    before: tuple[float, float] | None = None
    for size, at in sorted(curve):
        at = min(at, before[1]) if before else at
        if at <= error:
            if before is None:
                return size
            fraction = math.log(before[1] / error) / math.log(before[1] / at)
            return before[0] * (size / before[0]) ** fraction
        before = size, at
    return math.inf


def _winning(own: int, rivals: Sequence[int], unanswered: int, k: int) -> Fraction:
    """Return the number of k-subsets in which an answer wins; a tie of m answers counts 1/m.

    Args:
        own: Number of samples with the answer.
        rivals: Numbers of samples with each other answer.
        unanswered: Number of samples without an answer.
        k: Size of the subsets.
    """
    won = Fraction(0)
    for votes in range(1, min(own, k) + 1):
        counts = Counter({(votes, 1): math.comb(own, votes)})
        """(samples chosen so far, answers in the lead) -> number of choices."""
        for rival in rivals:
            extended: Counter[tuple[int, int]] = Counter()
            for (chosen, leaders), count in counts.items():
                for taken in range(min(rival, votes, k - chosen) + 1):
                    state = chosen + taken, leaders + (taken == votes)
                    extended[state] += count * math.comb(rival, taken)
            counts = extended
        for (chosen, leaders), count in counts.items():
            won += Fraction(count * math.comb(unanswered, k - chosen), leaders)
    return won
