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
FLAGS: Final = ("-O3", "-march=native", "-fno-trapping-math", "-fopenmp", "-shared", "-fPIC")

SMALLEST: float = 2**20
"""Fewer weights in all are updated sooner than the source is compiled, which takes a third of a second."""


def add_gradients_(items: Sequence[tuple[Tensor, ...]], factors: Sequence[float]) -> set[int]:
    """gradient += factor (theta - anchor) Omega for (gradient, theta, anchor, Omega); which of them it did."""
    return _update("add_gradients", items, factors)


def pull_(items: Sequence[tuple[Tensor, ...]], inverses: Sequence[Any]) -> set[int]:
    """theta += Omega / (Omega + inverse) (anchor - theta) for (theta, anchor, Omega); which of them it did."""
    return _update("pull", items, inverses)


def _update(name: str, items: Sequence[tuple[Tensor, ...]], numbers: Sequence[Any]) -> set[int]:
    chosen = [i for i, (item, number) in enumerate(zip(items, numbers, strict=True)) if _can_take(item, number)]
    if sum(items[i][0].numel() for i in chosen) < SMALLEST or torch.compiler.is_compiling():
        return set()
    library = _library()
    if library is None:
        return set()
    pointers, halves = ctypes.c_void_p * len(chosen), [items[i][-1].dtype == torch.bfloat16 for i in chosen]
    library[name](
        ctypes.c_int64(len(chosen)),
        (ctypes.c_int64 * len(chosen))(*(items[i][0].numel() for i in chosen)),
        *(pointers(*(items[i][role].data_ptr() for i in chosen)) for role in range(len(items[0]))),
        (ctypes.c_int32 * len(chosen))(*halves),
        (ctypes.c_float * len(chosen))(*(numbers[i] for i in chosen)),
        ctypes.c_int(torch.get_num_threads()),
    )
    for i in chosen:
        torch.autograd.graph.increment_version(items[i][0])
    return set(chosen)


def _can_take(item: tuple[Tensor, ...], number: Any) -> bool:
    """Whether all lie in a row on the CPU, in float32, the importance perhaps in bfloat16, with a plain number."""
    if not isinstance(number, (int, float)):
        return False
    omega = item[-1]
    return omega.dtype in (torch.float32, torch.bfloat16) and all(
        type(tensor) in (Tensor, torch.nn.Parameter)
        and tensor.device.type == "cpu"
        and (tensor is omega or tensor.dtype == torch.float32)
        and tensor.is_contiguous()
        for tensor in item
    )


@cache
def _library() -> ctypes.CDLL | None:
    """The source, compiled by CC (cc, unless the environment says otherwise) for this processor; None if it cannot."""
    command = shlex.split(os.environ.get("CC", "cc"))
    if not command or shutil.which(command[0]) is None:
        return None
    try:
        with TemporaryDirectory(prefix="memsyn-") as folder:
            built = str(Path(folder, "update.so"))
            subprocess.run([*command, *FLAGS, str(SOURCE), "-o", built], check=True, capture_output=True, timeout=60)
            return ctypes.CDLL(built)
    except (OSError, subprocess.SubprocessError):
        return None
