"""Spearman's correlation against scipy, and its interval against repeated samples."""

import math

import numpy as np
import pytest
from scipy.stats import spearmanr

from memsyn.values.ranks import spearman, spearman_interval


def test_it_is_scipys() -> None:
    generator = np.random.default_rng(0)
    for size in (2, 5, 50, 1000):
        one, two = generator.integers(0, 9, size).astype(float), generator.normal(size=size)
        if size > 2:
            assert spearman(one, two) == pytest.approx(spearmanr(one, two).statistic)
        assert spearman(two, np.exp(two)) == pytest.approx(1.0)
        assert spearman(two, -two) == pytest.approx(-1.0)
    assert math.isnan(spearman(np.ones(3), np.arange(3.0)))


def test_of_two_pairs_that_are_swapped() -> None:
    """1 - 6 sum d^2 / (n (n^2 - 1)) without ties: d = 1, 1, 0, 0."""
    assert spearman(np.array([1.0, 2, 3, 4]), np.array([2.0, 1, 3, 4])) == pytest.approx(1 - 6 * 2 / (4 * 15))


@pytest.mark.parametrize("noise", [0.3, 1.0, 5.0])
def test_nineteen_of_twenty_samples_contain_the_whole(noise: float) -> None:
    generator = np.random.default_rng(1)
    one = generator.exponential(size=100_000)
    two = one + noise * generator.exponential(size=len(one))
    whole, hits = spearman(one, two), 0
    for _ in range(400):
        rows = generator.integers(0, len(one), 500)
        lower, upper = spearman_interval(spearman(one[rows], two[rows]), len(rows))
        hits += lower <= whole <= upper
    assert (0.88 if whole > 0.9 else 0.92) <= hits / 400 <= 0.98


def test_its_ends() -> None:
    assert spearman_interval(1.0, 100) == (1.0, 1.0)
    assert spearman_interval(-1.0, 100) == (-1.0, -1.0)
    half = math.tanh(1.96 / math.sqrt(97))
    assert spearman_interval(0.0, 100) == pytest.approx((-half, half))
