"""sum_k f(sum_t left_kt right_kt^T) over samples k and tokens t, computed in tiles that stay in the CPU cache.

Most of the measuring time is spent here. Owns this computation, its tuning constants (`benchmarks/products.py` measures
them again) and its scratch memory. Must not know layers.
"""

import math
import threading
import weakref
from collections.abc import Callable, Sequence
from typing import Final, Protocol, final

import torch
from torch import Tensor

from memsyn.kernels.fused_products import add_fused_products
from memsyn.kernels.native_products import Factors, add_native_products, takes_products
from memsyn.torch_private import version_of


class Magnitude(Protocol):
    """f, applied to one sample's gradient before the sum over samples. It must satisfy f(a b) = f(a) f(b)."""

    def __call__(self, gradient: Tensor, out: Tensor | None = None, /) -> Tensor:
        """Write f(gradient) to `out`; without `out`, work in place."""
        ...


def absolute(gradient: Tensor, out: Tensor | None = None) -> Tensor:
    """f(g) = |g|: the magnitude of MAS."""
    return torch.abs(gradient, out=gradient if out is None else out)


def square(gradient: Tensor, out: Tensor | None = None) -> Tensor:
    """f(g) = g^2: the magnitude of the diagonal Fisher information."""
    return torch.mul(gradient, gradient, out=gradient if out is None else out)


def signed(gradient: Tensor, out: Tensor | None = None) -> Tensor:
    """f(g) = g: then the sums equal the gradients of autograd."""
    return gradient if out is None else out.copy_(gradient)


NATIVE: Final[dict[Magnitude, int]] = {absolute: 0, square: 1, signed: 2}
"""The functions that the native library knows, and their numbers there."""

Tokens = Callable[[slice], Sequence[tuple[Tensor, Sequence[Tensor]]]]
"""Slice of samples -> per use, a left factor (b, G, T, rows) and right factors (b, G, T, columns), with any strides."""

TILE = 2**18
"""Size of a tile on the CPU, in numbers: 1 MiB of float32, which fits into a level-two cache."""

TILE_ELSEWHERE = 2**22
"""Size of a tile on accelerators. There the number of calls matters, not the cache."""

DEPTH = 4
"""Samples per tile, if the batch has this many. Adding four at once reads and writes the sum once, not four times."""

HEIGHT, WIDTH = 192, 1024
"""The least rows and the most columns of a tile, if the matrix has this many. Smaller products are slower."""

INPUTS = 2**21
"""The most inputs to copy at once into right factors, in numbers: 8 MiB of float32."""

_thread_local = threading.local()
"""Its attribute `workspace` is the workspace that is open in this thread, if there is one."""


@final
class Workspace:
    """Scratch memory for tiles. While a workspace is open, calls reuse its memory, which saves page faults.

    Each thread has its own open workspace, so two measurements in two threads never write to the same memory. Without
    an open workspace every call allocates its own memory: the results are the same, but slower.
    """

    def __init__(self) -> None:
        self.tensors: dict[tuple[str, torch.dtype, torch.device], Tensor] = {}
        """(use, dtype, device) -> one flat tensor, as large as the largest request so far."""
        self.last: tuple[weakref.ref[Tensor], int, Magnitude, Tensor] | None = None
        """The last result of `magnitudes`: gradients, their version, f, and f(gradients) in scratch memory."""

    def __enter__(self) -> None:
        self._outer: Workspace | None = getattr(_thread_local, "workspace", None)
        _thread_local.workspace = self

    def __exit__(self, *_: object) -> None:
        _thread_local.workspace = self._outer


def scratch(use: str, shape: Sequence[int], like: Tensor) -> Tensor:
    """Uninitialised memory with the dtype and device of `like`. The next call for the same use returns it again.

    The result is valid until that next call, so two tensors that live at the same time need two names:

        a = scratch("products", (4, 10), x)     # 40 numbers
        b = scratch("products", (2, 10), x)     # the first 20 numbers of a: a is overwritten
        c = scratch("folded", (2, 10), x)       # separate memory
    """
    size, workspace = math.prod(shape), getattr(_thread_local, "workspace", None)
    # Larger requests are not kept: 4 * 2^21 numbers of float32 are 32 MiB.
    if workspace is None or size > 4 * INPUTS:
        return like.new_empty(shape)
    key, tensors = (use, like.dtype, like.device), workspace.tensors
    if key not in tensors or len(tensors[key]) < size:
        tensors[key] = like.new_empty(size)
    found: Tensor = tensors[key][:size].view(shape)
    return found


def magnitudes(gradients: Tensor, magnitude: Magnitude) -> Tensor:
    """f(gradients). Read the result before the next call.

    The last result is kept as long as the argument is the same tensor, unchanged. A layer needs |d| twice in a row: the
    weight's rule computes `|d|^T |a|`, and the bias's rule sums |d|.
    """
    workspace: Workspace | None = getattr(_thread_local, "workspace", None)
    if workspace is None:
        return magnitude(gradients, torch.empty_like(gradients))
    last = workspace.last
    if last is not None and last[0]() is gradients and last[1:3] == (version_of(gradients), magnitude):
        return last[3]
    found = magnitude(gradients, scratch("magnitudes", gradients.shape, gradients))
    # A weak reference does not keep the gradient alive. Comparing addresses instead would be wrong: a new tensor may
    # get the address of a freed one.
    workspace.last = (weakref.ref(gradients), version_of(gradients), magnitude, found)
    return found


def add_outer_products(
    tokens: Tokens, totals: Sequence[Tensor], magnitude: Magnitude, *, num_samples: int, copied: int = 0
) -> None:
    """Add sum_k f(sum_t left_kt right_kt^T) to each total; the inner sum runs over all tokens and uses.

    With one token per sample, f(l r^T) = f(l) f(r)^T. Then the sum over samples is one matrix product, and no
    per-sample gradient is computed. Otherwise the per-sample products are computed one tile at a time, in one buffer.

    Args:
        tokens: gives the left and right factors of a slice of samples.
        totals: one tensor (G, rows, columns) per right factor, with any strides.
        magnitude: f.
        num_samples: B.
        copied: how many numbers `tokens` copies per sample. If it copies many, fewer samples are processed at once.
    """
    if num_samples == 0 or totals[0].numel() == 0:
        return
    # For a 3x3 kernel, 64 channels and 32x32 pixels, a sample copies 32 * 32 * 192 numbers: 10 samples at once.
    step = max(1, min(num_samples, INPUTS // copied if copied else num_samples))
    for start in range(0, num_samples, step):
        uses = tokens(slice(start, min(start + step, num_samples)))
        for index, total in enumerate(totals):
            pairs = [(left, rights[index]) for left, rights in uses]
            if len(pairs) == 1 and pairs[0][0].shape[2] == 1:
                left, right = pairs[0]
                for group, own in enumerate(total):
                    _add_product(left[:, group, 0], right[:, group, 0], own, magnitude)
            elif not add_natively([(left, right, 1) for left, right in pairs], total, magnitude):
                _add_tiles(pairs, total, magnitude)


def can_add_natively(factors: Sequence[Tensor], magnitude: Magnitude) -> bool:
    """Whether the native library is there, and knows f and these factors."""
    return magnitude in NATIVE and takes_products(*factors)


def add_natively(uses: Sequence[Factors], total: Tensor, magnitude: Magnitude) -> bool:
    """Add sum_k f(sum_t left_kt right_kt^T) to (G, rows, columns) in the native library; whether it could."""
    factors = [tensor for left, right, _ in uses for tensor in (left, right)]
    if total.dtype != torch.float32 or not can_add_natively(factors, magnitude):
        return False
    add_native_products(uses, total, NATIVE[magnitude], lambda size: scratch("native", (size,), total))
    return True


def add_token_products(lefts: Sequence[Tensor], rights: Sequence[Tensor], total: Tensor, magnitude: Magnitude) -> None:
    """Add sum_k f(sum_t left_kt right_kt^T), (rows, columns).

    Args:
        lefts: per use, a tensor (B, ..., rows). The dimensions between are tokens. In half precision, too.
        rights: per use, a tensor (B, ..., columns).
        total: (rows, columns), added to in place.
        magnitude: f.
    """
    if len(lefts) == 1 and lefts[0].ndim == 2:
        _add_product(lefts[0].to(total.dtype), rights[0].to(total.dtype), total, magnitude)
        return
    if not can_add_natively([*lefts, *rights], magnitude):
        lefts, rights = ([factor.to(total.dtype) for factor in factors] for factors in (lefts, rights))
    pairs = [(_tokens_of(left), _tokens_of(right)) for left, right in zip(lefts, rights, strict=True)]
    left, right = pairs[0]
    num_tokens = sum(own.shape[2] for own, _ in pairs)
    copied = 0 if len(pairs) == 1 and num_tokens > 1 else num_tokens * (left.shape[-1] + right.shape[-1])

    def tokens(some: slice) -> Sequence[tuple[Tensor, Sequence[Tensor]]]:
        if len(pairs) == 1:
            return [(left[some], [right[some]])]
        own_lefts, own_rights = zip(*((left[some], right[some]) for left, right in pairs), strict=True)
        # Two uses with factors (B, 1, 1, rows) are joined into (B, 1, 2, rows): one product over two tokens, instead of
        # two products over one token each.
        return [(torch.cat(own_lefts, 2), [torch.cat(own_rights, 2)])]

    add_outer_products(tokens, [total.unsqueeze(0)], magnitude, num_samples=len(left), copied=copied)


def _tokens_of(features: Tensor) -> Tensor:
    """(B, ..., features) -> (B, 1, T, features)."""
    return features.reshape(len(features), 1, math.prod(features.shape[1:-1]), features.shape[-1])


def _add_product(left: Tensor, right: Tensor, total: Tensor, magnitude: Magnitude) -> None:
    """Add f(left)^T f(right), the sum for one token per sample."""
    bare = magnitude(right, scratch("right", right.shape, right))
    total.addmm_(magnitudes(left, magnitude).T, bare)


def _add_tiles(pairs: Sequence[tuple[Tensor, Tensor]], total: Tensor, magnitude: Magnitude) -> None:
    """Add sum_k f(sum_t left_kt right_kt^T) to (G, rows, columns), in tiles of some samples, rows and columns.

    With more than one group and large products, each group is added by a call of its own.
    """
    if add_fused_products(pairs, total, magnitude):
        return
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
    # With 2 threads, 7 samples would leave one thread waiting: take 6.
    depth -= depth % threads if depth > threads else 0
    factors = [(left.flatten(0, 1).transpose(1, 2), right.flatten(0, 1)) for left, right in pairs]
    for row in range(0, rows, height):
        for column in range(0, columns, width):
            block = total[:, row : row + height, column : column + width]
            parts = [(left[:, row : row + height], right[..., column : column + width]) for left, right in factors]
            # A block of some columns has gaps between its rows, and `_add_samples` needs one flat vector.
            if block.is_contiguous():
                _add_samples(parts, depth, block, magnitude)
            else:
                found = scratch("total of tiles", block.shape, block).zero_()
                _add_samples(parts, depth, found, magnitude)
                block += found


def _add_samples(parts: Sequence[tuple[Tensor, Tensor]], depth: int, total: Tensor, magnitude: Magnitude) -> None:
    """Add all samples for the rows and columns of one tile.

    Per use, `parts` holds a left factor (B * G, rows, tokens) and a right factor (B * G, tokens, columns). Each step
    takes `depth` samples and makes only three calls, since a call costs as much as a small product:

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
        # The same as `flat += samples.sum(0)`, but faster.
        flat.addmv_(samples.view(num_samples, -1).t(), ones[:num_samples])


def _tile(num_samples: int, rows: int, columns: int, area: int) -> tuple[int, int, int]:
    """The size (samples, rows, columns) of a tile with about `area` numbers."""
    # For example, 32 samples on 2 threads, area 2^19:
    #   matrix (768, 2304)    3 samples, 192 rows, 768 columns
    #   matrix (256, 1152)    7 samples, 128 rows, 576 columns
    #   matrix (64, 64)       32 samples, the whole matrix
    width = _equal_part(columns, WIDTH)
    height = _equal_part(rows, max(HEIGHT, area // (DEPTH * width)))
    return max(1, min(num_samples, area // (height * width))), height, width


def _equal_part(whole: int, most: int) -> int:
    """Cut `whole` into the fewest equal parts of at most `most`; the size of a part, as a multiple of 16.

    A row of 1500 with `most` 1024 gives two parts, of 752 and 748.
    """
    part = math.ceil(whole / math.ceil(whole / most))
    return min(whole, 16 * math.ceil(part / 16))
