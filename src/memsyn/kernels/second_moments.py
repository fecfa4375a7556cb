"""Second moments: sum x x^T over what a weight matrix meets, and sum d d^T over the gradients of its outputs.

Owns how an operation uses a weight as a matrix, and how its second moments are summed. Must not know models.

Words: a position is one x that the matrix is applied to: a token, a pixel, a repeated use. A matrix W maps n inputs to
m outputs, y = W x. A weight with groups holds G such matrices.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any, Final

import torch
from torch import Tensor

from memsyn.kernels.convolutions import geometry_of, windows_of
from memsyn.kernels.outer_products import INPUTS
from memsyn.matrices import Layout, probe_matrix, sketch_width, whole_width

Rows = Callable[[Tensor, Mapping[str, Any], torch.Size], Iterator[Tensor]]
"""(operand or output gradient, options of the call, shape of the weight) -> pieces (G, positions, width)."""


@dataclass(frozen=True)
class MatrixUse:
    """How an operation uses one of its arguments as a matrix.

    Attributes:
        operand: the argument that holds x.
        inputs: the positions of x, as rows.
        outputs: the positions of the output gradient d, as rows.
        inputs_first: whether the weight's first dimension holds the inputs: y = x W, not y = x W^T.
        bias: the argument that is added at each position: a further column of W, whose x is 1.
        is_table: whether x is the number of a row: a vector with a single 1.
    """

    operand: str
    inputs: Rows
    outputs: Rows
    inputs_first: bool = False
    bias: str | None = None
    is_table: bool = False


def layout_of(use: MatrixUse, shape: torch.Size, groups: int) -> Layout:
    """The layout of a weight of this shape in a call."""
    rows, columns = shape[0] // groups, math.prod(shape[1:])
    outputs, inputs = (columns, rows) if use.inputs_first else (rows, columns)
    return Layout(groups, outputs, inputs, use.inputs_first, use.is_table)


# Rows


def features(tensor: Tensor, options: Mapping[str, Any], shape: torch.Size) -> Iterator[Tensor]:
    """(..., features) -> (1, positions, features)."""
    yield tensor.reshape(1, -1, tensor.shape[-1])


def channels(tensor: Tensor, options: Mapping[str, Any], shape: torch.Size) -> Iterator[Tensor]:
    """(B, channels, *spatial) -> (G, positions, channels / G)."""
    images = _as_batch(tensor, len(shape))
    groups = options.get("groups", 1)
    yield (
        images.flatten(2).unflatten(1, (groups, -1)).permute(1, 0, 3, 2).reshape(groups, -1, images.shape[1] // groups)
    )


def windows(tensor: Tensor, options: Mapping[str, Any], shape: torch.Size) -> Iterator[Tensor]:
    """The windows in (B, channels, *spatial), some samples at a time: (G, positions, channels / G * kernel)."""
    images, geometry = _as_batch(tensor, len(shape)), geometry_of(options, tuple(shape[2:]))
    per_sample = math.prod(geometry.kernel) * images[:1].numel()
    step = max(1, 2 * INPUTS // max(1, per_sample))
    for some in images.split(step):
        # (b, C, *kernel, *size) -> (b, G, C / G, kernel, T) -> (G, b, T, C / G, kernel)
        found = windows_of(some, geometry).flatten(2 + len(geometry.kernel)).flatten(2, -2)
        split = found.unflatten(1, (geometry.groups, -1)).permute(1, 0, 4, 2, 3)
        yield split.reshape(geometry.groups, -1, split.shape[3] * split.shape[4])


def _as_batch(tensor: Tensor, ndim: int) -> Tensor:
    """An image without a batch dimension as a batch of one."""
    return tensor.unsqueeze(0) if tensor.ndim < ndim else tensor


def rows_of_table(tensor: Tensor, options: Mapping[str, Any], shape: torch.Size) -> Iterator[Tensor]:
    """The numbers of the rows that a lookup reads, without its padding row: (positions,)."""
    index, padding = tensor.reshape(-1), options.get("padding_idx")
    index = index % shape[0]
    yield index if padding is None else index[index != padding % shape[0]]


def gradients_of_table(tensor: Tensor, options: Mapping[str, Any], shape: torch.Size) -> Iterator[Tensor]:
    """The output gradients of a lookup, (1, positions, features), without those of the padding row."""
    rows, counted = tensor.reshape(1, -1, tensor.shape[-1]), options.get("counted")
    yield rows if counted is None else rows[:, counted.reshape(-1)]


# Sums


def zeros(layout: Layout, width: int, like: Tensor, *, with_bias: bool, rank: int | None) -> dict[str, Tensor]:
    """The sums of one side before the first sample, by kind: `whole`, or `sketch` and `trace`."""
    groups, full = layout.groups, width + with_bias
    if full <= whole_width(rank):
        return {"whole": like.new_zeros(groups, full, full)}
    columns = min(sketch_width(rank), full)
    return {"sketch": like.new_zeros(groups, full, columns), "trace": like.new_zeros(groups)}


def add_counts(total: Tensor, index: Tensor) -> None:
    """Add how often each row of a table was read: the second moment of vectors with a single 1 is diagonal."""
    total += index.bincount(minlength=len(total)).to(total)


BLOCK: Final = 96
"""Rows of a block. Only blocks on and above the diagonal are computed."""


def add_second_moments(sums: Mapping[str, Tensor], rows: Tensor, *, with_bias: bool) -> None:
    """Add sum x x^T over rows (G, positions, width), with x extended by a 1 if `with_bias`.

    Of a whole second moment, only the blocks on and above the diagonal are added; `mirror_` fills in the others. Of a
    sketch, (sum x x^T) Omega is added, and the trace.
    """
    rows = rows.to(next(iter(sums.values())).dtype)
    width = rows.shape[2]
    if "whole" in sums:
        total = sums["whole"]
        # A depthwise convolution has as many groups as channels.
        is_one = len(total) == 1
        columns, own = (rows[0], total[0]) if is_one else (rows, total)
        for start in range(0, width, BLOCK):
            stop = min(start + BLOCK, width)
            left, block = columns[..., start:stop].mT, own[..., start:stop, start:width]
            (block.addmm_ if is_one else block.baddbmm_)(left, columns[..., start:])
        if with_bias:
            total[:, :width, width] += rows.sum(1)
            total[:, width, width] += rows.shape[1]
        return
    sketch, trace = sums["sketch"], sums["trace"]
    omega = probe_matrix(width + with_bias, sketch.shape[2], sketch)
    products = rows @ omega[:width]
    if with_bias:
        products += omega[width]
        sketch[:, width] += products.sum(1)
        trace += rows.shape[1]
    sketch[:, :width].baddbmm_(rows.transpose(1, 2), products)
    trace += rows.square().sum((1, 2))


def mirror_(total: Tensor) -> Tensor:
    """Copy the upper triangle of (G, n, n) to the lower one, in place."""
    total.copy_(total.triu() + total.triu(1).transpose(1, 2))
    return total
