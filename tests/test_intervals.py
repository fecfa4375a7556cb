"""95% intervals against their definitions."""

import math

import pytest
import torch
from scipy import stats

from memsyn.comparing.intervals import (
    Z,
    paired_share_interval,
    samples_needed,
    t_interval,
    t_quantile,
    wilson_interval,
)


@pytest.mark.parametrize(("same", "count"), [(0, 1), (1, 1), (3, 10), (97, 100), (125, 125), (0, 40), (9_700, 10_000)])
def test_the_wilson_interval_holds_all_shares_that_the_samples_do_not_refute(same: int, count: int) -> None:
    share = same / count
    found = wilson_interval(share, count)
    expected = stats.binomtest(same, count).proportion_ci(0.95, method="wilson")
    assert found == pytest.approx((expected.low, expected.high), abs=1e-12)
    for end in found:
        if 0 < end < 1:  # the definition
            assert abs(share - end) == pytest.approx(Z * math.sqrt(end * (1 - end) / count), rel=1e-9)
    assert found.lower <= share <= found.upper


@pytest.mark.parametrize("share", [0.0, 0.5, 0.9, 0.97, 0.999])
def test_so_many_samples_are_needed_to_show_a_share(share: float) -> None:
    needed = samples_needed(share)
    assert needed == {0.0: 0, 0.5: 4, 0.9: 35, 0.97: 125, 0.999: 3838}[share]
    if needed:
        assert wilson_interval(1.0, needed).lower >= share > wilson_interval(1.0, needed - 1).lower


@pytest.mark.parametrize("freedom", [1, 2, 3, 4, 5, 10, 29, 30, 100, 199, 200, 201, 1_000, 1_000_000])
def test_quantiles_of_students_distribution(freedom: int) -> None:
    assert t_quantile(freedom) == pytest.approx(stats.t.ppf(0.975, freedom), rel=1e-8)


def test_the_interval_of_a_mean() -> None:
    values = torch.tensor([0.1, 0.4, 0.2, 0.9], dtype=torch.float64)
    expected = stats.t.interval(0.95, 3, loc=values.mean(), scale=stats.sem(values.numpy()))
    assert t_interval(values) == pytest.approx(tuple(map(float, expected)))
    assert t_interval(values[:1]) == (-math.inf, math.inf)
    assert t_interval(torch.tensor([1.0, math.inf])) == (math.inf, math.inf)
    assert t_interval(torch.ones(3)) == (1.0, 1.0)


def test_the_interval_of_a_paired_difference() -> None:
    """Bonett and Price (2012): of 98 samples 7 are gained and 3 lost, so a = 8 / 100 and b = 4 / 100."""
    differences = torch.tensor([1.0] * 7 + [-1.0] * 3 + [0.0] * 88)
    share, (lower, upper) = paired_share_interval(differences)
    assert share == pytest.approx(4 / 98)
    half = Z * math.sqrt((0.12 - 0.04**2) / 100)
    assert (lower, upper) == pytest.approx((0.04 - half, 0.04 + half))
    nothing, (low, high) = paired_share_interval(torch.zeros(98))
    assert nothing == 0.0
    assert low == -high == pytest.approx(-Z * math.sqrt(0.02 / 100))


def test_intervals_hold_the_truth_as_often_as_they_say() -> None:
    """95 of 100; Wilson's oscillates by some points around it."""
    generator = torch.Generator().manual_seed(0)
    answers = torch.rand(2_000, 150, generator=generator) < 0.95
    shares = [wilson_interval(float(own.double().mean()), 150) for own in answers]
    assert 0.93 < sum(low <= 0.95 <= high for low, high in shares) / 2_000 < 0.98
    normal = torch.randn(2_000, 6, generator=generator)
    means = [t_interval(own) for own in normal]
    assert 0.935 < sum(low <= 0 <= high for low, high in means) / 2_000 < 0.965
