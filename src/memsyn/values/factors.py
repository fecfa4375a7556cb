"""The value KroneckerFactors: second moments of weight matrices, as sums over samples.

Owns addition, files and summaries of factors. How a memory keeps them is in `directions`.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any, Final, final

import torch
from torch import Tensor, nn

from memsyn.errors import MismatchError
from memsyn.matrices import AS_TABLE, Layout, Matrix, num_weights_of
from memsyn.parameters import fingerprint, layer_of, under_new_names
from memsyn.sharding.exchange import Job, divided
from memsyn.sharding.parts import is_sharded, local_part, on_parts, one_sharded
from memsyn.sharding.sums import summed_over_parts
from memsyn.storage.checkpoints import checkpoint_entries
from memsyn.storage.reading_and_writing import FACTORS, MOMENTS, Groups, checked, checked_count, well_formed, write
from memsyn.values.display import LayerRow, counted, counted_matrices, html_table, size_in_memory
from memsyn.values.importance import added, check_same_shapes, checked_num_samples, checked_origin
from memsyn.values.parts import from_checkpoint, in_parts, read_for
from memsyn.values.spectra import Spectrum, spectrum_of, spectrum_of_sketch

BOTH: Final = "second moments of inputs and output gradients"
INPUTS_ALONE: Final = "second moments of inputs"

SQUARED_OUTPUTS: Final = "squared_outputs/"
"""The name of sum_k ||y_k||^2 among the sums: it is of no matrix."""


@dataclass(frozen=True)
class FactorSummary:
    """The second moments of one layer in numbers."""

    layer: str
    num_weights: int
    inputs: int
    """Input directions, with that of a bias."""
    outputs: int
    input_dimension: float
    """tr(A)^2 / tr(A^2): how many directions the inputs fill, from 1 to `inputs`."""
    output_dimension: float | None
    """The same of S; None if only inputs were measured."""
    input_lost: float = 0.0
    """The share of tr(A) that a sketch lost, 0 to 1; 0 if the whole of A was summed."""
    output_lost: float | None = None
    """The same of S; None if only inputs were measured."""


@final
@dataclass(frozen=True, eq=False)
class KroneckerFactors:
    """Which directions of each weight matrix matter: A = E[x x^T] of its inputs, S = E[d d^T] of its output gradients.

    For y = W x, of all samples, tokens, positions and uses: A is the mean of x x^T over positions, S the sum of d d^T
    over the positions of a sample, averaged over samples. A bias is a further column of W, whose input is 1. A change D
    of W changes the output's squared norm, to second order and on average, by about tr(S D A D^T) (Martens and Grosse
    2015; Ritter et al. 2018).

    Of a sharded model (`fully_shard`) the sums are DTensors: second moments and sketches are cut along dimension 1,
    counts of rows along 0, `diagonal/` as the parameters. Positions, traces and scalars are whole in all processes.
    Then all must call together what needs eigenvectors (`spectrum`, `lost`, `summary`), `matches` and `save`.

    Attributes:
        sums: name -> sum over samples. `inputs/<key>` (G, n, n) and `outputs/<key>` (G, m, m) for G groups of a matrix.
            For a table `inputs/<key>` (n,) are the counts of its rows. A matrix that is too wide has instead
            `inputs_sketch/<key>` (G, n, l) with `inputs_trace/<key>`, and so for outputs. `positions/<key>` is the
            number of x.
            `diagonal/<parameter>` holds sums of squared gradients, for parameters that are no matrices.
            `squared_outputs/` is the sum of ||y||^2.
        num_samples: the number of samples.
        matrices: key -> which parameter is read as a matrix, and how. A key is the weight's name.
        routes: parameter name -> how it was computed.
        objective: the function of the output whose gradient is d.
        magnitude: `BOTH` or `INPUTS_ALONE`: whether there are second moments of output gradients.
        fingerprint: of the weights at which it was measured; known if an `Observer` measured, else None.
    """

    sums: dict[str, Tensor]
    num_samples: int
    matrices: dict[str, Matrix]
    routes: dict[str, str] = field(default_factory=dict)
    objective: str = "signed_outputs"
    magnitude: str = BOTH
    fingerprint: str | None = None

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_samples", checked_num_samples(self.num_samples, "factors need"))

    def __repr__(self) -> str:
        others = [total.numel() for name, total in self.sums.items() if name.startswith("diagonal/")]
        weights = num_weights_of(self.matrices.values()) + sum(others)
        held = counted_matrices(len(self.matrices), len(others), weights)
        of = f"{self.magnitude} of {self.objective}"
        size = size_in_memory(self.sums.values())
        return f"KroneckerFactors({held}, {counted(self.num_samples, 'sample')}, {of}, {size})"

    def _repr_html_(self) -> str:
        # No eigenvalues: they take minutes for a large model.
        layers = layer_names(self.matrices)
        rows = [
            LayerRow(
                layers[key],
                [
                    f"{matrix.num_weights:,}",
                    f"{matrix.layout.groups * matrix.width:,}",
                    f"{matrix.layout.groups * matrix.layout.outputs:,}",
                    f"{float(self.sums[f'positions/{key}']):,.0f}",
                    "sketches" if f"inputs_sketch/{key}" in self.sums else "matrices",
                ],
                matrix.num_weights,
            )
            for key, matrix in self.matrices.items()
        ]
        columns = ["layer", "weights", "inputs", "outputs", "positions", "kept as"]
        return html_table(repr(self), columns, rows, "with fewer weights each")

    @property
    def quantity(self) -> tuple[str, str]:
        """Objective, and which second moments. Only factors of the same quantity can be added."""
        return self.objective, self.magnitude

    @property
    def names(self) -> set[str]:
        """The parameters that were measured."""
        return (
            self.routes.keys()
            | names_read(self.matrices)
            | {name.removeprefix("diagonal/") for name in self.sums if _key_of(name) is None}
        )

    def renamed(self, names: Mapping[str, str]) -> KroneckerFactors:
        """The same with other names: old -> new. The fingerprint becomes unknown, since it covers the names."""
        if not names:
            return self
        keys = {key: renamed_key(key, matrix, names) for key, matrix in self.matrices.items()}
        sums = {}
        for name, total in self.sums.items():
            side, _, own = name.partition("/")
            sums[f"{side}/{(names if side == 'diagonal' else keys).get(own, own)}"] = total
        matrices = {keys[key]: renamed_matrix(matrix, names) for key, matrix in self.matrices.items()}
        routes = under_new_names(self.routes, names)
        return replace(self, sums=sums, matrices=matrices, routes=routes, fingerprint=None)

    def matches(self, model: nn.Module) -> bool:
        """Whether they were measured at the weights that a model has now, bit for bit: see `Importance.matches`."""
        return self.fingerprint is not None and self.fingerprint == fingerprint(model)

    def inputs(self, key: str) -> Tensor:
        """A of a matrix, (G, n, n), or (n,) for the rows of a table: the mean of x x^T over positions.

        Raises:
            MismatchError: there is no such matrix, or it is so wide that only a sketch of A was summed.
        """
        return self._whole("inputs", key) / float(self.sums[f"positions/{key}"].clamp_min(1.0))

    def outputs(self, key: str) -> Tensor:
        """S of a matrix, (G, m, m): the sum of d d^T over a sample's positions, averaged over samples.

        Raises:
            MismatchError: there is no such matrix, only its inputs were measured, or only a sketch of S was summed.
        """
        return self._whole("outputs", key) / self.num_samples

    @property
    def squared_outputs(self) -> float | None:
        """E ||y||^2, the mean over samples; None if outputs were not looked at."""
        total = self.sums.get(SQUARED_OUTPUTS)
        return None if total is None else float(total) / self.num_samples

    def _whole(self, side: str, key: str) -> Tensor:
        if f"{side}/{key}" not in self.sums:
            raise MismatchError(f"there is no whole second moment of the {side} of {key!r}.")
        return self.sums[f"{side}/{key}"]

    def spectrum(self, side: str, key: str, rank: int | None = None) -> tuple[Spectrum, float] | None:
        """The eigenvectors of A (`inputs`) or S (`outputs`), scaled to mean eigenvalue 1, and that scale.

        The scale is the mean eigenvalue of A or S. None if this side was not measured, or is zero.
        """
        return self._spectra([(side, key)], rank)[side, key]

    def spectra(self, rank: int | None = None) -> dict[tuple[str, str], tuple[Spectrum, float] | None]:
        """`spectrum` for each side and key. Of sharded sums, each process computes its share, one matrix at a time."""
        return self._spectra([(side, key) for key in self.matrices for side in _SIDES], rank)

    def _spectra(
        self, wanted: Sequence[tuple[str, str]], rank: int | None
    ) -> dict[tuple[str, str], tuple[Spectrum, float] | None]:
        measured = [own for own in wanted if self._moments(*own)]
        jobs: list[Job] = [(partial(_packed_spectrum, rank, packed), self._moments(*own)) for own in measured]
        found = dict[tuple[str, str], tuple[Spectrum, float] | None].fromkeys(wanted)
        for (side, key), packed_one in zip(measured, divided(jobs, one_sharded(self.sums.values())), strict=True):
            count = float(self.sums[f"positions/{key}"]) if side == "inputs" else float(self.num_samples)
            spectrum, mean = unpacked(packed_one)
            found[side, key] = (spectrum, mean / count) if mean > 0 and count > 0 else None
        return found

    def _moments(self, side: str, key: str) -> list[Tensor]:
        """The sums of one side of a matrix: its second moment, or a sketch and the trace; none if not measured."""
        whole, sketch = f"{side}/{key}", f"{side}_sketch/{key}"
        names = [whole] if whole in self.sums else [sketch, f"{side}_trace/{key}"] if sketch in self.sums else []
        return [self.sums[name] for name in names]

    def lost(self, key: str, rank: int | None = None) -> dict[str, float]:
        """The share of a second moment's trace that its kept eigenvectors leave out, by side (`inputs`, `outputs`).

        Of a sketch, this is exactly the nuclear norm of what the sketch lost, relative to the trace. It is replaced by
        its mean, never by zero.
        """
        return {side: lost for side, (_, lost) in self._sizes([key], rank)[key].items()}

    def _sizes(self, keys: Iterable[str], rank: int | None) -> dict[str, dict[str, tuple[float, float]]]:
        """Key -> side -> the dimension of its spectrum, and what its kept vectors leave out; no vector is told."""
        sides = [(key, side) for key in keys for side in _SIDES if self._moments(side, key)]
        jobs: list[Job] = [(partial(_packed_spectrum, rank, _sizes_of), self._moments(s, k)) for k, s in sides]
        found: dict[str, dict[str, tuple[float, float]]] = {key: {} for key in keys}
        for (key, side), (numbers,) in zip(sides, divided(jobs, one_sharded(self.sums.values())), strict=True):
            dimension, lost, mean = numbers.tolist()
            if mean > 0 and (side == "outputs" or float(self.sums[f"positions/{key}"]) > 0):
                found[key][side] = dimension, lost
        return found

    def __add__(self, other: KroneckerFactors) -> KroneckerFactors:
        """The factors over the samples of both, the same as measuring all samples together.

        A matrix or parameter that only one of the two has used is taken over. Whole sums are cut as those of the other,
        if these are sharded.

        Raises:
            MismatchError: quantities or shapes differ, or both fingerprints are known and differ.
            ModelError: both are sharded, in different ways.
        """
        if self.quantity != other.quantity:
            raise MismatchError(
                f"cannot add factors of different quantities: {self.magnitude} of {self.objective} and "
                f"{other.magnitude} of {other.objective}."
            )
        if None not in (self.fingerprint, other.fingerprint) and self.fingerprint != other.fingerprint:
            raise MismatchError("cannot add factors that were measured at different weights.")
        clash = [k for k, matrix in self.matrices.items() if other.matrices.get(k, matrix) != matrix]
        shared = self.matrices.keys() & other.matrices.keys()
        if clash:
            raise MismatchError(f"{', '.join(clash)}: the two read this weight as a matrix in different ways.")
        kept = [{name for name in own.sums if _key_of(name) in shared} for own in (self, other)]
        if kept[0] != kept[1]:
            raise MismatchError(
                f"{', '.join(sorted(kept[0] ^ kept[1]))}: only one of the two holds it. Measure both with one "
                "estimator and one rank."
            )
        both = self.sums.keys() & other.sums.keys()
        check_same_shapes(_only(self.sums, both), _only(other.sums, both), "the first factors", "the second factors")
        sums = {**other.sums, **self.sums}
        sums |= {name: on_parts(added, self.sums[name], other.sums[name]) for name in both}
        if SQUARED_OUTPUTS not in both:  # the other samples are not known
            sums.pop(SQUARED_OUTPUTS, None)
        every = (self.matrices | other.matrices).values()
        taken = sorted({f"diagonal/{name}" for matrix in every for name in (matrix.weight, matrix.bias)} & sums.keys())
        used = summed_over_parts([local_part(sums[n]).any().double() for n in taken], [sums[n] for n in taken])
        mixed = [name.removeprefix("diagonal/") for name, own in zip(taken, used, strict=True) if bool(own)]
        if mixed:
            raise MismatchError(
                f"{', '.join(mixed)}: only one of the two has measured this parameter as a matrix. Measure both with a "
                "first batch that takes all branches of the forward pass."
            )
        sums = {name: total for name, total in sums.items() if name not in taken}
        of = self.fingerprint if self.fingerprint == other.fingerprint else None
        count, routes = self.num_samples + other.num_samples, {**other.routes, **self.routes}
        matrices = {**self.matrices, **other.matrices}
        return KroneckerFactors(sums, count, matrices, routes, self.objective, self.magnitude, of)

    def summary(self) -> list[FactorSummary]:
        """Per matrix, how many directions its inputs and output gradients fill."""
        found, layers, sizes = [], layer_names(self.matrices), self._sizes(self.matrices, None)
        for key, matrix in self.matrices.items():
            inputs, sketched = sizes[key].get("inputs", (0.0, 0.0)), sizes[key].get("outputs", (None, None))
            groups, outputs = matrix.layout.groups, matrix.layout.outputs
            found.append(
                FactorSummary(
                    layer=layers[key],
                    num_weights=matrix.num_weights,
                    inputs=groups * matrix.width,
                    outputs=groups * outputs,
                    input_dimension=inputs[0],
                    output_dimension=sketched[0],
                    input_lost=inputs[1],
                    output_lost=sketched[1],
                )
            )
        return found

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write one safetensors file atomically, tensor by tensor. It holds the sums.

        If they are sharded, all processes must call it together, as for `Memory.save`.

        Args:
            path: the file, or a URL, as for `Memory.save`.

        Raises:
            MemoryFileError: the file cannot be written; an old file stays.
        """
        write(path, FACTORS, self.header(), {MOMENTS: self.sums})

    def header(self) -> dict[str, Any]:
        """The entries of a file's metadata."""
        known = {} if self.fingerprint is None else {"fingerprint": self.fingerprint}
        return {
            "objective": self.objective,
            "magnitude": self.magnitude,
            "num_samples": self.num_samples,
            "routes": self.routes,
            "matrices": matrices_header(self.matrices),
            **known,
        }

    @classmethod
    def load(cls, path: str | os.PathLike[str], *, like: nn.Module | None = None) -> KroneckerFactors:
        """Read a file that `save` wrote, from a path or a URL.

        Args:
            path: the file, or its URL.
            like: a sharded model: the sums are cut for it, and each process keeps its part of them. None, or another
                model: they are whole, on the CPU.

        Raises:
            MemoryFileError: the file is missing, damaged, holds no factors, or is of a newer format.
        """
        header, groups = read_for(path, FACTORS, like)
        whole = cls.from_file(path, header, groups)
        return replace(whole, sums=in_parts(groups, like)[MOMENTS])

    def state_dict(self) -> dict[str, Tensor]:
        """The sums and a header as tensors by name, for torch.distributed.checkpoint: see `Memory.state_dict`."""
        return checkpoint_entries(FACTORS, self.header(), {MOMENTS: self.sums})

    @classmethod
    def from_checkpoint(
        cls, folder: str | os.PathLike[str], *, key: str | None = None, like: nn.Module | None = None
    ) -> KroneckerFactors:
        """Read what `state_dict` gave to torch.distributed.checkpoint: see `Memory.from_checkpoint`.

        Raises:
            MemoryFileError: the checkpoint is missing or damaged, or does not hold factors alone at `key`.
        """
        return cls.from_file(folder, *from_checkpoint(folder, FACTORS, key, like))

    @classmethod
    def from_file(cls, path: str | os.PathLike[str], header: Mapping[str, Any], groups: Groups) -> KroneckerFactors:
        """The factors in the header and groups that `storage.reading_and_writing.read` returned.

        Raises:
            MemoryFileError: they are not as `save` writes them.
        """
        with well_formed(path):
            count, routes, of = checked_origin(header)
            matrices = matrices_from(header["matrices"])
            sums = groups[MOMENTS]
            _check_sums(sums, matrices)
            magnitude, objective = header["magnitude"], checked(str, header["objective"], "objective")
            has_outputs = any(name.startswith(("outputs/", "outputs_sketch/")) for name in sums)
            if magnitude not in (BOTH, INPUTS_ALONE) or (magnitude == INPUTS_ALONE and has_outputs):
                raise ValueError(f"magnitude is {magnitude!r:.40}, which its sums are not")
            return cls(sums, count, matrices, routes, objective, magnitude, of)


def _only(tensors: Mapping[str, Tensor], names: Iterable[str]) -> dict[str, Tensor]:
    return {name: tensors[name] for name in names}


def _key_of(name: str) -> str | None:
    """The key of the matrix that a sum is of; None for a sum of another parameter."""
    side, _, key = name.partition("/")
    return None if side == "diagonal" else key


def names_read(matrices: Mapping[str, Matrix]) -> set[str]:
    """The weights and biases that are read as matrices."""
    return {name for matrix in matrices.values() for name in (matrix.weight, matrix.bias) if name is not None}


def renamed_matrix(matrix: Matrix, names: Mapping[str, str]) -> Matrix:
    """A matrix whose parameters have other names: old -> new."""
    bias = None if matrix.bias is None else names.get(matrix.bias, matrix.bias)
    return replace(matrix, weight=names.get(matrix.weight, matrix.weight), bias=bias)


def renamed_key(key: str, matrix: Matrix, names: Mapping[str, str]) -> str:
    """The key of a renamed matrix: the weight's new name, with ` as table` if the key ended so."""
    return names.get(matrix.weight, matrix.weight) + key.removeprefix(matrix.weight)


def layer_names(matrices: Mapping[str, Matrix]) -> dict[str, str]:
    """Key -> the layer of its matrix, for tables; the key itself, if a layer has several matrices."""
    layers = [layer_of(matrix.weight) for matrix in matrices.values()]
    return {key: layer if layers.count(layer) == 1 else key for key, layer in zip(matrices, layers, strict=True)}


def matrices_header(matrices: Mapping[str, Matrix]) -> dict[str, Any]:
    """Matrices as plain values, for a file's metadata."""
    return {key: {"weight": m.weight, "bias": m.bias, "layout": list(m.layout)} for key, m in matrices.items()}


def matrices_from(plain: Mapping[str, Any]) -> dict[str, Matrix]:
    """Read what `matrices_header` returned.

    Raises:
        LookupError, TypeError, ValueError: the values are not those of matrices.
    """
    found = {}
    for key, own in checked(dict, plain, "matrices").items():
        where = f"matrices.{key}"
        layout = checked(list, checked(dict, own, where)["layout"], f"{where}.layout")
        weight, bias = checked(str, own["weight"], f"{where}.weight"), own["bias"]
        if len(layout) != 5 or not all(isinstance(flag, bool) for flag in layout[3:]):
            raise TypeError(f"{where}.layout is {layout!r:.80}")
        groups, outputs, inputs = (checked_count(size, f"{where}.layout") for size in layout[:3])
        is_table = layout[4]
        if groups < 1 or (is_table and (groups > 1 or bias is not None)):
            raise ValueError(f"{where}: no matrix has the layout {layout!r:.80}")
        if bias is not None and checked(str, bias, f"{where}.bias") == weight:
            raise ValueError(f"{where}.bias is {bias!r:.40}, which is its weight")
        if key not in (weight, weight + AS_TABLE):
            raise ValueError(f"{where}.weight is {weight!r:.40}; expected the name that the matrix has")
        found[key] = Matrix(weight, bias, Layout(groups, outputs, inputs, layout[3], is_table))
    return found


def packed(spectrum: Spectrum, mean: float) -> list[Tensor]:
    """A spectrum and its scale as tensors, which processes can tell each other."""
    vectors = [] if spectrum.vectors is None else [spectrum.vectors]
    return [torch.tensor(mean, dtype=torch.float64), spectrum.values, spectrum.rest, *vectors]


def unpacked(tensors: Sequence[Tensor]) -> tuple[Spectrum, float]:
    """The inverse of `packed`."""
    mean, values, rest, *vectors = tensors
    return Spectrum(values, vectors[0] if vectors else None, rest), float(mean)


def _packed_spectrum(
    rank: int | None, packing: Callable[[Spectrum, float], list[Tensor]], *moments: Tensor
) -> list[Tensor]:
    """The spectrum of a whole second moment, or of a sketch and its trace."""
    found = spectrum_of(moments[0], rank) if len(moments) == 1 else spectrum_of_sketch(moments[0], moments[1], rank)
    return packing(*found)


def _sizes_of(spectrum: Spectrum, mean: float) -> list[Tensor]:
    return [torch.tensor([spectrum.dimension(), spectrum.lost(), mean], dtype=torch.float64)]


SYMMETRY: Final = 1e-3
"""How far a second moment in a file may be from its transpose, relative to its largest number."""

CAUCHY: Final = 1e-2
"""By how much M_ij^2 may exceed M_ii M_jj in a file, relative to it: rounding."""


def _check_sums(sums: Mapping[str, Tensor], matrices: Mapping[str, Matrix]) -> None:
    """Refuse sums that no samples can have.

    Raises:
        ValueError, KeyError: names the sum.
    """
    for name, total in sums.items():
        side, _, key = name.partition("/")
        free = side == "diagonal" or (name == SQUARED_OUTPUTS and not total.ndim)
        fits = free or tuple(total.shape) in _shapes(side, matrices[key], total)
        # A part shows neither symmetry nor the diagonal: of a matrix that is cut, only shapes are checked.
        may_be = is_sharded(total) and total.ndim == 3
        if not fits or not (may_be or _can_be_moment(local_part(total), side)):
            raise ValueError(f"{name} is no sum of second moments")
    for key in matrices:
        # A side is whole, or a sketch with its trace. Only the outputs may be missing.
        sides = [{f"{side}/{key}", f"{side}_sketch/{key}", f"{side}_trace/{key}"} & sums.keys() for side in _SIDES]
        whole = [{f"{side}/{key}"} for side in _SIDES]
        sketch = [{f"{side}_sketch/{key}", f"{side}_trace/{key}"} for side in _SIDES]
        complete = sides[0] in (whole[0], sketch[0]) and sides[1] in (whole[1], sketch[1], set())
        if not complete or f"positions/{key}" not in sums:
            raise ValueError(f"the sums of {key} are incomplete, or there are too many")
        inputs = next(own for own in (f"inputs/{key}", f"inputs_trace/{key}") if own in sums)
        if bool(sums[f"positions/{key}"] == 0) and bool(local_part(sums[inputs]).any()):
            raise ValueError(f"positions/{key} is 0, but {inputs} is not")


_SIDES: Final = ("inputs", "outputs")


def _shapes(side: str, matrix: Matrix, total: Tensor) -> list[tuple[int, ...]]:
    """The shapes that a sum may have."""
    groups, is_table = matrix.layout.groups, matrix.layout.is_table
    width = matrix.width if side.startswith("inputs") else matrix.layout.outputs
    columns = total.shape[-1] if total.ndim else 0
    whole = (width,) if is_table and side == "inputs" else (groups, width, width)
    # A sketch of l columns needs a matrix (l, l): a small file must not ask for a large one.
    sketch: list[tuple[int, ...]] = [(groups, width, columns)] if 0 < columns <= width else []
    shapes: dict[str, list[tuple[int, ...]]] = {
        "inputs": [whole],
        "outputs": [whole],
        "positions": [()],
        "inputs_sketch": [] if is_table else sketch,
        "outputs_sketch": sketch,
        "inputs_trace": [(groups,)],
        "outputs_trace": [(groups,)],
    }
    return shapes.get(side, [])


def _can_be_moment(total: Tensor, side: str) -> bool:
    """Whether a sum is symmetric and has no negative diagonal, and M_ij^2 <= M_ii M_jj."""
    if side.endswith("_sketch") or not total.numel():
        return True
    if side not in _SIDES or total.ndim < 3:
        return not bool((total < 0).any())
    diagonal = total.diagonal(dim1=1, dim2=2).double()
    close = (total - total.transpose(1, 2)).abs().amax() <= SYMMETRY * total.abs().amax()
    bound = (1 + CAUCHY) * diagonal.unsqueeze(1) * diagonal.unsqueeze(2)
    return bool(close) and not bool((diagonal < 0).any()) and bool((total.double().square() <= bound).all())
