"""What another process can import: models that behave, and one that does not."""

import os

import torch
from torch import Tensor, nn


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
    """Ends its process on the second batch that holds a 13, and prints."""

    def forward(self, x: Tensor) -> Tensor:
        print("a model may print")
        if torch.is_grad_enabled() and bool((x == 13).any()):
            os._exit(7)
        return super().forward(x)
