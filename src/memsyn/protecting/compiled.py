"""The two updates of protection in the native library: one pass over memory.

Owns how the library is called for them, and which tensors it can update. `penalty` has the same arithmetic in torch,
for all other tensors.
"""

import ctypes
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from memsyn.native import native_library

SMALLEST: float = 2**17
"""The number of weights from which the library is used. Below it, torch takes no longer: calls are most of the time."""


def add_gradients_in_c_(items: Sequence[tuple[Tensor, ...]], factors: Sequence[float]) -> set[int]:
    """gradient += factor (theta - anchor) Omega for items (gradient, theta, anchor, Omega).

    Returns:
        The indices of the items that were updated.
    """
    return _update("memsyn_add_gradients", items, 3, [factors])


def pull_in_c_(items: Sequence[tuple[Tensor, ...]], offsets: Sequence[Any], scales: Sequence[Any]) -> set[int]:
    """theta += Omega / (Omega + offset + scale sqrt(v)) (anchor - theta) for items (theta, anchor, Omega[, v]).

    Returns:
        The indices of the items that were updated.
    """
    return _update("memsyn_pull", items, 2, [offsets, scales])


def _update(
    name: str, items: Sequence[tuple[Tensor, ...]], index_of_omega: int, numbers: Sequence[Sequence[Any]]
) -> set[int]:
    """Call a function of the library on the items that it can update, if they hold at least `SMALLEST` weights."""
    chosen = [
        index
        for index, item in enumerate(items)
        if _can_update(item, item[index_of_omega]) and all(isinstance(own[index], (int, float)) for own in numbers)
    ]
    if sum(items[i][0].numel() for i in chosen) < SMALLEST or torch.compiler.is_compiling():
        return set()
    library = native_library()
    if library is None:
        return set()
    count = len(chosen)

    def pointers(part: int) -> Any:
        return (ctypes.c_void_p * count)(*(items[i][part].data_ptr() for i in chosen))

    tensors = [pointers(part) for part in range(len(items[0]))]
    if name == "memsyn_pull" and len(tensors) == 3:
        tensors.append((ctypes.c_void_p * count)())  # null pointers: no squares
    library[name](
        ctypes.c_int64(count),
        (ctypes.c_int64 * count)(*(items[i][0].numel() for i in chosen)),
        *tensors,
        (ctypes.c_int32 * count)(*(items[i][index_of_omega].dtype == torch.bfloat16 for i in chosen)),
        *((ctypes.c_float * count)(*(own[i] for i in chosen)) for own in numbers),
        ctypes.c_int(torch.get_num_threads()),
    )
    for i in chosen:
        # Autograd did not see the write. Without this, a backward pass through the old value would be wrong in silence.
        torch.autograd.graph.increment_version(items[i][0])
    return set(chosen)


def _can_update(item: tuple[Tensor, ...], omega: Tensor) -> bool:
    """Whether all tensors are contiguous, on the CPU and in float32; the importance may be in bfloat16."""
    return omega.dtype in (torch.float32, torch.bfloat16) and all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.shape == omega.shape
        and tensor.device.type == "cpu"
        and (tensor is omega or tensor.dtype == torch.float32)
        and tensor.is_contiguous()
        for tensor in item
    )
