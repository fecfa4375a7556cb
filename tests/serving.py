"""A small model, requests for it, and observers that take everything."""

import resource
import socket
import zlib
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

import memsyn


def a_model(seed: int = 0) -> nn.Module:
    generator = torch.Generator().manual_seed(seed)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3)).double().eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.uniform_(-1, 1, generator=generator)
    return model


def requests(count: int, seed: int = 0) -> list[Tensor]:
    generator = torch.Generator().manual_seed(seed)
    sizes = [1 + k % 3 for k in range(count)]
    return [torch.randn(size, 4, generator=generator, dtype=torch.float64) for size in sizes]


def begin(model: nn.Module, store: str | Path, **given: Any) -> memsyn.Observer:
    """One that takes everything, and writes when it is told to."""
    told = {"rate": 1.0, "room": 10**6, "interval": 1e6, "seed": 0}
    return memsyn.Observer(model, store, **{**told, **given})


def measured(model: nn.Module, batches: list[Any], **given: Any) -> memsyn.Importance:
    return memsyn.measure(model, batches, progress=False, **given)


def assert_same(found: memsyn.Importance, expected: memsyn.Importance, tolerance: float = 1e-12) -> None:
    assert found.num_samples == expected.num_samples
    assert found.quantity == expected.quantity
    for name, total in expected.sums.items():
        assert (found.sums[name] - total).norm() <= tolerance * total.norm(), name
    assert found.sums.keys() == expected.sums.keys()


class Words(nn.Module):
    """Takes what a language model does."""

    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 5, dtype=torch.float64)
        self.head = nn.Linear(5, 4, dtype=torch.float64)

    def forward(self, ids: Tensor, attention_mask: Tensor | None = None, scale: float = 1.0) -> Tensor:
        return self.head(self.table(ids).tanh()) * scale


class TwoPaths(nn.Module):
    """Uses its second layer and its scale only if a batch has `more`."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(4, 3, dtype=torch.float64), nn.Linear(2, 3, dtype=torch.float64)
        self.scale = nn.Parameter(torch.ones(3, dtype=torch.float64))

    def forward(self, x: Tensor, more: Tensor | None = None) -> Tensor:
        return self.first(x).tanh() * self.scale if more is None else self.first(x).tanh() + self.second(more)


def factors_of(model: nn.Module, batches: list[Any], estimator: str) -> memsyn.KroneckerFactors:
    found = memsyn.measure(model, batches, estimator=estimator, progress=False)
    assert isinstance(found, memsyn.KroneckerFactors)
    return found


def assert_same_factors(
    found: memsyn.KroneckerFactors, expected: memsyn.KroneckerFactors, tolerance: float = 1e-12
) -> None:
    assert (found.num_samples, found.quantity) == (expected.num_samples, expected.quantity)
    assert found.matrices == expected.matrices
    # The routes of other parameters are those since the last restart.
    matrices = {name for name, route in expected.routes.items() if route == "Kronecker factors"}
    assert matrices == {name for name, route in found.routes.items() if route == "Kronecker factors"}
    assert found.sums.keys() == expected.sums.keys()
    for name, total in expected.sums.items():
        assert (found.sums[name] - total).norm() <= tolerance * total.norm(), name


def png_of_chunks(width: int, height: int, *, text: int = 0) -> bytes:
    """A PNG whose header claims a size, with a compressed text of so many bytes; its pixels are missing."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return len(content).to_bytes(4, "big") + kind + content + zlib.crc32(kind + content).to_bytes(4, "big")

    header = width.to_bytes(4, "big") + height.to_bytes(4, "big") + bytes([8, 2, 0, 0, 0])
    found = b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header)
    found += chunk(b"zTXt", b"note\0\0" + zlib.compress(bytes(text))) if text else b""
    return found + chunk(b"IDAT", zlib.compress(bytes(100))) + chunk(b"IEND", b"")


def is_open(connection: socket.socket) -> bool:
    """Whether the other side of a connection has not closed it; what was received is read away."""
    connection.setblocking(False)
    try:
        while connection.recv(2**16):
            pass
        return False
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        connection.setblocking(True)


class Held(NamedTuple):
    """What a process holds."""

    resident: int
    """Bytes of memory."""
    descriptors: int
    threads: int


def held_by(process_id: int) -> Held:
    """What a process holds now, from Linux's /proc."""
    own = Path(f"/proc/{process_id}")
    pages = int((own / "statm").read_text().split()[1])
    return Held(pages * resource.getpagesize(), len(list((own / "fd").iterdir())), len(list((own / "task").iterdir())))


def children(process_id: int) -> list[int]:
    """The living children of a process, by Linux's /proc."""
    tasks = Path(f"/proc/{process_id}/task").iterdir()
    return sorted(int(child) for task in tasks for child in (task / "children").read_text().split())
