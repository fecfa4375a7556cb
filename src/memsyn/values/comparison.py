"""Compares two memories or importances: each layer's share in both, and how far its anchor moved.

Owns the numbers of the comparison. Must not know files or print.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from memsyn.parameters import layer_of
from memsyn.values.importance import Importance
from memsyn.values.memory import Memory, omega_of


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


@dataclass(frozen=True)
class Difference:
    """How B differs from A."""

    same: bool
    """Whether both have the same parameters, importance and anchors bit for bit, dtypes, quantity and sample counts."""
    layers: tuple[LayerChange, ...]
    only_in_a: tuple[str, ...]
    """Names of parameters."""
    only_in_b: tuple[str, ...]
    reshaped: tuple[str, ...]
    """Names of parameters that both have, in different shapes: their anchors are not compared."""


def diff(a: Memory | Importance, b: Memory | Importance) -> Difference:
    """Which layers gained or lost importance from A to B, and where the anchors moved.

    Importances are compared as Omega, the mean over samples, as memories hold them. Layers are in A's order, followed
    by those that only B has.
    """
    omega_a, omega_b = omega_of(a), omega_of(b)
    total_a, total_b = _sums_by_layer(omega_a), _sums_by_layer(omega_b)
    all_a, all_b = sum(total_a.values()), sum(total_b.values())
    both = [name for name in omega_a if name in omega_b]
    reshaped = tuple(name for name in both if omega_a[name].shape != omega_b[name].shape)
    anchors = (a.anchor, b.anchor) if isinstance(a, Memory) and isinstance(b, Memory) else ({}, {})
    moves = _moves(*anchors, [name for name in both if name in anchors[0] and name not in reshaped])
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
            )
        )
    return Difference(
        same=_same_facts(a, b) and _equal(omega_a, omega_b) and _equal(*anchors),
        layers=tuple(layers),
        only_in_a=tuple(name for name in omega_a if name not in omega_b),
        only_in_b=tuple(name for name in omega_b if name not in omega_a),
        reshaped=reshaped,
    )


def _same_facts(a: Memory | Importance, b: Memory | Importance) -> bool:
    """Whether kind, quantity and numbers of samples are the same."""
    if isinstance(a, Memory) and isinstance(b, Memory) and a.counts != b.counts:
        return False
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
