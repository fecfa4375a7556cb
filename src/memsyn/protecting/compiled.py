"""The two updates of protection in one pass over memory, by the C compiler of the machine, if it has one.

Owns how the source beside this file is compiled, loaded and called, and which tensors it can take. `penalty` has the
same arithmetic in torch, for all others.
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
"""Fewer weights in all are updated sooner than the source is compiled, which takes a third of a second."""


def add_gradients_(items: Sequence[tuple[Tensor, ...]], factors: Sequence[float]) -> set[int]:
    """gradient += factor (theta - anchor) Omega for (gradient, theta, anchor, Omega); which of them it did."""
    return _update("add_gradients", items, 3, [factors])


def pull_(items: Sequence[tuple[Tensor, ...]], offsets: Sequence[Any], scales: Sequence[Any]) -> set[int]:
    """theta += Omega / (Omega + offset + scale sqrt(v)) (anchor - theta) for (theta, anchor, Omega, v), or without v.

    Returns:
        Which of them it did.
    """
    return _update("pull", items, 2, [offsets, scales])


def _update(
    name: str, items: Sequence[tuple[Tensor, ...]], place_of_omega: int, numbers: Sequence[Sequence[Any]]
) -> set[int]:
    """Call a function of the source with those of the items that it can take, if they are enough to compile it."""
    chosen = [
        index
        for index, item in enumerate(items)
        if _can_take(item, item[place_of_omega]) and all(isinstance(own[index], (int, float)) for own in numbers)
    ]
    if sum(items[i][0].numel() for i in chosen) < SMALLEST or torch.compiler.is_compiling():
        return set()
    library = _library()
    if library is None:
        return set()
    count = len(chosen)

    def pointers(place: int) -> Any:
        return (ctypes.c_void_p * count)(*(items[i][place].data_ptr() for i in chosen))

    tensors = [pointers(place) for place in range(len(items[0]))]
    if name == "pull" and len(tensors) == 3:
        tensors.append((ctypes.c_void_p * count)())
    library[name](
        ctypes.c_int64(count),
        (ctypes.c_int64 * count)(*(items[i][0].numel() for i in chosen)),
        *tensors,
        (ctypes.c_int32 * count)(*(items[i][place_of_omega].dtype == torch.bfloat16 for i in chosen)),
        *((ctypes.c_float * count)(*(own[i] for i in chosen)) for own in numbers),
        ctypes.c_int(torch.get_num_threads()),
    )
    for i in chosen:
        torch.autograd.graph.increment_version(items[i][0])
    return set(chosen)


def _can_take(item: tuple[Tensor, ...], omega: Tensor) -> bool:
    """Whether all lie in a row on the CPU, in float32, the importance perhaps in bfloat16."""
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
    """The source, compiled by CC (cc, unless the environment says otherwise) for this processor; None if it cannot."""
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
