"""The two updates of protection in C: one pass over memory, compiled on this machine if it has a C compiler.

Owns how the source beside this file is compiled, loaded and called, and which tensors it can update. `penalty` has the
same arithmetic in torch, for all other tensors.
"""

import ctypes
import os
import shlex
import shutil
import subprocess
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, Final

import torch
from torch import Tensor

SOURCE: Final = Path(__file__).with_suffix(".c")
FLAGS: Final = ("-O3", "-march=native", "-fno-math-errno", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")

SMALLEST: float = 2**20
"""The number of weights from which C is used: compiling takes a third of a second, which fewer weights do not repay."""


def add_gradients_in_c_(items: Sequence[tuple[Tensor, ...]], factors: Sequence[float]) -> set[int]:
    """gradient += factor (theta - anchor) Omega for items (gradient, theta, anchor, Omega).

    Returns:
        The indices of the items that were updated.
    """
    return _update("add_gradients", items, 3, [factors])


def pull_in_c_(items: Sequence[tuple[Tensor, ...]], offsets: Sequence[Any], scales: Sequence[Any]) -> set[int]:
    """theta += Omega / (Omega + offset + scale sqrt(v)) (anchor - theta) for items (theta, anchor, Omega[, v]).

    Returns:
        The indices of the items that were updated.
    """
    return _update("pull", items, 2, [offsets, scales])


def _update(
    name: str, items: Sequence[tuple[Tensor, ...]], index_of_omega: int, numbers: Sequence[Sequence[Any]]
) -> set[int]:
    """Call a function of the source on the items that it can update, if they hold at least `SMALLEST` weights."""
    chosen = [
        index
        for index, item in enumerate(items)
        if _can_update(item, item[index_of_omega]) and all(isinstance(own[index], (int, float)) for own in numbers)
    ]
    if sum(items[i][0].numel() for i in chosen) < SMALLEST or torch.compiler.is_compiling():
        return set()
    library = _library()
    if library is None:
        return set()
    count = len(chosen)

    def pointers(part: int) -> Any:
        return (ctypes.c_void_p * count)(*(items[i][part].data_ptr() for i in chosen))

    tensors = [pointers(part) for part in range(len(items[0]))]
    if name == "pull" and len(tensors) == 3:
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


@cache
def _library() -> ctypes.CDLL | None:
    """The source, compiled for this processor by the command in CC, by default cc; None if that fails."""
    try:
        command = shlex.split(os.environ.get("CC", "cc"))
        if not command or shutil.which(command[0]) is None:
            return None
        with TemporaryDirectory(prefix="memsyn-") as folder:
            built = str(Path(folder, "update.so"))
            subprocess.run([*command, *FLAGS, str(SOURCE), "-o", built], check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(built)
    except (OSError, ValueError, subprocess.SubprocessError):
        return None
