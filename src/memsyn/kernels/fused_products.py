"""Whether per-sample products are computed by the kernel in Triton, in place of tiles.

Owns this decision, and that a kernel which failed is not tried again: the tiles give the same result. Must not import
triton until tensors are on a GPU.
"""

from collections.abc import Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Final

from torch import Tensor

from memsyn.torch_private import is_out_of_memory

if TYPE_CHECKING:
    from memsyn.kernels.outer_products import Magnitude

DEVICES: Final = {"cuda"}
"""The types of devices on which the kernel runs. Tests in Triton's interpreter add "cpu"."""

failures: Final[dict[str, str]] = {}
"""Dtype of the factors -> why the kernel failed for them. It is not tried again, in this process."""


def add_fused_products(pairs: Sequence[tuple[Tensor, Tensor]], total: Tensor, magnitude: "Magnitude") -> bool:
    """Add sum_k f(sum_t left_kt right_kt^T) to `total` by the kernel.

    Returns:
        False if nothing was added: the tensors are not on a GPU, the kernel has no such dtype or f, or it failed.
    """
    if total.device.type not in DEVICES:
        return False
    dtype = str(pairs[0][0].dtype)
    if dtype in failures:
        return False
    try:
        kernel = import_module("memsyn.kernels.triton_products")
        if not kernel.takes(pairs, total, magnitude):
            return False
        kernel.add_products(pairs, total, magnitude)
    except Exception as error:  # triton may be missing, and its compilers and drivers may raise anything
        # Tiles need less memory. The next product may be smaller.
        if not is_out_of_memory(error):
            failures[dtype] = f"{type(error).__name__}: {error}"
        return False
    return True
