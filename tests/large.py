"""Saves and loads a memory of a given size, and prints what that took beyond the memory itself.

Usage: python -m tests.large MEGABYTES FOLDER
"""

import json
import sys
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

from memsyn import Consolidation, Memory

HISTORY = (Consolidation("2026-11-22T12:00:00+00:00", 4, "sum", None, "squared_l2_norm", "abs"),)


def kilobytes(field: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))


def peak_of(action: Callable[[], object]) -> tuple[object, int, float]:
    """What it returns, the highest resident memory while it ran in bytes, and its seconds."""
    Path("/proc/self/clear_refs").write_text("5")  # VmHWM starts anew
    assert kilobytes("VmHWM") < kilobytes("VmRSS") + 1024
    start = time.perf_counter()
    found = action()
    return found, 1024 * kilobytes("VmHWM"), time.perf_counter() - start


def memory_of(num_bytes: int) -> Memory:
    """Half of it in one parameter; some of it in bf16, in 64 bits, empty, a scalar, and not contiguous."""
    half = num_bytes // 16
    shapes = {"big": (half,), **{f"layers.{number}.weight": (half // 64, 4) for number in range(16)}}
    anchor = {name: torch.full(shape, 0.5) for name, shape in shapes.items()}
    anchor |= {"half": torch.full((1000,), 0.5, dtype=torch.bfloat16), "wide": torch.full((9,), 0.5).double()}
    anchor |= {"scalar": torch.tensor(0.5), "none": torch.ones(0, 3), "turned": torch.arange(2000.0).reshape(20, 100).T}
    importance = {name: tensor.clone() for name, tensor in anchor.items()}
    return Memory(anchor, importance, HISTORY, dict.fromkeys(anchor, 4))


def check(memory: Memory) -> None:
    for tensors in (memory.anchor, memory.importance):
        for name, tensor in tensors.items():
            expected = torch.arange(2000.0).reshape(20, 100).T if name == "turned" else torch.tensor(0.5)
            assert tensor.dtype == {"half": torch.bfloat16, "wide": torch.float64}.get(name, torch.float32)
            assert all(bool((part == expected).all()) for part in tensor.split(2**20)) if tensor.ndim else tensor == 0.5


def main(megabytes: int, folder: Path) -> None:
    path = folder / "large.memsyn.safetensors"
    memory_of(2**16).save(path)  # what is imported and allocated once
    Memory.load(path)
    baseline = 1024 * kilobytes("VmRSS")
    memory = memory_of(megabytes * 2**20)
    size = sum(t.nbytes for tensors in (memory.anchor, memory.importance) for t in tensors.values())
    _, saving, save_seconds = peak_of(partial(memory.save, path))
    del memory
    loaded, loading, load_seconds = peak_of(partial(Memory.load, path))
    assert isinstance(loaded, Memory)
    check(loaded)
    found = {
        "size": size, "file": path.stat().st_size, "saving": (saving - baseline) / size,
        "loading": (loading - baseline) / size, "save_seconds": save_seconds, "load_seconds": load_seconds,
    }  # fmt: skip
    path.unlink()
    print(json.dumps(found))


if __name__ == "__main__":
    main(int(sys.argv[1]), Path(sys.argv[2]))
