"""Confidence intervals of means over tokens and thoughts, whose texts are the independent units."""

import torch
from torch import Tensor


def ratio_interval(text: Tensor, part: Tensor, whole: Tensor) -> tuple[float, float]:
    """Return the 95% confidence interval of the ratio of two sums over tokens.

    The tokens of a text form one cluster (linearized ratio of sums). NaN for a single text.

    Args:
        text: number of the text of each token, `[X]`.
        part: values of the numerator, `[X]`.
        whole: values of the denominator, `[X]`; ones for a mean.
    """
    ratio, total = part.sum() / whole.sum(), float(whole.sum())
    _, place = text.unique(return_inverse=True)
    sums = torch.zeros(int(place.max()) + 1, dtype=part.dtype)
    sums = sums.index_add(0, place, part - ratio * whole)
    count = len(sums)
    if count < 2:
        return float("nan"), float("nan")
    error = 1.96 * float(((sums**2).sum() * count / (count - 1)).sqrt()) / abs(total)
    return float(ratio) - error, float(ratio) + error
