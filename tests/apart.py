"""What another process can import: models that behave, and one that does not."""

import os
import time

import torch
from torch import Tensor, nn

from memsyn import Observer
from memsyn.live.child_process import is_child


class Gated(nn.Module):
    """Two outputs by name, a parameter of use to none, a buffer, and tied weights."""

    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(4, 5).double()
        self.again = nn.Linear(4, 5, bias=False).double()
        self.again.weight = self.into.weight
        self.spare = nn.Parameter(torch.zeros(0, dtype=torch.float64))
        self.register_buffer("shift", torch.ones(5, dtype=torch.float64))

    def forward(self, x: Tensor, gate: float = 1.0) -> dict[str, Tensor]:
        hidden = self.into(x).tanh() * self.again(x) * gate + self.shift
        return {"logits": hidden, "count": torch.arange(len(x))}


def first_half(model: nn.Module, inputs: Tensor) -> Tensor:
    output: Tensor = model(inputs)
    return output[:, :2]


class Elsewhere(nn.Linear):
    """Another function in every process."""

    home = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) * (2 if os.getpid() == Elsewhere.home else 1)


class Fatal(nn.Linear):
    """Prints, and ends its process when it sees a 13, unless that is at home."""

    home = 0

    def forward(self, x: Tensor) -> Tensor:
        print("a model may print")
        if bool((x == 13).any()) and os.getpid() != Fatal.home:
            os._exit(7)
        return super().forward(x)


class Slow(nn.Linear):
    """Takes its time, unless it is at home."""

    home = 0

    def forward(self, x: Tensor) -> Tensor:
        if os.getpid() != Slow.home and len(x) == 2:
            time.sleep(60)
        return super().forward(x)


class Shifted(nn.Linear):
    """Another function in every process, which its bias does not show."""

    home = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x * (2 if os.getpid() == Shifted.home else 1))


class Cached(nn.Module):
    """Computes a weight of another one once, with a graph."""

    def __init__(self) -> None:
        super().__init__()
        self.a = nn.Linear(4, 2, bias=False).double()
        self.b = nn.Linear(2, 2).double()
        self.twice = self.a.weight * 2

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(x @ self.twice.T)
        return output


class Stray(nn.Module):
    """Computes with weights of a module that everybody has."""

    def __init__(self) -> None:
        super().__init__()
        self.a = SHARED
        self.b = nn.Linear(2, 2).double()

    def forward(self, x: Tensor) -> Tensor:
        output: Tensor = self.b(SHARED(x))
        return output


SHARED = nn.Linear(4, 2).double()
with torch.no_grad():
    for values in SHARED.parameters():
        values.copy_(torch.linspace(-1, 1, values.numel()).view_as(values))

if is_child():  # as a service does that is imported again
    OBSERVER = Observer(SHARED, os.environ["MEMSYN_TEST_STORE"], rate=1.0, process=False)
    OBSERVER.observe(torch.ones(1, 4, dtype=torch.float64))
    OBSERVER.flush()
