"""Confidence intervals and significance tests over questions. Pure functions of NumPy arrays: no model, no I/O.

The resampled unit is the question. Several samples of a question are averaged first, because they are not independent.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000
_CELLS = 1 << 20  # maximum size of an array: memory does not grow with the number of resamples


def pass_at_k(num_correct: NDArray[np.integer], num_samples: int, k: int) -> Floats:
    """
    The unbiased estimate of the probability that at least one of `k` samples is correct (Chen et al., 2021, arXiv
    2107.03374): 1 - C(n - c, k) / C(n, k).

    Args:
        num_correct (`np.ndarray`):
            Shape (Q,): number of correct samples of each question, c.
        num_samples (`int`):
            Number of samples of each question, n.
        k (`int`):
            A number from 1 (which gives the mean) to n.

    Returns:
        `np.ndarray`: Shape (Q,).

    Raises:
        `ValueError`: If `k` is not from 1 to n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be from 1 to the number of samples ({num_samples}), got {k}.")
    # Integer arithmetic is exact for any n
    rates = [1 - comb(num_samples - c, k) / comb(num_samples, k) for c in range(num_samples + 1)]
    return np.asarray(rates)[num_correct]


def bootstrap_means(values: Floats, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """
    Bootstrap means: the means over questions drawn with replacement.

    Args:
        values (`np.ndarray`):
            Shape (Q, M): M metrics of Q ≥ 1 questions. The same questions are drawn for all metrics.
        seed (`int`):
            The same seed gives the same means.
        resamples (`int`, *optional*, defaults to `10_000`):
            Number of resamples of Q questions, B.

    Returns:
        `np.ndarray`: Shape (B, M).
    """
    size = len(values)
    rng = np.random.default_rng(seed)
    means = np.empty((resamples, values.shape[1]))
    rows = max(1, _CELLS // size)
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        drawn = rng.integers(size, size=(count, size)) + size * np.arange(count)[:, None]
        # Count how often each question was drawn: the means are then one matrix product
        weights = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        means[start : start + count] = weights @ values / size
    return means


def interval(means: Floats, level: float = LEVEL) -> Floats:
    """
    The percentile interval of bootstrap means.

    Args:
        means (`np.ndarray`):
            Shape (B, M): the result of [`bootstrap_means`], or a linear combination of such results.
        level (`float`, *optional*, defaults to `0.95`):
            The share of the means inside the interval.

    Returns:
        `np.ndarray`: Shape (M, 2): the lower and the upper bounds.
    """
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0).T


def mcnemar_test(only_first: int, only_second: int) -> float:
    """
    McNemar's exact test of two systems that answer the same questions correctly or not. Its null hypothesis is that a
    question that only one system answers correctly is equally likely to be answered by either.

    Args:
        only_first (`int`):
            Number of questions that only the first system answers correctly.
        only_second (`int`):
            Number of questions that only the second system answers correctly.

    Returns:
        `float`: The two-sided p-value, 1.0 if there is no such question.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    term, tail = 1, 0
    for i in range(fewer + 1):  # C(total, i) as an integer: powers of 0.5 would underflow
        tail += term
        term = term * (total - i) // (i + 1)
    return min(1.0, 2 * tail / 2**total)


def permutation_test(differences: Floats, *, seed: int, resamples: int = RESAMPLES) -> float:
    """
    A paired permutation test of two systems. Its null hypothesis is that the difference of each question is equally
    likely to have either sign.

    Args:
        differences (`np.ndarray`):
            Shape (Q,): the score of the second system minus that of the first, for each question. To test a weighted
            sum, multiply the differences by the weights.
        seed (`int`):
            The same seed gives the same p-value.
        resamples (`int`, *optional*, defaults to `10_000`):
            Number of random draws of the signs. The p-value is at least 1 / (resamples + 1).

    Returns:
        `float`: The two-sided p-value, 1.0 if no question differs.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    # Sums that differ only by rounding count as equal
    observed = abs(differences.sum()) * (1 - 1e-9)
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(differences))
    extreme = 0
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        signs = rng.integers(2, size=(count, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (resamples + 1)
