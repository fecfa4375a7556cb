"""What has changed between two memories, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch

import memsyn
from memsyn.values.comparison import LayerChange, diff, overlap
from memsyn.values.spectra import spectrum_of
from tests import kronecker


def memory(anchor: dict[str, list[float]], omega: dict[str, list[float]]) -> memsyn.Memory:
    return memsyn.Memory(*({name: torch.tensor(values) for name, values in part.items()} for part in (anchor, omega)))


A = memory(
    {"a.w": [3.0, 0.0], "a.b": [4.0], "c.w": [0.0], "old.w": [1.0]},
    {"a.w": [1.0, 2.0], "a.b": [1.0], "c.w": [4.0], "old.w": [2.0]},
)
B = memory(
    {"a.w": [3.0, 1.0], "a.b": [6.0], "c.w": [0.5], "new.w": [1.0, 1.0]},
    {"a.w": [1.0, 4.0], "a.b": [0.0], "c.w": [9.0], "new.w": [6.0, 0.0]},
)


def test_layers_gain_and_lose_importance_and_anchors_move() -> None:
    found = diff(A, B)
    assert found.layers == (
        LayerChange("a", 0.4, 0.25, 4.0, 5.0, pytest.approx(5**0.5), pytest.approx(5**0.5 / 5)),
        LayerChange("c", 0.4, 0.45, 4.0, 9.0, 0.5, None),  # A's anchor is zero there
        LayerChange("old", 0.2, 0.0, 2.0, 0.0, None, None),
        LayerChange("new", 0.0, 0.3, 0.0, 6.0, None, None),
    )
    assert (found.only_in_a, found.only_in_b, found.reshaped) == (("old.w",), ("new.w",), ())
    assert not found.same


def test_the_other_way_round() -> None:
    found = diff(B, A)
    assert [layer.layer for layer in found.layers] == ["a", "c", "new", "old"]
    assert found.layers[0].moved_relative == pytest.approx(5**0.5 / (9 + 1 + 36) ** 0.5)
    assert (found.only_in_a, found.only_in_b) == (("new.w",), ("old.w",))


def test_the_same() -> None:
    again = memsyn.Memory({n: t.clone() for n, t in A.anchor.items()}, {n: t.clone() for n, t in A.importance.items()})
    found = diff(A, again)
    assert found.same
    assert [(layer.moved, layer.share_a - layer.share_b) for layer in found.layers] == [(0.0, 0.0)] * 3
    for changed in ("anchor", "importance"):
        tensor = getattr(again, changed)["a.b"]
        tensor.copy_(torch.nextafter(tensor, torch.tensor(9.0)))
        assert not diff(A, again).same
        tensor.copy_(getattr(A, changed)["a.b"])


def test_statistics_that_differ_are_named() -> None:
    one = replace(A, statistics={"n.mean": torch.zeros(2), "n.var": torch.ones(2), "gone": torch.ones(1)})
    other = replace(A, statistics={"n.mean": torch.zeros(2), "n.var": torch.ones(2) * 2, "new": torch.ones(1)})
    found = diff(one, other)
    assert found.statistics == ("n.var", "gone", "new")
    assert not found.same
    assert diff(one, replace(one)).same
    assert diff(one, replace(one)).statistics == ()


def test_what_is_reshaped_is_named_and_its_anchor_left_out() -> None:
    grown = memory({"h.w": [1.0, 2.0, 3.0], "h.b": [2.0]}, {"h.w": [1.0, 1.0, 1.0], "h.b": [1.0]})
    before = memory({"h.w": [0.0, 0.0], "h.b": [1.0]}, {"h.w": [1.0, 1.0], "h.b": [0.0]})
    found = diff(before, grown)
    assert found.reshaped == ("h.w",)
    assert found.layers == (LayerChange("h", 1.0, 1.0, 2.0, 4.0, 1.0, 1.0),)
    assert not found.same


def test_importances_are_compared_as_means() -> None:
    one = memsyn.Importance({"a.w": torch.tensor([2.0, 4.0])}, 2)
    other = memsyn.Importance({"a.w": torch.tensor([4.0, 8.0])}, 4)
    found = diff(one, other)
    assert found.layers == (LayerChange("a", 1.0, 1.0, 3.0, 3.0, None, None),)
    assert not found.same  # on other numbers of samples
    assert diff(one, one).same
    assert not diff(one, memsyn.Importance({"a.w": one.sums["a.w"].double()}, 2)).same
    assert not diff(one, memsyn.Importance(one.sums, 2, objective="another")).same
    assert not diff(one, memory({"a.w": [0.0, 0.0]}, {"a.w": [1.0, 2.0]})).same  # the other is no importance


def test_nothing_at_all() -> None:
    found = diff(memsyn.Memory.empty(), memsyn.Memory.empty())
    assert found.same
    assert found.layers == ()
    zero = memory({"a.w": [1.0]}, {"a.w": [0.0]})
    assert diff(zero, zero).layers == (LayerChange("a", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),)


def second_moment(seed: int, groups: int = 2, width: int = 8) -> torch.Tensor:
    rows = torch.randn(groups, width, 3, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return rows @ rows.transpose(1, 2)


@pytest.mark.parametrize("rank", [None, 1, 2, 3])
def test_the_overlap_of_spectra_is_that_of_their_matrices(rank: int | None) -> None:
    a, b = (spectrum_of(second_moment(seed), rank)[0] for seed in (0, 1))
    m, n = a.dense(), b.dense()
    assert overlap(a, b) == pytest.approx(float((m * n).sum() / (m.norm() * n.norm())))
    assert overlap(a, a) == pytest.approx(1.0)
    assert overlap(a, spectrum_of(5 * second_moment(0), rank)[0]) == pytest.approx(1.0)


def test_the_overlap_of_tables_and_of_nothing() -> None:
    a, b = (spectrum_of(torch.tensor(counts), None)[0] for counts in ([3.0, 0.0, 4.0], [0.0, 2.0, 2.0]))
    assert overlap(a, b) == pytest.approx(4 / (5 * 2**0.5))
    assert overlap(a, spectrum_of(torch.zeros(3), None)[0]) == 0.0


def test_directions_differ_by_their_numbers() -> None:
    one = kronecker.memory(0)
    assert diff(one, one).same
    for other in (kronecker.memory(1), kronecker.memory(0, outputs=False), kronecker.memory(0, 0)):
        assert not diff(one, other).same
    twice = replace(kronecker.factors(), sums={n: 2 * t for n, t in kronecker.factors().sums.items()})
    assert not diff(kronecker.factors(), twice).same
    assert not diff(kronecker.factors(), one).same
