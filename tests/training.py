"""A small task, and the plain loop that trains on it."""

import sys
from collections.abc import Callable
from pathlib import Path
from types import FrameType

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim import Optimizer

import memsyn


def a_task(dtype: torch.dtype = torch.float64) -> tuple[nn.Module, memsyn.Memory, Tensor, Tensor]:
    """A model, the memory of what it computes, and new data."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).to(dtype)
    data = torch.randn(20, 4, dtype=dtype)
    memory = memsyn.Memory.empty().consolidate(model, memsyn.measure(model, [data], progress=False))
    return model, memory, torch.randn(20, 4, dtype=dtype), torch.randint(3, (20,))


def train(model: nn.Module, optimizer: Optimizer, data: Tensor, targets: Tensor, steps: int = 1) -> None:
    for _ in range(steps):
        optimizer.zero_grad()
        F.cross_entropy(model(data), targets).backward()
        optimizer.step()


def assert_close(left: nn.Module, right: nn.Module, rtol: float = 1e-9) -> None:
    for found, expected in zip(left.parameters(), right.parameters(), strict=True):
        assert torch.allclose(found, expected, rtol=rtol, atol=1e-12)


def files_of(action: Callable[[], object]) -> set[str]:
    """The files of the package that an action runs through."""
    package, files = Path(memsyn.__file__).parent, set()

    def trace(frame: FrameType, event: str, argument: object) -> None:
        if Path(frame.f_code.co_filename).is_relative_to(package):
            files.add(Path(frame.f_code.co_filename).relative_to(package).as_posix())

    sys.setprofile(trace)
    try:
        action()
    finally:
        sys.setprofile(None)
    return files
