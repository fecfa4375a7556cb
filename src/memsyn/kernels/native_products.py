"""Sums of outer products in the native library: the products stay in registers, and never reach memory.

Owns how strided tensors are described to the library, and which tensors it can take. `outer_products` has the same sum
in torch, for all other tensors. Must not know layers.
"""

import ctypes
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from memsyn.native import native_library

MOST_DIMS = 4
"""The most dimensions that tokens, or features, may have. The library's source holds this number too."""

MOST_TRANSPOSED = 2**16
"""The most weights of a matrix that the library sums transposed, if it has more rows than columns."""

Factors = tuple[Tensor, Tensor, int]
"""The left and the right factor of one use, (B, G, *tokens, rows) and (B, G, *tokens, *columns), and the number of
dimensions of the tokens, which must agree in their number only. Any strides."""


def takes_products(*tensors: Tensor) -> bool:
    """Whether the library is there, and can read these factors: on the CPU, in float32 or bfloat16."""
    return (
        native_library() is not None
        and all(
            type(tensor) in (Tensor, nn.Parameter)
            and tensor.dtype in (torch.float32, torch.bfloat16)
            and tensor.device.type == "cpu"
            and tensor.layout is torch.strided
            and not tensor.is_neg()  # a view that negates when it is read
            for tensor in tensors
        )
        and not torch.compiler.is_compiling()
    )


def add_native_products(uses: Sequence[Factors], total: Tensor, code: int, scratch: Callable[[int], Tensor]) -> None:
    """total (G, rows, columns) += sum_k f(sum_t left_kt right_kt^T); t runs over the tokens of all uses.

    Args:
        uses: factors for which `takes_products` holds.
        total: in float32, with any strides.
        code: f, as the library numbers it: 0 for |g|, 1 for g^2, 2 for g.
        scratch: gives memory for this many numbers of float32.
    """
    library = native_library()
    assert library is not None
    if total.shape[2] < total.shape[1] and total[0].numel() <= MOST_TRANSPOSED:
        # Rows are taken one by one, and columns by whole vectors: of 40 columns, 48 would be computed.
        uses, written = [(right, left, num_dims) for left, right, num_dims in uses], total.transpose(1, 2)
    else:
        written = total
    groups, rows, columns = written.shape
    threads = torch.get_num_threads()
    samples = len(uses[0][0])
    problem = (total.data_ptr(), *written.stride(), groups, samples, rows, columns, code, threads, len(uses))
    factors: list[int] = []
    for left, right, num_dims in uses:
        factors += _described(left, num_dims)
        factors += _described(right, num_dims)
    arguments = (ctypes.c_int64 * len(problem))(*problem), (ctypes.c_int64 * len(factors))(*factors)
    memory = scratch(library.memsyn_scratch(*arguments))
    library.memsyn_outer_products(*arguments, ctypes.c_void_p(memory.data_ptr()))
    # Autograd did not see the write.
    torch.autograd.graph.increment_version(total)


def copy_channels_last(image: Tensor, padded: Tensor, before: Sequence[int]) -> None:
    """Copy images (b, C, *spatial) to zero-padded ones (b, *spatial, C) in float32 without gaps.

    Args:
        image: images for which `takes_products` holds, with up to three spatial dimensions. Pixels that do not fit are
            left out.
        padded: the result.
        before: the number of zeros before the image, per spatial dimension.
    """
    library = native_library()
    assert library is not None
    missing = 5 - image.ndim
    image_strides = image.stride()
    numbers = (
        *(image.data_ptr(), int(image.dtype == torch.bfloat16), image_strides[0], image.shape[1], image_strides[1]),
        *([1] * missing + [*image.shape[2:]]),
        *([0] * missing + [*image_strides[2:]]),
        *([0] * missing + [*before]),
        *([1] * missing + [*padded.shape[1:-1]]),
        *(len(image), torch.get_num_threads()),
    )
    library.memsyn_channels_last((ctypes.c_int64 * len(numbers))(*numbers), ctypes.c_void_p(padded.data_ptr()))


def _described(factor: Tensor, num_dims: int) -> list[int]:
    """A factor as the library's struct: where it lies, then sizes and strides of the tokens, then of the features."""
    sizes, strides, split = factor.shape, factor.stride(), 2 + num_dims
    described = [factor.data_ptr(), int(factor.dtype == torch.bfloat16), strides[0], strides[1]]
    for start, stop in ((2, split), (split, factor.ndim)):
        missing = MOST_DIMS - (stop - start)
        described += [1] * missing
        described += sizes[start:stop]
        described += [0] * missing
        described += strides[start:stop]
    return described
