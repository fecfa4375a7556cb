"""The per-sample weight gradients of convolutions.

Owns where the windows of a kernel lie in an image, and how they are read. Must not know models or layers.
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.nn.grad import conv1d_weight, conv2d_weight, conv3d_weight

from memsyn.kernels.native_products import copy_channels_last
from memsyn.kernels.outer_products import INPUTS, Magnitude, add_natively, add_outer_products, can_add_natively, scratch

UNFOLD = 64
"""Windows are unfolded (copied) if a kernel has at most this many inputs per output: kernel size * input channels."""


class Geometry(NamedTuple):
    """Where a convolution's windows lie, per spatial dimension."""

    kernel: tuple[int, ...]
    stride: tuple[int, ...]
    dilation: tuple[int, ...]
    padding: tuple[tuple[int, int], ...]
    """Number of zeros before and after the image, per dimension."""
    groups: int


def geometry_of(options: Mapping[str, Any], kernel: tuple[int, ...]) -> Geometry:
    """Read the geometry from a call's options; a convolution's defaults fill the gaps."""

    def each(name: str, default: int) -> tuple[int, ...]:
        value = options.get(name, default)
        values = (value,) if isinstance(value, int) else tuple(value)
        return values * len(kernel) if len(values) == 1 else values

    dilation = each("dilation", 1)
    padding = options.get("padding", 0)
    if isinstance(padding, str):
        totals = [d * (k - 1) if padding == "same" else 0 for d, k in zip(dilation, kernel, strict=True)]
        # An odd total puts the extra zero after the image: a kernel of 4 has 1 zero before and 2 after.
        sides = tuple((total // 2, total - total // 2) for total in totals)
    else:
        sides = tuple((p, p) for p in each("padding", 0))
    return Geometry(kernel, each("stride", 1), dilation, sides, options.get("groups", 1))


class Pair(NamedTuple):
    """The two tensors whose products are summed, for one use of the kernel. Samples come first."""

    grad: Tensor
    """(B, rows, *size): the output gradient."""
    image: Tensor
    """(B, columns, *spatial): the image that the windows read."""


def add_pointwise_products(pairs: Sequence[Pair], geometry: Geometry, total: Tensor, magnitude: Magnitude) -> bool:
    """Add sum_k f(g_k) of a 1x1 kernel to `total` itself, without other memory of its size; whether that was done.

    Nothing is added if the kernel is larger, for one channel per group, or if the native library cannot.
    """
    if math.prod(geometry.kernel) > 1 or total.shape[1] == 1 < geometry.groups or total.dtype != torch.float32:
        return False
    if not can_add_natively([tensor for pair in pairs for tensor in pair], magnitude):
        return False
    _add_natively_by_samples(pairs, geometry, total.view(geometry.groups, -1, total.shape[1]), magnitude)
    return True


def conv_products(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """sum_k f(g_k), (out, in / groups, *kernel), by the fastest of four methods.

    - One input channel per group (a depthwise convolution): one grouped convolution of the images with the gradients.
    - All others, if the native library can: it reads windows from the image itself, and none is copied.
    - Windows that do not overlap (patches), or small kernels: unfold the windows, then one product.
    - Without the library, all others: one product per kernel row, with shifted views of the image.
    """
    groups, kernel = geometry.groups, geometry.kernel
    channels = pairs[0].image.shape[1] // groups
    no_overlap = all(s >= k for s, k in zip(geometry.stride, kernel, strict=True))
    if channels == 1 and groups > 1:
        return _conv_weight_by_channel(pairs, geometry, magnitude)
    found = _conv_weight_natively(pairs, geometry, magnitude)
    if found is not None:
        return found
    if no_overlap or math.prod(kernel) * channels <= UNFOLD:
        return _conv_weight_unfolded(pairs, geometry, magnitude)
    return _conv_weight_by_rows(pairs, geometry, magnitude)


def conv_products_of_one_sign(grad: Tensor, image: Tensor, geometry: Geometry) -> Tensor | None:
    """sum_k |g_k| by one ordinary weight gradient; None if some channel has mixed signs.

    If no channel has mixed signs, nothing cancels inside a g_k: sum_t |d_kt| |a_kt|^T equals |sum_t d_kt a_kt^T|. This
    holds for local importance between ReLUs (Hebb's rule), and rarely otherwise. The first sample is tested first,
    because it usually decides.
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
    """Whether no channel of (B, channels, ...) holds both positive and negative numbers."""
    others = [dim for dim in range(features.ndim) if dim != 1]
    low, high = features.amin(others), features.amax(others)
    return not bool(((low < 0) & (high > 0)).any())


def _conv_weight_natively(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor | None:
    """One product over views of the gradients and of the padded images; None if the native library cannot."""
    if not can_add_natively([tensor for pair in pairs for tensor in pair], magnitude):
        return None
    grad, inputs, groups = pairs[0].grad, pairs[0].image, geometry.groups
    window = (*geometry.kernel, inputs.shape[1] // groups)
    total = grad.new_zeros(groups, grad.shape[1] // groups, math.prod(window), dtype=torch.float32)
    _add_natively_by_samples(pairs, geometry, total, magnitude)
    weight: Tensor = total.view(-1, *window).movedim(-1, 1)
    return weight


def _add_natively_by_samples(pairs: Sequence[Pair], geometry: Geometry, total: Tensor, magnitude: Magnitude) -> None:
    """Add to (G, out / G, kernel * C / G) in the native library, so many samples at a time that copies stay small."""
    grad, groups = pairs[0].grad, geometry.groups
    copied = sum(math.prod(_lengths(pair, geometry)) * pair.image.shape[1] for pair in pairs)
    step = max(1, min(len(grad), INPUTS // copied))
    for start in range(0, len(grad), step):
        some = slice(start, start + step)
        uses = [
            (
                # (b, out, *size) -> (b, G, *size, out / G)
                pair.grad[some].unflatten(1, (groups, -1)).movedim(2, -1),
                _windows_last(Pair(pair.grad[some], pair.image[some]), geometry, f"{index}", total),
                len(geometry.kernel),
            )
            for index, pair in enumerate(pairs)
        ]
        add_natively(uses, total, magnitude)


def _lengths(pair: Pair, geometry: Geometry) -> list[int]:
    """The size of the part of the padded image that the windows read."""
    return [
        stride * (size - 1) + dilation * (kernel - 1) + 1
        for size, kernel, stride, dilation in zip(
            pair.grad.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True
        )
    ]


def _windows_last(pair: Pair, geometry: Geometry, use: str, like: Tensor) -> Tensor:
    """The windows as a view: (b, G, *size, *kernel, C / G). For 1x1 kernels a view of the image, else of a copy.

    In the copy channels lie next to each other in memory. So a row of a window is one run of numbers.
    """
    image, groups = pair.image, geometry.groups
    if math.prod(geometry.kernel) == 1 and not _is_padded(geometry):
        last = image.movedim(1, -1)
    else:
        shape = (len(image), *_lengths(pair, geometry), image.shape[1])
        last = scratch(f"padded {use}", shape, like)
        copy_channels_last(image, last, [before for before, _ in geometry.padding])
    steps = last.stride()[1:-1]
    strides = (
        last.stride(0),
        last.stride(-1) * (last.shape[-1] // groups),
        *(step * s for step, s in zip(steps, geometry.stride, strict=True)),
        *(step * d for step, d in zip(steps, geometry.dilation, strict=True)),
        last.stride(-1),
    )
    shape = (len(last), groups, *pair.grad.shape[2:], *geometry.kernel, last.shape[-1] // groups)
    return last.as_strided(shape, strides, last.storage_offset())


def _left_factors(grad: Tensor, groups: int) -> Tensor:
    """(b, out, *size) -> (b, G, T, out / G), without a copy."""
    left: Tensor = grad.flatten(2).unflatten(1, (groups, -1)).transpose(2, 3)
    return left


def _conv_weight_unfolded(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """Unfold the windows of all output positions, then one product. A 1x1 kernel needs no copy of the image."""
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
            # (b, C, *kernel, *size) -> (b, G, C / G * kernel, T) -> (b, G, T, C / G * kernel).
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
    # F.pad takes the last dimension first.
    sides = [side for pair in reversed(geometry.padding) for side in pair]
    return F.pad(inputs, sides)


def _windows(padded: Tensor, geometry: Geometry, size: Sequence[int]) -> Tensor:
    """The window of each output position, as a view: (b, C, *kernel, *size of the output).

    For images (b, 3, 8, 8), a 3x3 kernel and stride 1, the view is (b, 3, 3, 3, 6, 6): entry [..., i, j, y, x] is the
    pixel (y + i, x + j).
    """
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


def windows_of(images: Tensor, geometry: Geometry) -> Tensor:
    """The window of each output position of images (b, C, *spatial): (b, C, *kernel, *size of the output)."""
    padded = _padded(images, geometry)
    size = [
        (length - dilation * (kernel - 1) - 1) // stride + 1
        for length, kernel, stride, dilation in zip(
            padded.shape[2:], geometry.kernel, geometry.stride, geometry.dilation, strict=True
        )
    ]
    return _windows(padded, geometry, size)


def _conv_weight_by_channel(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """Each channel separately, by a grouped convolution of the images with the gradients.

    In this convolution the gradient is the kernel, so stride and dilation change places.
    """
    per_sample: Tensor | float = 0.0
    for pair in pairs:
        (batch, channels), (out, *size) = pair.image.shape[:2], pair.grad.shape[1:]
        # The convolution pads faster than F.pad, but is four times slower if the padding exceeds its kernel.
        conv_can_pad = all(before == after < n for (before, after), n in zip(geometry.padding, size, strict=True))
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
        # With a stride, windows may not reach the last pixels. An image of 8 pixels, kernel 3 and stride 2 have 3
        # windows, over pixels 0 to 6. The convolution gives 4 offsets, and the last one is dropped.
        for dim, k in enumerate(geometry.kernel):
            products = products.narrow(2 + dim, 0, k)
        per_sample = per_sample + products.reshape(batch, out, 1, *geometry.kernel)
    assert isinstance(per_sample, Tensor)
    return magnitude(per_sample).sum(0)


def _conv_weight_by_rows(pairs: Sequence[Pair], geometry: Geometry, magnitude: Magnitude) -> Tensor:
    """One product per kernel row: views shifted along the first dimension, unfolded along the others."""
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
    # (G, out / G, kernel rows, rest of the kernel * C / G) -> (out, *kernel, C / G) -> (out, C / G, *kernel).
    weight: Tensor = total.view(-1, *geometry.kernel, channels).movedim(-1, 1)
    return weight


def _rows(inputs: Tensor, geometry: Geometry, size: Sequence[int], use: str) -> Sequence[Tensor]:
    """One tensor per kernel row: (b, G, T, rest of the kernel * C / G). All are slices of one copy of the image.

    For each row of the padded image, the copy holds the part of every window that lies in this row. Rows with a
    distance of one stride are neighbours in the copy, so each slice is one block of memory.

    For a kernel of 3 rows, stride 2 and 3 output rows, output row t sees the padded input rows 2t, 2t + 1 and 2t + 2:

        padded rows             0 1 2 3 4 5 6
        phase 0 (shifts 0, 2)   0 2 4 6             kernel offset 0 is the slice 0:3 (rows 0 2 4), offset 2 is 1:4
        phase 1 (shift 1)       1 3 5 (7)           kernel offset 1 is the slice 0:3 (rows 1 3 5)

    `unfold` would copy 3 x 3 rows. Here 4 + 4 rows are copied, and offsets 0 and 2 are slices of the same block.
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
    """The padded image (b, *spatial, C) with `num_rows` rows. Rows that no window reads may be missing or added."""
    padding = geometry.padding
    spatial = [size + sum(sides) for size, sides in zip(inputs.shape[2:], padding, strict=True)]
    padded = scratch(f"padded {use}", (len(inputs), num_rows, *spatial[1:], inputs.shape[1]), inputs)
    inner = padded
    for dim, (before, _) in enumerate(padding):
        room = inner.shape[1 + dim]
        inner = inner.narrow(1 + dim, min(before, room), max(0, min(inputs.shape[2 + dim], room - before)))
    if inner.numel() < padded.numel():
        # Scratch memory holds old numbers, so the padding is zeroed in every call.
        padded.zero_()
    inner.copy_(inputs[:, :, : inner.shape[1]].movedim(1, -1))
    return padded
