"""The products of a convolution's gradients and inputs, for every offset of its kernel.

Owns where windows lie in an image, and how they are read.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from memsyn.kernels.outer_products import Magnitude, add_outer_products, scratch

UNFOLD = 64
"""A convolution's kernel is unfolded (copying its input) when it has at most so many inputs per output."""


class Geometry(NamedTuple):
    """Where a convolution's windows lie, per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """The zeros before and after."""
    groups: int


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
    return Geometry(kernel, each("stride", 1), dilation, sides, options.get("groups", 1))


class Pair(NamedTuple):
    """One use, samples first."""

    grad: Tensor
    """(B, rows, *size): of the output."""
    image: Tensor
    """(B, columns, *spatial): what the windows read."""


def conv_products(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """Small kernels and patches are unfolded; of others, shifted views; of single channels, convolutions."""
    groups, kernel = geometry.groups, geometry.kernel
    channels = pairs[0].image.shape[1] // groups
    no_overlap = all(s >= k for s, k in zip(geometry.stride, kernel, strict=True))
    if channels == 1 and groups > 1:
        return _conv_weight_by_channel(pairs, geometry, magnitude)
    if no_overlap or math.prod(kernel) * channels <= UNFOLD:
        return _conv_weight_unfolded(pairs, geometry, magnitude)
    return _conv_weight_by_rows(pairs, geometry, magnitude)


def conv_products_of_one_sign(grad: Tensor, image: Tensor, geometry: Geometry) -> Tensor | None:
    """sum_k |g_k| as an ordinary weight gradient, if no channel holds both signs: then nothing cancels in any g_k.

    So it is between ReLUs where importance is local (Hebb's rule), and hardly ever else: the first sample tells that.
    """
    if grad.device.type != "cpu" or geometry.groups > 1 or any(before != after for before, after in geometry.padding):
        return None
    if not all(_one_sign(part) for part in (image[:1], grad[:1], image, grad)):
        return None
    shape = (grad.shape[1], image.shape[1] // geometry.groups, *geometry.kernel)
    padding = tuple(before for before, _ in geometry.padding)
    weight_gradient = (conv1d_weight, conv2d_weight, conv3d_weight)[len(geometry.kernel) - 1]
    weight: Tensor = weight_gradient(  # type: ignore[no-untyped-call]
        image.abs(), shape, grad.abs(), geometry.stride, padding, geometry.dilation, geometry.groups
    )
    return weight


def _one_sign(features: Tensor) -> bool:
    """Whether each channel of (B, channels, ...) is nowhere positive, or nowhere negative."""
    others = [dim for dim in range(features.ndim) if dim != 1]
    low, high = features.amin(others), features.amax(others)
    return not bool(((low < 0) & (high > 0)).any())


def _left_factors(grad: Tensor, groups: int) -> Tensor:
    """(b, out, *size) -> (b, G, T, out / G), without a copy."""
    left: Tensor = grad.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
    return left


def _conv_weight_unfolded(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """One product with all that an output position sees; a kernel of one pixel sees the input as it lies."""
    grad, inputs = pairs[0].grad, pairs[0].image
    window = (geometry.groups, inputs.shape[1] // geometry.groups, *geometry.kernel)
    total = grad.new_zeros(geometry.groups, grad.shape[1] // geometry.groups, math.prod(window[1:]))
    is_pointwise = all(n == 1 for n in (*geometry.kernel, *geometry.stride)) and not _is_padded(geometry)
    num_positions = sum(math.prod(pair.grad.shape[2:]) for pair in pairs)

    def tokens(samples: slice) -> Sequence[tuple[Tensor, Sequence[Tensor]]]:
        made: list[tuple[Tensor, Sequence[Tensor]]] = []
        for grad, image in pairs:
            windows = image[samples]
            if not is_pointwise:
                windows = _windows(_padded(windows, geometry), geometry, grad.shape[2:])
            rights = windows.reshape(len(windows), *total.shape[::2], -1).transpose(2, 3)
            made.append((_left_factors(grad[samples], geometry.groups), [rights]))
        return made

    copied = 0 if is_pointwise else num_positions * math.prod(window)
    add_outer_products(tokens, [total], magnitude, num_samples=len(grad), copied=copied)
    weight: Tensor = total.flatten(0, 1).unflatten(1, window[1:])
    return weight


def _is_padded(geometry: Geometry) -> bool:
    return any(map(any, geometry.padding))


def _padded(inputs: Tensor, geometry: Geometry) -> Tensor:
    if not _is_padded(geometry):
        return inputs
    sides = [side for pair in reversed(geometry.padding) for side in pair]  # F.pad wants the last dimension first
    return F.pad(inputs, sides)


def _windows(padded: Tensor, geometry: Geometry, size: Sequence[int]) -> Tensor:
    """What each output position sees, as a view: (b, C, *kernel, *size of the output)."""
    steps = padded.stride()[2:]
    return padded.as_strided(
        (*padded.shape[:2], *geometry.kernel, *size),
        (
            *padded.stride()[:2],
            *(step * d for step, d in zip(steps, geometry.dilation, strict=True)),
            *(step * s for step, s in zip(steps, geometry.stride, strict=True)),
        ),
        padded.storage_offset(),
    )


def _conv_weight_by_channel(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """Each channel on its own: the convolution of the input with the gradient, in which stride and dilation swap."""
    per_sample: Tensor | float = 0.0
    for pair in pairs:
        (batch, channels), (out, *size) = pair.image.shape[:2], pair.grad.shape[1:]
        conv_can_pad = all(
            before == after < n for (before, after), n in zip(geometry.padding, size, strict=True)
        )  # the convolution pads faster, but not by more than its kernel: that takes four times as long
        inputs = pair.image if conv_can_pad else _padded(pair.image, geometry)
        convolve = (F.conv1d, F.conv2d, F.conv3d)[len(size) - 1]
        products = convolve(
            inputs.reshape(1, batch * channels, *inputs.shape[2:]),
            pair.grad.reshape(batch * out, 1, *size),
            padding=tuple(before if conv_can_pad else 0 for before, _ in geometry.padding),
            stride=geometry.dilation,
            dilation=geometry.stride,
            groups=batch * channels,
        )
        for dim, k in enumerate(geometry.kernel):  # a stride may leave pixels that no output sees
            products = products.narrow(2 + dim, 0, k)
        per_sample = per_sample + products.reshape(batch, out, 1, *geometry.kernel)
    assert isinstance(per_sample, Tensor)
    return magnitude(per_sample).sum(0)


def _conv_weight_by_rows(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """One product per offset along the first dimension: shifted views of the input, unfolded along the others."""
    grad, inputs, groups = pairs[0].grad, pairs[0].image, geometry.groups
    (first, *rest), channels = geometry.kernel, inputs.shape[1] // groups
    columns = math.prod(rest) * channels
    total = grad.new_zeros(groups, grad.shape[1] // groups, first, columns)

    def tokens(samples: slice) -> Sequence[tuple[Tensor, Sequence[Tensor]]]:
        return [
            (
                _left_factors(pair.grad[samples], groups),
                _rows(pair.image[samples], geometry, pair.grad.shape[2:], f"{index}"),
            )
            for index, pair in enumerate(pairs)
        ]

    copied = sum(pair.image.shape[2] * math.prod(pair.grad.shape[3:]) * groups * columns for pair in pairs)
    add_outer_products(tokens, total.unbind(2), magnitude, num_samples=len(grad), copied=copied)
    weight: Tensor = total.view(-1, *geometry.kernel, channels).movedim(-1, 1)
    return weight


def _rows(inputs: Tensor, geometry: Geometry, size: Sequence[int], use: str) -> Sequence[Tensor]:
    """Per offset along the first dimension (b, G, T, rest of the kernel * C / G): slices of one copy of the input.

    The copy holds, for each row of the padded input, what each output position of the row sees of it. Rows that lie a
    stride apart stand together, so that each slice is one block.

    For a kernel of 3 rows, stride 2 and 3 output rows, output row t sees the padded input rows 2t, 2t + 1 and 2t + 2:

        padded rows             0 1 2 3 4 5 6
        phase 0 (shifts 0, 2)   0 2 4 6             kernel offset 0 is the slice 0:3 (rows 0 2 4), offset 2 is 1:4
        phase 1 (shift 1)       1 3 5 (7)           kernel offset 1 is the slice 0:3 (rows 1 3 5)

    `unfold` would copy 3 x 3 rows; here 4 + 4 are copied, and the third offset is a slice of the first one's block.
    """
    groups, (batch, channels) = geometry.groups, inputs.shape[:2]
    stride, shifts = geometry.stride[0], [o * geometry.dilation[0] for o in range(geometry.kernel[0])]
    phases = sorted({shift % stride for shift in shifts})
    length = shifts[-1] // stride + size[0]
    padded = _channels_last(inputs, geometry, stride * (length - 1) + phases[-1] + 1, use)
    steps = padded.stride()
    shape = (batch, groups, length, *size[1:], *geometry.kernel[1:], channels // groups)
    strides = (
        steps[0],
        channels // groups,
        steps[1] * stride,
        *(step * s for step, s in zip(steps[2:-1], geometry.stride[1:], strict=True)),
        *(step * d for step, d in zip(steps[2:-1], geometry.dilation[1:], strict=True)),
        1,
    )
    copies = scratch(f"rows {use}", (*shape[:2], len(phases), *shape[2:]), inputs)
    for index, phase in enumerate(phases):
        copies[:, :, index].copy_(padded.as_strided(shape, strides, padded.storage_offset() + phase * steps[1]))
    starts = [(phases.index(shift % stride), shift // stride) for shift in shifts]
    width = math.prod(shape[len(size) + 2 :])
    return [
        copies[:, :, phase, row : row + size[0]].reshape(batch, groups, math.prod(size), width) for phase, row in starts
    ]


def _channels_last(inputs: Tensor, geometry: Geometry, num_rows: int, use: str) -> Tensor:
    """The padded input (b, *spatial, C), of so many rows: rows that no output sees may be missing or be added."""
    padding = geometry.padding
    spatial = [size + sum(sides) for size, sides in zip(inputs.shape[2:], padding, strict=True)]
    padded = scratch(f"padded {use}", (len(inputs), num_rows, *spatial[1:], inputs.shape[1]), inputs)
    inner = padded
    for dim, (before, _) in enumerate(padding):
        room = inner.shape[1 + dim]
        inner = inner.narrow(1 + dim, min(before, room), max(0, min(inputs.shape[2 + dim], room - before)))
    if inner.numel() < padded.numel():
        padded.zero_()
    inner.copy_(inputs[:, :, : inner.shape[1]].movedim(1, -1))
    return padded
