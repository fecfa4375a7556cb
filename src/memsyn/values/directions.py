"""The value Directions: what a memory keeps of Kronecker factors, as spectra per weight matrix.

Owns how the factors of tasks are combined, the predicted change of outputs, and how much room is left. Must not know
models or optimizers.
"""

from __future__ import annotations

import math
from collections.abc import Container, Mapping
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor

from memsyn.errors import MismatchError
from memsyn.matrices import EXACT_WIDTH, Layout, Matrix, num_weights_of
from memsyn.parameters import layer_of, only_those, under_new_names, way_out
from memsyn.sharding.exchange import Job, divided, gathered, values_at
from memsyn.sharding.parts import is_sharded, local_part, on_parts, one_sharded
from memsyn.storage.reading_and_writing import Groups, checked, checked_count
from memsyn.values.display import LayerRow, counted_matrices, html_table, size_in_memory
from memsyn.values.factors import (
    BOTH,
    KroneckerFactors,
    layer_names,
    matrices_from,
    matrices_header,
    names_read,
    packed,
    renamed_key,
    renamed_matrix,
    unpacked,
)
from memsyn.values.spectra import Spectrum, combined

RANK: Final = 64
"""How many eigenvectors of each side are kept by default; the measurements are in docs/decisions.md."""

STRENGTH: Final = 10.0
"""c: the default strength of a projection, chosen on permuted-fashion and scripts8 (docs/decisions.md)."""

FLOOR: Final = 0.1
"""mu: the part of an input direction's weight that does not depend on the output direction."""


def damping(inputs: Tensor, outputs: Tensor | None, strength: float = STRENGTH) -> Tensor:
    """1 / (1 + c a_j ((1 - mu) s_i + mu)), by which a step's change is multiplied: (G, m, n), or (G, 1, n) without S.

    Args:
        inputs: a, (G, n), eigenvalues of A, with a mean of 1 for each task.
        outputs: s, (G, m), eigenvalues of S, with mean 1; None if it is not known: then s is 1.
        strength: c.
    """
    weights = inputs.unsqueeze(1)
    if outputs is not None:
        weights = weights * _weights_of_outputs(outputs).unsqueeze(2)
    return 1 / (1 + strength * weights)


def _weights_of_outputs(outputs: Tensor) -> Tensor:
    """(1 - mu) s_i + mu."""
    return (1 - FLOOR) * outputs + FLOOR


def diagonal_damping(squares: Tensor, mass: float, strength: float = STRENGTH) -> Tensor:
    """1 / (1 + c sum_t ((1 - mu) g_t / mean(g_t) + mu)), for a parameter without a matrix.

    Args:
        squares: sum_t g_t / mean(g_t), of the parameter's shape; g_t are mean squared gradients.
        mass: the number of tasks.
        strength: c.
    """
    return 1 / (1 + strength * ((1 - FLOOR) * squares + FLOOR * mass))


@final
@dataclass(frozen=True, eq=False)
class LayerDirections:
    """The second moments of one matrix over all tasks.

    Attributes:
        matrix: which parameter, and how it is read.
        inputs: sum over tasks of A, each scaled to mean eigenvalue 1.
        outputs: the mean over tasks of S, each scaled to mean eigenvalue 1; None if only inputs were measured.
        mass: the number of tasks; with rule `mean` 1, with `ema` at most 1.
        scales: the mean eigenvalues of A and of S, averaged over tasks, by which the units of the outputs come back.
        counts: the positions and the samples that were measured.
    """

    matrix: Matrix
    inputs: Spectrum
    outputs: Spectrum | None
    mass: float
    scales: tuple[float, float]
    counts: tuple[int, int]

    def without_bias(self, names: Container[str]) -> LayerDirections:
        """The same without the column of the bias, if the bias is not among the names."""
        if self.matrix.bias is None or self.matrix.bias in names:
            return self
        return replace(self, matrix=replace(self.matrix, bias=None), inputs=self.inputs.without_last())

    def of_bias(self) -> LayerDirections:
        """Those of the bias without its weight: its input is 1, whose second moment is the last number of A."""
        assert self.matrix.bias is not None
        layout = self.matrix.layout._replace(inputs=1, inputs_first=False)
        alone = self.inputs.last().unsqueeze(1)
        spectrum = Spectrum(alone, torch.ones_like(alone).unsqueeze(2), alone.new_zeros(len(alone)))
        return replace(self, matrix=Matrix(self.matrix.bias, None, layout), inputs=spectrum)

    def room(self, strength: float = STRENGTH) -> float:
        """The share of directions in which more than half of a step remains, from 0 to 1."""
        inputs = _expanded(self.inputs).double().sort(1).values
        outputs = inputs.new_ones(len(inputs), 1) if self.outputs is None else _expanded(self.outputs).double()
        # `damping` is above a half where c a_j ((1 - mu) s_i + mu) is below 1. Counting the a_j below a limit for each
        # i needs no matrix of m n numbers.
        below = torch.searchsorted(inputs, 1 / (strength * _weights_of_outputs(outputs)).clamp_min(1e-300))
        return float(below.double().mean()) / max(1, inputs.shape[1])

    def predicted_change(self, change: Tensor) -> float:
        """tr(S D A D^T) in units of squared outputs, for a change D (G, m, n) of the matrix with its bias column."""
        dtype = torch.promote_types(change.dtype, self.inputs.values.dtype)
        wide = change.to(dtype)
        by_inputs = _weighted(wide, self.inputs)
        if self.outputs is None:
            return float(by_inputs.sum()) * self.scales[0] / self.mass
        # sum_ij s_i a_j (U^T D V)_ij^2, with U^T taken first and A's form taken row by row.
        total = 0.0
        for group in range(len(wide)):
            own = wide[group]
            spectrum = self.outputs
            rest = float(spectrum.rest[group])
            vectors = None if spectrum.vectors is None else spectrum.vectors[group].to(own)
            rotated = own if vectors is None else vectors.T @ own
            values = spectrum.values[group].to(own) - (rest if vectors is not None else 0.0)
            own_inputs = Spectrum(
                self.inputs.values[group : group + 1],
                None if self.inputs.vectors is None else self.inputs.vectors[group : group + 1],
                self.inputs.rest[group : group + 1],
            )
            total += float((_weighted(rotated.unsqueeze(0), own_inputs)[0] * values).sum())
            total += rest * float(by_inputs[group].sum()) if vectors is not None else 0.0
        return total * self.scales[0] * self.scales[1] / self.mass

    def gradient(self, weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """S D A, half the gradient of tr(S D A D^T), by name: for the weight, and for the bias if it is a column."""
        like = [weights[name] for name in self.matrix.names]
        found = self.inputs.product(self.matrix.joined(*like).transpose(1, 2)).transpose(1, 2)
        if self.outputs is not None:
            found = self.outputs.product(found)
        found = found * (self.scales[0] * self.scales[1] / self.mass)
        return dict(zip(self.matrix.names, self.matrix.split(found, like), strict=True))


def _weighted(rows: Tensor, inputs: Spectrum) -> Tensor:
    """d_i A d_i^T for each row of (G, rows, n): (G, rows)."""
    values, rest = inputs.values.to(rows), inputs.rest.to(rows)
    if inputs.vectors is None:
        return (rows.square() * values.unsqueeze(1)).sum(2)
    kept = ((rows @ inputs.vectors.to(rows)).square() * (values - rest.unsqueeze(1)).unsqueeze(1)).sum(2)
    return kept + rest.unsqueeze(1) * rows.square().sum(2)


def _expanded(spectrum: Spectrum) -> Tensor:
    """All n eigenvalues, (G, n)."""
    rest = spectrum.rest.unsqueeze(1).expand(-1, spectrum.width - spectrum.rank)
    return torch.cat([spectrum.values, rest], 1)


@final
@dataclass(frozen=True, eq=False)
class DiagonalDirections:
    """A parameter that is no matrix: `squares` sum_t g_t / mean(g_t), `mass` the number of tasks, `scale` mean(g)."""

    squares: Tensor = field(repr=False)
    mass: float
    scale: float


@dataclass(frozen=True)
class DirectionsSummary:
    """The directions of one layer in numbers."""

    layer: str
    num_weights: int
    inputs: int
    """Input directions, with that of a bias."""
    outputs: int
    kept_inputs: int
    """How many eigenvectors of A are kept; of the others, the mean eigenvalue."""
    kept_outputs: int | None
    """The same of S; None if only inputs were measured."""
    room: float
    """The share of directions in which more than half of a step remains at the default strength, 0 to 1."""
    mass: float
    """The number of tasks."""
    num_positions: int
    num_samples: int


@final
@dataclass(frozen=True, eq=False)
class Directions:
    """The directions of a model that its tasks rely on.

    Attributes:
        layers: key -> matrix, as in `KroneckerFactors`.
        diagonal: parameter -> squared gradients, for parameters that are no matrices.
        rank: the number of eigenvectors that are kept of each side; None: all.
        free: the parameters that were measured, and that no output relied on.
        excerpts: protected parameter -> some of its values at the last consolidation, as `excerpt` takes them.
        squared_outputs: E ||y||^2 of the outputs, the mean over tasks; None if a task did not tell.
        mass: the number of tasks, as of a layer.
    """

    layers: dict[str, LayerDirections] = field(default_factory=dict)
    diagonal: dict[str, DiagonalDirections] = field(default_factory=dict)
    rank: int | None = RANK
    free: frozenset[str] = frozenset()
    excerpts: dict[str, Tensor] = field(default_factory=dict)
    squared_outputs: float | None = None
    mass: float = 0.0

    def __repr__(self) -> str:
        kept = "all eigenvectors" if self.rank is None else f"up to {self.rank} eigenvectors of each side"
        return f"Directions({self.in_words()}, {kept}, {size_in_memory(self.tensors())})"

    def _repr_html_(self) -> str:
        rows = [
            LayerRow(
                own.layer,
                [
                    f"{own.num_weights:,}",
                    f"{own.inputs:,} x {own.outputs:,}",
                    f"{own.kept_inputs:,} x {'-' if own.kept_outputs is None else f'{own.kept_outputs:,}'}",
                    f"{own.room:.1%}",
                    f"{own.mass:.3g}",
                ],
                own.num_weights,
            )
            for own in self.summary()
        ]
        columns = ["layer", "weights", "inputs x outputs", "kept", "room", "tasks"]
        return html_table(repr(self), columns, rows, "with fewer weights each")

    def in_words(self) -> str:
        """How many matrices, other parameters and weights there are."""
        weights = num_weights_of(own.matrix for own in self.layers.values())
        weights += sum(own.squares.numel() for own in self.diagonal.values())
        return counted_matrices(len(self.layers), len(self.diagonal), weights)

    def names(self) -> set[str]:
        """The parameters that are protected."""
        return names_read({key: own.matrix for key, own in self.layers.items()}) | self.diagonal.keys()

    def num_rows(self) -> dict[str, int]:
        """Parameter -> how many rows of it are known."""
        found = {name: len(own.squares) if own.squares.ndim else 1 for name, own in self.diagonal.items()}
        for matrix in (own.matrix for own in self.layers.values()):
            found[matrix.weight] = matrix.layout.rows
            if matrix.bias is not None:
                found[matrix.bias] = matrix.layout.groups * matrix.layout.outputs
        return found

    def moved(self, parameters: Mapping[str, Tensor]) -> list[str]:
        """The parameters whose values differ from their excerpts."""
        rows = self.num_rows()
        return [
            name
            for name, own in self.excerpts.items()
            if name in parameters
            and not torch.equal(excerpt(parameters[name], rows.get(name)), own.to(local_part(parameters[name])))
        ]

    def differs(self, other: Directions) -> bool:
        """Whether a parameter of both had other values at the last consolidation."""
        both = self.excerpts.keys() & other.excerpts.keys()
        return any(not torch.equal(self.excerpts[name], other.excerpts[name]) for name in both)

    def only(self, names: Container[str]) -> Directions:
        """Those of some parameters."""
        layers = {}
        for key, own in self.layers.items():
            if own.matrix.weight in names:
                layers[key] = own.without_bias(names)
            elif own.matrix.bias is not None and own.matrix.bias in names:
                layers[own.matrix.bias] = own.of_bias()
        diagonal, excerpts = only_those(self.diagonal, names), only_those(self.excerpts, names)
        free = frozenset(name for name in self.free if name in names)
        return replace(self, layers=layers, diagonal=diagonal, free=free, excerpts=excerpts)

    def renamed(self, names: Mapping[str, str]) -> Directions:
        """The same with other names: old -> new."""
        layers = {
            renamed_key(key, own.matrix, names): replace(own, matrix=renamed_matrix(own.matrix, names))
            for key, own in self.layers.items()
        }
        diagonal, excerpts = under_new_names(self.diagonal, names), under_new_names(self.excerpts, names)
        free = frozenset(names.get(name, name) for name in self.free)
        return replace(self, layers=layers, diagonal=diagonal, free=free, excerpts=excerpts)

    def check(self, parameters: Mapping[str, Tensor]) -> None:
        """Check that parameters can be read as the matrices of these directions; they may have more rows.

        Raises:
            MismatchError: names those that cannot, or none is there at all.
        """
        wrong: dict[str, str] = {}
        for own in self.layers.values():
            parameter, layout = parameters.get(own.matrix.weight), own.matrix.layout
            if parameter is not None and not _fits(parameter, layout):
                weight = own.matrix.weight
                wrong[weight] = f"{weight} (expected {layout}, the model has {tuple(parameter.shape)})"
        for name, diagonal in self.diagonal.items():
            squares, shape = diagonal.squares, parameters[name].shape if name in parameters else diagonal.squares.shape
            grown = 0 < squares.ndim == len(shape) and shape[1:] == squares.shape[1:] and shape[0] > len(squares)
            if shape != squares.shape and not grown:
                wrong[name] = f"{name} (expected {tuple(diagonal.squares.shape)}, the model has {tuple(shape)})"
        if wrong or (self.names() and not self.names() & parameters.keys()):
            raise MismatchError(
                "the memory is of another architecture: "
                f"{'; '.join(wrong.values()) or 'the model has none of its parameters'}. Use the model it was made "
                f"with, or measure this model.{way_out(wrong, self.names())}"
            )

    def room(self, strength: float = STRENGTH) -> dict[str, float]:
        """Key of a matrix -> the share of its directions in which more than half of a step remains."""
        return {key: own.room(strength) for key, own in self.layers.items()}

    def summary(self) -> list[DirectionsSummary]:
        """Per matrix, what is kept and how much room is left, in the model's order."""
        names = layer_names({key: own.matrix for key, own in self.layers.items()})
        return [
            DirectionsSummary(
                layer=names[key],
                num_weights=own.matrix.num_weights,
                inputs=own.matrix.layout.groups * own.matrix.width,
                outputs=own.matrix.layout.groups * own.matrix.layout.outputs,
                kept_inputs=own.inputs.values.numel(),
                kept_outputs=None if own.outputs is None else own.outputs.values.numel(),
                room=own.room(),
                mass=own.mass,
                num_positions=own.counts[0],
                num_samples=own.counts[1],
            )
            for key, own in self.layers.items()
        ]

    def tensors(self) -> list[Tensor]:
        """All that is kept."""
        return [tensor for members in self.groups().values() for tensor in members.values()]

    def num_numbers(self) -> int:
        """How many numbers are kept."""
        return sum(tensor.numel() for tensor in self.tensors())

    def predicted_change(self, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> dict[str, float]:
        """Layer -> the mean squared change of the outputs on the measured data, to second order.

        tr(S D A D^T) for matrices, with D the change of a weight and its bias; sum g D^2 for other parameters. Changes
        of several layers are taken as independent. With rows that only `after` has, those of `before` are compared.
        """
        found: dict[str, float] = {}
        for own in self.layers.values():
            matrix = own.matrix
            change = self._change(matrix, before, after)
            layer = layer_of(matrix.weight)
            found[layer] = found.get(layer, 0.0) + own.predicted_change(change)
        for name, diagonal in self.diagonal.items():
            change = _difference(name, before, after, len(diagonal.squares) if diagonal.squares.ndim else None)
            squares = gathered(diagonal.squares).to(change)
            own_change = float((squares * change.square()).sum()) * diagonal.scale / diagonal.mass
            found[layer_of(name)] = found.get(layer_of(name), 0.0) + own_change
        return found

    @staticmethod
    def _change(matrix: Matrix, before: Mapping[str, Tensor], after: Mapping[str, Tensor]) -> Tensor:
        layout = matrix.layout
        rows = (layout.rows, layout.groups * layout.outputs)
        known = zip(matrix.names, rows, strict=False)
        return matrix.joined(*(_difference(name, before, after, count) for name, count in known))

    def groups(self) -> Groups:
        """The tensors by group and name, as a file holds them."""
        groups: Groups = {name: {} for name in GROUPS}
        for key, own in self.layers.items():
            for side, spectrum in (("input", own.inputs), ("output", own.outputs)):
                if spectrum is not None:
                    groups[f"{side}_values"][key] = spectrum.values
                    groups[f"{side}_rest"][key] = spectrum.rest
                    if spectrum.vectors is not None:
                        groups[f"{side}_vectors"][key] = spectrum.vectors
        groups["diagonal"] = {name: own.squares for name, own in self.diagonal.items()}
        groups["excerpt"] = self.excerpts
        return groups

    def header(self) -> dict[str, Any]:
        """The entry of a file's metadata."""
        numbers = {
            key: {"mass": own.mass, "scales": list(own.scales), "counts": list(own.counts)}
            for key, own in self.layers.items()
        }
        return {
            "matrices": matrices_header({key: own.matrix for key, own in self.layers.items()}),
            "numbers": numbers,
            "diagonal": {name: [own.mass, own.scale] for name, own in self.diagonal.items()},
            "rank": self.rank,
            "free": sorted(self.free),
            "squared_outputs": self.squared_outputs,
            "mass": self.mass,
        }

    @classmethod
    def from_file(cls, header: Mapping[str, Any], groups: Groups) -> Directions:
        """Read what `header` and `groups` returned.

        Raises:
            LookupError, TypeError, ValueError: they are not those of directions.
        """
        layers = {}
        for key, matrix in matrices_from(header["matrices"]).items():
            where, numbers = (
                f"numbers.{key}",
                checked(dict, checked(dict, header["numbers"], "numbers")[key], f"numbers.{key}"),
            )
            mass = _positive(numbers["mass"], f"{where}.mass")
            scale_pair, count_pair = (checked(list, numbers[own], f"{where}.{own}") for own in ("scales", "counts"))
            if len(scale_pair) != 2 or len(count_pair) != 2:
                raise ValueError(f"{where}: scales and counts have two numbers each")
            inputs = _spectrum(groups, "input", key, matrix.width, matrix.layout.groups)
            outputs = _spectrum(groups, "output", key, matrix.layout.outputs, matrix.layout.groups)
            if inputs is None:
                raise KeyError(f"input_values/{key}")
            if matrix.layout.is_table != (inputs.vectors is None) or (outputs and outputs.vectors is None):
                raise ValueError(f"input_vectors/{key} or output_vectors/{key} does not fit the matrix")
            scales = [_positive(own, f"{where}.scales") for own in scale_pair]
            counts = [checked_count(own, f"{where}.counts", 1) for own in count_pair]
            layers[key] = LayerDirections(matrix, inputs, outputs, mass, (scales[0], scales[1]), (counts[0], counts[1]))
        diagonal = {}
        for name, squares in groups.get("diagonal", {}).items():
            where, pair = (
                f"diagonal.{name}",
                checked(list, checked(dict, header["diagonal"], "diagonal")[name], f"diagonal.{name}"),
            )
            if len(pair) != 2:
                raise ValueError(f"{where} is {pair!r:.40}; expected two numbers")
            if not squares.is_floating_point() or bool((squares < 0).any()):
                raise ValueError(f"diagonal/{name} holds negative values")
            diagonal[name] = DiagonalDirections(squares, _positive(pair[0], where), _positive(pair[1], where))
        rank = None if header["rank"] is None else checked_count(header["rank"], "rank", 1)
        excerpts = groups.get("excerpt", {})
        free = frozenset(checked(str, name, "free") for name in checked(list, header["free"], "free"))
        # Files of before do not tell: then nothing is predicted relative to the outputs.
        length, mass = header.get("squared_outputs"), header.get("mass", 1.0)
        length = None if length is None else _positive(length, "squared_outputs")
        mass = 0.0 if type(mass) in (int, float) and mass == 0 else _positive(mass, "mass")
        found = cls(layers, diagonal, rank, free, excerpts, length, mass)
        for name, values in excerpts.items():
            if name not in found.names() or values.ndim != 1 or len(values) > EXCERPT:
                raise ValueError(f"excerpt/{name} is no part of a parameter")
        for group, members in found.groups().items():
            if members.keys() != groups.get(group, {}).keys():
                raise ValueError(f"the tensors of {group} are not those of the matrices")
        return found


def _fits(parameter: Tensor, layout: Layout) -> bool:
    """Whether a parameter is the weight of a layout, or has more rows."""
    outputs, inputs = (layout.inputs, layout.outputs) if layout.inputs_first else (layout.outputs, layout.inputs)
    rows = layout.groups * outputs
    columns = math.prod(parameter.shape[1:]) if parameter.ndim else 0
    return columns == inputs and (len(parameter) == rows or (layout.groups == 1 and len(parameter) > rows))


GROUPS: Final = (
    "input_values",
    "input_rest",
    "input_vectors",
    "output_values",
    "output_rest",
    "output_vectors",
    "diagonal",
    "excerpt",
)
"""The groups of a file that hold directions."""

EXCERPT: Final = 256
"""How many values of each parameter are kept beside its directions."""


def excerpt(parameter: Tensor, rows: int | None = None) -> Tensor:
    """Values of a parameter at `EXCERPT` evenly spaced places of its first `rows` rows; all of them, if they are fewer.

    They tell whether a parameter was replaced since. Of n values in order, those with the numbers floor(i n / EXCERPT).
    Of a sharded parameter, each process tells the others those that it holds: all must call it together.
    """
    count = parameter.numel()
    if rows is not None and parameter.ndim and len(parameter):
        count = min(rows, len(parameter)) * (count // len(parameter))
    return values_at(parameter, torch.arange(min(count, EXCERPT)) * count // max(1, min(count, EXCERPT)))


LARGEST_SCALE: Final = 1e60
"""Below it are all masses and scales: mean eigenvalues of sums that float32 holds, and the products of two of them."""

ORTHONORMAL: Final = 1e-2
"""How far V^T V in a file may be from the identity."""


def _positive(value: Any, what: str) -> float:
    if type(value) not in (int, float) or not 0 < value < LARGEST_SCALE:
        raise ValueError(f"{what} is {value!r:.40}; expected a positive number below {LARGEST_SCALE:g}")
    return float(value)


def _spectrum(groups: Groups, side: str, key: str, width: int, num_groups: int) -> Spectrum | None:
    """A spectrum from a file, with its checks: shapes, no negative eigenvalue, orthonormal vectors."""
    values = groups.get(f"{side}_values", {}).get(key)
    if values is None:
        return None
    vectors, rest = groups.get(f"{side}_vectors", {}).get(key), groups[f"{side}_rest"][key]
    rank = width if vectors is None else vectors.shape[-1] if vectors.ndim else 0
    shapes = [tuple(values.shape), tuple(rest.shape), (num_groups, width, rank)]
    found = (num_groups, width, rank) if vectors is None else tuple(vectors.shape)
    if shapes != [(num_groups, rank), (num_groups,), found] or not 0 < rank <= width:
        raise ValueError(f"{side}_values/{key}: its shapes do not fit the matrix")
    if not all(t.is_floating_point() for t in (values, rest)) or bool((values < 0).any()) or bool((rest < 0).any()):
        raise ValueError(f"{side}_values/{key} holds negative values")
    if vectors is not None:
        if not vectors.is_floating_point():
            raise ValueError(f"{side}_vectors/{key} is {vectors.dtype}")
        product = vectors.float().transpose(1, 2) @ vectors.float()
        if not bool(((product - torch.eye(rank)).abs() <= ORTHONORMAL).all()):
            raise ValueError(f"{side}_vectors/{key}: its columns are not orthonormal")
    return Spectrum(values, vectors, rest)


def _difference(name: str, before: Mapping[str, Tensor], after: Mapping[str, Tensor], rows: int | None) -> Tensor:
    """The change of the first rows of a parameter, those that are known; of the whole if `rows` is None."""
    for which, weights in (("before", before), ("after", after)):
        if name not in weights:
            raise MismatchError(f"{name} is not among the weights {which} the change.")
    old, new = (weights[name].detach() for weights in (before, after))
    if old.shape == new.shape and (is_sharded(old) or is_sharded(new)):
        return gathered(on_parts(_change, new, old))[slice(rows) if rows is not None else ...]
    old, new = (gathered(own)[slice(rows) if rows is not None else ...] for own in (old, new))
    return _change(new, old)


def _change(new: Tensor, old: Tensor) -> Tensor:
    wide = torch.promote_types(old.dtype, torch.float32)
    return new.to(wide) - old.to(new.device, wide)


def directions_alone(factors: KroneckerFactors, rank: int | None) -> Directions:
    """The directions of one task. A matrix that the samples leave free is left out.

    Its inputs are zero (it was not used), or its output gradients (no output relied on it). If the factors are sharded,
    each process computes the eigenvectors of some matrices, and all must call this together.
    """
    layers, spectra = {}, factors.spectra(rank)
    for key, matrix in factors.matrices.items():
        inputs, outputs = spectra["inputs", key], spectra["outputs", key]
        if inputs is None or (outputs is None and factors.magnitude == BOTH):
            continue
        # Of weighted factors, the positions are no whole number.
        counts = (max(1, round(float(factors.sums[f"positions/{key}"]))), factors.num_samples)
        scales = inputs[1], 1.0 if outputs is None else outputs[1]
        spectrum = None if outputs is None else outputs[0]
        layers[key] = LayerDirections(matrix, inputs[0], spectrum, 1.0, scales, counts)
    diagonal, of_parameters = {}, [name for name in factors.sums if name.startswith("diagonal/")]
    jobs: list[Job] = [(_scaled, [factors.sums[name]]) for name in of_parameters]
    for name, (mean, squares) in zip(of_parameters, divided(jobs, one_sharded(factors.sums.values())), strict=True):
        if mean > 0:
            own = DiagonalDirections(squares, 1.0, float(mean) / factors.num_samples)
            diagonal[name.removeprefix("diagonal/")] = own
    found = Directions(layers, diagonal, rank, squared_outputs=factors.squared_outputs, mass=1.0)
    return replace(found, free=frozenset(factors.routes.keys() - found.names()))


def _scaled(total: Tensor) -> list[Tensor]:
    """The mean of squared gradients, and the gradients divided by it."""
    mean = total.double().mean() if total.numel() else torch.zeros((), dtype=torch.float64)
    return [mean, total / float(mean) if mean > 0 else total[:0] if total.ndim else total]


def consolidated(
    old: Directions,
    factors: KroneckerFactors,
    weights: tuple[float, float],
    rank: int | None,
    new: Directions | None = None,
) -> Directions:
    """The directions of all tasks: A is added up with the weights (old, new), S averaged in the same proportion.

    With weights (1, 1), rule `sum`, the masses of tasks count their number. A matrix or parameter that only one side
    has is taken over. What the samples leave free is left out, as in `directions_alone`.

    Args:
        old: of earlier tasks.
        factors: of the new task. If they are sharded, all processes must call this together.
        weights: of the old and of the new.
        rank: how many eigenvectors are kept.
        new: `directions_alone` of the factors, if they are known.
    """
    new = directions_alone(factors, rank) if new is None else new
    both = {key: (_grown(old.layers[key], own.matrix), own) for key, own in new.layers.items() if key in old.layers}
    sides = [(key, "inputs") for key in both]
    sides += [(key, "outputs") for key, pair in both.items() if all(own.outputs is not None for own in pair)]
    jobs: list[Job] = [(partial(_combined_side, *both[key], side, weights, rank), ()) for key, side in sides]
    results = divided(jobs, one_sharded(factors.sums.values()))
    spectra = {own: unpacked(result)[0] for own, result in zip(sides, results, strict=True)}
    combined_layers = {
        key: _combined(*pair, weights, spectra[key, "inputs"], spectra.get((key, "outputs")))
        for key, pair in both.items()
    }
    diagonal = dict(old.diagonal)
    for name, own in new.diagonal.items():
        before = diagonal.get(name)
        diagonal[name] = own if before is None else _combined_diagonal(before, own, weights)
    masses = (weights[0] * old.mass, weights[1]) if old.mass else (0.0, 1.0)
    length = _mean_length((old.squared_outputs, factors.squared_outputs), masses)
    layers = {**old.layers, **new.layers, **combined_layers}
    whole = Directions(layers, diagonal, rank, squared_outputs=length, mass=sum(masses))
    return replace(whole, free=frozenset((old.free | factors.routes.keys()) - whole.names()))


def _mean_length(squares: tuple[float | None, float | None], masses: tuple[float, float]) -> float | None:
    """The mean of E ||y||^2, weighted by masses; None if one that counts is not known, or all outputs are zero."""
    total = 0.0
    for own, mass in zip(squares, masses, strict=True):
        if mass and own is None:
            return None
        total += mass * (own or 0.0)
    return total / sum(masses) if total > 0 else None


def _shares(old: LayerDirections, new: LayerDirections, weights: tuple[float, float]) -> tuple[float, float]:
    """The parts of the old and the new tasks in a mean over tasks."""
    masses = weights[0] * old.mass, weights[1] * new.mass
    return masses[0] / sum(masses), masses[1] / sum(masses)


def _combined_side(
    old: LayerDirections, new: LayerDirections, side: str, weights: tuple[float, float], rank: int | None
) -> list[Tensor]:
    """The spectrum of one side over all tasks, `packed`."""
    if side == "inputs" or old.outputs is None or new.outputs is None:
        return packed(combined(old.inputs, new.inputs, weights, rank, EXACT_WIDTH), 1.0)
    return packed(combined(old.outputs, new.outputs, _shares(old, new, weights), rank, EXACT_WIDTH), 1.0)


def _combined(
    old: LayerDirections,
    new: LayerDirections,
    weights: tuple[float, float],
    inputs: Spectrum,
    outputs: Spectrum | None,
) -> LayerDirections:
    """The directions of a matrix over all tasks, from its two combined spectra."""
    shares = _shares(old, new, weights)
    scales = [shares[0] * one + shares[1] * other for one, other in zip(old.scales, new.scales, strict=True)]
    counts = (old.counts[0] + new.counts[0], old.counts[1] + new.counts[1])
    mass = weights[0] * old.mass + weights[1] * new.mass
    return LayerDirections(new.matrix, inputs, outputs, mass, (scales[0], scales[1]), counts)


def _combined_diagonal(
    old: DiagonalDirections, new: DiagonalDirections, weights: tuple[float, float]
) -> DiagonalDirections:
    squares = old.squares.to(new.squares)
    if squares.shape != new.squares.shape:
        squares = torch.cat([squares, torch.zeros_like(new.squares[len(squares) :])])
    mass = weights[0] * old.mass + weights[1] * new.mass
    scale = (weights[0] * old.mass * old.scale + weights[1] * new.mass * new.scale) / mass
    return DiagonalDirections(weights[0] * squares + weights[1] * new.squares, mass, scale)


def merged(one: Directions, other: Directions, num_samples: tuple[int, int]) -> Directions:
    """The directions of the samples of both, for replicas that each consolidated once, at the same weights.

    Exact for spectra that are kept whole. Of truncated ones, the mean of the rest is taken for what each has cut. The
    output gradients of a replica that left a matrix free are zero.
    """
    shares = num_samples[0] / sum(num_samples), num_samples[1] / sum(num_samples)
    layers: dict[str, LayerDirections] = {}
    for key in other.layers | one.layers:
        parts = [(own.layers[key], share) for own, share in zip((one, other), shares, strict=True) if key in own.layers]
        layers[key] = _merged_layers(parts, sum(num_samples), one.rank)
    diagonal: dict[str, DiagonalDirections] = {}
    for name in other.diagonal | one.diagonal:
        known = [(own.diagonal.get(name), share) for own, share in zip((one, other), shares, strict=True)]
        # The mean squared gradients, g = squares * scale, of each replica by its share of the samples.
        singles = [(single.squares * single.scale * share, single) for single, share in known if single is not None]
        squares = singles[0][0] if len(singles) == 1 else singles[0][0] + singles[1][0].to(singles[0][0])
        scale = sum(single.scale * share for single, share in known if single is not None)
        diagonal[name] = DiagonalDirections(squares / scale, 1.0, scale)
    length = _mean_length((one.squared_outputs, other.squared_outputs), shares)
    found = Directions(layers, diagonal, one.rank, squared_outputs=length, mass=1.0)
    return replace(found, free=(one.free | other.free) - found.names(), excerpts=other.excerpts | one.excerpts)


def _merged_layers(parts: list[tuple[LayerDirections, float]], num_samples: int, rank: int | None) -> LayerDirections:
    """The directions of a matrix from one or two replicas, each with its share of all samples."""
    (mine, share), (theirs, other_share) = parts[0], parts[-1]
    if len(parts) == 1:
        scales = (mine.scales[0], mine.scales[1] * (1.0 if mine.outputs is None else share))
        return replace(mine, scales=scales, counts=(mine.counts[0], num_samples))
    if mine.matrix != theirs.matrix:
        raise MismatchError(
            f"{mine.matrix.weight} is read as another matrix in the other memory: they cannot be merged."
        )
    positions = mine.counts[0] + theirs.counts[0]
    weights = [
        (mine.counts[0] * mine.scales[0] / positions, theirs.counts[0] * theirs.scales[0] / positions),
        (mine.scales[1] * share, theirs.scales[1] * other_share),
    ]
    spectra: list[Spectrum | None] = []
    pairs = ((mine.inputs, theirs.inputs), (mine.outputs, theirs.outputs))
    for (own, their), (first, second) in zip(pairs, weights, strict=True):
        scaled = first / (first + second), second / (first + second)
        spectra.append(None if own is None or their is None else combined(own, their, scaled, rank, EXACT_WIDTH))
    assert spectra[0] is not None
    scales = sum(weights[0]), sum(weights[1])
    return LayerDirections(mine.matrix, spectra[0], spectra[1], 1.0, scales, (positions, num_samples))


def _grown(own: LayerDirections, matrix: Matrix) -> LayerDirections:
    """A matrix's directions after its parameter got more rows: nothing is known of the new ones.

    Raises:
        MismatchError: the parameter has changed in another way.
    """
    if own.matrix == matrix:
        return own
    before, after = own.matrix.layout, matrix.layout
    grown = before._replace(outputs=after.outputs, inputs=after.inputs)
    more = after.outputs >= before.outputs and after.inputs >= before.inputs
    no_bias = own.matrix.bias is not None and matrix.bias is None
    if grown != after or not more or no_bias or (before != after and after.groups > 1):
        raise MismatchError(
            f"{matrix.weight} was read as {before}, and is now read as {after}: its directions cannot be combined. "
            "Use the model that the memory was made with. If the layer was replaced, forget the old one: "
            f"memory.select(exclude={sorted(names_read({'': matrix}))}).consolidate(...)."
        )
    outputs = None if own.outputs is None else own.outputs.wider(after.outputs)
    return replace(own, matrix=matrix, inputs=own.inputs.wider(matrix.width), outputs=outputs)
