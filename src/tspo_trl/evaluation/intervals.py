"""How sure a score is: intervals and tests over questions. Pure functions on NumPy arrays, no model, no I/O.

Questions are what is drawn at random, so they are what is resampled. Several samples of a question are averaged first:
they say less than as many questions would.
"""

from math import comb

import numpy as np
from numpy.typing import NDArray

Floats = NDArray[np.float64]

LEVEL = 0.95
RESAMPLES = 10_000
_CELLS = 1 << 20  # of an array at a time: memory does not grow with the number of resamples


def pass_at_k(num_correct: NDArray[np.integer], num_samples: int, k: int) -> Floats:
    """
    The unbiased estimate of the probability that at least one of `k` samples is correct (Chen et al., 2021, arXiv
    2107.03374): 1 - C(n - c, k) / C(n, k).

    Args:
        num_correct (`np.ndarray`):
            Shape (Q,): how many of a question's samples are correct, c.
        num_samples (`int`):
            The samples of a question, n.
        k (`int`):
            From 1 (the mean) to n.

    Returns:
        `np.ndarray`: Shape (Q,).

    Raises:
        `ValueError`: If `k` is not from 1 to n.
    """
    if not 1 <= k <= num_samples:
        raise ValueError(f"`k` must be from 1 to the number of samples ({num_samples}), got {k}.")
    # Whole numbers: exact for any n
    rates = [1 - comb(num_samples - c, k) / comb(num_samples, k) for c in range(num_samples + 1)]
    return np.asarray(rates)[num_correct]


def bootstrap_means(values: Floats, *, seed: int, resamples: int = RESAMPLES) -> Floats:
    """
    The means of questions drawn with replacement.

    Args:
        values (`np.ndarray`):
            Shape (Q, M): M numbers of each of Q questions, at least one. The same questions are drawn for all of them.
        seed (`int`):
            The same seed gives the same means.
        resamples (`int`, *optional*, defaults to `10_000`):
            How often to draw Q questions, B.

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
        # How often each question was drawn, so that the means are one product of matrices
        weights = np.bincount(drawn.ravel(), minlength=count * size).reshape(count, size)
        means[start : start + count] = weights @ values / size
    return means


def interval(means: Floats, level: float = LEVEL) -> Floats:
    """
    The percentile interval of bootstrap means.

    Args:
        means (`np.ndarray`):
            Shape (B, M), of [`bootstrap_means`] or sums of them.
        level (`float`, *optional*, defaults to `0.95`):
            The share of the means that the interval holds.

    Returns:
        `np.ndarray`: Shape (M, 2): the lower and the upper bounds.
    """
    tail = (1 - level) / 2
    return np.quantile(means, [tail, 1 - tail], axis=0).T


def mcnemar_test(only_first: int, only_second: int) -> float:
    """
    McNemar's exact test of two systems that are right or wrong on the same questions: if both are equally good, each
    question that only one of them gets right is as likely the one's as the other's.

    Args:
        only_first (`int`):
            How many questions only the first gets right.
        only_second (`int`):
            How many only the second gets right.

    Returns:
        `float`: The two-sided p-value, 1.0 if there is no such question.
    """
    total, fewer = only_first + only_second, min(only_first, only_second)
    term, tail = 1, 0
    for i in range(fewer + 1):  # C(total, i), in whole numbers: powers of a half would underflow
        tail += term
        term = term * (total - i) // (i + 1)
    return min(1.0, 2 * tail / 2**total)


def permutation_test(differences: Floats, *, seed: int, resamples: int = RESAMPLES) -> float:
    """
    A paired permutation test: if two systems are equally good, the difference of each question has either sign as
    likely.

    Args:
        differences (`np.ndarray`):
            Shape (Q,): a score of the second system minus that of the first, for each question; weighted, if their
            weighted sum is to be tested.
        seed (`int`):
            The same seed gives the same p-value.
        resamples (`int`, *optional*, defaults to `10_000`):
            How often to draw signs. The p-value is at least 1 / (resamples + 1).

    Returns:
        `float`: The two-sided p-value, 1.0 if no question differs.
    """
    differences = differences[differences != 0]
    if not len(differences):
        return 1.0
    # Sums that are equal but for rounding count as equal
    observed = abs(differences.sum()) * (1 - 1e-9)
    rng = np.random.default_rng(seed)
    rows = max(1, _CELLS // len(differences))
    extreme = 0
    for start in range(0, resamples, rows):
        count = min(rows, resamples - start)
        signs = rng.integers(2, size=(count, len(differences)), dtype=np.int8) * 2 - 1
        extreme += int((np.abs(signs @ differences) >= observed).sum())
    return (extreme + 1) / (resamples + 1)
