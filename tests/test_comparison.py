"""What has changed between two memories, against numbers worked out by hand."""

from dataclasses import replace

import pytest
import torch
from scipy.stats import spearmanr

import memsyn
from memsyn.values.comparison import LayerChange, LayerMove, diff, layer_moves, overlap
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
        # Shares of A 0.1 0.2 0.1, of B 0.05 0.2 0
        LayerChange("a", 0.4, 0.25, 4.0, 5.0, pytest.approx(5**0.5), pytest.approx(5**0.5 / 5), pytest.approx(0.075)),
        LayerChange("c", 0.4, 0.45, 4.0, 9.0, 0.5, None, pytest.approx(0.025)),  # A's anchor is zero there
        LayerChange("old", 0.2, 0.0, 2.0, 0.0, None, None, 0.1),
        LayerChange("new", 0.0, 0.3, 0.0, 6.0, None, None, 0.15),
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
    assert found.layers == (LayerChange("h", 1.0, 1.0, 2.0, 4.0, 1.0, 1.0, pytest.approx(0.5)),)
    assert not found.same


def test_importances_are_compared_as_means() -> None:
    one = memsyn.Importance({"a.w": torch.tensor([2.0, 4.0])}, 2)
    other = memsyn.Importance({"a.w": torch.tensor([4.0, 8.0])}, 4)
    found = diff(one, other)
    assert found.layers == (LayerChange("a", 1.0, 1.0, 3.0, 3.0, None, None, 0.0),)
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
    assert diff(zero, zero).layers == (LayerChange("a", 0.0, 0.0, 0.0, 0.0, 0.0, 0.0, 0.0),)


# Whether a difference matters


def importance(*values: float, **more: list[float]) -> memsyn.Importance:
    return memsyn.Importance({n: torch.tensor(v) for n, v in {"a.w": list(values), **more}.items()}, 1)


def test_the_share_that_moved_is_the_distance_of_two_distributions() -> None:
    """Half of the sum of |p - q|: 0 for the same distribution in any unit, 1 if no weight has importance in both."""
    found = diff(importance(4, 3, 2, 1), importance(1, 3, 2, 4))
    assert found.shifted == pytest.approx(0.3)
    assert diff(importance(4, 3, 2, 1), importance(40, 30, 20, 10)).shifted == 0.0
    assert diff(importance(1, 2, 0, 0), importance(0, 0, 5, 5)).shifted == 1.0
    a, b = (torch.rand(3, 50, generator=torch.Generator().manual_seed(seed)) for seed in (0, 1))
    one, other = (memsyn.Importance({"a.w": own[:2], "b.w": own[2]}, 1) for own in (a, b))
    expected = float((a.double() / a.double().sum() - b.double() / b.double().sum()).abs().sum() / 2)
    assert diff(one, other).shifted == pytest.approx(expected)
    assert diff(other, one).shifted == pytest.approx(expected)
    assert sum(layer.shifted for layer in diff(one, other).layers) == pytest.approx(expected)


def test_ranks_are_those_of_scipy() -> None:
    generator = torch.Generator().manual_seed(0)
    for _ in range(5):
        a, b = (torch.randint(0, 6, (300,), generator=generator).float() for _ in range(2))  # with ties
        b += a
        one, other = (memsyn.Importance({"a.w": own[:100].reshape(10, 10), "b.w": own[100:]}, 1) for own in (a, b))
        assert diff(one, other).rank_correlation == pytest.approx(spearmanr(a, b).statistic)
        assert diff(one, other).rank_interval is None


def test_ranks_and_shares_of_a_layer_that_grew_are_those_of_its_old_rows() -> None:
    one = memsyn.Importance({"h.w": torch.tensor([[1.0, 2.0], [3.0, 4.0]])}, 1)
    other = memsyn.Importance({"h.w": torch.tensor([[1.0, 2.0], [3.0, 4.0], [0.0, 10.0]])}, 1)
    found = diff(one, other)
    assert found.rank_correlation == 1.0
    assert found.shifted == pytest.approx(0.5)  # half of all is in the new row
    assert found.reshaped == ("h.w",)
    turned = memsyn.Importance({"h.w": torch.tensor([[1.0, 2.0, 3.0, 4.0]])}, 1)
    assert (diff(one, turned).rank_correlation, diff(one, turned).shifted) == (None, 1.0)


def test_of_many_weights_a_sample_is_ranked(monkeypatch: pytest.MonkeyPatch) -> None:
    generator = torch.Generator().manual_seed(0)
    a = torch.rand(40_000, generator=generator)
    b = a + torch.rand(40_000, generator=generator)
    one, other = (memsyn.Importance({"a.w": own[:30_000].reshape(300, 100), "b.w": own[30_000:]}, 1) for own in (a, b))
    exact = diff(one, other).rank_correlation
    monkeypatch.setattr("memsyn.values.comparison.MAX_RANKED", 2_000)
    found = diff(one, other)
    lower, upper = found.rank_interval
    assert found.rank_correlation != exact
    assert lower < exact < upper
    assert upper - lower < 0.06
    assert diff(one, other) == found  # by a fixed seed
    assert f"(95% interval {lower:.3f} to {upper:.3f}, from a sample)" in found.sentence


@pytest.mark.parametrize(
    ("rank", "shifted", "extent"),
    [
        (0.95, 0.05, "same"), (0.949, 0.05, "small"), (0.95, 0.051, "small"), (0.9, 0.15, "small"),
        (0.899, 0.0, "large"), (1.0, 0.151, "large"), (None, 0.04, "same"), (None, 0.5, "large"),
    ],
)  # fmt: skip
def test_the_extent_is_decided_by_both_numbers(rank: float | None, shifted: float, extent: str) -> None:
    found = replace(diff(A, B), rank_correlation=rank, shifted=shifted)
    assert found.extent == extent
    words = {"same": "No difference that matters: ", "small": "A small difference: ", "large": "A large difference: "}
    assert found.sentence.startswith(f"{words[extent]}{shifted:.1%} of the importance moved to other weights")
    assert ("cannot be told" in found.sentence) == (rank is None)
    assert found.sentence.endswith(
        "Allowed are up to 5% and a correlation of at least 0.95; for a small difference up to 15% and a correlation "
        "of at least 0.9."
    )


def test_without_importance_the_directions_decide() -> None:
    one = kronecker.memory(0)
    assert (diff(one, one).extent, diff(one, one).overlap) == ("same", 1.0)
    found = diff(one, kronecker.memory(0, 1))  # overlaps 0.707 x 1 and 1 x 1
    assert found.overlap == pytest.approx((0.5**0.5 + 1) / 2)
    assert (found.extent, found.shifted) == ("small", None)
    assert "the directions overlap by 0.854. Asked for is at least 0.95; for a small difference 0.8." in found.sentence
    other = diff(one, kronecker.memory(1))
    assert (other.overlap, other.extent) == (0.5, "large")
    inputs = diff(kronecker.memory(0, outputs=False), kronecker.memory(0, 1, outputs=False))
    assert inputs.overlap == pytest.approx((0.5**0.5 + 1) / 2)


def test_what_holds_nothing_cannot_be_judged() -> None:
    found = diff(memsyn.Memory.empty(), A)
    assert found.extent == "cannot say"
    assert found.sentence == ("Whether the difference matters cannot be said: one of the two holds nothing to compare.")
    assert (found.shifted, found.rank_correlation, found.overlap) == (None, None, None)
    assert diff(A, replace(A)).sentence == "No difference: both hold the same, bit for bit."
    assert diff(importance(0, 0), importance(1, 2)).extent == "cannot say"


def test_how_far_weights_are_from_the_anchor() -> None:
    weights = {"a.w": torch.tensor([3.0, 2.0]), "a.b": torch.tensor([1.0]), "c.w": torch.tensor([1.0, 1.0])}
    a = layer_moves(A, weights)
    # |0| * 1 + |2| * 2 + |3| * 1
    assert a == [LayerMove("a", pytest.approx(13**0.5), pytest.approx(13**0.5 / 5), 7.0)]
    (moved,) = layer_moves(A, weights, {"a.b": torch.tensor([0.0])})
    assert moved == LayerMove("a", 1.0, None, 1.0)


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
