"""Whether the parameters of a model are still those of the memory, when protection begins.

Owns the test for parameters that were initialised anew, and the warnings of parameters that stand far from their anchor
or have grown. Must not change anything.
"""

import math
import warnings
from collections.abc import Collection, Mapping
from typing import Final, NamedTuple

import torch
from torch import Tensor

from memsyn.errors import GrownParametersWarning, MovedWeightsWarning, ProtectionError
from memsyn.parameters import wide_dtype, with_their_layers
from memsyn.protecting.optimizers import PROJECTED
from memsyn.protecting.penalty import known_rows
from memsyn.sharding.exchange import gathered, part_beside
from memsyn.sharding.parts import is_sharded, local_part
from memsyn.sharding.sums import summed_over_parts
from memsyn.values.directions import excerpt
from memsyn.values.memory import Memory

FEWEST: Final = 64
"""With fewer values, the cosine of two unrelated vectors may be large by chance."""

DEVIATIONS: Final = 3.0
"""The cosine of unrelated vectors of n values has the standard deviation 1 / sqrt(n)."""

FAR: Final = 0.9
"""||theta - theta*|| / ||theta*|| from which a parameter is reported: of a newly drawn one it is about 1 or more."""

FEWEST_REPORTED: Final = 8
"""Parameters of fewer values are not reported: a scale that has doubled since is no news."""


class _Distance(NamedTuple):
    """How a parameter stands to its anchor."""

    relative: float
    """||theta - theta*|| / ||theta*||"""
    cosine: float
    """Of theta and theta*; 0 if theta is zero."""
    num_values: int
    is_matrix: bool

    @property
    def is_far(self) -> bool:
        """Whether the parameter is as far from its anchor as a newly drawn one."""
        return self.relative > FAR and self.num_values >= FEWEST_REPORTED

    @property
    def looks_new(self) -> bool:
        """Whether the parameter has nothing left of its anchor.

        It is far from it, its cosine is below 3 / sqrt(n), and it is a matrix of at least 64 values. Biases and the
        weights of norms are never taken for new: long training may turn them round.
        """
        limit = DEVIATIONS / math.sqrt(self.num_values)
        return self.is_matrix and self.num_values >= FEWEST and self.is_far and self.cosine < limit


def check_replaced(memory: Memory, parameters: Mapping[str, Tensor], form: str, kept: Collection[str]) -> None:
    """Ask for a decision about parameters that look newly initialised; warn of others that are far from their anchor.

    Args:
        memory: with an anchor, or with directions and excerpts of the weights.
        parameters: the model's, under the memory's names.
        form: the form of protection, which says whether importance or directions are protected.
        kept: the names that were given literally in `only=`: nothing is asked about them.

    Raises:
        ProtectionError: names the parameters that look newly initialised.

    Warns:
        MovedWeightsWarning: names the parameters that are far from their anchor.
    """
    found = {name: own for name, own in _distances(memory, parameters, form).items() if name not in kept}
    new = {name: own for name, own in found.items() if own.looks_new}
    if new:
        said = ", ".join(f"{name} (cosine {own.cosine:.3f})" for name, own in new.items())
        what = "damped where the old ones mattered" if form == PROJECTED else "pulled to the old ones"
        raise ProtectionError(
            f"{len(new)} parameters look newly initialised, and have nothing in common with those of the memory: "
            f"{said}. Their values would be {what}. If they were replaced, leave their layers free: "
            f"exclude={with_their_layers(new, memory.names)}. To protect them all the same, name them: "
            f"only={['*', *new]}."
        )
    far = ", ".join(f"{name} ({own.relative:.2g})" for name, own in found.items() if own.is_far)
    if far:
        what = "damps" if form == PROJECTED else "pulls them back"
        warnings.warn(
            f"parameters are as far from their anchor as it is from zero: {far}, as ||theta - theta*|| / ||theta*||. "
            f"Protection {what} nevertheless. If they were replaced, name them in exclude=. If the model was trained "
            "without protection, go on from the weights of the memory, or measure and consolidate first.",
            MovedWeightsWarning,
            stacklevel=4,
        )


def _distances(memory: Memory, parameters: Mapping[str, Tensor], form: str) -> dict[str, _Distance]:
    """Per parameter, its distance to its anchor; without those whose anchor is zero or has other rows."""
    rows = {name: len(anchor) if anchor.ndim else 1 for name, anchor in memory.anchor.items()}
    anchors: Mapping[str, Tensor] = memory.anchor
    if form == PROJECTED and memory.directions is not None:
        rows, anchors = memory.directions.num_rows(), memory.directions.excerpts
    found = {}
    for name in (name for name in rows if name in parameters and name in anchors):
        if form != PROJECTED and is_sharded(parameters[name]):
            continue
        parameter, anchor = gathered(parameters[name]), gathered(anchors[name])
        if form == PROJECTED:
            parameter = excerpt(parameter, rows[name])
        elif parameter.shape != anchor.shape:
            parameter = parameter[: rows[name]]
        if parameter.is_meta or parameter.shape != anchor.shape:
            continue
        theta = parameter.to(wide_dtype(parameter))
        old = anchor.to(theta)
        norms = torch.stack([torch.linalg.vector_norm(part) for part in (theta, old, theta - old)])
        theirs, own, apart = norms.tolist()
        if own > 0:
            cosine = (theirs**2 + own**2 - apart**2) / (2 * theirs * own) if theirs > 0 else 0.0
            found[name] = _Distance(apart / own, cosine, old.numel(), parameters[name].ndim > 1)
    return found if form == PROJECTED else found | _distances_of_parts(memory.anchor, parameters)


def _distances_of_parts(anchors: Mapping[str, Tensor], parameters: Mapping[str, Tensor]) -> dict[str, _Distance]:
    """The same of sharded parameters: each process compares its part, and one sum over all makes them whole."""
    names = [name for name in anchors if name in parameters and is_sharded(parameters[name])]
    squares = []
    for name in names:
        anchor = part_beside(anchors[name], parameters[name])
        theta = known_rows(local_part(parameters[name]), anchor).double()
        old = anchor.to(theta)
        squares.append(torch.stack([part.square().sum() for part in (theta, old, theta - old)]))
    found = {}
    sums = summed_over_parts(squares, [parameters[name] for name in names])
    for name, (theirs, own, apart) in zip(names, (squares.tolist() for squares in sums), strict=True):
        if own > 0:
            cosine = (theirs + own - apart) / (2 * math.sqrt(theirs * own)) if theirs > 0 else 0.0
            num_values = anchors[name].numel()
            found[name] = _Distance(math.sqrt(apart / own), cosine, num_values, parameters[name].ndim > 1)
    return found


def warn_of_grown(memory: Memory, parameters: Mapping[str, Tensor]) -> None:
    """Warn once if parameters have more rows than the memory knows, as a head with new classes has."""
    rows = {name: len(anchor) for name, anchor in memory.anchor.items() if anchor.ndim}
    rows |= {} if memory.directions is None else memory.directions.num_rows()
    grown = [
        f"{name} ({known} to {len(parameters[name])} rows)"
        for name, known in rows.items()
        if name in parameters and parameters[name].ndim and len(parameters[name]) > known
    ]
    if grown:
        warnings.warn(
            f"parameters have grown since they were measured: {', '.join(grown)}. The old rows are protected, the new "
            "ones are free. If they are new classes of one shared head, these compete with the old classes in the same "
            "outputs and win, whatever the weights remember: the old classes lose their answers. Give the new classes "
            "a head of their own, or train on examples of the old classes too.",
            GrownParametersWarning,
            stacklevel=4,
        )
