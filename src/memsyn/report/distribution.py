"""How importance is distributed: the Lorenz curve, and the most important units.

Owns these numbers. Must not know pages.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from memsyn.parameters import layer_of


@dataclass(frozen=True)
class Lorenz:
    """How concentrated an importance is.

    Attributes:
        weights: shares p of the weights, the least important first, from 0 to 1.
        held: the share of all importance that they hold: L(p) = sum of the p n smallest / sum of all; linear between.
        gini: 1 - 2 int L: 0 if every weight is as important as every other, 1 - 1/n if one holds it all.
        half: the smallest share of weights that together hold at least half of the importance.
    """

    weights: tuple[float, ...]
    held: tuple[float, ...]
    gini: float
    half: float


@dataclass(frozen=True)
class Unit:
    """One row of parameters, such as a neuron with its incoming weights and bias, or a filter."""

    name: str
    """The name of its layer; of its parameter, if the layer's parameters have different numbers of rows."""
    row: int
    total: float
    """The sum of Omega over its weights."""
    share: float
    """Of the total importance of the model."""


def lorenz(omega: Mapping[str, Tensor], num_points: int = 201) -> Lorenz | None:
    """The curve over all weights and its Gini coefficient, exact, by sorting. None if all importance is zero."""
    values = torch.cat([torch.zeros(1), *(part.detach().flatten().float().cpu() for part in omega.values())])
    values.numpy().sort()  # in place, without the indices that torch.sort would hold; the added 0 stays first
    held = values.cumsum(0, dtype=torch.float64)
    total, num = float(held[-1]), len(values) - 1
    if not total:
        return None
    held /= total
    area = (float(held.sum()) - (float(held[0]) + float(held[-1])) / 2) / num
    shares = torch.linspace(0, 1, num_points, dtype=torch.float64)
    places = (shares * num).floor().long().clamp(max=num - 1)
    points = held[places].lerp(held[places + 1], shares * num - places)
    above = num - int((held <= 0.5).sum()) + 1  # weights from the last place that holds at most half
    return Lorenz(tuple(shares.tolist()), tuple(points.tolist()), 1 - 2 * area, above / num)


def top_units(omega: Mapping[str, Tensor], num: int) -> Sequence[Unit]:
    """The `num` rows with the most importance. Parameters of a layer with the same number of rows share its rows.

    A Linear(64, 10) has 10 units: row i of its weight, (10, 64), and entry i of its bias, (10,).
    """
    sums: dict[tuple[str, int], Tensor] = {}
    members: dict[tuple[str, int], list[str]] = {}
    for name, values in omega.items():
        if values.numel():
            rows = values.detach().double().reshape(len(values) if values.ndim else 1, -1).sum(1)
            key = layer_of(name), len(rows)
            sums[key] = sums[key] + rows if key in sums else rows
            members.setdefault(key, []).append(name)
    layers = [layer for layer, _ in sums]
    names = {key: key[0] if layers.count(key[0]) == 1 else " + ".join(own) for key, own in members.items()}
    total = sum(float(rows.sum()) for rows in sums.values())
    found = []
    for key, rows in sums.items():
        best = rows.topk(min(num, len(rows)))
        for value, row in zip(best.values.tolist(), best.indices.tolist(), strict=True):
            found.append(Unit(names[key], row, value, value / total if total else 0.0))
    return sorted(found, key=lambda unit: -unit.total)[:num]
