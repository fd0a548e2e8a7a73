"""Confidence intervals and significance tests, compared with enumeration and known values."""

from fractions import Fraction
from itertools import combinations, product
from math import comb

import numpy as np
import pytest

from tspo_trl.evaluation import intervals as statistics
from tspo_trl.evaluation.intervals import bootstrap_means, interval, mcnemar_test, pass_at_k, permutation_test


@pytest.mark.parametrize("n", [1, 4, 7])
def test_pass_at_k_is_the_share_of_subsets_with_a_correct_sample(n):
    for c in range(n + 1):
        samples = [1] * c + [0] * (n - c)
        for k in range(1, n + 1):
            subsets = [any(subset) for subset in combinations(samples, k)]
            assert pass_at_k(np.array([c]), n, k)[0] == pytest.approx(sum(subsets) / len(subsets), abs=1e-12)


def test_pass_at_k_is_stable_for_many_samples():
    assert pass_at_k(np.array([0, 1, 1000]), 1000, 500).tolist() == pytest.approx([0.0, 0.5, 1.0])


@pytest.mark.parametrize("k", [0, 5])
def test_pass_at_k_refuses_an_impossible_k(k):
    with pytest.raises(ValueError, match=rf"`k` must be from 1 to the number of samples \(4\), got {k}"):
        pass_at_k(np.array([1]), 4, k)


def test_bootstrap_means_are_means_of_questions_drawn_with_replacement():
    """Three questions have 27 draws, so the exact distribution is known."""
    values = np.array([0.0, 1.0, 5.0])
    exact = np.array([np.mean(draw) for draw in product(values, repeat=3)])
    means = bootstrap_means(values[:, None], seed=1, resamples=200_000)[:, 0]
    assert set(np.round(means, 9)) == set(np.round(exact, 9))
    for mean in np.unique(exact):
        assert np.isclose(means, mean).mean() == pytest.approx(np.isclose(exact, mean).mean(), abs=0.005)


def test_bootstrap_draws_the_same_questions_for_all_metrics_and_is_reproducible(monkeypatch):
    values = np.random.default_rng(0).random((40, 2))
    means = bootstrap_means(np.stack([values[:, 0], 2 * values[:, 0], values[:, 1]], axis=1), seed=3, resamples=500)
    assert np.allclose(means[:, 1], 2 * means[:, 0])
    assert not np.allclose(means[:, 2], means[:, 0])
    monkeypatch.setattr(statistics, "_CELLS", 40 * 7)  # in parts that do not divide the resamples
    again = bootstrap_means(values, seed=3, resamples=500)
    assert np.allclose(again[:, 0], means[:, 0])
    assert not np.allclose(bootstrap_means(values, seed=4, resamples=500), again)


def test_intervals_have_their_nominal_coverage():
    rng = np.random.default_rng(7)
    held = 0
    for trial in range(400):
        values = (rng.random((150, 1)) < 0.3).astype(float)
        low, high = interval(bootstrap_means(values, seed=trial, resamples=500))[0]
        held += low <= 0.3 <= high
    assert 0.91 < held / 400 < 0.98


def test_intervals_are_percentiles():
    means = np.arange(1001, dtype=float)[:, None]
    assert interval(means)[0] == pytest.approx([25.0, 975.0])
    assert interval(means, 0.5)[0] == pytest.approx([250.0, 750.0])


@pytest.mark.parametrize(("first", "second"), [(0, 0), (0, 5), (5, 15), (15, 5), (8, 8), (3, 4), (300, 260)])
def test_mcnemar_is_the_binomial_test(first, second):
    n = first + second
    tail = sum(Fraction(comb(n, i), 2**n) for i in range(min(first, second) + 1))
    assert mcnemar_test(first, second) == pytest.approx(float(min(Fraction(1), 2 * tail)))


def test_mcnemar_equals_published_values():
    assert mcnemar_test(5, 15) == pytest.approx(0.04139, abs=1e-5)  # R: binom.test(5, 20)
    assert mcnemar_test(20_000, 20_800) < 1e-4  # powers of 0.5 that underflow a float


def test_permutation_test_approaches_enumeration():
    differences = np.array([0.5, 0.25, -0.125, 1.0, 0.75, -0.5, 0.3, 0.0])
    sums = [abs(np.dot(signs, differences)) for signs in product((-1, 1), repeat=8)]
    exact = np.mean([s >= abs(differences.sum()) - 1e-9 for s in sums])
    assert permutation_test(differences, seed=0, resamples=100_000) == pytest.approx(exact, abs=0.006)
    assert permutation_test(-differences, seed=0, resamples=100_000) == pytest.approx(exact, abs=0.006)


def test_permutation_test_of_zero_and_of_equal_differences():
    assert permutation_test(np.zeros(5), seed=0) == 1.0
    assert permutation_test(np.array([0.3]), seed=0) == 1.0  # one question is no evidence
    assert permutation_test(np.full(30, 0.1), seed=0, resamples=999) == 1 / 1000
