"""Sums over samples of a magnitude of per-sample sums of outer products, in tiles that stay in cache.

Owns how the largest part of measuring is computed, every number chosen for its speed, and the memory it works in.
Knows nothing of layers. `benchmarks/products.py` measures the numbers again.
"""

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Protocol, final

import torch
from torch import Tensor

from memsyn.torch_private import version_of


class Magnitude(Protocol):
    """f, applied to a sample's gradient before the sum over samples. Must keep products: f(a b) = f(a) f(b)."""

    def __call__(self, gradient: Tensor, out: Tensor | None = None, /) -> Tensor:
        """f(gradient), in `out`, or else in place."""
        ...


Tokens = Callable[[slice], Sequence[tuple[Tensor, Sequence[Tensor]]]]
"""Some samples -> per use a left (b, G, T, rows) and its rights (b, G, T, columns), views or copies of any strides."""

TILE = 2**18
"""Per-sample products made at once on the CPU, in numbers: 1 MiB of float32, which level-two caches hold."""

TILE_ELSEWHERE = 2**22
"""The same on accelerators, where a tile is one call more and the caches are no concern."""

DEPTH = 4
"""Samples in a tile, if there are so many: adding four at once reads and writes the sum once, not four times."""

HEIGHT, WIDTH = 192, 1024
"""Rows of a tile at least, and columns at most, if there are so many: the products of smaller parts are slower."""

INPUTS = 2**21
"""Inputs copied at once to make rights of them, in numbers: 8 MiB of float32."""

_thread_local = threading.local()
"""`workspace`: the one that is open in this thread, if one is."""


@final
class Workspace:
    """Memory for tiles that is kept from call to call while this is open: asking for it each time costs page faults.

    Each thread has its own open workspace, so two measurements in two threads never write to the same memory. Without
    one, every call gets memory of its own: the same results, slower.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        """By use: one flat tensor each, of the largest size that was asked for."""
        self.last: tuple[weakref.ref[Tensor], int, Magnitude, Tensor] | None = None
        """Gradients, their version, f, and f(gradients) in the scratch memory of "magnitudes"."""

    def __enter__(self) -> None:
        self._outer: Workspace | None = getattr(_thread_local, "workspace", None)
        _thread_local.workspace = self

    def __exit__(self, *_: object) -> None:
        _thread_local.workspace = self._outer


def scratch(use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised memory, of the dtype and device of `like`, that the next call for the same use hands out again.

    So what it returns is valid until then, and two tensors that live at the same time need two names. For instance

        a = scratch("products", (4, 10), x)     # 40 numbers
        b = scratch("products", (2, 10), x)     # the first 20 of them again: a's are overwritten
        c = scratch("folded", (2, 10), x)       # others
    """
    size, workspace = math.prod(shape), getattr(_thread_local, "workspace", None)
    if workspace is None or size > 4 * INPUTS:
        return like.new_empty(shape)
    key, tensors = (use, like.dtype, like.device), workspace.tensors
    if key not in tensors or len(tensors[key]) < size:
        tensors[key] = like.new_empty(size)
    found: Tensor = tensors[key][:size].view(shape)
    return found


def magnitudes(gradients: Tensor, magnitude: Magnitude) -> Tensor:
    """f(gradients), to be read before the next call.

    The rules of a layer's weight and of its bias ask for the same one after the other: |d| for `|d|^T |a|`, and for the
    sum of |d|. So the last result is kept while its argument is the same tensor, unchanged.
    """
    workspace: Workspace | None = getattr(_thread_local, "workspace", None)
    if workspace is None:
        return magnitude(gradients, torch.empty_like(gradients))
    last = workspace.last
    if last is not None and last[0]() is gradients and last[1:3] == (version_of(gradients), magnitude):
        return last[3]
    found = magnitude(gradients, scratch("magnitudes", gradients.shape, gradients))
    workspace.last = (weakref.ref(gradients), version_of(gradients), magnitude, found)
    return found


def add_outer_products(
    tokens: Tokens, totals: Sequence[Tensor], magnitude: Magnitude, *, num_samples: int, copied: int = 0
) -> None:
    """For every right, add sum_k f(sum_t left_kt (x) right_kt) to its total, the inner sum over all tokens and uses.

    With one token a sample, f(l r^T) = f(l) f(r)^T, so the sum over samples is one matrix product and no
    per-sample gradient exists. Otherwise the per-sample products are made a tile at a time, in one buffer.

    Args:
        tokens: makes lefts and rights of some samples.
        totals: for every right (G, rows, columns), of any strides.
        magnitude: f.
        num_samples: B.
        copied: how many numbers `tokens` copies for a sample, that the samples are taken some at a time.
    """
    if num_samples == 0 or totals[0].numel() == 0:
        return
    step = max(1, min(num_samples, INPUTS // copied if copied else num_samples))
    for start in range(0, num_samples, step):
        uses = tokens(slice(start, min(start + step, num_samples)))
        for index, total in enumerate(totals):
            pairs = [(left, rights[index]) for left, rights in uses]
            if len(pairs) == 1 and pairs[0][0].shape[2] == 1:
                left, right = pairs[0]
                for group, own in enumerate(total):
                    _add_product(left[:, group, 0], right[:, group, 0], own, magnitude)
            else:
                _add_tiles(pairs, total, magnitude)


def add_token_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], total: Tensor, magnitude: Magnitude) -> None:
    """Add sum_k f(sum_t left_kt (x) right_kt) of (B, ..., rows) and (B, ..., columns), one of each per use."""
    if len(lefts) == 1 and lefts[0].ndim == 2:
        _add_product(lefts[0], rights[0], total, magnitude)
        return
    pairs = [(_tokens_of(left), _tokens_of(right)) for left, right in zip(lefts, rights, strict=True)]
    left, right = pairs[0]
    num_tokens = sum(own.shape[2] for own, _ in pairs)
    copied = 0 if len(pairs) == 1 and num_tokens > 1 else num_tokens * (left.shape[-1] + right.shape[-1])

    def tokens(some: slice) -> Sequence[tuple[Tensor, Sequence[Tensor]]]:
        if len(pairs) == 1:
            return [(left[some], [right[some]])]
        own_lefts, own_rights = zip(*((left[some], right[some]) for left, right in pairs), strict=True)
        return [(torch.cat(own_lefts, 2), [torch.cat(own_rights, 2)])]  # one product: a use may be a single token

    add_outer_products(tokens, [total.unsqueeze(0)], magnitude, num_samples=len(left), copied=copied)


def _tokens_of(features: Tensor) -> Tensor:
    """(B, ..., features) -> (B, 1, T, features)."""
    return features.reshape(len(features), 1, math.prod(features.shape[1:-1]), features.shape[-1])


def _add_product(left: Tensor, right: Tensor, total: Tensor, magnitude: Magnitude) -> None:
    """One token a sample: the product of the magnitudes."""
    bare = magnitude(right, scratch("right", right.shape, right))
    total.addmm_(magnitudes(left, magnitude).T, bare)


def _add_tiles(pairs: Sequence[tuple[Tensor, Tensor]], total: Tensor, magnitude: Magnitude) -> None:
    """Tiles of some samples, rows and columns: products, magnitude, and the sum over their samples."""
    num_samples, (groups, rows, columns) = len(pairs[0][0]), total.shape
    threads = torch.get_num_threads() if total.device.type == "cpu" else 1
    area = TILE * threads if total.device.type == "cpu" else TILE_ELSEWHERE
    if groups > 1 and groups * rows * columns * min(DEPTH, num_samples) > area:
        for group in range(groups):
            one = slice(group, group + 1)
            _add_tiles([(left[:, one], right[:, one]) for left, right in pairs], total[one], magnitude)
        return
    depth, height, width = _tile(num_samples, groups * rows, columns, area)
    height = max(1, height // groups)
    depth -= depth % threads if depth > threads else 0  # else some threads wait for others
    factors = [(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1)) for left, right in pairs]
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            block = total[:, row : row + height, column : column + width]
            parts = [(left[:, row : row + height], right[..., column : column + width]) for left, right in factors]
            if block.is_contiguous():
                _add_samples(parts, depth, block, magnitude)
            else:
                found = scratch("total of tiles", block.shape, block).zero_()
                _add_samples(parts, depth, found, magnitude)
                block += found


def _add_samples(parts: Sequence[tuple[Tensor, Tensor]], depth: int, total: Tensor, magnitude: Magnitude) -> None:
    """Add up all samples of one tile's rows and columns (per use: B * G rows-by-tokens, B * G tokens-by-columns).

    For each `depth` samples there are three calls, and no more: calls cost as much as small products.

        products[k] = left_k right_k        (depth, rows, columns), in the scratch memory of one tile
        products = f(products)              in place, still in the cache
        total += sum over k of products[k]  as a product with a vector of ones
    """
    groups, flat = len(total), total.view(-1)
    buffer = scratch("products", (depth, *total.shape), total)
    ones = total.new_ones(depth)
    tiles = [(left.split(depth * groups), right.split(depth * groups)) for left, right in parts]
    for index, left in enumerate(tiles[0][0]):
        num_samples = len(left) // groups
        samples = buffer[:num_samples]
        products = samples.view(-1, *total.shape[1:])
        torch.bmm(left, tiles[0][1][index], out=products)
        for lefts, rights in tiles[1:]:
            products.baddbmm_(lefts[index], rights[index])
        magnitude(samples)
        flat.addmv_(samples.view(num_samples, -1).t(), ones[:num_samples])  # sum(0), but twice as fast


def _tile(num_samples: int, rows: int, columns: int, area: int) -> tuple[int, int, int]:
    """(samples, rows, columns) of a tile of about `area` numbers."""
    width = _equal_part(columns, WIDTH)
    height = _equal_part(rows, max(HEIGHT, area // (DEPTH * width)))
    return max(1, min(num_samples, area // (height * width))), height, width


def _equal_part(whole: int, most: int) -> int:
    """The size of the fewest equal parts of at most so much, rounded up to whole vectors."""
    part = math.ceil(whole / math.ceil(whole / most))
    return min(whole, 16 * math.ceil(part / 16))
