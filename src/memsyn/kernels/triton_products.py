"""sum_k f(sum_t left_kt right_kt^T) on a GPU, by one kernel in Triton: no per-sample product is written to memory.

Owns the kernel, its block sizes and how it is launched. Imports triton, so that only `fused_products` may import this
file, when it is needed. Must not decide which products it computes.
"""

import math
from collections.abc import Sequence
from functools import cache
from typing import Any, Final

import torch
import triton
import triton.language as tl
from torch import Tensor

from memsyn.kernels.outer_products import Magnitude, absolute, signed, square

FUNCTIONS: Final[dict[Magnitude, str]] = {absolute: "abs", square: "square", signed: "signed"}
"""The functions f that the kernel has."""

PROGRAMS: Final = 1024
"""About how many programs a launch has at least, if there are enough samples: some for each processor of a large GPU.

It is not read from the device, so that samples are added in the same order on all GPUs.
"""

LARGEST_OUTPUT: Final = 2**25
"""The most numbers that all parts of the samples write: 128 MiB of float32. A larger matrix is not cut into parts."""

BLOCKS: Final = ((32, 32, 4, 2), (64, 64, 4, 3), (64, 128, 8, 3), (128, 64, 8, 3), (128, 128, 8, 2))
"""Rows, columns, warps and pipeline stages of a program, from which the autotuner chooses.

They were chosen so that float32 needs no more registers than an A100 or H100 has. None was timed on a GPU.
"""

TOKENS: Final = 32
"""Tokens that one step multiplies. The same for all block sizes, so that they add tokens in the same order."""

OPTIONS: Final = {"enable_fp_fusion": True}
"""For the compiler: multiply and add by one instruction. Triton 3.9 warns unless this is said, 3.10 will not do it."""


@triton.jit(do_not_specialize=["bucket_rows", "bucket_columns", "bucket_tokens"])  # type: ignore[untyped-decorator]
def products_kernel(
    left: "Any", right: "Any", out: "Any",
    num_samples: "Any", num_groups: "Any", num_tokens: "Any", rows: "Any", columns: "Any", samples_per_part: "Any",
    left_sample: "Any", left_group: "Any", left_token: "Any", left_row: "Any",
    right_sample: "Any", right_group: "Any", right_token: "Any", right_column: "Any",
    bucket_rows: "Any", bucket_columns: "Any", bucket_tokens: "Any",
    KIND: tl.constexpr, WIDEN: tl.constexpr,
    BLOCK_ROWS: tl.constexpr, BLOCK_COLUMNS: tl.constexpr, BLOCK_TOKENS: tl.constexpr,
) -> None:  # fmt: skip
    """One program: out[part, group, some rows, some columns] = sum of f over the samples of this part.

    `left_sample` and the like are strides. The autotuner reads the buckets, and the kernel does not. Annotations are
    texts, because Triton reads them as part of the program, and does not know `Any`.
    """
    # A stride times an index may exceed 32 bits, so indices are in 64.
    place = tl.program_id(0)
    across, down = tl.cdiv(columns, BLOCK_COLUMNS), tl.cdiv(rows, BLOCK_ROWS)
    group = (place // (across * down) % num_groups).to(tl.int64)
    part = (place // (across * down * num_groups)).to(tl.int64)
    row = ((place // across % down) * BLOCK_ROWS + tl.arange(0, BLOCK_ROWS)).to(tl.int64)
    column = ((place % across) * BLOCK_COLUMNS + tl.arange(0, BLOCK_COLUMNS)).to(tl.int64)
    token = tl.arange(0, BLOCK_TOKENS)
    first = part * samples_per_part
    lefts = left + first * left_sample + group * left_group
    lefts = lefts + row[:, None] * left_row + token.to(tl.int64)[None, :] * left_token
    rights = right + first * right_sample + group * right_group
    rights = rights + token.to(tl.int64)[:, None] * right_token + column[None, :] * right_column
    is_row, is_column = (row < rows)[:, None], (column < columns)[None, :]
    summed = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
    for _ in range(0, tl.minimum(samples_per_part, num_samples - first)):
        products = tl.zeros((BLOCK_ROWS, BLOCK_COLUMNS), tl.float32)
        own_lefts, own_rights = lefts, rights
        for start in range(0, num_tokens, BLOCK_TOKENS):
            is_token = token < num_tokens - start
            some = tl.load(own_lefts, mask=is_row & is_token[None, :], other=0.0)
            others = tl.load(own_rights, mask=is_token[:, None] & is_column, other=0.0)
            if WIDEN:
                some, others = some.to(tl.float32), others.to(tl.float32)
            products = tl.dot(some, others, products, input_precision="ieee")
            own_lefts += tl.cast(left_token, tl.int64) * BLOCK_TOKENS
            own_rights += tl.cast(right_token, tl.int64) * BLOCK_TOKENS
        if KIND == "abs":
            products = tl.abs(products)
        elif KIND == "square":
            products = products * products
        summed += products
        lefts += left_sample
        rights += right_sample
    places = ((part * num_groups + group) * rows + row[:, None]) * columns + column[None, :]
    tl.store(out + places, summed, mask=is_row & is_column)


def takes(pairs: Sequence[tuple[Tensor, Tensor]], total: Tensor, magnitude: Magnitude) -> bool:
    """Whether the kernel can compute this: f is one of ours, sums are in float32, and factors are not wider."""
    dtypes = {factor.dtype for pair in pairs for factor in pair}
    return (
        magnitude in FUNCTIONS
        and total.dtype == torch.float32
        and len(dtypes) == 1
        and dtypes <= {torch.float32, torch.bfloat16, torch.float16}
    )


def add_products(pairs: Sequence[tuple[Tensor, Tensor]], total: Tensor, magnitude: Magnitude) -> None:
    """Add sum_k f(sum over uses and tokens of left_kt right_kt^T) to `total`, if `takes` says so.

    If this raises, nothing was added.

    Args:
        pairs: per use, factors (B, G, T, rows) and (B, G, T, columns), with any strides.
        total: (G, rows, columns), with any strides.
        magnitude: f.
    """
    left, right = pairs[0] if len(pairs) == 1 else (torch.cat(own, 2) for own in zip(*pairs, strict=True))
    num_samples, groups, num_tokens, rows = left.shape
    columns = right.shape[-1]
    if num_samples == 0 or total.numel() == 0:
        return
    per_part = math.ceil(num_samples / _num_parts(num_samples, groups, rows, columns))
    # The kernel writes to memory of its own, since the autotuner launches it several times.
    out = total.new_empty(math.ceil(num_samples / per_part), groups, rows, columns)
    buckets = [(max(size, 16) - 1).bit_length() for size in (rows, columns, num_tokens)]
    sizes = (num_samples, groups, num_tokens, rows, columns, per_part)
    with torch.cuda.device_of(out):
        _launch(left, right, out, (*sizes, *left.stride(), *right.stride(), *buckets), FUNCTIONS[magnitude])
    total += out.sum(0) if len(out) > 1 else out[0]


def _num_parts(num_samples: int, groups: int, rows: int, columns: int) -> int:
    """Into how many parts the samples are cut: a small matrix has too few blocks to keep a GPU busy."""
    blocks = groups * math.ceil(rows / 64) * math.ceil(columns / 64)
    return max(1, min(num_samples, PROGRAMS // blocks, LARGEST_OUTPUT // (groups * rows * columns)))


def _launch(left: Tensor, right: Tensor, out: Tensor, numbers: tuple[int, ...], kind: str) -> None:
    """Run the kernel: autotuned on a GPU, with blocks of 16 in Triton's interpreter."""
    _, groups, rows, columns = out.shape
    options: dict[str, Any] = {"KIND": kind, "WIDEN": False}
    kernel: Any = products_kernel
    if left.is_cuda:
        kernel, options = _tuned(), options | OPTIONS
    else:
        # The interpreter multiplies the bits of bfloat16 as integers.
        options |= {"WIDEN": True, "BLOCK_ROWS": 16, "BLOCK_COLUMNS": 16, "BLOCK_TOKENS": 16}

    def grid(blocks: dict[str, Any]) -> tuple[int]:
        height, width = blocks["BLOCK_ROWS"], blocks["BLOCK_COLUMNS"]
        return (len(out) * groups * math.ceil(rows / height) * math.ceil(columns / width),)

    kernel[grid](left, right, out, *numbers, **options)


@cache
def _tuned() -> Any:
    """The kernel with an autotuner, which times all block sizes for each new bucket of sizes, dtype and f."""
    configs = [
        triton.Config(
            {"BLOCK_ROWS": rows, "BLOCK_COLUMNS": columns, "BLOCK_TOKENS": TOKENS}, num_warps=warps, num_stages=stages
        )
        for rows, columns, warps, stages in BLOCKS
    ]
    keys = ["bucket_rows", "bucket_columns", "bucket_tokens", "KIND"]
    return triton.autotune(configs, key=keys)(products_kernel)
