"""The directions of what a process holds of a layer, and what of its projection is summed over processes.

Owns when a sum is cheap, and which weights cannot be projected in parts. Must not know optimizers.

A weight under `fully_shard` is cut along its first dimension, and its directions are cut with it:

    Linear (m, n), rows are outputs                    D V is local, U^T D is a sum over processes
    Conv1D of transformers (n, m), rows are inputs     U^T D is local, D V is a sum over processes
    table (n, m), rows are inputs with factors         all is local
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Final, NamedTuple

import torch
from torch import Tensor

from memsyn.errors import ProtectionError
from memsyn.parameters import wide_dtype
from memsyn.sharding.exchange import placed_like
from memsyn.sharding.parts import all_rows_held, is_sharded, rows_held
from memsyn.values.directions import Directions, LayerDirections
from memsyn.values.spectra import Spectrum

U_D: Final = "U^T D"
D_V: Final = "D V"

SMALL_SUM: Final = 4 * 2**20
"""Bytes: a sum over processes of so few costs little, whatever the size of its matrix."""

SMALL_SHARE: Final = 8
"""A sum over processes is cheap too if it has so many times fewer numbers than its matrix: a step under `fully_shard`
moves each weight three times (two gathers and a reduction), so that the sum adds about a twelfth to that."""


class HeldLayer(NamedTuple):
    """What this process holds of a layer: all of it, unless the weight is cut."""

    directions: LayerDirections
    """Of the part: fewer groups, outputs or inputs."""
    num_rows: tuple[int, ...]
    """Of the weight, and of the bias if there is one: the rows of the part that the memory knows. They come first."""
    summed: str | None = None
    """`U_D` or `D_V` if it is a sum over processes, of which each has the term of its part; else None."""
    bias_rows: slice | None = None
    """The outputs of which this process holds the bias, if the weight is cut along its inputs."""
    leaves_out_outputs: bool = False
    """Whether the output side is left out, because its sum over processes would be large."""


def held_layer(own: LayerDirections, weight: Tensor, bias: Tensor | None) -> HeldLayer:
    """The part of a layer that this process holds; all processes find the same errors.

    Raises:
        ProtectionError: the weight is cut along another dimension than the first, or not between its groups; or its
            bias is not cut as it is.
    """
    layout = own.matrix.layout
    num_rows = (layout.rows, layout.groups * layout.outputs)[: 1 if bias is None else 2]
    if not is_sharded(weight) and (bias is None or not is_sharded(bias)):
        return HeldLayer(own, num_rows)
    check_cut(own.matrix.weight, weight)
    if bias is not None and not (
        is_sharded(weight)
        and is_sharded(bias)
        and (bias.placements, bias.device_mesh) == (weight.placements, weight.device_mesh)
    ):
        raise ProtectionError(
            f"{own.matrix.bias} is not cut between processes as {own.matrix.weight} is: call fully_shard on their "
            f"layer, or leave both free: exclude={list(own.matrix.names)}."
        )
    rows = _known(rows_held(weight), layout.rows)
    of_bias = None if bias is None else _known(rows_held(bias), layout.groups * layout.outputs)
    counts = tuple(part.stop - part.start for part in (rows, of_bias) if part is not None)
    if layout.groups > 1:
        return HeldLayer(_groups_of(own, weight, bias, rows), counts)
    if layout.is_table and layout.inputs_first:
        inputs = replace(own.inputs, values=own.inputs.values[:, rows])
        held = layout._replace(inputs=counts[0])
        return HeldLayer(replace(own, matrix=replace(own.matrix, layout=held), inputs=inputs), counts)
    if layout.inputs_first:
        return _cut_along_inputs(own, weight, rows, of_bias, counts)
    return _cut_along_outputs(own, weight, rows, counts)


def placed_directions(directions: Directions, parameters: Mapping[str, Tensor]) -> Directions:
    """The same, with the squared gradients of parameters that are no matrices placed as these are: experts are large.

    All processes must call it together if some are DTensors of another placement.
    """
    diagonal = {
        name: replace(own, squares=placed_like(own.squares, parameters[name])) if name in parameters else own
        for name, own in directions.diagonal.items()
    }
    return replace(directions, diagonal=diagonal)


def _cut_along_outputs(own: LayerDirections, weight: Tensor, rows: slice, counts: tuple[int, ...]) -> HeldLayer:
    outputs, layout = own.outputs, own.matrix.layout._replace(outputs=counts[0])
    matrix = replace(own.matrix, layout=layout)
    if outputs is None or outputs.vectors is None:
        return HeldLayer(replace(own, matrix=matrix), counts)
    if not _is_cheap(outputs.rank, own.matrix.layout.outputs, own.matrix.width, weight):
        return HeldLayer(replace(own, matrix=matrix, outputs=None), counts, leaves_out_outputs=True)
    part = replace(outputs, vectors=outputs.vectors[:, rows])
    return HeldLayer(replace(own, matrix=matrix, outputs=part), counts, U_D)


def _cut_along_inputs(
    own: LayerDirections, weight: Tensor, rows: slice, of_bias: slice | None, counts: tuple[int, ...]
) -> HeldLayer:
    inputs, layout = own.inputs, own.matrix.layout
    assert inputs.vectors is not None  # it is no table
    if not _is_cheap(inputs.rank, own.matrix.width, layout.outputs, weight):
        raise ProtectionError(
            f"{own.matrix.weight} is cut between processes along its inputs, of which the memory keeps {inputs.rank} "
            f"directions of {own.matrix.width}: each projection would sum nearly as many numbers over processes as the "
            f"weight has. Consolidate with a smaller rank, or leave it free: exclude={list(own.matrix.names)}."
        )
    parts = [inputs.vectors[:, rows]] + ([] if of_bias is None else [inputs.vectors[:, layout.inputs :]])
    matrix = replace(own.matrix, layout=layout._replace(inputs=counts[0]))
    spectrum = replace(inputs, vectors=torch.cat(parts, 1))
    return HeldLayer(replace(own, matrix=matrix, inputs=spectrum), counts, D_V, of_bias)


def _is_cheap(num_kept: int, num_cut: int, num_others: int, weight: Tensor) -> bool:
    """Whether a sum of (kept directions) x (the dimension that is not cut) numbers is cheap beside the weight."""
    num_bytes = num_kept * num_others * wide_dtype(weight).itemsize
    return num_bytes <= SMALL_SUM or SMALL_SHARE * num_kept <= num_cut


def _groups_of(own: LayerDirections, weight: Tensor, bias: Tensor | None, rows: slice) -> LayerDirections:
    """The groups of a grouped convolution that this process holds."""
    layout = own.matrix.layout
    sizes = [(weight, layout.rows // layout.groups)] + ([] if bias is None else [(bias, layout.outputs)])
    chosen = [[(part.start / size, part.stop / size) for part in all_rows_held(like)] for like, size in sizes]
    whole = all(edge == int(edge) for edges in chosen[0] for edge in edges)
    if not whole or any(edges != chosen[0] for edges in chosen):
        raise ProtectionError(
            f"the {layout.groups} groups of {own.matrix.weight} do not divide evenly between the processes that hold "
            f"it: leave it free, by exclude={list(own.matrix.names)}, or use a number of processes that divides them."
        )
    size = sizes[0][1]
    groups = slice(rows.start // size, rows.stop // size)
    groups = groups if groups.stop > groups.start else slice(0, 1)  # of nothing: it is never used
    held = layout._replace(groups=groups.stop - groups.start)
    outputs = None if own.outputs is None else _sliced(own.outputs, groups)
    return replace(own, matrix=replace(own.matrix, layout=held), inputs=_sliced(own.inputs, groups), outputs=outputs)


def _sliced(spectrum: Spectrum, groups: slice) -> Spectrum:
    vectors = None if spectrum.vectors is None else spectrum.vectors[groups]
    return Spectrum(spectrum.values[groups], vectors, spectrum.rest[groups])


def _known(held: slice, count: int) -> slice:
    """Those of the rows that are held that the memory knows: its `count` rows are the first of all."""
    return slice(min(held.start, count), min(held.stop, count))


def check_cut(name: str, parameter: Tensor) -> None:
    """Refuse a parameter that is cut along another dimension than the first.

    Raises:
        ProtectionError: names it.
    """
    places = parameter.placements if is_sharded(parameter) else ()
    wrong = [place for place in places if not (place.is_shard(0) or place.is_replicate())]
    if wrong:
        raise ProtectionError(
            f"{name} is placed as {wrong[0]!r}: the projected form is for weights that are cut along their first "
            f"dimension, as fully_shard does. Leave it free, by exclude={name!r}, or protect an importance."
        )
