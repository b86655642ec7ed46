"""Numbers over graded samples: accuracy with its interval, pass@k, majority@k, best-of-k.

All intervals are 95% and are Wilson's at heart: p ± 1.96 sqrt(p(1-p)/n) has no width at 0% and at
100%, which is where a self-training run begins and where it hopes to end.
"""

import math
import random
from collections import Counter
from collections.abc import Mapping, Sequence
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
    if len(right) == n == k:
        return _outweighs(answers, right, [1.0] * n, range(n))
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


def best_of_k(scores: Sequence[float], right: Sequence[bool], k: int) -> float:
    """The chance that the highest-scored of k of a problem's n samples is right.

    Sorted by falling score, sum over i of C(n-i-1, k-1) right_i / C(n, k), which is exact over all
    subsets (Hosseini et al. 2024, arXiv:2402.06457, Eq. 3). Among equal scores each is as likely.
    """
    n = len(scores)
    if len(right) != n or not 1 <= k <= n:
        raise ValueError(
            f"expected one verdict per score and 1 <= k <= n; got {n} scores, {len(right)} "
            f"verdicts, k={k}."
        )
    if any(math.isnan(score) for score in scores):
        raise ValueError("expected scores that are numbers; got a score that is not a number.")
    tied: dict[float, list[bool]] = {}
    for score, holds in zip(scores, right, strict=True):
        tied.setdefault(score, []).append(holds)
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
    """The chance that the answer with the most weight among k of n samples is right.

    Over `draws` random subsets, drawn without replacement by the seed; k = n needs only one. Answers
    are voted for as in `majority_at_k`, with the sum of their samples' weights in place of a count.

    Args:
        logs: the weights are logarithms, such as log-probabilities of any size.
    """
    n = len(answers)
    if not (len(right) == len(weights) == n and 1 <= k <= n):
        raise ValueError(
            f"expected one verdict and one weight per answer and 1 <= k <= n; got {n} answers, "
            f"{len(right)} verdicts, {len(weights)} weights, k={k}."
        )
    draw = random.Random(seed)
    subsets = [range(n)] if k == n else [draw.sample(range(n), k) for _ in range(draws)]
    found = [
        _outweighs(answers, right, _unlogged(weights, one) if logs else weights, one)
        for one in subsets
    ]
    return math.fsum(found) / len(subsets)


def _unlogged(logs: Sequence[float], chosen: Sequence[int]) -> dict[int, float]:
    """The weights of the chosen ones, relative to the highest of those that count."""
    highest = max(logs[at] for at in chosen)
    return {at: math.exp(logs[at] - highest) for at in chosen}


def _outweighs(
    answers: Sequence[str | None],
    right: Sequence[bool],
    weights: Sequence[float] | Mapping[int, float],
    chosen: Sequence[int],
) -> float:
    """The share of right samples under the answer with the most weight; ties are split evenly."""
    votes: dict[str, float] = {}
    verdicts: dict[str, list[bool]] = {}
    for at in chosen:
        answer = answers[at]
        if answer is not None:
            votes[answer] = votes.get(answer, 0.0) + weights[at]
            verdicts.setdefault(answer, []).append(right[at])
    most = max(votes.values(), default=0.0)
    leaders = [answer for answer, weight in votes.items() if weight == most]
    shares = [sum(verdicts[answer]) / len(verdicts[answer]) for answer in leaders]
    return math.fsum(shares) / len(shares) if shares else 0.0


def share_interval(shares: Sequence[float]) -> Interval:
    """The interval of a mean of per-problem shares, each from 0 to 1, one per problem.

    Wilson's at the effective sample size that the spread of the shares gives; for shares that are
    all 0 or 1 it is Wilson's own, but for the n - 1 of a sample variance.
    """
    n = len(shares)
    if n == 0:
        return 0.0, 1.0
    if not all(0 <= share <= 1 for share in shares):
        raise ValueError("expected shares from 0 to 1.")
    mean = math.fsum(shares) / n
    if n == 1 or mean in (0, 1):
        return wilson(mean * n, n)
    variance = math.fsum((share - mean) ** 2 for share in shares) / (n - 1)
    # shares that are all equal may differ from their rounded mean
    effective = n * mean * (1 - mean) / variance if variance > 1e-20 else n
    return wilson(mean * effective, effective)


def difference_interval(
    first: Sequence[float], second: Sequence[float]
) -> tuple[float, float, float]:
    """The mean of `second` minus `first`, problem by problem, and its 95% interval.

    Student-free: plus and minus 1.96 standard errors of the paired differences, for the dozens of
    problems and more that a test has.
    """
    if len(first) != len(second) or len(first) < 2:
        raise ValueError(
            f"expected two equally long lists of at least 2; got {len(first)} and {len(second)}."
        )
    differences = [b - a for a, b in zip(first, second, strict=True)]
    n = len(differences)
    mean = math.fsum(differences) / n
    error = math.sqrt(math.fsum((one - mean) ** 2 for one in differences) / (n - 1) / n)
    return mean, mean - Z * error, mean + Z * error


def efficiency(
    curve: Sequence[tuple[float, Sequence[bool]]],
    size: float,
    own: Sequence[bool],
    *,
    draws: int = 1000,
    seed: int = 0,
) -> tuple[float, float, float]:
    """How many times its size a method's data would have to be for the baseline to be as good.

    The baseline's error is taken to be straight between its sizes when both are in logarithms, and
    never to rise. Infinite: it is not as good at its largest size; below its smallest, that size is
    taken. The 95% interval draws the test problems anew, the same ones for all.

    Args:
        curve: the baseline's sizes and its verdicts on the test problems, in order.
        own: the method's verdicts on the same problems.
    """
    n = len(own)
    if not curve or any(len(verdicts) != n for _, verdicts in curve) or n == 0:
        raise ValueError("expected verdicts on the same test problems for every size; got others.")
    draw = random.Random(seed)
    found = sorted(
        _needed(
            [(at, _error_of(verdicts, chosen)) for at, verdicts in curve], _error_of(own, chosen)
        )
        / size
        for chosen in ([draw.randrange(n) for _ in range(n)] for _ in range(draws))
    )
    everything = range(n)
    whole = _needed(
        [(at, _error_of(verdicts, everything)) for at, verdicts in curve],
        _error_of(own, everything),
    )
    return whole / size, found[round(0.025 * (draws - 1))], found[round(0.975 * (draws - 1))]


def _error_of(verdicts: Sequence[bool], chosen: Sequence[int]) -> float:
    """The share of wrong ones, half a problem at least, so that it has a logarithm."""
    wrong = sum(not verdicts[at] for at in chosen)
    return max(wrong, 0.5) / len(chosen)


def _needed(curve: Sequence[tuple[float, float]], error: float) -> float:
    """The size at which a falling curve of errors comes down to `error`."""
    before: tuple[float, float] | None = None
    for size, at in sorted(curve):
        at = min(at, before[1]) if before else at
        if at <= error:
            if before is None:
                return size
            across = math.log(before[1] / error) / math.log(before[1] / at)
            return before[0] * (size / before[0]) ** across
        before = size, at
    return math.inf


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
