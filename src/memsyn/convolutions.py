"""The products of a convolution's gradients and inputs, for every offset of its kernel.

Owns where windows lie in an image, and how they are read.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from memsyn.products import Magnitude, outer_products

UNFOLD = 64
"""A convolution's kernel is unfolded (copying its input) when it has at most so many inputs per output."""


class Geometry(NamedTuple):
    """Where a convolution's windows lie, per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    sides: tuple[tuple[int, int], ...]
    """The zeros before and after."""


def geometry_of(options: Mapping[str, Any], kernel: tuple[int, ...]) -> Geometry:
    """The geometry of a call with these options."""

    def each(name: str, default: int) -> tuple[int, ...]:
        value = options.get(name, default)
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * len(kernel) if len(values) == 1 else values

    dilation = each("dilation", 1)
    padding = options.get("padding", 0)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = tuple((p, p) for p in each("padding", 0))
    return Geometry(kernel, each("stride", 1), dilation, sides)


def conv_products(
    grads: Sequence[Tensor],
    inputs: Sequence[Tensor],
    shape: torch.Size,
    geometry: Geometry,
    groups: int,
    magnitude: Magnitude,
) -> Tensor:
    """sum_k f(sum_t d_kt a_k(t + o)^T) for each kernel offset o, of the weight's shape (rows, columns, *kernel).

    Small kernels and patches (windows that do not overlap) are unfolded and become one product instead.
    """
    spatial, columns = len(geometry.kernel), shape[1] * groups
    lefts = [grad.movedim(1, -1).contiguous().unflatten(-1, (groups, -1)) for grad in grads]
    windows = [_windows(image, grad.shape[2:], geometry) for image, grad in zip(inputs, grads, strict=True)]
    offsets = math.prod(geometry.kernel)
    apart = all(s >= k for s, k in zip(geometry.stride, geometry.kernel, strict=True))
    if groups == 1 and (apart or offsets * columns <= UNFOLD):
        rights = [window.flatten(1 + spatial).unsqueeze(-2) for window in windows]
        products = outer_products(lefts, [rights], magnitude)[0][0]  # (out, offsets * in)
        weight = products.unflatten(1, (*geometry.kernel, columns))
    else:
        places: list[tuple[Any, ...]] = [
            (..., *offset, slice(None)) for offset in itertools.product(*map(range, geometry.kernel))
        ]
        shifted = [[window[place].unflatten(-1, (groups, -1)) for window in windows] for place in places]
        weight = torch.stack(list(outer_products(lefts, shifted, magnitude)), 2).flatten(0, 1)  # (out, offsets, in)
        weight = weight.unflatten(1, geometry.kernel)
    moved: Tensor = weight.movedim(-1, 1)
    return moved


def _windows(image: Tensor, out_size: torch.Size, geometry: Geometry) -> Tensor:
    """The input each output position sees, as a view: (B, *out_size, *kernel, channels)."""
    pad = [side for pair in reversed(geometry.sides) for side in pair]  # F.pad wants the last dimension first
    padded = (F.pad(image, pad) if any(pad) else image).movedim(1, -1).contiguous()
    sample, *steps, channel = padded.stride()
    return padded.as_strided(
        (len(padded), *out_size, *geometry.kernel, padded.shape[-1]),
        (
            sample,
            *(step * s for step, s in zip(steps, geometry.stride, strict=True)),
            *(step * d for step, d in zip(steps, geometry.dilation, strict=True)),
            channel,
        ),
    )
