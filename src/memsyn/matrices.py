"""Parameters as matrices: how weights are read as matrices, and up to which width second moments are whole.

Owns the layout of a weight as matrices of m outputs and n inputs, y = W x. Must not know operations or files.
"""

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Final, NamedTuple

import torch
from torch import Tensor

EXACT_WIDTH: Final = 2048
"""Up to this width the whole matrix of second moments is summed; beyond it, a sketch of it."""

SKETCH_RANK: Final = 128
"""The rank of a sketch, if none is asked for."""

AS_TABLE: Final = " as table"
"""Added to the name of a tied weight, for its use as a table: such a weight is a matrix in two ways."""


class Layout(NamedTuple):
    """How a weight is read as G matrices of m outputs and n inputs."""

    groups: int
    outputs: int
    inputs: int
    """Without the column of the bias."""
    inputs_first: bool
    """Whether the weight's first dimension holds the inputs."""
    is_table: bool
    """Whether an input is the number of a row: a vector with a single 1."""

    @property
    def rows(self) -> int:
        """The length of the weight's first dimension."""
        return self.groups * (self.inputs if self.inputs_first else self.outputs)

    def matrix(self, weight: Tensor) -> Tensor:
        """The weight, or a tensor of its shape, as (G, m, n); a view if it is contiguous."""
        split = weight.reshape(self.groups, weight.shape[0] // self.groups, math.prod(weight.shape[1:]))
        return split.transpose(1, 2) if self.inputs_first else split

    def weight(self, matrix: Tensor, shape: torch.Size) -> Tensor:
        """The inverse of `matrix`, for a weight of this shape."""
        split = matrix.transpose(1, 2) if self.inputs_first else matrix
        return split.reshape(shape)


@dataclass(frozen=True)
class Matrix:
    """A parameter that is used as a matrix in one way.

    Attributes:
        weight: the name of the parameter.
        bias: the name of the bias that is added at each position, a further column of W whose input is 1; None if there
            is none.
        layout: how the parameter is read.
    """

    weight: str
    bias: str | None
    layout: Layout

    @property
    def num_weights(self) -> int:
        """Of all groups, with the bias."""
        return self.layout.groups * self.layout.outputs * self.width

    @property
    def width(self) -> int:
        """The number of inputs, with that of the bias."""
        return self.layout.inputs + (self.bias is not None)

    @property
    def names(self) -> tuple[str, ...]:
        """The weight, and the bias if there is one."""
        return (self.weight,) if self.bias is None else (self.weight, self.bias)

    def joined(self, weight: Tensor, bias: Tensor | None = None) -> Tensor:
        """A tensor like the weight as (G, m, n), with one like the bias as the last column."""
        split = self.layout.matrix(weight)
        return split if bias is None else torch.cat([split, bias.reshape(*split.shape[:2], 1).to(split)], 2)

    def split(self, matrix: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
        """The inverse of `joined`: tensors in the shapes of the weight, and of the bias if it is given."""
        parts = [self.layout.weight(matrix[:, :, : self.layout.inputs], like[0].shape)]
        return parts if len(like) == 1 else [*parts, matrix[:, :, -1].reshape(like[1].shape)]


def num_weights_of(matrices: Iterable[Matrix]) -> int:
    """The weights of all matrices, each once: a table that is the head too is read as two matrices."""
    return sum({matrix.weight: matrix.num_weights for matrix in matrices}.values())


def whole_width(rank: int | None) -> int:
    """The largest width whose whole second moment is summed, if a rank is asked for or not."""
    return EXACT_WIDTH if rank is None else min(EXACT_WIDTH, 4 * rank)


def sketch_width(rank: int | None) -> int:
    """The columns of a sketch: twice its rank."""
    return 2 * (rank or SKETCH_RANK)


def probe_matrix(width: int, columns: int, like: Tensor) -> Tensor:
    """Omega (width, columns), by which a second moment M is sketched: M Omega.

    Its normal random numbers depend on the two sizes alone, so that sketches of different data add up.
    """
    generator = torch.Generator().manual_seed(columns)
    return torch.randn(width, columns, generator=generator, dtype=torch.float32).to(like)
