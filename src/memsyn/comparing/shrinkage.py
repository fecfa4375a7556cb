"""How a change of weights is shrunk towards zero: the closed form for one matrix or parameter.

Owns the simultaneous diagonalisation of what the old data and the new task need. Must not know models or bounds.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Final, final

import torch
from torch import Tensor

from memsyn.errors import MismatchError
from memsyn.matrices import Matrix
from memsyn.values.directions import Directions, LayerDirections
from memsyn.values.spectra import Spectrum

RIDGE: Final = 1.0
"""Added to the new task's second moments, in units of their mean eigenvalue (see docs/log.md)."""

Shrink = Callable[[float, dict[str, Tensor]], None]
"""(lambda, parameter -> its change in float64): puts the shrunk changes of one matrix or parameter into the dict."""


@final
@dataclass(frozen=True, eq=False)
class Pencil:
    """Two forms M and N = T T^T with M = T diag(values) T^T, on the span of their kept eigenvectors.

    Outside of the span, M is `rest` times N.

    Attributes:
        into: (G, n, k), from a row x to its coordinates x T; None for the standard basis, where k = n.
        back: (G, n, k), with back^T into the identity.
        values: (G, k).
        rest: (G,).
    """

    into: Tensor | None
    back: Tensor | None
    values: Tensor
    rest: Tensor

    def shrunk(self, rows: Tensor, strength: Tensor) -> Tensor:
        """Each component of rows (G, r, n) divided by 1 + strength * value, with the strength (G, r) of each row."""
        strength = strength.unsqueeze(2)
        if self.into is None or self.back is None:
            return rows / (1 + strength * self.values.unsqueeze(1))
        inside, back = rows @ self.into, self.back.transpose(1, 2)
        outside = rows - inside @ back
        kept = inside / (1 + strength * self.values.unsqueeze(1))
        return kept @ back + outside / (1 + strength * self.rest.view(-1, 1, 1))


def pencil(old: Spectrum, new: Spectrum | None) -> Pencil:
    """M of the old spectrum and N of the new one with `RIDGE` on its diagonal; N is the identity if there is none."""
    old = old.to(torch.device("cpu"), torch.float64)
    if new is None:
        return Pencil(old.vectors, old.vectors, old.values, old.rest)
    new = new.to(torch.device("cpu"), torch.float64)
    if old.vectors is None or new.vectors is None:
        return Pencil(None, None, old.values / (new.values[:, : old.width] + RIDGE), old.rest)
    # Between the two spans and their complement nothing is mixed: k = r + r' columns are enough.
    spanned = torch.cat([old.vectors, new.vectors], 2)
    if spanned.shape[2] < old.width:
        basis = torch.linalg.qr(spanned).Q
    else:
        basis = torch.eye(old.width, dtype=torch.float64, device=spanned.device).expand(len(spanned), -1, -1)
    root = torch.linalg.cholesky(_within(new, basis, RIDGE))
    half = torch.linalg.solve_triangular(root, _within(old, basis, 0.0), upper=False)
    whole = torch.linalg.solve_triangular(root, half.transpose(1, 2), upper=False)
    values, vectors = torch.linalg.eigh((whole + whole.transpose(1, 2)) / 2)
    inverse = torch.linalg.solve_triangular(root.transpose(1, 2), vectors, upper=True)
    return Pencil(basis @ root @ vectors, basis @ inverse, values.clamp_min(0), old.rest / (new.rest + RIDGE))


def _within(spectrum: Spectrum, basis: Tensor, ridge: float) -> Tensor:
    """Q^T (M + ridge I) Q."""
    assert spectrum.vectors is not None
    projected = basis.transpose(1, 2) @ spectrum.vectors
    kept = (projected * (spectrum.values - spectrum.rest.unsqueeze(1)).unsqueeze(1)) @ projected.transpose(1, 2)
    return kept + torch.diag_embed((spectrum.rest + ridge).unsqueeze(1).expand(-1, basis.shape[2]))


def of_matrix(own: LayerDirections, learned: LayerDirections | None) -> Shrink:
    """D' = argmin ||D' - D||_N^2 + lambda tr(S D' A D'^T), with ||X||_N^2 = tr(S_new X A_new X^T), or ||X||^2.

    With S = T diag(s) T^T, S_new = T T^T and the same for A, component (i, j) of D is divided by 1 + lambda s_i a_j.
    """
    matrix, scale = own.matrix, own.scales[0] * own.scales[1] / own.mass
    new_inputs, new_outputs = None, None
    if learned is not None:
        _check_same_reading(matrix, learned.matrix)
        scale /= learned.scales[0] * learned.scales[1]
        new_inputs = learned.inputs
        # With the rows of new classes, S_new is of another size: the old rows are then all alike.
        new_outputs = learned.outputs if learned.matrix.layout == matrix.layout else None
    inputs = pencil(own.inputs, new_inputs)
    outputs = None if own.outputs is None else pencil(own.outputs, new_outputs)

    def shrink(strength: float, changes: dict[str, Tensor]) -> None:
        parts, times = [changes[name] for name in matrix.names], strength * scale
        change = matrix.joined(*parts)
        if outputs is None:
            found = inputs.shrunk(change, change.new_full(change.shape[:2], times))
        else:
            assert outputs.into is not None
            assert outputs.back is not None
            rows = outputs.into.transpose(1, 2) @ change
            others = (times * outputs.rest).unsqueeze(1).expand(change.shape[:2])
            found = inputs.shrunk(change - outputs.back @ rows, others)
            found += outputs.back @ inputs.shrunk(rows, times * outputs.values)
        changes.update(zip(matrix.names, matrix.split(found, parts), strict=True))

    return shrink


def of_parameter(name: str, need: Tensor, learned: Tensor | None) -> Shrink:
    """D' = D / (1 + lambda g), or D / (1 + lambda g / g_new), for a parameter that is no matrix."""
    ratio = need.to("cpu", torch.float64)
    if learned is not None:
        new = learned.to("cpu", torch.float64)
        if new.ndim != ratio.ndim or new.shape[1:] != ratio.shape[1:] or (new.ndim and len(new) < len(ratio)):
            raise MismatchError(
                f"{name} is {tuple(new.shape)} in learned=, and {tuple(ratio.shape)} in the memory: measure both with "
                "this model."
            )
        new = new + RIDGE * new.mean()
        ratio = ratio / (new[: len(ratio)] if ratio.ndim else new)

    def shrink(strength: float, changes: dict[str, Tensor]) -> None:
        changes[name] = changes[name] / (1 + strength * ratio)

    return shrink


def shrinkages(
    directions: Directions, importance: Mapping[str, Tensor], learned: Directions | None, moved: Collection[str]
) -> list[Shrink]:
    """What shrinks the changes of the parameters that have moved, one after the other.

    Raises:
        MismatchError: the new task was measured without a parameter that has moved, or it is read as another matrix.
    """
    found: list[Shrink] = []
    for key, own in directions.layers.items():
        if any(name in moved for name in own.matrix.names):
            if learned is None or key in learned.layers:
                found.append(of_matrix(own, None if learned is None else learned.layers[key]))
            else:
                found.append(_put_back(own.matrix.names, learned))
    for name, single in directions.diagonal.items():
        if name in moved:
            need = single.squares * (single.scale / single.mass)
            if learned is None or name in learned.diagonal:
                new = None if learned is None else learned.diagonal[name]
                found.append(of_parameter(name, need, None if new is None else new.squares * new.scale))
            else:
                found.append(_put_back((name,), learned))
    found += [of_parameter(name, importance[name], None) for name in importance if name in moved]
    return found


def _put_back(names: tuple[str, ...], learned: Directions) -> Shrink:
    """For parameters that no output of the new task relies on: they go back to the old values."""
    unknown = [name for name in names if name not in learned.free]
    if unknown:
        raise MismatchError(
            f"learned= does not hold {unknown[0]} as the memory does, and it has moved: measure the new task with all "
            "parameters, with this model and estimator='kronecker'."
        )

    def shrink(strength: float, changes: dict[str, Tensor]) -> None:
        changes.update({name: torch.zeros_like(changes[name]) for name in names})

    return shrink


def _check_same_reading(old: Matrix, new: Matrix) -> None:
    mine, theirs = old.layout, new.layout
    is_same = (mine.groups, mine.inputs_first, mine.is_table) == (theirs.groups, theirs.inputs_first, theirs.is_table)
    if not is_same or (old.width != new.width and not mine.is_table):
        raise MismatchError(
            f"{old.weight} is read as {mine} in the memory, and as {theirs} in learned=: measure both with this model."
        )
