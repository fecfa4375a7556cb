"""Importances add up exactly, and say what they hold."""

import pytest
import torch

import memsyn

ONE = memsyn.Importance({"a.w": torch.tensor([[1.0, 2.0]]), "a.b": torch.tensor([3.0])}, 2, {"a.w": "rule"})
TWO = memsyn.Importance({"a.w": torch.tensor([[4.0, 0.0]]), "a.b": torch.tensor([5.0])}, 3, {"a.b": "rule"})


def test_sums_and_counts_add_and_means_are_computed_on_read() -> None:
    both = ONE + TWO
    assert both.num_samples == 5
    assert both.sums["a.w"].tolist() == [[5.0, 2.0]]
    assert both.mean()["a.b"].tolist() == [pytest.approx(8 / 5)]
    assert both.routes == {"a.w": "rule", "a.b": "rule"}
    assert ONE.sums["a.w"].tolist() == [[1.0, 2.0]]


def test_unlike_importances_do_not_add() -> None:
    with pytest.raises(memsyn.MismatchError, match="abs of squared_l2_norm and square of squared_l2_norm"):
        ONE + memsyn.Importance(TWO.sums, 3, magnitude="square")
    other = memsyn.Importance({"a.w": torch.ones(2, 2), "c": torch.ones(1)}, 1)
    with pytest.raises(
        memsyn.MismatchError, match=r"a.b is missing in the second.*c is missing in the first.*\(1, 2\)"
    ):
        ONE + other


def test_summary_per_layer() -> None:
    weights = torch.arange(10.0)  # the largest tenth is the 9
    summary = memsyn.Importance({"a.w": weights, "a.b": torch.zeros(10), "head": torch.full((5,), 11.0)}, 1).summary()
    assert [row.layer for row in summary] == ["a", "head"]
    first, head = summary
    assert (first.num_weights, first.share, first.mean, first.max) == (20, 0.45, 45 / 20, 9.0)
    assert first.concentration == pytest.approx((9 + 8) / 45)
    assert head.concentration == pytest.approx(0.2)  # one of five, spread evenly
    assert head.share == 0.55


def test_summary_of_nothing_important() -> None:
    (row,) = memsyn.Importance({"w": torch.zeros(3)}, 1).summary()
    assert (row.share, row.mean, row.max, row.concentration) == (0.0, 0.0, 0.0, 0.0)


def test_save_and_load(tmp_path) -> None:
    ONE.save(tmp_path / "one.safetensors")
    found = memsyn.Importance.load(tmp_path / "one.safetensors")
    assert all(torch.equal(found.sums[name], total) for name, total in ONE.sums.items())
    assert (found.num_samples, found.routes, found.objective, found.magnitude) == (
        2,
        ONE.routes,
        "squared_l2_norm",
        "abs",
    )
