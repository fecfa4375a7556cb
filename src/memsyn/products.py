"""Sums over samples of a magnitude of per-sample sums of outer products, in tiles that stay in cache.

Owns how the largest part of measuring is computed, and every number chosen for its speed. Knows nothing of layers.
"""

import math
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Magnitude = Callable[[Tensor], Tensor]
"""f, applied to a sample's gradient before the sum over samples, in place. Must keep products: f(a b) = f(a) f(b)."""

NUM_PRODUCTS = 2**21
"""Per-sample products made at once, in numbers: 8 MiB of float32."""

NUM_INPUTS = 2**19
"""Inputs and gradients read at once for that, in numbers."""


def outer_products(
    lefts: Sequence[Tensor], rights: Sequence[Sequence[Tensor]], magnitude: Magnitude
) -> Sequence[Tensor]:
    """For every right: sum_k f(sum_t left_kt (x) right_kt), per sample the sum of outer products over its tokens.

    With one token a sample, f(l r^T) = f(l) f(r)^T, so the sum over samples is one matrix product and no
    per-sample gradient exists. Otherwise the per-sample products are made a tile at a time, in one buffer.

    Args:
        lefts: per use (B, ..., G, rows), any token dimensions in between.
        rights: each per use (B, ..., G, columns), of the same token dimensions.
        magnitude: f.

    Returns:
        (G, rows, columns) for every right.
    """
    left, right = lefts[0], rights[0][0]
    (groups, rows), columns = left.shape[-2:], right.shape[-1]
    if left.ndim == 3 and len(lefts) == 1:
        bare = magnitude(left.clone()).permute(1, 2, 0)
        return [bare @ magnitude(right[0].clone()).transpose(0, 1) for right in rights]
    totals = [left.new_zeros(groups, rows, columns) for _ in rights]
    height = max(1, min(rows, NUM_PRODUCTS // (groups * columns)))
    num_tokens = sum(math.prod(use.shape[1:-2]) for use in lefts)
    depth = NUM_INPUTS // max(1, num_tokens * groups * (rows + columns))
    depth = max(1, min(len(left), depth, NUM_PRODUCTS // (groups * height * columns)))
    buffer = left.new_empty(depth * groups * height * columns)
    for start in range(0, len(left), depth):
        tile = slice(start, start + depth)
        left = _join_tokens([use[tile] for use in lefts])
        for total, uses in zip(totals, rights, strict=True):
            right = _join_tokens([use[tile] for use in uses])
            for row in range(0, rows, height):
                block = slice(row, row + height)
                products = magnitude(_token_products(left[..., block], right, buffer))
                total[:, block].add_(products[0] if len(products) == 1 else products.sum(0))
    return totals


def _join_tokens(uses: Sequence[Tensor]) -> Tensor:
    """Uses of shape (b, ..., G, features) -> (b, G, T, features), tokens of all uses one after the other."""
    flat = [use.flatten(1, -3) if use.ndim > 3 else use.unsqueeze(1) for use in uses]
    return (flat[0] if len(flat) == 1 else torch.cat(flat, 1)).transpose(1, 2)


def _token_products(left: Tensor, right: Tensor, buffer: Tensor) -> Tensor:
    """(b, G, T, rows) and (b, G, T, columns) -> (b, G, rows, columns), in the buffer."""
    shape = (*left.shape[:2], left.shape[3], right.shape[3])
    products = buffer[: math.prod(shape)].view(shape)
    if left.shape[1] > 1 and shape[2] * shape[3] == 1:  # depthwise: a matrix product of vectors is slow
        return torch.sum(left * right, 2, out=products.view(shape[0], shape[1], 1)).view(shape)
    torch.bmm(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1), out=products.flatten(0, 1))
    return products
