"""How an importance is spread: every number against one worked out by hand or by the definition, pair by pair."""

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import given, settings

from memsyn.report.distribution import lorenz, top_units


@pytest.mark.parametrize(
    ("values", "gini", "half"),
    [
        ([1.0, 1.0, 1.0, 1.0], 0.0, 0.5),
        ([0.0, 0.0, 8.0, 0.0], 0.75, 0.25),
        ([4.0, 1.0, 3.0, 2.0], 0.25, 0.5),  # 4 + 3 of 10
        ([5.0], 0.0, 1.0),
    ],
)
def test_gini_and_the_weights_that_hold_half(values, gini, half):
    found = lorenz({"a.weight": torch.tensor(values[:1]), "b.weight": torch.tensor(values[1:])})
    assert found.gini == pytest.approx(gini, abs=1e-12)
    assert found.half == half


@settings(deadline=None)
@given(st.lists(st.integers(0, 1000), min_size=1, max_size=30).filter(any))
def test_the_gini_coefficient_is_half_the_relative_mean_difference(values):
    """Over all pairs: sum |x_i - x_j| / (2 n sum x)."""
    pairs = sum(abs(one - other) for one in values for other in values)
    found = lorenz({"w": torch.tensor(values, dtype=torch.float32)})
    assert found.gini == pytest.approx(pairs / (2 * len(values) * sum(values)), abs=1e-9)
    ordered = sorted(values, reverse=True)
    needed = next(n for n in range(1, len(values) + 1) if 2 * sum(ordered[:n]) >= sum(values))
    assert found.half == pytest.approx(needed / len(values))


def test_the_curve_goes_through_the_points_of_the_definition():
    found = lorenz({"w": torch.tensor([3.0, 1.0, 6.0, 0.0])}, num_points=5)
    assert found.weights == (0.0, 0.25, 0.5, 0.75, 1.0)
    assert found.held == pytest.approx((0.0, 0.0, 0.1, 0.4, 1.0))


def test_nothing_important_has_no_curve():
    assert lorenz({"w": torch.zeros(3)}) is None
    assert lorenz({}) is None


def test_a_unit_is_a_row_of_weights_and_its_bias():
    omega = {
        "a.weight": torch.tensor([[1.0, 2.0], [0.0, 0.5]]),
        "a.bias": torch.tensor([1.0, 0.0]),
        "b.weight": torch.full((1, 2, 3), 0.5),
        "scale": torch.tensor(2.5),
    }
    found = top_units(omega, 3)
    assert [(unit.name, unit.row, unit.total) for unit in found] == [("a", 0, 4.0), ("b", 0, 3.0), ("scale", 0, 2.5)]
    assert [unit.share for unit in found] == pytest.approx([0.4, 0.3, 0.25])


def test_parameters_with_other_rows_make_units_of_their_own():
    found = top_units({"a.up": torch.ones(3, 1), "a.down": torch.full((2, 1), 5.0)}, 9)
    assert [(unit.name, unit.row, unit.total) for unit in found] == [
        ("a.down", 0, 5.0), ("a.down", 1, 5.0), ("a.up", 0, 1.0), ("a.up", 1, 1.0), ("a.up", 2, 1.0)
    ]  # fmt: skip
