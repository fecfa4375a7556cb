"""Compares two files: each layer's share of the importance, how far its anchor moved, and its directions.

Owns the numbers of the comparison, and whether the difference matters. Must not know files or print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Final

import torch
from torch import Tensor

from memsyn.errors import MismatchError
from memsyn.parameters import layer_of
from memsyn.values.directions import Directions, LayerDirections
from memsyn.values.factors import KroneckerFactors, layer_names
from memsyn.values.memory import Held, Memory, directions_of, kind_of, omega_of
from memsyn.values.ranks import MAX_RANKED, spearman, spearman_interval
from memsyn.values.spectra import Spectrum

SAME: Final = "same"
SMALL: Final = "small"
LARGE: Final = "large"
UNKNOWN: Final = "cannot say"

LIMITS: Final = {SAME: (0.95, 0.05), SMALL: (0.9, 0.15)}
"""Extent -> the least rank correlation, and the largest share of importance that moved. Reasons: docs/decisions.md."""
OVERLAPS: Final = {SAME: 0.95, SMALL: 0.8}
"""Extent -> the least overlap of directions."""


@dataclass(frozen=True)
class LayerChange:
    """One layer in A and B; a layer that only one of them has counts as zero in the other."""

    layer: str
    share_a: float
    """Of the total importance, 0 to 1."""
    share_b: float
    total_a: float
    """The sum of Omega over the layer's weights."""
    total_b: float
    moved: float | None
    """||theta*_B - theta*_A||, over the parameters that both hold in the same shape; None without two anchors."""
    moved_relative: float | None
    """moved / ||theta*_A||; None if ||theta*_A|| is zero."""
    shifted: float
    """Half of the sum of |p_A - p_B| over its weights, of importances p that add up to 1 over the model."""


@dataclass(frozen=True)
class LayerMove:
    """How far the weights of one layer are from the old ones."""

    layer: str
    moved: float
    """||theta - theta*||."""
    moved_relative: float | None
    """moved / ||theta*||; None if ||theta*|| is zero."""
    weighted: float
    """The sum of Omega |theta - theta*|: a change counts where it matters."""


@dataclass(frozen=True)
class DirectionsChange:
    """The directions of one layer in A and B; None where a file does not have them.

    The overlap of two second moments M and N is tr(M N) / (||M||_F ||N||_F): 1 if they have the same directions in the
    same proportions, 0 if no direction of one has weight in the other. Both are scaled, so their units do not count.
    """

    layer: str
    room_a: float | None
    """The share of directions in which more than half of a step remains, 0 to 1."""
    room_b: float | None
    input_overlap: float | None
    """Of the second moments of the inputs; None if only one file has the layer, or in another shape."""
    output_overlap: float | None
    """Of the second moments of the output gradients."""

    @property
    def overlap(self) -> float | None:
        """That of the Kronecker products A x S: tr((A x S)(B x T)) is tr(A B) tr(S T), so it is the product of both."""
        if self.input_overlap is None:
            return None
        return self.input_overlap * (1.0 if self.output_overlap is None else self.output_overlap)


@dataclass(frozen=True)
class Difference:
    """How B differs from A."""

    same: bool
    """Whether both have the same parameters, importance and anchors bit for bit, dtypes, quantity and sample counts.

    Of memories the directions and statistics must be the same too, of factors the sums.
    """
    layers: tuple[LayerChange, ...]
    only_in_a: tuple[str, ...]
    """Names of parameters."""
    only_in_b: tuple[str, ...]
    reshaped: tuple[str, ...]
    """Names of parameters that both have, in different shapes: their anchors are not compared."""
    directions: tuple[DirectionsChange, ...] = ()
    statistics: tuple[str, ...] = ()
    """Names of statistics of memories that differ, or that only one of them has."""
    shifted: float | None = None
    """The share of importance that is on other weights in B, 0 to 1: the sum over layers. None without importance."""
    rank_correlation: float | None = None
    """Spearman's, over the weights that both have; None if it is not defined."""
    rank_interval: tuple[float, float] | None = None
    """The 95% interval of the rank correlation, if of too many weights a sample was ranked."""
    overlap: float | None = None
    """The mean over layers of the overlap of inputs times that of output gradients: of the Kronecker products."""

    @property
    def extent(self) -> str:
        """Whether the difference matters: "same", "small", "large" or "cannot say", by `LIMITS` or `OVERLAPS`.

        Importance decides, if both have it; else the directions.
        """
        if self.same:
            return SAME
        if self.shifted is not None:
            ranked = 1.0 if self.rank_correlation is None else self.rank_correlation
            known = (own for own, (low, high) in LIMITS.items() if ranked >= low and self.shifted <= high)
            return next(known, LARGE)
        if self.overlap is not None:
            return next((own for own, least in OVERLAPS.items() if self.overlap >= least), LARGE)
        return UNKNOWN

    @property
    def sentence(self) -> str:
        """The extent in words, with its numbers and limits."""
        if self.same:
            return "No difference: both hold the same, bit for bit."
        words = {
            SAME: "No difference that matters",
            SMALL: "A small difference",
            LARGE: "A large difference",
            UNKNOWN: "Whether the difference matters cannot be said",
        }[self.extent]
        if self.shifted is not None:
            ranked = "cannot be told" if self.rank_correlation is None else f"is {self.rank_correlation:.3f}"
            if self.rank_interval is not None:
                ranked += " (95% interval {:.3f} to {:.3f}, from a sample)".format(*self.rank_interval)
            limits = [f"up to {high:.0%} and a correlation of at least {low:g}" for low, high in LIMITS.values()]
            return (
                f"{words}: {self.shifted:.1%} of the importance moved to other weights, and the rank correlation of "
                f"the weights {ranked}. Allowed are {limits[0]}; for a small difference {limits[1]}."
            )
        if self.overlap is not None:
            return (
                f"{words}: the directions overlap by {self.overlap:.3f}. Asked for is at least {OVERLAPS[SAME]:g}; for "
                f"a small difference {OVERLAPS[SMALL]:g}."
            )
        return f"{words}: one of the two holds nothing to compare."


def diff(a: Held, b: Held) -> Difference:
    """Which layers gained or lost importance or room from A to B, and where the anchors moved.

    Importances are compared as Omega, the mean over samples, as memories hold them; factors as the directions of a
    memory of them alone. Layers are in A's order, followed by those that only B has.

    Raises:
        MismatchError: one file holds an importance, the other directions or factors.
    """
    own, their = directions_of(a), directions_of(b)
    omega_a, omega_b = omega_of(a), omega_of(b)
    if (omega_a and their and not (omega_b or own)) or (omega_b and own and not (omega_a or their)):
        raise MismatchError(
            f"{kind_of(a)} and {kind_of(b)} have nothing to compare: one holds an importance, the other second moments "
            "of weight matrices. Give two files that hold the same."
        )
    total_a, total_b = _sums_by_layer(omega_a), _sums_by_layer(omega_b)
    all_a, all_b = sum(total_a.values()), sum(total_b.values())
    both = [name for name in omega_a if name in omega_b]
    reshaped = tuple(name for name in both if omega_a[name].shape != omega_b[name].shape)
    anchors = (a.anchor, b.anchor) if isinstance(a, Memory) and isinstance(b, Memory) else ({}, {})
    moves = _moves(*anchors, [name for name in both if name in anchors[0] and name not in reshaped])
    statistics = _unlike_statistics(a, b)
    shifts = _shifts(omega_a, omega_b, all_a, all_b)
    correlation, interval = rank_correlation([(omega_a[name], omega_b[name]) for name in both])
    directions = _directions_changes(own or Directions(), their or Directions())
    overlaps = [change.overlap for change in directions if change.overlap is not None]
    layers = []
    for layer in {**total_a, **total_b}:
        one, other = total_a.get(layer, 0.0), total_b.get(layer, 0.0)
        moved, length = moves.get(layer, (None, 0.0))
        layers.append(
            LayerChange(
                layer=layer,
                share_a=one / all_a if all_a else 0.0,
                share_b=other / all_b if all_b else 0.0,
                total_a=one,
                total_b=other,
                moved=moved,
                moved_relative=moved / length if moved is not None and length else None,
                shifted=shifts[layer],
            )
        )
    return Difference(
        same=_same_facts(a, b) and _equal(omega_a, omega_b) and _equal(*anchors) and not statistics,
        directions=directions,
        layers=tuple(layers),
        only_in_a=tuple(name for name in omega_a if name not in omega_b),
        only_in_b=tuple(name for name in omega_b if name not in omega_a),
        reshaped=reshaped,
        statistics=statistics,
        shifted=min(1.0, sum(shifts.values())) if all_a and all_b else None,
        rank_correlation=correlation if all_a and all_b else None,
        rank_interval=interval if all_a and all_b else None,
        overlap=sum(overlaps) / len(overlaps) if overlaps else None,
    )


def layer_moves(
    memory: Memory, weights: Mapping[str, Tensor], before: Mapping[str, Tensor] | None = None
) -> list[LayerMove]:
    """How far new weights are from the old ones, by layer: by length, and where they matter.

    Parameters that one side lacks, or has in another shape, are left out.

    Args:
        memory: a memory with an importance.
        weights: the new weights, under the memory's names.
        before: the old ones; by default the anchor.
    """
    old = memory.anchor if before is None else before
    names = [n for n in memory.importance if n in weights and n in old and weights[n].shape == old[n].shape]
    weighted: dict[str, float] = {}
    for name in names:
        distance = (weights[name].double() - old[name].double()).abs()
        own = float((memory.importance[name].double() * distance).sum())
        weighted[layer_of(name)] = weighted.get(layer_of(name), 0.0) + own
    return [
        LayerMove(layer, moved, moved / length if length else None, weighted[layer])
        for layer, (moved, length) in _moves(old, weights, names).items()
    ]


def _num_shared(one: Tensor, other: Tensor) -> int:
    """How many leading numbers of two parameters are the same weights: all, or those of the rows that both have."""
    alike = one.ndim == other.ndim and one.shape[1:] == other.shape[1:]
    return min(one.numel(), other.numel()) if alike else 0


def _shifts(a: Mapping[str, Tensor], b: Mapping[str, Tensor], all_a: float, all_b: float) -> dict[str, float]:
    """Layer -> half of the sum of |p_A - p_B| over its weights; of a weight that one of them lacks, p is 0 there."""
    found: dict[str, float] = {}
    for name in {**a, **b}:
        one, other = (
            own[name].detach().double().flatten() / (total or 1.0) if name in own else torch.zeros(0).double()
            for own, total in ((a, all_a), (b, all_b))
        )
        shared = _num_shared(a[name], b[name]) if name in a and name in b else 0
        moved = (one[:shared] - other[:shared]).abs().sum() + one[shared:].sum() + other[shared:].sum()
        found[layer_of(name)] = found.get(layer_of(name), 0.0) + float(moved) / 2
    return found


def rank_correlation(pairs: list[tuple[Tensor, Tensor]]) -> tuple[float | None, tuple[float, float] | None]:
    """Spearman's correlation over pairs of parameters, and its interval if it is of a sample.

    The sample has one weight of each of `MAX_RANKED` equal stretches, drawn by a fixed seed.
    """
    counts = [_num_shared(one, other) for one, other in pairs]
    total = sum(counts)
    sides: tuple[list[Tensor], list[Tensor]] = ([], [])
    if not total:
        return None, None
    places = torch.arange(min(total, MAX_RANKED), dtype=torch.float64)
    if total > MAX_RANKED:
        places += torch.rand(MAX_RANKED, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
        places = (places * (total / MAX_RANKED)).clamp(max=total - 1)
    chosen, start = places.long(), 0
    for pair, count in zip(pairs, counts, strict=True):
        own = chosen[(chosen >= start) & (chosen < start + count)] - start
        for side, values in zip(sides, pair, strict=True):
            side.append(values.detach().flatten()[own.to(values.device)].double().cpu())
        start += count
    found = spearman(*(torch.cat(side).numpy() for side in sides))
    if math.isnan(found):
        return None, None
    return found, spearman_interval(found, MAX_RANKED) if total > MAX_RANKED else None


def _unlike_statistics(a: Held, b: Held) -> tuple[str, ...]:
    if not (isinstance(a, Memory) and isinstance(b, Memory)):
        return ()
    one, other = a.statistics, b.statistics
    both = {name for name in one if name in other and _equal({name: one[name]}, {name: other[name]})}
    return tuple(name for name in {**one, **other} if name not in both)


def _directions_changes(a: Directions, b: Directions) -> tuple[DirectionsChange, ...]:
    names = layer_names({key: own.matrix for key, own in {**b.layers, **a.layers}.items()})
    found = []
    for key in {**a.layers, **b.layers}:
        one, other = a.layers.get(key), b.layers.get(key)
        found.append(
            DirectionsChange(
                layer=names[key],
                room_a=None if one is None else one.room(),
                room_b=None if other is None else other.room(),
                input_overlap=_overlap_of(one, other, "inputs"),
                output_overlap=_overlap_of(one, other, "outputs"),
            )
        )
    return tuple(found)


def _overlap_of(one: LayerDirections | None, other: LayerDirections | None, side: str) -> float | None:
    if one is None or other is None or one.matrix != other.matrix:
        return None
    sides = [own.inputs if side == "inputs" else own.outputs for own in (one, other)]
    return None if sides[0] is None or sides[1] is None else overlap(sides[0], sides[1])


def overlap(a: Spectrum, b: Spectrum) -> float:
    """tr(A B) / (||A||_F ||B||_F), of two spectra with the same width and groups, without forming a matrix.

    With A = sum_i d_i v_i v_i^T + r I and B = sum_j e_j w_j w_j^T + s I:
    tr(A B) = sum_ij d_i e_j (v_i^T w_j)^2 + s sum_i d_i + r sum_j e_j + n r s.
    """
    length = math.sqrt(max(0.0, _inner(a, a) * _inner(b, b)))  # rounding may leave less than 0
    return min(1.0, _inner(a, b) / length) if length else 0.0


def _inner(a: Spectrum, b: Spectrum) -> float:
    """tr(A B), summed over groups."""
    (d, r), (e, s) = ((own.values.double() - own.rest.double().unsqueeze(1), own.rest.double()) for own in (a, b))
    if a.vectors is None or b.vectors is None:
        products = d * e  # both are diagonal
    else:
        products = (d.unsqueeze(1) @ (a.vectors.double().transpose(1, 2) @ b.vectors.double()).square()).squeeze(1) * e
    return float((products.sum(1) + s * d.sum(1) + r * e.sum(1) + a.width * r * s).sum())


def _same_facts(a: Held, b: Held) -> bool:
    """Whether kind, quantity and numbers of samples are the same, and what is kept of second moments."""
    if isinstance(a, Memory) and isinstance(b, Memory):
        one, other = (own.directions or Directions() for own in (a, b))
        groups = zip(one.groups().values(), other.groups().values(), strict=True)
        whole = one.header() == other.header() and all(_equal(*pair) for pair in groups)
        if a.counts != b.counts or a.directions_quantity != b.directions_quantity or not whole:
            return False
    if isinstance(a, KroneckerFactors) and isinstance(b, KroneckerFactors):
        whole = a.matrices == b.matrices and _equal(a.sums, b.sums)
        return whole and a.quantity == b.quantity and a.num_samples == b.num_samples
    return type(a) is type(b) and a.quantity == b.quantity and a.num_samples == b.num_samples


def _sums_by_layer(omega: Mapping[str, Tensor]) -> dict[str, float]:
    sums: dict[str, float] = {}
    for name, values in omega.items():
        layer = layer_of(name)
        sums[layer] = sums.get(layer, 0.0) + float(values.sum(dtype=torch.float64))
    return sums


def _moves(a: Mapping[str, Tensor], b: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, tuple[float, float]]:
    """By layer, ||b - a|| and ||a||."""
    squares: dict[str, tuple[float, float]] = {}
    for name in names:
        moved, length = squares.get(layer_of(name), (0.0, 0.0))
        wide = a[name].double()
        moved += float((b[name].double() - wide).square().sum())
        squares[layer_of(name)] = moved, length + float(wide.square().sum())
    return {layer: (math.sqrt(moved), math.sqrt(length)) for layer, (moved, length) in squares.items()}


def _equal(a: Mapping[str, Tensor], b: Mapping[str, Tensor]) -> bool:
    return a.keys() == b.keys() and all(
        values.dtype == b[name].dtype and torch.equal(values, b[name]) for name, values in a.items()
    )
